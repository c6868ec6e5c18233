"""What durability costs: both ways write the same weights, one of them without a sync or a digest, and the ratio is
taken within a round."""

import json
import re

import streammerge as sm
from tests.bench.processes import BENCH, bench, digests, python, section


def test_the_merge_without_protection_writes_the_same_weights_and_digests_none_of_them(small, tmp_path):
    out = tmp_path / "bare"
    done = python(BENCH / "unprotected.py", small / "base", small / "adapter", "-o", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sm.merge(small / "base", small / "adapter", tmp_path / "whole")
    bare, whole = digests(out), digests(tmp_path / "whole")
    assert bare.pop("streammerge.json") != whole.pop("streammerge.json")
    assert bare == whole
    files = json.loads((out / "streammerge.json").read_text())["files"].values()
    assert {block for file in files for block in file["blocks"]} == {"0" * 32}


def test_the_cost_is_the_median_ratio_of_runs_of_one_round(tmp_path):
    rounds = [
        {"protected": 1.1, "unprotected": 1.0},
        {"protected": 2.0, "unprotected": 2.0},
        {"protected": 4.2, "unprotected": 4.0},
    ]
    entry = {"machine": "a machine", "day": "2026-01-02", "command": "python bench/durability.py"}
    entry |= {"base": "llama-4GB", "bytes": 1, "rank": 16, "rounds": rounds}
    (tmp_path / "durability.json").write_text(json.dumps({"entries": [entry]}))
    done = python(
        "-c", f"import durability, pathlib; durability.write_durability(pathlib.Path({str(tmp_path)!r}))", cwd=BENCH
    )
    assert done.returncode == 0, done.stderr
    assert "llama-4GB, r=16: 2.00 s, without it 2.00 s: +5.0% (rounds from +0.0% to +10.0%)" in section(
        tmp_path, "durability"
    )


def test_both_ways_are_measured_in_every_round(tmp_path):
    options = ("--bases", "one-tensor-4MB", "--rank", "2", "--rounds", "2", "--results", tmp_path / "kept")
    said = bench("durability.py", "--dir", tmp_path / "made", *options, cwd=tmp_path)
    assert re.findall(r"round (\d) (\w+)", said) == [
        ("1", "unprotected"), ("1", "protected"), ("2", "protected"), ("2", "unprotected"),
    ]  # fmt: skip
    assert "3 rounds" not in (text := section(tmp_path / "kept", "durability"))
    assert "2 rounds" in text
