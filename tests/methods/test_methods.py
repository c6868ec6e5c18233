"""Every method of PEFT beside LoRA: files that PEFT wrote, merged here and there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.factories import load_tensors
from tests.methods import cases_first, cases_projections, cases_turning, cases_variants, cases_weights
from tests.oracle.case import Case
from tests.oracle.comparing import assert_parity, assert_same_bytes, assert_same_names
from tests.oracle.workbench import Workbench

TABLES = (cases_first, cases_variants, cases_weights, cases_projections, cases_turning)
CASES = [case for table in TABLES for case in table.CASES]
BY_DTYPE = [pytest.param(case, dtype, id=f"{case.name}@{dtype}") for case in CASES for dtype in case.dtypes]


def test_no_two_cases_share_a_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("layout", ["single", "sharded"])
@pytest.mark.parametrize(("case", "dtype"), BY_DTYPE)
def test_the_output_is_what_the_oracle_says(bench: Workbench, case: Case, dtype: str, layout: str) -> None:
    ours = load_tensors(bench.output(case, dtype, layout))
    base = load_tensors(bench.base(case.base, dtype, layout))
    theirs = bench.reference(case, dtype)
    if case.formula:
        theirs = {name: tensor.to(base[name].dtype) for name, tensor in theirs.items()}
    assert_same_names(ours, theirs)
    assert_parity(ours, theirs, case.rounds_twice if dtype == "bfloat16" else (), case.error)
    untouched = {name for name, tensor in theirs.items() if name in base and tensor.equal(base[name])}
    assert untouched != theirs.keys(), "the adapter has no effect to see"
    assert_same_bytes(ours, base, untouched)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.rounds_twice and "bfloat16" in case.dtypes],
    ids=lambda case: f"{case.name}@",
)
def test_what_peft_rounds_twice_is_its_float32_merge_rounded_once(bench: Workbench, case: Case) -> None:
    ours = load_tensors(bench.output(case, "bfloat16", "single"))
    wide = bench.reference(case, "bfloat16", "float32")
    theirs = {name: tensor.to(ours[name].dtype) for name, tensor in wide.items() if name.endswith(case.rounds_twice)}
    assert theirs
    assert_parity(ours, theirs, (), case.error)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}@")
def test_the_bytes_depend_on_neither_workers_nor_budget(bench: Workbench, case: Case) -> None:
    digests = {
        digest(bench.output(case, "float32", "sharded", workers=workers, memory=memory))
        for workers, memory in ((1, "64MB"), (2, "128MB"), (2, "1GB"))
    }
    assert len(digests) == 1


def digest(root: Path) -> str:
    """Of all files of an output."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()
