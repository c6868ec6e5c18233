"""Options: one value with checked fields, from whatever way they are given."""

from __future__ import annotations

import os

import pytest

from streammerge.core import io
from streammerge.core.errors import UsageError
from streammerge.core.machine import available_cores
from streammerge.core.options import DEFAULT_MEMORY, Options


def test_the_defaults_keep_everything_as_it_is() -> None:
    options = Options()
    assert (options.dtype, options.max_shard_size, options.memory) == ("auto", "keep", DEFAULT_MEMORY)
    assert options.shard_limit() is None
    assert options.byte_options() == {
        "dtype": "auto",
        "max_shard_size": "keep",
        "allow_unused": (),
        "ignore_config_field": (),
        "expert_orientation": "auto",
        "peft_version": "auto",
        "expert_packing": "peft",
        "accumulate": "float64",
        "sha256": False,
        "no_code": False,
    }


def test_values_are_taken_as_people_write_them() -> None:
    options = Options.of(
        {"memory": "64MiB", "max_shard_size": "5GB", "allow_unused": "*v_head*", "ignore_config_field": ["a", "b"]}
    )
    assert options.memory == 64 * 2**20
    assert options.shard_limit() == 5 * 10**9
    assert options.allow_unused == ("*v_head*",)
    assert options.ignore_config_field == ("a", "b")


def test_options_that_change_no_byte_stay_out_of_the_plan() -> None:
    fast = Options(workers=8, memory=10**9, read="pread", device="cpu", overwrite=True)
    assert fast.byte_options() == Options().byte_options()
    assert Options(dtype="float32").byte_options() != Options().byte_options()


def test_an_unknown_option_is_a_type_error_that_lists_the_known() -> None:
    with pytest.raises(TypeError, match="unknown option `dtpye`; the options are dtype, max_shard_size"):
        Options.of({"dtpye": "float32"})


@pytest.mark.parametrize(
    "values",
    [
        {"dtype": "int8"}, {"dtype": 16}, {"dtype": None}, {"memory": 0}, {"memory": -1}, {"memory": "much"},
        {"memory": 1.5}, {"memory": True}, {"workers": -1}, {"workers": "2"}, {"workers": 2.0}, {"device": "tpu"},
        {"max_shard_size": "0GB"}, {"max_shard_size": 5}, {"max_shard_size": ""}, {"device": 0}, {"read": "direct?"},
        {"overwrite": "yes"}, {"overwrite": 1}, {"allow_unused": 1}, {"allow_unused": [1]}, {"allow_unused": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_a_usage_error(values: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        Options.of(values)
    assert caught.value.exit_code == 2
    name = next(iter(values))
    assert f"`{name}`" in str(caught.value) or "is not a size" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"/sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"/sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"/sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        ({"/sys/fs/cgroup/cpu.max": "nonsense"}, 8),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_cores_are_those_of_the_affinity_and_of_the_quota(
    files: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(io, "read_text_or_none", files.get)
    assert available_cores() == cores
    assert Options().worker_count() == cores
    assert Options(workers=3).worker_count() == 3
