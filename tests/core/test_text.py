"""Text for people: sizes in and out, lists cut short, names alike, and nothing that a terminal would act on."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.core.text import (
    count_text,
    nearest,
    parse_size,
    printable,
    redacted,
    shortened,
    size_text,
    some_of,
)

SIZES = {
    "5GB": 5 * 10**9, "128MB": 128 * 10**6, "64MiB": 64 * 2**20, "1.5GiB": 3 * 2**29, "20kB": 20_000, "20KB": 20_000,
    "3K": 3000, "2T": 2 * 10**12, "1TiB": 2**40, "1000": 1000, "7B": 7, " 5 GB ": 5 * 10**9, "0.5kB": 500,
}  # fmt: skip


@pytest.mark.parametrize("text", SIZES)
def test_a_size_is_read_in_decimal_or_binary_units(text: str) -> None:
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize(
    "text",
    ["", "GB", "0", "0MB", "0.0001kB", "-5MB", "5XB", "5 apples", "1e9", "5GBB", "\u0661GB", "5iB", "inf", "1_000"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 5GB, 128MB or 64MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (9080, "9.08 kB"),
        (999_999, "1000 kB"),
        (4_030_000_000, "4.03 GB"),
        (2 * 10**12, "2 TB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_a_size_is_written_with_three_digits(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (1, "tensor", "1 tensor"),
        (2, "tensor", "2 tensors"),
        (0, "file", "0 files"),
        (1234, "entry", "1,234 entries"),
        (2, "key", "2 keys"),
    ],
)
def test_nouns_follow_their_count(count: int, noun: str, text: str) -> None:
    assert count_text(count, noun) == text


def test_a_long_list_is_cut_and_counted() -> None:
    assert some_of(["a"]) == "`a`"
    assert some_of(range(5)) == "`0`, `1`, `2`, `3`, `4`"
    assert some_of(range(7)) == "`0`, `1`, `2`, `3`, `4` and 2 more"
    assert some_of(["\x1b"], 1) == "`\\x1b`"


@settings(deadline=None)
@given(st.text())
def test_printable_text_holds_nothing_that_acts_or_hides_and_loses_nothing_else(text: str) -> None:
    shown = printable(text)
    assert all(unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for char in shown)
    assert printable(shown) == shown
    if all(unicodedata.category(char)[0] in "LNPSM" or char == " " for char in text):
        assert shown == text


def test_the_nearest_names_share_segments_not_only_letters() -> None:
    base = [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(3) for p in "qkvo"] + ["lm_head.weight"]
    found = nearest("model.layers.1.self_attn.query_proj.weight", base)
    assert found[0].startswith("model.layers.1.self_attn.")
    assert len(found) == 3
    assert nearest("transformer.h.0.attn.c_attn.weight", ["lm_head.weight"]) == ()
    assert nearest("base.layers.0.self_attn.q_proj.weight", base, 1) == ("model.layers.0.self_attn.q_proj.weight",)


SECRETS = {
    "hf_" + "aB3" * 11 + "x": "[secret]",
    "org/hf_" + "a" * 34 + "@main": "org/[secret]@main",
    "https://user:word@host/a": "https://[secret]@host/a",
    "https://host/a?X-Amz-Signature=abc&part=1": "https://host/a?[secret]&part=1",
    "https://host/a?part=1&token=abc": "https://host/a?part=1&[secret]",
    "Authorization: Bearer abc": "Authorization:[secret]",
    "authorization:abc\nnext": "authorization:[secret]\nnext",
    "org/hf_model-7b": "org/hf_model-7b",
    "model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight",
    "org/name@refs/pr/1": "org/name@refs/pr/1",
}


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_taken_out_of_a_text_and_nothing_else(text: str) -> None:
    assert redacted(text) == SECRETS[text]


def test_a_long_text_is_cut_and_says_how_long_it_is() -> None:
    assert shortened("x" * 1000) == "x" * 1000
    assert shortened("x" * 1_000_000, 3) == "xxx... (1,000,000 characters)"
