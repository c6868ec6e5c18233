"""An output directory through any sequence of runs, kills, damage, other merges and looks at it.

Every run is the real command in a fork of this process. The model knows which merges may have left something, and what
that allows; at every step a loader may see nothing, a former result or the right one, and the inputs stay as they were.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from streammerge.sinks.records import RUN
from tests.campaigns.kills import KILLED, Killer, bytes_of
from tests.campaigns.watching import Seen, command, differing, snapshot, wrongly_loadable
from tests.refusals.making import MARKER, STAGING, Outcome, inputs_at

MERGES: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "float32": ("--dtype", "float32"),
    "one file": ("--max-shard-size", "1GB"),
    "half": ("--weight", "0.5"),
    "hashes": ("--sha256",),
}
"""Merges of the same base and adapter that give different bytes, and the options that make them."""
NAMED_AS = {
    "float32": "`--dtype`",
    "one file": "`--max-shard-size`",
    "half": "weight of an adapter",
    "hashes": "`--sha256`",
}
"""What a refusal names where this merge is one side and another the other."""
NEVER_MIND = st.sampled_from(
    [(), ("--workers", "1"), ("--workers", "2"), ("--io", "buffered"), ("--read", "pread"), ("--memory", "64MB")]
)
"""Options that change no byte: a run may go on with others than it began with."""
NUMBERS = st.integers(0, 1000)
"""Stand for one of what is there: how far a run got when it was killed is not the same each time, and hypothesis wants
the choices of a sequence not to depend on it."""
DAMAGE, SHARE = st.sampled_from(["flip", "flip", "cut", "remove"]), st.floats(0, 1)
REFUSED = 5
BAD_RECORD, NO_RECORD = "cannot be read", "is not empty"
"""What a refusal says once the record of an unfinished run is damaged, or is not there."""


class World:
    """What all sequences share: the inputs, and the results of undisturbed runs."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "out"
        self.base, self.adapter = inputs_at(root)
        self.healthy: dict[str, dict[str, bytes]] = {}
        for name in MERGES:
            done = self.run(name, root / "healthy")
            assert done.code == 0, done.err
            self.healthy[name] = bytes_of(root / "healthy")
            shutil.rmtree(root / "healthy")
        self.inputs: Seen = snapshot(self.base, self.adapter)

    def run(self, name: str, out: Path, *more: str, at: int = 0, torn: bool = False) -> Outcome:
        """The command of a merge, killed before its n-th change to the disk if `at` is not 0."""
        words = ("run", self.base, self.adapter, "-o", out, *MERGES[name], *more)
        return command(*words, before=lambda: Killer(at, torn=torn) if at else None)


class Machine(RuleBasedStateMachine):
    """The rules. `results` are the merges whose result may be there (None: nothing), `begun` those that may have left
    an unfinished run."""

    world: ClassVar[World]
    tally: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.out = self.world.out
        shutil.rmtree(self.out, ignore_errors=True)
        self.begin_anew({None})

    def begin_anew(self, results: set[str | None]) -> None:
        """Nothing is unfinished, and no record is missing or damaged."""
        self.results: set[str | None] = results
        self.begun: set[str] = set()
        self.excuses: set[str] = set()

    def count(self, what: str) -> None:
        """One more of a kind of step."""
        self.tally[what] = self.tally.get(what, 0) + 1

    @initialize(name=st.sampled_from(sorted(MERGES)), at=st.integers(1, 90))
    def begin(self, name: str, at: int) -> None:
        """Something is there from the start."""
        self.killed(name, at, torn=False, more=())

    @rule(number=NUMBERS, at=st.integers(1, 90), torn=st.booleans(), more=NEVER_MIND)
    def killed_again(self, number: int, at: int, torn: bool, more: tuple[str, ...]) -> None:
        """A run that goes on with an unfinished one, if there is one, and is killed too."""
        self.killed(one_of(self.begun or MERGES, number), at, torn, more)

    @rule(name=st.sampled_from(sorted(MERGES)), at=st.integers(1, 90), kind=DAMAGE, number=NUMBERS, share=SHARE)
    def killed_anew(self, name: str, at: int, kind: str, number: int, share: float) -> None:
        """What is there is thrown away, a run is killed in its place, and what it staged is damaged; it goes on."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.begin_anew({None})
        self.killed(name, at, torn=False, more=())
        self.damage(number, kind, share)
        self.run(name, ())

    @rule(name=st.sampled_from(sorted(MERGES)), at=st.integers(1, 90), torn=st.booleans(), more=NEVER_MIND)
    def killed(self, name: str, at: int, torn: bool, more: tuple[str, ...]) -> None:
        """A run that is killed, unless it ends before."""
        self.settle(name, self.before(), self.world.run(name, self.out, *more, at=at, torn=torn))

    @rule(name=st.sampled_from(sorted(MERGES)), more=NEVER_MIND)
    def run(self, name: str, more: tuple[str, ...]) -> None:
        """A run that nobody disturbs."""
        self.settle(name, self.before(), self.world.run(name, self.out, *more))

    @rule(number=NUMBERS, more=NEVER_MIND)
    def resume(self, number: int, more: tuple[str, ...]) -> None:
        """The command of an unfinished run again, if there is one."""
        name = one_of(self.begun or MERGES, number)
        self.settle(name, self.before(), self.world.run(name, self.out, *more))

    @rule(name=st.sampled_from(sorted(MERGES)), at=st.one_of(st.just(0), st.integers(1, 120)), torn=st.booleans())
    def overwrite(self, name: str, at: int, torn: bool) -> None:
        """A run in the place of whatever is there, killed or not."""
        before = self.before()
        done = self.world.run(name, self.out, "--overwrite", at=at, torn=torn)
        assert done.code in (0, KILLED) or self.excused(done), f"{name} may overwrite {self.told()}: {done.err}"
        self.settle(name, before, done)

    def settle(self, name: str, before: dict[str, bytes], done: Outcome) -> None:
        """Hold the end of a run to what the model allows, and take over what it says."""
        others = (self.results | self.begun) - {name, None}
        match done.code:
            case 0:
                self.count("finished")
                found = bytes_of(self.out)
                assert found == self.world.healthy[name], differing(found, self.world.healthy[name])
                self.begin_anew({name})
            case 77:
                self.count("killed")
                self.results |= {name}
                self.begun |= {name}
            case 5:
                self.count("refused")
                changed = differing(bytes_of(self.out), before)
                assert changed == [], f"{name}, {self.told()}, was refused and changed {changed}: {done.err}"
                assert others or NO_RECORD in self.excuses, f"{name} was refused for {self.told()}: {done.err}"
                told = [all(word in done.err for word in words(name, other)) for other in others]
                named = any(told) or self.excused(done)
                assert named, f"{name}, {self.told()}: the message names another field: {done.err}"
            case _:
                raise AssertionError(f"{name}, {self.told()}: ended with {done.code}: {done.err}")
        if done.code == 0:
            return
        if None not in self.results and len(self.results) == 1 and not self.begun:
            assert done.code == REFUSED, f"{name} does not replace {self.told()}"

    @rule(number=NUMBERS, kind=DAMAGE, share=SHARE)
    def damage(self, number: int, kind: str, share: float) -> None:
        """A byte of what is staged changes, or its end is lost, or all of it."""
        if not self.staged():
            return
        path = self.staged()[number % len(self.staged()) if number % 2 else 0]
        self.count(f"damage: {kind}")
        if path.name == RUN:
            self.excuses.add(NO_RECORD if kind == "remove" else BAD_RECORD)
        content = bytearray(path.read_bytes())
        at = min(int(share * len(content)), len(content) - 1)
        if kind == "remove":
            path.unlink()
        elif kind == "cut":
            path.write_bytes(content[:at])
        else:
            content[at] ^= 0x10
            path.write_bytes(content)

    @rule(verify=st.booleans())
    def look(self, verify: bool) -> None:
        """What is there is told, a finished result is proved and anything else is not; and nothing is touched."""
        before = self.before()
        finished = MARKER in before
        if verify:
            self.count("verify")
            done = command("verify", self.out)
            assert done.code == 0 if finished else done.code in (3, REFUSED), done.err
        else:
            self.count("status")
            done = command("status", self.out, "--json")
            assert done.code == 0, done.err
            assert (json.loads(done.out)["state"] == "finished") == finished, done.out
        assert bytes_of(self.out) == before

    @invariant()
    def a_loader_sees_nothing_or_a_whole_result(self) -> None:
        """What is in place now is no mixture."""
        wholes = [self.world.healthy[name] for name in self.results if name]
        found = bytes_of(self.out)
        assert wrongly_loadable(found, *wholes) == [], self.told()

    @invariant()
    def the_inputs_are_untouched(self) -> None:
        """Content, inode and time of modification."""
        assert snapshot(self.world.base, self.world.adapter) == self.world.inputs

    def before(self) -> dict[str, bytes]:
        """What is there now."""
        return bytes_of(self.out)

    def staged(self) -> list[Path]:
        """The files of unfinished runs that have something in them, largest first."""
        sizes = {path: path.stat().st_size for path in sorted((self.out / STAGING).rglob("*")) if path.is_file()}
        return sorted((path for path, size in sizes.items() if size), key=lambda path: -sizes[path])

    def excused(self, done: Outcome) -> bool:
        """Whether a run was refused for the record of an unfinished run, which says what is its own."""
        return done.code == REFUSED and any(words in done.err for words in self.excuses)

    def told(self) -> str:
        """The model, for a message."""
        return f"results {sorted(map(str, self.results))}, begun {sorted(self.begun)}"


def one_of(names: Iterable[str], number: int) -> str:
    """One of some names."""
    ordered = sorted(names)
    return ordered[number % len(ordered)]


def words(name: str, other: str) -> list[str]:
    """What a refusal of one merge for the sake of another names."""
    return [NAMED_AS[side] for side in (name, other) if side in NAMED_AS]


def prepared_world(root: Path) -> dict[str, Any]:
    """The machine's world made, and the tally it will fill."""
    root.mkdir(parents=True, exist_ok=True)
    Machine.world = World(root)
    Machine.tally = {}
    return Machine.tally
