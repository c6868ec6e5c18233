"""Large texts that are made to take memory, read from disk as a merge reads them, each in a process of its own.

A parser that makes objects of its input takes many times the input's size; the bound is 64 MiB and 16 times the input,
whether the text is read or refused.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.errors import StreamMergeError
from streammerge.formats.index import parse_index
from streammerge.formats.safetensors import read_header
from streammerge.methods.lora_config import parse_config
from tests.fuzz.targets import LONGEST_MESSAGE

FREE, FACTOR = 64 * 2**20, 16
SECONDS_EACH = 3e-6
"""For each byte, what a text may take of the processor's time, beyond a second."""


def repeated(start: bytes, unit: bytes, end: bytes) -> Callable[[int], bytes]:
    """A text of about a given size that is mostly one unit."""
    return lambda size: start + unit * (size // len(unit)) + end


def numbered(start: str, unit: str, end: str) -> Callable[[int], bytes]:
    """The same, with a number where the unit has a `%x`."""
    return lambda size: (start + ",".join(unit % number for number in range(size // (len(unit) + 3))) + end).encode()


JSON: Mapping[str, Callable[[int], bytes]] = {
    "empty lists": repeated(b'{"a":[[]', b",[]", b"]}"),
    "empty objects": repeated(b'{"a":[{}', b",{}", b"]}"),
    "lists of one": repeated(b'{"a":[[]', b",[1]", b"]}"),
    "objects of one": repeated(b'{"a":[{}', b',{"k":0}', b"]}"),
    "zeros": repeated(b'{"a":[0', b",0", b"]}"),
    "integers": repeated(b'{"a":[0', b",999", b"]}"),
    "floats": repeated(b'{"a":[0', b",1e9", b"]}"),
    "short strings": repeated(b'{"a":["b"', b',"bc"', b"]}"),
    "strings beyond the first plane": repeated(b'{"a":["b"', ',"\U0001f600b"'.encode(), b"]}"),
    "strings of two bytes a character": repeated(b'{"a":["b"', ',"\u20acb"'.encode(), b"]}"),
    "strings of Latin characters": repeated(b'{"a":["b"', ',"\u00e9b"'.encode(), b"]}"),
    "keys beyond the first plane": numbered("{", '"\U0001f600%x":0', "}"),
    "one string": repeated(b'{"a":"', b"a", b'"}'),
    "one string, one character of four bytes": repeated(b'{"a":"', b"a", '\U0001f600"}'.encode()),
    "one string of escapes": repeated(b'{"a":"', b"\\u0800", b'"}'),
    "one key": repeated(b'{"', b"a", b'":0}'),
    "one word": repeated(b"{", b"a", b"}"),
    "one number": repeated(b'{"a":', b"1", b"}"),
    "spaces": repeated(b"{", b" ", b"}"),
    "open lists": repeated(b'{"a":', b"[", b""),
    "closed lists": repeated(b'{"a":', b"]", b""),
    "quotes": repeated(b'{"a":', b'"', b"}"),
    "backslashes": repeated(b'{"a":"', b"\\", b'"}'),
    "not UTF-8": repeated(b'{"a":"', b"a", b'\xff"}'),
    "keys": numbered("{", '"%x":0', "}"),
    "unknown fields": numbered("{", '"%x":1', "}"),
    "a key twice at the end": numbered('{"a":0,', '"_%x":0', ',"a":0}'),
    "brackets in a string": repeated(b'{"a":"', b"[{", b'"}'),
}
"""Texts that are tried as header, as index and as config."""
OWN: Mapping[str, Mapping[str, Callable[[int], bytes]]] = {
    "header": {
        "empty tensors": numbered("{", '"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', "}"),
        "metadata": numbered('{"__metadata__":{', '"%x":""', "}}"),
        "metadata in escapes": numbered('{"__metadata__":{', '"%x":"\\u0800"', "}}"),
        "dimensions": repeated(b'{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[0', b",1", b"]}}"),
    },
    "index": {
        "shards of one name": numbered('{"weight_map":{', '"%x":"a.bin"', "}}"),
        "shards of many names": numbered('{"weight_map":{', '"%x":"a%%d.bin"', "}}"),
        "one shard with a long name": repeated(b'{"weight_map":{"a":"', b"a", b'.bin"}}'),
    },
    "config": {
        "modules": repeated(b'{"peft_type":"LORA","target_modules":["b"', b',"b"', b"]}"),
        "patterns": numbered('{"peft_type":"LORA","rank_pattern":{', '"layers.%x.q":4', "}}"),
        "a list for a number": repeated(b'{"peft_type":"LORA","r":[1', b",1", b"]}"),
        "a long version": repeated(b'{"peft_version":"1.', b"1", b'"}'),
        "token rows": repeated(b'{"trainable_token_indices":[0', b",1", b"]}"),
    },
}


def as_header(path: Path) -> None:
    """Read a shard's header."""
    read_header(path, path.name)


def as_index(path: Path) -> None:
    """Read an index."""
    parse_index(io.read_file(path, strict_json.MAX_BYTES), str(path))


def as_config(path: Path) -> None:
    """Read an adapter's config."""
    parse_config(strict_json.loads(io.read_file(path, strict_json.MAX_BYTES), str(path), nan_ok=True))


READERS: Mapping[str, Callable[[Path], None]] = {"header": as_header, "index": as_index, "config": as_config}


TEXTS = [(parser, name, make) for parser in READERS for name, make in {**JSON, **OWN[parser]}.items()]


def swept(folder: Path, sizes: Iterable[int], step: int = 1) -> dict[str, Any]:
    """Every `step`-th text in all sizes: what was wrong, and the greatest memory and time."""
    path = folder / "text"
    wrong, worst, slowest, count = [], 0.0, 0.0, 0
    for parser, name, make, size in [(*text, size) for size in sizes for text in TEXTS[::step]]:
        text = make(size)
        path.write_bytes(len(text).to_bytes(8, "little") * (parser == "header") + text)
        found = measured(lambda parser=parser: READERS[parser](path))
        count += 1
        worst = max(worst, (found["bytes"] - FREE) / len(text))
        slowest = max(slowest, found["seconds"] / len(text) * 1e6)
        wrong += [f"{parser}, {name}, {len(text):,} bytes: {problem}" for problem in problems(found, len(text))]
    path.unlink(missing_ok=True)
    return {
        "wrong": wrong, "texts": count, "times_its_size_beyond_64_mib": round(worst, 1),
        "slowest_s_for_a_megabyte": round(slowest, 2),
    }  # fmt: skip


def problems(found: Mapping[str, Any], size: int) -> list[str]:
    """What of a reading is out of bounds."""
    wrong = [found["error"]] if found["error"] else []
    if found["bytes"] > FREE + FACTOR * size:
        wrong.append(f"{found['bytes'] / 2**20:.0f} MiB")
    if found["seconds"] > 1 + SECONDS_EACH * size:
        wrong.append(f"{found['seconds']:.1f} s")
    if found["message"] > LONGEST_MESSAGE:
        wrong.append(f"a message of {found['message']:,} characters")
    return wrong


def measured(read: Callable[[], None]) -> dict[str, Any]:
    """What a reading takes in a fork of this process: bytes at its peak, seconds of the processor, and an error that
    should not be."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        result: dict[str, Any] = {"error": "", "message": 0}
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before, began = peak(), time.process_time()
            try:
                read()
            except StreamMergeError as error:
                result["message"] = len(str(error))
            result |= {"bytes": peak() - before, "seconds": time.process_time() - began}
        except BaseException as error:
            result |= {"error": f"{type(error).__name__}: {error}"[:300], "bytes": 0, "seconds": 0}
        finally:
            os.write(send, json.dumps(result).encode())
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        text = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not text:
        return {"error": f"the process ended with {status}", "message": 0, "bytes": 0, "seconds": 0}
    return dict(json.loads(text))


def peak() -> int:
    """The most memory this process has had since its peak was last set anew, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
