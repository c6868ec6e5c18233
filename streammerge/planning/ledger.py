"""Conservation: nothing of the adapter and nothing of the base is lost without a rule that names it.

Every adapter tensor is used by the plan or let go by a named rule; every base tensor is the source of some output
tensor, replaced, or dropped by a named rule; something changes. Otherwise there is no plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from streammerge.core.errors import NoEffectError, UnmatchedKey, UnmatchedKeysError, UnusedKeysError
from streammerge.core.tensors import OutputTensor, Replacement
from streammerge.methods.full_tensors import VALUE_HEADS
from streammerge.methods.reading import Contribution
from streammerge.planning.model import OperationFacts
from streammerge.sources.adapter import Adapter

ALLOWED = "allowed to be left over by --allow-unused"


def let_go(contribution: Contribution, adapter: Adapter, allowed: Collection[str]) -> dict[str, str]:
    """Unmatched keys that the user allows, by rule. Raises UnmatchedKeysError for the others, all of them, or
    UnusedKeysError where they are a value head."""
    gone = [item for item in contribution.unmatched if any(fnmatchcase(item.key, glob) for glob in allowed)]
    left = [item for item in contribution.unmatched if item not in gone]
    heads = tuple(item.key for item in left if VALUE_HEADS & set(item.key.split(".")))
    if left and len(heads) == len(left):
        reason = "the adapter holds a value head, which no merged checkpoint has a place for"
        raise UnusedKeysError(heads, reason, "to merge without it: `--allow-unused '*v_head*'`")
    if left:
        raise _unmatched(left, len(adapter.facts.tensors), contribution)
    return {item.key: ALLOWED for item in gone}


def _unmatched(left: Sequence[UnmatchedKey], total: int, contribution: Contribution) -> UnmatchedKeysError:
    if not contribution.operations and not contribution.replacements:
        advice = "no key matches at all: is this the base the adapter was trained on?"
    else:
        advice = (
            "see every key with `streammerge inspect ADAPTER --base BASE`; keys that may be lost: `--allow-unused GLOB`"
        )
    return UnmatchedKeysError(tuple(left), total, advice=advice)


def check_adapter(adapter: Adapter, used: Collection[str], ignored: Mapping[str, str]) -> None:
    """Refuse adapter tensors that neither the plan uses nor a rule lets go."""
    lost = tuple(name for name in adapter.facts.tensors if name not in used and name not in ignored)
    if lost:
        raise UnusedKeysError(
            lost, f"{len(lost):,} of {len(adapter.facts.tensors):,} adapter tensors are used by no part of the plan"
        )


def check_base(
    stored: Iterable[str], outputs: Iterable[OutputTensor], sources: Mapping[str, str], dropped: Mapping[str, str]
) -> None:
    """Every base tensor reaches the output or is dropped by rule; a failure here is a bug of ours."""
    reached = {sources.get(output.name, output.name) for output in outputs} | dropped.keys()
    lost = [name for name in stored if name not in reached]
    if lost:
        raise AssertionError(f"base tensors without a recipe: {lost[:5]}")


def check_effect(
    outputs: Iterable[OutputTensor], facts: Mapping[str, Sequence[OperationFacts]], weights: Sequence[float]
) -> None:
    """Refuse a plan that changes nothing."""
    changed = [output for output in outputs if output.operations or isinstance(output.source, Replacement)]
    if not changed:
        raise NoEffectError((), "the adapter changes nothing: none of its tensors has a target")
    if all(fact.zero for output in changed for fact in facts[output.name]) and not any(
        isinstance(o.source, Replacement) for o in changed
    ):
        if not any(weights):
            raise NoEffectError((), "the adapter changes nothing: every weight is 0")
        reason = "the adapter changes nothing: every delta is zero"
        raise NoEffectError((), reason, "an untrained adapter has B = 0; was the right checkpoint saved?")
