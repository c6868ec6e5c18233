"""Writing that fails, at every operation and at several of its calls: exit 7 with the path and the operation, nothing
that a loader takes is left, and the same command then finishes with the bytes of an undisturbed run."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streammerge.compute.produce import Producer
from streammerge.core import io
from tests.refusals.making import (
    BASE_CONFIG,
    INDEX,
    MARKER,
    STAGING,
    Outcome,
    assert_nothing_loadable,
    call,
    inputs_at,
    merged,
    shard_name,
    tree_digest,
)

FIRST, SECOND = shard_name(0, 2), shard_name(1, 2)


def failing(real: Callable[..., Any], code: int, *, when: Callable[..., bool], at: int = 0) -> Callable[..., Any]:
    """A system call that fails with `code` from its call number `at` on, of those that `when` picks."""
    calls = iter(range(10**6))

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if when(*arguments) and next(calls) >= at:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **named)

    return wrapped


def always(*arguments: Any) -> bool:
    return True


def creating(path: str, flags: int, *mode: int) -> bool:
    return bool(flags & os.O_CREAT)


def disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_name: str, code: int, when: Callable[..., bool], at: int
) -> Outcome:
    """A run in which a system call fails, and then the same command undisturbed."""
    base, adapter = inputs_at(tmp_path)
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("notes")
    merged(base, adapter, tmp_path / "healthy")
    before = tree_digest(base)
    with monkeypatch.context() as patch:
        home = io if call_name == "fallocate" else os
        patch.setattr(home, call_name, failing(getattr(home, call_name), code, when=when, at=at))
        outcome = call("run", base, adapter, "-o", tmp_path / "out", "-j", 1)
    assert outcome.code == 7, outcome.err
    assert outcome.out == ""
    assert outcome.err.splitlines()[-1].startswith("error: cannot ")
    assert tree_digest(base) == before
    assert_nothing_loadable(tmp_path / "out")
    merged(base, adapter, tmp_path / "out")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "healthy")
    return outcome


FAILURES = {
    "no directory can be made": ("mkdir", errno.EACCES, always, 0, "cannot create the directory", "Permission denied"),
    "no file can be made": ("open", errno.EROFS, creating, 0, "cannot create `", "Read-only file system"),
    "a later file cannot be made": ("open", errno.EMFILE, creating, 2, "cannot create `", "Too many open files"),
    "no space can be reserved": ("fallocate", errno.ENOSPC, always, 0, "reserve space for", "No space left"),
    "the first write fails": ("pwrite", errno.EIO, always, 0, "cannot write `", "Input/output error"),
    "a write in the middle fails": ("pwrite", errno.ENOSPC, always, 2, "cannot write `", "No space left on device"),
    "a late write fails": ("pwrite", errno.EDQUOT, always, 8, "cannot write `", "quota"),
    "the first sync fails": ("fsync", errno.EIO, always, 0, "cannot sync `", "Input/output error"),
    "a shard's sync fails": ("fsync", errno.EIO, always, 3, "cannot sync `", "Input/output error"),
    "the first rename fails": ("replace", errno.EIO, always, 0, "cannot rename into `", "run.json"),
    "a staged rename fails": ("replace", errno.EIO, always, 1, "cannot rename into `", ".safetensors"),
    "staging a sidecar fails": ("replace", errno.EIO, always, 3, "cannot rename into `", "generation_config.json"),
    "publishing the first shard fails": ("replace", errno.EIO, always, 5, "cannot rename into `", FIRST),
    "publishing the second shard fails": ("replace", errno.EIO, always, 6, "cannot rename into `", SECOND),
    "publishing a sidecar fails": ("replace", errno.EIO, always, 8, "cannot rename into `", "sub/notes.txt"),
    "publishing the index fails": ("replace", errno.EIO, always, 10, "cannot rename into `", INDEX),
    "publishing the config fails": ("replace", errno.EIO, always, 11, "cannot rename into `", BASE_CONFIG),
    "publishing the report fails": ("replace", errno.EIO, always, 12, "cannot rename into `", MARKER),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_while_writing_leaves_nothing_loadable_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    call_name, code, when, at, *words = FAILURES[failure]
    outcome = disturbed(tmp_path, monkeypatch, call_name, code, when, at)
    for word in words:
        assert word in outcome.err


def test_a_failure_after_all_was_made_leaves_all_to_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    with monkeypatch.context() as patch:
        once = failing(os.replace, errno.EIO, when=lambda source, target: str(target).endswith(f"out/{SECOND}"))
        patch.setattr(os, "replace", once)
        assert call("run", base, adapter, "-o", tmp_path / "out").code == 7
    assert_nothing_loadable(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Producer, "fill", lambda *_: pytest.fail("made again"))
        outcome = call("run", base, adapter, "-o", tmp_path / "out", "--no-verify")
    assert outcome.code == 0, outcome.err
    assert "resuming: " in outcome.err


def test_a_failure_before_anything_was_made_leaves_an_empty_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(os.pwrite, errno.EIO, when=always, at=2))
        assert call("run", base, adapter, "-o", tmp_path / "out").code == 7
    assert list((tmp_path / "out").iterdir()) == []


def test_a_device_that_is_gone_for_good_leaves_an_unfinished_run_and_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(os.pwrite, errno.EIO, when=always, at=5))
        patch.setattr(os, "unlink", failing(os.unlink, errno.EROFS, when=lambda path, **_: Path(path).exists()))
        outcome = call("run", base, adapter, "-o", tmp_path / "out", "-j", 1)
    assert outcome.code == 7
    assert "cannot write `" in outcome.err
    assert "Input/output error" in outcome.err
    assert list((tmp_path / "out" / STAGING).glob("*/run.json"))
    assert_nothing_loadable(tmp_path / "out")
    merged(base, adapter, tmp_path / "out")
    merged(base, adapter, tmp_path / "healthy")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "healthy")


def test_a_file_system_that_cannot_reserve_space_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    monkeypatch.setattr(io, "fallocate", failing(io.fallocate, errno.EOPNOTSUPP, when=always))
    merged(base, adapter, tmp_path / "out")


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "healthy")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:37], offset))
    merged(base, adapter, tmp_path / "out")
    monkeypatch.undo()
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "healthy")


def test_a_bug_is_told_from_a_refusal_with_a_traceback_and_how_to_report_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a slip of ours")

    monkeypatch.setattr(io, "sync_file", broken)
    outcome = call("run", base, adapter, "-o", tmp_path / "out")
    assert outcome.code == 1
    assert outcome.out == ""
    assert "Traceback (most recent call last):" in outcome.err
    assert "ZeroDivisionError: a slip of ours" in outcome.err
    assert "this is a bug of streammerge: please report it" in outcome.err
    assert_nothing_loadable(tmp_path / "out")


# --- the order of publication -----------------------------------------------------------------------------------------
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> list[tuple[str, str]]:
    """Every sync and rename of a run, in order, with the path below the output."""
    base, adapter = inputs_at(tmp_path)
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("notes")
    out = tmp_path / "out"
    log: list[tuple[str, str]] = []

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            result = real(*arguments)
            where = [Path(a) for a in arguments if isinstance(a, str | Path)]
            log.append((name, " -> ".join(str(path.relative_to(out)) for path in where if path.is_relative_to(out))))
            return result

        return wrapped

    for name in ("sync_file", "sync_dir", "rename"):
        monkeypatch.setattr(io, name, noting(name, getattr(io, name)))
    merged(base, adapter, out, "-j", 1, *options)
    monkeypatch.undo()
    return log


def test_files_appear_in_the_order_that_makes_the_directory_loadable_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = recorded(tmp_path, monkeypatch)
    published = [what.partition(" -> ")[2] for name, what in log if name == "rename"]
    published = [target for target in published if not target.startswith(f"{STAGING}/")]
    assert published == [
        FIRST,
        SECOND,
        "generation_config.json",
        "sub/notes.txt",
        ".streammerge-inputs.json",
        INDEX,
        BASE_CONFIG,
        MARKER,
    ]


def test_a_file_is_renamed_only_after_its_bytes_are_synced_and_a_marker_only_after_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = recorded(tmp_path, monkeypatch)
    synced: set[str] = set()
    durable: set[str] = set()
    renamed_into: dict[str, set[str]] = {}
    for name, what in log:
        if name == "sync_file":
            synced.add(what)
        elif name == "sync_dir":
            durable |= renamed_into.pop(what, set())
        else:
            source, _, target = what.partition(" -> ")
            assert source in synced, f"{source} is renamed before it is synced"
            synced.add(target)
            if target in (INDEX, BASE_CONFIG, MARKER):
                waiting = {
                    path for folder, paths in renamed_into.items() if not folder.startswith(STAGING) for path in paths
                }
                assert not waiting, f"{target} appears before the directory entries of {waiting} are durable"
            renamed_into.setdefault(str(Path(target).parent), set()).add(target)
    assert MARKER in durable
    assert {FIRST, SECOND, "sub/notes.txt", "generation_config.json", INDEX, BASE_CONFIG} <= durable
