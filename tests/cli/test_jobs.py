"""Job files: the same options under the same names, one job or several, and no silence about what is not understood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.refusals.making import MARKER, call, inputs_at, load_all, make_adapter, merged


def job(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_one_job_does_what_the_same_options_do(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    text = f"""
        base = "{base}"
        adapters = ["{adapter}"]
        output = "{tmp_path / "out"}"
        weight = [0.5]
        dtype = "float32"
        max-shard-size = "5kB"
        memory = "64MB"
        workers = 1
        allow-unused = ["*v_head*"]
    """
    outcome = call("run", "--config", job(tmp_path / "job.toml", text))
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{tmp_path / 'out'}\n"
    options = ("--weight", 0.5, "--dtype", "float32", "--max-shard-size", "5kB", "--allow-unused", "*v_head*")
    merged(base, adapter, tmp_path / "plain", *options)
    assert (tmp_path / "out" / MARKER).read_bytes() == (tmp_path / "plain" / MARKER).read_bytes()


def test_several_jobs_run_in_order_and_share_what_stands_above_them(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    other = make_adapter(tmp_path / "other", lora_alpha=32)
    text = f"""
        base = "{base}"
        dtype = "float32"
        [[job]]
        adapters = "{adapter}"
        output = "{tmp_path / "one"}"
        [[job]]
        adapters = ["{other}"]
        output = "{tmp_path / "two"}"
        dtype = "auto"
    """
    outcome = call("run", "--config", job(tmp_path / "jobs.toml", text))
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == [str(tmp_path / "one"), str(tmp_path / "two")]
    merged(base, adapter, tmp_path / "plain-one", "--dtype", "float32")
    merged(base, other, tmp_path / "plain-two")
    assert load_all(tmp_path / "one") == load_all(tmp_path / "plain-one")
    assert load_all(tmp_path / "two") == load_all(tmp_path / "plain-two")


def test_a_job_that_is_refused_ends_the_list_and_keeps_what_was_done(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    bad = make_adapter(tmp_path / "bad", r=7)
    text = f'base = "{base}"\n' + "".join(
        f'[[job]]\nadapters = "{path}"\noutput = "{tmp_path / name}"\n'
        for path, name in ((adapter, "one"), (bad, "two"), (adapter, "three"))
    )
    outcome = call("run", "--config", job(tmp_path / "jobs.toml", text))
    assert outcome.code == 4
    assert outcome.out.splitlines() == [str(tmp_path / "one")]
    assert (tmp_path / "one" / MARKER).exists()
    assert not (tmp_path / "two").exists()
    assert not (tmp_path / "three").exists()


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    text = f'base = "{base}"\nadapters = "{adapter}"\noutput = "{tmp_path / "file"}"\ndtype = "float32"\n'
    path = job(tmp_path / "job.toml", text)
    outcome = call("run", "--config", path, "--dtype", "float16", "-o", tmp_path / "line")
    assert outcome.out == f"{tmp_path / 'line'}\n"
    assert json.loads((tmp_path / "line" / MARKER).read_text())["options"]["dtype"] == "float16"
    assert not (tmp_path / "file").exists()


def test_a_dry_run_of_jobs_plans_all_of_them(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    text = f'base = "{base}"\nadapters = "{adapter}"\n[[job]]\noutput = "a"\n[[job]]\nweight = 0.5\noutput = "b"\n'
    outcome = call("run", "--config", job(tmp_path / "jobs.toml", text), "--dry-run")
    assert outcome.code == 0
    assert outcome.out.count("changed   4 tensors") == 2
    assert "weight 0.5" in outcome.out


HEAD = 'base = "{base}"\nadapters = "{adapter}"\noutput = "{out}"\n'
WRONG = {
    "not TOML": ("base = ", "is not TOML"),
    "no base": ('adapters = "x"', "needs `base` (text) and `adapters`"),
    "no adapters": ('base = "x"', "needs `base` (text) and `adapters`"),
    "adapters that are numbers": ('base = "x"\nadapters = [1]', "needs `base` (text) and `adapters`"),
    "an unknown option": (HEAD + "dtpye = 1", "sets `dtpye`, which is no option"),
    "job not as tables": (HEAD + "job = 3", "must be written as `[[job]]` tables"),
    "weights that are text": (HEAD + 'weight = ["1"]', "`weight` must be a number or a list of numbers"),
    "a dtype nobody knows": (HEAD + 'dtype = "int8"', "`dtype` is `int8`"),
    "workers as text": (HEAD + 'workers = "two"', "`workers` is `two`"),
    "workers as a truth": (HEAD + "workers = true", "`workers` is `True`"),
    "memory with a fraction": (HEAD + "memory = 1.5", "`memory` is `1.5`"),
    "memory that is no size": (HEAD + 'memory = "much"', "`much` is not a size"),
    "overwrite as text": (HEAD + 'overwrite = "yes"', "`overwrite` is `yes`"),
    "a shard size as a number": (HEAD + "max_shard_size = 5", "`max_shard_size` is `5`"),
    "globs that are numbers": (HEAD + "allow_unused = [1]", "`allow_unused` is"),
    "a device that is a number": (HEAD + "device = 0", "`device` is `0`"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_job_file_that_is_not_understood_exits_with_2(tmp_path: Path, text: str, message: str) -> None:
    base, adapter = inputs_at(tmp_path)
    filled = text.format(base=base, adapter=adapter, out=tmp_path / "out") if text.startswith(HEAD) else text
    outcome = call("run", "--config", job(tmp_path / "job.toml", filled))
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_missing_job_file_is_named(tmp_path: Path) -> None:
    outcome = call("run", "--config", tmp_path / "none.toml")
    assert outcome.code == 3
    assert f"`{tmp_path / 'none.toml'}` does not exist" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{base}", "{adapter}"), "`--config` holds base"),
        (("--weight", "0.5"), "`--config` holds base"),
        (("-o", "{out}"), "does not say which of several jobs it is for"),
    ],
)
def test_what_a_job_file_decides_is_not_said_twice(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    base, adapter = inputs_at(tmp_path)
    places = {"base": base, "adapter": adapter, "out": tmp_path / "out"}
    text = f'base = "{base}"\nadapters = "{adapter}"\n[[job]]\noutput = "{tmp_path / "file"}"\n'
    path = job(tmp_path / "job.toml", text)
    outcome = call("run", "--config", path, *(word.format(**places) for word in arguments))
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "file").exists()
