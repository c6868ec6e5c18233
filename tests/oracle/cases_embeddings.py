"""Embeddings and heads: LoRA on tables, saved tables, trained tokens, resized vocabularies, and ties by meaning.

A tied tensor that only one side of changes becomes two. PEFT's merge moves both sides, or one side twice, and so does
not compute what the adapter does; there the oracle is PEFT's merge into the base with its tie dissolved, and in every
case the adapter's forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tests.oracle.case import Case, Oracle

if TYPE_CHECKING:
    from peft import PeftModel

TABLES = ("embed_tokens.weight", "wte.weight", "wpe.weight", "word_embeddings.weight")
"""Where PEFT rounds the delta before it adds it: tables, but not heads."""
GROWN = 70
QUERY = ["q_proj"]
TIED, PARTED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
FORCED = {"save_embedding_layers": True}
ENSURED = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
NEVER = {"save_embedding_layers": False}


def grow(model: nn.Module) -> None:
    """More tokens, as training with new special tokens needs them; their rows are the same in every dtype."""
    old = model.config.vocab_size
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = table.weight.data[old:]
        rows.copy_(torch.arange(rows.numel()).remainder(7).sub(3).div(8).view_as(rows))


def _case(name: str, base: str, lora: dict[str, Any], **more: Any) -> Case:
    return Case(name, base, lora, rounds_twice=TABLES, **more)


def _tied(name: str, lora: dict[str, Any], config: dict[str, Any], oracle: Oracle = Oracle.UNTIED, **more: Any) -> Case:
    rename = without_head if config["tie_word_embeddings"] and oracle is Oracle.UNTIED else None
    base = more.pop("base", "llama-tied")
    return _case(f"tied-{name}", base, lora, config=config, oracle=oracle, rename=rename, **more)


def without_head(name: str) -> str | None:
    """A head that stays tied is not written."""
    return None if name == "lm_head.weight" else name


def same_on_both_sides(model: PeftModel) -> None:
    """The head's factors are the embedding's, as they stay in training on a float32 base."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        head.lora_A["default"].weight.copy_(table.lora_embedding_B["default"].T)
        head.lora_B["default"].weight.copy_(table.lora_embedding_A["default"].T)


def both(**lora: Any) -> dict[str, Any]:
    """LoRA on either side of the tie."""
    return {"target_modules": ["q_proj", "embed_tokens", "lm_head"], **lora}


UNTIED_CASES = [
    _case("embedding", "llama", {"target_modules": ["embed_tokens"]}),
    _case("embedding-not-saved", "llama", {"target_modules": ["embed_tokens", "q_proj"]}, save=NEVER),
    _case("embedding-saved", "llama", {"target_modules": ["embed_tokens", "q_proj"]}, save=FORCED),
    _case("embeddings-saved-beside-linear", "llama", {"target_modules": QUERY}, save=FORCED),
    _case("embedding-many-tiles", "llama-wide", {"target_modules": ["embed_tokens"]}),
    _case("embedding-rslora", "llama", {"target_modules": ["embed_tokens"], "use_rslora": True}),
    _case("embedding-gpt2", "gpt2", {"target_modules": ["wte", "wpe"]}),
    _case("dora-embedding", "llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    _case("dora-embedding-many-tiles", "llama-wide", {"target_modules": ["embed_tokens"], "use_dora": True}),
    _case("embedding-and-head", "llama", both()),
    _case("tokens-list", "llama", {"target_modules": QUERY, "trainable_token_indices": [3, 60, 41]}),
    _case("tokens-dict", "llama", {"target_modules": QUERY, "trainable_token_indices": {"embed_tokens": [63, 45]}}),
    _case("tokens-of-head", "llama", {"target_modules": QUERY, "trainable_token_indices": {"lm_head": [0, 45]}}),
    _case(
        "tokens-of-both",
        "llama",
        {"target_modules": QUERY, "trainable_token_indices": {"embed_tokens": [44, 45], "lm_head": [0]}},
    ),
    _case("resized", "llama", {"target_modules": QUERY}, prepare=grow, config={"vocab_size": GROWN}),
    _case("resized-with-lora-on-both", "llama", both(), prepare=grow, config={"vocab_size": GROWN}),
    _case(
        "resized-with-replaced-tables",
        "llama",
        {"target_modules": QUERY, "modules_to_save": ["embed_tokens", "lm_head"]},
        prepare=grow,
        config={"vocab_size": GROWN},
    ),
    _case(
        "tokens-and-resized", "llama", {"target_modules": QUERY, "trainable_token_indices": [3, 66, 67]}, prepare=grow
    ),
    _case("tokens-forced", "llama", {"target_modules": QUERY, "trainable_token_indices": [3, 46]}, save=FORCED),
]
TIED_CASES = [
    _tied("linear", {"target_modules": QUERY}, TIED, Oracle.MERGE),
    _tied("embedding", {"target_modules": ["embed_tokens"]}, PARTED),
    _tied("embedding-not-saved", {"target_modules": ["embed_tokens"]}, PARTED, save=NEVER),
    _tied("embedding-dora", {"target_modules": ["embed_tokens"], "use_dora": True}, PARTED),
    _tied("head", {"target_modules": ["lm_head"]}, PARTED),
    _tied("head-not-saved", {"target_modules": ["lm_head"]}, PARTED, save=NEVER),
    _tied("both", both(), PARTED),
    _tied("both-not-saved", both(), PARTED, save=NEVER),
    _tied("both-ensured", both(ensure_weight_tying=True), TIED, train=same_on_both_sides),
    _tied("both-ensured-not-saved", both(ensure_weight_tying=True), TIED, train=same_on_both_sides, save=NEVER),
    _tied("embedding-ensured", ENSURED, TIED, train=same_on_both_sides),
    # DoRA's norms run along other axes of a table than of a head: the same factors are two different effects.
    _tied("embedding-ensured-dora", ENSURED | {"use_dora": True}, PARTED, train=same_on_both_sides),
    # On a 16-bit base PEFT copies the factors to float32, which ends their tie: what is trained and acts are two.
    _tied("embedding-ensured-16-bit", ENSURED, PARTED, dtypes=("bfloat16",), forward=False),
    _tied("replaced-embedding", {"target_modules": QUERY, "modules_to_save": ["embed_tokens"]}, PARTED),
    _tied("replaced-head", {"target_modules": QUERY, "modules_to_save": ["lm_head"]}, PARTED),
    _tied("replaced-both", {"target_modules": QUERY, "modules_to_save": ["embed_tokens", "lm_head"]}, PARTED),
    _tied(
        "replaced-both-ensured",
        {"target_modules": QUERY, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        TIED,
    ),
    _tied("tokens-list", {"target_modules": QUERY, "trainable_token_indices": [3, 60, 41]}, TIED, Oracle.MERGE),
    _tied(
        "tokens-dict",
        {"target_modules": QUERY, "trainable_token_indices": {"embed_tokens": [60, 41]}},
        TIED,
        Oracle.MERGE,
    ),
    _tied(
        "tokens-of-both",
        {"target_modules": QUERY, "trainable_token_indices": {"embed_tokens": [44, 45], "lm_head": [44, 45]}},
        TIED,
        Oracle.MERGE,
    ),
    _tied("gpt2-embedding", {"target_modules": ["wte"]}, PARTED, base="gpt2-tied"),
    _tied("gpt2-head", {"target_modules": ["lm_head"]}, PARTED, base="gpt2-tied"),
    _tied("bert-embedding", {"target_modules": ["word_embeddings"]}, PARTED, base="bert"),
    _tied("bert-head", {"target_modules": ["decoder"]}, PARTED, base="bert"),
    _tied("resized", {"target_modules": QUERY}, TIED | {"vocab_size": GROWN}, Oracle.MERGE, prepare=grow),
    _tied("resized-embedding", {"target_modules": ["embed_tokens"]}, PARTED | {"vocab_size": GROWN}, prepare=grow),
    _tied("resized-head", {"target_modules": ["lm_head"]}, PARTED | {"vocab_size": GROWN}, prepare=grow),
    _tied("resized-both", both(), PARTED | {"vocab_size": GROWN}, prepare=grow),
    _tied(
        "replaced-head-ensured",
        {"target_modules": QUERY, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        TIED,
    ),
    _tied(
        "tokens-apart",
        {"target_modules": QUERY, "trainable_token_indices": {"embed_tokens": [44, 45], "lm_head": [0]}},
        PARTED,
    ),
    _tied(
        "tokens-and-resized",
        {"target_modules": QUERY, "trainable_token_indices": [3, 66, 67]},
        TIED | {"vocab_size": GROWN},
        prepare=grow,
    ),
    _tied("tokens-head-dict", {"target_modules": QUERY, "trainable_token_indices": {"lm_head": [44, 45]}}, PARTED),
    _tied(
        "tokens-both-forced",
        {"target_modules": QUERY, "trainable_token_indices": [3, 4]},
        TIED,
        Oracle.MERGE,
        save=FORCED,
    ),
]
CASES = [*UNTIED_CASES, *TIED_CASES]
