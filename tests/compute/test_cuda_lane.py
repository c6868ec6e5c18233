"""One lane of a device that works on its own: as many stretches under way as its slots hold, each with its own bytes,
and every wait that is left out is found (fake_device.py)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.compute import cuda
from streammerge.compute.cuda import DEPTH, CudaLane
from streammerge.core.errors import UsageError
from tests.compute.fake_device import FakeEvent, FakeQueue, FakeRuntime, Race, fake_device


def bytes_of(number: int, count: int = 64) -> bytearray:
    return bytearray(np.full(count, number, np.float32).tobytes())


def stretch(lane: CudaLane, data: bytearray, *, missing: bool = False) -> tuple[bytearray, Callable[[], None]]:
    """Ask for twice `data`, or fail where something is `missing`; what was handed in is gone afterwards."""
    into, count = bytearray(len(data)), len(data) // 4
    with lane.active():
        weight = lane.upload(memoryview(data), "F32", (1, count))
        data[:] = bytes(len(data))
        if missing:
            raise KeyError
        written = lane.target("F32", (1, count), memoryview(into))
        value = lane.work.take("value", (1, count))
        written.copy_(value.copy_(weight).mul_(2))
        return into, lane.send(written, memoryview(into))


def lane_over(runtime: FakeRuntime) -> CudaLane:
    return CudaLane(runtime, torch.float64)


def test_as_many_stretches_as_the_depth_are_under_way_before_one_is_waited_for() -> None:
    runtime = FakeRuntime()
    lane = lane_over(runtime)
    asked = [stretch(lane, bytes_of(number)) for number in range(DEPTH + 1)]
    assert runtime.under_way == DEPTH + 1
    for number, (into, receipt) in enumerate(asked):
        assert into == bytes(len(into))
        receipt()
        assert into == bytes_of(2 * number)
        assert runtime.under_way == DEPTH - number
    assert lane.depth == DEPTH


def test_receipts_may_be_asked_for_in_any_order() -> None:
    lane = lane_over(FakeRuntime())
    asked = [stretch(lane, bytes_of(number)) for number in range(DEPTH + 1)]
    for number in (2, 0, 3, 1):
        into, receipt = asked[number]
        receipt()
        assert into == bytes_of(2 * number)


def test_buffers_grow_to_the_longest_stretch_and_stay() -> None:
    runtime = FakeRuntime(seed=3)
    lane = lane_over(runtime)
    runtime.pinned_sizes.clear()
    for count in (8, 64, 32, 64, 8, 64):
        for number in range(DEPTH + 1):
            into, receipt = stretch(lane, bytes_of(number, count))
            receipt()
            assert into == bytes_of(2 * number, count)
    assert runtime.pinned_sizes == [32, 32] * (DEPTH + 1) + [256, 256] * (DEPTH + 1)


def test_what_is_read_beside_a_stretch_takes_no_slot_and_lives_as_long_as_its_tensor() -> None:
    runtime = FakeRuntime()
    lane = lane_over(runtime)
    under_way = [stretch(lane, bytes_of(number)) for number in range(DEPTH)]
    into = bytearray(256)
    with lane.active():
        weight = lane.upload(memoryview(bytes_of(5)), "F32", (1, 64))
        written = lane.target("F32", (1, 64), memoryview(into))
        beside = [lane.upload(memoryview(bytes_of(10**number)), "F32", (1, 64)) for number in range(6)]
        written.copy_(torch.stack([weight, *beside]).sum(0))
        receipt = lane.send(written, memoryview(into))
    receipt()
    assert into == bytes_of(111116)
    for number, (earlier, earlier_receipt) in enumerate(under_way):
        earlier_receipt()
        assert earlier == bytes_of(2 * number)


def test_an_error_in_the_middle_leaves_nothing_under_way_and_the_lane_in_order() -> None:
    runtime = FakeRuntime()
    lane = lane_over(runtime)
    given_up = [stretch(lane, bytes_of(number)) for number in range(DEPTH)]
    for _ in range(2 * DEPTH):
        with pytest.raises(KeyError):
            stretch(lane, bytes_of(9), missing=True)
        assert runtime.under_way == 0
    assert all(into == bytes(256) for into, _ in given_up)
    asked = [stretch(lane, bytes_of(number)) for number in range(DEPTH + 1)]
    for number, (into, receipt) in enumerate(asked):
        receipt()
        assert into == bytes_of(2 * number)
    for _, receipt in given_up:
        with pytest.raises(RuntimeError, match="was used for another stretch"):
            receipt()


def test_stretches_whose_receipts_are_given_up_do_not_hold_others_up() -> None:
    lane = lane_over(FakeRuntime())
    asked = [stretch(lane, bytes_of(number)) for number in range(4 * DEPTH)]
    with pytest.raises(RuntimeError, match="was used for another stretch"):
        asked[0][1]()
    asked[-1][1]()
    assert asked[-1][0] == bytes_of(8 * DEPTH - 2)


def test_a_receipt_is_good_once() -> None:
    _, receipt = stretch(lane_over(FakeRuntime()), bytes_of(1))
    receipt()
    with pytest.raises(RuntimeError, match="was used for another stretch"):
        receipt()


def test_a_target_without_an_upload_is_a_mistake() -> None:
    lane = lane_over(FakeRuntime())
    with lane.active(), pytest.raises(RuntimeError, match="nothing was uploaded"):
        lane.target("F32", (1, 64), memoryview(bytes_of(0)))


def test_what_one_lane_made_another_may_use_once_it_is_settled() -> None:
    runtime = FakeRuntime()
    one, other = lane_over(runtime), lane_over(runtime)
    with one.active():
        shared = one.upload(memoryview(bytes_of(3)), "F32", (1, 64)).double()
    with other.active(), pytest.raises(Race, match="not lent"):
        shared.square()
    assert other.borrow((shared,)) == (shared,)
    with other.active(), pytest.raises(Race, match="does not wait"):
        shared.square()
    one.settle()
    with other.active():
        assert shared.square().tolist() == [[9.0] * 64]


def test_settling_waits_for_everything() -> None:
    runtime = FakeRuntime()
    lane = lane_over(runtime)
    stretch(lane, bytes_of(1))
    assert runtime.under_way == 1
    lane.settle()
    assert runtime.under_way == 0


def test_float32_arithmetic_is_refused_where_torch_would_round_its_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    device, settings = fake_device(FakeRuntime()), SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    with pytest.raises(UsageError, match="in TF32 on cpu"):
        device.lane(torch.float32)
    assert device.lane(torch.float64).work.dtype == torch.float64
    settings.allow_tf32 = False
    assert device.lane(torch.float32).work.dtype == torch.float32


# --- the fake device sees what it is there for ------------------------------------------------------------------------
def forgets(name: str, call: int) -> Callable[[Any, Any], None]:
    """`wait_event` or `record` that does nothing on the queue that a lane made as number `call`."""
    whole = {"wait": FakeQueue.wait_event, "record": FakeEvent.record}[name]

    def forgetful(first: Any, second: Any) -> None:
        queue = first if isinstance(first, FakeQueue) else second
        if queue.number != call:
            whole(first, second)

    return forgetful


@pytest.mark.parametrize(
    ("kind", "name", "broken"),
    [
        (FakeQueue, "wait_event", forgets("wait", 1)),
        (FakeQueue, "wait_event", forgets("wait", 2)),
        (FakeEvent, "record", forgets("record", 0)),
        (FakeEvent, "record", forgets("record", 1)),
        (FakeEvent, "record", forgets("record", 2)),
        (FakeEvent, "synchronize", lambda _: None),
    ],
    ids=[
        "arithmetic before the bytes came in",
        "bytes leave before the arithmetic",
        "no event for what comes in",
        "no event for the arithmetic",
        "no event for what leaves",
        "the host waits for nothing",
    ],
)
def test_a_wait_left_out_is_seen(
    monkeypatch: pytest.MonkeyPatch, kind: type, name: str, broken: Callable[..., None]
) -> None:
    assert went_wrong() is None
    monkeypatch.setattr(kind, name, broken)
    assert went_wrong() is not None


def test_a_slot_used_again_too_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda._Slot, "take", lambda slot: None)
    lane = lane_over(FakeRuntime())
    with pytest.raises(Race):
        [stretch(lane, bytes_of(number)) for number in range(2 * DEPTH + 2)]


def went_wrong() -> str | None:
    """What a lane of several stretches is found to do wrong."""
    lane = lane_over(FakeRuntime())
    try:
        for number in range(3 * DEPTH):
            into, receipt = stretch(lane, bytes_of(number))
            receipt()
            if into != bytes_of(2 * number):
                return "other bytes"
    except Race as race:
        return str(race)
    return None
