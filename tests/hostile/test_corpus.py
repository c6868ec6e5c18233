"""The corpus of malicious inputs: every eleventh of them in forks, some by the real command, and each a case of its
own. `python -m tests.campaigns.hostile FOLDER` tries all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.case import TOKEN, Place, healthy_place
from tests.hostile.corpus import CASES
from tests.refusals.making import MARKER

ROOT = Path(__file__).parents[2]
BY_COMMAND = (
    "header: 400,000 empty tensors",
    "index: two dots",
    "link: a shard out of the base",
    "pipe: the index",
    "lora: alpha NaN",
    "pattern: counts in counts",
    "pickle: os.system, in an adapter",
    "pickle: it asks for a gigabyte of zeros",
    "sidecar: a link to a secret",
    "typed: a URL with a token",
)


def test_every_input_has_a_name_of_its_own_and_there_are_more_than_a_hundred() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 300
    assert all(case.words for case in CASES if case.code)


def test_malicious_inputs_are_refused_in_words_and_reach_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.campaigns.hostile", str(tmp_path / "campaign"), "--step", "11"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert [one for one in said["wrong"] if " s of the processor" not in one] == []
    assert said["points"] >= 30


@pytest.mark.parametrize("name", BY_COMMAND)
def test_the_real_command_says_the_same(tmp_path: Path, name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    place = healthy_place(tmp_path)
    case.spoil(place)
    done = subprocess.run(
        [sys.executable, "-m", "streammerge", *place.arguments()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == case.code, done.stderr
    assert all(word in done.stderr for word in case.words), done.stderr
    assert not place.out.exists()


def call(place: Place, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streammerge", *place.arguments(), *options]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=120
    )


def test_no_byte_of_a_token_is_in_what_is_written_or_said(tmp_path: Path) -> None:
    place = healthy_place(tmp_path)
    said = []
    for options in ((), ("--verbose", "--overwrite", "--sha256"), ("--json", "--overwrite"), ("--dry-run",)):
        done = call(place, *options, HF_TOKEN=TOKEN, HUGGING_FACE_HUB_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    for text in (f"https://user:{TOKEN}@huggingface.co/org/name", f"org/{TOKEN}", TOKEN):
        place.base_argument = text
        for options in ((), ("--json",)):
            done = call(place, *options, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
            assert done.returncode == 3, done.stderr
            assert "[secret]" in done.stderr
            said.append(done.stdout + done.stderr)
    done = call(place, f"--token={TOKEN}")
    assert done.returncode == 2
    said.append(done.stdout + done.stderr)
    written = [path.read_bytes() for path in place.out.rglob("*") if path.is_file()]
    assert (place.out / MARKER).exists()
    assert not any(TOKEN in text for text in said)
    assert not any(TOKEN.encode() in data for data in written)
