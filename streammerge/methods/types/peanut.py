"""PEANuT: a small network that looks at the weight says what to add (Zhong et al. 2024, arXiv:2410.01870).

`h = f(A @ W)`, then the encoders, `h = f(E @ h)`, each of whose inputs is remembered, and the decoders, `h = f(D @ h)`
plus what the encoder of the same level was given; `W' = W + scaling * B @ h` (PEFT `tuners/peanut/layer.py`, 0.21). The
network works on each input of the layer by itself: a column of W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.errors import NotMergeableError
from streammerge.core.tensors import Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors
from streammerge.methods.blockwise import whole
from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.probing import Probing
from streammerge.names.pieces import Sizes

if TYPE_CHECKING:
    from torch import Tensor

TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")
"""Spellings of one function, which differ in the tenth digit of a constant."""


def activations() -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Functions by the names that transformers gives them (`activations.py`); those with parameters are not here."""
    from torch.nn import functional

    return {
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x).square(),
        "relu6": functional.relu6,
        "leaky_relu": functional.leaky_relu,
        "gelu": functional.gelu,
        "gelu_python": functional.gelu,
        "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
        "silu": functional.silu,
        "swish": functional.silu,
        "hardswish": functional.hardswish,
        "mish": functional.mish,
        "tanh": lambda x: x.tanh(),
        "sigmoid": lambda x: x.sigmoid(),
        "linear": lambda x: x,
        **dict.fromkeys(TANH_GELUS, lambda x: functional.gelu(x, approximate="tanh")),
    }


ACTIVATIONS = (
    "relu", "relu2", "relu6", "leaky_relu", "gelu", "gelu_python", "quick_gelu", "silu", "swish", "hardswish", "mish",
    "tanh", "sigmoid", "linear", *TANH_GELUS,
)  # fmt: skip
"""The names in `activations`, which a config is checked against before torch is there."""


class Network(Probing):
    """Factors: `A` (K, O), `B` (O, K), `E0`, `D0`, ... (K, K); numbers: `activation`, which of ACTIVATIONS, `depth`,
    and `scaling`."""

    title = "W + scaling * B @ network(A @ W)"
    zero_if = ("B",)

    def rank(self, operation: Operation) -> int:
        """That of A."""
        return operation.factors["A"].shape[0]

    def probe(self, operation: Operation, factors: Factors) -> Tensor:
        """A, transposed."""
        return whole(operation, "A", factors).T

    def spread(self, operation: Operation, factors: Factors) -> Tensor:
        """B."""
        return whole(operation, "B", factors)

    def answer(self, operation: Operation, probed_KI: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """What the network makes of `A @ W`, scaled."""
        function = activations()[ACTIVATIONS[int(operation.numbers["activation"])]]
        depth = int(operation.numbers["depth"])
        hidden_KI, given = function(probed_KI), []
        for level in range(depth):
            given.append(hidden_KI)
            hidden_KI = function(whole(operation, f"E{level}", factors) @ hidden_KI)
        for level in range(depth):
            hidden_KI = function(whole(operation, f"D{level}", factors) @ hidden_KI) + given.pop()
        return hidden_KI * operation.numbers["scaling"]


class Peanut(Method):
    """Factors: `peanut_A` (r, out), `peanut_B` (out, r), and for each level `peanut_encoders.N` and
    `peanut_decoders.N` (r, r)."""

    title = "PEANuT"
    paper = "arXiv:2410.01870"
    only = "peanut"
    known = Known(read=frozenset({"depth", "act_fn", "scaling"}), no_consequence=frozenset({"r", "init_weights"}))
    modules = (slots("peanut_A peanut_B"), slots("peanut_A peanut_B peanut_encoders peanut_decoders"))
    formulas = MappingProxyType({"peanut": Network()})
    layers = "Linear"
    local = "whole columns, two passes"
    refuses = "activations with parameters of their own; weights whose outputs are stored in several tensors"

    def shape(self, module: ModuleFactors) -> Sizes:
        """(out, in), the former from the factors."""
        return module.slots["peanut_B"].shape[0], None

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one update."""
        first, last = module.matrix("peanut_A"), module.matrix("peanut_B")
        rank, out = first.shape
        if last.shape != (out, rank):
            raise module.mismatch(f"`peanut_A` has shape {[rank, out]}, `peanut_B` {list(last.shape)}")
        factors = {"A": first, "B": last}
        depth = int(fields.number(module.config, "depth", 0))
        levels = {"E": "peanut_encoders", "D": "peanut_decoders"}
        there = {slot for slot in module.factors.slots if slot.startswith(tuple(levels.values()))}
        if there != {f"{name}.{level}" for name in levels.values() for level in range(depth)}:
            raise module.mismatch(f"it has the levels {', '.join(sorted(there)) or 'none'}, the config says {depth}")
        for letter, name in levels.items():
            for level in range(depth):
                factors[f"{letter}{level}"] = view = module.matrix(f"{name}.{level}")
                if view.shape != (rank, rank):
                    raise module.mismatch(f"`{name}.{level}` has shape {list(view.shape)}")
        numbers = {
            "activation": float(_activation(module)),
            "depth": float(depth),
            "scaling": float(fields.number(module.config, "scaling", 1.0)),
        }
        yield module.change("peanut", factors, numbers, transposed=module.transposed(out))


def _activation(module: Module) -> int:
    """Which of ACTIVATIONS. Raises NotMergeableError for another one."""
    name = module.config.get("act_fn", "relu")
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise NotMergeableError((f"act_fn = {name}",), f"the activation is none of {known}")
    return ACTIVATIONS.index(name)
