"""Blocks that cannot be made: the run ends with the reason, however many of them there are."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from streammerge.compute.produce import Producer
from streammerge.core.errors import InputReadError
from streammerge.core.options import Options
from streammerge.planning.build import build_plan
from streammerge.planning.memory import buffer_count
from streammerge.planning.model import MergePlan
from streammerge.sinks.buffers import Sink
from streammerge.sinks.null import NullSink
from streammerge.sinks.shards import ShardSink, Told
from streammerge.sources.adapter import open_adapter
from streammerge.sources.checkpoint import open_checkpoint
from streammerge.stream import Cancelled, Inputs, Stream
from tests.sinks.subjects import make_small, make_subject

WORKERS = 2


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[MergePlan, Inputs]:
    make_small(monkeypatch)
    base, adapters = make_subject(tmp_path, "BF16")
    checkpoint = open_checkpoint(str(base))
    opened = [open_adapter(str(adapter)) for adapter in adapters]
    plan = build_plan(checkpoint, opened, [1.0] * len(opened), Options(workers=WORKERS))
    return plan, Inputs(checkpoint, opened)


def sink_of(kind: str, plan: MergePlan, staging: Path) -> Sink:
    if kind == "null":
        return NullSink(WORKERS)
    staging.mkdir()
    told = Told(lambda count: None, lambda shard: None)
    return ShardSink(plan.shards, staging, "buffered", buffer_count(WORKERS), told)


@pytest.mark.parametrize("kind", ["null", "shards"])
@pytest.mark.parametrize("first", [0, 7])
def test_a_failure_in_every_block_ends_the_run(
    subject: tuple[MergePlan, Inputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, first: int
) -> None:
    plan, inputs = subject
    made, lock = [], threading.Lock()
    real = Producer.fill

    def fill(self: Producer, number: int, start: int, end: int, into: memoryview) -> None:
        with lock:
            made.append(start)
        if len(made) > first:
            raise InputReadError("the base", "read", "Input/output error")
        real(self, number, start, end, into)

    monkeypatch.setattr(Producer, "fill", fill)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            Stream(plan, inputs).into(sink_of(kind, plan, tmp_path / "staging"))
        except InputReadError as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert len(raised) == 1
    # Each worker was at a piece of its own when the first of them failed.
    assert len(made) <= first + WORKERS


def test_a_failure_ends_the_others_at_their_next_piece(
    subject: tuple[MergePlan, Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, inputs = subject
    stream, sink = Stream(plan, inputs), NullSink(1)
    monkeypatch.setattr(Producer, "fill", lambda *_: stream._stop.set())
    with pytest.raises(Cancelled):
        stream.into(sink)
    assert sink._free.qsize() == 1
