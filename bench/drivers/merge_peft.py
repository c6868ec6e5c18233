"""PEFT's way: load the model, load the adapter, `merge_and_unload`, save. Runs in PEFT's own environment.

    python merge_peft.py BASE ADAPTER OUT

The model is opened with the class that its config names.
"""

import sys

import torch
import transformers
from peft import PeftModel


def main(base: str, adapter: str, output: str) -> None:
    """Merge as PEFT's documentation says, in shards of the size that transformers used to write."""
    config = transformers.AutoConfig.from_pretrained(base)
    model = getattr(transformers, config.architectures[0]).from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter, torch_device="cpu").merge_and_unload()
    merged.save_pretrained(output, max_shard_size="5GB")


if __name__ == "__main__":
    main(*sys.argv[1:])
