"""Two runs of one merge into one output at the same time, with and without locks between them.

    python -m tests.campaigns.races FOLDER --times N [--without-locks]

Prints one JSON object: how the runs ended, by exit code, and what was wrong.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from streammerge.core.errors import StreamMergeError
from streammerge.sinks import shards
from tests.campaigns.kills import BLOCK, PIECE, Campaign, bytes_of
from tests.refusals.making import MARKER
from tests.sinks.subjects import make_small

APART = 0.3
"""Seconds between the beginnings of two runs, at most: about as long as one takes."""


def begin(campaign: Campaign, delay: float, *, locks: bool) -> int:
    """A run in a fork of this process, which ends with the exit code of the command; its process number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if not locks:
                fcntl.flock = no_locks
            time.sleep(delay)
            campaign.layout.merge(campaign.layout.out)
            code = 0
        except StreamMergeError as error:
            code = error.exit_code
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(code)
    return pid


def no_locks(*_: object) -> None:
    """A file system without locks."""
    raise OSError(errno.ENOLCK, "No locks available")


def race(campaign: Campaign, delay: float, *, locks: bool) -> tuple[tuple[int, ...], list[str]]:
    """One race: the exit codes, and what was wrong with what came of it."""
    wrong = []
    campaign.layout.prepare()
    runs = [begin(campaign, 0, locks=locks), begin(campaign, delay, locks=locks)]
    codes = tuple(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in runs)
    if not set(codes) <= {0, 5, 7}:
        wrong.append(f"{delay:.3f} s apart: the runs ended with {codes}")
    found = bytes_of(campaign.layout.out)
    if (0 in codes or MARKER in found) and {n: d for n, d in found.items() if "/" not in n} != campaign.healthy:
        wrong.append(f"{delay:.3f} s apart, ended with {codes}: the result differs: {sorted(found)}")
    if campaign.run() != 0 or bytes_of(campaign.layout.out) != campaign.healthy:
        wrong.append(f"{delay:.3f} s apart, ended with {codes}: the next run does not mend it")
    return codes, wrong


def main() -> None:
    """Run as many races as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--without-locks", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    make_small(patch, piece=PIECE, block=BLOCK)
    patch.setattr(shards, "AT_RISK", 2 * BLOCK)
    campaign = Campaign("subject", arguments.folder)
    delays = random.Random(0)
    ended: Counter[str] = Counter()
    wrong: list[str] = []
    for _ in range(arguments.times):
        codes, found = race(campaign, delays.uniform(0, APART), locks=not arguments.without_locks)
        ended[" ".join(map(str, sorted(codes)))] += 1
        wrong += found
    sys.stdout.write(json.dumps({"ended": ended, "wrong": wrong}))


if __name__ == "__main__":
    main()
