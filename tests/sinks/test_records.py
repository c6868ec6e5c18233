"""What lies in an output may have been written by anybody: whatever stands in a record in the place of what we write
there, the commands end with a code of the table, and never with a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streammerge.core import strict_json
from streammerge.core.digests import sealed
from streammerge.sinks.records import INPUTS, RUN
from tests.refusals.making import MARKER, call, inputs_at, merged, staged

OTHER_KINDS = (None, -1, "x", [None], {"x": None})


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """Ways to every part of a document, of things that are alike to the first one only."""
    children: Any = enumerate(value[:1]) if isinstance(value, list) else ()
    if isinstance(value, dict):
        names = sorted(value)
        alike = all(isinstance(value[name], dict) for name in names)
        children = [(name, value[name]) for name in (names[:1] if alike else names)]
    for name, child in children:
        yield (name,)
        yield from ((name, *rest) for rest in places(child))


def replaced(value: Any, place: tuple[Any, ...], by: Any) -> Any:
    """The document with another value at a place."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = by
    return copy


def write(path: Path, document: dict[str, Any]) -> None:
    """A record whose own digest fits what it says."""
    document.pop("digest", None)
    path.write_bytes(strict_json.dumps(sealed(document)))


def never_crash(base: Path, adapter: Path, whole: Path, record: Path, document: dict[str, Any]) -> None:
    """Each command, on copies of an output in which a part of the record is of another kind, must end with a code of
    the table. `status` meets all kinds in all places; the runs do at the top, and deeper one of them each, in turn."""
    run = ("run", base, adapter, "-o", "OUT", "--no-verify")
    again = (*run, "--overwrite")
    for turn, place in enumerate(places(document)):
        for number, kind in enumerate(OTHER_KINDS):
            in_turn = {0: [run], 2: [again]}.get((turn + number) % len(OTHER_KINDS), [])
            for command in (("status", "OUT"), *([run, again] if len(place) == 1 else in_turn)):
                out = whole.with_name("spoilt")
                shutil.rmtree(out, ignore_errors=True)
                shutil.copytree(whole, out)
                write(out / record, replaced(document, place, kind))
                outcome = call(*(out if word == "OUT" else word for word in command))
                assert outcome.code in (0, 3, 5, 6), f"{command}, {place}: {kind}: exit {outcome.code}\n{outcome.err}"


@pytest.mark.parametrize("name", [MARKER, INPUTS])
def test_whatever_stands_in_a_record_beside_a_result_no_command_crashes(tmp_path: Path, name: str) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    document = json.loads((tmp_path / "out" / name).read_text())
    never_crash(base, adapter, tmp_path / "out", Path(name), document)


def test_whatever_stands_in_the_record_of_a_run_no_command_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    folder = staged(base, adapter, tmp_path / "out", monkeypatch).relative_to(tmp_path / "out")
    document = json.loads((tmp_path / "out" / folder / RUN).read_text())
    never_crash(base, adapter, tmp_path / "out", folder / RUN, document)
