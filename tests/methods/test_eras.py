"""Adapters that PEFT 0.13 to 0.19 wrote, of every method that each of them knew, are merged as they merged them.

The files were written by scripts/make_method_fixtures.py under each release; `merged.safetensors` is that release's own
merge. What a file of then cannot tell is said by `--peft-version`, and refused without it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

import streammerge
from tests.oracle.comparing import assert_parity, assert_same_bytes

DATA = Path(__file__).parents[1] / "data" / "methods"
BASE = DATA / "base.safetensors"
ADAPTERS = sorted(path.parent for path in DATA.glob("*/*/adapter_config.json"))
NEED_VERSION = ("lokr", "oft")
"""What cases begin with whose meaning changed between releases that do not name themselves in the config."""


def identity(adapter: Path) -> str:
    """`0.13.2-lora@`."""
    return f"{adapter.parent.name}-{adapter.name}@"


def test_every_era_has_its_methods() -> None:
    counts = {era.name: len(list(era.iterdir())) for era in DATA.iterdir() if era.is_dir()}
    assert counts.keys() == {"0.13.2", "0.15.2", "0.17.1", "0.18.1", "0.19.0"}
    assert min(counts.values()) >= 14
    assert sum(counts.values()) >= 100


@pytest.mark.parametrize("adapter", ADAPTERS, ids=identity)
def test_an_adapter_of_an_older_release_is_merged_as_that_release_did(adapter: Path, tmp_path: Path) -> None:
    silent = adapter.name.startswith(NEED_VERSION) and adapter.parent.name < "0.18"
    options = {"peft_version": adapter.parent.name} if silent else {}
    streammerge.merge(BASE, adapter, tmp_path / "out", **options)
    ours, base = load_file(tmp_path / "out" / BASE.name), load_file(BASE)
    theirs = load_file(adapter / "merged.safetensors")
    assert_parity({name: ours[name] for name in theirs}, theirs, ())
    assert_same_bytes(ours, base, base.keys() - theirs.keys())
