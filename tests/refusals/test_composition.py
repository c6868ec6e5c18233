"""Several adapters at once: what has a sum is summed, what has none is refused, and so are weights on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from streammerge.core.text import count_text
from tests.refusals.making import (
    ALPHA,
    HIDDEN,
    MARKER,
    PREFIX,
    RANK,
    TARGETS,
    VOCABULARY,
    Stored,
    all_factors,
    expected,
    factors,
    load_all,
    make_adapter,
    make_base,
    merged,
    normal,
    refused,
    stored,
    values_of,
    write_json,
)

Q0, V0, *_ = TARGETS
NORM = f"{PREFIX}model.norm.weight"
TOKENS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
ORDER = "merge them one at a time, in the order you mean"


def lora(root: Path, *modules: str, **config: object) -> Path:
    return make_adapter(root, all_factors(modules or (Q0,)), **config)


def dora(root: Path, module: str = Q0) -> Path:
    magnitude = {f"{PREFIX}{module}.lora_magnitude_vector": stored(np.abs(values_of(normal("m", HIDDEN))) + 1)}
    return make_adapter(root, factors(module) | magnitude, use_dora=True)


def replacing(root: Path, scale: float = 1.0) -> Path:
    return make_adapter(root, all_factors((V0,)) | {NORM: normal("norm", HIDDEN, scale=scale)})


def tokens(root: Path, *rows: int) -> Path:
    trained = {TOKENS: normal(f"rows {rows}", len(rows), HIDDEN)}
    return make_adapter(root, all_factors((V0,)) | trained, trainable_token_indices=list(rows))


def test_two_dora_adapters_on_one_tensor_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    both = [dora(tmp_path / "one"), dora(tmp_path / "two")]
    words = (f"several adapters change `{Q0}.weight`", "which has no agreed sum with others", Q0, ORDER)
    refused(4, *words, base=base, adapters=both)


@pytest.mark.parametrize("first", ["dora", "lora"])
def test_dora_beside_lora_on_one_tensor_is_refused_in_either_order(tmp_path: Path, first: str) -> None:
    base = make_base(tmp_path / "base")
    both = [dora(tmp_path / "dora"), lora(tmp_path / "lora")]
    words = (f"several adapters change `{Q0}.weight`", "no agreed sum", ORDER)
    refused(4, *words, base=base, adapters=both if first == "dora" else both[::-1])


def test_dora_and_lora_on_different_tensors_are_merged_together(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    first, second = dora(tmp_path / "dora"), lora(tmp_path / "lora", V0)
    merged(base, [first, second], tmp_path / "both")
    merged(base, first, tmp_path / "one")
    merged(tmp_path / "one", second, tmp_path / "two")
    assert load_all(tmp_path / "both") == load_all(tmp_path / "two")


def test_two_replacements_of_one_tensor_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    both = [replacing(tmp_path / "one"), replacing(tmp_path / "two", scale=2.0)]
    refused(4, "two adapters replace `model.norm.weight`", NORM, ORDER, base=base, adapters=both)


def test_the_same_row_trained_by_two_adapters_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    both = [tokens(tmp_path / "one", 3, 5), tokens(tmp_path / "two", 5, 9)]
    refused(4, "two adapters replace row 5 of `model.embed_tokens.weight`", ORDER, base=base, adapters=both)


def test_different_rows_trained_by_two_adapters_are_both_written(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    merged(base, [tokens(tmp_path / "one", 3, 5), tokens(tmp_path / "two", 9)], tmp_path / "out")
    before = values_of(load_all(base)["model.embed_tokens.weight"])
    after = values_of(load_all(tmp_path / "out")["model.embed_tokens.weight"])
    assert set(np.nonzero((before != after).any(1))[0]) == {3, 5, 9}


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (lambda root: replacing(root), "a replaced parameter has no weighted form; its `--weight` is 0.5"),
        (lambda root: dora(root), "a DoRA adapter has no weighted form; its `--weight` is 0.5"),
        (lambda root: tokens(root, 3), "trained token rows have no weighted form; their `--weight` is 0.5"),
        (
            lambda root: lora(root, init_lora_weights="pissa"),
            "an adapter with `init_lora_weights = pissa` has no weighted form; its `--weight` is 0.5",
        ),
    ],
    ids=["replacement", "DoRA", "token rows", "PiSSA"],
)
def test_a_weight_on_what_has_no_weighted_form_is_refused(tmp_path: Path, adapter: object, words: str) -> None:
    base, made = make_base(tmp_path / "base"), adapter(tmp_path / "adapter")  # type: ignore[operator]
    refused(4, words, base=base, adapters=made, options=("--weight", 0.5))
    merged(base, made, tmp_path / "out", "--weight", 1)


def test_weights_scale_the_deltas_of_their_adapters_in_order(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one, two = (
        lora(tmp_path / "one", Q0, r=RANK),
        make_adapter(tmp_path / "two", {k: stored(values_of(v) * 2) for k, v in factors(Q0).items()}),
    )
    merged(base, [one, two], tmp_path / "out", "--weight", 0.5, "--weight", -2, "--dtype", "float32")
    a, b = factors(Q0).values()
    # The second pair is twice the first, so its product is four times as large: 0.5 * 1 - 2 * 4.
    want = expected(load_all(base)[f"{Q0}.weight"], a, b, ALPHA / RANK * (0.5 - 2 * 4))
    found = values_of(load_all(tmp_path / "out")[f"{Q0}.weight"])
    np.testing.assert_array_equal(found, want.astype(np.float32))


@pytest.mark.parametrize(("weights", "count"), [(("1", "2"), 1), (("1",), 2)])
def test_as_many_weights_as_adapters_are_needed(tmp_path: Path, weights: tuple[str, ...], count: int) -> None:
    base = make_base(tmp_path / "base")
    adapters = [lora(tmp_path / f"a{number}") for number in range(count)]
    options = [word for weight in weights for word in ("--weight", weight)]
    given = f"{count_text(len(weights), 'weight')} given for {count_text(count, 'adapter')}"
    words = (given, "one `--weight` for each adapter, in order")
    refused(2, *words, base=base, adapters=adapters, options=options)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, weight: str) -> None:
    base, adapter = make_base(tmp_path / "base"), lora(tmp_path / "adapter")
    refused(2, "a weight is not finite", base=base, adapters=adapter, options=(f"--weight={weight}",))


def test_adapters_with_different_layers_replicated_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    both = [lora(tmp_path / "one", layer_replication=[[0, 2], [0, 2]]), lora(tmp_path / "two")]
    refused(4, "the adapters were trained with different layers replicated", base=base, adapters=both)


def test_adapters_with_different_tokenizers_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    both = [lora(tmp_path / "one"), lora(tmp_path / "two")]
    for number, adapter in enumerate(both):
        write_json(adapter / "tokenizer.json", {"model": {"vocab": {f"t{number}": 0}}})
    refused(4, "two adapters bring different tokenizers", "tokenizer.json", base=base, adapters=both)


def test_one_adapter_named_twice_is_summed_and_not_mistaken_for_one(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), lora(tmp_path / "adapter")
    merged(base, [adapter, adapter], tmp_path / "twice")
    merged(base, adapter, tmp_path / "double", "--weight", 2)
    name = f"{Q0}.weight"
    assert load_all(tmp_path / "twice")[name] == load_all(tmp_path / "double")[name]


def test_factors_of_zero_in_one_adapter_do_not_hide_the_other(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    empty: dict[str, Stored] = {key: stored(values_of(value) * 0) for key, value in factors(Q0).items()}
    merged(base, [make_adapter(tmp_path / "zero", empty), lora(tmp_path / "one")], tmp_path / "out")
    merged(base, lora(tmp_path / "alone"), tmp_path / "alone-out")
    assert load_all(tmp_path / "out") == load_all(tmp_path / "alone-out")


HEAD = "lm_head"
SAVED_HEAD = f"{PREFIX}{HEAD}.base_layer.weight"


def head_lora(root: Path, saved: Stored) -> Path:
    """LoRA on the head, with the table that PEFT saves beside it."""
    pair = {f"{PREFIX}{HEAD}.lora_A.weight": normal("head A", RANK, HIDDEN)}
    pair |= {f"{PREFIX}{HEAD}.lora_B.weight": normal("head B", VOCABULARY, RANK)}
    return make_adapter(root, pair | {SAVED_HEAD: saved}, target_modules=[HEAD])


def test_a_saved_table_that_is_the_base_s_own_does_not_stand_in_the_way_of_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    table = load_all(base)[f"{HEAD}.weight"]
    both = [head_lora(tmp_path / "one", table), head_lora(tmp_path / "two", table)]
    merged(base, both, tmp_path / "out", "--weight", 0.75, "--weight", 0.25)
    exact = expected(table, normal("head A", RANK, HIDDEN), normal("head B", VOCABULARY, RANK), ALPHA / RANK)
    written = values_of(load_all(tmp_path / "out")[f"{HEAD}.weight"])
    assert np.abs(written - exact).max() <= np.abs(exact).max() * 2**-8
    report = json.loads((tmp_path / "out" / MARKER).read_text())
    assert [list(adapter["ignored"]) for adapter in report["adapters"]] == [[SAVED_HEAD], [SAVED_HEAD]]


def test_a_saved_table_that_differs_from_the_base_s_has_no_weighted_form(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = head_lora(tmp_path / "one", normal("another table", VOCABULARY, HIDDEN, dtype="BF16"))
    refused(4, SAVED_HEAD, "no weighted form", base=base, adapters=adapter, options=["--weight", "0.5"])
