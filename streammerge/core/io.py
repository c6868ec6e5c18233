"""Every file operation of the package, reads included.

Other rooms call these functions through the module (`io.fsync(fd, path)`), so that a test can fail, shorten or kill the
n-th one. Operations on the output raise WriteError, those on inputs InputReadError; both name path and operation.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from streammerge.core.errors import InputMissingError, InputReadError, StreamMergeError, UnsafeInputError, WriteError
from streammerge.core.syscalls import clone_range, fallocate

PAGE = mmap.PAGESIZE
ALIGNMENT = 4096
"""Offset, length and address of a direct read or write are multiples of this: enough for every disk in common use."""


# --- inputs ---------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def reading(path: str | os.PathLike[str], operation: str) -> Iterator[None]:
    """What the system refuses of an input, as InputMissingError or InputReadError."""
    try:
        yield
    except StreamMergeError:
        raise
    except FileNotFoundError:
        raise InputMissingError(str(path)) from None
    except OSError as error:
        raise InputReadError(str(path), operation, error.strerror or str(error)) from error


class FileState(NamedTuple):
    """What tells a file from a changed one: size in bytes, modification time in ns, device and inode."""

    size: int
    mtime_ns: int
    device: int
    inode: int


def state_of(fd: int, path: str) -> FileState:
    """The state of an open input."""
    try:  # not `reading`: this is asked at every read, however small
        found = os.fstat(fd)
    except OSError as error:
        raise InputReadError(path, "stat", error.strerror or str(error)) from error
    return FileState(found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino)


def path_state(path: str | os.PathLike[str]) -> FileState:
    """The state of an input that is not open yet."""
    with reading(path, "stat"):
        found = os.stat(path)
    return FileState(found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino)


def open_input(path: str | os.PathLike[str], *, links: bool = True) -> int:
    """A read-only descriptor of a regular file; a FIFO or device is refused without waiting for it. A path that is a
    link itself is followed where `links` allows it."""
    with reading(path, "open"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW))
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            close(fd)
            raise
    if not stat.S_ISREG(mode):
        close(fd)
        raise UnsafeInputError(str(path), "not a regular file")
    return fd


def open_direct(path: str) -> int | None:
    """A second descriptor of an open input that reads past the page cache; None where the file system cannot."""
    with reading(path, "open"):
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return None


def read_at(fd: int, path: str, offset: int, size: int) -> bytearray:
    """Exactly `size` bytes at `offset`; a short file is an InputReadError, never a short result."""
    buffer = bytearray(size)
    read_into(fd, path, offset, memoryview(buffer))
    return buffer


def read_into(fd: int, path: str, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from `offset`."""
    read_direct(fd, path, offset, buffer, len(buffer), alignment=1)


def read_direct(fd: int, path: str, offset: int, buffer: memoryview, least: int, alignment: int = ALIGNMENT) -> None:
    """Read into an aligned buffer past the page cache; the file may end after `least` bytes, and not before."""
    done = 0
    with reading(path, "read"):
        while done < least:
            count = os.preadv(fd, [buffer[done:]], offset + done)
            if count == 0:
                raise InputReadError(path, "read", f"the file ends at byte {offset + done:,}; did it change?")
            done += count
            if done < least and done % alignment:
                raise InputReadError(path, "read", f"only {done:,} of {least:,} bytes came; did the file change?")


def read_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """The whole of a small input; InputReadError if it has more than `limit` bytes."""
    fd = open_input(path)
    try:
        size = state_of(fd, str(path)).size
        if size > limit:
            raise InputReadError(str(path), "read", f"{size:,} bytes, at most {limit:,} are read of such a file")
        return bytes(read_at(fd, str(path), 0, size))
    finally:
        close(fd)


@contextlib.contextmanager
def input_stream(fd: int, path: str) -> Iterator[BinaryIO]:
    """A file object over an open input, for the standard library's readers; the descriptor stays open."""
    with reading(path, "read"), os.fdopen(fd, "rb", closefd=False) as stream:
        yield stream


def read_text_or_none(path: str) -> str | None:
    """The text of a small system file, None where it is not there."""
    try:
        return Path(path).read_text()
    except OSError:
        return None


def map_input(fd: int, path: str, size: int) -> mmap.mmap:
    """A private mapping of the first `size` bytes. Copy-on-write, so that libraries which insist on writable memory
    take it; nobody writes to it, and the file could not be reached if they did."""
    with reading(path, "map"):
        return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def close(fd: int) -> None:
    """Close a descriptor. Linux lets go of it whatever it says, and what has to last was synced before."""
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise  # ours no longer: a bug


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether something is at `path`; a dangling link is nothing. InputReadError where that cannot be told."""
    return _mode_of(path) is not None


def is_dir(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory. InputReadError where that cannot be told."""
    return stat.S_ISDIR(_mode_of(path) or 0)


def _mode_of(path: str | os.PathLike[str]) -> int | None:
    try:
        return os.stat(path).st_mode
    except ValueError:  # no name that a file can have
        return None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise InputReadError(str(path), "look at", error.strerror or str(error)) from error


def size_of(path: str | os.PathLike[str]) -> int:
    """Bytes of a file."""
    return path_state(path).size


def list_dir(path: str | os.PathLike[str]) -> list[str]:
    """Names of the entries of a directory, sorted."""
    with reading(path, "list"):
        return sorted(os.listdir(path))


def list_tree(root: str | os.PathLike[str]) -> list[str]:
    """Relative paths (with `/`) of everything below `root` that is not a directory, sorted; symlinked directories are
    listed as entries and not entered."""
    found: list[str] = []
    pending = [""]
    with reading(root, "list"):
        while pending:
            folder = pending.pop()
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    name = f"{folder}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{name}/")
                    else:
                        found.append(name)
    return sorted(found)


# --- the output -----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _writing(path: str | os.PathLike[str], operation: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(str(path), operation, error.strerror or str(error)) from error


def make_dirs(path: str | os.PathLike[str]) -> None:
    """Create a directory and its parents."""
    with _writing(path, "create the directory"):
        try:
            os.makedirs(path)
        except FileExistsError:
            if not is_dir(path):
                raise


def make_dirs_of(root: str | os.PathLike[str], name: str) -> None:
    """Create the directories that `name` (with `/`) needs below `root`, which itself has to be there."""
    for folder in reversed((Path(root) / name).parents[: name.count("/")]):
        with _writing(folder, "create the directory"), contextlib.suppress(FileExistsError):
            os.mkdir(folder)


def create(path: str | os.PathLike[str], *, direct: bool = False) -> int:
    """A write descriptor of a new file with mode 0666 & ~umask, past the page cache if asked for; an existing path is
    never opened for writing."""
    return _open(path, "create", os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0))


def open_again(path: str | os.PathLike[str], *, direct: bool = False) -> int:
    """A write descriptor of a file that an earlier run of ours began; never through a link."""
    return _open(path, "open", os.O_DIRECT if direct else 0)


def open_journal(path: str | os.PathLike[str]) -> int:
    """A descriptor that adds to the end of a file, which is created where it is not there."""
    return _open(path, "create", os.O_CREAT | os.O_APPEND)


def _open(path: str | os.PathLike[str], operation: str, flags: int) -> int:
    with _writing(path, operation):
        return os.open(path, flags | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def append(fd: int, path: str, data: bytes) -> None:
    """Add `data` to the end of a journal."""
    with _writing(path, "write"):
        while data:
            count = os.write(fd, data)
            if count == 0:
                raise OSError(errno.EIO, f"none of {len(data):,} bytes were taken")
            data = data[count:]


def open_lock(path: str | os.PathLike[str]) -> int:
    """A descriptor of a file that is there for nothing but its lock."""
    return _open(path, "create", os.O_CREAT)


def takes_direct_writes(folder: str | os.PathLike[str]) -> bool:
    """Whether files in `folder` can be written past the page cache; found out by doing it, in a file without a name
    where the file system has such. Raises WriteError for whatever else goes wrong there."""
    probe = os.path.join(folder, f"probe.{os.getpid()}.tmp")
    for path, kind in ((folder, os.O_TMPFILE), (probe, os.O_CREAT | os.O_EXCL)):
        try:
            fd = os.open(path, kind | os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT, 0o600)
            try:
                return os.pwrite(fd, mmap.mmap(-1, ALIGNMENT), 0) == ALIGNMENT
            finally:
                close(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR):
                raise WriteError(str(path), "write a probe to", error.strerror or str(error)) from error
        finally:
            remove(probe)  # some file systems create the file before they refuse the flag
    return False


def allocate(fd: int, path: str, size: int) -> None:
    """Reserve `size` bytes where the file system can, so that a full disk is found now and not at the end."""
    if size == 0:
        return
    with _writing(path, "reserve space for"):
        try:
            fallocate(fd, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def clone(source: int, source_offset: int, target: int, offset: int, size: int) -> bool:
    """Let a range of one file share the blocks of another's; False where the file system or the ranges do not allow
    it, and nothing was done."""
    try:
        clone_range(source, source_offset, target, offset, size)
    except OSError:
        return False
    return True


def write_at(fd: int, path: str, offset: int, data: memoryview | bytes | bytearray, *, direct: bool = False) -> None:
    """Write all of `data` at `offset`. After a short direct write, what follows begins at a multiple of ALIGNMENT."""
    view = memoryview(data).cast("B")
    done = 0
    with _writing(path, "write"):
        while done < len(view):
            count = os.pwrite(fd, view[done:], offset + done)
            done += count // ALIGNMENT * ALIGNMENT if direct else count
            if count < (ALIGNMENT if direct else 1):
                raise OSError(errno.EIO, f"only {count:,} of {len(view) - done:,} bytes were taken")


def sync_file(fd: int, path: str) -> None:
    """Make a file's bytes durable. A failure is final: the kernel has dropped the pages."""
    with _writing(path, "sync"):
        os.fsync(fd)


def rename(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Move a finished file, or a directory with all that is in it, into place; replaces atomically."""
    with _writing(target, "rename into"):
        os.replace(source, target)


def sync_dir(path: str | os.PathLike[str]) -> None:
    """Make a directory's entries durable; file systems that cannot sync a directory are tolerated."""
    with _writing(path, "sync"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise
        finally:
            close(fd)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file of ours; one that is already gone is fine."""
    with _writing(path, "remove"), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_dir_if_empty(path: str | os.PathLike[str]) -> None:
    """Remove a directory, unless something is in it or it is already gone."""
    with _writing(path, "remove"):
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise


def remove_empty_dirs(path: str | os.PathLike[str]) -> None:
    """Remove a directory and those below it, as far as there is nothing else in them."""
    for folder, _, _ in os.walk(path, topdown=False):
        remove_dir_if_empty(folder)


def temporary_dir(prefix: str) -> str:
    """A new directory of this user's own below the system's directory for temporary files."""
    with _writing(prefix, "create a temporary directory"):
        return tempfile.mkdtemp(prefix=prefix)


def free_space(path: str | os.PathLike[str]) -> int:
    """Bytes an ordinary user may still write on the file system of `path`."""
    with _writing(path, "measure the free space of"):
        found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def write_new(path: str | os.PathLike[str], data: bytes) -> None:
    """A small file, written and made durable; the caller renames it into place."""
    fd = create(path)
    try:
        write_at(fd, str(path), 0, data)
        sync_file(fd, str(path))
    finally:
        close(fd)
