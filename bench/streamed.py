"""Merges an adapter into a base and writes nothing: `streammerge run` for bases that are too large to be written here.

    python bench/streamed.py BASE ADAPTER

reads, plans, makes every block of every weight file, measures and digests it, and makes the report in the end; left out
are the files around the weights, writing, and the check of what was written. Prints JSON: seconds so far, resident
memory and its peak (bytes) after each step, and the digests of the weight files, which are those of a run that writes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from streammerge.compute.devices import device_of
from streammerge.compute.loading import load_in_background, wants_the_disk
from streammerge.core import strict_json
from streammerge.core.options import Options
from streammerge.execute import fingerprint_of
from streammerge.planning.build import build_plan
from streammerge.planning.memory import buffer_count
from streammerge.report import document_of
from streammerge.sinks.null import NullSink
from streammerge.sources.adapter import open_adapter
from streammerge.sources.ahead import ReadAhead
from streammerge.sources.checkpoint import open_checkpoint
from streammerge.stream import Inputs, Stream

PARTS = ("VmRSS", "VmHWM", "RssAnon", "RssFile", "VmPTE")


class Steps:
    """What each step left behind."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.found: dict[str, dict[str, float]] = {}

    def done(self, step: str) -> None:
        """Note time and memory at the end of a step."""
        lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
        memory = {name: int(rest.split()[0]) * 1024 for name, _, rest in lines if name in PARTS}
        self.found[step] = {"seconds": round(time.perf_counter() - self._began, 3)} | memory


def streamed(base: str, adapter: str, options: Options) -> dict[str, object]:
    """The steps of a run, and the digests of its weight files."""
    steps = Steps()
    load_in_background()
    checkpoint = open_checkpoint(base, options.read)
    steps.done("opened")
    with ReadAhead(checkpoint.files, [shard.file for shard in checkpoint.facts.shards], gently=wants_the_disk):
        inputs = Inputs(checkpoint, [open_adapter(adapter, options.read)])
        plan = build_plan(checkpoint, inputs.adapters, [1.0], options)
        fingerprint = fingerprint_of(plan, checkpoint)
        steps.done("planned")
        stream = Stream(plan, inputs, device_of(options.device))
        files = stream.into(NullSink(buffer_count(plan.figures.workers)))
        steps.done("streamed")
        document = document_of(plan, fingerprint, stream.stats, files, {})
        size = len(strict_json.dumps(document))
        steps.done("reported")
    told = {"bytes": plan.figures.write, "workers": plan.figures.workers, "working_memory": plan.figures.memory}
    digests = {name: item.data()["digest"] for name, item in files.items()}
    return told | {"report_bytes": size, "digests": digests, "steps": steps.found}


def main() -> None:
    """Stream and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("--read", default="auto", choices=("auto", "mmap", "pread", "direct"))
    arguments = parser.parse_args()
    print(json.dumps(streamed(arguments.base, arguments.adapter, Options(read=arguments.read))))


if __name__ == "__main__":
    main()
