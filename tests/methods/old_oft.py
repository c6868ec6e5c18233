"""Files of OFT as PEFT wrote them before 0.18, which today's PEFT does not read or reads otherwise, and what they mean.

Written out from the sources of PEFT 0.13.2, 0.15.2 and 0.17.1, whole matrices at a time.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.oracle.case import Tensors
from tests.oracle.editing import PREFIX, WEIGHTS, Edit, read_config, set_config

TODAY = "oft_R.weight"


def written_by_0_17(adapter: Path) -> None:
    """The config as it was before it named its version."""
    set_config(peft_version=None)(adapter)


def written_by_0_15(outputs: dict[str, int], **fields: object) -> Edit:
    """`oft_r` and `oft_s`, for as many blocks as today's file has; `outputs` of the modules by their names."""
    return _rewritten(lambda count, size, _: (count, size), outputs, **fields)


def written_by_0_13(outputs: dict[str, int], count: int, **fields: object) -> Edit:
    """`oft_r` alone, `count` blocks that cover the outputs."""
    blocks = {name: (count, -(-out // count)) for name, out in outputs.items()}
    return _rewritten(lambda _, __, name: blocks[name], {}, **fields)


def _rewritten(blocks: object, outputs: dict[str, int], **fields: object) -> Edit:
    def edit(adapter: Path) -> None:
        generator = torch.Generator().manual_seed(3)
        tensors = {}
        for key, triangle in load_file(adapter / WEIGHTS).items():
            module = key.removesuffix(f".{TODAY}")
            name = module.rpartition(".")[2]
            size = (1 + math.isqrt(1 + 8 * triangle.shape[1])) // 2
            count, size = blocks(len(triangle), size, name)  # type: ignore[operator]
            count = 1 if fields.get("block_share") else count
            tensors[f"{module}.oft_r"] = 0.3 * torch.randn(count, size, size, generator=generator)
            if name in outputs:
                tensors[f"{module}.oft_s"] = 1 + 0.2 * torch.randn(outputs[name], 1, generator=generator)
        save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
        set_config(peft_version=None, use_cayley_neumann=None, num_cayley_neumann_terms=None, **fields)(adapter)

    return edit


def merged_by_0_17(base: Tensors, adapter: Path) -> Tensors:
    """`W R^T` with `R = I + 2 Q + 2 Q^2 + ...`, every term twice."""
    terms = read_config(adapter)["num_cayley_neumann_terms"]
    expected = dict(base)
    for key, triangles in load_file(adapter / WEIGHTS).items():
        name = f"{key.removeprefix(PREFIX).removesuffix(TODAY)}weight"
        size = (1 + math.isqrt(1 + 8 * triangles.shape[1])) // 2
        blocks = []
        for triangle in triangles.double():
            q = torch.zeros(size, size, dtype=torch.float64)
            q[*torch.triu_indices(size, size, 1)] = triangle
            q = q - q.T
            blocks.append(torch.eye(size) + 2 * sum(torch.linalg.matrix_power(q, n) for n in range(1, terms)))
        expected[name] = base[name] @ torch.block_diag(*blocks).T
    return expected


def merged_by_0_15(base: Tensors, adapter: Path) -> Tensors:
    """`s (W R^T)`, or, without an `oft_s`, `R^T W`."""
    factors = load_file(adapter / WEIGHTS)
    expected = dict(base)
    for key in [key for key in factors if key.endswith("oft_r")]:
        module = key.removesuffix(".oft_r")
        name = f"{module.removeprefix(PREFIX)}.weight"
        weight = base[name].flatten(1)
        scale = factors.get(f"{module}.oft_s")
        across = weight.shape[0 if scale is None else 1]
        blocks = factors[key].double()
        size = blocks.shape[1]
        count = -(-across // size)
        blocks = torch.stack([_constrained(block, len(blocks), count, len(weight), adapter) for block in blocks])
        skew, eye = (blocks - blocks.mT) / 2, torch.eye(size, dtype=torch.float64)
        turns = (eye - skew) @ torch.linalg.inv(eye + skew)
        turn = torch.block_diag(*turns[:count].expand(count, size, size))[:across, :across]
        new = turn.T @ weight if scale is None else (weight @ turn.T) * scale.double()
        expected[name] = new.view(base[name].shape)
    return expected


def _constrained(block: torch.Tensor, saved: int, count: int, outputs: int, adapter: Path) -> torch.Tensor:
    """A block within the radius of `coft`."""
    config = read_config(adapter)
    if not config["coft"]:
        return block
    radius = config["eps"] * math.ceil(outputs / count) ** 2 / math.sqrt(saved)
    return block * min(1.0, radius / float(block.norm()))
