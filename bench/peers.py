"""The peers: what each is, its own virtual environment with pinned versions, and the command that merges with it.

    python bench/peers.py --dir DIR

makes the environments in DIR/environments; compare.py does so too, before it measures anything. A peer merges in a
process that is started with (base, adapter, output), as streammerge is: drivers/ has one script for each.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import parser_of, run, working_directory

TORCH = "torch==2.13.0"
DRIVERS = Path(__file__).parent / "drivers"


@dataclass(frozen=True)
class Peer:
    """`alone` is installed without its dependencies, which are those of a whole training stack; `needed` is what its
    merge imports of them, in the versions that it asks for. It merges the `kinds` of bases."""

    name: str
    title: str
    needed: tuple[str, ...]
    alone: tuple[str, ...]
    kinds: tuple[str, ...]

    def environment(self, directory: Path) -> Path:
        """The interpreter of its environment, which is made unless it is complete."""
        root = directory / "environments" / self.name
        python, complete = root / "bin" / "python", root / "complete.txt"
        wanted = "\n".join((TORCH, *self.needed, *self.alone)) + "\n"
        if not complete.exists() or complete.read_text() != wanted:
            print(f"making the environment of {self.title}", flush=True)
            shutil.rmtree(root, ignore_errors=True)
            run([sys.executable, "-m", "venv", root])
            pip: Sequence[str | Path] = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
            # torch by itself: its version and build are to be the same for everybody.
            for step in ((TORCH,), (TORCH, *self.needed), ("--no-deps", *self.alone) if self.alone else ()):
                if step:
                    run([*pip, *step])
            complete.write_text(wanted)
        return python

    def command(self, directory: Path) -> list[str | Path]:
        """What merges, with base, adapter and output still to be appended."""
        return [self.environment(directory), DRIVERS / f"merge_{self.name}.py"]


PEERS = (
    Peer("peft", "PEFT 0.21.2", ("peft==0.21.2", "transformers==5.23.0"), (), ("llama", "moe", "one-tensor")),
    # Both leave out LoRA on an embedding. Of experts, the first takes its own stacked adapters only; the second stacks
    # experts that are stored one by one, and leaves out what an adapter changes of a single one.
    Peer("tinker", "tinker-cookbook 0.6.1", ("transformers==5.23.0",), ("tinker-cookbook==0.6.1",), ("llama",)),
    Peer("axolotl", "axolotl 0.19.0", ("peft==0.20.0", "transformers==5.16.1"), ("axolotl==0.19.0",), ("llama",)),
)


def main() -> None:
    """Make every environment."""
    arguments = parser_of(__doc__).parse_args()
    with working_directory(arguments.dir) as directory:
        for peer in PEERS:
            print(f"{peer.title:24} {peer.environment(directory)}")


if __name__ == "__main__":
    main()
