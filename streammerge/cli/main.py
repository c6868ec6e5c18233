"""The command line: one parser made from the fields of `Options`, one function for each command, errors to exit codes.

Nothing heavy is imported before a command needs it, so that help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import streammerge
from streammerge.cli.output import Output
from streammerge.cli.signals import interruptible
from streammerge.core.errors import StreamMergeError, UsageError
from streammerge.core.options import DEFAULT_MEMORY, Options
from streammerge.core.text import parse_size, redacted, size_text

COMMANDS = ("run", "plan", "inspect", "verify", "status", "demo")
EPILOG = (
    "exit codes: 0 done, 2 usage, 3 input, 4 adapter does not fit, 5 output exists, 6 verification, 7 writing, "
    "128+n signal n"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _arguments(argv)
    output = Output(json=getattr(arguments, "json", False), quiet=arguments.quiet, verbose=arguments.verbose)
    try:
        with interruptible(output.error):
            _command(arguments.command)(arguments, output)
    except StreamMergeError as error:
        output.error(error)
        return error.exit_code
    except Exception:
        output.bug(traceback.format_exc())
        return 1
    if output.lost:
        output.error(output.lost)
        return output.lost.exit_code
    return 0


def script() -> NoReturn:
    """The command as a process of its own. Ends at once when all is said: taking down torch takes half a second, and
    the system frees memory anyway."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _command(name: str) -> Callable[[argparse.Namespace, Output], None]:
    from streammerge.cli import commands, demo

    table: dict[str, Callable[[argparse.Namespace, Output], None]] = {
        "run": commands.run,
        "plan": commands.plan,
        "inspect": commands.inspect,
        "verify": commands.verify,
        "status": commands.status,
        "demo": demo.run,
    }
    return table[name]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed arguments. What no command knows ends the process with exit code 2, as argparse does."""
    parser, commands = parsers()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands[arguments.command]
        flags = re.findall(r"--[a-z][a-z-]+", command.format_usage())
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1)
        command.error(f"unrecognized argument {redacted(unknown[0])}" + (f"; did you mean {near[0]}?" if near else ""))
    return arguments


class _Version(argparse.Action):
    """`--version`, which looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"streammerge {streammerge.__version__}")
        parser.exit()


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and that of each command by name."""
    parser = argparse.ArgumentParser(
        prog="streammerge",
        description="Merge PEFT adapters into checkpoints: streaming, right or refused.",
        epilog=EPILOG,
        allow_abbrev=False,  # an abbreviation in a script would break with the next option
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adders = {
        "run": _add_run,
        "plan": _add_plan,
        "inspect": _add_inspect,
        "verify": _add_verify,
        "status": _add_status,
        "demo": _add_demo,
    }
    for name, help in (
        ("run", "merge adapters into a base"),
        ("plan", "say what would be done, with memory, disk and time figures"),
        ("inspect", "what is in an adapter, and what it would touch"),
        ("verify", "prove a finished output against its inputs"),
        ("status", "what an output directory holds, and what a run into it would do"),
        ("demo", "build a small example, merge it, verify it"),
    ):
        command = subparsers.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=EPILOG, allow_abbrev=False
        )
        adders[name](command)
        command.add_argument("-q", "--quiet", action="store_true", help="no progress, no notes")
        command.add_argument("-v", "--verbose", action="store_true", help="more detail")
    return parser, subparsers.choices


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_plan(parser)
    parser.add_argument("--dry-run", action="store_true", help="plan with these arguments, write nothing")
    parser.add_argument("--no-verify", action="store_true", help="skip the check after the run")
    parser.add_argument(
        "--config", metavar="FILE", help="a job file (TOML): base, adapters, output and the long options' names"
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base", metavar="BASE", nargs="?", help="a directory, one .safetensors file, or org/name[@revision]"
    )
    parser.add_argument(
        "adapters", metavar="ADAPTER", nargs="*", help="a directory, DIR:subfolder, or org/name[@revision][:subfolder]"
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="where the result goes; must be empty or not exist")
    parser.add_argument(
        "--weight", metavar="W", type=float, action="append", help="repeatable, one per adapter in order (default 1.0)"
    )
    _add_options(parser)
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def _add_options(parser: argparse.ArgumentParser, only: Sequence[str] = ()) -> None:
    """A flag for each field of `Options`, or for some of them."""
    for item in fields(Options):
        if only and item.name not in only:
            continue
        flags = [flag for flag in (item.metadata["short"], f"--{item.name.replace('_', '-')}") if flag]
        settings: dict[str, Any] = {"help": item.metadata["help"], "default": argparse.SUPPRESS}
        if item.default is False:
            settings["action"] = "store_true"
        elif item.metadata["choices"]:
            settings |= {
                "choices": item.metadata["choices"],
                "help": f"{item.metadata['help']} (default {item.default})",
            }
        else:
            settings["metavar"] = item.metadata["metavar"]
        if item.default == ():
            settings["action"] = "append"
        elif item.name == "memory":
            settings |= {"type": _size, "help": f"{item.metadata['help']} (default {size_text(DEFAULT_MEMORY)})"}
        elif isinstance(item.default, int) and item.default is not False:
            settings["type"] = int
        parser.add_argument(*flags, **settings)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="a directory, DIR:subfolder, or org/name[@revision][:subfolder]"
    )
    parser.add_argument("--base", metavar="BASE", help="resolve the adapter's modules in this base")
    _add_options(
        parser, ("ignore_config_field", "allow_unused", "expert_orientation", "expert_packing", "peft_version", "rules")
    )
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", help="a finished output")
    parser.add_argument("--base", metavar="BASE", help="the base it was made from (default: where it was then)")
    parser.add_argument(
        "--adapter", metavar="ADAPTER", action="append", help="an adapter it was made from; repeatable, in order"
    )
    share = parser.add_mutually_exclusive_group()
    share.add_argument(
        "--sample", metavar="PERCENT", type=_percent, help="share of the output to derive again (default 5%%)"
    )
    share.add_argument("--full", action="store_true", help="derive all of it again")
    parser.add_argument(
        "--subset", metavar="I/N", type=_part, help="only the I-th of N parts: N runs are a whole verification"
    )
    _add_options(parser, ("workers", "memory", "read", "rules"))
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", help="an output directory: finished, unfinished, or not there yet")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", nargs="?", help="where to build it (default: a temporary directory)"
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"`{text}` is not a share such as 5%")
    return value / 100


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    part = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part[0] <= part[1]:
        raise argparse.ArgumentTypeError(f"`{text}` is not a part such as 2/5: one of five, counted from 1")
    return part


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as keyword arguments of the library."""
    given = vars(arguments)
    return {item.name: given[item.name] for item in fields(Options) if item.name in given}


def required(value: Any, what: str) -> Any:
    """`value`, or a UsageError where it is missing."""
    if not value:
        raise UsageError(f"{what} is missing", "`streammerge run BASE ADAPTER -o OUT`; more with `--help`")
    return value
