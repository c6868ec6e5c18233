"""Which key of `rank_pattern` or `alpha_pattern` a module has, as PEFT finds it.

PEFT tries each key as a regular expression, from the start of the module's path or from after a dot to its end; the
first that matches decides (0.15 to 0.21.2). Keys are written by strangers: names are looked up, and whatever else a key
may be is matched in bounded time. The invariant: an answer is PEFT's, or there is none but an error that names the key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from streammerge.core.automata import Automaton, Budget, NoPatternError, PatternError
from streammerge.core.errors import ConfigContradictionError, NotMergeableError
from streammerge.core.text import shortened

MAX_STATES, MAX_TEXT = 100_000, 200_000
"""Of all keys of one field that are not plain names, together: states, and characters. All modules of a model written
as one pattern take some 30,000."""
STEPS, STEPS_EACH = 5_000_000, 5_000
"""Of matching, for one field, and what is added for each module: a second, and a millisecond."""
COMPARISON = 40
"""Steps that one comparison with a name that holds dots takes."""

_ANY = "\n"
"""Stands for a dot that was not escaped: any character but this one, which no module's path holds."""
_NAME = re.compile(r"(?:[\w/: -]|\.|\\[./: -])*+")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


class Patterns(Mapping[str, Any]):
    """The keys of one field with their values. Raises ConfigContradictionError for a key that is no pattern, and
    NotMergeableError for one that is not matched here, when it is made or when a module is looked up."""

    def __init__(self, field: str, values: Mapping[str, Any]) -> None:
        self._field, self._values = field, dict(values)
        self._keys = list(values)
        self._names: dict[str, int] = {}
        self._with_dots: dict[int, dict[int, list[tuple[int, str]]]] = {}
        self._automata: list[tuple[int, Automaton]] = []
        self._budget = Budget(STEPS, "takes too many steps to match")
        text = Budget(MAX_TEXT, f"is one of more than {MAX_TEXT:,} characters of patterns")
        states = Budget(MAX_STATES, f"is one of patterns with more than {MAX_STATES:,} states")
        for number, key in enumerate(self._keys):
            if _NAME.fullmatch(key):
                self._add_name(number, key)
                continue
            try:
                text.spend(len(key))
                self._automata.append((number, Automaton(rf"(.*\.)?({key})$", states)))
            except PatternError as error:
                raise self._refusal(key, error) from None

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def value_for(self, module: str, default: Any) -> Any:
        """The value of the first key that matches the path of a module, or `default`."""
        self._budget.left += STEPS_EACH
        first = min(self._matching_names(module), default=len(self._keys))
        for number, automaton in self._automata:
            if number > first:
                break
            try:
                if automaton.matches(module, self._budget):
                    first = number
                    break
            except PatternError as error:
                raise self._refusal(self._keys[number], error) from None
        return self._values[self._keys[first]] if first < len(self._keys) else default

    def _add_name(self, number: int, key: str) -> None:
        """A key without anything but dots for a regular expression to act on."""
        name = key.replace(".", _ANY)
        if "\\" in key:
            name = _ESCAPE.sub(lambda found: "." if found[1] == _ANY else found[1], name)
        plain = name.replace(_ANY, ".")
        self._names.setdefault(plain, number)
        if _ANY in name:
            self._with_dots.setdefault(len(name), {}).setdefault(plain.count("."), []).append((number, name))

    def _matching_names(self, module: str) -> Iterator[int]:
        for tail in _tails(module):
            if tail in self._names:
                yield self._names[tail]
            dots = tail.count(".")
            for more, names in self._with_dots.get(len(tail), {}).items():
                # A dot of the key that is none in the name; with as many dots it is the name that was looked up.
                if more > dots:
                    yield from self._compared(tail, names)

    def _compared(self, tail: str, names: Iterable[tuple[int, str]]) -> Iterator[int]:
        for number, name in names:
            try:
                self._budget.spend(COMPARISON)
            except PatternError as error:
                raise self._refusal(self._keys[number], error) from None
            if all(ours in (_ANY, theirs) for ours, theirs in zip(name, tail, strict=True)):
                yield number

    def _refusal(self, key: str, error: PatternError) -> ConfigContradictionError | NotMergeableError:
        about = (f"{self._field} = {shortened(key, 120)!r}",)
        if isinstance(error, NoPatternError):
            reason = f"the adapter's config holds a `{self._field}` that is not a pattern ({error})"
            return ConfigContradictionError(about, reason)
        reason = f"a key of `{self._field}` {error}, and is not matched here"
        return NotMergeableError(about, reason, "write the names of the modules in its place")


def _tails(module: str) -> Iterable[str]:
    """The module's path, and what follows each of its dots."""
    yield module
    for number, char in enumerate(module):
        if char == ".":
            yield module[number + 1 :]
