"""Errors are values: every class has its row's code, says what it holds, survives a pickle and escapes its text."""

from __future__ import annotations

import json
import pickle
import signal
from dataclasses import fields

import pytest

import streammerge as sm
from streammerge.core import errors
from streammerge.core.errors import (
    BudgetError,
    HubError,
    InputMissingError,
    Interrupted,
    NonFiniteError,
    NoSpaceError,
    NotMergeableError,
    OutputExistsError,
    StreamMergeError,
    UnmatchedKey,
    UnmatchedKeysError,
    UsageError,
    VerificationError,
    WriteError,
)

CLASSES = sorted(
    (cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, StreamMergeError)),
    key=lambda cls: cls.__name__,
)
ROWS = {
    errors.UsageError: 2, errors.InputError: 3, errors.AdapterError: 4, errors.OutputError: 5,
    errors.VerificationError: 6, errors.WriteError: 7,
}  # fmt: skip
STANDARD = {
    UsageError: ValueError, InputMissingError: FileNotFoundError, errors.MalformedInputError: ValueError,
    errors.InputReadError: OSError, HubError: ConnectionError, errors.AdapterError: ValueError,
    UnmatchedKeysError: KeyError, NonFiniteError: ArithmeticError, NotMergeableError: NotImplementedError,
    OutputExistsError: FileExistsError, WriteError: OSError,
}  # fmt: skip


def filled(cls: type[StreamMergeError]) -> StreamMergeError:
    """An error whose every field holds something hostile of its kind."""
    kinds = {"str": "a\x1b[2J\u202eb", "int": 15, "tuple[str, ...]": ("k\x1b", "l\u202e")}
    values: dict[str, object] = {item.name: kinds.get(str(item.type)) for item in fields(cls)}
    if cls is UnmatchedKeysError:
        values["unmatched"] = (UnmatchedKey("key\x1b", ("tried\u202e (exact)",), ("near\x1b",)),)
    assert None not in values.values(), f"{cls.__name__} has a field of a kind this test does not know"
    return cls(**values)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_has_the_code_of_its_row_and_the_class_it_stands_for(cls: type[StreamMergeError]) -> None:
    code = next((code for row, code in ROWS.items() if issubclass(cls, row)), 1)
    assert filled(cls).exit_code == (143 if cls is Interrupted else code)
    for ours, theirs in STANDARD.items():
        assert not issubclass(cls, ours) or issubclass(cls, theirs)
    assert issubclass(cls, sm.StreamMergeError)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_a_pickle_with_its_data(cls: type[StreamMergeError]) -> None:
    error = filled(cls)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error)
    assert again.data() == error.data()


@pytest.mark.parametrize("cls", CLASSES)
def test_an_errors_text_is_harmless_and_its_data_is_json(cls: type[StreamMergeError]) -> None:
    error = filled(cls)
    text = str(error)
    assert text
    assert not any(char in text for char in "\x1b\u202e")
    data = json.loads(json.dumps(error.data(), default=list))
    assert data["error"] == cls.__name__
    assert data["exit_code"] == error.exit_code
    assert data["message"]


def test_signals_end_with_their_number() -> None:
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        assert Interrupted(signum).exit_code == 128 + signum


def test_long_lists_are_cut_and_counted() -> None:
    keys = tuple(UnmatchedKey(f"k{n}", (f"t{n} (exact)",), ("near",)) for n in range(12))
    details = UnmatchedKeysError(keys, 40).details()
    assert UnmatchedKeysError(keys, 40).summary() == "12 of 40 adapter keys match no tensor in the base"
    assert [line for line in details if line.startswith("k")] == [f"k{n}" for n in range(5)]
    assert details[-1].startswith("... 7 more")
    assert UnmatchedKeysError(keys[:5], 40).details()[-1].strip() == "nearest  near"
    assert NotMergeableError(tuple(f"x{n}" for n in range(8)), "why").details()[-1] == "... 3 more"
    assert VerificationError("out", tuple(f"p{n}" for n in range(13))).details()[-1] == "... 3 more"


def test_figures_are_said_in_units() -> None:
    assert "needs 25.2 MB of working memory, the budget is 1 MB" in str(BudgetError(needed=25_200_000, granted=10**6))
    assert "has 5 kB free, the plan writes 9.08 kB" in str(NoSpaceError("/out", needed=9080, free=5000))


def test_everything_the_library_raises_can_be_caught_as_one_class_or_as_pythons_own(tmp_path: object) -> None:
    with pytest.raises(FileNotFoundError):
        sm.plan("./no/such/base", "./no/such/adapter")
    with pytest.raises(sm.StreamMergeError):
        sm.plan("./no/such/base", "./no/such/adapter")
