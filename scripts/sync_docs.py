"""Writes the tables of README.md that the code knows better: options, exit codes, methods, what is refused by name.

Each stands between `<!-- NAME -->` and `<!-- /NAME -->`; what is between them is replaced. With `--check` nothing is
written, and the exit code is 1 if a table is out of date. Run: python scripts/sync_docs.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from streammerge.cli.main import parsers
from streammerge.cli.signals import HANDLED
from streammerge.core.errors import Interrupted, StreamMergeError
from streammerge.core.options import Options
from streammerge.methods import METHODS
from streammerge.methods.lora_config import KNOWN, REFUSED_INITS
from streammerge.methods.readers import NOT_MERGEABLE

README = Path(__file__).resolve().parents[1] / "README.md"


def options() -> str:
    """Every option of `run`, and which of them change what is written."""
    actions = parsers()[1]["run"]._actions  # argparse has no public list of them
    shown = [action for action in actions if action.option_strings and action.dest != "help"]
    rows = [(_code(" ".join([", ".join(a.option_strings), *_value(a)])), (a.help or "") % {}) for a in shown]
    decisive = [f"`--{item.name.replace('_', '-')}`" for item in fields(Options) if item.metadata["bytes"]]
    sentence = f"Of these only {', '.join(decisive)} and `--weight` can change a byte of the output."
    return f"{_table(('option', 'meaning'), rows)}\n\n{sentence}"


def _value(action: argparse.Action) -> list[str]:
    if action.nargs == 0:
        return []
    return ["|".join(map(str, action.choices)) if action.choices else str(action.metavar)]


def exit_codes() -> str:
    """Every exit code, what it means, and the exceptions that stand for it in Python."""
    rows = [("0", "done (and verified unless asked not to), or already complete", "")]
    rows.append(("1", StreamMergeError.meaning, "any other exception"))
    roots = [kind for kind in _below(StreamMergeError) if "exit_code" in vars(kind) and kind is not Interrupted]
    for root in sorted(roots, key=lambda kind: kind.exit_code):
        names = [f"`{kind.__name__}`" for kind in (root, *_below(root))]
        rows.append((str(root.exit_code), root.meaning, ", ".join(names)))
    signals = ", ".join(str(128 + number) for number in sorted(HANDLED))
    rows.append((signals, Interrupted.meaning, f"`{Interrupted.__name__}`"))
    return _table(("code", "meaning", "exceptions"), rows)


def _below(kind: type[StreamMergeError]) -> Iterator[type[StreamMergeError]]:
    """All subclasses with a public name, in the order of their definition."""
    for child in kind.__subclasses__():
        if not child.__name__.startswith("_"):
            yield child
        yield from _below(child)


def methods() -> str:
    """Every PEFT type beside LoRA: what it does to a weight, where it looks, and what it does not take."""
    rows = []
    for kind, method in METHODS.items():
        formulas = "; ".join(_code(formula.title) for formula in method.formulas.values())
        rows.append((_code(kind), formulas, method.layers, method.local, method.eras, method.refuses))
    return _table(("`peft_type`", "formula", "layers", "a tile needs", "versions of files", "refused"), rows)


def refused() -> str:
    """PEFT types, config fields and initialisations that are refused, and why."""
    rows = [*_refused("peft_type", NOT_MERGEABLE), *_refused("init_lora_weights", REFUSED_INITS)]
    rows += [(_code(field), reason) for field, reason in KNOWN.neutral.items()]
    for kind, method in METHODS.items():
        rows += [(f"{_code(field)} of `{kind}`", reason) for field, reason in method.known.neutral.items()]
    return _table(("in `adapter_config.json`", "why"), rows)


def _refused(field: str, reasons: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """One row for each reason, with all values that it holds for."""
    for reason in dict.fromkeys(reasons.values()):
        values = [value for value, why in reasons.items() if why == reason]
        yield f"`{field}`: {', '.join(f'`{value}`' for value in values)}", reason


def _code(text: str) -> str:
    """`text` as code in a cell of a table, where a bare `|` would end the cell."""
    return f"`{text}`".replace("|", r"\|")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|" for cells in lines)


TABLES: Mapping[str, Callable[[], str]] = {
    "options": options, "exit codes": exit_codes, "methods": methods, "refused": refused,
}  # fmt: skip


def synced(text: str) -> str:
    """`text` with every table made anew. Raises ValueError where a marker is missing."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, opened, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise ValueError(f"README.md has no `{start.strip()}` ... `{end.strip()}`")
        text = f"{before}{start}{table()}{end}{after}"
    return text


def main() -> int:
    """Write the tables, or check them."""
    text = README.read_text()
    wanted = synced(text)
    if sys.argv[1:] == ["--check"]:
        if text != wanted:
            print("README.md is out of date: run `python scripts/sync_docs.py`", file=sys.stderr)
        return int(text != wanted)
    if text != wanted:
        README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
