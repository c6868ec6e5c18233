"""File operations: what they promise to callers, and how they name what failed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from streammerge.core import io, pages, paths
from streammerge.core.errors import InputMissingError, InputReadError, UnsafeInputError, WriteError


def raising(code: int) -> Callable[..., object]:
    def fail(*arguments: object, **named: object) -> object:
        raise OSError(code, os.strerror(code))

    return fail


# --- inputs ---------------------------------------------------------------------------------------------------------
def test_exactly_what_was_asked_for_is_read_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(100)))
    fd = io.open_input(tmp_path / "f")
    assert io.read_at(fd, "f", 10, 5) == bytes(range(10, 15))
    assert io.read_at(fd, "f", 100, 0) == b""
    with pytest.raises(InputReadError, match="cannot read `f`: the file ends at byte 100"):
        io.read_at(fd, "f", 90, 11)
    io.close(fd)


def test_a_read_that_comes_in_parts_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(bytes(range(100)))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset))
    assert io.read_file(tmp_path / "f", 100) == bytes(range(100))


def test_a_read_that_fails_names_the_file_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"x")
    monkeypatch.setattr(os, "preadv", raising(errno.EIO))
    with pytest.raises(InputReadError, match="cannot read `.*/f`: Input/output error"):
        io.read_file(tmp_path / "f", 100)


def test_a_file_above_its_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    with pytest.raises(InputReadError, match="5 bytes, at most 4 are read of such a file"):
        io.read_file(tmp_path / "f", 4)


def test_only_regular_files_are_inputs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UnsafeInputError, match="not a regular file"):
            io.open_input(path)
    with pytest.raises(InputMissingError, match="does not exist"):
        io.open_input(tmp_path / "none")


def test_no_descriptor_is_left_open_by_what_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "f").write_bytes(b"12345")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(UnsafeInputError):
            io.open_input(tmp_path / "pipe")
        with pytest.raises(InputReadError):
            io.read_file(tmp_path / "f", 4)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_mapping_gives_its_pages_back_and_reads_them_again(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(3 * io.PAGE) + b"end")
    fd = io.open_input(tmp_path / "f")
    mapping = io.map_input(fd, "f", 3 * io.PAGE + 3)
    assert mapping[-3:] == b"end"
    pages.give_back(mapping, 0, 3 * io.PAGE + 3)
    pages.give_back(mapping, 7, 7)
    assert mapping[-3:] == b"end"
    mapping.close()
    io.close(fd)


def test_a_tree_is_listed_without_entering_links(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "b" / "f").touch()
    (tmp_path / "z").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    assert io.list_tree(tmp_path) == ["a/b/f", "dangling", "loop", "z"]
    with pytest.raises(InputMissingError):
        io.list_tree(tmp_path / "none")


HUB = "cache/models--o--m"


@pytest.mark.parametrize(
    ("root", "link", "target", "inside"),
    [
        ("base", "base/f", "base/real", True),
        ("base", "base/sub/f", "base/real", True),
        ("base", "base/f", "outside", False),
        ("base", "base/f", "base-evil/real", False),
        (f"{HUB}/snapshots/c", f"{HUB}/snapshots/c/f", f"{HUB}/blobs/abc", True),
        (f"{HUB}/snapshots/c", f"{HUB}/snapshots/c/f", "cache/models--o--x/blobs/abc", False),
        (f"{HUB}/snapshots/c", f"{HUB}/snapshots/c/f", f"{HUB}/refs/main", False),
        (f"{HUB}/snapshots/c", f"{HUB}/snapshots/c/f", f"cache/blobs/ab/{'ab' * 32}", True),
        (f"{HUB}/snapshots/c", f"{HUB}/snapshots/c/f", "cache/blobs/secret", False),
        (f"{HUB}/snapshots/c", f"{HUB}/snapshots/c/f", "etc/blobs/abc", False),
    ],
)
def test_links_are_followed_inside_the_checkpoint_and_to_the_blobs_of_its_repository_only(
    tmp_path: Path, root: str, link: str, target: str, inside: bool
) -> None:
    (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).write_text("x")
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / target)
    name = str(Path(link).relative_to(root))
    if inside:
        assert paths.resolve_inside(tmp_path / root, name) == str(tmp_path / target)
    else:
        with pytest.raises(UnsafeInputError, match="a link that leads out of the checkpoint"):
            paths.resolve_inside(tmp_path / root, name)


def test_a_path_of_its_own_that_leads_outside_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "secret").touch()
    with pytest.raises(UnsafeInputError):
        paths.resolve_inside(tmp_path / "base", "../secret")


# --- the output -----------------------------------------------------------------------------------------------------
def test_an_existing_path_is_never_opened_for_writing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("mine", "link"):
        with pytest.raises(WriteError, match="cannot create `.*`: File exists"):
            io.create(tmp_path / name)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()


def test_a_disk_that_takes_nothing_of_a_write_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))

    def half(fd: int, data: bytes) -> int:
        assert next(calls) < 999, "it is tried for ever"
        return write(fd, data[: len(data) // 2])

    fd, write = io.open_journal(tmp_path / "f"), os.write
    monkeypatch.setattr(os, "write", half)
    with pytest.raises(WriteError, match="cannot write `f`: none of 1 bytes were taken"):
        io.append(fd, "f", b"eight of")
    os.close(fd)
    assert (tmp_path / "f").read_bytes() == b"eight o"


OPERATIONS: dict[str, tuple[str, Callable[[Path, int], object], str]] = {
    "mkdir": ("makedirs", lambda path, fd: io.make_dirs(path), "create the directory"),
    "open": ("open", lambda path, fd: io.create(path), "create"),
    "fallocate": ("fallocate", lambda path, fd: io.allocate(fd, str(path), 5), "reserve space for"),
    "write": ("pwrite", lambda path, fd: io.write_at(fd, str(path), 0, b"x"), "write"),
    "sync": ("fsync", lambda path, fd: io.sync_file(fd, str(path)), "sync"),
    "rename": ("replace", lambda path, fd: io.rename("source", path), "rename into"),
    "sync a directory": ("open", lambda path, fd: io.sync_dir(path), "sync"),
    "remove": ("unlink", lambda path, fd: io.remove(path), "remove"),
    "remove a directory": ("rmdir", lambda path, fd: io.remove_dir_if_empty(path), "remove"),
    "measure space": ("statvfs", lambda path, fd: io.free_space(path), "measure the free space of"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_a_failing_operation_names_itself_the_path_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, code: int
) -> None:
    call, act, word = OPERATIONS[operation]
    with (tmp_path / "open").open("w+b") as stream:
        monkeypatch.setattr(*((io, "fallocate") if call == "fallocate" else (os, call)), raising(code))
        with pytest.raises(WriteError) as caught:
            act(tmp_path / "target", stream.fileno())
    assert str(caught.value) == f"cannot {word} `{tmp_path / 'target'}`: {os.strerror(code)}"
    assert caught.value.exit_code == 7


def test_what_a_file_system_cannot_do_is_tolerated_where_it_is_only_a_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "f").open("w+b") as stream:
        for code in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            monkeypatch.setattr(os, "posix_fallocate", raising(code))
            io.allocate(stream.fileno(), "f", 10)
        monkeypatch.setattr(os, "posix_fadvise", raising(errno.EINVAL))
        pages.drop(stream.fileno(), 0, 10)
    for code in (errno.EINVAL, errno.ENOTSUP):
        monkeypatch.setattr(os, "fsync", raising(code))
        io.sync_dir(tmp_path)
    monkeypatch.setattr(os, "fsync", raising(errno.EIO))
    with pytest.raises(WriteError, match="Input/output error"):
        io.sync_dir(tmp_path)


def test_removing_what_is_gone_is_fine_and_a_directory_in_use_stays(tmp_path: Path) -> None:
    io.remove(tmp_path / "none")
    io.remove_dir_if_empty(tmp_path / "none")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "f").touch()
    io.remove_dir_if_empty(tmp_path / "used")
    assert (tmp_path / "used" / "f").exists()


def test_empty_directories_are_removed_in_any_depth_and_no_others(tmp_path: Path) -> None:
    for name in ("a/b/c", "a/d", "e"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "root" / "a" / "d" / "f").touch()
    io.remove_empty_dirs(tmp_path / "root")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "root",
        "root/a",
        "root/a/d",
        "root/a/d/f",
    ]
    (tmp_path / "root" / "a" / "d" / "f").unlink()
    io.remove_empty_dirs(tmp_path / "root")
    assert list(tmp_path.iterdir()) == []
    io.remove_empty_dirs(tmp_path / "root")


def test_a_new_small_file_is_written_whole_and_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    io.write_new(tmp_path / "f", b"data")
    assert (tmp_path / "f").read_bytes() == b"data"
    assert len(os.listdir("/proc/self/fd")) == before


def test_network_file_systems_are_known_by_their_magic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not paths.is_on_network(tmp_path)
    monkeypatch.setattr(paths, "_file_system_type", lambda path: 0x6969)
    assert paths.is_on_network(tmp_path)
    monkeypatch.setattr(paths, "_file_system_type", lambda path: None)
    assert not paths.is_on_network(tmp_path)
