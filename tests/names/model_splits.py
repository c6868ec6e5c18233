"""What transformers' own modules do with the output of a fused projection, asked by running them.

Every fused module is made to put out the numbers of its rows; what arrives as query, key and value is then a list of
rows. Gate and up are told apart by the curvature of the product: it is linear in up alone.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Case = tuple[int, dict[str, list[int]]]
"""The length of a fused axis, and the rows of each part by its letter."""


class Seen(Exception):
    """Raised where query, key and value arrive, to end the forward pass."""


def _see(*tensors: Any) -> Any:
    raise Seen(*tensors)


def _see_attention(module: nn.Module, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    raise Seen(query, key, value)


ALL_ATTENTION_FUNCTIONS.register("row_numbers", _see_attention)


def rows(tensor: torch.Tensor) -> list[int]:
    """Row numbers in the order of heads and dimensions; heads that are repeated count once."""
    return list(dict.fromkeys(int(value) for value in tensor.reshape(-1)))


def modeling(model_type: str) -> Any:
    """The modeling module of a model type."""
    package, _, leaf = CONFIG_MAPPING[model_type].__module__.rpartition(".")
    return importlib.import_module(f"{package}.{leaf.replace('configuration', 'modeling')}")


class _Split(TorchFunctionMode):
    """Ends the run at the first operation that makes `count` tensors of one that has `total` elements."""

    def __init__(self, count: int, total: int) -> None:
        super().__init__()
        self.count, self.total = count, total

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the result of every operation."""
        result = func(*args, **(kwargs or {}))
        several = isinstance(result, tuple | list) and len(result) == self.count
        if several and sum(part.numel() for part in result if isinstance(part, torch.Tensor)) == self.total:
            raise Seen(*result)
        return result


def run(module: nn.Module, leaf: str, *, method: str | None = None, split: str = "", **given: Any) -> Case:
    """(length of the fused axis, rows of each part): `module` run on one token of zeros.

    What is looked for arrives at the attention function, at `method`, or, with the letters `split`, leaves the first
    operation that makes so many tensors of the fused one.
    """
    module = module.float().eval()
    fused = getattr(module, leaf)
    total = fused.weight.shape[1] if type(fused).__name__ == "Conv1D" else fused.weight.shape[0]
    fused.forward = lambda hidden: numbers(total)[0, 0].expand(*hidden.shape[:-1], total)
    if method is not None:
        setattr(module, method, _see)
    wanted = inspect.signature(module.forward).parameters
    try:
        with torch.no_grad(), _Split(len(split), total):
            module(**{name: value for name, value in given.items() if name in wanted})
    except Seen as seen:
        return total, dict(zip(split or "qkv", map(rows, seen.args), strict=False))
    raise AssertionError(f"{type(module).__name__} did not split")


def numbers(total: int) -> torch.Tensor:
    """What a fused module puts out for one token here: the numbers of its rows."""
    return torch.arange(total, dtype=torch.float32).expand(1, 1, total)


def config_of(model_type: str, **fields: Any) -> Any:
    """A small config whose attention only looks at its arguments."""
    config = AutoConfig.for_model(model_type, **fields)
    config._attn_implementation = "row_numbers"
    return config


def built(model_type: str, cls: str, config: Any) -> nn.Module:
    """A module of a model type's own class."""
    kind = getattr(modeling(model_type), cls)
    known = {"config": config, "layer_idx": 0, "layer_id": 0, "nx": 32, "n_positions": 4}
    wanted = inspect.signature(kind.__init__).parameters
    module: nn.Module = kind(**{name: value for name, value in known.items() if name in wanted})
    return module


def attention(model_type: str, cls: str, leaf: str, fields: dict[str, Any], dim: int = 8, **how: Any) -> Any:
    """(config.json, length, rows of each part) of the attention class of a model type; `dim` features are rotated."""
    config = config_of(model_type, **fields)
    hidden = torch.zeros(1, 1, config.hidden_size)
    module = built(model_type, cls, config)
    if "act_fn" in how:
        module.act_fn = how.pop("act_fn")
    given = {
        "hidden_states": hidden,
        "x": hidden,
        "attention_mask": None,
        "position_ids": torch.zeros(1, 1, dtype=torch.int64),
        "position_embeddings": (torch.ones(1, 1, dim), torch.zeros(1, 1, dim)),
        "position_bias": None,
    }
    return config.to_dict(), *run(module, leaf, **how, **given)


@functools.cache
def classes(model_type: str, *names: str) -> list[type[nn.Module]]:
    """The classes of a model type's modeling module whose constructor uses all of `names`."""
    module, found = modeling(model_type), []
    for _, kind in inspect.getmembers(module, inspect.isclass):
        if kind.__module__ == module.__name__ and issubclass(kind, nn.Module) and "__init__" in vars(kind):
            code = inspect.unwrap(kind.__init__).__code__
            found += [kind] if {*names} <= {*code.co_names} else []
    return found


def vision(model_type: str) -> Any:
    """The same for the vision tower of a composite model, whose attention has a `qkv`."""
    config = AutoConfig.for_model(model_type)
    (kind,) = classes(model_type, "qkv", "Linear")
    attn = kind(config.vision_config)
    given = {"hidden_states": torch.zeros(1, attn.qkv.in_features), "cu_seqlens": None}
    return config.to_dict(), *run(attn, "qkv", split="qkv", **given)


# --- gates ------------------------------------------------------------------------------------------------------------
class Fields:
    """A config that answers whatever the constructor of an MLP or of experts asks for."""

    hidden_size = 3
    hidden_act = "silu"
    zero_expert_num = 0
    hybrid_layer_ids = (0,)
    adapter_rank = num_mem_blocks = 1
    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        """A value by the kind of the name."""
        if "intermediate" in name or "ffn" in name:
            return 3
        if "experts" in name:
            return 2
        if "act" in name:
            return "silu"
        if "limit" in name or "alpha" in name:
            return 2.0
        if "bias" in name or "dropout" in name:
            return 0
        raise AttributeError(name)


def gate_and_up(product: Any, total: int) -> dict[str, list[int]]:
    """Rows of gate and of up of a function from the fused output (total,) to its gated product (total / 2,).

    Each feature depends on two rows; it is linear in one of them, up.
    """
    at = torch.linspace(0.1, 0.4, total, dtype=torch.float64)
    gate, up = [], []
    with torch.no_grad():
        here = product(at)
        steps = [(product(at + step) - here, product(at + 2 * step) - here) for step in 0.1 * torch.eye(total).double()]
    for feature in range(total // 2):
        used = [row for row in range(total) if steps[row][0][feature].abs() > 1e-5]
        curved = [row for row in used if (steps[row][1] - 2 * steps[row][0])[feature].abs() > 1e-5]
        assert (len(used), len(curved)) == (2, 1)
        gate += curved
        up += [row for row in used if row not in curved]
    return {"gate": gate, "up": up}


def mlp(module: nn.Module, fused: str, down: str, *more: Any) -> Case:
    """(length, rows of gate and up) of an MLP whose hidden and intermediate sizes are the same."""
    module = module.double().eval()
    own = dict(module.named_parameters())
    total, width = own[f"{fused}.weight"].shape
    fixed = {name: torch.zeros_like(value) for name, value in own.items()}
    fixed |= {f"{down}.weight": torch.eye(width, dtype=torch.float64)}
    token = torch.eye(1, width, dtype=torch.float64)

    def product(values: torch.Tensor) -> torch.Tensor:
        weight = nn.functional.pad(values[:, None], (0, width - 1))
        return functional_call(module, fixed | {f"{fused}.weight": weight}, (token, *more))[0]

    return total, gate_and_up(product, total)


@functools.cache
def experts(kind: type[nn.Module], expert: int = 1) -> tuple[int, dict[str, list[int]], bool]:
    """(length, rows of gate and up, whether matrices lie (in, out)) of one expert of a class of stacked experts."""
    shapes = kind(_Uneven()).gate_up_proj.shape[1:], kind(_Uneven()).down_proj.shape[1:]
    transposed = {((3, 10), (5, 3)): True, ((10, 3), (3, 5)): False}[tuple(map(tuple, shapes))]
    module = kind(Fields()).double().eval()
    fixed = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    fixed["down_proj"] = torch.zeros_like(fixed["down_proj"])
    fixed["down_proj"][expert] = torch.eye(3, dtype=torch.float64)
    token, total = torch.eye(1, 3, dtype=torch.float64), 6
    tokens = token.repeat(2, 1)
    routed = (torch.tensor([[expert, 0], [expert, 0]]), torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64))

    def product(values: torch.Tensor) -> torch.Tensor:
        weight = nn.functional.pad(values[:, None], (0, 2))
        weight = weight.T if transposed else weight
        count = fixed["gate_up_proj"].shape[0]
        stacked = torch.stack([weight if e == expert else torch.zeros_like(weight) for e in range(count)])
        arguments = (tokens,) if kind.__name__ == "Llama4TextExperts" else (tokens, *routed)
        return functional_call(module, fixed | {"gate_up_proj": stacked}, arguments)[-1]

    return total, gate_and_up(product, total), transposed


class _Uneven(Fields):
    """Another intermediate size than the hidden one, to see which way matrices lie."""

    def __getattr__(self, name: str) -> Any:
        """Five where `Fields` says three."""
        return 5 if "intermediate" in name or "ffn" in name else super().__getattr__(name)


def expert_classes(model_type: str) -> list[type[nn.Module]]:
    """The classes of stacked experts in the modeling module of a model type."""
    return classes(model_type, "gate_up_proj", "Parameter")
