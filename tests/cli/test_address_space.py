"""An address-space limit that leaves no room for a shard's mapping: `auto` reads it in pieces, `mmap` says what helps.

The base is a hole: two gigabytes of zeros that take no disk. Only its headers and samples of it are read.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from streammerge.formats.safetensors import encode_header
from tests.refusals.making import PREFIX, make_adapter, normal

ROWS, COLS = 131_072, 8_192
LIMIT = 1_500_000_000
"""Bytes of address space: enough for numpy, not for the two gigabytes of the file."""
FINGERPRINT = """
import sys
from streammerge import api
from streammerge.core.options import Options
from streammerge.execute import fingerprint_of
from streammerge.sources.checkpoint import open_checkpoint

checkpoint = open_checkpoint(sys.argv[1], sys.argv[3])
inputs, plan = api._prepare(checkpoint, [sys.argv[2]], None, Options.of({"read": sys.argv[3]}))
info = inputs.checkpoint.facts.tensors["x.weight"]
assert not any(inputs.checkpoint.files.read(info, info.nbytes - 1000, info.nbytes))
print(fingerprint_of(plan, inputs.checkpoint), inputs.checkpoint.files.mapped)
"""


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    header = encode_header([("x.weight", "BF16", (ROWS, COLS), 2 * ROWS * COLS)], {})
    base = tmp_path / "base" / "hole.safetensors"
    base.parent.mkdir()
    with base.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * ROWS * COLS)
    factors = {f"{PREFIX}x.lora_A.weight": normal("A", 2, COLS), f"{PREFIX}x.lora_B.weight": normal("B", ROWS, 2)}
    return base, make_adapter(tmp_path / "adapter", factors)


def limited(inputs: tuple[Path, Path], mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FINGERPRINT, *map(str, inputs), mode],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
    )


def test_auto_does_without_a_mapping_that_does_not_fit(inputs: tuple[Path, Path]) -> None:
    outcome = limited(inputs, "auto")
    assert outcome.returncode == 0, outcome.stderr
    fingerprint, mapped = outcome.stdout.split()
    assert mapped == "False"
    assert limited(inputs, "pread").stdout.split()[0] == fingerprint


def test_a_mapping_that_was_asked_for_and_does_not_fit_is_an_error_with_a_hint(inputs: tuple[Path, Path]) -> None:
    outcome = limited(inputs, "mmap")
    assert outcome.returncode != 0
    assert "InputReadError: cannot map" in outcome.stderr
    assert "hint: `--read pread` reads without a mapping" in outcome.stderr
