"""The campaigns that write RESULTS.md: what they keep, what they make of it, and that nobody is timed for less work."""

import json
import re
import shutil
import sys
from xml.etree import ElementTree

import pytest
from safetensors.torch import load_file, save_file

import streammerge as sm
from tests.bench.processes import bench, cells, digests, section, started

SVG = "{http://www.w3.org/2000/svg}"


def run_of(contender, rank, seconds, max_rss=10**9, cold="all", size=10**9):
    figures = {"seconds": seconds, "sync_seconds": 0.5, "cpu_seconds": 2 * seconds, "max_rss": max_rss, "bytes": size}
    return {"contender": contender, "rank": rank, "cold": cold} | figures


def entry_of(base, rounds):
    about = {"machine": "a machine", "day": "2026-01-02", "command": "python bench/compare.py"}
    return about | {"base": base, "bytes": 10**9, "checks": {}, "rounds": rounds}


@pytest.fixture
def kept(tmp_path):
    """Three rounds on a disk that gets slower: no median of seconds has the ratio of the rounds."""
    rounds = [
        [run_of("copy", None, 1.0), run_of("streammerge", 16, 1.1), run_of("peft", 16, 11.0)],
        [run_of("copy", None, 2.0), run_of("streammerge", 16, 2.0), run_of("peft", 16, 10.0)],
        [run_of("copy", None, 4.0), run_of("streammerge", 16, 5.0, 3 * 10**9), run_of("peft", 16, 30.0)],
    ]
    (tmp_path / "comparison.json").write_text(json.dumps({"entries": [entry_of("llama-1GB", rounds)]}))
    return tmp_path


def test_the_table_has_medians_and_ratios_that_are_taken_within_a_round(kept, tmp_path):
    bench("tables.py", "--results", kept, cwd=tmp_path)
    rows = [cells(line)[1:] for line in section(kept, "comparison").splitlines() if line.startswith("| llama")]
    copy, own, peft = rows
    assert copy == [
        "", "`cp -r` and sync", "all", "2.00 s (1.00 to 4.00)", "0.50 s", "2.00 s", "", "", "", "4.0 s", "1000 MB",
    ]  # fmt: skip
    assert own == [
        "16", "streammerge", "all", "2.00 s (1.10 to 5.00)", "0.50 s", "2.00 s", "1.10", "", "", "4.0 s", "3000 MB",
    ]  # fmt: skip
    assert peft == [
        "16", "PEFT 0.21.2", "all", "11.00 s (10.00 to 30.00)", "0.50 s", "11.00 s", "7.50", "6.00", "", "22.0 s",
        "1000 MB",
    ]  # fmt: skip


def test_ratios_are_of_runs_on_the_same_cache_and_a_rank_is_compared_with_the_lowest(tmp_path):
    rounds = [
        [
            run_of("copy", None, copy), run_of("copy", None, copy / 2, cold="files"),
            run_of("streammerge", 16, own), run_of("streammerge", 16, own / 4, cold="files"),
            run_of("streammerge", 64, 1.2 * own), run_of("streammerge", 64, 1.5 * own / 4, cold="files"),
        ]
        for copy, own in ((1.0, 2.0), (3.0, 3.0), (2.0, 6.0))
    ]  # fmt: skip
    (tmp_path / "comparison.json").write_text(json.dumps({"entries": [entry_of("llama-1GB", rounds)]}))
    bench("tables.py", "--results", tmp_path, cwd=tmp_path)
    rows = [cells(line) for line in section(tmp_path, "comparison").splitlines() if line.startswith("| llama")]
    # Rank, cold, to copy, to the lowest rank.
    assert [(row[1], row[3], row[7], row[9]) for row in rows] == [
        ("", "all", "", ""), ("", "files", "", ""),
        ("16", "all", "2.00", ""), ("16", "files", "1.00", ""),
        ("64", "all", "2.40", "1.20"), ("64", "files", "1.50", "1.50"),
    ]  # fmt: skip


def test_the_cost_of_a_gigabyte_is_compared_over_bases_that_differ_in_size_only(tmp_path):
    sizes = {"llama-1GB": (10**9, 3.0), "llama-4GB": (4 * 10**9, 6.0), "llama-16GB": (16 * 10**9, 20.0)}
    sizes["moe"] = (10**9, 7.0)
    entries = [
        entry_of(base, [[run_of("streammerge", 16, seconds, size=size)]]) for base, (size, seconds) in sizes.items()
    ]
    (tmp_path / "comparison.json").write_text(json.dumps({"entries": entries}))
    bench("tables.py", "--results", tmp_path, cwd=tmp_path)
    (row,) = [cells(line) for line in section(tmp_path, "comparison").splitlines() if line.startswith("| llama | 16")]
    per_size, steps = "1GB: 3.00 s, 4GB: 1.50 s, 16GB: 1.25 s", "1 to 4 GB: 1.00 s, 4 to 16 GB: 1.17 s"
    assert row == ["llama", "16", "streammerge", "all", per_size, "2.40", steps]


def test_the_same_figures_are_the_same_bytes_and_the_text_around_them_stays(kept, tmp_path):
    (kept / "RESULTS.md").write_text("before\n\n<!-- comparison -->\nold\n<!-- /comparison -->\n\nafter\n")
    bench("tables.py", "--results", kept, cwd=tmp_path)
    first = digests(kept)
    bench("tables.py", "--results", kept, cwd=tmp_path)
    assert digests(kept) == first
    text = (kept / "RESULTS.md").read_text()
    assert re.fullmatch(r"before\n\n<!-- comparison -->\n.+\n<!-- /comparison -->\n\nafter\n", text, re.DOTALL)
    assert "\nold\n" not in text
    assert "(comparison.svg)" in text


@pytest.mark.parametrize("old", ["", "old\n"])
def test_a_section_that_is_empty_or_not_is_replaced_and_the_next_one_stays(old, kept, tmp_path):
    rest = "\nafter\n\n<!-- memory -->\nkept\n<!-- /memory -->\n"
    (kept / "RESULTS.md").write_text(f"<!-- comparison -->\n{old}<!-- /comparison -->\n{rest}")
    bench("tables.py", "--results", kept, cwd=tmp_path)
    assert (kept / "RESULTS.md").read_text().endswith(f"(comparison.svg)\n<!-- /comparison -->\n{rest}")
    assert section(kept, "comparison").startswith("- llama-1GB: `python bench/compare.py`; 3 rounds; ")


def test_a_section_without_its_end_is_left_alone(kept, tmp_path):
    (kept / "RESULTS.md").write_text("<!-- comparison -->\nafter\n")
    done = started("tables.py", "--results", kept, cwd=tmp_path)
    assert (done.returncode, "not both in order" in done.stderr) == (1, True)
    assert (kept / "RESULTS.md").read_text() == "<!-- comparison -->\nafter\n"


def test_the_plot_has_a_dot_for_each_contender_where_its_medians_are(kept, tmp_path):
    bench("tables.py", "--results", kept, cwd=tmp_path)
    drawn = ElementTree.parse(kept / "comparison.svg")
    dots = {(dot[0].text, dot.get("cx")) for dot in drawn.iter(f"{SVG}circle") if len(dot)}
    # Seconds from 2 to 20 on 380 pixels: a factor of 10; 11 s is log10(5.5) of the way. Memory is 1 GB for both.
    assert dots == {
        ("copy: 2", "174.0"), ("streammerge: 2", "174.0"), ("peft: 11", "455.3"),
        ("streammerge: 1", "594.0"), ("peft: 1", "594.0"),
    }  # fmt: skip
    words = {text.text for text in drawn.iter(f"{SVG}text")}
    assert {"llama-1GB, r=16", "wall time, s", "peak memory, GB", "PEFT 0.21.2", "2", "5", "10", "20"} <= words


def test_a_campaign_measures_every_contender_in_rounds_and_leaves_nothing(tmp_path):
    results = tmp_path / "results"
    (tmp_path / "work").mkdir()
    said = bench(
        "compare.py", "--bases", "llama-2MB,one-tensor-2MB", "--ranks", "4", "--contenders", "streammerge,copy",
        "--rounds", "2", "--cold", "nothing,files", "--results", results, "--", "-j", "1", cwd=tmp_path / "work",
    )  # fmt: skip
    line = r"^llama-2MB +round 2 +streammerge r=4 +cold: files +\d+\.\d+ s \(sync"
    assert len(re.findall(line, said, re.MULTILINE)) == 1
    entries = json.loads((results / "comparison.json").read_text())["entries"]
    assert [entry["base"] for entry in entries] == ["llama-2MB", "one-tensor-2MB"]
    order = [
        ("copy", None, "files"), ("copy", None, "nothing"), ("streammerge", 4, "files"), ("streammerge", 4, "nothing"),
    ]  # fmt: skip
    for entry in entries:
        cases = [[(run["contender"], run["rank"], run["cold"]) for run in one] for one in entry["rounds"]]
        assert cases == [order, order]
        assert all(run["bytes"] >= entry["bytes"] and run["max_rss"] > 0 for one in entry["rounds"] for run in one)
        assert entry["command"].endswith("--results DIR -- -j 1")
        assert str(tmp_path) not in json.dumps(entry)
    assert section(results, "comparison").count("| streammerge | files |") == 2
    assert ElementTree.parse(results / "comparison.svg").getroot().tag == f"{SVG}svg"
    assert list((tmp_path / "work").iterdir()) == []


def test_another_campaign_replaces_the_bases_that_it_measures_and_keeps_the_others(kept, tmp_path):
    old = entry_of("llama-2MB", [[run_of("copy", None, 9.0)]])
    path = kept / "comparison.json"
    entries = json.loads(path.read_text())["entries"]
    path.write_text(json.dumps({"entries": [old, *entries]}))
    arguments = ("--bases", "llama-2MB", "--contenders", "copy", "--rounds", "1", "--cold", "nothing", "--ranks", "2")
    bench("compare.py", *arguments, "--results", kept, cwd=tmp_path)
    new, same = json.loads(path.read_text())["entries"]
    assert (new["base"], new["command"] != old["command"], same) == ("llama-2MB", True, entries[0])


def test_a_peer_is_measured_and_its_output_compared(tmp_path):
    """PEFT, in the tests' own environment in place of one that would have to be made."""
    root = tmp_path / "work" / "environments" / "peft"
    (root / "bin").mkdir(parents=True)
    (root / "complete.txt").write_text("torch==2.13.0\npeft==0.21.2\ntransformers==5.23.0\n")
    (root / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (root / "bin" / "python").chmod(0o755)
    arguments = ("--bases", "llama-2MB", "--contenders", "streammerge,peft", "--rounds", "1", "--ranks", "4")
    results = tmp_path / "results"
    caches = ("--cold", "files,nothing")
    bench("compare.py", *arguments, *caches, "--dir", tmp_path / "work", "--results", results, cwd=tmp_path)
    (entry,) = json.loads((results / "comparison.json").read_text())["entries"]
    # A peer is measured on the coldest cache only.
    measured = [(run["contender"], run["cold"]) for run in entry["rounds"][0]]
    assert measured == [("streammerge", "files"), ("streammerge", "nothing"), ("peft", "files")]
    assert entry["checks"]["peft r=4"]["compared"] > 5
    assert entry["checks"]["peft r=4"]["equal"] > 0.99
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["environments", "llama-2MB"]


@pytest.fixture
def merged(small, tmp_path):
    """A base and its merge."""
    sm.merge(small / "base", small / "adapter", tmp_path / "merged")
    return small / "base", tmp_path / "merged"


def test_an_output_that_is_the_same_merge_is_accepted(merged, tmp_path):
    base, reference = merged
    found = json.loads(bench("outputs.py", base, reference, reference, cwd=tmp_path))
    assert found["equal"] == 1.0
    assert found["compared"] > 10


def test_an_output_that_is_the_base_is_refused(merged, tmp_path):
    base, reference = merged
    done = started("outputs.py", base, reference, base, cwd=tmp_path)
    assert (done.returncode, "times as far from the reference as rounding explains" in done.stderr) == (1, True)


def test_an_output_that_lacks_a_tensor_is_refused(merged, tmp_path):
    base, reference = merged
    shutil.copytree(reference, tmp_path / "output")
    shard = max((tmp_path / "output").glob("*.safetensors"))
    tensors = load_file(shard)
    lost = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, shard)
    done = started("outputs.py", base, reference, tmp_path / "output", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, f"1 tensors are in one output only: {lost}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--contenders", "copy,rsync"),
            "no such contender: rsync; there are copy, streammerge, peft, tinker, axolotl",
        ),
        (("--cold", "coffee"), "no such cache: coffee; there are all, files, nothing"),
        (("--bases", "mamba-1GB"), "no such base: mamba-1GB; a name is one of llama, moe, one-tensor, "),
    ],
)
def test_a_name_that_nothing_has_is_told_with_those_that_there_are(arguments, message, tmp_path):
    done = started("compare.py", *arguments, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (1, True)
