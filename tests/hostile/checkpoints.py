"""Indexes, configs and links of a base that lead elsewhere, wait for ever, or say what cannot be."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from tests.hostile.case import SHARD, Case, Place, fifo, fine, malformed, missing, unfit, unsafe
from tests.refusals.making import BASE_CONFIG, CONFIG, INDEX, shard_name

SECOND = shard_name(1, 2)
DEEP = "[" * 100_000


def all_in(file: str) -> Callable[[Place], object]:
    """An index that says of the first shard's tensors that they lie in `file`."""

    def spoil(place: Place) -> None:
        place.index(lambda found: found.update({name: file for name, where in found.items() if where == SHARD}))

    return spoil


def raw_index(text: str) -> Callable[[Place], object]:
    """Another index, as text."""
    return lambda place: place.write(f"base/{INDEX}", text)


def raw_config(data: bytes | str) -> Callable[[Place], object]:
    """Another config, as bytes."""
    return lambda place: place.write(f"base/{BASE_CONFIG}", data)


def config(**changes: object) -> Callable[[Place], object]:
    """A config with other values."""
    return lambda place: place.config(**changes)


def linked(name: str, target: str) -> Callable[[Place], object]:
    """A link in the base."""
    return lambda place: place.link(f"base/{name}", target)


def piped(name: str) -> Callable[[Place], object]:
    """A pipe in the base."""
    return lambda place: place.special(f"base/{name}", fifo)


def listening(path: str) -> None:
    """A socket."""
    here = os.getcwd()
    os.chdir(Path(path).parent)  # a socket's address is short
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(Path(path).name)
    os.chdir(here)


def a_folder(path: str) -> None:
    """A directory."""
    Path(path).mkdir()


def linked_folder(place: Place) -> None:
    """A base that is a link to a folder, whose files lead out of neither."""
    shutil.move(place.base, place.root / "real")
    place.base.symlink_to("real")


def through_a_link(place: Place) -> None:
    """A shard behind a link to a folder inside the base, and `..` after it."""
    (place.base / "a" / "b").mkdir(parents=True)
    place.link("base/c", "a/b")
    place.link(f"base/{SHARD}", "c/../../../outside/model.safetensors")


def in_cache(place: Place, target: str) -> None:
    """The base as a snapshot in a cache of the Hub, with its first shard a link to `target`."""
    home = place.root / "cache" / "models--org--name"
    (home / "snapshots").mkdir(parents=True)
    (home / "blobs").mkdir()
    other = place.root / "cache" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    snapshot = home / "snapshots" / ("0" * 40)
    shutil.move(place.base, snapshot)
    for folder in (home / "blobs", other):
        shutil.copy(snapshot / SHARD, folder / ("a" * 64))
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(target)
    place.base_argument = str(snapshot)


def cached(target: str) -> Callable[[Place], object]:
    """See `in_cache`."""
    return lambda place: in_cache(place, target)


def many(entry: str, count: int) -> str:
    """An index with very many entries."""
    return '{"weight_map":{' + ",".join(f'"{number}":{entry}' for number in range(count)) + "}}"


TRAVERSALS = {
    "two dots": "../outside/model.safetensors",
    "a path that stays inside": f"./{SHARD}",
    "an absolute path": "/etc/model.safetensors",
    "a subfolder": f"sub/{SHARD}",
    "a backslash": "..\\outside\\model.safetensors",
    "a drive": "C:model.safetensors",
    "a share": "\\\\server\\share\\model.safetensors",
    "a stream": f"{SHARD}:stream.safetensors",
    "a device of Windows": "CON.safetensors",
    "a device with a superscript": "COM¹.safetensors",
    "a name that ends with a space": f"{SHARD} ",
    "a name that ends with a dot": f"{SHARD}.",
    "NUL": "model\0.safetensors",
    "a line feed": "model\nerror: forged.safetensors",
    "an escape sequence": "\x1b[2J.safetensors",
    "nothing": "",
    "a dot": ".",
    "the folder above": "..",
    "/proc": "/proc/self/mem.safetensors",
    "a URL": "https://example.org/model.safetensors",
}
INDEXES = (
    *(unsafe(f"index: {name}", all_in(file), "the shard name") for name, file in TRAVERSALS.items()),
    malformed("index: a shard of code", all_in("code.py"), "neither a `.safetensors` nor a `.bin` file"),
    malformed("index: nothing but a suffix", all_in(".safetensors"), "neither a `.safetensors`"),
    malformed("index: safetensors and torch files", all_in("model.bin"), "`.safetensors` and `.bin` shards"),
    missing("index: a shard with a bidirectional name", all_in("a\u202eb.safetensors"), "a\\u202eb", "is not there"),
    missing("index: a shard with a name of 10,000 characters", all_in("x" * 10_000 + ".safetensors"), "characters)"),
    missing("index: a shard that is not there", all_in("other.safetensors"), "is named by the index"),
    malformed(
        "index: a tensor in two shards",
        lambda place: place.write(f"base/{SECOND}", (place.base / SHARD).read_bytes()),
        "disagrees with its shards",
    ),
    malformed(
        "index: a name twice",
        raw_index(f'{{"weight_map":{{"a":"{SHARD}","a":"{SECOND}"}}}}'),
        "the key `a` stands twice",
    ),
    malformed("index: two weight maps", raw_index('{"weight_map":{"a":"b"},"weight_map":{}}'), "`weight_map` stands"),
    malformed("index: a list", raw_index('{"weight_map":[]}'), "no `weight_map` object"),
    malformed("index: empty", raw_index('{"weight_map":{}}'), "at least one tensor"),
    malformed("index: a number for a shard", raw_index('{"weight_map":{"a":1}}'), "is not a string"),
    malformed("index: a list for a shard", raw_index('{"weight_map":{"a":["b"]}}'), "is not a string"),
    malformed("index: a control character", raw_index('{"weight_map":{"a\\u001b":"b"}}'), "control character"),
    malformed("index: a lone surrogate", raw_index('{"weight_map":{"a\\ud800":"b"}}'), "lone surrogate"),
    malformed("index: NaN", raw_index('{"metadata":{"total_size":NaN},"weight_map":{"a":"b"}}'), "NaN is not"),
    malformed("index: a number out of range", raw_index('{"metadata":{"total_size":1e999}}'), "out of range"),
    malformed("index: a number of a million digits", raw_index(f'{{"a":{"9" * 1_000_000}}}'), "1000000 digits"),
    malformed("index: deep", raw_index(f'{{"weight_map":{DEEP}'), "nested deeper"),
    malformed("index: deep in objects", raw_index('{"a":' * 100_000), "nested deeper"),
    malformed("index: cut off", raw_index('{"weight_map":{"a":'), "not JSON"),
    malformed("index: a byte order mark", raw_index("\ufeff{}"), "not JSON"),
    malformed("index: two million tensors", raw_index(many(f'"{SHARD}"', 1_000_000)), "30,000,000 are read"),
    malformed("index: empty objects", raw_index(many("{}", 700_000)), "hold so many values"),
    malformed("index: a string of 29 MB", raw_index('{"a":"' + "x" * 29_000_000 + '"}'), "no `weight_map` object"),
    malformed("index: backslashes", raw_index('{"a":"' + "\\" * 9_000_001), "not JSON"),
)
LINKS = (
    unsafe("link: a shard out of the base", linked(SHARD, "../outside/model.safetensors"), "a link that leads out"),
    unsafe("link: a shard to a device", linked(SHARD, "/dev/zero"), "a link that leads out"),
    unsafe("link: a shard to this process's memory", linked(SHARD, "/proc/self/mem"), "a link that leads out"),
    unsafe("link: a shard through a folder and back", through_a_link, "a link that leads out"),
    unsafe("link: the config out of the base", linked(BASE_CONFIG, "../outside/secret.json"), "a link that leads out"),
    unsafe("link: the index out of the base", linked(INDEX, "../outside/secret.json"), "a link that leads out"),
    missing("link: a shard to nothing", linked(SHARD, "nothing"), "is not there"),
    missing("link: a shard to itself", linked(SHARD, SHARD), "is not there"),
    unsafe("link: a shard to a device inside", lambda place: place.special(f"base/{SHARD}", device), "not a regular"),
    unsafe("pipe: a shard", piped(SHARD), "not a regular file"),
    unsafe("pipe: the config", piped(BASE_CONFIG), "not a regular file"),
    unsafe("pipe: the index", piped(INDEX), "not a regular file"),
    Case(
        "socket: a shard",
        lambda place: place.special(f"base/{SHARD}", listening),
        3,
        "InputReadError",
        ("cannot open", "No such device"),
    ),
    unsafe("folder: a shard", lambda place: place.special(f"base/{SHARD}", a_folder), "not a regular file"),
    unsafe("folder: the config", lambda place: place.special(f"base/{BASE_CONFIG}", a_folder), "not a regular file"),
    unsafe("cache: a blob of another repository", cached("../../../models--org--other/blobs/" + "a" * 64), "leads out"),
    unsafe("cache: a file outside", cached("../../../../outside/model.safetensors"), "leads out"),
    unsafe("cache: a pipe", lambda place: (in_cache(place, "x"), cached_pipe(place)), "not a regular file"),
    fine("cache: a blob of its own", cached("../../blobs/" + "a" * 64)),
    fine("link: a base that is a link", linked_folder),
    fine("link: a shard inside the base", lambda place: (rename_shard(place), place.link(f"base/{SHARD}", "real.dat"))),
)
CONFIGS = (
    malformed("config: NaN", raw_config('{"a":NaN}'), "NaN is not a JSON number"),
    malformed("config: Infinity", raw_config('{"a":-Infinity}'), "-Infinity is not"),
    malformed("config: a list", raw_config("[]"), "not a JSON object"),
    malformed("config: empty braces twice", raw_config("{}{}"), "not JSON"),
    malformed("config: a key twice", raw_config('{"a":1,"a":1}'), "`a` stands twice"),
    malformed("config: deep", raw_config('{"a":' * 50_000), "nested deeper"),
    malformed("config: UTF-16", raw_config(json.dumps(CONFIG).encode("utf-16")), "not UTF-8"),
    malformed("config: zeros", raw_config(bytes(1000)), "not JSON"),
    malformed("config: a lone surrogate", raw_config('{"architectures":["\\udc00"]}'), "lone surrogate"),
    malformed("config: 40 MB", raw_config(b"{" + b" " * 40_000_000 + b"}"), "at most 30,000,000 are read"),
    unfit("NotMergeableError")(
        "config: a quantization with an escape sequence",
        config(quantization_config={"quant_method": "\x1b[2J"}),
        "\\x1b[2J",
    ),
    fine(
        "config: an architecture that hides its name",
        config(architectures=["A\u202eB"], model_type="none"),
        "`A\\u202eB` is not in",
    ),
    fine("config: 10^30 layers", config(num_hidden_layers=10**30)),
    fine("config: minus one layer", config(num_hidden_layers=-1)),
    fine("config: a vocabulary of 10^30", config(vocab_size=10**30)),
    fine("config: sizes that are text", config(hidden_size="\x1b[2J", num_attention_heads=None)),
    fine("config: code elsewhere", config(auto_map={"AutoModel": "../../outside/code.Model"})),
    fine("config: 100,000 architectures", config(architectures=["A"] * 100_000)),
    fine("config: 10^12 experts", config(num_experts=10**12, num_local_experts=10**12)),
)


def device(path: str) -> None:
    """/dev/zero once more."""
    os.mknod(path, 0o020666, os.makedev(1, 5))


def cached_pipe(place: Place) -> None:
    """A pipe among the blobs."""
    snapshot = Path(place.base_argument)
    blob = snapshot.parents[1] / "blobs" / ("b" * 64)
    os.mkfifo(blob)
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(f"../../blobs/{blob.name}")


def rename_shard(place: Place) -> None:
    """The shard under another name, for a link to lead to."""
    (place.base / SHARD).rename(place.base / "real.dat")


CASES: tuple[Case, ...] = (*INDEXES, *LINKS, *CONFIGS)
