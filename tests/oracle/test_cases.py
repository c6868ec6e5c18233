"""LoRA, all of it: every case of the tables against PEFT, in float32 and bfloat16, from one file and from shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.factories import MODULES, load, load_tensors
from tests.oracle import cases_embeddings, cases_experts, cases_files, cases_layers, cases_linear
from tests.oracle.case import Case
from tests.oracle.comparing import (
    assert_correctly_rounded,
    assert_parity,
    assert_same_bytes,
    assert_same_names,
    assert_same_outputs,
)
from tests.oracle.workbench import Workbench

TABLES = (cases_linear, cases_layers, cases_embeddings, cases_experts, cases_files)
CASES = [case for table in TABLES for case in table.CASES]
BY_NAME = {case.name: case for case in CASES}
BY_DTYPE = [pytest.param(case, dtype, id=f"{case.name}@{dtype}") for case in CASES for dtype in case.dtypes]


def test_no_two_cases_share_a_name():
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("layout", ["single", "sharded"])
@pytest.mark.parametrize(("case", "dtype"), BY_DTYPE)
def test_the_output_is_what_the_oracle_says(bench: Workbench, case: Case, dtype: str, layout: str):
    output = bench.output(case, dtype, layout)
    ours = load_tensors(output)
    base = load_tensors(bench.base(case.base, dtype, layout))
    theirs = bench.reference(case, dtype)
    beside = frozenset(base.keys() - theirs.keys()) if case.beside_base else frozenset()
    assert_same_names(ours, theirs, beside)
    if not case.formula:
        assert_parity(ours, theirs, case.rounds_twice if dtype == "bfloat16" else (), case.error)
    untouched = {name for name, tensor in theirs.items() if name in base and _same(tensor, base[name])}
    assert untouched != theirs.keys(), "the adapter has no effect to see"
    assert_same_bytes(ours, base, untouched | beside)
    if case.exact and not case.rounds_base:
        assert_correctly_rounded(ours, bench.reference(case, dtype, "float64"))
    if case.config:
        written = json.loads((output / "config.json").read_text())
        assert {name: written.get(name) for name in case.config} == case.config


@pytest.mark.parametrize("case", [case for case in CASES if case.forward], ids=lambda case: f"{case.name}@")
def test_the_output_computes_what_the_active_adapter_does(bench: Workbench, case: Case):
    output = bench.output(case, "float32", "sharded")
    adapted = bench.adapted(case, "float32")
    merged = _reload(case, output)
    expected = _run(adapted.base_model.model)
    with adapted.disable_adapter():
        unadapted = _run(adapted.base_model.model)
    assert_same_outputs(_run(merged), expected, unadapted)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b)


def _reload(case: Case, output: Path) -> nn.Module:
    loader = case.loads_as or case.trained_on
    return loader(output, torch.float32) if loader else load(case.base, output, torch.float32)


def _run(model: nn.Module) -> torch.Tensor:
    """What the model makes of a fixed input that holds every token once."""
    with torch.no_grad():
        if type(model) in MODULES.values():
            return model()
        tokens = torch.arange(model.get_input_embeddings().weight.shape[0])[None, -24:]
        # Layers that PEFT replicated share a slot of the cache.
        extra = {} if model.config.model_type == "bert" else {"use_cache": False}
        result = model(input_ids=tokens, **extra)
        return result.logits if "logits" in result else result.last_hidden_state
