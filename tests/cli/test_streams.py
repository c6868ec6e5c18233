"""What goes where: results to stdout, everything else to stderr, JSON that parses, codes that mean one thing."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from pathlib import Path

import pytest

from streammerge import __version__
from streammerge.cli import main
from tests.refusals.making import (
    HIDDEN,
    INDEX,
    MARKER,
    PREFIX,
    TARGETS,
    all_factors,
    base_tensors,
    call,
    inputs_at,
    make_adapter,
    make_base,
    merged,
    normal,
)


def test_a_run_prints_the_output_and_nothing_else_on_stdout(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    outcome = merged(base, adapter, tmp_path / "out")
    assert outcome.out == f"{tmp_path / 'out'}\n"
    lines = outcome.err.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["1/2", "2/2"]
    assert {line.split()[1] for line in lines[:2]} == {path.name for path in base.glob("*.safetensors")}
    assert "100%" in lines[1]
    assert lines[-1].startswith("4 tensors changed; 9.08 kB written and checked in ")
    assert "1 block read back and derived again" in lines[-1]


def test_quiet_says_nothing_but_the_result(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    make_adapter(adapter / "another")  # which is worth a note
    outcome = merged(base, adapter, tmp_path / "out", "-q")
    assert outcome.out == f"{tmp_path / 'out'}\n"
    assert outcome.err == ""
    assert call("plan", base, adapter, "-q").err == ""
    assert call("verify", tmp_path / "out", "-q").err == ""


def test_quiet_does_not_silence_a_refusal(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path, r=7)
    outcome = call("run", base, adapter, "-o", tmp_path / "out", "-q")
    assert outcome.code == 4
    assert outcome.err.startswith("error: the factors of ")


def test_a_plan_is_a_text_for_people_on_stdout_and_writes_nothing(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    outcome = call("plan", base, adapter, "-o", tmp_path / "out")
    assert outcome.code == 0
    assert outcome.err == ""
    words = outcome.out
    for line in (
        r"^base +local, 2 files, 7\.78 kB$",
        r"^adapter +local, weight 1, digest [0-9a-f]{12}$",
        r"^output +2 files, 9\.08 kB \([\d.]+ [kMGT]B free\)$",
        r"^changed +4 tensors of 13, by 4 operations$",
        r"^names +4 modules: 4 exact$",
        r"^memory +[\d.]+ MB for \d+ workers?, beside the imported libraries$",
        r"^time +about 0 s at 400 MB/s$",
        rf"^{re.escape(TARGETS[0])}\.weight +16x16 +BF16 +2 +[\d.]+$",
    ):
        assert re.search(line, words, re.MULTILINE), f"{line} is not in\n{words}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_dry_run_is_the_plan(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    options = ("-o", tmp_path / "out", "--dtype", "float32", "--weight", "0.5")
    dry = call("run", base, adapter, *options, "--dry-run")
    assert dry.code == 0
    assert dry.out == call("plan", base, adapter, *options).out
    assert "weight 0.5" in dry.out
    assert not (tmp_path / "out").exists()


def test_verbose_lists_every_tensor_that_a_plan_abridges(tmp_path: Path) -> None:
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(20)]
    tensors = {f"{name}.weight": normal(name, 16, 16, dtype="BF16") for name in names}
    base, adapter = (
        make_base(tmp_path / "base", tensors, shards=1),
        make_adapter(tmp_path / "adapter", all_factors(names)),
    )
    short, long = call("plan", base, adapter).out, call("plan", base, adapter, "-v").out
    assert "... 8 more, all of them with -v" in short
    assert sum(f"{name}.weight" in short for name in names) == 12
    assert sum(f"{name}.weight" in long for name in names) == 20
    assert "more, all" not in long


# --- JSON -------------------------------------------------------------------------------------------------------------
def test_the_plan_as_json_is_one_document_with_every_tensor(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    outcome = call("plan", base, adapter, "--json")
    plan = json.loads(outcome.out)
    assert plan["version"] == 2
    changed = {item["name"]: item["operations"] for item in plan["tensors"] if item["operations"]}
    assert list(changed) == sorted(f"{name}.weight" for name in TARGETS)
    files = {name: shard["file"] for shard in plan["shards"] for name in shard["offsets"]}
    assert files == json.loads((base / INDEX).read_text())["weight_map"]
    for name, operations in changed.items():
        (operation,) = operations
        assert (operation["module"], operation["parameter"]) == (name.removesuffix(".weight"), name)
        assert (operation["rule"], operation["part"]) == ("exact", False)
        assert (operation["place"]["rows"], operation["place"]["cols"]) == ([0, HIDDEN], [0, HIDDEN])
    assert {item["name"] for item in plan["tensors"]} == set(base_tensors())
    assert plan["figures"]["write"] == 9080
    assert call("run", base, adapter, "-o", tmp_path / "out", "--dry-run", "--json").out == outcome.out


def test_inspection_as_json_is_one_document(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    status = json.loads(call("inspect", adapter, "--json").out)
    assert (status["version"], status["peft_type"], status["tensors"], status["refusal"]) == (2, "LORA", 8, None)
    assert [module["module"] for module in status["modules"]] == sorted(TARGETS)
    assert {(module["rank"], module["alpha"], module["scaling"]) for module in status["modules"]} == {(2, 4.0, 2.0)}
    assert {str(module["targets"]) for module in status["modules"]} == {"[]"}
    status = json.loads(call("inspect", adapter, "--base", base, "--json").out)
    weight_map = json.loads((base / INDEX).read_text())["weight_map"]
    for module in status["modules"]:
        name = f"{module['module']}.weight"
        assert (module["canonical"], module["rule"], module["problem"]) == (name, "exact", None)
        assert module["keys"] == [f"{PREFIX}{module['module']}.lora_{half}.weight" for half in "AB"]
        whole = {"rows": [0, HIDDEN, 1, 1, 0], "cols": [0, HIDDEN, 1, 1, 0], "transposed": False, "indices": []}
        assert module["targets"] == [
            {"tensor": name, "file": weight_map[name], "origin": None, "matrix": None, **whole}
        ]


def test_a_refused_inspection_is_still_one_document_and_exits_with_the_refusal(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path, r=7)
    outcome = call("inspect", adapter, "--base", base, "--json")
    assert outcome.code == 4
    status = json.loads(outcome.out)
    assert status["refusal"]["error"] == "ConfigContradictionError"
    assert "the config says 7" in status["refusal"]["message"]
    assert "the config says 7" in outcome.err
    assert len(status["modules"]) == 4


def test_a_verification_as_json_is_one_document(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    report = json.loads(call("verify", tmp_path / "out", "--full", "--json").out)
    assert report["version"] == 1
    assert report["status"] == "verified"
    assert report["blocks_rederived"] == 2
    assert report["changed_tensors"] == 4


def test_a_run_as_json_is_lines_with_a_type(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    outcome = call("run", base, adapter, "-o", tmp_path / "out", "--json")
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert [line["type"] for line in lines] == ["start", "shard", "shard", "summary"]
    assert lines[0]["bytes"] == 9080
    assert sorted(line["bytes"] for line in lines[1:3]) == sorted(
        (tmp_path / "out" / line["file"]).stat().st_size for line in lines[1:3]
    )
    assert lines[-1]["status"] == "done"
    assert lines[-1]["output"] == str(tmp_path / "out")
    again = [json.loads(line) for line in call("run", base, adapter, "-o", tmp_path / "out", "--json").out.splitlines()]
    assert [(line["type"], line["status"]) for line in again] == [("summary", "already complete")]


def test_lines_of_two_workers_do_not_run_into_each_other(tmp_path: Path) -> None:
    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text)
            time.sleep(0.002)
            return written

    base, adapter = make_base(tmp_path / "base", shards=8), make_adapter(tmp_path / "adapter")
    out = Slow()
    with contextlib.redirect_stdout(out):
        code = main(["run", str(base), str(adapter), "-o", str(tmp_path / "out"), "--json", "-j", "4"])
    assert code == 0
    kinds = [json.loads(line)["type"] for line in out.getvalue().splitlines()]
    assert kinds == ["start", *["shard"] * 8, "summary"]


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_refusal_as_json_is_one_line_with_its_data(tmp_path: Path, command: str) -> None:
    tensors = {key.replace("q_proj", "query_proj"): value for key, value in all_factors().items()}
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", tensors)
    outcome = call(command, base, adapter, "-o", tmp_path / "out", "--json")
    assert outcome.code == 4
    error = json.loads(outcome.out)
    assert (error["type"], error["error"], error["exit_code"]) == ("error", "UnmatchedKeysError", 4)
    assert error["total"] == 8
    assert len(error["unmatched"]) == 4
    assert error["unmatched"][0]["key"].endswith("query_proj.lora_A.weight")
    assert any("q_proj.weight" in name for name in error["unmatched"][0]["nearest"])
    assert outcome.err.startswith("error: 4 of 8 adapter keys")


# --- codes ------------------------------------------------------------------------------------------------------------
RUN = ("run", "{base}", "{adapter}", "-o", "{out}")
WRONG = {
    "no command": ((), "COMMAND"),
    "an unknown command": (("merge",), "invalid choice: 'merge'"),
    "no base": (("run",), "BASE is missing"),
    "no adapter": (("run", "{base}"), "ADAPTER is missing"),
    "no output": (("run", "{base}", "{adapter}"), "`--output` is missing"),
    "an unknown option": (("run", "{base}", "{adapter}", "--overwrit"), ""),
    "a misspelt option": (("run", "{base}", "{adapter}", "--owerwrite"), "did you mean --overwrite?"),
    "a dtype of integers": ((*RUN, "--dtype", "int8"), "invalid choice: 'int8'"),
    "a size without a number": ((*RUN, "--memory", "much"), "`much` is not a size"),
    "a size of nothing": ((*RUN, "--max-shard-size", "0GB"), "`0GB` is not a size"),
    "a unit nobody knows": ((*RUN, "--max-shard-size", "5XB"), "not a size"),
    "workers below zero": ((*RUN, "-j", "-1"), "`workers` is -1"),
    "an unknown device": ((*RUN, "--device", "tpu"), "not auto, cpu or cuda"),
    "a weight that is no number": ((*RUN, "--weight", "x"), "invalid float value"),
    "a sample of nothing": (("verify", "{out}", "--sample", "0%"), "not a share such as 5%"),
    "a sample of more than all": (("verify", "{out}", "--sample", "101%"), "not a share such as 5%"),
    "a sample and everything": (("verify", "{out}", "--sample", "5%", "--full"), "not allowed with argument"),
    "no job file": (("run", "--config"), "expected one argument"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    base, adapter = inputs_at(tmp_path)
    places = {"base": base, "adapter": adapter, "out": tmp_path / "out"}
    outcome = call(*(word.format(**places) for word in words))
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["run", "plan", "inspect", "verify", "demo"])
def test_every_command_has_help_on_stdout_that_lists_its_options_and_the_codes(command: str) -> None:
    outcome = call(command, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.out.startswith(f"usage: streammerge {command} ")
    assert "exit codes: 0 done, 2 usage, 3 input" in " ".join(outcome.out.split())
    if command in ("run", "plan"):
        for option in (
            "--weight",
            "--dtype",
            "--max-shard-size",
            "--memory",
            "--overwrite",
            "--allow-unused",
            "--json",
        ):
            assert option in outcome.out
    assert ("--dry-run" in outcome.out) == (command == "run")


def test_help_of_the_whole_names_every_command() -> None:
    outcome = call("--help")
    assert outcome.code == 0
    for command in ("run", "plan", "inspect", "verify", "demo"):
        assert f"    {command} " in outcome.out


def test_the_version_is_the_packages() -> None:
    assert call("--version").out == f"streammerge {__version__}\n"


def test_no_color_is_honoured_and_a_terminal_gets_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    texts = []
    for setting in ("", "1"):
        monkeypatch.setenv("NO_COLOR", setting)
        err = Terminal()
        with contextlib.redirect_stderr(err):
            assert main(["plan", str(tmp_path / "none"), str(tmp_path / "none")]) == 3
        texts.append(err.getvalue())
    assert texts[0].startswith("\033[31merror:\033[0m `")
    assert texts[1].startswith("error: `")
    assert "\033" not in texts[1]


def test_bars_that_the_hub_client_is_told_not_to_show_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    outcome = merged(base, adapter, tmp_path / "out")
    assert ".safetensors" not in outcome.err
    assert "4 tensors changed" in outcome.err


def test_a_run_says_where_rounding_took_a_large_part_of_a_delta(tmp_path: Path) -> None:
    tensors = {key: normal(key, *value.shape, scale=0.02) for key, value in all_factors().items()}
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", tensors)
    outcome = merged(base, adapter, tmp_path / "out")
    assert "rounding to the output's dtype took more than a tenth of the delta of" in outcome.err
    assert "`--dtype float32` keeps all of it" in outcome.err
    report = json.loads((tmp_path / "out" / MARKER).read_text())
    assert min(item["survived"] for item in report["tensors"].values()) < 0.9
    assert "rounding" not in merged(base, adapter, tmp_path / "wide", "--dtype", "float32").err
