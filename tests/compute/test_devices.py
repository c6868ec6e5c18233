"""Devices: which one an option names, and that the bytes of a merge do not depend on it. CUDA's lane is run over a
device that puts every copy off and finds every access that does not wait (fake_device.py), and over a GPU where there
is one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.compute import worker
from streammerge.compute.cuda import DEPTH
from streammerge.compute.devices import DeviceMaker, device_of
from streammerge.compute.lanes import Cpu
from streammerge.compute.produce import Producer
from streammerge.core import digests
from streammerge.core.errors import NonFiniteError, UsageError
from streammerge.core.options import Options
from streammerge.planning.build import build_plan
from streammerge.planning.model import MergePlan
from streammerge.sources.adapter import open_adapter
from streammerge.sources.checkpoint import open_checkpoint
from streammerge.stream import PIECE, Inputs, Stream
from tests.compute.fake_device import FakeRuntime, fake_device
from tests.refusals.making import PREFIX, Stored, make_adapter, merged, normal, refused, save, stored

SIDE, RANK = 1024, 4
SHAPES = {"x.weight": (SIDE + 17, SIDE), "y.weight": (SIDE, SIDE), "z.weight": (SIDE, SIDE)}
STRETCH = 2**18
"""Bytes that are read at a time here: a tensor is more stretches than a lane has slots."""
BLOCK = 6 * STRETCH + 5000
"""Bytes of a block here: several workers share a tensor, and cut its tiles at the edges."""
CASES = {
    "lora": ("BF16", {}),
    "lora at a rate that is no power of two": ("BF16", {"lora_alpha": 3}),
    "lora, float16": ("F16", {}),
    "lora, float32": ("F32", {}),
    "several adapters": ("BF16", {"adapters": 3}),
    "dora by rows": ("BF16", {"use_dora": True}),
    "dora by rows, float32": ("F32", {"use_dora": True}),
    "dora by columns": ("BF16", {"use_dora": True, "table": True}),
    "a stored infinity": ("F32", {"use_dora": True, "infinite": True}),
    "widened": ("BF16", {"options": {"dtype": "float32"}}),
    "rounded": ("F32", {"options": {"dtype": "bfloat16"}}),
    "float32 arithmetic": ("BF16", {"options": {"accumulate": "float32"}}),
}
SIXTEEN_BITS = ("lora", "lora at a rate that is no power of two", "lora, float16", "several adapters", "rounded")


class Kept:
    """A sink that keeps the bytes of every file."""

    def __init__(self, plan: MergePlan) -> None:
        self.files = [bytearray(shard.size) for shard in plan.shards]

    def start(self) -> None:
        pass

    def lease(self) -> memoryview:
        return memoryview(bytearray(PIECE))

    def release(self, buffer: memoryview) -> None:
        pass

    def commit(self, number: int, offset: int, buffer: memoryview, size: int, origin: object, made: object) -> None:
        self.files[number][offset : offset + size] = buffer[:size]

    def finish(self) -> None:
        pass

    def keep(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Merge:
    """A plan and what it is carried out on."""

    plan: MergePlan
    inputs: Inputs

    def on(self, device: DeviceMaker) -> tuple[list[bytearray], list[Any]]:
        """Bytes of every file, and measurements of every tensor."""
        stream, sink = Stream(self.plan, self.inputs, device), Kept(self.plan)
        stream.into(sink)
        return sink.files, [stream.stats.of(name) for name in self.plan.tensors]


def magnitudes(shapes: Mapping[str, tuple[int, int]], axis: int) -> dict[str, Stored]:
    named = {name.removesuffix("weight"): shape[axis] for name, shape in shapes.items()}
    return {
        f"{PREFIX}{module}lora_magnitude_vector": stored(np.linspace(1, 2, length)) for module, length in named.items()
    }


def factors(number: int, *, table: bool) -> dict[str, Stored]:
    """A pair for every matrix, under the names of a Linear's or of an embedding's."""
    suffixes = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
    found = {}
    for name, (rows, cols) in SHAPES.items():
        a = normal(f"{number} {name} A", RANK, rows if table else cols, scale=0.1)
        b = normal(f"{number} {name} B", cols if table else rows, RANK, scale=0.1)
        module = f"{PREFIX}{name.removesuffix('weight')}"
        found |= {module + suffixes[0]: a, module + suffixes[1]: b}
    return found


def merge_of(
    root: Path,
    dtype: str = "BF16",
    *,
    adapters: int = 1,
    table: bool = False,
    infinite: bool = False,
    options: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Merge:
    tensors = {name: normal(name, *shape, dtype=dtype) for name, shape in SHAPES.items()}
    if infinite:
        values = np.frombuffer(bytearray(tensors["y.weight"].data), np.float32).reshape(SIDE, SIDE)
        values[500, 3] = np.inf
        tensors["y.weight"] = stored(values)
    base = save(root / "base" / "only.safetensors", tensors | {"n.weight": normal("n", 77, dtype=dtype)})
    paths = []
    for number in range(adapters):
        held = factors(number, table=table)
        held |= magnitudes(SHAPES, int(table)) if changes.get("use_dora") else {}
        paths.append(make_adapter(root / f"adapter {number}", held, **{"r": RANK, "lora_alpha": RANK, **changes}))
    checkpoint, opened = open_checkpoint(str(base)), [open_adapter(str(path)) for path in paths]
    chosen = Options.of({"workers": 3, **(options or {})})
    return Merge(build_plan(checkpoint, opened, [1.0] * adapters, chosen), Inputs(checkpoint, opened))


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PIECE", STRETCH)
    monkeypatch.setattr(digests, "BLOCK", BLOCK)


# --- a whole merge ----------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_device_that_works_on_its_own_makes_the_same_bytes(tmp_path: Path, case: str, seed: int | None) -> None:
    dtype, changes = CASES[case]
    merge = merge_of(tmp_path, dtype, **changes)
    runtime = FakeRuntime(seed)
    files, stats = merge.on(lambda: fake_device(runtime))
    expected, expected_stats = merge.on(Cpu)
    assert files == expected
    assert repr(stats) == repr(expected_stats)
    assert runtime.under_way == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("case", SIXTEEN_BITS)
def test_a_gpu_makes_the_same_16_bit_bytes(tmp_path: Path, case: str) -> None:
    dtype, changes = CASES[case]
    merge = merge_of(tmp_path, dtype, **changes)
    assert merge.on(device_of("cuda"))[0] == merge.on(Cpu)[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("case", sorted(CASES.keys() - set(SIXTEEN_BITS) - {"a stored infinity"}))
def test_a_gpu_comes_as_near_as_float32_rounding_lets_it(tmp_path: Path, case: str) -> None:
    dtype, changes = CASES[case]
    merge = merge_of(tmp_path, dtype, **changes)
    pairs = zip(merge.plan.shards, merge.on(device_of("cuda"))[0], merge.on(Cpu)[0], strict=True)
    for shard, found, expected in pairs:
        for name, offset in shard.offsets.items():
            output = merge.plan.tensors[name]
            dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[output.dtype]
            count = int(np.prod(output.shape))
            a, b = (torch.frombuffer(data, dtype=dtype, count=count, offset=offset) for data in (found, expected))
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("short_stretches")
def test_a_whole_file_in_one_call_uses_the_slots_again_and_no_more_of_them(tmp_path: Path) -> None:
    merge = merge_of(tmp_path)
    runtime = FakeRuntime()
    size = merge.plan.shards[0].size
    files = []
    for device in (lambda: fake_device(runtime), Cpu):
        files.append(bytearray(size))
        producer = Producer(merge.plan, merge.inputs.checkpoint, merge.inputs.adapters, device=device)
        with producer.threads.kept():
            producer.fill(0, 0, size, memoryview(files[-1]))
    assert files[0] == files[1]
    stretches = sum(-(-rows * cols * 2 // STRETCH) for rows, cols in SHAPES.values())
    staged = [size for size in runtime.pinned_sizes if size >= STRETCH]
    assert stretches > 5 * (DEPTH + 1)
    assert staged == [STRETCH] * 2 * (DEPTH + 1)


def test_a_value_out_of_range_is_refused_in_the_same_words(tmp_path: Path) -> None:
    merge = merge_of(tmp_path, "F16", lora_alpha=10**7)
    told = []
    runtime = FakeRuntime()
    for device in (lambda: fake_device(runtime), Cpu):
        with pytest.raises(NonFiniteError) as refusal:
            merge.on(device)
        told.append(str(refusal.value))
    assert told[0] == told[1]
    assert "out of range for F16" in told[0]


# --- what an option names ---------------------------------------------------------------------------------------------
def test_auto_is_the_cpu_whatever_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    for seen in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda seen=seen: seen)
        assert device_of("auto")().name == "cpu"


def test_a_gpu_is_named_by_its_number_or_is_the_one_that_torch_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [device_of(text)().name for text in ("cuda", "cuda:2")] == ["cuda:1", "cuda:2"]


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("cuda", 0, "`device` is `cuda`, and torch sees no CUDA device"),
        ("cuda:0", 0, "`device` is `cuda:0`, and torch sees no CUDA device"),
        ("cuda:1", 1, "`device` is `cuda:1`, and torch sees 1 CUDA device, counted from 0"),
        ("cuda:7", 2, "`device` is `cuda:7`, and torch sees 2 CUDA devices, counted from 0"),
        ("cuda:x", 2, "`device` is `cuda:x`, not auto, cpu or cuda[:N]"),
        ("cuda:", 2, "`device` is `cuda:`, not auto, cpu or cuda[:N]"),
        ("cuda:-1", 2, "`device` is `cuda:-1`, not auto, cpu or cuda[:N]"),
        ("cudax", 2, "`device` is `cudax`, not auto, cpu or cuda[:N]"),
        ("cuda:\u0661", 2, "`device` is `cuda:\u0661`, not auto, cpu or cuda[:N]"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str, count: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(UsageError) as refusal:
        device_of(text)
    assert refusal.value.summary() == message


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = save(tmp_path / "base" / "only.safetensors", {"x.weight": normal("x", 8, 8)})
    pair = {f"{PREFIX}x.lora_A.weight": normal("a", 2, 8), f"{PREFIX}x.lora_B.weight": normal("b", 8, 2)}
    adapter = make_adapter(tmp_path / "adapter", pair)
    words = ("`device` is `cuda:3`, and torch sees no CUDA device", "`--device cpu` needs none")
    refused(2, *words, base=base, adapters=adapter, options=("--device", "cuda:3"))
    merged(base, adapter, tmp_path / "out", "--device", "auto")


def test_naming_the_cpu_or_leaving_it_open_does_not_load_torch() -> None:
    code = "import sys; from streammerge.compute.devices import device_of; device_of('auto'); device_of('cpu')"
    command = [sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
