"""A device that works on its own, without one: queues, events and copies that are put off as long as they may be.

Memory of the "device" is the host's, and arithmetic is done when it is asked for, but a copy is done only when
something waits for it (or, with a seed, at any earlier time). New memory holds NaN. Beside the bytes, every access is
checked as a race detector does: each queue counts its operations, an event holds how far every queue has come, and
whoever touches memory must have waited for whoever wrote it last, and for its readers before writing.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streammerge.compute.cuda import CudaDevice

Clock = dict[int, int]
"""How many operations of each queue are over."""


class Race(AssertionError):
    """Memory was touched before the event that allows it."""


def later(*clocks: Clock) -> Clock:
    """What is over when all of these are."""
    return {queue: max(clock.get(queue, 0) for clock in clocks) for queue in set().union(*clocks)}


@dataclass
class Touched:
    """Who wrote a piece of memory last, and who read it since, each as queue and number of the operation. Only `users`
    may touch it: whose it is, and whom it was lent to. `alive` keeps its address from being used for another piece."""

    alive: StorageWeakRef
    users: set[int]
    writer: tuple[int, int] | None = None
    readers: Clock = field(default_factory=dict)


class FakeEvent:
    """How far every queue has come."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self._runtime, self.clock = runtime, Clock()

    def record(self, queue: FakeQueue) -> None:
        self.clock = queue.now()

    def synchronize(self) -> None:
        self._runtime.host_waits(self.clock)


class FakeQueue:
    """Copies not yet done, oldest first, and what everything asked for from now on comes after."""

    def __init__(self, runtime: FakeRuntime, number: int) -> None:
        self._runtime, self.number, self.count = runtime, number, 0
        self.after = Clock()
        self.pending: deque[tuple[int, Clock, Callable[[], None]]] = deque()

    def now(self) -> Clock:
        return later(self.after, {self.number: self.count})

    def wait_event(self, event: FakeEvent) -> None:
        self.after = later(self.after, event.clock)

    def synchronize(self) -> None:
        self._runtime.host_waits(self.now())

    def begin(self) -> None:
        """One more operation; it comes after all that the host has waited for."""
        self.after = later(self.after, self._runtime.host)
        self.count += 1


class FakeRuntime:
    """Stands for torch's streams and events. `seed` lets copies be done at random times, None as late as may be."""

    device = torch.device("cpu")

    def __init__(self, seed: int | None = None) -> None:
        self.lock = threading.RLock()
        self.host = Clock()
        self.pinned_sizes: list[int] = []
        self._random = random.Random(seed) if seed is not None else None
        self._queues: list[FakeQueue] = []
        self._memory: dict[int, Touched] = {}
        self._local = threading.local()

    def queue(self) -> FakeQueue:
        with self.lock:
            self._queues.append(FakeQueue(self, len(self._queues)))
            return self._queues[-1]

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    @contextmanager
    def within(self, queue: FakeQueue) -> Iterator[None]:
        before = getattr(self._local, "present", None)
        self._local.present = queue
        try:
            with Kernels(self, queue):
                yield
        finally:
            self._local.present = before

    def pinned(self, size: int) -> torch.Tensor:
        self.pinned_sizes.append(size)
        return poisoned(size)

    def allocate(self, size: int, *others: FakeQueue) -> torch.Tensor:
        """As if the present queue had used the same memory for something else a moment ago."""
        memory, present = poisoned(size), self._local.present
        with self.lock:
            present.begin()
            self.touch(present, memory, writes=True)
            for other in others:
                other.after = later(other.after, present.now())
                self.lend(memory, other)
        return memory

    def lend(self, tensor: torch.Tensor, queue: FakeQueue) -> None:
        with self.lock:
            self._memory[tensor.untyped_storage()._cdata].users.add(queue.number)

    def copy(self, target: torch.Tensor, source: torch.Tensor, queue: FakeQueue) -> None:
        with self.lock:
            queue.begin()
            self.touch(queue, source, writes=False)
            self.touch(queue, target, writes=True)
            to, of = target.numpy(), source.numpy()
            queue.pending.append((queue.count, dict(queue.after), lambda: np.copyto(to, of)))
            if self._random:
                for other in self._random.sample(self._queues, len(self._queues)):
                    self.run({other.number: self._random.randint(0, other.count)})

    @property
    def under_way(self) -> int:
        """How many copies are not done."""
        return sum(len(queue.pending) for queue in self._queues)

    def host_waits(self, clock: Clock) -> None:
        with self.lock:
            self.run(clock)
            self.host = later(self.host, clock)

    def run(self, clock: Clock) -> None:
        """Do every copy that `clock` says is over, and what comes before it."""
        for number, count in clock.items():
            pending = self._queues[number].pending
            while pending and pending[0][0] <= count:
                _, before, work = pending.popleft()
                self.run(before)
                work()

    def touch(self, queue: FakeQueue, tensor: torch.Tensor, *, writes: bool) -> None:
        """Note that the newest operation of a queue uses some memory; raises Race if another one may still do so."""
        storage = tensor.untyped_storage()
        known = self._memory.get(storage._cdata)
        if known is None or known.alive.expired():
            known = self._memory[storage._cdata] = Touched(StorageWeakRef(storage), {queue.number})
        if queue.number not in known.users:
            raise Race(f"queue {queue.number} uses memory that was not lent to it")
        over = queue.now()
        others = ([known.writer] if known.writer else []) + (list(known.readers.items()) if writes else [])
        for number, count in others:
            if over.get(number, 0) < count:
                raise Race(f"operation {queue.count} of queue {queue.number} does not wait for {count} of {number}")
        if writes:
            known.writer, known.readers = (queue.number, queue.count), {}
        else:
            known.readers[queue.number] = queue.count


class Kernels(TorchDispatchMode):
    """torch's operations as operations of a queue."""

    def __init__(self, runtime: FakeRuntime, queue: FakeQueue) -> None:
        super().__init__()
        self._runtime, self._queue = runtime, queue

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        with self._runtime.lock:
            self._queue.begin()
            self._runtime.run(self._queue.now())
            written = set()
            for number, argument in enumerate(func._schema.arguments):
                value = kwargs.get(argument.name, args[number] if number < len(args) else None)
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for leaf in tree_leaves(value):
                    if isinstance(leaf, torch.Tensor):
                        self._runtime.touch(self._queue, leaf, writes=writes)
                        written.add(leaf.untyped_storage()._cdata)
            made = func(*args, **kwargs)
            for leaf in tree_leaves(made):
                if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in written:
                    self._runtime.touch(self._queue, leaf, writes=True)
            return made


def poisoned(size: int) -> torch.Tensor:
    """Bytes that are NaN in every float dtype."""
    return torch.from_numpy(np.full(size, 0xFF, np.uint8))


def fake_device(runtime: FakeRuntime) -> CudaDevice:
    """The device of the package over a runtime of the tests."""
    return CudaDevice(runtime)
