"""tinker-cookbook's `build_hf_model`, shard by shard. Runs in an environment of its own.

    python merge_tinker.py BASE ADAPTER OUT

The package is installed without what its training needs: of that, importing the merge asks for two modules which it
does not use.
"""

import sys
import types

for name in ("tinker", "pyrage"):
    sys.modules[name] = types.ModuleType(name)

from tinker_cookbook import weights  # noqa: E402 - the two modules must be there first


def main(base: str, adapter: str, output: str) -> None:
    """Merge on the CPU."""
    weights.build_hf_model(
        base_model=base, adapter_path=adapter, output_path=output, merge_strategy="shard", device="cpu"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
