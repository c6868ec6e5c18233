"""Making the files of a case, once each: bases, adapters, what PEFT makes of them, and what streammerge does.

Nothing here knows a feature of LoRA. Files live in one directory of the session; keys are case, dtype and layout.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

import streammerge
from tests.factories import MODULES, build, load, load_tensors, make_adapter, write_base
from tests.oracle.case import Case, Oracle, Tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Workbench:
    """The session's files; every method makes its files on the first call and remembers the answer."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[tuple[object, ...], Any] = {}

    def _once(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def directory(self, *names: str) -> Path:
        """A new path for files; its parent exists."""
        path = self.root.joinpath(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def base(self, kind: str, dtype: str, layout: str = "single") -> Path:
        """The checkpoint of a kind, as BASE."""
        where = self.directory("bases", f"{kind}-{dtype}-{layout}")
        return self._once(("base", where), lambda: write_base(build(kind, DTYPES[dtype]), where, layout))

    def model(self, case: Case, dtype: str, compute: str) -> nn.Module:
        """The model of a case without its adapter: the base stored in `dtype`, loaded in `compute`."""
        path = self.base(case.base, dtype)
        loader = case.trained_on or (lambda path, dtype: load(case.base, path, dtype))
        model = loader(path, DTYPES[compute])
        if case.prepare:
            case.prepare(model)
        return model

    def adapter(self, case: Case, dtype: str) -> Path:
        """The directory with the adapter as streammerge gets it; `saved` beside it is PEFT's own."""
        return self._once(("adapter", case.name, dtype), lambda: self._train(case, dtype))

    def saved(self, case: Case, dtype: str) -> Path:
        """The adapter as PEFT saved it, or as edited where PEFT is to read that."""
        given = self.adapter(case, dtype)
        return given if case.peft_reads_edit else given.parent / "saved"

    def _train(self, case: Case, dtype: str) -> Path:
        where = self.directory("adapters", f"{case.name}-{dtype}", "saved")
        adapted = make_adapter(self.model(case, dtype, dtype), case.peft, **case.arguments)
        if case.train:
            case.train(adapted)
        save = case.save(adapted, where.parent) if callable(case.save) else case.save
        adapted.save_pretrained(where, **save)
        given = where.parent / "given"
        shutil.copytree(where, given)
        if case.edit:
            case.edit(given)
        return given

    def adapted(self, case: Case, dtype: str, compute: str = "") -> PeftModel:
        """The model with its adapter active, as PEFT loads it."""
        model = self.model(case, dtype, compute or dtype)
        return PeftModel.from_pretrained(model, self.saved(case, dtype)).eval()

    def reference(self, case: Case, dtype: str, compute: str = "") -> Tensors:
        """The expected tensors by name: of a base stored in `dtype`, merged by PEFT in `compute`."""
        compute = compute or dtype
        return self._once(("reference", case.name, dtype, compute), lambda: self._reference(case, dtype, compute))

    def _reference(self, case: Case, dtype: str, compute: str) -> Tensors:
        if case.formula:
            wide = {name: tensor.double() for name, tensor in load_tensors(self.base(case.base, dtype)).items()}
            return case.formula(wide, self.saved(case, dtype))
        loaded_in = dtype if case.draws_by_dtype else compute
        model, config = self.model(case, dtype, loaded_in), PeftConfig.from_pretrained(self.saved(case, dtype))
        if case.oracle is Oracle.UNTIED:
            untie(model, config)  # type: ignore[arg-type]
        adapted = PeftModel.from_pretrained(model, self.saved(case, dtype), config=config)
        if loaded_in != compute:
            adapted.to(DTYPES[compute])
        merged = adapted.merge_and_unload()
        tensors = self._stored(merged, case, f"{case.name}-{dtype}-{compute}")
        rename = case.rename or (lambda name: name)
        return {new: tensor for name, tensor in tensors.items() if (new := rename(name)) is not None}

    def _stored(self, merged: nn.Module, case: Case, name: str) -> Tensors:
        """The tensors of a merged model under the names and in the forms that saving gives them."""
        if case.base in MODULES:
            return dict(merged.state_dict())
        where = self.directory("references", name)
        merged.save_pretrained(where)
        return load_tensors(where)

    def output(self, case: Case, dtype: str, layout: str = "single", **options: Any) -> Path:
        """streammerge's output directory, verified in full."""
        label = "-".join(str(value) for value in options.values())
        where = self.directory("outputs", f"{case.name}-{dtype}-{layout}-{label}")
        return self._once(("output", where), lambda: self._merge(case, dtype, layout, where, options))

    def _merge(self, case: Case, dtype: str, layout: str, where: Path, options: dict[str, Any]) -> Path:
        base = self.base(case.base, dtype, layout)
        streammerge.merge(base, self.adapter(case, dtype), where, verify=False, **case.options, **options)
        streammerge.verify(where, full=True)
        return where


def untie(model: nn.Module, config: LoraConfig) -> None:
    """Give the output embedding tensors of its own, and an adapter that ensures the tie one factor pair for each."""
    head = model.get_output_embeddings()
    for name, parameter in list(head.named_parameters()):
        setattr(head, name, nn.Parameter(parameter.detach().clone()))
    model.config.tie_word_embeddings = False
    if config.ensure_weight_tying and "embed_tokens" in config.target_modules:
        config.target_modules |= {"lm_head"}
        config.ensure_weight_tying = False
