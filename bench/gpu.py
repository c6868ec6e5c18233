"""How near a merge on a GPU comes to what the bus can carry.

    python bench/gpu.py --base llama-4GB --dir DIR

The merge goes through the null sink: reading (from the page cache after the first run), arithmetic on the device,
digests. The limit is what the same bytes take to be copied and nothing else: those of every tensor that an operation
changes, in from pinned memory on one stream and out on another, as many at a time as a stretch of tiles has. Without a
GPU it says so and ends.
"""

from __future__ import annotations

import time
from pathlib import Path

from bases import base_of
from measure import machine, median, parser_of, working_directory
from stage_runs import planned

from streammerge.compute.devices import device_of
from streammerge.core.options import Options
from streammerge.planning.layout import size_of
from streammerge.planning.memory import PIECE, buffer_count
from streammerge.planning.model import MergePlan
from streammerge.sinks.null import NullSink
from streammerge.stream import Inputs, Stream

Crossing = tuple[int, int]
"""Bytes that go to the device and that come back."""


def crossing(plan: MergePlan, inputs: Inputs) -> Crossing:
    """Those of all tensors that an operation changes."""
    changed = [(name, output) for name, output in plan.tensors.items() if output.operations]
    stored = inputs.checkpoint.facts.tensors
    return sum(stored[name].nbytes for name, _ in changed), sum(size_of(output) for _, output in changed)


def merge_seconds(base: Path, adapter: Path, options: Options) -> tuple[float, Crossing]:
    """Of one merge, planning left out."""
    plan, inputs = planned(base, adapter, options)
    stream = Stream(plan, inputs, device_of(options.device))
    sink = NullSink(buffer_count(plan.figures.workers))
    began = time.perf_counter()
    stream.into(sink)
    return time.perf_counter() - began, crossing(plan, inputs)


def copy_seconds(device: str, sizes: Crossing) -> float:
    """Of copying so many bytes in and so many out at the same time."""
    import torch

    places = [torch.empty(PIECE, dtype=torch.uint8, device=device) for _ in sizes]
    pinned = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in sizes]
    pairs = [(places[0], pinned[0]), (pinned[1], places[1])]
    streams = [torch.cuda.Stream(device) for _ in sizes]
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for at in range(0, max(sizes), PIECE):
        for (target, source), stream, size in zip(pairs, streams, sizes, strict=True):
            part = max(0, min(PIECE, size - at))
            with torch.cuda.stream(stream):
                target[:part].copy_(source[:part], non_blocking=True)
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def main() -> None:
    """Measure in alternation, print medians and their ratio."""
    parser = parser_of(__doc__)
    parser.add_argument("--base", default="llama-1GB", help="as in bases.py (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="as in `streammerge run` (default: its own)")
    parser.add_argument("--device", default="cuda:0")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here: nothing was measured")
    options = Options(device=arguments.device, workers=arguments.workers)
    merges, copies = [], []
    with working_directory(arguments.dir) as directory:
        base, adapter = base_of(arguments.base).build(directory, arguments.rank)
        merge_seconds(base, adapter, options)
        for _ in range(arguments.runs):
            seconds, sizes = merge_seconds(base, adapter, options)
            merges.append(seconds)
            copies.append(copy_seconds(arguments.device, sizes))
    merge, copy = median(merges), median(copies)
    print(f"{machine()}, {torch.cuda.get_device_name(arguments.device)}")
    print(f"{arguments.base}, r={arguments.rank}: {sizes[0] / 1e9:.2f} GB in, {sizes[1] / 1e9:.2f} GB out")
    print(f"merge {merge:.3f} s, copies alone {copy:.3f} s: {merge / copy:.2f} times the limit of the bus")


if __name__ == "__main__":
    main()
