"""What the documents say is run, or compared with the code."""

from __future__ import annotations

import re
import runpy
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import streammerge
from streammerge.cli.main import COMMANDS, parsers
from streammerge.core import errors
from streammerge.core.options import Options
from tests.docs.blocks import ROOT, RUN, blocks_of, make_desk, plain, run_block, sessions

DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
PACKAGE = Path(streammerge.__file__).parent


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def rows_of(table: str) -> list[list[str]]:
    """The cells of README's table between the markers `table`, without its header."""
    inside = text_of("README.md").partition(f"<!-- {table} -->\n")[2].partition(f"\n<!-- /{table} -->")[0]
    lines = [line for line in inside.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_of_a_document_runs_in_order(document, tmp_path):
    desk = tmp_path / "desk"
    desk.mkdir()
    environment = make_desk(desk)
    for block in blocks_of(document):
        if block.language in RUN and block.reason is None:
            run_block(block, desk, environment)


def test_every_block_has_a_language_and_few_are_not_run():
    blocks = [block for document in DOCUMENTS for block in blocks_of(document)]
    assert {block.language for block in blocks} <= {*RUN, "text"}
    left_out = [block for block in blocks if block.reason is not None]
    assert len(left_out) <= 3
    assert all("scripts/test" in block.text for block in left_out)
    assert sum(block.language in RUN for block in blocks) - len(left_out) >= 15


def test_a_console_block_is_a_list_of_commands_and_what_each_prints():
    assert list(sessions("$ true\n$ echo a; echo b\na\nb")) == [("true", ""), ("echo a; echo b", "a\nb")]
    assert plain("2 files (1.2 GB free)\n") == plain("2 files (83.4 TB free)") != plain("3 files (1.2 GB free)")


def test_the_tables_of_readme_are_those_of_the_code():
    synced = runpy.run_path(str(ROOT / "scripts" / "sync_docs.py"))["synced"]
    assert text_of("README.md") == synced(text_of("README.md"))


def test_every_option_is_in_the_table_of_readme():
    cells = [option for option, _ in rows_of("options")]
    for item in fields(Options):
        assert [cell for cell in cells if f"--{item.name.replace('_', '-')} " in f"{cell.strip('`')} "], item.name


def test_every_exception_is_in_readme_beside_its_exit_code():
    codes = {code: kinds for code, _, kinds in rows_of("exit codes")}
    assert list(codes) == ["0", "1", "2", "3", "4", "5", "6", "7", "129, 130, 143"]
    public = [
        kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.StreamMergeError) and not name.startswith("_")
    ]
    assert errors.ShapeMismatchError in public
    for kind in public:
        if kind is errors.Interrupted:
            assert f"`{kind.__name__}`" in codes["129, 130, 143"]
        elif kind is not errors.StreamMergeError:
            assert f"`{kind.__name__}`" in codes[str(kind.exit_code)]


def test_every_command_is_in_readme_and_every_flag_of_readme_is_one():
    readme = text_of("README.md")
    parser, commands = parsers()
    assert tuple(commands) == COMMANDS
    for name in COMMANDS:
        assert f"streammerge {name} " in readme
        assert f"    {name} " in parser.format_help()
    known = {flag for command in commands.values() for flag in re.findall(r"--[a-z][a-z-]+", command.format_help())}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) <= known


def test_the_files_in_architecture_are_the_files_of_the_package():
    listing = next(block.text for block in blocks_of("ARCHITECTURE.md") if block.text.startswith("core/"))
    listed, room = [], ""
    for line in listing.splitlines():
        name = line.split()[0]
        if name.endswith("/") and line[0] != " ":
            room = name
        else:
            listed.append(f"{room}{name}" if line.startswith(" ") else name)
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert listed.count("methods/types/") == 1
    found = {name for name in found if not name.startswith("methods/types/")} | {"methods/types/"}
    assert sorted(listed) == sorted(name for name in found if not name.endswith(("__init__.py", "__main__.py")))


def test_the_rooms_in_architecture_are_in_the_order_that_is_enforced():
    listing = next(block.text for block in blocks_of("ARCHITECTURE.md") if block.text.startswith("core/"))
    rooms = [line.split()[0].removesuffix("/").removesuffix(".py") for line in listing.splitlines() if line[0] != " "]
    enforced = runpy.run_path(str(ROOT / "tests" / "test_architecture.py"))["ROOMS"]
    assert rooms == [room for room in enforced if room in rooms]


def test_architecture_is_short():
    assert len(text_of("ARCHITECTURE.md").splitlines()) <= 200


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(document)):
        file, _, anchor = target.partition("#")
        assert (ROOT / (file or document)).is_file(), target
        headings = re.findall(r"^#+ (.+)$", text_of(file or document), re.MULTILINE)
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_of_the_repository_that_are_named_exist(document):
    named = re.findall(r"`((?:streammerge|scripts|tests|bench)/[\w./-]*)`", text_of(document))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_changelog_has_the_version_of_the_package():
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    assert f"\n## {version}\n" in text_of("CHANGELOG.md")
