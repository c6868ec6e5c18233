"""Damage a finished output in every way there is, one at a time, and verify it: every flipped bit, and every file that
is missing, one too many, swapped, renamed, shorter or longer, must be found and named.

    python -m tests.campaigns.bit_flips FOLDER --flips N --seed S

Files are chosen alike whatever their size, and half of the bits of a weight file lie in its header. Prints one JSON
object: how many cases were tried of which kind, and each that was not found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import streammerge
from streammerge.core.errors import StreamMergeError
from tests.campaigns.kills import BLOCK, PIECE
from tests.refusals.making import MARKER
from tests.sinks.subjects import make_small, make_subject
from tests.verification.outputs import ORIGIN

FOUND, UNFINISHED = 6, 5
"""Exit codes of a verification that failed, and of one of something that is no finished output."""
EXTRA = (
    "model.safetensors", "model-00003-of-00002.safetensors", "sub/x.safetensors", "pytorch_model.bin", "model.gguf",
    "pytorch_model.bin.index.json", "adapter_config.json", "modeling_evil.py", "tokenizer.json", "chat_template.jinja",
    "added_tokens.json", "sub/config.json", "consolidated.safetensors", "nameless",
)  # fmt: skip


def make_output(root: Path) -> Path:
    """An output of several shards with many blocks, an index, and sidecars: in a folder, empty, larger than a block."""
    base, adapters = make_subject(root, "BF16")
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("notes " * 6000)
    (base / "empty.txt").write_text("")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 1e-05, "name": "\u00fc"}))
    streammerge.merge(base, adapters, root / "out", sha256=True, workers=1)
    return root / "out"


class Campaign:
    """One output, damaged again and again, and what was not found."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.random = out, random.Random(seed)
        self.files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
        self.shards = [name for name in self.files if name.endswith(".safetensors")]
        self.tried: Counter[str] = Counter()
        self.wrong: list[str] = []

    def expect(self, kind: str, case: str, *names: str, code: int = FOUND, words: str = "") -> None:
        """Verify the output, and see that it fails with `code`, naming the files and saying `words`."""
        self.tried[kind] += 1
        try:
            streammerge.verify(self.out, sample=None, workers=1)
            self.wrong.append(f"{kind} {case}: not found")
        except StreamMergeError as error:
            text = f"{error.summary()} {getattr(error, 'problems', '')}"
            if error.exit_code != code:
                self.wrong.append(f"{kind} {case}: exit code {error.exit_code}, {text[:200]}")
            self.wrong += [
                f"{kind} {case}: `{name}` is not named in {text[:200]}" for name in names if name not in text
            ]
            if words not in text:
                self.wrong.append(f"{kind} {case}: `{words}` is not in {text[:200]}")
        except Exception as error:
            self.wrong.append(f"{kind} {case}: {type(error).__name__}: {error}")

    def flip(self) -> None:
        """Flip one bit of one file, verify, and flip it back."""
        name = self.random.choice([name for name in self.files if (self.out / name).stat().st_size])
        path = self.out / name
        size, header = path.stat().st_size, 0
        if name in self.shards:
            with path.open("rb") as file:
                header = 8 + struct.unpack("<Q", file.read(8))[0]
        in_header = bool(header) and self.random.random() < 0.5
        byte = self.random.randrange(header) if in_header else self.random.randrange(header, size)
        bit = self.random.randrange(8)
        kind = "header" if in_header else "weights" if header else name
        block = byte // BLOCK
        words = f"bytes {block * BLOCK:,} to {min((block + 1) * BLOCK, size):,}" if kind == "weights" else ""
        self._flip(path, byte, bit)
        self.expect(f"flip in {kind}", f"{name} byte {byte} bit {bit}", name, words=words)
        self._flip(path, byte, bit)

    def _flip(self, path: Path, byte: int, bit: int) -> None:
        with path.open("r+b") as file:
            file.seek(byte)
            (value,) = file.read(1)
            file.seek(byte)
            file.write(bytes([value ^ 1 << bit]))

    @contextmanager
    def put_back(self, *names: str) -> Iterator[None]:
        """Within `with`, these files may be damaged."""
        whole = {name: (self.out / name).read_bytes() for name in names}
        yield
        for name, data in whole.items():
            (self.out / name).unlink(missing_ok=True)
            (self.out / name).write_bytes(data)

    def whole_files(self) -> None:
        """Every file missing, renamed, replaced, of another length; every pair swapped; every extra file."""
        optional = {ORIGIN}
        for name in self.files:
            path = self.out / name
            with self.put_back(name):
                if name not in optional:
                    path.unlink()
                    code = UNFINISHED if name == MARKER else FOUND
                    self.expect("missing", name, name, code=code)
                    path.write_bytes(b"")
                    path.rename(path.with_name(f"{path.name}x"))
                    self.expect("renamed", name, name, code=code)
                    path.with_name(f"{path.name}x").unlink()
            with self.put_back(name):
                os.truncate(path, max(0, path.stat().st_size - 1))
                if name != "empty.txt":
                    self.expect("shorter", name, name)
            for more in (b"\0", b"\n", b" ", b"\0" * 4096):
                with self.put_back(name):
                    path.write_bytes(path.read_bytes() + more)
                    self.expect("longer", f"{name} by {more[:1]!r}", name)
            with self.put_back(name):
                path.write_bytes(b"")
                if name != "empty.txt":
                    self.expect("emptied", name, name)
        for first in self.files:
            for second in (name for name in self.files if name > first):
                self._swap(first, second)
        for name in EXTRA:
            self._extra(name)

    def _swap(self, first: str, second: str) -> None:
        with self.put_back(first, second):
            one, two = (self.out / first).read_bytes(), (self.out / second).read_bytes()
            (self.out / first).write_bytes(two)
            (self.out / second).write_bytes(one)
            # Where the report or the record of the inputs is not to be read, nothing else can be.
            name = MARKER if MARKER in (first, second) else first
            self.expect("swapped", f"{first} and {second}", name)

    def _extra(self, name: str) -> None:
        path = self.out / name
        folder_was_there = path.parent.exists()
        path.parent.mkdir(exist_ok=True)
        shutil.copy(self.out / self.shards[0], path)
        self.expect("extra", name, name)
        path.unlink()
        if not folder_was_there:
            path.parent.rmdir()


def main() -> None:
    """Run the campaign that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    make_small(pytest.MonkeyPatch(), piece=PIECE, block=BLOCK)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(make_output(arguments.folder), arguments.seed)
    shutil.rmtree(arguments.folder / "base")  # digests only: the bits are to be found without the inputs
    assert streammerge.verify(campaign.out).status == "verified"
    for _ in range(arguments.flips):
        campaign.flip()
    campaign.whole_files()
    assert streammerge.verify(campaign.out).status == "verified", "it was not put back"
    found = {
        "campaign": "bit_flips",
        "points": campaign.tried.total(),
        "flips": arguments.flips,
        "tried": campaign.tried,
        "wrong": campaign.wrong,
        "seconds": round(time.monotonic() - began, 1),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
