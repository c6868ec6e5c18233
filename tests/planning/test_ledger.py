"""The ledger: a tensor that no operation uses and no rule names stops the plan, on either side."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from streammerge.core.errors import NoEffectError, UnmatchedKey, UnmatchedKeysError, UnusedKeysError
from streammerge.core.tensors import OutputTensor, Replacement, Stored
from streammerge.methods.reading import Contribution
from streammerge.planning import ledger
from streammerge.planning.model import OperationFacts


def adapter(*keys: str) -> Any:
    return SimpleNamespace(facts=SimpleNamespace(tensors=dict.fromkeys(keys)))


def output(name: str) -> OutputTensor:
    return OutputTensor(name, "F32", (2,), Stored(name))


def test_every_adapter_tensor_is_used_or_let_go_by_a_rule() -> None:
    ledger.check_adapter(adapter("a", "b", "c"), {"a", "b"}, {"c": "a rule"})
    with pytest.raises(UnusedKeysError, match="2 of 3 adapter tensors are used by no part of the plan") as caught:
        ledger.check_adapter(adapter("a", "b", "c"), {"b"}, {})
    assert caught.value.about == ("a", "c")


def test_every_base_tensor_reaches_the_output_or_is_dropped_by_a_rule() -> None:
    outputs = [output("a"), OutputTensor("new.b", "F32", (2,), Stored("b"))]
    sources = {"a": "a", "new.b": "b"}
    ledger.check_base(["a", "b", "c"], outputs, sources, {"c": "a rule"})
    with pytest.raises(AssertionError, match="base tensors without a recipe: \\['c'\\]"):
        ledger.check_base(["a", "b", "c"], outputs, sources, {})


def test_globs_let_go_of_whole_keys_with_their_case_and_nothing_else() -> None:
    keys = ("base_model.model.v_head.weight", "base_model.model.V_HEAD.weight", "x.v_head")
    contribution = Contribution(unmatched=[UnmatchedKey(key) for key in keys])
    assert ledger.let_go(contribution, adapter(*keys), ["*"]) == dict.fromkeys(keys, ledger.ALLOWED)
    with pytest.raises(UnmatchedKeysError) as caught:
        ledger.let_go(contribution, adapter(*keys), ["*v_head*"])
    assert [item.key for item in caught.value.unmatched] == [keys[1]]
    assert caught.value.total == 3
    with pytest.raises(UnusedKeysError, match="value head"):
        ledger.let_go(Contribution(unmatched=[UnmatchedKey(keys[0])]), adapter(*keys), ["v_head"])


def test_a_plan_has_an_effect_if_one_operation_has() -> None:
    place: Any = SimpleNamespace()
    changed = OutputTensor("a", "F32", (2,), Stored("a"), (place, place))
    zero, some, unknown = OperationFacts(0.0, True), OperationFacts(1.0, False), OperationFacts(None, False)
    for facts in ((zero, some), (zero, unknown)):
        ledger.check_effect([changed, output("b")], {"a": facts}, [1.0])
    with pytest.raises(NoEffectError, match="every delta is zero"):
        ledger.check_effect([changed], {"a": (zero, zero)}, [1.0])
    with pytest.raises(NoEffectError, match="every weight is 0"):
        ledger.check_effect([changed], {"a": (zero, zero)}, [0.0, 0.0])
    with pytest.raises(NoEffectError, match="none of its tensors has a target"):
        ledger.check_effect([output("b")], {"b": ()}, [1.0])
    ledger.check_effect([OutputTensor("c", "F32", (2,), Replacement(0, "key"))], {"c": ()}, [1.0])
