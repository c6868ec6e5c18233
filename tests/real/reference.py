"""What the tests of real adapters compare with: PEFT's own merge and forward pass, and the command line's output."""

import json
import os
import subprocess
import sys
from pathlib import Path

ADAPTERS = Path(__file__).parents[1] / "data" / "real"


def streammerge(*arguments):
    """Run the command line in a process of its own and return what it printed; anything but exit code 0 fails."""
    done = subprocess.run(
        [sys.executable, "-m", "streammerge", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def streammerge_json(*arguments):
    """The same with `--json`, parsed."""
    return json.loads(streammerge(*arguments, "--json"))


def with_adapter(model_class, base, adapter):
    """Base and adapter, as PEFT puts them together."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model_class.from_pretrained(base).eval(), adapter).eval()


def merged_by_peft(model_class, base, adapter):
    """The state dict of PEFT's merge."""
    return with_adapter(model_class, base, adapter).merge_and_unload().state_dict()


def stored(directory):
    """Every tensor of a safetensors checkpoint, by name."""
    from safetensors.torch import load_file

    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def largest_error(ours, theirs):
    """The largest difference of tensors of the same names, relative to the largest value."""
    assert ours.keys() == theirs.keys()
    largest = max(float(tensor.abs().max()) for tensor in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) / largest
