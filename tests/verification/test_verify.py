"""Verification: any change of a finished output, or another base or adapter, is found; what cannot be checked is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streammerge import api
from streammerge.core import io
from streammerge.core.digests import block_digest, file_digest
from streammerge.core.errors import InputReadError
from streammerge.report import own_digest
from streammerge.verification import sampled_blocks
from tests.refusals.making import (
    BASE_CONFIG,
    INDEX,
    MARKER,
    STAGING,
    Outcome,
    base_tensors,
    call,
    inputs_at,
    make_adapter,
    make_base,
    merged,
    shard_name,
    tree_digest,
)

FIRST, SECOND = shard_name(0, 2), shard_name(1, 2)
ORIGIN = ".streammerge-inputs.json"


def finished(tmp_path: Path) -> tuple[Path, Path, Path]:
    base, adapter = inputs_at(tmp_path)
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("notes")
    merged(base, adapter, tmp_path / "out")
    return base, adapter, tmp_path / "out"


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def failed(out: Path, *words: str, options: tuple[object, ...] = ()) -> Outcome:
    """A verification that must end with 6, say what is wrong, and change nothing."""
    before = tree_digest(out)
    outcome = call("verify", out, *options)
    assert outcome.code == 6, f"exit {outcome.code}\n{outcome.out}{outcome.err}"
    assert outcome.out == ""
    assert f"error: `{out}` failed verification" in outcome.err
    assert "do not use this output; merge again into a new directory" in outcome.err
    for word in words:
        assert word in outcome.err, f"`{word}` is not in\n{outcome.err}"
    assert tree_digest(out) == before
    return outcome


# --- what holds -------------------------------------------------------------------------------------------------------
def test_a_finished_output_is_verified_and_left_as_it_is(tmp_path: Path) -> None:
    _, _, out = finished(tmp_path)
    before = tree_digest(out)
    outcome = call("verify", out)
    assert outcome.code == 0
    assert outcome.out == f"{out}: verified, 6 blocks checked, 1 block derived again from the inputs\n"
    assert call("verify", out, "--full").out == f"{out}: verified, 6 blocks checked, 2 blocks derived again from the inputs\n"
    assert call("verify", out, "--sample", "100%").out.endswith("2 blocks derived again from the inputs\n")
    assert call("verify", out, "--sample", "50").out.endswith("1 block derived again from the inputs\n")
    assert tree_digest(out) == before


def test_an_output_can_be_moved_and_given_its_inputs_by_hand(tmp_path: Path) -> None:
    base, adapter, out = finished(tmp_path)
    for path in (base, adapter, out):
        path.rename(path.with_name(f"{path.name}-moved"))
    moved = out.with_name("out-moved")
    options = ("--base", tmp_path / "base-moved", "--adapter", tmp_path / "adapter-moved")
    outcome = call("verify", moved, "--full", *options)
    assert outcome.code == 0, outcome.err
    assert "2 blocks derived again" in outcome.out


def test_names_with_colons_are_found_again(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "a:b" / "base"), make_adapter(tmp_path / "a:b" / "adapter")
    merged(base, adapter, tmp_path / "out")
    assert "1 block derived again" in call("verify", tmp_path / "out").out


@pytest.mark.parametrize("gone", ["base", "adapter", "both", "record"])
def test_without_its_inputs_only_the_digests_of_an_output_are_checked_and_that_is_said(tmp_path: Path, gone: str) -> None:
    base, adapter, out = finished(tmp_path)
    for path in {"base": [base], "adapter": [adapter], "both": [base, adapter], "record": []}[gone]:
        shutil.rmtree(path)
    if gone == "record":
        (out / ORIGIN).unlink()
    outcome = call("verify", out)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{out}: verified, 6 blocks checked\n"
    assert "note: " in outcome.err
    assert "digests were checked, nothing was derived again" in outcome.err
    assert ("is gone" in outcome.err) == (gone != "record")
    for options in (("--full",), ("--sample", "5%")):
        outcome = call("verify", out, *options)
        assert outcome.code == 3
        assert "give `--base` and `--adapter`" in outcome.err
    flip(out / SECOND, -1)
    failed(out, SECOND)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"base": 1, "adapters": []}', '{"base": "x", "adapters": [1]}'])
def test_a_record_of_the_inputs_that_makes_no_sense_is_none(tmp_path: Path, text: str) -> None:
    _, _, out = finished(tmp_path)
    (out / ORIGIN).write_text(text)
    outcome = call("verify", out)
    assert outcome.code == 0, outcome.err
    assert "where base and adapters are is not recorded" in outcome.err


def test_several_adapters_with_weights_are_verified_in_their_order(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one, two = make_adapter(tmp_path / "one"), make_adapter(tmp_path / "two", lora_alpha=1)
    merged(base, [one, two], tmp_path / "out", "--weight", 0.5, "--weight", -1, "--dtype", "float32")
    assert call("verify", tmp_path / "out", "--full").code == 0
    inputs = ("--base", base, "--adapter", one, "--adapter", two)
    assert call("verify", tmp_path / "out", "--full", *inputs).code == 0
    failed(tmp_path / "out", options=("--adapter", two, "--adapter", one))
    outcome = call("verify", tmp_path / "out", "--adapter", one)
    assert outcome.code == 2
    assert "2 weights given for 1 adapter" in outcome.err


@pytest.mark.parametrize(
    "options", [("--max-shard-size", "3kB"), ("--dtype", "float16"), ("--allow-unused", "*x*"), ("-j", "1")]
)
def test_outputs_of_other_options_are_derived_again_with_them(tmp_path: Path, options: tuple[str, ...]) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out", *options)
    outcome = call("verify", tmp_path / "out", "--full", "-j", "2", "--memory", "64MB")
    assert outcome.code == 0, outcome.err


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


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""], ids=["shorter", "longer", "empty"])
def test_a_file_of_another_length_is_found(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    _, _, out = finished(tmp_path)
    data = (out / SECOND).read_bytes()
    (out / SECOND).write_bytes(change(data))
    failed(out, f"`{SECOND}` has {len(change(data)):,} bytes, the report says {len(data):,}")


@pytest.mark.parametrize("name", ["model.safetensors", "extra.safetensors", "pytorch_model.bin", "sub/x.safetensors"])
def test_a_weight_file_that_is_not_of_this_output_is_found(tmp_path: Path, name: str) -> None:
    _, _, out = finished(tmp_path)
    shutil.copy(out / FIRST, out / name)
    failed(out, f"`{name}` is not a file of this output")


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


# --- the report -------------------------------------------------------------------------------------------------------
def rewritten(out: Path, change: Callable[[dict[str, object]], object]) -> None:
    """A report that somebody edited, its own digest made to fit."""
    document = json.loads((out / MARKER).read_text())
    change(document)
    document.pop("digest", None)
    (out / MARKER).write_text(json.dumps({**document, "digest": own_digest(document)}))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"streammerge": 1}', '{"streammerge": 1, "digest": "00"}', "\x00"])
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
    failed(out, *words)


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


# --- after a run ------------------------------------------------------------------------------------------------------
def test_a_run_checks_what_it_wrote_and_says_so_unless_told_not_to(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    assert "1 block read back and derived again" in merged(base, adapter, tmp_path / "one").err
    assert "derived again" not in merged(base, adapter, tmp_path / "two", "--no-verify").err


def test_a_disk_that_gives_back_something_else_is_found_after_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = make_base(tmp_path / "base", shards=1), make_adapter(tmp_path / "adapter")
    write = io.write_at

    def lying(fd: int, path: str, offset: int, data: memoryview | bytes) -> None:
        wrong = bytearray(data)
        wrong[-1] ^= ".safetensors" in path and offset > 2000
        write(fd, path, offset, wrong)

    monkeypatch.setattr(io, "write_at", lying)
    outcome = call("run", base, adapter, "-o", tmp_path / "out")
    assert outcome.code == 6
    assert "`model.safetensors` differs from what was written" in outcome.err


def test_a_base_that_is_exchanged_between_writing_and_checking_is_found(tmp_path: Path) -> None:
    shards = 7  # more than are held open at a time, so that the first is opened a second time
    base, adapter = make_base(tmp_path / "base", shards=shards), make_adapter(tmp_path / "adapter")
    first = base / shard_name(0, shards)

    def progress(event: api.Event) -> None:
        if event.kind == "verify":
            other = tmp_path / "other"
            shutil.copy(first, other)
            flip(other, -1)
            other.replace(first)

    with pytest.raises(InputReadError, match="the file changed while it was being used"):
        api.merge(base, adapter, tmp_path / "out", progress=progress)
    failed(tmp_path / "out", "the base's weights are not those the output was made from")


# --- the sample -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 0.5, 1.0])
def test_a_sample_is_a_share_of_the_blocks_spread_evenly_and_never_none(tmp_path: Path, share: float) -> None:
    base, adapter = make_base(tmp_path / "base", shards=8), make_adapter(tmp_path / "adapter")
    plan = api.plan(base, adapter)
    every = [(number, 0) for number in range(8)]
    for seed in ("00000000", "0000abcd", "ffffffff"):
        blocks = sampled_blocks(plan, share, seed)
        assert blocks
        assert set(blocks) <= set(every)
        assert len(blocks) >= round(share * 8) - 1
    assert sampled_blocks(plan, 1.0, "12345678") == every


def test_over_all_seeds_every_block_is_in_some_sample(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base", shards=8), make_adapter(tmp_path / "adapter")
    plan = api.plan(base, adapter)
    seen = {block for seed in range(64) for block in sampled_blocks(plan, 0.05, f"{seed:08x}")}
    assert seen == {(number, 0) for number in range(8)}
