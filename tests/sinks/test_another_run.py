"""What a run meets that somebody else does at the same time, or has done since it was interrupted."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from streammerge.core import io, locks
from streammerge.core.errors import InputReadError, OutputExistsError, WriteError
from streammerge.sinks.directory import MARKER, STAGING, OutputDirectory
from streammerge.sinks.journal import JOURNAL
from streammerge.sinks.records import RUN
from tests.refusals.making import (
    Outcome,
    assert_nothing_loadable,
    call,
    inputs_at,
    merged,
    shard_name,
    tree_digest,
)

FIRST_SHARD = shard_name(0, 2)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the output goes."""
    return tmp_path / "out"


def interrupted(tmp_path: Path, out: Path) -> tuple[Path, Path]:
    """Inputs, and an output in which a run has finished its files and published none."""
    base, adapter = inputs_at(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputDirectory, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            call("run", base, adapter, "-o", out)
    assert list((out / STAGING).rglob(JOURNAL))
    return base, adapter


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_result_that_was_finished_while_a_run_waited_for_the_lock_is_found(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    real = OutputDirectory._take_lock

    def late(self: OutputDirectory) -> None:
        monkeypatch.setattr(OutputDirectory, "_take_lock", real)
        merged(base, adapter, out)
        real(self)

    monkeypatch.setattr(OutputDirectory, "_take_lock", late)
    outcome = merged(base, adapter, out)
    assert "already complete" in outcome.err
    assert not (out / STAGING).exists()


def test_a_merge_of_another_kind_that_was_finished_meanwhile_is_not_replaced(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    real = OutputDirectory._take_lock

    def late(self: OutputDirectory) -> None:
        monkeypatch.setattr(OutputDirectory, "_take_lock", real)
        merged(base, adapter, out, "--dtype", "float32")
        real(self)

    monkeypatch.setattr(OutputDirectory, "_take_lock", late)
    outcome = call("run", base, adapter, "-o", out)
    assert outcome.code == 5
    assert "holds the finished result of another merge" in outcome.err
    assert (out / MARKER).exists()


def test_the_lock_of_a_file_that_its_holder_has_removed_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, opened = tmp_path / "lock", io.open_lock, []

    def open_and_lose(name: Path) -> int:
        opened.append(real(name))
        if len(opened) == 1:
            path.unlink()
        return opened[-1]

    monkeypatch.setattr(io, "open_lock", open_and_lose)
    held = locks.lock(path)
    assert held is not None
    assert held.fd == opened[-1]
    assert len(opened) == 2
    assert locks.lock(path) is None
    held.close()


def test_a_file_that_keeps_being_removed_gives_no_lock_and_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "lock", io.open_lock

    def open_and_lose(name: Path) -> int:
        fd = real(name)
        path.unlink()
        return fd

    monkeypatch.setattr(io, "open_lock", open_and_lose)
    assert locks.lock(path) is None


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def taken(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, call_name: str, ending: str) -> Outcome:
    """A run in which something of its own is gone when it comes to it."""
    base, adapter = inputs_at(tmp_path)
    real = getattr(os, call_name)

    def gone(*arguments: object) -> object:
        if str(arguments[-1]).endswith(ending):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        patch.setattr(os, call_name, gone)
        return call("run", base, adapter, "-o", out)


@pytest.mark.parametrize("ending", [f"out/{FIRST_SHARD}", RUN, "generation_config.json", f"out/{MARKER}"])
def test_what_another_run_has_taken_away_is_told_as_that(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    outcome = taken(tmp_path, out, monkeypatch, "replace", ending)
    assert outcome.code == OutputExistsError.exit_code
    assert f"another run is at work on `{out}`: `" in outcome.err
    assert "vanished while it was in use" in outcome.err
    assert not (out / MARKER).exists()


# --- since it was interrupted -----------------------------------------------------------------------------------------
def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(2, 2))
    other.replace(path)


def longer(path: Path) -> None:
    state = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [rewritten, replaced, longer])
def test_a_base_that_changed_since_a_run_began_is_named_and_nothing_of_that_run_is_used(
    tmp_path: Path, out: Path, change
) -> None:
    base, adapter = interrupted(tmp_path, out)
    change(base / FIRST_SHARD)
    outcome = call("run", base, adapter, "-o", out)
    assert outcome.code == 5
    assert f"made from another base: `{FIRST_SHARD}` changed since it began" in outcome.err
    assert_nothing_loadable(out)
    outcome = merged(base, adapter, out, "--overwrite")
    assert "resuming" not in outcome.err
    merged(base, adapter, tmp_path / "fresh")
    assert tree_digest(out) == tree_digest(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_weights_that_change_between_their_header_and_their_first_use_are_named(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from streammerge.sources import adapter as adapters
    from streammerge.sources import checkpoint

    base, adapter = inputs_at(tmp_path)
    module, file = (
        (checkpoint, base / FIRST_SHARD) if name == "base" else (adapters, adapter / "adapter_model.safetensors")
    )
    real = module.read_header

    def then_changed(path: Path, shown: str) -> object:
        header = real(path, shown)
        if Path(path) == file:
            other = tmp_path / "other"
            other.write_bytes(file.read_bytes())
            other.replace(file)
        return header

    monkeypatch.setattr(module, "read_header", then_changed)
    outcome = call("run", base, adapter, "-o", out)
    assert outcome.code == InputReadError.exit_code
    assert f"cannot read `{file}`: the file changed while it was being used" in outcome.err
    assert not out.exists()


def test_a_link_where_a_run_left_its_journal_is_not_written_through(tmp_path: Path, out: Path) -> None:
    base, adapter = interrupted(tmp_path, out)
    journal = next((out / STAGING).rglob(JOURNAL))
    (tmp_path / "victim").write_bytes(b"mine")
    journal.unlink()
    journal.symlink_to(tmp_path / "victim")
    outcome = call("run", base, adapter, "-o", out)
    assert outcome.code == WriteError.exit_code
    assert f"/{JOURNAL}`: Too many levels of symbolic links" in outcome.err
    assert "cannot create `" in outcome.err
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_a_link_where_a_run_left_a_file_is_not_taken_for_that_file(tmp_path: Path, out: Path) -> None:
    base, adapter = interrupted(tmp_path, out)
    staged = next((out / STAGING).rglob(FIRST_SHARD))
    staged.rename(tmp_path / "victim")
    before = (tmp_path / "victim").read_bytes()
    staged.symlink_to(tmp_path / "victim")
    merged(base, adapter, out)
    assert not (out / FIRST_SHARD).is_symlink()
    assert (out / FIRST_SHARD).read_bytes() == before == (tmp_path / "victim").read_bytes()


# --- what the system says, and about what ----------------------------------------------------------------------------
def failing(real, code: int, when):
    def wrapped(path: object, *arguments: object, **named: object) -> object:
        if when(path):
            raise OSError(code, os.strerror(code))
        return real(path, *arguments, **named)

    return wrapped


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_probe_of_direct_writes_that_fails_for_another_reason_gives_that_reason(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    base, adapter = inputs_at(tmp_path)
    real = os.open

    def refusing(path: object, flags: int, *rest: int, **named: int) -> int:
        if flags & os.O_DIRECT and flags & os.O_RDWR:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    outcome = call("run", base, adapter, "-o", out, "--io", "direct")
    assert outcome.code == WriteError.exit_code
    assert f"cannot write a probe to `{tmp_path}`: {os.strerror(code)}" in outcome.err


def test_a_report_that_cannot_be_looked_at_is_not_taken_for_none(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, out)
    before = tree_digest(out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing(os.stat, errno.EIO, lambda path: str(path).endswith(MARKER)))
        outcome = call("run", base, adapter, "-o", out)
    assert outcome.code == InputReadError.exit_code
    assert f"cannot look at `{out / MARKER}`: Input/output error" in outcome.err
    assert tree_digest(out) == before


def test_a_directory_that_is_there_and_cannot_be_looked_at_is_not_said_to_be_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    io.make_dirs(tmp_path / "there")
    monkeypatch.setattr(os, "stat", failing(os.stat, errno.EMFILE, lambda path: str(path).endswith("there")))
    with pytest.raises(WriteError, match="cannot create the directory `.*/there`: .*Too many open files"):
        io.make_dirs(tmp_path / "there")


def test_what_a_close_says_is_of_no_consequence_but_a_descriptor_that_is_not_ours_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.close

    def failing_close(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    fd = io.create(tmp_path / "f")
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", failing_close)
        io.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        io.close(fd)


def test_a_run_whose_record_was_cut_short_is_replaced_by_another_merge_that_is_told_to(
    tmp_path: Path, out: Path
) -> None:
    base, adapter = interrupted(tmp_path, out)
    record = next((out / STAGING).rglob(RUN))
    record.write_bytes(record.read_bytes()[:-20])
    command = ("run", base, adapter, "-o", out, "--dtype", "float32")
    assert (refusal := call(*command)).code == 5
    assert "holds an unfinished run of another merge" in refusal.err
    assert "whose record cannot be read" in refusal.err
    outcome = call(*command, "--overwrite")
    assert outcome.code == 0, outcome.err
    assert call("run", base, adapter, "-o", tmp_path / "healthy", "--dtype", "float32").code == 0
    assert tree_digest(out) == tree_digest(tmp_path / "healthy")


def published_and_damaged(tmp_path: Path, out: Path) -> tuple[Path, Path]:
    """A run that was killed after it had published a shard, and of whose record one bit has changed since."""
    base, adapter = interrupted(tmp_path, out)
    run = next((out / STAGING).rglob(RUN)).parent
    assert (run / FIRST_SHARD).exists()
    (run / FIRST_SHARD).rename(out / FIRST_SHARD)
    record = bytearray((run / RUN).read_bytes())
    record[record.index(b"model-")] ^= 1
    (run / RUN).write_bytes(record)
    return base, adapter


def test_a_run_whose_record_was_damaged_goes_on_with_what_it_has_published(tmp_path: Path, out: Path) -> None:
    base, adapter = published_and_damaged(tmp_path, out)
    assert "an unfinished run" in call("status", out).out
    inode = (out / FIRST_SHARD).stat().st_ino
    outcome = call("run", base, adapter, "-o", out)
    assert outcome.code == 0, outcome.err
    assert (out / FIRST_SHARD).stat().st_ino == inode
    assert call("run", base, adapter, "-o", tmp_path / "healthy").code == 0
    assert tree_digest(out) == tree_digest(tmp_path / "healthy")


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_another_merge_removes_nothing_that_only_a_damaged_record_told_to_be_ours(
    tmp_path: Path, out: Path, options: tuple[str, ...]
) -> None:
    base, adapter = published_and_damaged(tmp_path, out)
    before = tree_digest(out)
    refusal = call("run", base, adapter, "-o", out, "--dtype", "float32", *options)
    assert refusal.code == 5
    assert RUN in refusal.err if options else "whose record cannot be read" in refusal.err
    assert tree_digest(out) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOLCK, errno.EIO])
def test_a_file_system_that_gives_no_lock_is_not_taken_for_another_run(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    base, adapter = inputs_at(tmp_path)

    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    outcome = call("run", base, adapter, "-o", out)
    assert outcome.code == 0, outcome.err
