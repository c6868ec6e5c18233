"""The walk-through's example is what README says it is, and planning it takes little memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT

PEAK = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
PLAN = "import sys; from streammerge.cli import main; code = main(sys.argv[1:])"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    root = tmp_path_factory.mktemp("example") / "70b"
    subprocess.run([sys.executable, ROOT / "scripts" / "example_70b.py", root], check=True, cwd=ROOT, timeout=300)
    return root


def test_the_base_is_sparse_and_has_the_parameters_of_llama_3_70b(example):
    shards = sorted((example / "base").glob("*.safetensors"))
    index = json.loads((example / "base" / "model.safetensors.index.json").read_text())
    assert len(shards) == 30
    assert index["metadata"]["total_size"] == 2 * 70_553_706_496
    assert sum(shard.stat().st_blocks * 512 for shard in shards) < 10**6


def test_a_plan_takes_less_memory_than_its_adapter_has_bytes(example):
    command = [sys.executable, "-c", f"{PLAN}\n{PEAK}", "plan", example / "base", example / "adapter", "-q"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    adapter = (example / "adapter" / "adapter_model.safetensors").stat().st_size
    assert adapter > 414e6
    assert int(ran.stdout.splitlines()[-1]) * 1024 < adapter / 2
