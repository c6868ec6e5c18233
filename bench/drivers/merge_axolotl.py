"""axolotl's `merge_lora_sharded_efficient`, its memory-efficient merge. Runs in an environment of its own.

    python merge_axolotl.py BASE ADAPTER OUT

The package is installed without what its training needs, and the one file with the merge is loaded by its path: of the
rest of axolotl it asks for a logger.
"""

import importlib.util
import logging
import sys
import sysconfig
import types
from pathlib import Path

FILE = Path(sysconfig.get_path("purelib"), "axolotl/cli/utils/lora_merge.py")


def load() -> types.ModuleType:
    """The module with the merge, among empty ones."""
    for name in ("axolotl", "axolotl.utils", "axolotl.utils.logging"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["axolotl.utils.logging"].get_logger = logging.getLogger  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("lora_merge", FILE)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{FILE} is not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(base: str, adapter: str, output: str) -> None:
    """Merge on the CPU."""
    load().merge_lora_sharded_efficient(Path(base), Path(adapter), Path(output), device="cpu")


if __name__ == "__main__":
    main(*sys.argv[1:])
