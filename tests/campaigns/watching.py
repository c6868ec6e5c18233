"""What the campaigns look at: the command in a fork of this process, inputs that must not change, and what a loader
would take of an output."""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from streammerge import api
from streammerge.cli import main
from tests.campaigns.order import ORDER
from tests.refusals.making import BASE_CONFIG, INDEX, MARKER, STAGING, Outcome
from tests.sinks.subjects import make_subject

Seen = dict[str, tuple[int, int, str]]
"""Inode, modification time in ns and SHA-256 of every file."""
READS, WRITES = 3, 7
FAILED = (READS, WRITES)
"""Exit codes of what failed while it was read, or written."""
OUT_OF_ORDER = 78
"""Exit code of a command that did something too early, if the order checker was on."""
PATIENCE = 120
"""Seconds after which a command counts as hanging, and is ended by a signal."""


def snapshot(*roots: Path) -> Seen:
    """All files below some directories, as they are now."""
    files = [path for root in roots for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns, digest_of(path)) for path in files}


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def warm_up(folder: Path) -> None:
    """Load here once what every run loads: with one thread, a fork takes no harm from what was computed before it."""
    base, adapters = make_subject(folder, "BF16")
    api.merge(base, adapters, folder / "out")
    gc.collect()
    gc.freeze()


def command(*arguments: object, before: Callable[[], object] = lambda: None) -> Outcome:
    """`streammerge ARGUMENTS` in a fork of this process, after `before`, which is called there."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                faulthandler.register(signal.SIGALRM, file=2, all_threads=True, chain=True)
                signal.alarm(PATIENCE)
                before()
                ORDER.clear()
                code = main([str(argument) for argument in arguments])
                if ORDER.wrong:
                    sys.stderr.write("".join(f"out of order: {found}\n" for found in ORDER.wrong))
                    code = OUT_OF_ORDER
            except SystemExit as exit:
                code = exit.code if isinstance(exit.code, int) else 1
            except BaseException as error:
                sys.stderr.write(f"not caught: {type(error).__name__}: {error}\n")
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode())
    return Outcome(code, *texts)


def wrongly_loadable(found: Mapping[str, object], *wholes: Mapping[str, object]) -> list[str]:
    """The files, by name, that a loader takes although they are none of the results in `wholes`; nothing if it takes
    none, or one that is whole but for what comes last."""
    there = {name: data for name, data in found.items() if not name.startswith(f"{STAGING}/")}
    if MARKER not in there and not (BASE_CONFIG in there and (INDEX in there or "model.safetensors" in there)):
        return []
    late = set() if MARKER in there else {INDEX, BASE_CONFIG, MARKER}
    for whole in wholes:
        if whole and all(there.get(name) == data for name, data in whole.items() if name in there or name not in late):
            return []
    return sorted(there)


def problems_of(
    done: Outcome, codes: Sequence[int], place: Path, found: Mapping[str, object], healthy: Mapping[str, object]
) -> Iterator[str]:
    """What is wrong with how a run ended that may end with these codes, and name a path below `place` if it fails."""
    if done.code not in codes:
        yield f"ended with {done.code}: {done.err}"
    names = [name for name in differing(found, healthy) if not name.startswith(f"{STAGING}/")]
    if done.code == 0 and names:
        yield f"ended well, and differs in {names}"
    if done.code in FAILED and not re.search(rf"cannot [\w ]+ `{re.escape(str(place))}", done.err):
        yield f"the message names no path or no operation: {done.err}"
    if loaded := wrongly_loadable(found, healthy):
        yield f"a loader takes {loaded}"


def differing(found: Mapping[str, object], healthy: Mapping[str, object]) -> list[str]:
    """The names of the files that are not the same in both."""
    return sorted(name for name in {*found, *healthy} if found.get(name) != healthy.get(name))
