"""The house rules that a reader relies on, read off the source: imports point one way, heavy libraries are imported
where they are used, and files are opened, text is printed and the network is reached in one place each."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import streammerge

PACKAGE = Path(streammerge.__file__).parent
ROOMS = (
    "core", "formats", "names", "methods", "sources", "planning", "compute", "sinks", "report", "stream",
    "execute", "integrity", "standing",
    "verification", "view", "inspection", "progress", "api", "__init__", "demo", "cli", "__main__",
)  # fmt: skip
"""Rooms and single modules in the order of the data's way; each imports only itself and those to its left."""
NEVER = {"transformers", "peft", "accelerate"}
IN_FUNCTIONS_ONLY = {"torch", "huggingface_hub", *NEVER}
FILE_CALLS = {
    "os": {
        "open", "fdopen", "read", "pread", "preadv", "readv", "write", "pwrite", "pwritev", "writev", "rename",
        "renames", "replace", "fsync", "fdatasync", "sync", "remove", "unlink", "rmdir", "removedirs", "mkdir",
        "makedirs", "link", "symlink", "truncate", "ftruncate", "posix_fallocate", "sendfile", "copy_file_range",
        "listdir", "scandir", "walk", "chmod", "utime",
    },
    "mmap": {"mmap"},
}  # fmt: skip
FILE_METHODS = {
    "read_text",
    "write_text",
    "read_bytes",
    "write_bytes",
    "touch",
    "unlink",
    "rmdir",
    "mkdir",
    "symlink_to",
}
FILE_MODULES = {"shutil", "tempfile", "fileinput"}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
MAX_LINES, MAX_FUNCTION_LINES = 400, 60

files = pytest.mark.parametrize("file", FILES, ids=str)


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(), str(file))


def room(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def imports(node: ast.AST, file: Path) -> Iterator[tuple[str, int]]:
    """Dotted names of everything imported below `node`, at any depth, each with its line."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from ((alias.name, found.lineno) for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            package = ("streammerge", *file.parts)[: -found.level] if found.level else ()
            module = ".".join((*package, *((found.module,) if found.module else ())))
            yield from ((f"{module}.{alias.name}", found.lineno) for alias in found.names)


def at_module_level(node: ast.AST) -> Iterator[ast.stmt]:
    """Import statements that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_module_level(child)


def calls(file: Path) -> Iterator[tuple[str, int]]:
    """What is called, as it is written: `os.open`, `print`, `path.read_text`."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.func.id, node.lineno
            elif isinstance(node.func, ast.Attribute):
                yield f"{ast.unparse(node.func.value)}.{node.func.attr}", node.lineno


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@files
def test_every_file_has_a_place_in_the_order_of_rooms(file):
    assert room(file) in ROOMS


@files
def test_a_room_imports_only_rooms_to_its_left(file):
    own = ROOMS.index(room(file))
    for name, line in imports(tree(file), file):
        top, _, rest = name.partition(".")
        if top != "streammerge":
            continue
        target = rest.partition(".")[0]
        target = target if target in ROOMS else "__init__"
        assert ROOMS.index(target) <= own, f"{file}:{line} imports {name}"


@files
def test_no_model_library_is_imported_anywhere(file):
    found = [f"{file}:{line} {name}" for name, line in imports(tree(file), file) if name.partition(".")[0] in NEVER]
    assert found == []


@files
def test_heavy_libraries_are_imported_inside_functions_only(file):
    names = [name for statement in at_module_level(tree(file)) for name, _ in imports(statement, file)]
    assert not {name.partition(".")[0] for name in names} & IN_FUNCTIONS_ONLY


@files
def test_only_the_command_line_prints_and_exits(file):
    if room(file) not in ("cli", "__main__"):
        found = [
            (name, line) for name, line in calls(file) if name in ("print", "exit", "quit", "sys.exit", "os._exit")
        ]
        assert found == []


@files
def test_only_core_io_touches_files(file):
    if file in (Path("core/io.py"), Path("core/pages.py"), Path("core/syscalls.py")):
        return
    forbidden = {f"{module}.{name}" for module, names in FILE_CALLS.items() for name in names} | {"open", "io.open"}
    methods = [(name, line) for name, line in calls(file) if name.rpartition(".")[2] in FILE_METHODS]
    # The package's own data files come with the import system.
    found = [(name, line) for name, line in methods if not name.startswith("resources.files(")]
    found += [(name, line) for name, line in calls(file) if name in forbidden]
    found += [(name, line) for name, line in imports(tree(file), file) if name.partition(".")[0] in FILE_MODULES]
    assert found == []


@files
def test_only_the_hub_and_the_command_line_know_the_hub_client(file):
    if file != Path("sources/hub.py") and room(file) not in ("progress", "cli"):
        assert not [name for name, _ in imports(tree(file), file) if name.partition(".")[0] == "huggingface_hub"]


@files
def test_names_are_parsed_by_segments(file):
    """`str.replace` hits in the middle of a name, `strip` with several characters takes a set of them."""
    if room(file) != "names":
        return
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "replace" or ast.unparse(node.func.value) == "dataclasses", f"{file}:{node.lineno}"
            if node.func.attr in ("strip", "lstrip", "rstrip") and node.args:
                assert len(ast.literal_eval(node.args[0])) == 1, f"{file}:{node.lineno}"


@files
def test_files_and_functions_stay_short(file):
    assert len((PACKAGE / file).read_text().splitlines()) <= MAX_LINES
    long = [node.name for node in functions(file) if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES]
    assert long == []


@files
def test_every_module_says_what_it_is_for(file):
    if (PACKAGE / file).read_text().strip():
        assert ast.get_docstring(tree(file))


def loaded_after(code: str) -> set[str]:
    """The top-level modules in a fresh interpreter that has run `code`."""
    show = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", f"{code}\n{show}"]
    ran = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


def test_importing_the_package_loads_no_library():
    assert not loaded_after("import streammerge") & {*IN_FUNCTIONS_ONLY, "numpy", "safetensors", "tqdm", "xxhash"}


def test_importing_every_module_loads_no_heavy_library():
    found = pkgutil.walk_packages([str(PACKAGE)], "streammerge.")
    names = [module.name for module in found if not module.name.endswith("__main__")]
    assert "streammerge.core.io" in names
    assert not loaded_after("\n".join(f"import {name}" for name in names)) & IN_FUNCTIONS_ONLY
