"""SHA-256 of an output as other tools take it: `sha256sum -c`, and hashes of a tree without links."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from streammerge.core import io
from streammerge.core.errors import WriteError
from streammerge.sinks.hashes import SUMS, sums_of
from streammerge.sinks.run_folder import RunFolder
from tests.refusals.making import BASE_CONFIG, INDEX, MARKER, call, inputs_at, merged, tree_digest
from tests.verification.outputs import FIRST, ORIGIN, SECOND, failed, flip

ODD = [
    "sub/with space.txt",
    "back\\slash.txt",
    "new\nline.txt",
    " leading.txt",
    "-dash.txt",
    "\u00fcml\u00e4ut.txt",
    "cr\r.txt",
]


def sha256sum(folder: Path) -> subprocess.CompletedProcess[str]:
    """What the tool says of the sums in a folder, with every line taken seriously."""
    command = ["sha256sum", "--strict", "-c", SUMS]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    base, adapter = inputs_at(tmp_path)
    for name in ODD:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f"this is {name}")
    merged(base, adapter, tmp_path / "out", "--sha256")
    return tmp_path / "out"


def test_sha256sum_takes_the_sums_and_they_name_every_file_but_those_that_are_written_last(out: Path) -> None:
    done = sha256sum(out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    there = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {FIRST, SECOND, INDEX, BASE_CONFIG, *ODD} <= there
    assert done.stdout.count(": OK\n") == len(there - {SUMS, MARKER, ORIGIN})


@pytest.mark.parametrize("file", [FIRST, INDEX, BASE_CONFIG, ODD[0], ODD[1], ODD[2]])
def test_sha256sum_finds_what_was_changed(out: Path, file: str) -> None:
    flip(out / file, -1)
    done = sha256sum(out)
    assert done.returncode == 1
    assert done.stdout.count("FAILED") == 1
    failed(out, SECOND if file == SECOND else "differs from what was written")


def test_the_sums_are_a_file_of_the_output_like_any_other(out: Path) -> None:
    entry = json.loads((out / MARKER).read_text())["sidecars"][SUMS]
    assert entry["sha256"] == hashlib.sha256((out / SUMS).read_bytes()).hexdigest()
    assert call("verify", out, "--full").code == 0
    flip(out / SUMS, 3)
    failed(out, f"`{SUMS}` differs from what was written")
    (out / SUMS).unlink()
    failed(out, f"`{SUMS}` is missing")


def test_sums_and_signatures_of_the_base_are_not_taken_for_the_outputs(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    for name in (SUMS, "model.sig", "weights.sha256"):
        (base / name).write_text("of the base")
    merged(base, adapter, tmp_path / "plain")
    merged(base, adapter, tmp_path / "out", "--sha256")
    left_out = json.loads((tmp_path / "plain" / MARKER).read_text())["left_out"]
    assert left_out == dict.fromkeys(
        (SUMS, "model.sig", "weights.sha256"), "checksums or a signature of the base's files"
    )
    assert not (tmp_path / "plain" / SUMS).exists()
    assert sha256sum(tmp_path / "out").returncode == 0


def test_a_run_that_was_stopped_after_the_sums_goes_on_and_one_without_them_takes_them_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "healthy", "--sha256")
    real = RunFolder.put

    def stop(self: RunFolder, name: str, data: bytes, home: Path) -> None:
        if name == INDEX:
            raise WriteError(name, "stop at", "for the test")
        real(self, name, data, home)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "put", stop)
        assert call("run", base, adapter, "-o", tmp_path / "out", "--sha256").code == 7
    assert io.exists(tmp_path / "out" / SUMS)
    merged(base, adapter, tmp_path / "out", "--sha256")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "healthy")
    merged(base, adapter, tmp_path / "out", "--overwrite")
    assert not (tmp_path / "out" / SUMS).exists()
    assert call("verify", tmp_path / "out").code == 0


def test_lines_are_those_of_sha256sum(tmp_path: Path) -> None:
    names = ["plain", "a b", "back\\slash", "new\nline", "cr\rcr", "\u00fc"]
    for name in names:
        (tmp_path / name).write_text(name)
    command = ["sha256sum", "--", *sorted(names)]
    theirs = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    assert sums_of({name: hashlib.sha256(name.encode()).hexdigest() for name in names}) == theirs


def test_an_output_holds_no_links_whatever_its_base_is_made_of(tmp_path: Path) -> None:
    """Tools that sign a tree refuse links in it."""
    base, adapter = inputs_at(tmp_path)
    for path in [path for path in base.iterdir() if path.is_file()]:
        blob = base / "blobs" / path.name
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        path.symlink_to(f"blobs/{path.name}")
    merged(base, adapter, tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()] == []
