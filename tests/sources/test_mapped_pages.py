"""What is read through a mapping is given back: resident memory does not grow with what was read.

The kernel counts: in `/proc/self/smaps`, for the mappings of one file.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from streammerge.compute.factors import MAPPED, FactorReader
from streammerge.core.options import Options
from streammerge.core.tensors import FactorView
from streammerge.planning.build import build_plan
from streammerge.planning.values import facts_of
from streammerge.sources.adapter import open_adapter
from streammerge.sources.checkpoint import open_checkpoint

SMAPS = Path("/proc/self/smaps")
SLACK = 4 * 2**20
"""Two huge pages: the kernel may map one whole where a byte of it is touched."""
LONG, RANK = 2**19, 16


def resident(path):
    """Bytes of the file at `path` that are mapped into this process and present."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A base with one table of 2^19 rows, and an adapter of it whose A has 32 MiB."""
    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    save_file({"model.embed_tokens.weight": np.ones((LONG, 32), np.float32)}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaModel"]}')
    module = "base_model.model.model.embed_tokens"
    factors = {
        f"{module}.lora_embedding_A": np.full((RANK, LONG), 0.01, np.float32),
        f"{module}.lora_embedding_B": np.full((32, RANK), 0.01, np.float32),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))
    return base, adapter


@pytest.fixture
def adapter(directories):
    return open_adapter(str(directories[1]), "mmap")


def forget_cached(path):
    """Drop a file from the page cache: read in again it lies there in small pages, where writing had made huge ones."""
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def test_what_is_not_given_back_is_counted(directories):
    checkpoint = open_checkpoint(str(directories[0]), "mmap")
    info = checkpoint.facts.tensors["model.embed_tokens.weight"]
    assert bytes(checkpoint.files.read(info, 0, info.nbytes))[:4] == b"\x00\x00\x80\x3f"
    assert resident(directories[0] / "model.safetensors") > 63 * 2**20


def test_pieces_that_do_not_end_on_pages_leave_nothing_behind(directories):
    forget_cached(directories[0] / "model.safetensors")
    checkpoint = open_checkpoint(str(directories[0]), "mmap")
    info = checkpoint.facts.tensors["model.embed_tokens.weight"]
    for start in range(0, info.nbytes, 100_001):
        end = min(start + 100_001, info.nbytes)
        assert len(bytes(checkpoint.files.read(info, start, end))) == end - start
        checkpoint.files.give_back(info, start, end)
    assert resident(directories[0] / "model.safetensors") < SLACK


def test_samples_of_a_file_are_not_read_through_the_mapping(directories):
    checkpoint = open_checkpoint(str(directories[0]), "mmap")
    name = checkpoint.facts.shards[0].file
    size = checkpoint.files.size(name)
    for start in range(0, size - 8, size // 64):
        assert len(checkpoint.files.raw(name, start, start + 8)) == 8
    assert resident(directories[0] / name) == 0


def test_a_factor_read_in_parts_keeps_no_more_than_its_share(adapter, directories):
    info = adapter.facts.tensors["base_model.model.model.embed_tokens.lora_embedding_A"]
    view = FactorView.matrix(0, info, LONG, RANK)
    reader = FactorReader([adapter])
    largest = 0
    for start in range(0, LONG, 2**13):
        reader.part(view, (start, start + 2**13), (0, RANK))
        largest = max(largest, resident(directories[1] / "adapter_model.safetensors"))
    assert 2**18 < largest < MAPPED + SLACK
    reader.forget()


def test_neither_the_plan_nor_its_norms_keep_the_adapter_they_read(directories, adapter):
    plan = build_plan(open_checkpoint(str(directories[0]), "mmap"), [adapter], [1.0], Options())
    path = directories[1] / "adapter_model.safetensors"
    assert resident(path) < SLACK
    name = "model.embed_tokens.weight"
    ((facts,),) = facts_of([plan.tensors[name]], [adapter]).values()
    assert facts.norm == pytest.approx(0.01**2 * RANK * (32 * LONG) ** 0.5, rel=1e-5)
    assert resident(path) < SLACK
