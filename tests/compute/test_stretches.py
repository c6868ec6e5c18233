"""Stretches of output: however a file is cut into them the bytes are the same, no tile is made twice, and none is
reported twice."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.compute.produce import Producer
from streammerge.compute.tile import SAMPLE_EVERY, TileStats
from streammerge.compute.worker import TileWorker
from streammerge.core.options import Options
from streammerge.planning import memory
from streammerge.planning.build import build_plan
from streammerge.planning.model import MergePlan
from streammerge.planning.tiles import grid_of
from streammerge.sources.adapter import open_adapter
from streammerge.sources.checkpoint import open_checkpoint
from streammerge.stream import Inputs
from tests.refusals.making import values_of
from tests.sinks.subjects import DIRECTED, base_tensors, expected_values, make_small, make_subject

QKV = "model.layers.0.self_attn.qkv_proj.weight"


class Subject:
    """A plan of float64, where the last bit of every sum is written, and the files it comes to when each is made whole
    by a producer of its own."""

    def __init__(self, plan: MergePlan, inputs: Inputs) -> None:
        self.plan, self.inputs = plan, inputs
        self.files = [filled(self.producer(), n, [(0, shard.size)]) for n, shard in enumerate(plan.shards)]

    def producer(self, on_stats: Callable[[str, int, TileStats], None] | None = None) -> Producer:
        return Producer(self.plan, self.inputs.checkpoint, self.inputs.adapters, on_stats)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    root = tmp_path_factory.mktemp("subject")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        base, paths = make_subject(root, "F64")
        checkpoint, adapters = open_checkpoint(str(base)), [open_adapter(str(path)) for path in paths]
        plan = build_plan(checkpoint, adapters, [1.0] * 3, Options())
        yield Subject(plan, Inputs(checkpoint, adapters))


def filled(producer: Producer, number: int, cuts: list[tuple[int, int]]) -> bytes:
    """The bytes of these ranges of an output file, one after the other."""
    found = []
    with producer.threads.kept():
        for start, end in cuts:
            into = memoryview(bytearray(end - start))
            producer.fill(number, start, end, into)
            found.append(bytes(into))
    return b"".join(found)


def between(subject: Subject, number: int, points: list[Point]) -> list[tuple[int, int]]:
    """The consecutive ranges of a file that begin and end at these points."""
    size, edges = len(subject.files[number]), tile_edges(subject.plan, number)
    found = {at % size if by is None else edges[at % len(edges)] + by for at, by in points}
    return list(itertools.pairwise([0, *sorted(point for point in found if 0 < point < size), size]))


def tile_edges(plan: MergePlan, number: int) -> list[int]:
    """Where in a file the tiles of its tensors begin."""
    offsets = plan.shards[number].offsets
    return [
        offsets[name] + grid_of(plan.tensors[name].shape, plan.tensors[name].operations).tile(tile).start * 8
        for name, tile in sorted(touched(plan, number))
    ]


Point = tuple[int, int | None]
"""Any byte of a file, or how far from the beginning of which tile."""
POINTS = st.lists(st.tuples(st.integers(0, 2**24), st.none() | st.integers(-9, 9)), max_size=25)


def test_the_whole_is_what_the_formulas_come_to(subject: Subject) -> None:
    values, stored = expected_values("F64"), base_tensors("F64")
    for shard, data in zip(subject.plan.shards, subject.files, strict=True):
        assert data[: len(shard.header)] == shard.header
        for name, at in shard.offsets.items():
            if name == "odd":
                assert data[at : at + 3] == b"\x01\x02\x03"
                continue
            wanted = values[name]
            found = np.frombuffer(data[at : at + wanted.nbytes]).reshape(wanted.shape)
            if name == f"{DIRECTED}.weight":
                assert np.abs(found - wanted).max() < 1e-13 * np.abs(wanted).max()
            else:
                assert found.tobytes() == wanted.tobytes(), name
    assert len(stored) == sum(len(shard.offsets) for shard in subject.plan.shards)


@settings(max_examples=40, deadline=None)
@given(number=st.integers(0, 1), points=POINTS)
def test_any_cuts_join_to_the_same_bytes(subject: Subject, number: int, points: list[Point]) -> None:
    data = subject.files[number]
    assert filled(subject.producer(), number, between(subject, number, points)) == data


@settings(max_examples=40, deadline=None)
@given(ranges=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2**24), st.integers(1, 60_000)), max_size=12))
def test_any_range_in_any_order_is_that_part_of_the_file(subject: Subject, ranges: list[tuple[int, int, int]]) -> None:
    producer = subject.producer()
    for number, point, length in ranges:
        data = subject.files[number]
        start = point % len(data)
        end = min(len(data), start + length)
        assert filled(producer, number, [(start, end)]) == data[start:end]


@pytest.mark.parametrize("length", [1, 7])
def test_cuts_within_numbers_join_too(subject: Subject, length: int) -> None:
    at = subject.plan.shards[0].offsets[QKV] + 5001
    cuts = [(start, start + length) for start in range(at, at + 90 * length, length)]
    assert filled(subject.producer(), 0, cuts) == subject.files[0][at : at + 90 * length]


class Made:
    """Which tiles were made, and what was reported of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.tiles: Counter[tuple[str, int]] = Counter()
        self.stats: list[tuple[str, int, TileStats]] = []
        self.most = 0
        make = TileWorker._make

        def noting(worker: TileWorker, recipe: Any, tiles: list[Any], into: memoryview, *, report: bool) -> None:
            self.tiles.update((recipe.output.name, tile.index) for tile in tiles)
            self.most = max(self.most, sum(tile.end - tile.start for tile in tiles) * recipe.stored)
            make(worker, recipe, tiles, into, report=report)

        patch.setattr(TileWorker, "_make", noting)

    def note(self, tensor: str, tile: int, stats: TileStats) -> None:
        self.stats.append((tensor, tile, stats))


def touched(plan: MergePlan, number: int) -> set[tuple[str, int]]:
    """Every tile of every tensor of a file that has operations."""
    outputs = [plan.tensors[name] for name in plan.shards[number].offsets]
    return {
        (output.name, tile)
        for output in outputs
        if output.operations
        for tile in range(grid_of(output.shape, output.operations).count)
    }


@settings(max_examples=25, deadline=None)
@given(number=st.integers(0, 1), points=POINTS)
def test_consecutive_cuts_make_every_tile_once_and_report_it_once(
    subject: Subject, number: int, points: list[Point]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        made = Made(patch)
        data = subject.files[number]
        assert filled(subject.producer(made.note), number, between(subject, number, points)) == data
    tiles = touched(subject.plan, number)
    assert len(tiles) > 30
    assert made.tiles == Counter(tiles)
    # At most a piece is read at a time, or one tile where that is larger: eight rows of 257 numbers are.
    assert 8 * 134 * 8 <= made.most <= max(memory.PIECE, 8 * 257 * 8)
    assert_reported_once(subject, number, made.stats)


@settings(max_examples=15, deadline=None)
@given(points=POINTS, workers=st.integers(2, 4))
def test_workers_that_share_a_tile_report_it_once(subject: Subject, points: list[Point], workers: int) -> None:
    found: list[tuple[str, int, TileStats]] = []
    producers = [subject.producer(lambda *measured: found.append(measured)) for _ in range(workers)]
    parts = []
    for number, cut in enumerate(between(subject, 0, points)):
        parts.append(filled(producers[number % workers], 0, [cut]))
    assert b"".join(parts) == subject.files[0]
    assert_reported_once(subject, 0, found)


def assert_reported_once(subject: Subject, number: int, stats: list[tuple[str, int, TileStats]]) -> None:
    """The squares of all tiles are those of the delta, and every sample is taken once."""
    before, after = base_tensors("F64"), expected_values("F64")
    sums: Counter[str] = Counter()
    samples: Counter[tuple[str, int]] = Counter()
    for tensor, tile, measured in stats:
        sums[tensor] += measured.delta
        samples[tensor, tile] += bool(measured.sampled)
    for name in {name for name, _ in touched(subject.plan, number)}:
        change = after[name] - values_of(before[name])
        assert sums[name] == pytest.approx((change**2).sum(), rel=1e-9), name
    sampled = {(name, tile) for name, tile in touched(subject.plan, number) if tile % SAMPLE_EVERY == 0}
    # The key part of the fused tensor has no delta: a sample of it says nothing.
    assert all(count == 1 for key, count in samples.items() if count)
    assert {key for key, count in samples.items() if count} <= sampled
    assert len({name for (name, _), count in samples.items() if count}) == len({name for name, _ in sampled})


def test_a_tile_whose_end_is_asked_for_first_is_right_and_reported_with_its_beginning(subject: Subject) -> None:
    made: list[tuple[str, int, TileStats]] = []
    producer = subject.producer(lambda *measured: made.append(measured))
    at = subject.plan.shards[0].offsets[QKV]
    late, early = (at + 100, at + 200), (at, at + 100)
    assert filled(producer, 0, [late]) == subject.files[0][slice(*late)]
    assert made == []
    assert filled(producer, 0, [(at + 20_000, at + 20_100)]) == subject.files[0][at + 20_000 : at + 20_100]
    assert filled(producer, 0, [early]) == subject.files[0][slice(*early)]
    assert [(name, tile) for name, tile, _ in made] == [(QKV, 0)]
