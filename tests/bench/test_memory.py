"""Peak memory, as it is measured and kept: of runs that write, of one in a cgroup, of one that writes nothing."""

import json
import re

import streammerge as sm
from tests.bench.processes import bench, section, started


def test_memory_keeps_the_peak_and_its_parts_of_every_base(tmp_path):
    results = tmp_path / "results"
    (tmp_path / "work").mkdir()
    said = bench(
        "memory.py", "--bases", "llama-2MB,one-tensor-2MB", "--ranks", "2", "--limited", "one-tensor-2MB",
        "--streamed", "llama-2MB,llama-6MB", "--results", results, cwd=tmp_path / "work",
    )  # fmt: skip
    assert re.search(
        r"llama-2MB, r=2 +peak +\d+\.\d MB .*VmHWM \d+\.\d MB  RssAnon \d+\.\d MB  RssFile \d+\.\d MB", said
    )
    imports, llama, one, small, large = json.loads((results / "memory.json").read_text())["entries"]
    peak = llama["peaks"]["2"][0]["max_rss"]
    assert imports["peaks"]["-"][0]["max_rss"] < peak
    assert f"| llama-2MB | {llama['bytes'] / 1e6:.3g} MB | 2 | {peak / 1e6:.0f} MB |" in section(results, "memory")
    (limited,) = one["limited"]
    assert limited["limit"] == 640 * 10**6
    # Either it ran in its cgroup, or what forbade it is said, on the screen and in the results.
    where = "finished" if "max_rss" in limited else f"not measured: {limited['refused']}"
    assert f"one-tensor-2MB in a memory cgroup of 640 MB: {where}" in section(results, "memory")
    assert ("NOT MEASURED" in said) == ("refused" in limited)
    assert [entry["base"] for entry in (small, large)] == ["llama-2MB, streamed", "llama-6MB, streamed"]
    for entry in (small, large):
        steps = entry["streamed"]["steps"]
        assert list(steps) == ["opened", "planned", "streamed", "reported"]
        peaks = [step["VmHWM"] for step in steps.values()]
        assert 0 < peaks[0] <= peaks[1] <= peaks[2] <= peaks[3]
    found = (large["streamed"]["steps"]["reported"]["VmHWM"] - small["streamed"]["steps"]["reported"]["VmHWM"]) / 1e6
    times = large["bytes"] / small["bytes"]
    assert f"- A base {times:.0f} times as large took {found:+.0f} MB." in section(results, "memory")
    assert list((tmp_path / "work").iterdir()) == []


def test_what_is_streamed_is_what_a_run_writes(small, tmp_path):
    sm.merge(small / "base", small / "adapter", tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "streammerge.json").read_text())["files"]
    streamed = json.loads(bench("streamed.py", small / "base", small / "adapter", cwd=tmp_path))
    assert streamed["digests"] == {name: file["digest"] for name, file in written.items()}
    assert streamed["bytes"] == sum(file["size"] for file in written.values())


def test_a_process_that_needs_more_than_its_cgroup_does_not_finish(tmp_path):
    said = started(
        "memory.py", "--bases", "one-tensor-2MB", "--ranks", "2", "--limit", "60MB", "--limited", "one-tensor-2MB",
        "--streamed", "llama-2MB", "--results", tmp_path, cwd=tmp_path,
    )  # fmt: skip
    assert "NOT MEASURED" in said.stdout or (said.returncode == 1 and "exit code -9" in said.stderr)


def test_a_run_that_fails_fails_the_benchmark_with_its_message(small, tmp_path):
    made = tmp_path / "work" / "llama-2MB"
    (made / "adapter-r2").mkdir(parents=True)
    (made / "adapter-r2" / "adapter_config.json").write_text("{}")
    (made / "base").symlink_to(small / "base")
    arguments = ("--bases", "llama-2MB", "--ranks", "2", "--dir", tmp_path / "work", "--results", tmp_path / "results")
    done = started("memory.py", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "exit code 3: " in done.stderr
    assert "adapter_model.safetensors" in done.stderr
