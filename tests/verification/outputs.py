"""Finished outputs, ways to damage them, and what a verification must then say."""

from __future__ import annotations

from pathlib import Path

from tests.refusals.making import (
    Outcome,
    call,
    inputs_at,
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
    assert "do not use this output; merge again, into a new directory or with `--overwrite`" in outcome.err
    for word in words:
        assert word in outcome.err, f"`{word}` is not in\n{outcome.err}"
    assert tree_digest(out) == before
    return outcome
