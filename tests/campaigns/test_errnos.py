"""Whatever the system refuses, and whenever: a message, nothing that a loader takes, and the next run mends it."""

from __future__ import annotations

from pathlib import Path

from tests.campaigns.test_kills import found_by


def test_a_system_call_that_fails_or_comes_short_is_an_error_message_and_the_next_run_mends_it(tmp_path: Path) -> None:
    found = found_by("errnos", tmp_path, "--only", "sharded", "--step", 97)
    assert found["wrong"] == [], found["said"]
    assert found["points"] >= 25
    assert {"3", "7"} <= set(found["codes"]) <= {"0", "3", "7"}
