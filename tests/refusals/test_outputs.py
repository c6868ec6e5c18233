"""Where a run may write: an empty directory, its own unfinished run, its own finished result; nothing else, and what is
there is not touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streammerge.core import io, strict_json
from streammerge.core.digests import sealed
from streammerge.core.errors import WriteError
from streammerge.sinks.run_folder import TAKEN
from tests.refusals.making import (
    BASE_CONFIG,
    INDEX,
    MARKER,
    STAGING,
    call,
    inputs_at,
    make_adapter,
    make_base,
    merged,
    refused,
    shard_name,
    tree_digest,
)
from tests.verification.outputs import flip


def states(root: Path) -> dict[str, tuple[int, int, int]]:
    """What tells every file from one written again."""
    found = {path: path.stat() for path in root.rglob("*") if path.is_file()}
    return {str(path): (stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in found.items()}


def header_of(out: Path) -> bytes:
    """The beginning of the first shard, which its header is in."""
    return (out / shard_name(0, 2)).read_bytes()[:4096]


def unfinished(base: Path, adapter: Path, out: Path, *options: str) -> Path:
    """What a run leaves that was killed after publishing one shard: that shard, and the staging area."""
    complete = out.with_name(f"{out.name}-complete")
    merged(base, adapter, complete, *options)
    fingerprint = json.loads((complete / MARKER).read_text())["fingerprint"]
    files = [shard_name(0, 2), shard_name(1, 2), "generation_config.json"]
    run = out / STAGING / fingerprint[:16]
    run.mkdir(parents=True)
    (run / "run.json").write_bytes(strict_json.dumps(sealed({"fingerprint": fingerprint, "plan": "", "files": files})))
    (run / f"{shard_name(1, 2)}.4711.part").write_bytes(b"half")
    shutil.copy(complete / shard_name(0, 2), out)
    return complete


# --- refused ----------------------------------------------------------------------------------------------------------
def stopped(base: Path, adapter: Path, out: Path, *words: str, options: tuple[str, ...] = ()) -> None:
    """A run that must end with 5 and leave the output as it is."""
    before = states(out)
    outcome = call("run", base, adapter, "-o", out, *options)
    assert outcome.code == 5, outcome.err
    for word in words:
        assert word in outcome.err
    assert outcome.out == ""
    assert states(out) == before


@pytest.mark.parametrize(
    "name", ["notes.txt", BASE_CONFIG, "model.safetensors", ".hidden", "sub/file", ".streammerge-old/x"]
)
@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_a_directory_with_foreign_files_is_refused(tmp_path: Path, name: str, options: tuple[str, ...]) -> None:
    base, adapter = inputs_at(tmp_path)
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    words = ("is not empty: it holds", f"`{name}`", "choose an `--output` that is empty or does not exist")
    stopped(base, adapter, tmp_path / "out", *words, options=options)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (tmp_path / "out").write_text("mine")
    outcome = call("run", base, adapter, "-o", tmp_path / "out")
    assert outcome.code == 5
    assert "is not a directory" in outcome.err
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (tmp_path / "out").mkdir()
    merged(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("where", ["base", "adapter", "base/merged", "adapter/merged", "base/../base", "."])
def test_an_output_that_is_in_or_around_an_input_is_refused(tmp_path: Path, where: str) -> None:
    base, adapter = inputs_at(tmp_path)
    before = tree_digest(tmp_path)
    outcome = call("run", base, adapter, "-o", tmp_path / where)
    assert outcome.code == 5
    assert "lie inside each other" in outcome.err
    assert tree_digest(tmp_path) == before
    assert not (tmp_path / "base" / "merged").exists()


def test_an_output_that_reaches_an_input_by_a_link_is_refused(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (tmp_path / "link").symlink_to(base)
    outcome = call("run", base, adapter, "-o", tmp_path / "link")
    assert outcome.code == 5
    assert "lie inside each other" in outcome.err


def test_an_output_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    outcome = call("run", base, adapter, "-o", tmp_path / "link")
    assert outcome.code == 5
    assert f"the output `{tmp_path / 'link'}` is a link to what is not there" in outcome.err
    assert not (tmp_path / "nowhere").exists()


def test_an_output_in_the_hubs_cache_is_refused(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    outcome = call("run", base, adapter, "-o", tmp_path / "models--org--name" / "snapshots" / "merged")
    assert outcome.code == 5
    assert "lies inside a Hub cache" in outcome.err
    assert not (tmp_path / "models--org--name").exists()


# --- finished ---------------------------------------------------------------------------------------------------------
def test_the_finished_result_of_the_same_plan_is_left_alone_with_exit_0(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    before = states(tmp_path / "out")
    outcome = call("run", base, adapter, "-o", tmp_path / "out")
    assert outcome.code == 0
    assert "already complete" in outcome.err
    assert outcome.out == f"{tmp_path / 'out'}\n"
    assert states(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda out: (out / shard_name(0, 2)).unlink(), f"`{shard_name(0, 2)}` is missing"),
        (lambda out: os.truncate(out / shard_name(1, 2), 4096), f"`{shard_name(1, 2)}` has 4,096 bytes"),
        (lambda out: os.truncate(out / BASE_CONFIG, 3), f"`{BASE_CONFIG}` has 3 bytes"),
        (lambda out: flip(out / INDEX, 40), f"`{INDEX}`"),
        (lambda out: flip(out / "generation_config.json", 3), "`generation_config.json` differs"),
        (lambda out: flip(out / shard_name(0, 2), header_of(out).index(b"model.")), f"`{shard_name(0, 2)}`"),
        (lambda out: flip(out / MARKER, (out / MARKER).read_bytes().index(b"delta_norm")), f"`{MARKER}`"),
        (lambda out: shutil.copy(out / shard_name(0, 2), out / "model.safetensors"), "`model.safetensors` is not"),
    ],
    ids=["no shard", "short shard", "short config", "index", "sidecar", "header", "report", "one more"],
)
def test_a_finished_result_that_was_damaged_since_is_not_called_complete(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    damage(tmp_path / "out")
    before = states(tmp_path / "out")
    for options in ((), ("--no-verify",)):
        outcome = call("run", base, adapter, "-o", tmp_path / "out", *options)
        assert outcome.code == 6, outcome.err
        assert said in outcome.err
        assert "already complete" not in outcome.err
        assert states(tmp_path / "out") == before
    words = call("status", tmp_path / "out").out
    assert "  damaged: " in words
    assert said in words
    assert "every run is refused without `--overwrite`" in words


def test_a_damaged_result_is_made_anew_with_overwrite(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    whole = tree_digest(tmp_path / "out")
    (tmp_path / "out" / shard_name(0, 2)).unlink()
    os.truncate(tmp_path / "out" / shard_name(1, 2), 4096)
    merged(base, adapter, tmp_path / "out", "--overwrite")
    assert tree_digest(tmp_path / "out") == whole


def test_options_that_change_no_byte_belong_to_the_same_plan(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out", "-j", "1", "--memory", "64MB", "--read", "pread")
    outcome = call("run", base, adapter, "-o", tmp_path / "out", "-j", "2", "--memory", "256MB", "--read", "mmap")
    assert outcome.code == 0
    assert "already complete" in outcome.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dtype", "float32"), "`--dtype` (auto there, float32 here)"),
        (("--weight", "0.5"), "another weight of an adapter"),
        (("--max-shard-size", "5kB"), "`--max-shard-size` (keep there, 5kB here)"),
    ],
)
def test_the_finished_result_of_other_options_is_refused(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    words = ("holds the finished result of another merge", "it was made from another ", said, "--overwrite")
    stopped(base, adapter, tmp_path / "out", *words, options=options)


def test_the_finished_result_of_another_adapter_is_refused(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    other = make_adapter(tmp_path / "other", lora_alpha=32)
    stopped(base, other, tmp_path / "out", "holds the finished result of another merge")


def test_the_finished_result_of_a_base_whose_weights_changed_is_refused(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    weights = base / shard_name(0, 2)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x42")
    stopped(base, adapter, tmp_path / "out", "holds the finished result of another merge", "the base's weights")


def test_overwrite_replaces_a_finished_result_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (base / "sub").mkdir()
    (base / "sub" / "extra.txt").write_text("only in the first base")
    merged(base, adapter, tmp_path / "out")
    other = make_base(tmp_path / "other", shards=1)
    merged(other, adapter, tmp_path / "out", "--overwrite")
    merged(other, adapter, tmp_path / "fresh")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "fresh").iterdir()}
    for name in names - {".streammerge-inputs.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_overwrite_does_the_same_plan_again(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    before = states(tmp_path / "out")
    digest = tree_digest(tmp_path / "out")
    merged(base, adapter, tmp_path / "out", "--overwrite")
    after = states(tmp_path / "out")
    assert all(before[name][:2] != after[name][:2] for name in before)
    assert tree_digest(tmp_path / "out") == digest


def test_overwrite_does_not_remove_what_somebody_put_beside_the_result(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    (tmp_path / "out" / "README-mine.md").write_text("mine")
    options = ("--overwrite", "--dtype", "float32")
    # Neither the file nor the result is touched: what would be replaced is refused as a whole.
    stopped(base, adapter, tmp_path / "out", "is not empty: it holds `README-mine.md`", options=options)


def test_a_report_that_was_tampered_with_removes_nothing_outside_the_output(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    (tmp_path / "precious").write_text("mine")
    report = json.loads((tmp_path / "out" / MARKER).read_text())
    report["files"] |= {"../precious": report["files"][shard_name(0, 2)], str(tmp_path / "precious"): {}}
    (tmp_path / "out" / MARKER).write_text(json.dumps(report))
    call("run", base, adapter, "-o", tmp_path / "out", "--overwrite", "--dtype", "float32")
    assert (tmp_path / "precious").read_text() == "mine"


# --- unfinished -------------------------------------------------------------------------------------------------------
def test_the_unfinished_run_of_the_same_plan_is_finished_with_the_same_bytes(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    complete = unfinished(base, adapter, tmp_path / "out")
    merged(base, adapter, tmp_path / "out")
    assert tree_digest(tmp_path / "out") == tree_digest(complete)


def test_the_unfinished_run_of_another_plan_is_refused_and_can_be_overwritten(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    unfinished(base, adapter, tmp_path / "out")
    words = ("holds an unfinished run of another merge", "finish it with the command that began it", "--overwrite")
    stopped(base, adapter, tmp_path / "out", *words, options=("--dtype", "float32"))
    merged(base, adapter, tmp_path / "out", "--dtype", "float32", "--overwrite")
    merged(base, adapter, tmp_path / "fresh", "--dtype", "float32")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "fresh")


def test_a_run_that_was_killed_before_it_wrote_down_its_plan_is_no_obstacle(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (tmp_path / "out" / STAGING).mkdir(parents=True)
    (tmp_path / "out" / STAGING / "run.json.4711.tmp").write_text('{"fing')
    merged(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / STAGING).exists()


@pytest.mark.parametrize("number", range(6))
def test_an_overwrite_that_is_cut_short_while_it_removes_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    remove, calls = io.remove, iter(range(100))

    def cut(path: str | Path) -> None:
        small = str(path).endswith(".tmp") and Path(path).name != TAKEN
        if Path(path).exists() and not small and next(calls) == number:
            raise WriteError(str(path), "remove", "the power went away")
        remove(path)

    monkeypatch.setattr(io, "remove", cut)
    assert call("run", base, adapter, "-o", tmp_path / "out", "--overwrite", "--dtype", "float32").code == 7
    monkeypatch.undo()
    merged(base, adapter, tmp_path / "out", "--overwrite", "--dtype", "float32")
    merged(base, adapter, tmp_path / "fresh", "--dtype", "float32")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "fresh")


# --- space ------------------------------------------------------------------------------------------------------------
def test_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    monkeypatch.setattr(io, "free_space", lambda path: 5000)
    words = ("has 5 kB free, the plan writes 9.1 kB", "nothing was written")
    refused(7, *words, base=base, adapters=adapter)


def test_space_is_not_asked_for_a_result_that_is_already_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    monkeypatch.setattr(io, "free_space", lambda path: 0)
    assert call("run", base, adapter, "-o", tmp_path / "out").code == 0


def test_a_result_that_will_be_replaced_counts_as_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = inputs_at(tmp_path)
    out = tmp_path / "out"
    merged(base, adapter, out)
    before = tree_digest(out)
    monkeypatch.setattr(io, "free_space", lambda path: 0)
    outcome = call("run", base, adapter, "-o", out, "--overwrite", "--dtype", "float32")
    assert outcome.code == 7, outcome.err
    assert tree_digest(out) == before
    assert call("run", base, adapter, "-o", out, "--overwrite").code == 0
    assert tree_digest(out) == before


# --- memory -----------------------------------------------------------------------------------------------------------
def test_a_budget_too_small_is_refused_with_the_figure_that_would_do_and_that_figure_does(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    outcome = refused(2, "the budget is 1 MB", base=base, adapters=adapter, options=("--memory", "1MB"))
    figure = outcome.err.partition("hint: give `--memory ")[2].partition("`")[0]
    assert figure.endswith("MB")
    less = f"{int(figure.removesuffix('MB')) - 1}MB"
    refused(2, f"give `--memory {figure}` or more", base=base, adapters=adapter, options=("--memory", less))
    merged(base, adapter, tmp_path / "out", "--memory", figure)
