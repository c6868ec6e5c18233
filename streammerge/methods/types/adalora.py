"""AdaLoRA: `W + c * B @ diag(E) @ A`, a LoRA whose ranks were pruned in training (Zhang et al. 2023, arXiv:2303.10512).

The divisor is `init_r + 1e-5`, whatever ranks are left: those in the file are trimmed already. c is `lora_alpha` over
that, or the module's rank over it where `lora_alpha` is not positive (PEFT 0.13 to 0.21.2, `tuners/adalora/layer.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from streammerge.methods import fields
from streammerge.methods.fields import Known
from streammerge.methods.lowrank import LowRank
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors

EPSILON = 1e-5


class AdaLora(Method):
    """Factors: `lora_A` (r, in), `lora_B` (out, r), `lora_E` (r, 1)."""

    title = "AdaLoRA"
    paper = "arXiv:2303.10512"
    only = "lora"
    known = Known(
        read=frozenset({"init_r", "lora_alpha"}),
        # Which ranks are left, the file's shapes say; the rest steered the pruning.
        no_consequence=frozenset(
            {
                "r", "rank_pattern", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
                "total_step", "lora_dropout", "init_lora_weights", "alpha_pattern", "use_rslora", "loftq_config",
                "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size",
            }
        ),
        neutral=MappingProxyType({"use_dora": "AdaLoRA has no magnitude", "lora_bias": "AdaLoRA has no `lora_bias`"}),
    )  # fmt: skip
    modules = (slots("lora_A lora_B lora_E"),)
    formulas = MappingProxyType({"adalora": LowRank("W + c * B @ diag(E) @ A", ("left", "right", "middle"))})
    layers = "Linear, Conv1D, Conv2d"
    local = "the same elements"

    def shape(self, module: ModuleFactors) -> tuple[int, int]:
        """(out, in)."""
        return module.slots["lora_B"].shape[0], module.slots["lora_A"].shape[1]

    def effects(self, module: Module) -> Iterator[Effect]:
        """One product with a diagonal in it."""
        left, right, middle = module.matrix("lora_B"), module.matrix("lora_A"), module.vector("lora_E")
        if not left.shape[1] == right.shape[0] == middle.shape[0]:
            raise module.mismatch("the ranks of `lora_A`, `lora_B` and `lora_E` differ")
        alpha = fields.number(module.config, "lora_alpha", 8)
        initial = fields.number(module.config, "init_r", 12, whole=True)
        scaling = (alpha if alpha > 0 else left.shape[1]) / (initial + EPSILON)
        yield module.product("adalora", left, right, scaling, vectors={"middle": middle})
