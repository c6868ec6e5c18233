"""LoRA on stacked experts and other bare parameters (PEFT `target_parameters`, its ParamWrapper).

The key does not name the parameter: wrappers nest in the order in which the module registers its parameters, the first
one innermost. A holds its rows expert by expert, B its columns rank by rank. Which way round the factors lie changed
with PEFT 0.19.0 and 0.19.1; the shapes tell, except for square experts.
"""

from __future__ import annotations

from collections.abc import Iterator

from streammerge.core.errors import NotMergeableError, ShapeMismatchError
from streammerge.core.tensors import FactorView, Place, TensorInfo
from streammerge.methods.lora_config import LoraConfig
from streammerge.methods.parts import ModuleFactors
from streammerge.names.architectures import Architecture

REGISTRATION_ORDER = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias")
"""Of every experts module in transformers 5.23; used where the architecture's own order is not known."""


def parameter_of(module: ModuleFactors, config: LoraConfig, architecture: Architecture | None) -> str | None:
    """The parameter these factors belong to, or None if the module is not one of `target_parameters`."""
    names = [name.rpartition(".")[2] for name in config.target_parameters if _is_in(name, module.module)]
    if not names:
        return None
    order = [*(architecture.expert_params if architecture else ()), *REGISTRATION_ORDER]
    if len(names) > 1 and not set(names) <= set(order):
        raise NotMergeableError(
            tuple(names), f"the order in which `{module.module}` registers its parameters is not known"
        )
    ranked = sorted(dict.fromkeys(names), key=lambda name: order.index(name) if name in order else 0)
    position = len(ranked) - 1 - module.depth
    if position < 0:
        keys = tuple(info.name for info in module.slots.values())
        raise NotMergeableError(
            keys, f"wrapper depth {module.depth}, but the config targets {len(ranked)} parameters of `{module.module}`"
        )
    return ranked[position]


def _is_in(target: str, module: str) -> bool:
    path = target.rpartition(".")[0]
    return not path or module == path or module.endswith(f".{path}")


def expert_operations(
    info: TensorInfo,
    factors: tuple[TensorInfo, TensorInfo],
    adapter: int,
    config: LoraConfig,
    architecture: Architecture | None,
) -> Iterator[tuple[Place, FactorView, FactorView]]:
    """Place, left and right factor of each expert of a tensor (E, rows, cols), from A (E x r, a) and B (b, r x E)."""
    a, b = factors
    experts, rows, cols = info.shape
    rank = a.shape[0] // experts
    fits = len(b.shape) == 2 and a.shape[0] == rank * experts == b.shape[1]
    forms = {(cols, rows): False, (rows, cols): True}
    if not fits or (a.shape[1], b.shape[0]) not in forms:
        reason = f"A {list(a.shape)} and B {list(b.shape)} do not fit the experts `{info.name}` {list(info.shape)}"
        raise ShapeMismatchError((a.name, b.name), reason)
    transposed = _square_is_transposed(info, config, architecture) if rows == cols else forms[a.shape[1], b.shape[0]]
    for e in range(experts):
        a_KI = FactorView(adapter, a.name, a.dtype, a.count, (rank, a.shape[1]), (a.shape[1], 1), e * rank * a.shape[1])
        b_OK = FactorView(adapter, b.name, b.dtype, b.count, (b.shape[0], rank), (rank * experts, experts), e)
        place = Place.expert(info, e, transposed=transposed)
        yield (place, a_KI.t, b_OK.t) if transposed else (place, b_OK, a_KI)


def _square_is_transposed(info: TensorInfo, config: LoraConfig, architecture: Architecture | None) -> bool:
    """Whether the delta of square experts is `(B @ A)` transposed: always up to PEFT 0.18, then by the module's own
    `is_transposed`, whose sense 0.19.1 reversed. A config without a version is older than 0.18."""
    version = config.peft_version or (0, 17, 0)
    if version < (0, 19, 0):
        return True
    if architecture is None:
        reason = f"the experts `{info.name}` are square: which way their factors lie depends on an unknown architecture"
        raise NotMergeableError((info.name,), reason)
    return architecture.experts_transposed if version >= (0, 19, 1) else not architecture.experts_transposed
