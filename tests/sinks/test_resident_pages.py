"""A mapped base is given back as it is read: at no piece of the output is more than a sliver of it resident.

The kernel counts: in `/proc/self/smaps`, for the mappings of one file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streammerge.core import digests
from streammerge.core.options import Options
from streammerge.planning.build import build_plan
from streammerge.planning.memory import PIECE, buffer_count
from streammerge.sinks.buffers import Origin
from streammerge.sinks.journal import Made
from streammerge.sinks.null import NullSink
from streammerge.sources.adapter import open_adapter
from streammerge.sources.checkpoint import open_checkpoint
from streammerge.stream import Inputs, Stream
from tests.refusals.making import CONFIG, PREFIX, Stored, make_adapter, stored, write_json
from tests.sinks.subjects import exact, save_as_laid

ROWS, COLS = 8191, 3001
MODULES = ("model.copied", "model.merged", "model.embed_tokens", "model.other")
"""49 MB each; 197 MB in one file of three blocks."""
HUGE = 2 * 2**20
"""The kernel may map so much at once, where a file lies in the page cache in large pages."""


def resident(path: Path) -> int:
    """Bytes of the file at `path` that are mapped into this process and present."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


class Looking(NullSink):
    """Looks at how much of a file is resident whenever a piece is committed."""

    def __init__(self, buffers: int, path: Path) -> None:
        super().__init__(buffers)
        self.path = path
        self.seen: list[int] = []

    def commit(
        self, number: int, offset: int, buffer: memoryview, size: int, origin: Origin | None, made: Made | None
    ) -> None:
        self.seen.append(resident(self.path))
        super().commit(number, offset, buffer, size, origin, made)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Path]]]:
    """A base, a LoRA on two of its tensors, and a DoRA on its embedding."""
    root = tmp_path_factory.mktemp("large")
    data = np.full((ROWS, COLS), 0x3F80, np.uint16).tobytes()
    save_as_laid(
        root / "base" / "model.safetensors", {f"{n}.weight": Stored("BF16", (ROWS, COLS), data) for n in MODULES}
    )
    write_json(root / "base" / "config.json", dict(CONFIG))
    adapters = []
    for name, modules, config in (("lora", MODULES[1::2], {}), ("dora", MODULES[2:3], {"use_dora": True})):
        factors = {}
        for module in modules:
            # The norms of an embedding's columns take a pass over all of it before the first tile.
            names = ("lora_embedding_B", "lora_embedding_A") if config else ("lora_A.weight", "lora_B.weight")
            shapes = ((COLS, 3), (3, ROWS)) if config else ((3, COLS), (ROWS, 3))
            factors |= {
                f"{PREFIX}{module}.{name}": exact(name, *shape) for name, shape in zip(names, shapes, strict=True)
            }
            if config:
                factors[f"{PREFIX}{module}.lora_magnitude_vector"] = stored(np.ones(COLS))
        adapters.append(make_adapter(root / name, factors, r=3, lora_alpha=2, **config))
    yield root / "base", adapters
    (root / "base" / "model.safetensors").unlink()


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_than_what_is_worked_on_is_mapped_at_any_piece(inputs: tuple[Path, list[Path]], workers: int) -> None:
    base, paths = inputs
    checkpoint, adapters = open_checkpoint(str(base), "mmap"), [open_adapter(str(path)) for path in paths]
    plan = build_plan(checkpoint, adapters, [1.0, 1.0], Options(workers=workers, read="mmap"))
    assert plan.figures.workers == workers
    file = base / "model.safetensors"
    sink = Looking(buffer_count(workers), file)
    written = Stream(plan, Inputs(checkpoint, adapters)).into(sink)
    assert len(sink.seen) == -(-file.stat().st_size // PIECE) == 47
    assert len(written["model.safetensors"].blocks) == digests.block_count(written["model.safetensors"].size) == 3
    # Each other worker has at most a piece in hand, mapped with what the kernel adds at both of its ends.
    assert max(sink.seen) <= (workers - 1) * (PIECE + 2 * HUGE) + 2 * HUGE
    assert resident(file) <= 2 * HUGE


def test_what_is_mapped_and_kept_is_seen(inputs: tuple[Path, list[Path]]) -> None:
    """The measure itself: a stretch that nobody gives back is counted."""
    base, _ = inputs
    checkpoint = open_checkpoint(str(base), "mmap")
    info = checkpoint.facts.tensors["model.copied.weight"]
    held = checkpoint.files.read(info, 0, 8 * PIECE)
    assert sum(held[::4096]) > 0
    assert 8 * PIECE - HUGE <= resident(base / "model.safetensors") <= 8 * PIECE + 2 * HUGE
