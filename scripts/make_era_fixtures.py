"""Writes tests/data/eras: adapters of tiny models, as transformers and PEFT of several years save and merge them.

Each run writes one era with the releases it runs under, and refuses any others. Eras are named TRANSFORMERS-PEFT:
    4.51-0.15.2    pip install torch==2.13.0 transformers==4.51.3 peft==0.15.2 pillow
    4.57-PEFT      pip install torch==2.13.0 transformers==4.57.6 peft==PEFT pillow, for 0.17.1, 0.19.1
    5.23-PEFT      pip install torch==2.13.0 transformers==5.23.0 peft==PEFT pillow, for 0.18.1, 0.19.0, 0.19.1, 0.21.2
Run oldest first: python scripts/make_era_fixtures.py ERA [CASE ...]. A case's first era draws the base, later ones
load it. The same values come out again; the order of lists in adapter_config.json does only for one PYTHONHASHSEED.
The invariant: `merged.safetensors` is that era's own merge, and its forward pass is the adapter's.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from era_models import ERAS, MODELS, Model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

TARGET = Path(__file__).parents[1] / "tests" / "data" / "eras"
WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


def check_releases(era: str) -> None:
    """Exit unless the installed transformers and PEFT are the era's."""
    installed = f"{'.'.join(transformers.__version__.split('.')[:2])}-{peft.__version__}"
    if era not in ERAS or installed != era:
        raise SystemExit(f"the era {era} cannot be written under {installed}; eras: {', '.join(ERAS)}")


def base_name(era: str) -> str:
    """The directory of an era's base: eras of one transformers release share it."""
    return f"base-{era.partition('-')[0]}"


def first_base(case: Path) -> Path:
    """The base that a case's first era drew."""
    return min(path.parent for path in case.glob(f"base-*/{WEIGHTS}"))


def build(name: str, model: Model, case: Path, era: str) -> Any:
    """The model: drawn in the case's first era, biases and norms too; loaded from the case's base in later ones."""
    head = getattr(transformers, model.head)
    if era != model.eras[0]:
        loaded, info = head.from_pretrained(first_base(case), output_loading_info=True)
        if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
            raise SystemExit(f"{name}: the base of an older release does not load: {info}")
        return loaded.eval()
    torch.manual_seed(zlib.crc32(name.encode()))
    drawn = head(getattr(transformers, model.config)(**model.arguments))
    with torch.no_grad():
        for parameter in drawn.parameters():
            parameter.normal_(0.0, 0.3)
    return drawn.eval()


def saved(model: Any, directory: Path) -> Tensors:
    """Save a model as its transformers release does, and read the tensors back."""
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    return load_file(directory / WEIGHTS)


def differing(tensors: Tensors, base: Tensors) -> Tensors:
    """The tensors that are not bit for bit in `base`; both must have the same names."""
    if tensors.keys() != base.keys():
        raise SystemExit(f"names differ: {sorted(tensors.keys() ^ base.keys())}")
    return {name: value for name, value in tensors.items() if not torch.equal(value, base[name])}


def write_base(model: Any, case: Path, era: str) -> Tensors:
    """Write the era's base, without its weights where those of the case's first era are the same; return them."""
    with tempfile.TemporaryDirectory() as scratch:
        tensors = saved(model, Path(scratch))
        target = case / base_name(era)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(scratch, "config.json"), target / "config.json")
        stored = list(case.glob(f"base-*/{WEIGHTS}"))
        known = load_file(first_base(case) / WEIGHTS) if stored else {}
        if known.keys() != tensors.keys() or differing(tensors, known):
            shutil.copyfile(Path(scratch, WEIGHTS), target / WEIGHTS)
            print(f"{case.name}: {target.name} has weights of its own")
    return tensors


def lora_config(model: Model, network: Any) -> LoraConfig:
    """What is adapted: all layers, and what became a parameter of experts and routers in transformers 5."""
    arguments: dict[str, Any] = {"r": 2, "lora_alpha": 3, **model.lora}
    if model.parameters:
        return LoraConfig(**arguments, target_modules=[], target_parameters=sorted(model.parameters))
    stacked = stacked_parameters(network) if transformers.__version__.startswith("5.") else set()
    layers = set(model.linear) or linear_layers(network)
    if stacked and model.old_names:
        layers |= set(model.old_names)
    elif stacked:
        arguments["target_parameters"] = sorted(stacked)
    return LoraConfig(**arguments, target_modules=sorted(layers))


def linear_layers(network: Any) -> set[str]:
    """Endings of the names of all linear layers but a tied head; two segments where the last is a number."""
    table, found = network.get_input_embeddings().weight, set()
    for name, module in network.named_modules():
        if type(module) is nn.Linear and module.weight is not table:
            found.add(".".join(name.split(".")[-2 if name.rpartition(".")[2].isdigit() else -1 :]))
    return found


def stacked_parameters(network: Any) -> set[str]:
    """Endings of the matrices, and stacks of them, that experts and routers hold as parameters of their own."""
    found = set()
    for name, parameter in network.named_parameters():
        parts = name.split(".")
        owner = network.get_submodule(".".join(parts[:-1]))
        router = parts[-2] in ("gate", "router") and parts[-1] == "weight" and type(owner) is not nn.Linear
        if (parts[-2] == "experts" and parameter.ndim == 3) or router:
            found.add(".".join(parts[-3:]))
    return found


def randomise(model: PeftModel, seed: int) -> None:
    """Draw every A and B; zero would hide a delta that is lost."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


def write_adapter(model: PeftModel, target: Path) -> None:
    """Save the adapter as PEFT does, without its model card, and with no path of this machine."""
    model.save_pretrained(target)
    (target / "README.md").unlink(missing_ok=True)
    file = target / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = None
    file.write_text(json.dumps(config, indent=2) + "\n")


def logits(model: Any) -> torch.Tensor:
    """The output for one fixed text without image tokens."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 9, 3, 17, 11, 20]]), use_cache=False).logits


def write_case(name: str, era: str) -> None:
    """Write base, adapter and merge of one case in one era."""
    model, case = MODELS[name], TARGET / name
    torch.manual_seed(0)
    network = build(name, model, case, era)
    base = write_base(network, case, era)
    plain = logits(network)
    adapted = get_peft_model(network, lora_config(model, network))
    randomise(adapted.eval(), zlib.crc32(f"{name} {era}".encode()))
    target = case / era
    shutil.rmtree(target, ignore_errors=True)
    write_adapter(adapted, target / "adapter")
    active = logits(adapted)
    merged = adapted.merge_and_unload()
    error, effect = (logits(merged) - active).abs().max(), (active - plain).abs().max()
    if error > 1e-4 * active.abs().max() or effect < 1e-2 * active.abs().max():
        print(f"{name}: the merge computes something else than the adapter: off by {error:.3g}, effect {effect:.3g}")
    with tempfile.TemporaryDirectory() as scratch:
        save_file(differing(saved(merged, Path(scratch)), base), target / "merged.safetensors", {"format": "pt"})
    print(f"{name}: {len(load_file(target / 'merged.safetensors'))} of {len(base)} tensors changed")


def main() -> None:
    """Write one era's part of all cases, or of the ones named."""
    era, *names = sys.argv[1:] or [""]
    check_releases(era)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name, model in MODELS.items():
        if era in model.eras and (not names or name in names):
            write_case(name, era)


if __name__ == "__main__":
    main()
