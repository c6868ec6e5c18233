"""Python's regular expressions, matched without backtracking: in time that grows with the text, whatever the pattern.

A pattern is taken apart by Python's own parser, so that it means here what it means to `re`, and its parts become a
nondeterministic automaton whose sets of states are remembered as they come up. What is not regular, or not known here,
is refused. The invariant: `matches` says what `re.match` would say, or raises.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Test = Callable[[str], bool]
State = tuple[Test | None, tuple[int, ...]]
"""What a character must be (None: nothing is read), and where it leads to."""

# Python's parser has no public name.
_parse: Callable[[str], Any] = importlib.import_module("re._parser").parse
_MAXREPEAT = importlib.import_module("re._constants").MAXREPEAT

_CATEGORIES: dict[str, Test] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda char: not char.isdecimal(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda char: not char.isspace(),
    "CATEGORY_WORD": lambda char: char.isalnum() or char == "_",
    "CATEGORY_NOT_WORD": lambda char: not (char.isalnum() or char == "_"),
}
_REFUSED = {
    "ASSERT": "looks ahead or behind",
    "ASSERT_NOT": "looks ahead or behind",
    "GROUPREF": "refers back to a group",
    "GROUPREF_EXISTS": "refers back to a group",
    "POSSESSIVE_REPEAT": "has a possessive repetition",
    "ATOMIC_GROUP": "has an atomic group",
    "AT_BOUNDARY": "asks for the boundary of a word",
    "AT_NON_BOUNDARY": "asks for the boundary of a word",
}
_BEGINNINGS, _ENDINGS = {"AT_BEGINNING", "AT_BEGINNING_STRING"}, {"AT_END", "AT_END_STRING"}
_ACCEPT = 0
"""The state in which the pattern has matched."""


class PatternError(ValueError):
    """A pattern that is not matched here; the message says why, as in "the pattern looks ahead"."""


class NoPatternError(PatternError):
    """A text that is no pattern; the message is Python's."""


class Budget:
    """Steps that may still be taken, and what is said of a pattern that would take more. Matching takes one for a
    character, and ten for a state of a set that comes up for the first time; building takes one for a state."""

    def __init__(self, steps: int, reason: str) -> None:
        self.left, self._reason = steps, reason

    def spend(self, steps: int) -> None:
        """Raise PatternError when nothing is left."""
        self.left -= steps
        if self.left < 0:
            raise PatternError(self._reason)


class Automaton:
    """One pattern. Texts must not hold a line feed, about whose place at the end `$` has its own opinion. Raises
    PatternError, also where `budget` does not reach for building it."""

    def __init__(self, pattern: str, budget: Budget) -> None:
        builder = _Builder(pattern, budget)
        self._states, self._begins, self._ends = builder.states, builder.begins, builder.ends
        self._known: dict[frozenset[int], int] = {}
        self._sets: list[frozenset[int]] = []
        self._next: list[dict[str, int]] = []
        self._finishes: list[bool | None] = []
        self._start = self._number(self._closure([builder.start], self._begins))

    def matches(self, text: str, budget: Budget) -> bool:
        """Whether `re.match` finds the pattern at the beginning of `text`. Raises PatternError out of budget."""
        budget.spend(len(text))
        now = self._start
        for char in text:
            if _ACCEPT in self._sets[now]:
                return True
            following = self._next[now].get(char)
            if following is None:
                following = self._next[now][char] = self._advance(now, char, budget)
            now = following
            if not self._sets[now]:
                return False
        if not text:  # its end is its beginning, which a set that is met again elsewhere does not know
            return _ACCEPT in self._closure(self._sets[now], self._begins | self._ends)
        finishes = self._finishes[now]
        if finishes is None:
            finishes = self._finishes[now] = _ACCEPT in self._closure(self._sets[now], self._ends)
        return finishes

    def _advance(self, now: int, char: str, budget: Budget) -> int:
        """The number of the set that a character leads to from the set `now`."""
        moves = [self._states[state] for state in self._sets[now]]
        reached = [target for test, targets in moves if test is not None and test(char) for target in targets]
        found = self._closure(reached, frozenset())
        budget.spend(10 * (len(moves) + len(found)))
        return self._number(found)

    def _closure(self, states: Iterable[int], passed: frozenset[int]) -> frozenset[int]:
        """What is reached from `states` without reading; `passed` are those that only a place in the text opens."""
        found: set[int] = set()
        pending = list(states)
        while pending:
            state = pending.pop()
            if state in found:
                continue
            found.add(state)
            test, targets = self._states[state]
            closed = state in self._begins or state in self._ends
            if test is None and (not closed or state in passed):
                pending += targets
        return frozenset(found)

    def _number(self, states: frozenset[int]) -> int:
        if states not in self._known:
            self._known[states] = len(self._sets)
            self._sets.append(states)
            self._next.append({})
            self._finishes.append(None)
        return self._known[states]


class _Builder:
    """The states of a pattern, each part built in front of what follows it. Every repetition takes a step of the
    budget, also of what has no state: there may be very many."""

    def __init__(self, pattern: str, budget: Budget) -> None:
        self.states: list[State] = [(None, ())]
        self.begins: frozenset[int] = frozenset()
        self.ends: frozenset[int] = frozenset()
        self._budget = budget
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # what Python warns about will mean something else one day
                parsed = _parse(pattern)
            self.start = self._sequence(parsed, _ACCEPT)
        except (re.error, OverflowError) as error:
            raise NoPatternError(str(error)) from None
        except Warning as error:
            raise PatternError(f"may come to mean something else ({error})") from None
        except RecursionError:
            raise PatternError("is nested too deeply") from None

    def _sequence(self, parts: Iterable[tuple[Any, Any]], then: int) -> int:
        """The state before `parts`, after which comes `then`."""
        for kind, argument in reversed(list(parts)):
            self._budget.spend(1)
            then = self._part(str(kind), argument, then)
        return then

    def _part(self, kind: str, argument: Any, then: int) -> int:
        match kind:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                return self._add(_test_of(kind, argument), [then])
            case "SUBPATTERN" if not (argument[1] or argument[2]):
                return self._sequence(argument[3], then)
            case "SUBPATTERN":
                raise PatternError("changes its flags midway")
            case "BRANCH":
                return self._add(None, [self._sequence(branch, then) for branch in argument[1]])
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, body = argument
                return self._repeated(least, most, body, then)
            case "AT" if str(argument) in _BEGINNINGS:
                return self._anchor("begins", then)
            case "AT" if str(argument) in _ENDINGS:
                return self._anchor("ends", then)
        raise PatternError(_REFUSED.get(str(argument) if kind == "AT" else kind, f"holds {kind}, which is not known"))

    def _repeated(self, least: int, most: int, body: Sequence[tuple[Any, Any]], then: int) -> int:
        """`body` so many times; greedy or not is the same to the question whether it matches."""
        if most == _MAXREPEAT:
            after, then = then, self._add(None, [])
            self.states[then] = (None, (self._sequence(body, then), after))
        else:
            after = then
            for _ in range(most - least):
                self._budget.spend(1)
                then = self._add(None, [self._sequence(body, then), after])
        for _ in range(least):
            self._budget.spend(1)
            then = self._sequence(body, then)
        return then

    def _anchor(self, where: str, then: int) -> int:
        state = self._add(None, [then])
        setattr(self, where, getattr(self, where) | {state})
        return state

    def _add(self, test: Test | None, targets: Sequence[int]) -> int:
        self._budget.spend(1)
        self.states.append((test, tuple(targets)))
        return len(self.states) - 1


def _test_of(kind: str, argument: Any) -> Test:
    """What one character must be."""
    match kind:
        case "LITERAL":
            return chr(argument).__eq__
        case "NOT_LITERAL":
            return chr(argument).__ne__
        case "ANY":
            return "\n".__ne__
    members = [(str(part), value) for part, value in argument]
    negated = members[0][0] == "NEGATE"
    tests = [_member(part, value) for part, value in members[negated:]]
    return lambda char: any(test(char) for test in tests) != negated


def _member(kind: str, value: Any) -> Test:
    """Of a set of characters, one part."""
    match kind:
        case "LITERAL":
            return chr(value).__eq__
        case "RANGE":
            return lambda char: value[0] <= ord(char) <= value[1]
        case "CATEGORY" if str(value) in _CATEGORIES:
            return _CATEGORIES[str(value)]
    raise PatternError(f"holds a set with {kind}, which is not known")
