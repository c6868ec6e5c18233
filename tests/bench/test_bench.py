"""Every benchmark runs, on sizes too small to say anything: so that none of them rots. No time is looked at."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import streammerge as sm

BENCH = Path(__file__).parents[2] / "bench"


def bench(name, *arguments, cwd):
    """Run a benchmark as a person would, from anywhere, and return what it printed."""
    done = subprocess.run(
        [sys.executable, BENCH / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCH.parent), "TMPDIR": str(cwd)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def digests(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A directory with a base of 5 MB in several shards, and its adapter."""
    root = tmp_path_factory.mktemp("bench")
    bench("make_base.py", root / "made", "--size", "5MB", "--shard-size", "1MB", "--rank", "4", cwd=root)
    return root / "made"


def test_the_same_base_is_built_every_time(small, tmp_path):
    bench("make_base.py", tmp_path / "again", "--size", "5MB", "--shard-size", "1MB", "--rank", "4", cwd=tmp_path)
    assert digests(tmp_path / "again") == digests(small)
    assert len(list((small / "base").glob("*.safetensors"))) > 3


def test_the_llama_is_merged_in_every_linear_layer(small):
    plan = sm.plan(small / "base", small / "adapter")
    linears = [name for name in plan.tensors if name.endswith("_proj.weight")]
    assert {tensor.name for tensor in plan.changed} == set(linears)
    assert 4e6 < plan.figures.write < 6e6


def test_big_tensors_are_two_tables_which_the_adapter_changes_too(tmp_path):
    bench("make_base.py", tmp_path / "made", "--kind", "big-tensors", "--size", "16MB", cwd=tmp_path)
    plan = sm.plan(tmp_path / "made" / "base", tmp_path / "made" / "adapter")
    changed = {tensor.name: tensor.shape for tensor in plan.changed}
    assert changed["model.embed_tokens.weight"] == changed["lm_head.weight"] == (524, 8192)
    assert len(changed) == 2 + 2 * 7


def test_the_files_of_a_sparse_base_take_no_space(tmp_path):
    bench(
        "make_base.py",
        tmp_path / "made",
        "--kind",
        "sparse-70b",
        "--rank",
        "1",
        "--adapter-dtype",
        "BF16",
        cwd=tmp_path,
    )
    files = list((tmp_path / "made" / "base").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 141e9
    assert sum(file.stat().st_blocks * 512 for file in files) < 2e6
    plan = sm.plan(tmp_path / "made" / "base", tmp_path / "made" / "adapter")
    assert (len(plan.tensors), len(plan.changed)) == (723, 560)


def test_memory_prints_the_peak_and_its_parts(small, tmp_path):
    said = bench("memory.py", "--dir", small, "--runs", "1", cwd=tmp_path)
    assert re.search(
        r"streammerge run +peak +\d+\.\d MB .*VmHWM \d+\.\d MB  RssAnon \d+\.\d MB  RssFile \d+\.\d MB", said
    )
    assert not (small / "merged").exists()


def test_startup_prints_a_median_for_each_command(small, tmp_path):
    said = bench("startup.py", "--dir", small, "--runs", "1", cwd=tmp_path)
    for command in ("streammerge --help", "streammerge plan"):
        assert re.search(rf"{command} +median of 1: +\d+\.\d+ s", said)


def test_speed_prints_both_sides_and_their_ratio(tmp_path):
    said = bench("speed.py", "--size", "2MB", "--pairs", "1", "--keep-cache", cwd=tmp_path)
    assert re.search(r"cp -r and sync +median +\d+\.\d+ s", said)
    assert re.search(r"streammerge run +median +\d+\.\d+ s", said)
    assert re.search(r"ratio +median +\d+\.\d+ \(", said)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_fails_the_benchmark_with_its_message(small, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "base").symlink_to(small / "base")
    done = subprocess.run(
        [sys.executable, BENCH / "memory.py", "--dir", tmp_path, "--runs", "1"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(BENCH.parent)},
    )
    assert done.returncode == 1
    assert "exit code 3: " in done.stderr
    assert "adapter_model.safetensors" in done.stderr


def test_the_names_of_both_bases_are_all_found(tmp_path):
    said = bench("names.py", "--runs", "1", "--layers", "2", "--experts", "4", cwd=tmp_path)
    assert "560 operations" in said
    assert "32 operations" in said
