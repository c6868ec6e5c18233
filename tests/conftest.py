"""The tally of the oracle at the end of a run: here and not beside its cases, because with several processes only this
file is loaded where the summary is written."""

from __future__ import annotations

import pytest

_TALLY: dict[str, bool] = {}
"""Whether every test of an oracle case has passed so far."""


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note whether every test of a case passes."""
    path, _, rest = report.nodeid.partition("::")
    if path.startswith("tests/oracle/") and "@" in rest:
        case = rest[rest.index("[") + 1 : -1].partition("@")[0]
        _TALLY[case] = _TALLY.get(case, True) and not report.failed


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line: how many cases are equal."""
    if _TALLY:
        terminalreporter.write_line(f"{sum(_TALLY.values())}/{len(_TALLY)} LoRA oracle cases equal")
