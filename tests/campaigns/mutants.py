"""Break one rule of the commit protocol at a time, and see that the campaigns notice.

    python -m tests.campaigns.mutants FOLDER [--all] [--only TEXT]

A mutant is a change of one function in a fork of this process. Three campaigns go over it on their own: the order
checker on runs that nobody disturbs, kills with damage, failing system calls; the last two with the order checker off.
Prints one JSON object: how many mutants there were, which campaigns caught which, and in `wrong` those that none did.
Without `--all` the first campaign that catches a mutant is enough.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.digests import sealed
from streammerge.core.errors import WriteError
from streammerge.sinks import directory, journal, recovery, shards
from streammerge.sinks.directory import CONFIG, INDEX, LATE, MARKER, OutputDirectory
from streammerge.sinks.records import RUN
from streammerge.sinks.run_folder import RunFolder
from tests.campaigns import errnos, kills
from tests.campaigns.errnos import Errors, Fault
from tests.campaigns.kills import OUT_OF_ORDER, Campaign, child, prepared, warm_up

errnos.COUNTED.add(__file__)
Late = Mapping[str, bytes]
_publish, _claim, _write_down = OutputDirectory.publish, OutputDirectory.claim, RunFolder.write_down
_remove_all, _parsed, _stage = OutputDirectory._remove, journal._parsed, shards.ShardFile.stage


# --- the mutants ------------------------------------------------------------------------------------------------------
def files_are_not_synced() -> None:
    io.sync_file = lambda fd, path: None


def directories_are_not_synced() -> None:
    io.sync_dir = lambda path: None


def small_files_are_synced_after_they_were_renamed() -> None:
    def put(self: RunFolder, name: str, data: bytes, home: Path) -> None:
        temporary, target = self.path / f"{Path(name).name}.tmp", home / name
        fd = io.create(temporary)
        io.write_at(fd, str(temporary), 0, data)
        io.rename(temporary, target)
        io.sync_file(fd, str(target))
        io.close(fd)
        io.sync_dir(target.parent)

    RunFolder.put = put


def a_header_is_written_after_the_sync() -> None:
    def stage(self: shards.ShardFile) -> None:
        io.write_at(self._open(direct=False), self.part, 0, self.shard.header)
        _stage(self)

    shards.ShardFile.stage = stage


def the_index_comes_before_the_shards() -> None:
    published_first(INDEX)


def the_config_comes_first() -> None:
    published_first(CONFIG)


def the_report_comes_before_the_index() -> None:
    directory.LATE = (MARKER, INDEX, CONFIG)


def published_first(name: str) -> None:
    def publish(self: OutputDirectory, staged: list[str], late: Late) -> None:
        self.own.put(name, late[name], self.path)
        _publish(self, staged, late)

    OutputDirectory.publish = publish


def an_overwrite_leaves_the_old_markers() -> None:
    def remove(self: OutputDirectory, files: list[str]) -> None:
        real = RunFolder.take_away
        RunFolder.take_away = lambda self, name: None if name in LATE else real(self, name)
        _remove_all(self, files)
        RunFolder.take_away = real

    OutputDirectory._remove = remove


def an_overwrite_that_was_cut_short_is_not_begun_again() -> None:
    RunFolder.write_down = lambda self, record: _write_down(self, {**record, "replaces": False})


def a_short_write_is_taken_for_a_whole_one() -> None:
    def write_at(fd: int, path: str, offset: int, data: Any, *, direct: bool = False) -> None:
        with io._writing(path, "write"):
            os.pwrite(fd, data, offset)

    io.write_at = write_at


def a_short_read_is_taken_for_a_whole_one() -> None:
    def read_into(fd: int, path: str, offset: int, buffer: memoryview) -> None:
        with io.reading(path, "read"):
            os.preadv(fd, [buffer], offset)

    io.read_into = read_into


def a_failed_sync_is_tried_again() -> None:
    real = io.sync_file

    def sync(fd: int, path: str) -> None:
        try:
            real(fd, path)
        except WriteError:
            real(fd, path)

    io.sync_file = sync


def what_is_there_is_not_read_again() -> None:
    class Good:
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None

    recovery.block_digest = lambda pieces: Good()


def the_checksum_of_the_journal_is_not_looked_at() -> None:
    def parsed(line: bytes) -> Any:
        text = line.partition(b" ")[2]
        return _parsed(journal.xxhash.xxh3_64_hexdigest(text).encode() + b" " + text)

    journal._parsed = parsed


def the_unfinished_run_of_another_merge_is_gone_on_with() -> None:
    def claim(self: OutputDirectory, identity: Mapping[str, Any], files: list[str], *, overwrite: bool) -> bool:
        for folder, run in self.runs().items():
            found = {name: value for name, value in run.items() if name != "digest"}
            (folder / RUN).write_bytes(strict_json.dumps(sealed({**found, "fingerprint": identity["fingerprint"]})))
        return _claim(self, identity, files, overwrite=overwrite)

    OutputDirectory.claim = claim


def a_link_is_written_through() -> None:
    def opened(path: str | os.PathLike[str], operation: str, flags: int) -> int:
        with io._writing(path, operation):
            return os.open(path, flags | os.O_RDWR | os.O_CLOEXEC, 0o666)

    io._open = opened


MUTANTS: Mapping[Callable[[], None], str] = {
    files_are_not_synced: "order",
    directories_are_not_synced: "order",
    small_files_are_synced_after_they_were_renamed: "order",
    a_header_is_written_after_the_sync: "order",
    the_index_comes_before_the_shards: "order",
    the_config_comes_first: "order",
    the_report_comes_before_the_index: "order",
    an_overwrite_leaves_the_old_markers: "order",
    an_overwrite_that_was_cut_short_is_not_begun_again: "kills",
    a_short_write_is_taken_for_a_whole_one: "errnos",
    a_short_read_is_taken_for_a_whole_one: "errnos",
    a_failed_sync_is_tried_again: "errnos",
    what_is_there_is_not_read_again: "kills",
    the_checksum_of_the_journal_is_not_looked_at: "kills",
    the_unfinished_run_of_another_merge_is_gone_on_with: "kills",
    a_link_is_written_through: "kills",
}
"""Every mutant, and the campaign that is asked first: the one that has to catch it."""


# --- the campaigns ----------------------------------------------------------------------------------------------------
class Judges:
    """Small forms of the three campaigns, prepared without any mutant."""

    def __init__(self, root: Path) -> None:
        made = {}
        for name in ("sharded", "subject", "overwrite", "foreign"):
            (root / name).mkdir(parents=True)
            made[name] = (Errors if name == "sharded" else Campaign)(name, root / name)
        self.campaigns: dict[str, Campaign] = made
        self.root = root
        warm_up(made["sharded"])

    def order(self) -> list[str]:
        """What the order checker says of runs that nobody disturbs."""
        wrong = []
        for name in ("sharded", "overwrite"):
            self.campaigns[name].layout.prepare()
            if self.campaigns[name].run() == OUT_OF_ORDER:
                wrong.append(f"{name}: out of order")
        return wrong

    def kills(self) -> list[str]:
        """What kills find: with damage, with a link for a journal, within and right after the removal of what an
        overwrite replaces."""
        sharded, subject, overwrite, foreign = (
            self.campaigns[name] for name in ("sharded", "subject", "overwrite", "foreign")
        )
        # Between the removals of the old report and of the old config.json and index, which are moved away first.
        cut = next(n for n, pair in enumerate(pairwise(overwrite.changes)) if pair == ("rename", "remove")) + 3
        steps: list[Callable[[], object]] = [subject.linked, foreign.point]
        steps += [partial(overwrite.point, cut, again) for again in range(44, 60, 4)]
        steps += [partial(subject.point, at, damaged=True) for at in range(80, subject.operations, 45)]
        steps += [partial(sharded.point, at) for at in range(sharded.operations - 25, sharded.operations, 4)]
        steps += [partial(overwrite.point, at) for at in range(24, overwrite.operations, 12)]
        return first_wrong(steps, [sharded, subject, overwrite, foreign])

    def errnos(self) -> list[str]:
        """What failing and short calls find: some of each kind that matters."""
        campaign = self.campaigns["sharded"]
        assert isinstance(campaign, Errors)
        steps: list[Callable[[], object]] = []
        for kind in ("fsync", "pwrite", "preadv", "replace"):
            count = campaign.calls[False].count(kind)
            code: int | str = "odd" if kind.startswith("p") else errno.EIO
            calls = range(1, count + 1, 1 if kind == "pwrite" else max(1, count // 4))
            steps += [partial(campaign.failing, Fault(at, code, False, kind), resumed=False) for at in calls]
        return first_wrong(steps, [campaign])


def first_wrong(steps: list[Callable[[], object]], campaigns: list[Campaign]) -> list[str]:
    """Take the steps until one of them goes wrong."""
    for step in steps:
        step()
        wrong = [found for campaign in campaigns for found in campaign.wrong]
        if wrong:
            return wrong
    return []


def caught(judges: Judges, name: str, mutant: Callable[[], None]) -> str:
    """The first thing that a campaign says against a mutant; an empty text if there is none."""
    note = judges.root / "said"
    note.unlink(missing_ok=True)

    def work() -> None:
        if name != "order":
            kills.verdict = errnos.verdict = lambda code: code
        mutant()
        note.write_text("\n".join(getattr(judges, name)()))

    child(work)
    assert note.exists(), f"the campaign {name} broke on the mutant {mutant.__name__}"
    return note.read_text().partition("\n")[0]


def main() -> None:
    """Try all mutants, or those whose names hold the text that the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="every campaign on every mutant")
    parser.add_argument("--only", default="", metavar="TEXT")
    arguments = parser.parse_args()
    prepared()
    began = time.monotonic()
    judges = Judges(arguments.folder)
    catches: dict[str, dict[str, str]] = {}
    for mutant, first in MUTANTS.items():
        if arguments.only not in mutant.__name__:
            continue
        found = catches.setdefault(mutant.__name__.replace("_", " "), {})
        for name in sorted(("order", "kills", "errnos"), key=lambda name: name != first):
            said = caught(judges, name, mutant)
            if said:
                found[name] = said.replace(str(arguments.folder), "FOLDER")[:200]
                if not arguments.all:
                    break
    wrong = [f"nobody caught: {name}" for name, found in catches.items() if not found]
    judging = ("order", "kills", "errnos") if arguments.all else ("order",)
    said = {name: caught(judges, name, lambda: None) for name in judging}
    wrong += [f"{name} has something against what is right: {what}" for name, what in said.items() if what]
    figures = {"campaign": "mutants", "points": len(catches), "caught": catches, "wrong": wrong}
    sys.stdout.write(json.dumps({**figures, "seconds": round(time.monotonic() - began, 1)}) + "\n")


if __name__ == "__main__":
    main()
