"""Job files: TOML with `base`, `adapters`, `output` and the long options' names; several `[[job]]` tables in order."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from streammerge.core import io
from streammerge.core.errors import UsageError
from streammerge.core.options import Options
from streammerge.core.text import printable, some_of

OWN = ("base", "adapters", "output", "weight")
LIMIT = 10**6
"""Bytes of a job file; a longer one is something else."""


@dataclass(frozen=True, slots=True)
class Job:
    """One merge, as arguments of the library."""

    base: str
    adapters: list[str]
    output: str | None
    weights: list[float] | None
    options: dict[str, Any]


def read_jobs(path: Path, given: Mapping[str, Any], output: str | None) -> list[Job]:
    """The jobs of a file; options given on the command line win. Raises UsageError for what is not a job."""
    try:
        data = tomllib.loads(io.read_file(path, LIMIT).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"`{path}` is not TOML: {printable(error)}") from None
    tables = data.pop("job", None)
    if tables is not None and not (isinstance(tables, list) and all(isinstance(table, dict) for table in tables)):
        raise UsageError(f"`{path}`: `job` must be written as `[[job]]` tables")
    if tables is not None and output:
        raise UsageError("`--output` on the command line does not say which of several jobs it is for")
    return [_job(path, data | table, given, output) for table in tables or [{}]]


def _job(path: Path, table: Mapping[str, Any], given: Mapping[str, Any], output: str | None) -> Job:
    names = {item.name for item in fields(Options)}
    values = {key.replace("-", "_"): value for key, value in table.items()}
    unknown = [key for key in values if key not in names and key not in OWN]
    if unknown:
        raise UsageError(
            f"`{path}` sets {some_of(unknown)}, which is no option", f"options: {', '.join((*OWN, *sorted(names)))}"
        )
    base, adapters = values.get("base"), values.get("adapters")
    if isinstance(adapters, str):
        adapters = [adapters]
    if (
        not isinstance(base, str)
        or not isinstance(adapters, list)
        or not all(isinstance(item, str) for item in adapters)
    ):
        raise UsageError(f"`{path}` needs `base` (text) and `adapters` (a list of text) for every job")
    weights = values.get("weight")
    if weights is not None:
        weights = weights if isinstance(weights, list) else [weights]
        if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in weights):
            raise UsageError(f"`{path}`: `weight` must be a number or a list of numbers")
    options = {key: value for key, value in values.items() if key in names} | dict(given)
    where = output or values.get("output")
    return Job(base, adapters, str(where) if where else None, weights, options)
