"""Buffers that go round between those who fill them and those who write them."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Iterator

import pytest

from streammerge.core import io
from streammerge.core.errors import WriteError
from streammerge.core.resources import aligned_buffer
from streammerge.planning.memory import PIECE, WRITERS, buffer_count
from streammerge.sinks.buffers import WriteBehind
from streammerge.sinks.null import NullSink

BUFFERS = 3


def failed(number: int = 0) -> WriteError:
    return WriteError(f"file {number}", "write", "Input/output error")


class Gate:
    """Writes that begin, and end when they are let go."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.begin, self.go = threading.Semaphore(0), threading.Event()

    def write(self, number: int) -> None:
        self.begun.append(number)
        self.begin.release()
        assert self.go.wait(30)

    def wait_for(self, count: int) -> None:
        """Return when so many more writes have begun."""
        for _ in range(count):
            assert self.begin.acquire(timeout=30)


@pytest.fixture
def behind() -> Iterator[WriteBehind]:
    made = WriteBehind(BUFFERS)
    yield made
    made.close()


def lease_for_ever(behind: WriteBehind) -> None:
    """Write nothing again and again, until a lease raises."""
    while True:
        behind.submit(behind.lease(), lambda: None)


def raised(behind: WriteBehind) -> BaseException | None:
    """What a lease raises."""
    try:
        behind.lease()
    except WriteError as error:
        return error
    return None


def address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def test_buffers_are_whole_pieces_that_begin_on_pages(behind: WriteBehind) -> None:
    leased = [behind.lease() for _ in range(BUFFERS)]
    assert [len(buffer) for buffer in leased] == [PIECE] * BUFFERS
    assert [address(buffer) % io.ALIGNMENT for buffer in leased] == [0] * BUFFERS
    ranges = sorted((address(buffer), address(buffer) + PIECE) for buffer in leased)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 3 * 2**20 + 1])
def test_an_aligned_buffer_is_the_next_multiple_of_a_page(size: int) -> None:
    buffer = aligned_buffer(size)
    assert address(buffer) % 4096 == 0
    assert len(buffer) == -(-size // 4096) * 4096


def test_no_more_buffers_are_out_than_there_are(behind: WriteBehind) -> None:
    gate, got = Gate(), threading.Event()
    for number in range(BUFFERS):
        buffer = behind.lease()
        behind.submit(buffer, lambda number=number: gate.write(number))
    gate.wait_for(WRITERS)
    waiting = threading.Thread(target=lambda: (behind.lease(), got.set()))
    waiting.start()
    assert not got.wait(0.05)
    assert sorted(gate.begun) == [0, 1]
    gate.go.set()
    assert got.wait(30)
    waiting.join()


def test_a_buffer_goes_round_until_everything_is_written(behind: WriteBehind) -> None:
    seen, written = set(), []
    for number in range(50):
        buffer = behind.lease()
        seen.add(address(buffer))
        buffer[0] = number
        behind.submit(buffer, lambda buffer=buffer: written.append(buffer[0]))
    behind.finish()
    assert len(seen) <= BUFFERS
    assert sorted(written) == list(range(50))


def test_the_next_lease_and_the_end_raise_what_a_write_failed_with(behind: WriteBehind) -> None:
    error = failed()

    def fail() -> None:
        raise error

    behind.submit(behind.lease(), fail)
    with pytest.raises(WriteError) as caught:
        lease_for_ever(behind)
    assert caught.value is error
    # Whoever else waits is told too, each time, and nobody waits for ever.
    told: list[BaseException | None] = []
    others = threading.Thread(target=lambda: told.extend(raised(behind) for _ in range(2 * BUFFERS)), daemon=True)
    others.start()
    others.join(30)
    assert told == [error] * 2 * BUFFERS
    with pytest.raises(WriteError) as last:
        behind.finish()
    assert last.value is error


def test_writes_after_a_failed_one_are_not_begun(behind: WriteBehind) -> None:
    gate, begun = Gate(), []

    def fail_later() -> None:
        gate.write(0)
        raise failed(0)

    buffers = [behind.lease() for _ in range(BUFFERS)]
    for buffer in buffers[:WRITERS]:
        behind.submit(buffer, fail_later)
    gate.wait_for(WRITERS)
    behind.submit(buffers[WRITERS], lambda: begun.append(1))
    gate.go.set()
    with pytest.raises(WriteError, match="file 0"):
        behind.finish()
    assert begun == []


def test_the_first_of_several_failures_is_raised(behind: WriteBehind) -> None:
    first, second = Gate(), Gate()

    def failing(gate: Gate, number: int) -> None:
        gate.write(number)
        raise failed(number)

    behind.submit(behind.lease(), lambda: failing(first, 1))
    behind.submit(behind.lease(), lambda: failing(second, 2))
    first.wait_for(1)
    second.wait_for(1)
    second.go.set()
    with pytest.raises(WriteError, match="file 2"):
        lease_for_ever(behind)
    first.go.set()
    with pytest.raises(WriteError, match="file 2"):
        behind.finish()


def test_closing_waits_for_writes_that_have_begun_and_drops_the_others() -> None:
    behind, gate, ended = WriteBehind(BUFFERS), Gate(), []

    def write(number: int) -> None:
        gate.write(number)
        ended.append(number)

    for number in range(BUFFERS):
        behind.submit(behind.lease(), lambda number=number: write(number))
    gate.wait_for(WRITERS)
    closed = threading.Event()
    closing = threading.Thread(target=lambda: (behind.close(), closed.set()))
    closing.start()
    while not behind._closing:
        closed.wait(0.001)
    assert not closed.wait(0.02)
    gate.go.set()
    assert closed.wait(30)
    closing.join()
    assert sorted(ended) == sorted(gate.begun) == [0, 1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("streammerge-write")]


def test_nowhere_hands_out_as_many_buffers_as_it_was_given() -> None:
    sink = NullSink(2)
    one, two = sink.lease(), sink.lease()
    assert address(one) != address(two)
    assert len(one) == len(two) == PIECE
    sink.commit(0, 0, one, 5, None, None)
    assert address(sink.lease()) == address(one)
    sink.finish()
    sink.close()


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_worker_can_fill_one_while_another_is_written(workers: int) -> None:
    assert buffer_count(workers) > workers
    assert PIECE % io.ALIGNMENT == 0
