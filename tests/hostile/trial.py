"""One malicious input, given to the command in a fork of this process, and everything that must hold afterwards.

The fork has torch already, so that its seconds and its memory are the command's own. The invariant: a case that this
process cannot end on its own is ended after HANGS seconds, and is wrong.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from streammerge.cli import main
from streammerge.cli.output import Output
from streammerge.core.errors import StreamMergeError
from tests.hostile.case import CANARY, TOKEN, Case, Place
from tests.refusals.making import BASE_CONFIG, INDEX, MARKER

SECONDS, MEGABYTES = 2.0, 300
"""What a case may take beyond start-up and beyond the imported libraries; seconds of the processor, as the machine may
have other things to do."""
HANGS, ADDRESSES = 30, 2**32
"""Seconds after which a case is ended, and bytes of address space that it may take beside torch's."""
LOUD = 20_000
"""Characters that a message may have."""
HIDING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}

Tree = dict[str, tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a case ended: exit code, what was printed, the class of the error, seconds of the clock and of the
    processor, and bytes beyond those of the libraries."""

    code: int
    text: str
    error: str
    seconds: float
    busy: float
    memory: int


def tree(root: Path) -> Tree:
    """Everything below a folder but the output: kind, inode, time, and content."""
    found: Tree = {}
    for folder, folders, files in os.walk(root):
        if Path(folder) == root and "out" in folders:
            folders.remove("out")
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            state = os.lstat(path)
            content: object = None
            if stat.S_ISLNK(state.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(state.st_mode) and state.st_size < 2**30:
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            when = None if stat.S_ISDIR(state.st_mode) and Path(path) == root else state.st_mtime_ns
            found[path] = (stat.S_IFMT(state.st_mode), state.st_ino, when, state.st_size, content)
    return found


def resident() -> int:
    """Bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run(place: Place, said: Path) -> Ended:
    """The command in a fork."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = _child(place, said)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(code)
    _, status, used = os.wait4(pid, 0)
    seconds = time.monotonic() - began
    before, _, error = (said / "note").read_text().partition(" ") if (said / "note").exists() else ("0", "", "")
    text = (said / "printed").read_bytes().decode(errors="surrogateescape")
    memory = used.ru_maxrss * 1024 - int(before)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, text, error, seconds, used.ru_utime + used.ru_stime, memory)


def _child(place: Place, said: Path) -> int:
    """Everything printed goes to a file; the first resident size and the class of the error into another."""
    signal.alarm(HANGS)
    printed = os.open(said / "printed", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(printed, stream)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    note = said / "note"
    real = Output.error

    def noting(output: Output, error: StreamMergeError) -> None:
        note.write_text(f"{note.read_text()}{type(error).__name__}")
        real(output, error)

    Output.error = noting  # type: ignore[method-assign]
    os.chdir(place.root / "temporary")
    os.environ |= {"TMPDIR": str(place.root / "temporary"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}
    tempfile.tempdir = None
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESSES, taken + ADDRESSES))
    ctypes.CDLL(None).malloc_trim(0)  # what this process has freed would be taken again, and not be seen
    note.write_text(f"{resident()} ")
    code = main(place.arguments())
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def wrong_with(case: Case, healthy: Path, root: Path) -> tuple[list[str], Ended]:
    """Try a case below `root`; what is wrong, and how it ended."""
    place = Place(root / "place")
    shutil.copytree(healthy, place.root, symlinks=True)
    try:
        case.spoil(place)
        (root / "said").mkdir()
        before = tree(place.root)
        ended = run(place, root / "said")
        wrong = list(_faults(case, place, ended, before))
        if ended.busy > SECONDS:
            wrong.append(f"it took {ended.busy:.2f} s of the processor, {ended.seconds:.2f} s in all")
        return [f"{case.name}: {one}" for one in wrong], ended
    finally:
        shutil.rmtree(root)


def _faults(case: Case, place: Place, ended: Ended, before: Tree) -> list[str]:
    found = []
    if ended.code != case.code or ended.error != case.error:
        found.append(f"exit {ended.code} with {ended.error or 'no error'}, not {case.code} with {case.error}")
    found += [f"`{word}` is not said" for word in case.words if word not in ended.text]
    if found:
        found[-1] += f":\n{ended.text[-1500:]}"
    hidden = sorted({char for char in ended.text if unicodedata.category(char) in HIDING and char != "\n"})
    if hidden:
        found.append(f"raw characters were printed: {hidden}")
    if len(ended.text) > LOUD:
        found.append(f"{len(ended.text):,} characters were printed")
    if ended.memory > MEGABYTES * 10**6:
        found.append(f"it took {ended.memory / 1e6:.0f} MB")
    after = tree(place.root)
    if after != before:
        changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
        found.append(f"not as it was: {changed[:5]}")
    if any(CANARY in path for path in after):
        found.append("code was run")
    return found + _output_faults(case, place) + _leaks(place, ended)


def _output_faults(case: Case, place: Place) -> list[str]:
    loadable = [name for name in (BASE_CONFIG, INDEX, MARKER) if (place.out / name).exists()]
    if case.code:
        return [f"the output has {loadable}"] if loadable else []
    if len(loadable) != 3:
        return [f"the output has only {loadable}"]
    links = [str(path) for path in place.out.rglob("*") if path.is_symlink()]
    told = case.look(place)
    return [f"links in the output: {links}"] * bool(links) + [told] * bool(told)


def _leaks(place: Place, ended: Ended) -> list[str]:
    there = [path for path in place.out.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    return ["the token was printed"] * (TOKEN in ended.text) + [f"the token is in {path.name}" for path in there]
