"""Which tensor goes into which output file, and at which byte: headers and index are known before any data.

By default the files, their tensors' order and, while nothing in them changes but values, their header bytes are the
base's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammerge.core.dtypes import BITS
from streammerge.core.errors import CompositionError
from streammerge.core.tensors import OutputTensor
from streammerge.formats.index import encode_index
from streammerge.formats.safetensors import encode_header
from streammerge.planning.model import OutputShard
from streammerge.sources.checkpoint import SAFETENSORS, CheckpointFacts, Shard

FORMAT = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class Layout:
    """The output's weight files in order, and the index if there is one."""

    shards: tuple[OutputShard, ...]
    index: bytes | None


def size_of(output: OutputTensor) -> int:
    """Bytes of an output tensor's data."""
    count = 1
    for size in output.shape:
        count *= size
    return count * BITS[output.dtype] // 8


def lay_out(
    base: CheckpointFacts, outputs: Mapping[str, OutputTensor], sources: Mapping[str, str], limit: int | None
) -> Layout:
    """Files for `outputs`. `sources` maps those that stand for a stored tensor to its name; `limit` is the size to
    re-shard to, None to keep the base's files."""
    homes = _homes(base, outputs, sources)
    groups = (
        _keep(base, homes) if limit is None else _reshard([name for names in homes for name in names], outputs, limit)
    )
    shards = tuple(_shard(file, [outputs[name] for name in names], before) for file, names, before in groups)
    _check_files(shards)
    single = len(shards) == 1 and (base.lone or shards[0].file == SAFETENSORS or (base.index is None and limit is None))
    return Layout(shards, None if single else _index(base, shards, outputs, limit is None and not base.is_torch_bin))


def _homes(base: CheckpointFacts, outputs: Mapping[str, OutputTensor], sources: Mapping[str, str]) -> list[list[str]]:
    """Output names by base shard, in the order of the base's bytes; what is new goes last."""
    by_source: dict[str, list[str]] = {}
    for name in outputs:
        if name in sources:
            by_source.setdefault(sources[name], []).append(name)
    homes = [[name for info in shard.tensors for name in by_source.get(info.name, [])] for shard in base.shards]
    homes[-1] += [name for name in outputs if name not in sources]
    return homes


def _keep(base: CheckpointFacts, homes: list[list[str]]) -> list[tuple[str, list[str], Shard | None]]:
    if not base.is_torch_bin:
        return [
            (shard.file, names, shard)
            for shard, names in zip(base.shards, homes, strict=True)
            if names or not shard.tensors
        ]
    kept = [names for names in homes if names]
    return [(file, names, None) for file, names in zip(_file_names(len(kept)), kept, strict=True)]


def _reshard(
    names: Sequence[str], outputs: Mapping[str, OutputTensor], limit: int
) -> list[tuple[str, list[str], Shard | None]]:
    """Fill files in order up to `limit` bytes of data; a tensor above the limit has a file of its own."""
    groups: list[list[str]] = []
    filled = limit
    for name in names:
        size = size_of(outputs[name])
        if filled + size > limit or not groups:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return [(file, group, None) for file, group in zip(_file_names(len(groups)), groups, strict=True)]


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SAFETENSORS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _shard(file: str, tensors: Sequence[OutputTensor], before: Shard | None) -> OutputShard:
    header = before.header if before else None
    same = header is not None and [(t.name, t.dtype, t.shape) for t in tensors] == [
        (i.name, i.dtype, i.shape) for i in header.tensors
    ]
    if header is not None and same:
        raw = header.raw
    else:
        metadata = FORMAT if header is None else header.metadata or FORMAT
        raw = encode_header([(t.name, t.dtype, t.shape, size_of(t)) for t in tensors], metadata)
    offsets: dict[str, int] = {}
    end = len(raw)
    for tensor in tensors:
        offsets[tensor.name] = end
        end += size_of(tensor)
    return OutputShard(file, end, raw, offsets)


def _check_files(shards: Sequence[OutputShard]) -> None:
    folded: dict[str, str] = {}
    for shard in shards:
        if shard.file.casefold() in folded:
            files = (folded[shard.file.casefold()], shard.file)
            raise CompositionError(
                files,
                "two shards of the base differ only in the case of their names; a file system may take them for one",
            )
        folded[shard.file.casefold()] = shard.file


def _index(
    base: CheckpointFacts, shards: Sequence[OutputShard], outputs: Mapping[str, OutputTensor], same_files: bool
) -> bytes:
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    total = sum(size_of(output) for output in outputs.values())
    metadata = dict(base.index.metadata) if base.index else {}
    unchanged = base.index is not None and same_files and dict(base.index.weight_map) == weight_map
    if not unchanged:
        metadata.pop("total_parameters", None)
    return encode_index(weight_map, total, metadata)
