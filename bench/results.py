"""Measured figures as they are kept: JSON files, and sections of RESULTS.md.

A JSON file holds entries, one for each base, with the machine, the command and the day; a new entry takes the place of
the old one of that base. A section of RESULTS.md between the markers of its name belongs to these scripts, everything
else to people.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from measure import machine

from streammerge.core.text import count_text

RESULTS = Path(__file__).parent
PLACES = ("--dir", "--results")
Entry = dict[str, Any]


def about() -> Entry:
    """Where, when and how something was measured. Directories are not told: they say nothing of the figures."""
    words = [Path(sys.argv[0]).name]
    for before, word in zip(sys.argv, sys.argv[1:], strict=False):
        words.append("DIR" if before in PLACES else word)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy"))
    day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"machine": f"{machine()}, {versions}", "day": day, "command": f"python bench/{shlex.join(words)}"}


def load(path: Path) -> list[Entry]:
    """The entries of a file; none where there is no file."""
    entries: list[Entry] = json.loads(path.read_text())["entries"] if path.exists() else []
    return entries


def store(path: Path, entry: Entry) -> None:
    """Put an entry in the place of the one of the same base, or behind the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = load(path)
    places = [number for number, old in enumerate(entries) if old["base"] == entry["base"]]
    place = places[0] if places else len(entries)
    entries[place : place + 1] = [entry]
    path.write_text(json.dumps({"entries": entries}, indent=1) + "\n")


def origins(entries: Iterable[Entry]) -> str:
    """Command, rounds, day and machine of the entries; once where they are the same."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        facts = [entry["day"], entry["machine"]]
        if "rounds" in entry:
            facts = [count_text(len(entry["rounds"]), "round"), *facts]
        found.setdefault(f"`{entry['command']}`; {'; '.join(facts)}.", []).append(entry["base"])
    return "\n".join(f"- {', '.join(bases)}: {text}" for text, bases in found.items())


def write_section(results: Path, name: str, text: str) -> None:
    """Put `text` between the markers `name` of RESULTS.md; at its end, with new markers, where it has none. SystemExit
    if only one of them is there."""
    path = results / "RESULTS.md"
    whole = path.read_text() if path.exists() else "# Results\n"
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    if first not in whole and last not in whole:
        whole = f"{whole}\n{first}{last}"
    before, begins, rest = whole.partition(first)
    _, ends, after = rest.partition(last)
    if not (begins and ends):
        raise SystemExit(f"{path} has one of the markers of {name}, not both in order")
    path.write_text(f"{before}{first}{text}\n{last}{after}")
