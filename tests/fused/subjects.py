"""What the tests of fused layouts merge into: tiny models, or files with published names.

Which rows of a fused tensor are which part comes from the models' own code, by way of the cases of the table of
layouts. Invariant: a subject's tensors are views of what `save` writes, so that a change of them is what a merge must
come to, in whichever form it is saved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from scripts.tiny_models import MAPPINGS, cases, class_of
from scripts.tiny_models.shrink import tiny
from streammerge.names.sizes import NAMES
from tests.names import model_splits as own
from tests.names.layout_cases import RENAMED, ROWS, Split, splits
from tests.names.test_layouts import KINDS, layout_of

HOSTS = {
    "decision_transformer": "DecisionTransformerModel",
    "imagegpt": "ImageGPTForCausalImageModeling",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "glm4v_text": "Glm4vForConditionalGeneration",
    "glm_ocr_text": "GlmOcrForConditionalGeneration",
    "glm_image_text": "GlmImageForConditionalGeneration",
    "dia_encoder": "DiaForConditionalGeneration",
    "dia_decoder": "DiaForConditionalGeneration",
    "deepseek_ocr2_text": "DeepseekOcr2ForConditionalGeneration",
    "unlimited_ocr_text": "UnlimitedOcrForConditionalGeneration",
    "glm4v_moe_text": "Glm4vMoeForConditionalGeneration",
    "glm5_next_text": "Glm5NextForConditionalGeneration",
    "qwen3_vl_moe_text": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen3_omni_moe_talker_text": "Qwen3OmniMoeTalkerForConditionalGeneration",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification",
}
"""Model classes that have a part of the type, where no auto mapping of the tiny models leads to one."""
NEEDED: dict[str, dict[str, Any]] = {
    "granitemoeshared": {"shared_intermediate_size": 12},
    "granitemoe_swa": {"shared_intermediate_size": 12},
    "qwen3_omni_moe_talker_text": {"spatial_merge_size": 2},
}
"""Fields without which a tiny model of the type has no fused module of the kind."""
IN_MEMORY = {
    "block_sparse_moe.input_linear": "block_sparse_moe.experts.gate_up_proj",
    "block_sparse_moe.output_linear": "block_sparse_moe.experts.down_proj",
}
"""Rows that go by the published name of what the model calls otherwise."""
LAYER = {"qwen": "", "chatglm": "", "*": ""}
"""What stands before the fused module of remote code: nothing where the row says it."""
ROOTED = ("model.tok_embeddings", "output")
"""Fused modules that are no part of a layer."""


@dataclass(frozen=True)
class FusedModule:
    """One fused parameter: its module `path`, its row, one (out, in) view for each matrix, and the rows of each part
    of a matrix, in the order of the row's parts. `bias` is there if the module has one."""

    path: str
    row: dict[str, Any]
    matrices: tuple[torch.Tensor, ...]
    parts: tuple[list[int], ...]
    bias: torch.Tensor | None = None

    def name(self, part: int, expert: int = 0, spelling: int = 0) -> str:
        """The module path of a part."""
        names = self.row["parts"][spelling % len(self.row["parts"])]
        if "{i}" in self.row["fused"]:
            return names[part].replace("{i}", "1")
        memory = IN_MEMORY.get(self.row["fused"], self.row["fused"])
        return self.path.removesuffix(memory) + names[part].replace("{e}", str(expert))


@dataclass(frozen=True)
class Subject:
    """A base in memory: `tensors` by their names in the model, and the fused ones among them."""

    tensors: dict[str, torch.Tensor]
    fused: tuple[FusedModule, ...]
    config: dict[str, Any]
    model: transformers.PreTrainedModel | None = None

    def save(self, root: Path, *, published: bool = True) -> Path:
        """The checkpoint as the model saves it; else with the names and the stacks of the model in memory."""
        if self.model is not None:
            self.model.save_pretrained(root, save_original_format=published)
            return root
        return write(root, self.tensors, self.config)

    def save_split(self, root: Path) -> Path:
        """The same with every part of a fused module as a module of its own, under the names in memory."""
        tensors = dict(self.tensors)
        for module in self.fused:
            for part, rows in enumerate(module.parts):
                tensors[f"{module.name(part)}.weight"] = module.matrices[0][rows]
                if module.bias is not None:
                    tensors[f"{module.name(part)}.bias"] = module.bias[rows]
            for kind in ("weight", "bias"):
                tensors.pop(f"{module.path}.{kind}", None)
        return write(root, tensors, self.config)


def write(root: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    """A checkpoint of one file."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, root / "model.safetensors", {"format": "pt"})
    return root


# --- which subjects there are -----------------------------------------------------------------------------------------
def subjects() -> Iterator[tuple[str, Callable[..., Subject]]]:
    """(name, maker) of one subject for every row, model type and case of it; rows of stacked experts share one."""
    known: dict[tuple[str, str], list[Split]] = {}
    for key, split in splits():
        known.setdefault(key, []).append(cache(split))
    stacks: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for number, row in enumerate(ROWS):
        for name in row["types"]:
            if "experts" in row:
                earlier = [other["fused"] for (kind, _), rows in stacks.items() for other in rows if kind == name]
                again = earlier.count(row["fused"])
                stacks.setdefault((name, again), []).append(row)
                continue
            made = _remote if name == "*" or not _buildable(name) else cut
            for count, split in enumerate(known[name, row["fused"]] if "sizes" in row else [None]):
                if split is None or layout_of(row, name, split()[0]):
                    yield f"{name}-{row['fused']}-{number}-{count}", partial(made, name, row, split)
    for (name, again), rows in stacks.items():
        yield f"{name}-experts-{again}", partial(stacked, name, rows)


def _buildable(model_type: str) -> bool:
    return model_type in HOSTS or any(model_type == name for _, name in cases())


def _model(model_type: str, fields: dict[str, Any], dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The tiny model with parts of this type, every parameter random."""
    if model_type in HOSTS:
        cls = getattr(transformers, HOSTS[model_type])
    else:
        cls = class_of(model_type, next(mapping for mapping in MAPPINGS if (mapping, model_type) in cases()))
    model = cls._from_config(tiny(cls.config_class, NEEDED.get(model_type, {}) | fields), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(0, 0.2, generator=generator)
    return model


def _of_model(model: transformers.PreTrainedModel, found: list[FusedModule]) -> Subject:
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    return Subject(tensors, tuple(found), config, model)


def _found(model: transformers.PreTrainedModel, row: dict[str, Any]) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """(path, the module it is or is in, the fused tensor) of a row in a model."""
    wanted = "." + IN_MEMORY.get(row["fused"], row["fused"])
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight")
        if f".{path}".endswith(wanted):
            yield path, modules.get(path) or modules[path.rpartition(".")[0]], parameter.data


# --- modules that are cut by rows -------------------------------------------------------------------------------------
def cut(model_type: str, row: dict[str, Any], split: Split, dtype: torch.dtype = torch.float32) -> Subject:
    """The tiny model of the sizes for which its own code has said where it splits."""
    config, total, parts = split()
    letters = set(re.findall("[A-Za-z]+", " ".join((row.get("groups", ""), *row["sizes"]))))
    shares = "T" in letters
    letters |= {"hid", "H"} if letters & {"D", "KV"} else set()
    wanted = [name.split(".")[0] for letter in letters & NAMES.keys() for name in NAMES[letter]]
    fields = {} if shares else {name: config[name] for name in (*wanted, *row.get("when", ())) if name in config}
    model = _model(model_type, fields, dtype)
    found = []
    for path, module, weight in _found(model, row):
        matrix = weight.T if isinstance(module, Conv1D) else weight
        rows = _in_order(row, parts, total, len(matrix) if shares else total)
        bias = module.bias.data if module.bias is not None else None
        found.append(FusedModule(path, row, (matrix,), rows, bias))
        assert sum(map(len, rows)) == len(matrix), f"{path} has {len(matrix)} rows, the case {total}"
    assert found, f"no {row['fused']} in the tiny {model_type}"
    return _of_model(model, found)


def _in_order(row: dict[str, Any], parts: dict[str, list[int]], total: int, length: int) -> tuple[list[int], ...]:
    """The rows of each part in the order of the row's names, for another length: shares of it stay the shares."""
    kinds = [KINDS[name.rpartition(".")[2]] for name in row["parts"][0]]
    assert sorted(kinds) == sorted(parts)
    return tuple(_stretched(parts[kind], total, length) for kind in kinds)


def _stretched(rows: list[int], total: int, length: int) -> list[int]:
    if total == length:
        return rows
    step = rows[1] - rows[0]
    if step > 1:
        assert rows == list(range(rows[0], total, step))
        return list(range(rows[0], length, step))
    assert rows == list(range(rows[0], rows[0] + len(rows)))
    first, last = rows[0] * length // total, (rows[-1] + 1) * length // total
    return list(range(first, last))


# --- stacked experts --------------------------------------------------------------------------------------------------
def stacked(model_type: str, rows: list[dict[str, Any]], dtype: torch.dtype = torch.float32, **fields: Any) -> Subject:
    """The tiny model with stacked experts, which are cut as their class computes with them."""
    model = _model(model_type, fields, dtype)
    found = []
    for row in rows:
        for path, module, weight in _found(model, row):
            if row["experts"] == "rows":
                matrices = _dbrx(weight, model.config, path)
                parts: tuple[list[int], ...] = (list(range(len(matrices[0]))),)
            else:
                total, cut, transposed = own.experts(type(module))
                matrices = tuple(matrix.T if transposed else matrix for matrix in weight)
                length = len(matrices[0])
                parts = _in_order(row, cut, total, length) if "sizes" in row else (list(range(length)),)
            found.append(FusedModule(path, row, matrices, parts))
    assert {module.row["fused"] for module in found} == {row["fused"] for row in rows}
    return _of_model(model, found)


def _dbrx(weight: torch.Tensor, config: Any, path: str) -> tuple[torch.Tensor, ...]:
    """As DbrxExperts views its three weights and DbrxExpertGLU multiplies: by w2, and by the others transposed."""
    experts = weight.view(config.ffn_config.moe_num_experts, config.ffn_config.ffn_hidden_size, config.hidden_size)
    return tuple(matrix.T if path.endswith("w2") else matrix for matrix in experts)


# --- remote code ------------------------------------------------------------------------------------------------------
def _remote(model_type: str, row: dict[str, Any], split: Split | None, dtype: torch.dtype = torch.float32) -> Subject:
    """A file with the published names; other tensors stand beside the fused one."""
    config, total, parts = split() if split else ({}, 24, {})
    path = LAYER.get(model_type, "model.layers.1.") if row["fused"] not in ROOTED else ""
    path += row["fused"].replace("{i}", "1")
    generator = torch.Generator().manual_seed(1)
    shapes = ((total, 32), (total,), (32, 32))
    weight, bias, other = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    rows = _in_order(row, parts, total, total) if parts else (list(range(total)),)
    tensors = {f"{path}.weight": weight, f"{path}.bias": bias, "another.weight": other}
    assert parts or RENAMED[row["fused"]] == row["parts"][0][0]
    module = FusedModule(path, row, (weight,), rows, bias)
    named = {} if model_type == "*" else {"model_type": model_type}
    return Subject(tensors, (module,), {k: v for k, v in config.items() if k != "model_type"} | named)


MAKERS: dict[str, Callable[..., Subject]] = dict(subjects())
"""Every subject by its name."""


def named(start: str) -> Callable[..., Subject]:
    """The maker of the first subject whose name starts so."""
    return next(made for name, made in MAKERS.items() if name.startswith(start))
