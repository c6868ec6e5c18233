"""Verification: any change of a finished output, another base or adapter, is found; what cannot be checked is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from streammerge import api
from streammerge.core import io, strict_json
from streammerge.core.digests import sealed
from streammerge.core.errors import InputReadError
from streammerge.verification import sampled_blocks
from tests.refusals.making import (
    call,
    inputs_at,
    make_adapter,
    make_base,
    merged,
    shard_name,
    tree_digest,
)
from tests.verification.outputs import ORIGIN, SECOND, failed, finished, flip


# --- what holds -------------------------------------------------------------------------------------------------------
def test_a_finished_output_is_verified_and_left_as_it_is(tmp_path: Path) -> None:
    _, _, out = finished(tmp_path)
    before = tree_digest(out)
    outcome = call("verify", out)
    assert outcome.code == 0
    assert outcome.out == f"{out}: verified, 6 blocks checked, 1 block derived again from the inputs\n"
    assert (
        call("verify", out, "--full").out
        == f"{out}: verified, 6 blocks checked, 2 blocks derived again from the inputs\n"
    )
    assert call("verify", out, "--sample", "100%").out.endswith("2 blocks derived again from the inputs\n")
    assert call("verify", out, "--sample", "50").out.endswith("1 block derived again from the inputs\n")
    assert tree_digest(out) == before


def test_an_output_can_be_moved_and_given_its_inputs_by_hand(tmp_path: Path) -> None:
    base, adapter, out = finished(tmp_path)
    for path in (base, adapter, out):
        path.rename(path.with_name(f"{path.name}-moved"))
    moved = out.with_name("out-moved")
    options = ("--base", tmp_path / "base-moved", "--adapter", tmp_path / "adapter-moved")
    outcome = call("verify", moved, "--full", *options)
    assert outcome.code == 0, outcome.err
    assert "2 blocks derived again" in outcome.out


def test_names_with_colons_are_found_again(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "a:b" / "base"), make_adapter(tmp_path / "a:b" / "adapter")
    merged(base, adapter, tmp_path / "out")
    assert "1 block derived again" in call("verify", tmp_path / "out").out


@pytest.mark.parametrize("gone", ["base", "adapter", "both", "record"])
def test_without_its_inputs_only_the_digests_of_an_output_are_checked_and_that_is_said(
    tmp_path: Path, gone: str
) -> None:
    base, adapter, out = finished(tmp_path)
    for path in {"base": [base], "adapter": [adapter], "both": [base, adapter], "record": []}[gone]:
        shutil.rmtree(path)
    if gone == "record":
        (out / ORIGIN).unlink()
    outcome = call("verify", out)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{out}: verified, 6 blocks checked\n"
    assert "note: " in outcome.err
    assert "digests were checked, nothing was derived again" in outcome.err
    assert ("is gone" in outcome.err) == (gone != "record")
    for options in (("--full",), ("--sample", "5%")):
        outcome = call("verify", out, *options)
        assert outcome.code == 3
        assert "give `--base` and `--adapter`" in outcome.err
    flip(out / SECOND, -1)
    failed(out, SECOND)


@pytest.mark.parametrize("record", [{}, {"base": 1, "adapters": []}, {"base": "x", "adapters": [1]}])
def test_a_record_of_the_inputs_that_makes_no_sense_is_none(tmp_path: Path, record: dict[str, object]) -> None:
    _, _, out = finished(tmp_path)
    (out / ORIGIN).write_bytes(strict_json.dumps(sealed(record)))
    outcome = call("verify", out)
    assert outcome.code == 0, outcome.err
    assert "where base and adapters are is not recorded" in outcome.err


def test_several_adapters_with_weights_are_verified_in_their_order(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one, two = make_adapter(tmp_path / "one"), make_adapter(tmp_path / "two", lora_alpha=1)
    merged(base, [one, two], tmp_path / "out", "--weight", 0.5, "--weight", -1, "--dtype", "float32")
    assert call("verify", tmp_path / "out", "--full").code == 0
    inputs = ("--base", base, "--adapter", one, "--adapter", two)
    assert call("verify", tmp_path / "out", "--full", *inputs).code == 0
    failed(tmp_path / "out", options=("--adapter", two, "--adapter", one))
    outcome = call("verify", tmp_path / "out", "--adapter", one)
    assert outcome.code == 2
    assert "2 weights given for 1 adapter" in outcome.err


@pytest.mark.parametrize(
    "options", [("--max-shard-size", "3kB"), ("--dtype", "float16"), ("--allow-unused", "*x*"), ("-j", "1")]
)
def test_outputs_of_other_options_are_derived_again_with_them(tmp_path: Path, options: tuple[str, ...]) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out", *options)
    outcome = call("verify", tmp_path / "out", "--full", "-j", "2", "--memory", "64MB")
    assert outcome.code == 0, outcome.err


# --- after a run ------------------------------------------------------------------------------------------------------
def test_a_run_checks_what_it_wrote_and_says_so_unless_told_not_to(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    assert "1 block read back and derived again" in merged(base, adapter, tmp_path / "one").err
    assert "derived again" not in merged(base, adapter, tmp_path / "two", "--no-verify").err


def test_a_disk_that_gives_back_something_else_is_found_after_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = make_base(tmp_path / "base", shards=1), make_adapter(tmp_path / "adapter")
    write = io.write_at

    def lying(fd: int, path: str, offset: int, data: memoryview | bytes, *, direct: bool = False) -> None:
        if ".safetensors" in path and len(data) > 3000:
            data[3000] ^= 1  # type: ignore[index]
        write(fd, path, offset, data, direct=direct)

    monkeypatch.setattr(io, "write_at", lying)
    outcome = call("run", base, adapter, "-o", tmp_path / "out")
    assert outcome.code == 6
    assert "`model.safetensors` differs from what was written" in outcome.err


def test_a_base_that_is_exchanged_between_writing_and_checking_is_found(tmp_path: Path) -> None:
    shards = 7  # more than are held open at a time, so that the first is opened a second time
    base, adapter = make_base(tmp_path / "base", shards=shards), make_adapter(tmp_path / "adapter")
    first = base / shard_name(0, shards)

    def progress(event: api.Event) -> None:
        if event.kind == "verify":
            other = tmp_path / "other"
            shutil.copy(first, other)
            flip(other, -1)
            other.replace(first)

    with pytest.raises(InputReadError, match="the file changed while it was being used"):
        api.merge(base, adapter, tmp_path / "out", progress=progress)
    failed(tmp_path / "out", "the base's weights are not those the output was made from")


# --- the sample -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 0.5, 1.0])
def test_a_sample_is_a_share_of_the_blocks_spread_evenly_and_never_none(tmp_path: Path, share: float) -> None:
    base, adapter = make_base(tmp_path / "base", shards=8), make_adapter(tmp_path / "adapter")
    plan = api.plan(base, adapter)
    every = [(number, 0) for number in range(8)]
    for seed in ("00000000", "0000abcd", "ffffffff"):
        blocks = sampled_blocks(plan, share, seed)
        assert blocks
        assert set(blocks) <= set(every)
        assert len(blocks) >= round(share * 8) - 1
    assert sampled_blocks(plan, 1.0, "12345678") == every


def test_over_all_seeds_every_block_is_in_some_sample(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base", shards=8), make_adapter(tmp_path / "adapter")
    plan = api.plan(base, adapter)
    seen = {block for seed in range(64) for block in sampled_blocks(plan, 0.05, f"{seed:08x}")}
    assert seen == {(number, 0) for number in range(8)}
