"""The campaigns, a row for each way in which one is run: short, as CI does, and long, as a release does.

`FOLDER` stands for a folder of the row's own. What a row must have tried at least is named by the figures of its
campaign, those in groups as `group/figure`; negative controls, which must find something, are such figures too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Form:
    """The arguments of one form, and the least values of some of its figures."""

    arguments: str
    least: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """A campaign in its two forms. One that measures time on the clock is run `alone`."""

    title: str
    module: str
    short: Form
    long: Form
    alone: bool = False


ROWS = (
    Row(
        "fuzzed parsers",
        "fuzz",
        Form("FOLDER --cases 1000000 --size 3000000 --step 12", {"points": 1_000_000}),
        Form("FOLDER --cases 50000000 --size 3000000 --size 29000000 --size 95000000", {"points": 50_000_000}),
    ),
    Row(
        "kills at every operation",
        "kills",
        Form("FOLDER --step 29 --twice 1", {"points": 30, "pairs": 30}),
        Form("FOLDER --step 1 --twice 2", {"points": 1_000, "pairs": 2_000}),
    ),
    Row(
        "errors and short transfers",
        "errnos",
        Form("FOLDER --step 31", {"points": 50}),
        Form("FOLDER --step 1 --errnos 2", {"points": 1_500}),
    ),
    Row(
        "kills at system calls",
        "syscalls",
        Form("FOLDER --points 4", {"points": 4}),
        Form("FOLDER --points 120", {"points": 100}),
    ),
    *(
        Row(
            f"power loss on {fs}",
            "powerloss",
            Form(
                f"FOLDER --fs {fs} --points 8 --control 10", {"points": 8, "after the end": 1, "without fsync/wrong": 1}
            ),
            Form(f"FOLDER --fs {fs} --points 320 --control 60", {"points": 300, "without fsync/wrong": 1}),
        )
        for fs in ("ext4", "xfs")
    ),
    Row(
        "full disks",
        "full_disk",
        Form("FOLDER --points 6", {"points": 16, "ended/exit code 7": 8}),
        Form("FOLDER --points 60", {"points": 60}),
    ),
    Row(
        "faulty file systems",
        "fuse_faults",
        Form("FOLDER --points 10", {"points": 10, "ended/exit code 3": 1, "ended/exit code 7": 1}),
        Form("FOLDER --points 260", {"points": 200}),
    ),
    Row(
        "little memory",
        "memory_limit",
        Form("FOLDER --size 380MB --limit 360MB", {"points": 3}),
        Form("FOLDER --size 1GB --limit 640MB --kills 5", {"points": 7}),
    ),
    Row("broken protocols", "mutants", Form("FOLDER", {"points": 10}), Form("FOLDER --all", {"points": 10})),
    Row(
        "merges and faults at random",
        "properties",
        Form("FOLDER --pairs 40 --runs 3 --steps 10", {"pairs": 40, "steps/killed": 1, "steps/refused": 1}),
        Form("FOLDER --pairs 2000 --runs 200 --steps 50", {"pairs": 2_000, "sequences": 200}),
    ),
    Row(
        "malicious inputs",
        "hostile",
        Form("FOLDER --step 6", {"points": 50}),
        Form("FOLDER", {"points": 100}),
        alone=True,
    ),
    Row(
        "flipped bits",
        "bit_flips",
        Form("FOLDER --flips 60 --seed 1", {"points": 190}),
        Form("FOLDER --flips 1000 --seed 2", {"points": 1_000}),
    ),
    Row(
        "signals",
        "signals",
        Form("FOLDER --times 4", {"points": 4}),
        Form("FOLDER --times 100 --layers 5", {"points": 100}),
        alone=True,
    ),
    Row("races", "races", Form("FOLDER --times 8", {"points": 8}), Form("FOLDER --times 200", {"points": 200})),
    Row(
        "races without locks",
        "races",
        Form("FOLDER --times 8 --without-locks", {"points": 8}),
        Form("FOLDER --times 200 --without-locks", {"points": 200}),
    ),
)
