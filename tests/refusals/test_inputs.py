"""Inputs that are missing, malformed, unsafe, or not what their place on the command line asks for: exit 3, with the
path and what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from streammerge import api
from streammerge.core.errors import InputReadError
from streammerge.stream import Event
from tests.refusals.making import (
    BASE_CONFIG,
    INDEX,
    assert_nothing_loadable,
    base_tensors,
    call,
    inputs_at,
    load_all,
    make_adapter,
    make_base,
    merged,
    refused,
    save,
    shard_name,
    write_json,
)

FIRST, SECOND = shard_name(0, 2), shard_name(1, 2)


def edit_index(base: Path, change: Callable[[dict[str, str]], None]) -> None:
    document = json.loads((base / INDEX).read_text())
    change(document["weight_map"])
    write_json(base / INDEX, document)


# --- missing --------------------------------------------------------------------------------------------------------
def test_a_missing_base_or_adapter_is_named(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    refused(3, f"`{tmp_path / 'nobase'}` does not exist", base=tmp_path / "nobase", adapters=adapter)
    refused(3, f"`{tmp_path / 'noadapter'}` does not exist", base=base, adapters=tmp_path / "noadapter")


def test_base_and_adapter_in_the_wrong_order_are_recognised(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    words = ("holds no weights", "The base comes first: `streammerge run BASE ADAPTER -o OUT`")
    refused(3, *words, base=adapter, adapters=base)


def test_a_checkpoint_in_the_adapters_place_is_recognised(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    words = ("has no `adapter_config.json`: it looks like a checkpoint", "the order is BASE, then ADAPTER")
    refused(3, *words, base=base, adapters=make_base(tmp_path / "other"))
    assert adapter.exists()


def test_an_empty_directory_is_neither_base_nor_adapter(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (tmp_path / "empty").mkdir()
    refused(3, "holds no weights", base=tmp_path / "empty", adapters=adapter)
    refused(3, "has no `adapter_config.json`", base=base, adapters=tmp_path / "empty")


def test_an_adapter_without_weights_is_named(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    words = ("has an `adapter_config.json` and neither `adapter_model.safetensors` nor `adapter_model.bin`",)
    refused(3, *words, base=base, adapters=adapter)


def test_files_in_the_place_of_directories_are_refused(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    words = ("an adapter is a directory", "give the directory that holds the `adapter_config.json`")
    refused(3, *words, base=base, adapters=adapter / "adapter_model.safetensors")
    refused(3, "a base is a directory, one `.safetensors` file, or a Hub id", base=base / INDEX, adapters=adapter)


def test_adapters_in_subfolders_are_listed_and_one_of_them_can_be_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    root = tmp_path / "many"
    for name in ("sql", "chat"):
        make_adapter(root / name)
    words = ("has no adapter at its root; its subfolders with one: chat, sql", f"name one of them: `{root}:chat`")
    refused(3, *words, base=base, adapters=root)
    outcome = call("run", base, f"{root}:sql", "-o", tmp_path / "out")
    assert outcome.code == 0
    merged(base, root / "sql", tmp_path / "direct")
    assert load_all(tmp_path / "out") == load_all(tmp_path / "direct")


def test_an_adapter_with_others_below_it_is_that_adapter_and_the_others_are_named(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    make_adapter(adapter / "second", r=2)
    outcome = merged(base, adapter, tmp_path / "out")
    assert "note: other adapters in subfolders are not merged: `second`" in outcome.err
    words = (f"`{adapter / 'third'}` does not exist",)
    code = call("run", base, f"{adapter}:third", "-o", tmp_path / "other")
    assert code.code == 3
    assert words[0] in code.err


@pytest.mark.parametrize("subfolder", ["../adapter", "/etc", "a/../../b"])
def test_a_subfolder_that_could_lead_outside_is_refused(tmp_path: Path, subfolder: str) -> None:
    base, adapter = inputs_at(tmp_path)
    outcome = call("run", base, f"{adapter}:{subfolder}", "-o", tmp_path / "out")
    assert outcome.code == 3
    assert "is refused as unsafe" in outcome.err
    assert not (tmp_path / "out").exists()


# --- the index ------------------------------------------------------------------------------------------------------
def test_a_shard_that_the_index_names_and_that_is_not_there_is_named(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (base / SECOND).unlink()
    words = (f"{SECOND}` is named by the index and is not there", "fetch the missing shard")
    refused(3, *words, base=base, adapters=adapter)


def test_an_index_beside_a_stale_single_file_is_refused(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    save(base / "model.safetensors", base_tensors())
    words = ("it stands beside a `model.safetensors` that it does not name", "two checkpoints", "remove the one")
    refused(3, *words, base=base, adapters=adapter)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    edit_index(base, lambda weights: weights.update({"model.norm.weight": FIRST}))
    words = ("it disagrees with its shards", "model.norm.weight", "fetch the checkpoint again")
    refused(3, *words, base=base, adapters=adapter)


def test_a_tensor_that_the_index_leaves_out_is_refused(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    edit_index(base, lambda weights: weights.pop("model.norm.weight"))
    refused(3, "`model.norm.weight`", "is not in the weight_map", base=base, adapters=adapter)


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "c:x.safetensors",
        "..",
    ],
)
def test_a_weight_map_that_leads_out_of_the_checkpoint_is_refused(tmp_path: Path, file: str) -> None:
    base, adapter = inputs_at(tmp_path)
    save(tmp_path / "secret.safetensors", {"model.norm.weight": base_tensors()["model.norm.weight"]})
    edit_index(base, lambda weights: weights.update({"model.norm.weight": file}))
    refused(3, "is refused as unsafe", "the shard name", base=base, adapters=adapter)


def test_one_shard_of_a_sharded_checkpoint_is_not_taken_for_a_base(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    outcome = call("run", base / FIRST, adapter, "-o", tmp_path / "out")
    assert outcome.code == 3
    assert "is only part of the checkpoint beside it" in outcome.err
    assert f"hint: give the directory `{base}`" in outcome.err
    assert not (tmp_path / "out").exists()


# --- malformed ------------------------------------------------------------------------------------------------------
MALFORMED = {
    "config.json cut short": (BASE_CONFIG, lambda data: data[:-20], "not JSON"),
    "config.json a list": (BASE_CONFIG, lambda data: b"[]", "not a JSON object at the top"),
    "config.json with NaN": (BASE_CONFIG, lambda data: b'{"rope_theta": NaN}', "NaN is not a JSON number"),
    "config.json with a key twice": (BASE_CONFIG, lambda data: b'{"a": 1, "a": 2}', "the key `a` stands twice"),
    "config.json not UTF-8": (BASE_CONFIG, lambda data: b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    "config.json nested to death": (BASE_CONFIG, lambda data: b'{"a":' * 9999, "nested deeper than"),
    "the index cut short": (INDEX, lambda data: data[:-9], "not JSON"),
    "the index without a map": (INDEX, lambda data: b'{"metadata": {}}', "no `weight_map` object"),
    "a header that lies about its length": (FIRST, lambda data: b"\xff" * 8 + data[8:], "header"),
    "a header that is no JSON": (FIRST, lambda data: data[:8] + b"x" + data[9:], "start with `{`"),
    "a shard cut short": (FIRST, lambda data: data[:-1], "bytes"),
    "a shard with bytes to spare": (FIRST, lambda data: data + b"\0", "bytes"),
    "an empty shard": (FIRST, lambda data: b"", "too short"),
    "a pointer of Git LFS": (FIRST, lambda data: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
}


@pytest.mark.parametrize(("file", "damage", "words"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_base_is_refused_by_file_and_reason(
    tmp_path: Path, file: str, damage: Callable[[bytes], bytes], words: str
) -> None:
    base, adapter = inputs_at(tmp_path)
    (base / file).write_bytes(damage((base / file).read_bytes()))
    refused(3, file, words, base=base, adapters=adapter)


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("adapter_config.json", b"{", "not JSON"),
        ("adapter_config.json", b'{"r": 8, "r": 16}', "the key `r` stands twice"),
        ("adapter_model.safetensors", b"\x80\x02}q\x00.", "malformed"),
        ("adapter_model.safetensors", b"", "too short"),
    ],
)
def test_a_malformed_adapter_is_refused(tmp_path: Path, file: str, data: bytes, words: str) -> None:
    base, adapter = inputs_at(tmp_path)
    (adapter / file).write_bytes(data)
    refused(3, file, words, base=base, adapters=adapter)


# --- unsafe ---------------------------------------------------------------------------------------------------------
def test_a_link_that_leads_out_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (base / SECOND).rename(tmp_path / "elsewhere.safetensors")
    (base / SECOND).symlink_to(tmp_path / "elsewhere.safetensors")
    words = ("is refused as unsafe: a link that leads out of the checkpoint", SECOND)
    refused(3, *words, base=base, adapters=adapter)


def test_a_sidecar_that_links_out_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (tmp_path / "secret").write_text("secret")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    refused(3, "notes.txt` is refused as unsafe: a link that leads out", base=base, adapters=adapter)


def test_a_link_inside_the_checkpoint_is_followed_and_becomes_a_file(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (base / SECOND).rename(base / "stored.safetensors")
    (base / SECOND).symlink_to("stored.safetensors")
    (base / "alias.json").symlink_to("generation_config.json")
    merged(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / SECOND).is_symlink()
    assert not (tmp_path / "out" / "alias.json").is_symlink()
    assert (tmp_path / "out" / "alias.json").read_bytes() == (base / "generation_config.json").read_bytes()


@pytest.mark.parametrize("file", [BASE_CONFIG, INDEX, FIRST, "notes.txt"])
def test_a_pipe_in_a_base_is_refused_without_waiting_for_it(tmp_path: Path, file: str) -> None:
    base, adapter = inputs_at(tmp_path)
    (base / file).unlink(missing_ok=True)
    os.mkfifo(base / file)
    refused(3, f"{file}` is refused as unsafe: not a regular file", base=base, adapters=adapter)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_an_adapter_is_refused_without_waiting_for_it(tmp_path: Path, file: str) -> None:
    base, adapter = inputs_at(tmp_path)
    (adapter / file).unlink()
    os.mkfifo(adapter / file)
    refused(3, f"{file}` is refused as unsafe: not a regular file", base=base, adapters=adapter)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    if os.geteuid() == 0:
        # Nothing is forbidden to root; a directory in the place of a file cannot be read by anybody.
        (base / BASE_CONFIG).unlink()
        (base / BASE_CONFIG).mkdir()
        refused(3, BASE_CONFIG, base=base, adapters=adapter)
        return
    (base / BASE_CONFIG).chmod(0)
    refused(3, f"cannot open `{base / BASE_CONFIG}`: Permission denied", base=base, adapters=adapter)


# --- changing while they are read -----------------------------------------------------------------------------------
def changing(base: Path, adapter: Path, out: Path, change: Callable[[], None], **options: object) -> InputReadError:
    """Merge, change something when the run has begun, and hand back what it was stopped by."""

    def progress(event: Event) -> None:
        if event.kind == "start":
            change()

    with pytest.raises(InputReadError) as caught:
        api.merge(base, adapter, out, progress=progress, workers=1, **options)
    assert caught.value.exit_code == 3
    assert_nothing_loadable(out)
    return caught.value


@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_a_base_that_shrinks_while_it_is_read_is_an_error_message(tmp_path: Path, read: str) -> None:
    base, adapter = inputs_at(tmp_path)
    size = (base / FIRST).stat().st_size
    error = changing(base, adapter, tmp_path / "out", lambda: os.truncate(base / FIRST, 100), read=read)
    assert f"it had {size:,} bytes and has 100 now" in str(error)


@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_a_base_that_is_written_to_while_it_is_read_is_an_error_message(tmp_path: Path, read: str) -> None:
    base, adapter = inputs_at(tmp_path)

    def change() -> None:
        with (base / SECOND).open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\x7f")
        os.utime(base / SECOND, ns=(1, 1))

    error = changing(base, adapter, tmp_path / "out", change, read=read)
    assert f"cannot read `{base / SECOND}`: the file changed while it was being used: it was modified" in str(error)


def test_a_shard_that_is_exchanged_during_the_run_is_an_error_message(tmp_path: Path) -> None:
    shards = 7  # more than are held open at a time, so that the first is opened a second time
    base, adapter = make_base(tmp_path / "base", shards=shards), make_adapter(tmp_path / "adapter")
    first = base / shard_name(0, shards)

    def change() -> None:
        other = tmp_path / "other"
        other.write_bytes(first.read_bytes()[:-1] + b"\x7f")
        other.replace(first)

    error = changing(base, adapter, tmp_path / "out", change)
    assert f"`{first}`" in str(error)
