"""streammerge against copying the base and against the other mergers: one command, from nothing to table and plot.

    python bench/compare.py --dir DIR
    python bench/compare.py --dir DIR --bases llama-4GB --ranks 16,64 --contenders copy,streammerge --rounds 5

builds bases, adapters and the peers' environments where they are not in DIR yet, and measures in rounds: each contender
once for each rank and each of `--cold`, in a process of its own, its output removed afterwards. `all` empties the page
cache (root; it empties it for everybody), so that programs and their libraries are read from the disk too; `files`
drops base, adapter and outputs only. Peers take minutes, and are measured on the first of them. Everybody's time ends
when the files of the output are on the disk. Ratios are taken within a round, because a shared disk is not as fast now
as it was a minute ago; figures are medians over rounds. In the first round the peers' outputs are compared with
streammerge's. The figures are written after every round, so that a campaign that is cut off is not lost; another one
replaces the bases that it measures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bases import ALL, Base, bases_of, ranks_of, size_of
from measure import STREAMMERGE, compile_package, drop_caches, evict, parser_of, run, working_directory
from peers import PEERS, Peer
from results import RESULTS, about, store
from tables import write_comparison

from streammerge.core.text import parse_size

COPY, OWN = "copy", "streammerge"
NAMES = (COPY, OWN, *(peer.name for peer in PEERS))
ALL_COLD, FILES_COLD, NOTHING_COLD = "all", "files", "nothing"
COLD = (ALL_COLD, FILES_COLD, NOTHING_COLD)
"""What is not in the page cache when a run begins, the coldest first."""


@dataclass(frozen=True)
class Campaign:
    """What is measured on every base. `options` are further ones of `streammerge run`, `cold` is some of COLD; peers
    merge bases of up to `peer_size` bytes."""

    directory: Path
    contenders: Sequence[str]
    ranks: Sequence[int]
    rounds: int
    peer_size: int
    cold: Sequence[str]
    options: Sequence[str]

    def peers(self, base: Base, size: int) -> list[Peer]:
        """The peers that merge this base."""
        chosen = [peer for peer in PEERS if peer.name in self.contenders and base.kind in peer.kinds]
        # Sizes are said roughly; 4GB is a base of 4.1.
        return chosen if size <= 1.1 * self.peer_size else []

    def commands(self, base: Base) -> Iterator[tuple[str, int | None, list[str | Path]]]:
        """One round: contender, rank, and the command to which the output is still to be appended."""
        built = {rank: base.build(self.directory, rank) for rank in self.ranks}
        source = self.directory / base.name / "base"
        if COPY in self.contenders:
            yield COPY, None, ["cp", "-r", source]
        for rank, (root, adapter) in built.items():
            if OWN in self.contenders:
                yield OWN, rank, [*STREAMMERGE, "run", root, adapter, *self.options, "-o"]
            for peer in self.peers(base, size_of(source)):
                yield peer.name, rank, [*peer.command(self.directory), root, adapter]

    def measure(self, base: Base, results: Path) -> None:
        """All rounds on one base, stored after each."""
        cases = [(*case, cold) for case in self.commands(base) for cold in self.cold_of(case[0])]
        entry = about() | {"base": base.name, "bytes": size_of(self.directory / base.name / "base")}
        entry |= {"checks": {}, "rounds": []}
        shutil.rmtree(self.reference, ignore_errors=True)
        for number in range(1, self.rounds + 1):
            entry["rounds"].append([])
            for name, rank, command, cold in cases:
                used = self.measured(base, cold, command)
                case = {"contender": name, "rank": rank, "cold": cold}
                print(said(base.name, number, case, used), flush=True)
                entry["rounds"][-1].append(case | used)
                if number == 1 and name not in (COPY, OWN) and (found := self.checked(base, rank)):
                    entry["checks"][f"{name} r={rank}"] = found
                self.keep_reference(name, number)
            shutil.rmtree(self.reference, ignore_errors=True)
            store(results, entry)

    @property
    def output(self) -> Path:
        return self.directory / "output"

    @property
    def reference(self) -> Path:
        return self.directory / "reference"

    def cold_of(self, name: str) -> Sequence[str]:
        """On which caches a contender is measured."""
        return self.cold if name in (COPY, OWN) else self.cold[:1]

    def measured(self, base: Base, cold: str, command: Sequence[str | Path]) -> dict[str, float]:
        """One run that finds no output, and what it took until its files were on the disk."""
        shutil.rmtree(self.output, ignore_errors=True)
        # Nobody pays for what another one left to be written.
        os.sync()
        if cold == ALL_COLD:
            drop_caches()
        elif cold == FILES_COLD:
            evict([self.directory / base.name])
        merge = run([*command, self.output])
        sync = run(["sync", *(path for path in self.output.rglob("*") if path.is_file())])
        return {
            "seconds": merge.seconds + sync.seconds,
            "sync_seconds": sync.seconds,
            "cpu_seconds": merge.cpu_seconds + sync.cpu_seconds,
            "max_rss": merge.max_rss,
            "bytes": size_of(self.output),
        }

    def checked(self, base: Base, rank: int | None) -> dict[str, float] | None:
        """How a peer's output compares with streammerge's of the same rank, if there is one; SystemExit if it is
        another merge."""
        if not self.reference.exists():
            return None
        script = Path(__file__).parent / "outputs.py"
        source = self.directory / base.name / "base"
        found: dict[str, float] = json.loads(run([sys.executable, script, source, self.reference, self.output]).output)
        print(f"{base.name:15} as streammerge's at r={rank}: {found['equal']:.2%} of values bit by bit", flush=True)
        return found

    def keep_reference(self, name: str, number: int) -> None:
        """Remove the output; streammerge's of the first round is kept until the next one where peers follow."""
        if name == OWN and number == 1 and any(peer.name in self.contenders for peer in PEERS):
            shutil.rmtree(self.reference, ignore_errors=True)
            self.output.rename(self.reference)
        shutil.rmtree(self.output, ignore_errors=True)


def said(base: str, number: int, case: Mapping[str, Any], used: Mapping[str, float]) -> str:
    """One run as a line."""
    rate, rank = used["bytes"] / used["seconds"] / 1e6, f"r={case['rank']}" if case["rank"] else ""
    return (
        f"{base:15} round {number}  {case['contender']:11} {rank:5} cold: {case['cold']:7} {used['seconds']:7.2f} s "
        f"(sync {used['sync_seconds']:.2f})  {rate:5.0f} MB/s  CPU {used['cpu_seconds']:7.2f} s  "
        f"peak {used['max_rss'] / 1e6:6.0f} MB"
    )


def contenders_of(text: str) -> list[str]:
    """The contenders of a list with commas, in their order; SystemExit for a name that nobody has."""
    names = text.split(",")
    if unknown := sorted(set(names) - set(NAMES)):
        raise SystemExit(f"no such contender: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return [name for name in NAMES if name in names]


def cold_of(text: str) -> list[str]:
    """Those of COLD that are in a list with commas, in their order; SystemExit for one that there is not."""
    names = text.split(",")
    if unknown := sorted(set(names) - set(COLD)):
        raise SystemExit(f"no such cache: {', '.join(unknown)}; there are {', '.join(COLD)}")
    return [name for name in COLD if name in names]


def permitted(cold: Sequence[str]) -> list[str]:
    """What of it this user can make cold; SystemExit where that is nothing."""
    left = [name for name in cold if name != ALL_COLD or drop_caches()]
    if ALL_COLD in cold and ALL_COLD not in left:
        print(f"NOT MEASURED: cold: {ALL_COLD}: emptying the page cache is not permitted", flush=True)
    if not left:
        raise SystemExit(f"nothing is left to measure; `--cold {FILES_COLD}` is permitted to everybody")
    return left


def parsed() -> argparse.Namespace:
    """The arguments."""
    parser = parser_of(__doc__)
    parser.add_argument("--bases", type=bases_of, default=ALL, help=f"default {ALL}")
    parser.add_argument("--ranks", type=ranks_of, default="16,64", help="default 16,64")
    parser.add_argument("--contenders", type=contenders_of, default=",".join(NAMES), help=f"default {','.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers-up-to", type=parse_size, default="4GB", help="larger bases are not for peers")
    parser.add_argument(
        "--cold", type=cold_of, default="all,files", help=f"some of {','.join(COLD)} (default all,files)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where RESULTS.md is (default: here)")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="further options of `streammerge run`")
    return parser.parse_args()


def main() -> None:
    """Build, measure, write."""
    arguments = parsed()
    compile_package()
    # No peer is to ask the network about a directory.
    os.environ["HF_HUB_OFFLINE"] = "1"
    with working_directory(arguments.dir) as directory:
        campaign = Campaign(
            directory,
            arguments.contenders,
            arguments.ranks,
            arguments.rounds,
            arguments.peers_up_to,
            permitted(arguments.cold),
            arguments.options,
        )
        for base in arguments.bases:
            campaign.measure(base, arguments.results / "comparison.json")
    write_comparison(arguments.results)


if __name__ == "__main__":
    main()
