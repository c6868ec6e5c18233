"""Any change of a finished output, of its report, or of the inputs it is compared with is found and named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streammerge.core import strict_json
from streammerge.core.digests import block_digest, file_digest, sealed
from tests.refusals.making import (
    BASE_CONFIG,
    INDEX,
    MARKER,
    STAGING,
    base_tensors,
    call,
    inputs_at,
    make_adapter,
    make_base,
)
from tests.verification.outputs import FIRST, ORIGIN, SECOND, failed, finished, flip


# --- what was changed -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", [FIRST, SECOND, INDEX, BASE_CONFIG, "generation_config.json", "sub/notes.txt", MARKER])
def test_a_flipped_bit_anywhere_is_found_and_its_file_named(tmp_path: Path, file: str) -> None:
    _, _, out = finished(tmp_path)
    path = out / file
    size = path.stat().st_size
    for byte in sorted({0, 7, 8, 20, size // 3, size // 2, size - 1} & set(range(size))):
        flip(path, byte, bit=byte % 8)
        failed(out, file)
        flip(path, byte, bit=byte % 8)
    assert call("verify", out, "--full").code == 0


@pytest.mark.parametrize("file", [FIRST, INDEX, BASE_CONFIG, "sub/notes.txt"])
def test_a_missing_file_is_found(tmp_path: Path, file: str) -> None:
    _, _, out = finished(tmp_path)
    (out / file).unlink()
    failed(out, f"`{file}` is missing")


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""], ids=["shorter", "longer", "empty"]
)
def test_a_file_of_another_length_is_found(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    _, _, out = finished(tmp_path)
    data = (out / SECOND).read_bytes()
    (out / SECOND).write_bytes(change(data))
    failed(out, f"`{SECOND}` has {len(change(data)):,} bytes, the report says {len(data):,}")


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "extra.safetensors", "pytorch_model.bin", "sub/x.safetensors", "modeling_x.py",
        "model.gguf", "tokenizer.json", "chat_template.jinja", "added_tokens.json", "sub/config.json",
        "adapter_config.json", "x",
    ],
)  # fmt: skip
def test_a_file_that_is_not_of_this_output_is_found(tmp_path: Path, name: str) -> None:
    _, _, out = finished(tmp_path)
    shutil.copy(out / FIRST, out / name)
    failed(out, f"`{name}` is not a file of this output")


@pytest.mark.parametrize(
    "name", ["NOTES.md", "model.sig", ".gitattributes", ".git/config", ".cache/huggingface/x.lock"]
)
def test_a_file_beside_it_that_no_loader_looks_at_is_left_alone_and_named(tmp_path: Path, name: str) -> None:
    _, _, out = finished(tmp_path)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("x")
    outcome = call("verify", out)
    assert outcome.code == 0, outcome.err
    assert f"note: `{name}`: not of this output, and not checked" in outcome.err


def test_what_a_killed_run_left_in_its_staging_area_is_no_file_of_the_output(tmp_path: Path) -> None:
    _, _, out = finished(tmp_path)
    (out / STAGING / "0123").mkdir(parents=True)
    shutil.copy(out / FIRST, out / STAGING / "0123" / FIRST)
    assert call("verify", out).code == 0


@pytest.mark.parametrize("file", [FIRST, BASE_CONFIG, "sub/notes.txt"])
@pytest.mark.parametrize("what", ["a folder", "a pipe", "a dangling link"])
def test_something_else_in_the_place_of_a_file_is_found(tmp_path: Path, file: str, what: str) -> None:
    _, _, out = finished(tmp_path)
    (out / file).unlink()
    match what:
        case "a folder":
            (out / file).mkdir()
        case "a pipe":
            os.mkfifo(out / file)
        case _:
            (out / file).symlink_to("nowhere")
    outcome = call("verify", out)
    assert outcome.code == 6, outcome.err
    assert file in outcome.err


def test_swapped_shards_are_found(tmp_path: Path) -> None:
    _, _, out = finished(tmp_path)
    (out / FIRST).rename(out / "x")
    (out / SECOND).rename(out / FIRST)
    (out / "x").rename(out / SECOND)
    failed(out, "it disagrees with its shards", FIRST, SECOND)


def test_a_shard_of_the_base_in_the_place_of_its_own_is_found(tmp_path: Path) -> None:
    base, _, out = finished(tmp_path)
    shutil.copy(base / FIRST, out / FIRST)
    failed(out, f"`{FIRST}` differs from what was written, within bytes 0 to")


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    _, _, out = finished(tmp_path)
    flip(out / FIRST, -1)
    flip(out / BASE_CONFIG, 30)
    (out / "sub" / "notes.txt").unlink()
    failed(out, FIRST, BASE_CONFIG, "`sub/notes.txt` is missing")


def test_an_index_that_was_rewritten_to_say_something_else_is_found(tmp_path: Path) -> None:
    _, _, out = finished(tmp_path)
    index = json.loads((out / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = FIRST
    (out / INDEX).write_text(json.dumps(index))
    failed(out, "it disagrees with its shards", INDEX)


def test_a_record_of_the_inputs_that_was_changed_is_found(tmp_path: Path) -> None:
    _, _, out = finished(tmp_path)
    whole = (out / ORIGIN).read_bytes()
    text = whole.decode()
    for changed in ("", "{", "[]", "{}", text.replace("/base", "/bose"), text.replace("digest", "digezt"), text + " "):
        (out / ORIGIN).write_text(changed)
        failed(out, f"`{ORIGIN}` was changed after it was written", "with `--base` and `--adapter`")
    (out / ORIGIN).write_bytes(whole)
    assert call("verify", out).code == 0


# --- the report -------------------------------------------------------------------------------------------------------
def rewritten(out: Path, change: Callable[[dict[str, object]], object]) -> None:
    """A report that somebody edited, its own digest made to fit."""
    document = json.loads((out / MARKER).read_text())
    change(document)
    document.pop("digest", None)
    (out / MARKER).write_bytes(strict_json.dumps(sealed(document)))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"streammerge": 1}', '{"streammerge": 1, "digest": "00"}', "\x00"]
)
def test_a_report_that_is_none_is_found(tmp_path: Path, text: str) -> None:
    _, _, out = finished(tmp_path)
    (out / MARKER).write_text(text)
    failed(out, MARKER)


@pytest.mark.parametrize("name", ["files", "sidecars", "tensors", "options", "adapters", "plan", "fingerprint"])
@pytest.mark.parametrize("value", [..., None, 1, [], {"x": 1}, [1], "x"], ids=str)
def test_a_report_that_lacks_a_part_or_holds_another_there_is_found(tmp_path: Path, name: str, value: object) -> None:
    _, _, out = finished(tmp_path)
    rewritten(out, lambda document: document.pop(name) if value is ... else document.update({name: value}))
    words = () if isinstance(value, str) and name in ("plan", "fingerprint") else (MARKER, f"no usable `{name}`")
    if name == "options" and isinstance(value, dict):
        words = (MARKER, "is no report of this version: it names `x` as an option")
    failed(out, *words)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("dtype", "int8", "`dtype` is `int8`, not one of"),
        ("sha256", "yes", "`sha256` is `yes`, not true or false"),
        ("max_shard_size", "x", "`x` is not a size"),
    ],
)
def test_a_report_with_an_option_that_makes_no_sense_is_found(
    tmp_path: Path, name: str, value: object, said: str
) -> None:
    _, _, out = finished(tmp_path)
    rewritten(out, lambda document: document["options"].update({name: value}))
    failed(out, f"`{MARKER}` is no report of this version: {said}")


@pytest.mark.parametrize("part", ["delta_norm", "ignored", "config_edits", "code"])
def test_a_report_that_was_edited_is_found_by_its_own_digest(tmp_path: Path, part: str) -> None:
    _, _, out = finished(tmp_path)
    document = json.loads((out / MARKER).read_text())
    if part == "delta_norm":
        next(iter(document["tensors"].values()))[part] += 1
    elif part == "ignored":
        document["adapters"][0][part] = {"key": "a rule"}
    else:
        document[part] = ["x"]
    (out / MARKER).write_text(json.dumps(document))
    failed(out, f"`{MARKER}` was changed after it was written: its own digest does not fit")


def test_a_report_that_says_the_same_in_other_bytes_is_found(tmp_path: Path) -> None:
    """A flipped bit can make `1E-05` of `1e-05` and `B` of `b` in an escape, and values stay as they are."""
    _, _, out = finished(tmp_path)
    text = (out / MARKER).read_text()
    assert json.loads(text)["digest"]
    for changed in (text.replace(": ", ":  ", 1), text + "\n", text.replace('"tensors"', '"\\u0074ensors"'), text[:-1]):
        assert json.loads(changed) == json.loads(text)
        (out / MARKER).write_text(changed)
        failed(out, f"`{MARKER}` was changed after it was written: its own digest does not fit")


def test_a_report_of_another_version_is_not_taken_for_ours(tmp_path: Path) -> None:
    _, _, out = finished(tmp_path)
    rewritten(out, lambda document: document.update(streammerge=2))
    failed(out, MARKER)


def test_digests_that_were_made_to_fit_a_forged_output_do_not_pass_against_the_inputs(tmp_path: Path) -> None:
    base, _, out = finished(tmp_path)
    for path in out.glob("*.safetensors"):
        flip(path, -1)
        blocks = [block_digest([path.read_bytes()])]
        entry = {"size": path.stat().st_size, "blocks": blocks, "digest": file_digest(blocks)}
        rewritten(out, lambda document, path=path, entry=entry: document["files"].update({path.name: entry}))  # type: ignore[misc]
    failed(out, "are not what base and adapters give")
    failed(out, FIRST, SECOND, options=("--full",))
    shutil.rmtree(base)
    assert call("verify", out).code == 0, "without the inputs there is nothing to compare with"


# --- other inputs -----------------------------------------------------------------------------------------------------
def test_another_base_is_found(tmp_path: Path) -> None:
    _, _, out = finished(tmp_path)
    other = make_base(tmp_path / "other", base_tensors(dtype="F16"))
    failed(out, options=("--base", other))


def test_a_base_with_other_values_under_the_same_headers_is_found(tmp_path: Path) -> None:
    base, _, out = finished(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    flip(other / FIRST, -1)
    failed(out, "the base's weights are not those the output was made from", options=("--base", other))


def test_another_adapter_is_found(tmp_path: Path) -> None:
    _, adapter, out = finished(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    flip(other / "adapter_model.safetensors", -2)
    failed(out, "adapter", options=("--adapter", other))
    failed(out, "adapter", options=("--adapter", make_adapter(tmp_path / "alpha", lora_alpha=5)))


def test_an_adapter_that_does_not_even_fit_is_refused_as_such(tmp_path: Path) -> None:
    _, _, out = finished(tmp_path)
    assert call("verify", out, "--adapter", make_adapter(tmp_path / "bad", r=7)).code == 4
    assert call("verify", out, "--base", tmp_path / "none").code == 3


# --- unfinished -------------------------------------------------------------------------------------------------------
def test_an_unfinished_output_is_told_from_a_wrong_one(tmp_path: Path) -> None:
    _, _, out = finished(tmp_path)
    (out / MARKER).unlink()
    outcome = call("verify", out)
    assert outcome.code == 5
    assert "holds no `streammerge.json`: it is not a finished output" in outcome.err
    (out / STAGING).mkdir()
    assert "finish it with the command that began it" in call("verify", out).err
    assert call("verify", tmp_path / "none").code == 5


def test_a_base_is_no_output_of_ours(tmp_path: Path) -> None:
    base, _ = inputs_at(tmp_path)
    outcome = call("verify", base)
    assert outcome.code == 5
    assert "not a finished output of streammerge" in outcome.err
