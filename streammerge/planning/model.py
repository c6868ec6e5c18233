"""The plan: a frozen value that says, for every byte of the output, where it comes from.

It can be printed, compared and stored; execution, verification and views are functions of it. It holds no path but
those of sidecars, no time and no machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from streammerge.core.lines import Lines
from streammerge.core.tensors import FactorView, MatrixView, Operation, OutputTensor, Place, Replacement, Stored
from streammerge.planning.sidecars import Sidecar
from streammerge.planning.tiles import ARITHMETIC_VERSION

PLAN_VERSION = 2


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """What the plan knows the base by: its id, and digests of its headers, index and config."""

    identity: str
    digest: str
    files: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """What the plan knows an adapter by: its id, the digest of its config and weights, and its weight in the sum."""

    identity: str
    digest: str
    weight: float
    ignored: Mapping[str, str]
    """Adapter keys that are not used, by the rule that lets them go."""


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One weight file of the output: its header bytes, and the absolute offset of each tensor, ascending."""

    file: str
    size: int
    header: bytes
    offsets: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class OperationFacts:
    """What the factors' values say of one operation: the Frobenius norm of its delta, None where they do not tell
    it."""

    norm: float | None
    zero: bool


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run will take: bytes of working memory for `workers` workers, bytes read and written."""

    workers: int
    memory: int
    read: int
    write: int


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything a run does. `config_edits` are (path, value) pairs, `dropped` base tensors by rule, `facts` parallel
    to the operations of each tensor."""

    base: BaseRecord
    adapters: tuple[AdapterRecord, ...]
    options: Mapping[str, Any]
    tensors: Mapping[str, OutputTensor]
    facts: Mapping[str, tuple[OperationFacts, ...]]
    shards: tuple[OutputShard, ...]
    index: bytes | None
    config: bytes | None
    config_edits: tuple[tuple[tuple[str, ...], Any], ...]
    dropped: Mapping[str, str]
    sidecars: tuple[Sidecar, ...]
    left_out: tuple[tuple[str, str], ...]
    code: tuple[str, ...]
    notes: tuple[str, ...]
    figures: Figures
    arithmetic: int = ARITHMETIC_VERSION
    version: int = PLAN_VERSION
    _digest: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def operations(self) -> list[Operation]:
        """Every operation, in the order of the output's tensors."""
        return [operation for tensor in self.tensors.values() for operation in tensor.operations]

    @property
    def changed(self) -> list[OutputTensor]:
        """The tensors that are not plain copies of the base."""
        return [
            tensor for tensor in self.tensors.values() if tensor.operations or isinstance(tensor.source, Replacement)
        ]

    def digest(self) -> str:
        """SHA-256 of everything in the plan that can change a byte of the output. Norms are not in it: they follow from
        the adapter's digest, and their last bits from the machine. Taken once: a large plan takes a second."""
        if not self._digest:
            self._digest.append(self._digested_now())
        return self._digest[0]

    def _digested_now(self) -> str:
        decisive = {name: value for name, value in self._around().items() if name not in ("figures", "notes")}
        decisive["sidecars"] = [(sidecar.name, sidecar.origin) for sidecar in self.sidecars]
        digest = hashlib.sha256(_digested(decisive))
        for tensor in self.tensors.values():  # one by one: together they are many times the size of the plan
            digest.update(_digested(_tensor_data(tensor, ())))
        return digest.hexdigest()

    def as_data(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        tensors = [_tensor_data(tensor, self.facts[name]) for name, tensor in self.tensors.items()]
        return {**self._around(), "tensors": tensors}

    def _around(self) -> dict[str, Any]:
        """Everything but the tensors, as plain JSON values."""
        return {
            "version": self.version,
            "arithmetic": self.arithmetic,
            "base": asdict(self.base),
            "adapters": [asdict(adapter) for adapter in self.adapters],
            "options": dict(self.options),
            "shards": [
                {"file": s.file, "size": s.size, "header": s.header.decode("latin-1"), "offsets": dict(s.offsets)}
                for s in self.shards
            ],
            "index": self.index.decode() if self.index else None,
            "config": self.config.decode() if self.config else None,
            "config_edits": [[list(path), value] for path, value in self.config_edits],
            "dropped": dict(self.dropped),
            "sidecars": [asdict(sidecar) for sidecar in self.sidecars],
            "left_out": [list(pair) for pair in self.left_out],
            "code": list(self.code),
            "notes": list(self.notes),
            "figures": asdict(self.figures),
        }

    def to_json(self) -> str:
        """The plan as one JSON document; `from_json` gives an equal plan back."""
        return json.dumps(self.as_data(), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> MergePlan:
        """A plan that `to_json` wrote. Raises ValueError for a document of another version."""
        data = json.loads(text)
        if data.get("version") != PLAN_VERSION:
            raise ValueError(f"a plan of version {data.get('version')}, this is version {PLAN_VERSION}")
        pairs = [_tensor_of(item) for item in data["tensors"]]
        return cls(
            base=BaseRecord(**data["base"]),
            adapters=tuple(AdapterRecord(**item) for item in data["adapters"]),
            options={
                name: tuple(value) if isinstance(value, list) else value for name, value in data["options"].items()
            },
            tensors={tensor.name: tensor for tensor, _ in pairs},
            facts={tensor.name: facts for tensor, facts in pairs},
            shards=tuple(
                OutputShard(s["file"], s["size"], s["header"].encode("latin-1"), s["offsets"]) for s in data["shards"]
            ),
            index=data["index"].encode() if data["index"] else None,
            config=data["config"].encode() if data["config"] else None,
            config_edits=tuple((tuple(path), value) for path, value in data["config_edits"]),
            dropped=data["dropped"],
            sidecars=tuple(Sidecar(**item) for item in data["sidecars"]),
            left_out=tuple((name, rule) for name, rule in data["left_out"]),
            code=tuple(data["code"]),
            notes=tuple(data["notes"]),
            figures=Figures(**data["figures"]),
            arithmetic=data["arithmetic"],
        )


def _digested(data: Any) -> bytes:
    """Plain values as the bytes a digest is taken of."""
    return json.dumps(data, sort_keys=True, ensure_ascii=False).encode()


def _tensor_data(tensor: OutputTensor, facts: tuple[OperationFacts, ...]) -> dict[str, Any]:
    source = tensor.source
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "source": {"stored": source.name} if isinstance(source, Stored) else _flat(source),
        "operations": [_operation_data(operation) for operation in tensor.operations],
        "facts": [_flat(fact) for fact in facts],
    }


def _operation_data(operation: Operation) -> dict[str, Any]:
    place = operation.place
    region = {"view": _flat(place.view), "rows": _lines_data(place.rows), "cols": _lines_data(place.cols)}
    factors = {
        name: _flat(view) | {"axes": [_lines_data(axis) for axis in view.axes]}
        for name, view in operation.factors.items()
    }
    return _flat(operation) | {
        "place": _flat(place) | region,
        "factors": factors,
        "numbers": dict(operation.numbers),
        "window": [_lines_data(lines) for lines in operation.window or ()],
    }


def _lines_data(lines: Lines) -> list[int]:
    """The fields of `Lines`, as few as say it."""
    data = [lines.start, lines.size, lines.step, lines.count, lines.pitch]
    return data[:2] if lines.adjacent else data


def _flat(value: Any) -> dict[str, Any]:
    """The fields of a slotted dataclass, one level deep: `asdict` copies deeply, which experts by the ten thousand
    would feel."""
    return {name: getattr(value, name) for name in value.__slots__}


def _tensor_of(data: Mapping[str, Any]) -> tuple[OutputTensor, tuple[OperationFacts, ...]]:
    source = data["source"]
    made_of = Stored(source["stored"]) if "stored" in source else Replacement(**source)
    operations = tuple(_operation_of(item) for item in data["operations"])
    facts = tuple(OperationFacts(**item) for item in data["facts"])
    return OutputTensor(data["name"], data["dtype"], tuple(data["shape"]), made_of, operations), facts


def _operation_of(data: Mapping[str, Any]) -> Operation:
    place = dict(data["place"])
    place |= {"view": MatrixView(**place["view"]), "rows": Lines(*place["rows"]), "cols": Lines(*place["cols"])}
    factors = {
        name: FactorView(**{**view, "axes": tuple(Lines(*axis) for axis in view["axes"])})
        for name, view in data["factors"].items()
    }
    window = tuple(Lines(*lines) for lines in data["window"]) or None
    given = {"place": Place(**place), "factors": factors, "indices": tuple(data["indices"]), "window": window}
    return Operation(**{**data, **given})
