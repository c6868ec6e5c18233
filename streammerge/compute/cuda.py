"""NVIDIA GPUs: stretches of tiles on their way through a fixed number of slots of pinned and device memory.

Each lane has three queues: stored bytes come in on one, are worked on in another, and leave as rounded bytes on a
third. Events keep them in order, so that the host waits for nothing but the oldest stretch. The invariant: no side
touches a buffer before the event that says the other has done with it, and a slot is taken only after its last one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from streammerge.compute.lanes import Lane, Receipt, Workspace
from streammerge.core.dtypes import torch_dtype
from streammerge.core.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEPTH = 3
"""Stretches under way on a lane beside the one that is asked for: one comes in, one is worked on, one leaves."""
ASIDE = 2
"""Pinned buffers for what is read beside a stretch: one is filled while the other is copied."""


class Event(Protocol):
    """A point in a queue."""

    def record(self, queue: Any) -> None:
        """Stand for everything asked of `queue` so far."""

    def synchronize(self) -> None:
        """Return when all of that is done."""


class Queue(Protocol):
    """Work that the device does in the order in which it was asked for."""

    def wait_event(self, event: Any) -> None:
        """What is asked for from now on begins after what `event` stands for now."""

    def synchronize(self) -> None:
        """Return when everything asked for so far is done."""


class Runtime(Protocol):
    """What a lane needs of a device that works on its own."""

    device: torch.device

    def queue(self) -> Queue:
        """A queue that no other one waits for unless told so."""

    def event(self) -> Event:
        """An event that stands for nothing yet."""

    def within(self, queue: Any) -> AbstractContextManager[object]:
        """Within `with`, torch allocates for and works on this queue."""

    def pinned(self, size: int) -> Tensor:
        """`size` bytes (uint8) of host memory that the device can copy from and to by itself."""

    def allocate(self, size: int, *others: Any) -> Tensor:
        """`size` bytes (uint8) on the device, for torch's present queue and `others`."""

    def copy(self, target: Tensor, source: Tensor, queue: Any) -> None:
        """Begin to copy as many bytes between pinned and device memory, in `queue`."""

    def lend(self, tensor: Tensor, queue: Any) -> None:
        """Keep what was allocated for another queue until `queue` has done with it, too, once it is let go."""


class CudaRuntime:
    """torch's streams and events on CUDA device number `index`."""

    def __init__(self, index: int) -> None:
        import torch

        self.device = torch.device("cuda", index)

    def queue(self) -> Queue:
        """A stream that does not wait for the default one."""
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]
        made: Queue = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return made

    def event(self) -> Event:
        """An event whose waiting threads sleep: the cores are needed for reading and writing."""
        import torch

        made: Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        return made

    def within(self, queue: Any) -> AbstractContextManager[object]:
        """Switches torch's device too."""
        import torch

        return torch.cuda.stream(queue)

    def pinned(self, size: int) -> Tensor:
        """Page-locked, from torch's own cache."""
        import torch

        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def allocate(self, size: int, *others: Any) -> Tensor:
        """From torch's own cache, which keeps only one queue's uses of memory apart by itself: the others wait for what
        it did with this before, and are waited for when it is let go."""
        import torch

        memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        for queue in others:
            queue.wait_stream(torch.cuda.current_stream(self.device))
            memory.record_stream(queue)
        return memory

    def copy(self, target: Tensor, source: Tensor, queue: Any) -> None:
        """Returns at once, as one side is pinned."""
        with self.within(queue):
            target.copy_(source, non_blocking=True)

    def lend(self, tensor: Tensor, queue: Any) -> None:
        """torch's cache asks the queue before it hands the memory out again."""
        tensor.record_stream(queue)


class _Slot:
    """The buffers of one stretch, and the events of its way. `turn` counts its uses."""

    def __init__(self, runtime: Runtime, queues: Sequence[Queue]) -> None:
        self._runtime, self._queues = runtime, queues
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        self.arrived, self.computed, self.left = runtime.event(), runtime.event(), runtime.event()
        self.last: Event | None = None
        """After this one nothing touches the buffers."""
        self.turn = 0

    def buffers(self, side: str, size: int) -> tuple[Tensor, Tensor]:
        """`size` bytes of pinned and as many of device memory, the same for each `side` unless they have to grow."""
        if side not in self._buffers or len(self._buffers[side][0]) < size:
            self._buffers.pop(side, None)
            self._buffers[side] = self._runtime.pinned(size), self._runtime.allocate(size, *self._queues)
        host, device = self._buffers[side]
        return host[:size], device[:size]

    def take(self) -> None:
        """Begin another use, when the last is over."""
        if self.last:
            self.last.synchronize()
        self.last = None
        self.turn += 1


class _Aside:
    """One pinned buffer for what is read beside a stretch; `sent` says when it may be filled again."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._host = runtime, runtime.pinned(0)
        self._sent, self._used = runtime.event(), False

    def send(self, data: memoryview, queue: Queue) -> Tensor:
        """Begin to copy `data` into fresh device memory, in the queue that works on it."""
        if self._used:
            self._sent.synchronize()
        if len(self._host) < data.nbytes:
            self._host = self._runtime.pinned(data.nbytes)
        host = self._host[: data.nbytes]
        _copy_on_host(host.numpy(), data)
        device = self._runtime.allocate(data.nbytes)
        self._runtime.copy(device, host, queue)
        self._sent.record(queue)
        self._used = True
        return device


class CudaLane:
    """One worker's queues and slots. Within one `active()`, what is uploaded first is a stretch and has a slot until it
    is sent; whatever else is uploaded has memory of its own, for as long as its tensor lives."""

    depth = DEPTH

    def __init__(self, runtime: Runtime, dtype: torch.dtype) -> None:
        self._runtime = runtime
        self._incoming, self._compute, self._outgoing = runtime.queue(), runtime.queue(), runtime.queue()
        with runtime.within(self._compute):
            self.work = Workspace(dtype, runtime.device)
            copying = self._incoming, self._outgoing
            self._idle = deque(_Slot(runtime, copying) for _ in range(DEPTH + 1))
            self._asides = deque(_Aside(runtime) for _ in range(ASIDE))
        self._sent: deque[_Slot] = deque()
        self._open: _Slot | None = None
        self._begins = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """A stretch: torch works on the lane's compute queue. Where it fails, nothing is left under way."""
        self._begins = True
        try:
            with self._runtime.within(self._compute):
                yield
        except BaseException:
            self.settle()
            raise
        finally:
            self._begins = False
            if self._open:
                self._open.computed.record(self._compute)
                self._open.last = self._open.computed
                self._idle.append(self._open)
                self._open = None

    def settle(self) -> None:
        """Wait for all three queues."""
        for queue in (self._incoming, self._compute, self._outgoing):
            queue.synchronize()

    def borrow(self, state: Any) -> Any:
        """Its memory is not used for anything else before this lane has done with it, whoever lets go of it last."""
        for tensor in state if isinstance(state, tuple) else (state,):
            self._runtime.lend(tensor, self._compute)
        return state

    def upload(self, data: memoryview, dtype: str, shape: tuple[int, int]) -> Tensor:
        """Through pinned memory; what is asked of the compute queue afterwards waits for the copy, the caller does not.
        A stretch waits here for the last use of its slot."""
        if not self._begins:
            with self._runtime.within(self._compute):
                aside = self._asides[0]
                self._asides.rotate()
                return aside.send(data, self._compute).view(torch_dtype(dtype)).view(shape)
        self._begins = False
        self._open = slot = self._taken()
        host, device = slot.buffers("stored", data.nbytes)
        _copy_on_host(host.numpy(), data)
        self._runtime.copy(device, host, self._incoming)
        slot.arrived.record(self._incoming)
        self._compute.wait_event(slot.arrived)
        return device.view(torch_dtype(dtype)).view(shape)

    def target(self, dtype: str, shape: tuple[int, int], into: memoryview) -> Tensor:
        """Device memory of the stretch that was uploaded."""
        return self._stretch().buffers("written", into.nbytes)[1].view(torch_dtype(dtype)).view(shape)

    def send(self, written: Tensor, into: memoryview) -> Receipt:
        """Copy into pinned memory once the arithmetic is done; the receipt copies from there."""
        slot = self._stretch()
        host, device = slot.buffers("written", into.nbytes)
        slot.computed.record(self._compute)
        self._outgoing.wait_event(slot.computed)
        self._runtime.copy(host, device, self._outgoing)
        slot.left.record(self._outgoing)
        slot.last, self._open = slot.left, None
        self._sent.append(slot)
        turn = slot.turn
        return lambda: self._receive(slot, turn, host, into)

    def _stretch(self) -> _Slot:
        if not self._open:
            raise RuntimeError("nothing was uploaded for this stretch")
        return self._open

    def _taken(self) -> _Slot:
        """A slot that nobody waits for; the longest sent one where a caller gave its receipts up."""
        slot = self._idle.popleft() if self._idle else self._sent.popleft()
        slot.take()
        return slot

    def _receive(self, slot: _Slot, turn: int, host: Tensor, into: memoryview) -> None:
        if slot.turn != turn or slot not in self._sent:
            raise RuntimeError("the slot of this receipt was used for another stretch")
        slot.left.synchronize()
        _copy_on_host(into, host.numpy())
        slot.last = None
        self._sent.remove(slot)
        self._idle.append(slot)


class CudaDevice:
    """A GPU."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.name = str(runtime.device)

    def lane(self, dtype: torch.dtype) -> Lane:
        """Queues and slots of its own. Raises UsageError where torch was told to round the factors of float32 products
        to TF32, which has 10 bits of mantissa."""
        import torch

        if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
            raise UsageError(
                f"`accumulate` is `float32`, and torch is set to compute such products in TF32 on {self.name}",
                'in this process, call `torch.set_float32_matmul_precision("highest")` first',
            )
        return CudaLane(self._runtime, dtype)


def _copy_on_host(target: Any, source: Any) -> None:
    """Copy the bytes of one array or memoryview to another; lets go of Python's lock meanwhile."""
    import numpy as np

    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
