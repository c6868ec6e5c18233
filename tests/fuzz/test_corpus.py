"""Every case that is kept is replayed: one that widened coverage, or once found a fault; without the fuzzer."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from safetensors import SafetensorError

from streammerge.core.errors import MalformedInputError
from streammerge.formats import safetensors as headers
from tests.fuzz import targets
from tests.fuzz.bombs import OWN, measured, problems
from tests.fuzz.bombs import READERS as FROM_DISK
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
LEAST = 10


def kept(parser: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / parser).iterdir())]


@pytest.mark.parametrize("parser", TARGETS)
def test_every_kept_case_passes_or_is_refused_by_a_documented_error(parser: str) -> None:
    cases = kept(parser)
    accepted = [TARGETS[parser](case) for case in cases]
    assert len(cases) >= LEAST
    assert 1 <= sum(accepted) < len(cases)


@pytest.mark.parametrize("parser", TARGETS)
def test_changed_cases_pass_or_are_refused_too(parser: str) -> None:
    cases, rng, count = kept(parser), Random(5), 0
    for number in range(600):
        case = mutated(parser, rng.choice(cases), rng, lambda part: part[: len(part) // 2] + b"\xff" + part[3:])
        count += TARGETS[parser](case, thorough=number % 8 == 0)
    assert 1 <= count < 600


def test_a_parser_that_accepts_what_the_library_rejects_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps({"t": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}).encode()
    hole = len(text).to_bytes(8, "little") + text + bytes(2)
    assert not targets.fuzz_header(hole)
    monkeypatch.setattr(headers, "_check_tiling", lambda *arguments: None)
    with pytest.raises(SafetensorError, match="invalid offset"):
        targets.fuzz_header(hole)


def test_an_error_of_another_kind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise KeyError("weight_map")

    monkeypatch.setattr(targets, "parse_index", broken)
    with pytest.raises(KeyError):
        targets.fuzz_index(b"{}")
    with pytest.raises(AssertionError, match="is not an error of this parser"):
        targets.refused(MalformedInputError("f", "x"), (targets.AdapterError,), thorough=True)


def test_a_pattern_that_decides_otherwise_than_for_peft_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = b'{"rank_pattern": {"q": 2}}'
    assert targets.fuzz_config(config)
    monkeypatch.setattr(targets.LoraConfig, "rank_of", lambda self, name: None)
    assert targets.fuzz_config(config)
    monkeypatch.setattr("streammerge.methods.patterns.Patterns.value_for", lambda self, module, default: 3)
    with pytest.raises(AssertionError, match="q"):
        targets.fuzz_config(config)


@pytest.mark.parametrize("parser", FROM_DISK)
def test_a_text_made_to_take_memory_takes_no_more_than_64_mib_and_16_times_its_size(
    tmp_path: Path, parser: str
) -> None:
    name, make = next(iter(OWN[parser].items()))
    text = make(2_000_000)
    path = tmp_path / name
    path.write_bytes(len(text).to_bytes(8, "little") * (parser == "header") + text)
    found = measured(lambda: FROM_DISK[parser](path))
    assert found["bytes"] > 0
    assert problems(found | {"seconds": 0}, len(text)) == []


def test_what_takes_too_much_memory_is_noticed() -> None:
    hog = measured(lambda: bytearray(b"\1" * (80 * 2**20)) and None)
    assert hog["bytes"] >= 80 * 2**20
    assert problems(hog | {"seconds": 0}, 1000) == [f"{hog['bytes'] / 2**20:.0f} MiB"]
