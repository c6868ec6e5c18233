"""Headers of files far larger than any that a test could write: what is accepted, the safetensors library accepts.

The files are sparse: a header, and nothing behind it but the size that it asks for.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from streammerge.core.dtypes import BITS
from streammerge.core.errors import MalformedInputError
from streammerge.formats.safetensors import read_header

EXAMPLES = 5000 if os.environ.get("STREAMMERGE_LONG") == "1" else 250
LARGEST = 2**43
"""Bytes; ext4 has files of twice that."""
SMALL, LARGE = st.sampled_from([0, 1, 2, 2, 3, 4, 4, 6, 8]), st.sampled_from([2**16, 2**21, 2**31, 2**32 - 1, 2**32])
BEYOND = st.sampled_from([2**62, 2**63 - 1, 2**63, 2**64 - 1])
ONE_MORE = st.sampled_from([LARGE] * 6 + [BEYOND] + [SMALL] * 3).flatmap(lambda sizes: sizes)


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header that mostly holds together, and the size of the data behind it."""
    end, document = 0, {}
    for number in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(SMALL, max_size=3))
        shape.insert(draw(st.integers(0, len(shape))), draw(ONE_MORE))
        bits = BITS[dtype]
        for size in shape:
            bits *= size
        nbytes = bits // 8 % 2 ** draw(st.sampled_from([64, 64, 64, 40]))
        shift = draw(st.sampled_from([0] * 12 + [-1, 1]))
        document[f"t{number}"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [max(0, end + shift), max(0, end + shift) + nbytes],
        }
        end += nbytes
    return document, min(LARGEST, max(0, end + draw(st.sampled_from([0] * 12 + [-1, 1, 8]))))


def test_no_header_is_accepted_that_the_safetensors_library_rejects_whatever_its_sizes(tmp_path: Path) -> None:
    path, seen = tmp_path / "x.safetensors", {"accepted": 0, "beyond 4 GiB": 0, "refused": 0}

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(drawn=headers())
    def agrees(drawn: tuple[dict[str, Any], int]) -> None:
        text = json.dumps(drawn[0]).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + drawn[1])
        try:
            header = read_header(path, path.name)
        except MalformedInputError:
            seen["refused"] += 1
            return
        with safe_open(path, framework="np") as reader:
            theirs = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 (the reader is no mapping)
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in theirs.items()}
        assert {info.name: (info.dtype, info.shape) for info in header.tensors} == found
        seen["accepted"] += 1
        seen["beyond 4 GiB"] += drawn[1] > 2**32

    agrees()
    assert min(seen.values()) >= EXAMPLES // 50, seen
