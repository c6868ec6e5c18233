"""Writes tests/data/methods: adapters of every method that several releases of PEFT know, and what each made of them.

Each run writes one era, with the release of PEFT it runs under, and refuses any other. In an environment of its own:
    pip install torch==2.13.0 transformers==4.51.3 peft==ERA, for 0.13.2, 0.15.2, 0.17.1, 0.18.1, 0.19.0
    python scripts/make_method_fixtures.py ERA
The base is the same for all eras: a small model of plain torch layers. The invariant: `merged.safetensors` holds the
tensors that this release's own merge changed, of an adapter that it read back from its own files.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

TARGET = Path(__file__).parents[1] / "tests" / "data" / "methods"
ERAS = ("0.13.2", "0.15.2", "0.17.1", "0.18.1", "0.19.0")
LINEAR = ["wide", "narrow", "square"]
KERNEL = ["kernel"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 2, "lora_alpha": 3, "target_modules": [*LINEAR, "table", "kernel"]}),
    "lora-patterns": (
        "LoraConfig",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": LINEAR,
            "rank_pattern": {"wide": 3},
            "alpha_pattern": {"narrow": 5},
        },
    ),
    "dora": ("LoraConfig", {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": LINEAR}),
    "adalora": ("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 9, "target_modules": LINEAR}),
    "ia3": ("IA3Config", {"target_modules": LINEAR, "feedforward_modules": ["narrow"]}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3, "target_modules": LINEAR}),
    "loha-kernel": ("LoHaConfig", {"r": 2, "alpha": 3, "target_modules": KERNEL, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3, "target_modules": LINEAR}),
    "lokr-kernel": ("LoKrConfig", {"r": 2, "alpha": 3, "target_modules": KERNEL, "use_effective_conv2d": True}),
    "oft": ("OFTConfig", {"r": 2, "target_modules": LINEAR}),
    "oft-shared": ("OFTConfig", {"r": 2, "block_share": True, "target_modules": LINEAR}),
    "oft-constrained": ("OFTConfig", {"r": 2, "coft": True, "eps": 1e-2, "target_modules": LINEAR}),
    "oft-exact": ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False, "target_modules": LINEAR}),
    "oft-neumann": ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": True, "target_modules": LINEAR}),
    "oft-blocks-shared": ("OFTConfig", {"oft_block_size": 4, "block_share": True, "target_modules": LINEAR}),
    "oft-blocks-constrained": (
        "OFTConfig",
        {"oft_block_size": 4, "coft": True, "eps": 1e-2, "target_modules": LINEAR},
    ),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "target_modules": LINEAR}),
    "hra": ("HRAConfig", {"r": 2, "target_modules": LINEAR}),
    "vera": ("VeraConfig", {"r": 2, "target_modules": LINEAR}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, "scaling": 50.0, "target_modules": LINEAR}),
    "vblora": ("VBLoRAConfig", {"r": 2, "num_vectors": 5, "vector_length": 4, "target_modules": LINEAR}),
    "bone": ("BoneConfig", {"r": 4, "target_modules": LINEAR}),
    "bone-bat": ("BoneConfig", {"r": 4, "init_weights": "bat", "target_modules": LINEAR}),
    "miss": ("MissConfig", {"r": 4, "target_modules": LINEAR}),
    "miss-bat": ("MissConfig", {"r": 4, "init_weights": "bat", "target_modules": LINEAR}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["norm"]}),
    "randlora": ("RandLoraConfig", {"r": 2, "target_modules": LINEAR}),
    "tokens": ("TrainableTokensConfig", {"target_modules": ["table"], "token_indices": [1, 4]}),
    "shira": ("ShiraConfig", {"r": 2, "target_modules": LINEAR}),
    "c3a": ("C3AConfig", {"block_size": 8, "target_modules": LINEAR}),
    "road": ("RoadConfig", {"variant": "road_2", "group_size": 8, "target_modules": LINEAR}),
    "waveft": ("WaveFTConfig", {"n_frequency": 16, "target_modules": LINEAR}),
    "delora": ("DeloraConfig", {"r": 2, "target_modules": LINEAR}),
    "gralora": ("GraloraConfig", {"r": 4, "gralora_k": 2, "target_modules": LINEAR}),
    "osf": ("OSFConfig", {"effective_rank": 2, "target_modules": LINEAR}),
}
"""The class of each case's config, and its arguments; a release that lacks the class, or an argument, has no case."""


class Layers(nn.Module):
    """Layers of torch that all releases know how to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 16)
        self.wide = nn.Linear(16, 24)
        self.narrow = nn.Linear(24, 16)
        self.square = nn.Linear(16, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        self.kernel = nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Two rows of channels for eight tokens."""
        x = self.norm(self.square(self.narrow(self.wide(self.table(tokens)))))
        return self.kernel(x.reshape(-1, 8, 4, 4))


def base() -> Layers:
    """The base, drawn anew."""
    torch.manual_seed(0)
    model = Layers()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


def randomise(model: PeftModel) -> None:
    """Draw everything that is trained, so that nothing of it is neutral."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter * (1 + 0.2 * noise.tanh()) if "magnitude" in name else 0.3 * noise)


def write(case: str, era: Path) -> str | None:
    """Write a case's files; why there are none, if there are none."""
    name, arguments = CASES[case]
    if not hasattr(peft, name):
        return f"no {name}"
    torch.manual_seed(1)
    try:
        config = getattr(peft, name)(**arguments)
        adapted = get_peft_model(base(), config)
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    randomise(adapted)
    adapted.save_pretrained(era / case)
    (era / case / "README.md").unlink(missing_ok=True)
    merged = PeftModel.from_pretrained(base(), era / case).merge_and_unload().state_dict()
    before = base().state_dict()
    changed = {key: value.contiguous() for key, value in merged.items() if not torch.equal(value, before[key])}
    if not changed:
        raise SystemExit(f"{case}: this release's merge changes nothing")
    save_file(changed, era / case / "merged.safetensors")
    return None


def main() -> None:
    """Write one era."""
    if len(sys.argv) != 2 or sys.argv[1] not in ERAS or peft.__version__ != sys.argv[1]:
        raise SystemExit(f"usage: {sys.argv[0]} ERA, one of {', '.join(ERAS)}; this is PEFT {peft.__version__}")
    warnings.simplefilter("ignore")
    TARGET.mkdir(parents=True, exist_ok=True)
    save_file(base().state_dict(), TARGET / "base.safetensors", {"format": "pt"})
    era = TARGET / peft.__version__
    for case in CASES:
        reason = write(case, era)
        print(f"{peft.__version__} {case}: {reason or 'written'}")


if __name__ == "__main__":
    main()
