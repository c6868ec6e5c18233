"""Everything that can go wrong, as types that carry data.

    StreamMergeError                       1   (a bug of ours when raised bare)
      UsageError (ValueError)              2     BudgetError
      InputError                           3     InputMissingError (FileNotFoundError), MalformedInputError (ValueError)
                                                 UnsafeInputError (ValueError), InputReadError (OSError),
                                                 HubError (ConnectionError)
      AdapterError (ValueError)            4     UnmatchedKeysError, UnusedKeysError, IncompleteFactorsError,
                                                 ShapeMismatchError, NoEffectError, NonFiniteError, NotMergeableError,
                                                 UnknownFieldError, ConfigContradictionError, CompositionError,
                                                 BaseMismatchError
      OutputError                          5     OutputExistsError (FileExistsError), UnfinishedOutputError
      VerificationError                    6
      WriteError (OSError)                 7     NoSpaceError
      Interrupted                          128 + signal

To add one: subclass the row it belongs to, declare its fields, compose the text in `summary` and `details`; the exit
code comes with the row. Fields hold raw data; `summary`, `details` and `hint` escape what came from files.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, ClassVar

from streammerge.core.text import SHOWN, printable, shortened, size_text


@dataclass(eq=False)
class StreamMergeError(Exception):
    """Base of every refusal and failure that streammerge reports."""

    exit_code: ClassVar[int] = 1
    meaning: ClassVar[str] = "a bug of ours: a traceback and how to report it"

    def summary(self) -> str:
        """One line, without the word `error`."""
        return type(self).__name__

    def details(self) -> tuple[str, ...]:
        """Further lines: keys, what was tried, nearest names."""
        return ()

    def hint(self) -> str:
        """What to do next, or an empty string."""
        return ""

    def data(self) -> dict[str, Any]:
        """The fields as plain values, for `--json`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"error": type(self).__name__, "exit_code": self.exit_code, "message": self.summary(), **values}

    def __str__(self) -> str:
        lines = [printable(shortened(self.summary())), *(f"  {printable(shortened(line))}" for line in self.details())]
        return "\n".join([*lines, "", f"hint: {printable(shortened(self.hint()))}"] if self.hint() else lines)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


@dataclass(eq=False)
class _Plain(StreamMergeError):
    """A failure said in one sentence and perhaps a hint."""

    message: str = ""
    advice: str = ""

    def summary(self) -> str:
        return self.message

    def hint(self) -> str:
        return self.advice


def _listed(items: tuple[str, ...], most: int) -> tuple[str, ...]:
    more = (f"... {len(items) - most:,} more",) if len(items) > most else ()
    return (*(printable(item) for item in items[:most]), *more)


# --- 2: usage -----------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class UsageError(_Plain, ValueError):
    """An option or a combination of options that makes no sense."""

    exit_code: ClassVar[int] = 2
    meaning: ClassVar[str] = "usage or configuration, a budget too small for the plan"


@dataclass(eq=False)
class BudgetError(UsageError):
    """The plan needs more working memory than `--memory` grants; both in bytes."""

    needed: int = 0
    granted: int = 0
    because: str = ""

    def summary(self) -> str:
        return (
            f"the plan needs {size_text(self.needed)} of working memory, the budget is {size_text(self.granted)}"
            f" ({printable(self.because)})"
        )

    def hint(self) -> str:
        return f"give `--memory {-(-self.needed // 10**6)}MB` or more"


@dataclass(eq=False)
class MachineError(UsageError):
    """The system does not give the process the memory or the threads that it needs to work at all."""


# --- 3: inputs ----------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class InputError(StreamMergeError):
    """An input cannot be used, whatever the adapter says."""

    exit_code: ClassVar[int] = 3
    meaning: ClassVar[str] = (
        "an input is missing, unreadable, malformed, refused as unsafe, or the Hub cannot be reached"
    )


@dataclass(eq=False)
class InputMissingError(InputError, FileNotFoundError):
    """A file or directory that was named is not there, or holds no weights."""

    path: str = ""
    reason: str = "does not exist"
    advice: str = ""

    def summary(self) -> str:
        return f"`{printable(self.path)}` {printable(self.reason)}"

    def hint(self) -> str:
        return self.advice


@dataclass(eq=False)
class MalformedInputError(InputError, ValueError):
    """A file breaks the rules of its format."""

    path: str = ""
    reason: str = ""
    advice: str = ""

    def summary(self) -> str:
        return f"`{printable(self.path)}` is malformed: {printable(self.reason)}"

    def hint(self) -> str:
        return self.advice


@dataclass(eq=False)
class UnsafeInputError(MalformedInputError):
    """An input that would lead outside the checkpoint, or run code."""

    def summary(self) -> str:
        return f"`{printable(self.path)}` is refused as unsafe: {printable(self.reason)}"


@dataclass(eq=False)
class InputReadError(InputError, OSError):
    """Reading failed, or a file changed under us."""

    path: str = ""
    operation: str = "read"
    reason: str = ""

    def summary(self) -> str:
        return f"cannot {self.operation} `{printable(self.path)}`: {printable(self.reason)}"

    def hint(self) -> str:
        other = {
            "map": "`--read pread` reads without a mapping",
            "read past the page cache": "`--read auto` reads through it",
        }
        return other.get(self.operation, "")


@dataclass(eq=False)
class HubError(InputError, ConnectionError):
    """The Hub has no such repository, or cannot be reached."""

    repo: str = ""
    reason: str = ""
    advice: str = ""

    def summary(self) -> str:
        return f"cannot get `{printable(self.repo)}` from the Hub: {printable(self.reason)}"

    def hint(self) -> str:
        return self.advice


# --- 4: the adapter and the base ------------------------------------------------------------------------------------
@dataclass(eq=False)
class AdapterError(StreamMergeError, ValueError):
    """The adapter cannot be applied to this base as it stands."""

    exit_code: ClassVar[int] = 4
    meaning: ClassVar[str] = (
        "the adapter does not fit the base, has no effect, is not finite, is not mergeable or not supported, "
        "or the result is not finite"
    )


@dataclass(frozen=True, slots=True)
class UnmatchedKey:
    """One adapter key without a target: what was looked for, by which rules, and what looks like it."""

    key: str
    tried: tuple[str, ...] = ()
    nearest: tuple[str, ...] = ()


@dataclass(eq=False)
class UnmatchedKeysError(AdapterError, KeyError):
    """Adapter keys that match no tensor of the base. `total` counts all adapter keys, `tried` entries read
    `name (rule)`."""

    unmatched: tuple[UnmatchedKey, ...] = ()
    total: int = 0
    reason: str = "match no tensor in the base"
    advice: str = ""

    def summary(self) -> str:
        return f"{len(self.unmatched):,} of {self.total:,} adapter keys {self.reason}"

    def details(self) -> tuple[str, ...]:
        lines: list[str] = []
        for (tried, near), entries in groupby(self.unmatched[:SHOWN], key=lambda entry: (entry.tried, entry.nearest)):
            lines += [printable(entry.key) for entry in entries]
            lines += [f"  tried    {printable(name)}" for name in tried]
            lines += [f"  nearest  {printable(name)}" for name in near]
        if (more := len(self.unmatched) - SHOWN) > 0:
            lines.append(f"... {more:,} more, all of them with `streammerge inspect ADAPTER --base BASE`")
        return tuple(lines)

    def hint(self) -> str:
        return self.advice

    def data(self) -> dict[str, Any]:
        listed = [{"key": u.key, "tried": list(u.tried), "nearest": list(u.nearest)} for u in self.unmatched]
        return {**super().data(), "unmatched": listed}


@dataclass(eq=False)
class _About(AdapterError):
    """A refusal about named keys or modules of the adapter."""

    about: tuple[str, ...] = ()
    reason: str = ""
    advice: str = ""

    def summary(self) -> str:
        return printable(self.reason)

    def details(self) -> tuple[str, ...]:
        return _listed(self.about, SHOWN)

    def hint(self) -> str:
        return self.advice


@dataclass(eq=False)
class UnusedKeysError(_About):
    """Adapter tensors that no part of the plan uses."""


@dataclass(eq=False)
class IncompleteFactorsError(_About):
    """Factors of one half only, or an empty tensor where values should be."""


@dataclass(eq=False)
class ShapeMismatchError(_About):
    """Factors that resolve to a tensor of another shape."""


@dataclass(eq=False)
class NoEffectError(_About):
    """The adapter would change nothing."""


@dataclass(eq=False)
class NonFiniteError(_About, ArithmeticError):
    """NaN or infinity in the adapter, its config, or the result."""


@dataclass(eq=False)
class NotMergeableError(_About, NotImplementedError):
    """A method, option or base that cannot be merged, or not yet; `about` names it."""


@dataclass(eq=False)
class UnknownFieldError(_About):
    """Config fields that are set and that we do not know."""


@dataclass(eq=False)
class ConfigContradictionError(_About):
    """The adapter's config says one thing, its tensors another."""


@dataclass(eq=False)
class CompositionError(_About):
    """Several adapters whose effects on one tensor have no agreed sum."""


@dataclass(eq=False)
class BaseMismatchError(_About):
    """This base is visibly not the one the adapter was made for."""


# --- 5: the output ------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class OutputError(_Plain):
    """The output directory cannot be used as it is."""

    exit_code: ClassVar[int] = 5
    meaning: ClassVar[str] = "the output exists, or belongs to another plan; `verify` of an unfinished output"


@dataclass(eq=False)
class OutputExistsError(OutputError, FileExistsError):
    """The output directory holds something that this run must not touch."""


@dataclass(eq=False)
class UnfinishedOutputError(OutputError):
    """The directory holds no completion marker of ours."""


# --- 6: verification ------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class VerificationError(StreamMergeError):
    """The output is not what its report or its inputs say; `problems` holds one line each."""

    exit_code: ClassVar[int] = 6
    meaning: ClassVar[str] = "verification failed"
    output: str = ""
    problems: tuple[str, ...] = ()

    def summary(self) -> str:
        return f"`{printable(self.output)}` failed verification"

    def details(self) -> tuple[str, ...]:
        return _listed(self.problems, 2 * SHOWN)

    def hint(self) -> str:
        return "do not use this output; merge again, into a new directory or with `--overwrite`"


# --- 7: writing -----------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class WriteError(StreamMergeError, OSError):
    """An operation on the output failed."""

    exit_code: ClassVar[int] = 7
    meaning: ClassVar[str] = "I/O failed while writing, or there is not the space to start; the same command goes on"
    path: str = ""
    operation: str = "write"
    reason: str = ""

    def summary(self) -> str:
        return f"cannot {self.operation} `{printable(self.path)}`: {printable(self.reason)}"


@dataclass(eq=False)
class NoSpaceError(WriteError):
    """Less free space than the plan writes; both in bytes."""

    needed: int = 0
    free: int = 0

    def summary(self) -> str:
        return f"`{printable(self.path)}` has {size_text(self.free)} free, the plan writes {size_text(self.needed)}"

    def hint(self) -> str:
        return "free some space or choose another `--output`; nothing was written"


# --- 128 + n: signals -------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Interrupted(StreamMergeError):
    """Stopped by a signal between two tiles."""

    meaning: ClassVar[str] = "stopped by a signal; the same command goes on"
    signum: int = 0

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """128 + the signal's number, as shells report it."""
        return 128 + self.signum

    def summary(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}; nothing is lost: run the same command again"
