"""What durability costs: every way writes the same weights, one of them without a sync or a digest, and costs are
taken within rounds."""

import json
import re

import streammerge as sm
from tests.bench.processes import BENCH, bench, digests, python, section


def test_the_merge_without_protection_writes_the_same_weights_and_digests_none_of_them(small, tmp_path):
    out = tmp_path / "bare"
    done = python(BENCH / "protection.py", "without", small / "base", small / "adapter", "-o", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sm.merge(small / "base", small / "adapter", tmp_path / "whole")
    bare, whole = digests(out), digests(tmp_path / "whole")
    assert bare.pop("streammerge.json") != whole.pop("streammerge.json")
    assert bare == whole
    files = json.loads((out / "streammerge.json").read_text())["files"].values()
    assert {block for file in files for block in file["blocks"]} == {"0" * 32}


def test_the_merge_with_clocks_is_the_same_merge_and_says_what_they_showed(small, tmp_path):
    out = tmp_path / "timed"
    done = python(BENCH / "protection.py", "timed", small / "base", small / "adapter", "-o", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert min(json.loads(done.stdout.splitlines()[-1])[name] for name in ("sync", "digest")) > 0
    sm.merge(small / "base", small / "adapter", tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_costs_are_of_medians_and_of_rounds(tmp_path):
    rounds = [
        {"checked": 1.3, "protected": 1.1, "unprotected": 1.0},
        {"checked": 2.0, "protected": 2.0, "unprotected": 2.0},
        {"checked": 5.0, "protected": 4.2, "unprotected": 4.0},
    ]
    entry = {"machine": "a machine", "day": "2026-01-02", "command": "python bench/durability.py"}
    entry |= {"base": "llama-4GB", "bytes": 1, "rank": 16, "rounds": rounds, "cpu": rounds, "workers": 4}
    entry["timed"] = [{"sync": 0.01, "digest": 0.2}]
    (tmp_path / "durability.json").write_text(json.dumps({"entries": [entry]}))
    done = python(
        "-c", f"import durability, pathlib; durability.write_durability(pathlib.Path({str(tmp_path)!r}))", cwd=BENCH
    )
    assert done.returncode == 0, done.stderr
    text = section(tmp_path, "durability")
    assert "protected 2.00 s (2.00 CPU s), unprotected 2.00 s" in text
    assert "sync and digests: +0.0% of the medians, +5.0% as the median of 3 rounds" in text
    assert "0.010 s of sync and 0.20 s of digests on 4 threads, at most +3.0%" in text
    assert "the check after the run: +0.0% of the medians, +18.2% as the median of 3 rounds" in text


def test_every_way_is_measured_in_every_round(tmp_path):
    options = ("--bases", "one-tensor-4MB", "--rank", "2", "--rounds", "2", "--results", tmp_path / "kept")
    said = bench("durability.py", "--dir", tmp_path / "made", *options, cwd=tmp_path)
    ways = ("checked", "protected", "unprotected", "timed")
    assert sorted(re.findall(r"round (\d) (\w+)", said)) == sorted((n, way) for n in "12" for way in ways)
    assert "2 rounds" in section(tmp_path / "kept", "durability")
