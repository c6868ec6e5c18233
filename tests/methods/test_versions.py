"""`--peft-version` says what the config of an old adapter does not, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.core.errors import ConfigContradictionError, NotMergeableError, UsageError

DATA = Path(__file__).parents[1] / "data" / "methods"
BASE, OLD, NEW = DATA / "base.safetensors", DATA / "0.13.2" / "lokr", DATA / "0.18.1" / "lokr"


def merged(adapter: Path, out: Path, **options: str) -> torch.Tensor:
    """One adapted weight of the output."""
    streammerge.merge(BASE, adapter, out, **options)
    return load_file(out / BASE.name)["wide.weight"]


def test_an_adapter_that_means_two_things_is_refused_with_the_option_that_says_which(tmp_path: Path) -> None:
    with pytest.raises(NotMergeableError, match="the config does not say which version wrote it") as caught:
        merged(OLD, tmp_path / "out")
    assert "--peft-version" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_said_decides(tmp_path: Path) -> None:
    before = merged(OLD, tmp_path / "before", peft_version="0.13.2")
    after = merged(OLD, tmp_path / "after", peft_version="0.14.0")
    base = load_file(BASE)["wide.weight"]
    assert torch.allclose(1.5 * (before - base), after - base, atol=1e-6)


def test_a_config_that_says_it_itself_is_not_overruled(tmp_path: Path) -> None:
    with pytest.raises(ConfigContradictionError, match="the config says `peft_version` 0.18.1"):
        merged(NEW, tmp_path / "out", peft_version="0.13.2")


@pytest.mark.parametrize("said", ["latest", "", "0"])
def test_what_is_no_version_is_a_usage_error(tmp_path: Path, said: str) -> None:
    with pytest.raises(UsageError, match="is not a version such as 0.15.2"):
        merged(OLD, tmp_path / "out", peft_version=said)
