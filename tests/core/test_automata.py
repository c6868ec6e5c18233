"""Patterns without backtracking: what `re` says, in time that a pattern cannot choose."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.core.automata import Automaton, Budget, NoPatternError, PatternError

PIECES = (
    "a", "b", "ab", ".", r"\.", "[ab]", "[^a]", r"[\d.]", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", "x", "1", "^", "$",
    r"\A", r"\Z", "(a|b)", "(?:ab|a)", "(a*)*", "a*", "b+?", "(ab){1,3}", "a{2}", "(a|)", "a?", ".*", ".+?", "|", "(",
    ")", "[", "]", "*", "+", "{2}", "{,2}", "(?P<n>b)", "é", "-", "/", "_",
)  # fmt: skip


def steps(count: int = 10**6) -> Budget:
    return Budget(count, "takes too many steps")


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.lists(st.text("abx1._é -", max_size=9), max_size=9)
)
def test_what_is_taken_matches_as_python_has_it(pattern: str, texts: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            python = re.compile(pattern)
        except re.error:
            with pytest.raises(PatternError):
                Automaton(pattern, steps())
            return
    try:
        automaton = Automaton(pattern, steps())
    except PatternError:
        return
    for text in [*texts, "", "a", "ab", "ab.ab", *texts]:
        assert automaton.matches(text, steps()) == (python.match(text) is not None), (pattern, text)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(?=a)b", "looks ahead"),
        ("(?<!a)b", "looks ahead or behind"),
        (r"(a)\1", "refers back"),
        (r"\ba", "boundary"),
        ("a*+", "possessive"),
        ("(?>a)", "atomic"),
        ("(?i:a)", "flags"),
        ("[[a]", "something else"),
        ("((a{1000}){1000}){1000}", "too many steps"),
        ("((){60000}){60000}", "too many steps"),
        ("(" * 9000 + ")" * 9000, "too deeply"),
    ],
)
def test_what_is_not_regular_or_too_much_is_refused_with_its_reason(pattern: str, reason: str) -> None:
    with pytest.raises(PatternError, match=reason) as caught:
        Automaton(pattern, steps())
    assert not isinstance(caught.value, NoPatternError)


@pytest.mark.parametrize("pattern", ["(a", "a**", "a{99999999999999}", "a(?i)b"])
def test_what_is_no_pattern_is_told_from_that(pattern: str) -> None:
    with pytest.raises(NoPatternError):
        Automaton(pattern, steps())


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*)*x", ".*" * 30 + "x", "(a?){40}" + "a" * 40 + "b"])
def test_a_pattern_that_would_backtrack_for_ever_ends_after_a_moment(pattern: str) -> None:
    budget = steps(200_000)
    assert not Automaton(pattern, steps()).matches("a" * 60, budget)
    assert budget.left > 0


def test_matching_ends_where_the_budget_does() -> None:
    automaton = Automaton("(.?){500}x", steps())
    with pytest.raises(PatternError, match="too many steps"):
        automaton.matches("a" * 400, steps(10_000))


def test_an_empty_text_is_asked_anew_after_others() -> None:
    automaton = Automaton(".*$^", steps())
    assert [automaton.matches(text, steps()) for text in ("", "a", "")] == [True, False, True]
