"""Adapters on tied tensors that no checkpoint of the class can express."""

from __future__ import annotations

import pytest

import streammerge
from streammerge.core.errors import NotMergeableError
from tests.factories import load_tensors
from tests.oracle.case import Case
from tests.oracle.comparing import assert_same_bytes
from tests.oracle.workbench import Workbench

HEAD = Case("t5-head", "t5", {"target_modules": ["lm_head"]})
TABLE = Case("t5-table", "t5", {"target_modules": ["shared"]})
INNER = Case("t5-inner", "t5", {"target_modules": ["q", "v", "wo"]})


@pytest.mark.parametrize("case", [HEAD, TABLE], ids=str)
def test_one_side_of_a_tie_that_the_forward_pass_reads_is_refused(bench: Workbench, case: Case):
    """T5 scales its logits by a factor if its embeddings are tied, so that its flag cannot be set false."""
    output = bench.directory("refused", case.name)
    with pytest.raises(NotMergeableError, match="tie") as caught:
        streammerge.merge(bench.base("t5", "float32"), bench.adapter(case, "float32"), output)
    assert caught.value.exit_code == 4
    assert not output.exists()


def test_other_modules_of_such_a_class_are_merged(bench: Workbench):
    ours, theirs = load_tensors(bench.output(INNER, "float32")), bench.reference(INNER, "float32")
    assert ours.keys() == theirs.keys()
    assert_same_bytes(ours, load_tensors(bench.base("t5", "float32")), {"shared.weight"})
