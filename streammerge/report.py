"""What a run did: the report that is written as completion marker, and the one that is handed to the caller.

`streammerge.json` holds only what inputs and options determine: two runs of one plan write the same bytes. Everything
about this run in particular (paths, times) is outside of it.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.compute.tile import TileStats
from streammerge.core.digests import file_digest, sealed
from streammerge.core.tensors import Operation, OutputTensor, Stored
from streammerge.planning.model import MergePlan
from streammerge.planning.tiles import grid_of

REPORT_VERSION = 1


@dataclass(frozen=True, slots=True)
class TensorStats:
    """Of one changed tensor: the Frobenius norm of what was added, and the share of it that survived rounding (1 is
    all of it, measured on a sample of the tiles), None where there was nothing to measure."""

    delta_norm: float
    survived: float | None


class StatsCollector:
    """Collects measurements of tiles from all workers, as bare numbers: a tile in 17 bytes. They are summed in the
    order of the tiles, whoever came first."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._deltas: dict[str, array[float]] = {}
        self._samples: dict[str, dict[int, tuple[float, float]]] = {}
        self._lock = threading.Lock()

    def __call__(self, tensor: str, tile: int, stats: TileStats) -> None:
        """Note what was measured of one tile, or from one tile on; no two workers report the same."""
        with self._lock:
            if tensor not in self._deltas:
                output = self._plan.tensors[tensor]
                self._deltas[tensor] = array("d", bytes(8 * grid_of(output.shape, output.operations).count))
                self._samples[tensor] = {}
            self._deltas[tensor][tile] += stats.delta
            if stats.sampled:
                self._samples[tensor][tile] = (stats.sampled, stats.survived)

    def of(self, tensor: str) -> TensorStats | None:
        """The statistics of a tensor, None if no tile of it was touched."""
        if tensor not in self._deltas:
            return None
        samples = [found for _, found in sorted(self._samples[tensor].items())]
        sampled = sum(delta for delta, _ in samples)
        survived = _shared(sum(left for _, left in samples) / sampled) if sampled else None
        return TensorStats(_shared(sum(self._deltas[tensor]) ** 0.5), survived)


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """Size and block digests of one file of the output."""

    size: int
    blocks: tuple[str, ...]
    sha256: str = ""
    """Where it was asked for."""

    def data(self) -> dict[str, Any]:
        """As it stands in the report."""
        found = {"size": self.size, "digest": file_digest(self.blocks), "blocks": list(self.blocks)}
        return found | ({"sha256": self.sha256} if self.sha256 else {})


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a run or of a verification. `checked` and `rederived` count blocks, `seconds` is wall time,
    `io` how the weights were written."""

    output: Path
    document: Mapping[str, Any]
    status: str = "done"
    seconds: float = 0.0
    checked: int = 0
    rederived: int = 0
    io: str = ""
    notes: Sequence[str] = ()

    @property
    def exit_code(self) -> int:
        """0: what did not succeed is an exception."""
        return 0

    @property
    def changed(self) -> int:
        """How many tensors were changed: those with an effect that is not zero."""
        return sum(entry.get("delta_norm") != 0 for entry in self.document["tensors"].values())

    @property
    def without_effect(self) -> int:
        """How many tensors were targeted by factors that are zero."""
        return len(self.document["tensors"]) - self.changed

    def as_data(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "version": REPORT_VERSION,
            "status": self.status,
            "output": str(self.output),
            "fingerprint": self.document["fingerprint"],
            "changed_tensors": self.changed,
            "written_bytes": sum(item["size"] for item in self.document["files"].values()),
            "io": self.io,
            "seconds": round(self.seconds, 3),
            "blocks_checked": self.checked,
            "blocks_rederived": self.rederived,
            "notes": list(self.notes),
        }


def _shared(value: float) -> float:
    """The digits of a sum that machines agree on; the last ones depend on how a library adds."""
    return float(f"{value:.9g}")


def origin_of(plan: MergePlan) -> dict[str, Any]:
    """What a plan was made from, as reports and unfinished runs say it."""
    return {
        "arithmetic": plan.arithmetic,
        "plan": plan.digest(),
        "base": {"id": plan.base.identity, "digest": plan.base.digest, "files": dict(plan.base.files)},
        "adapters": [
            {"id": item.identity, "digest": item.digest, "weight": item.weight, "ignored": dict(item.ignored)}
            for item in plan.adapters
        ],
        "options": {name: list(value) if isinstance(value, tuple) else value for name, value in plan.options.items()},
    }


def document_of(
    plan: MergePlan,
    fingerprint: str,
    stats: StatsCollector,
    files: Mapping[str, WrittenFile],
    sidecars: Mapping[str, WrittenFile],
) -> dict[str, Any]:
    """`streammerge.json` as a value, its own digest included."""
    document: dict[str, Any] = {
        "streammerge": REPORT_VERSION,
        "fingerprint": fingerprint,
        **origin_of(plan),
        "tensors": {tensor.name: _tensor_data(tensor, stats) for tensor in plan.changed},
        "dropped": dict(plan.dropped),
        "config_edits": [[list(path), value] for path, value in plan.config_edits],
        "files": {name: item.data() for name, item in files.items()},
        "sidecars": {name: item.data() for name, item in sidecars.items()},
        "left_out": dict(plan.left_out),
        "code": list(plan.code),
    }
    return sealed(document)


def _tensor_data(tensor: OutputTensor, stats: StatsCollector) -> dict[str, Any]:
    found = stats.of(tensor.name)
    source = "base" if isinstance(tensor.source, Stored) else f"adapter {tensor.source.adapter}: {tensor.source.key}"
    data: dict[str, Any] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "source": source}
    if isinstance(tensor.source, Stored) and tensor.source.name != tensor.name:
        data["source"] = f"base: {tensor.source.name}"
    data["operations"] = [_operation_data(operation) for operation in tensor.operations]
    if found:
        data["delta_norm"] = found.delta_norm
        data["survived"] = found.survived
    return data


def _operation_data(operation: Operation) -> dict[str, Any]:
    data: dict[str, Any] = {
        "formula": operation.formula,
        "adapter": operation.adapter,
        "module": operation.module,
        "parameter": operation.parameter,
        "rule": operation.rule,
        **operation.numbers,
    }
    if "left" in operation.factors:
        data["rank"] = operation.factors["left"].shape[1]
    if operation.place.view.stack > 1:
        data["expert"] = operation.place.matrix
    if operation.indices:
        data["rows"] = len(operation.indices)
    return data
