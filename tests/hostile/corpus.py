"""All malicious inputs by name."""

from __future__ import annotations

from tests.hostile import adapters, checkpoints, headers, pickles, sidecars, typed
from tests.hostile.case import Case, fine

CASES: tuple[Case, ...] = (
    fine("nothing is wrong", lambda place: None),
    *headers.CASES,
    *checkpoints.CASES,
    *adapters.CASES,
    *pickles.CASES,
    *sidecars.CASES,
    *typed.CASES,
)
