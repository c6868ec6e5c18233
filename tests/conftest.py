"""The order checker, which looks on in every test; and the tallies of the oracles at the end of a run: here and not
beside their cases, because with several processes only this file is loaded where the summary is written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.campaigns.listening import listen
from tests.campaigns.order import ORDER

ORDER.install()
listen()

ORACLES = {
    "tests/oracle/": "LoRA oracle cases equal",
    "tests/methods/": "PEFT method cases equal",
    "tests/architectures/": "model types equal to PEFT",
}
"""What the cases of a folder are; a test's case is what stands before the `@` in its parameters."""
UNBUILT = "test_what_is_left_out_cannot_be_built"

_TALLY: dict[str, dict[str, bool]] = {folder: {} for folder in ORACLES}
"""Whether every test of a case has passed so far."""
_REASONS: dict[str, str] = {}
"""Model types that cannot be built, and why."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "out_of_order: the test itself breaks the order in which files are written")


@pytest.fixture(autouse=True)
def files_are_written_in_order(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does: nothing of it comes before what it depends on is durable."""
    ORDER.clear()
    yield
    if request.node.get_closest_marker("out_of_order") is None:
        assert ORDER.wrong == []


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note whether every test of a case passes."""
    path, _, rest = report.nodeid.partition("::")
    folder = next((folder for folder in ORACLES if path.startswith(folder)), None)
    if folder is None or "@" not in rest:
        return
    case = rest[rest.index("[") + 1 : -1].partition("@")[0]
    if rest.startswith(UNBUILT):
        if reason := dict(report.user_properties).get("reason"):
            _REASONS[case] = str(reason)
    else:
        _TALLY[folder][case] = _TALLY[folder].get(case, True) and not report.failed


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each oracle: how many cases are equal; and what has no case."""
    for folder, what in ORACLES.items():
        if tally := _TALLY[folder]:
            terminalreporter.write_line(f"{sum(tally.values())}/{len(tally)} {what}")
    for case, reason in sorted(_REASONS.items()):
        terminalreporter.write_line(f"  not built: {case}: {reason}")
