"""Adding a method takes what CONTRIBUTING.md says, and no more: a file and two rows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import streammerge

ROOT = Path(streammerge.__file__).parents[1]


def with_shift(target: Path) -> Path:
    """A copy of the package with the method of CONTRIBUTING.md in it."""
    package = target / "streammerge"
    shutil.copytree(ROOT / "streammerge", package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding a method")[2]
    (package / "methods" / "types" / "shift.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    add(package / "names" / "grammar.py", "_METHODS = {\n", '    "shift": "shift_s",\n')
    table = package / "methods" / "__init__.py"
    add(table, "METHODS: Mapping[str, Method] = MappingProxyType(\n    {\n", '        "SHIFT": Shift(),\n')
    add(
        table,
        "from streammerge.methods.types.lokr import LoKr\n",
        "from streammerge.methods.types.shift import Shift\n",
    )
    return target


def add(path: Path, after: str, line: str) -> None:
    """Put a line into a file."""
    text = path.read_text()
    assert text.count(after) == 1, after
    path.write_text(text.replace(after, after + line))


def test_a_method_is_a_file_and_two_rows(tmp_path: Path) -> None:
    weight, shift = torch.randn(6, 4), torch.randn(6)
    (tmp_path / "base").mkdir()
    save_file({"layer.weight": weight}, tmp_path / "base" / "base.safetensors")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"base_model.model.layer.shift_s": shift}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIFT", "alpha": 0.5}))
    command = [
        sys.executable,
        "-m",
        "streammerge",
        "run",
        tmp_path / "base" / "base.safetensors",
        adapter,
        "-o",
        tmp_path / "out",
    ]
    environment = os.environ | {"PYTHONPATH": str(with_shift(tmp_path / "copy"))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out" / "base.safetensors")["layer.weight"]
    assert torch.equal(found, (weight.double() + 0.5 * shift.double()[:, None]).float())
