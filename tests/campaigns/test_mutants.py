"""The campaigns can fail: every rule of the commit protocol that is broken is noticed by one of them."""

from __future__ import annotations

from pathlib import Path

from tests.campaigns.mutants import MUTANTS
from tests.campaigns.test_kills import found_by


def test_every_mutant_of_the_commit_protocol_is_caught_and_the_protocol_itself_is_not(tmp_path: Path) -> None:
    found = found_by("mutants", tmp_path)
    assert found["wrong"] == [], found["said"]
    assert found["points"] == len(MUTANTS) >= 10
    assert {name for caught in found["caught"].values() for name in caught} == {"order", "kills", "errnos"}
