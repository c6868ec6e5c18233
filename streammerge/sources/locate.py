"""What the user typed, read as a local path or as a repository on the Hub.

Looks only at what exists locally; fetches nothing. The one invariant: an existing local path always wins, and text
that looks like a path never becomes a Hub id, so that a typing error in a path is an error and not a download.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from streammerge.core import io
from streammerge.core.errors import InputMissingError, MalformedInputError, UnsafeInputError
from streammerge.core.text import redacted
from streammerge.formats.filenames import ADAPTER_CONFIG, plain_subfolder

# The Hub's own rule for names: letters, digits, `-`, `_` and `.`, 96 of them; no `--`, `..` or final `.git`.
_NAME = r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9_](?:[A-Za-z0-9_.\-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?:(?P<owner>{_NAME})/)?(?P<name>{_NAME})")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.\-/+]{0,250}")
_FILE_ENDINGS = (".safetensors", ".bin", ".json", ".gguf", ".pt", ".pth", ".ckpt")
"""A missing file's name would pass for a repository without an owner."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where an input is: either `path`, a local file or directory, or `repo` on the Hub with the `revision` that was
    asked for; `subfolder` (plain, with `/`) is relative to either. `text` is what was typed."""

    path: str | None
    repo: str | None
    revision: str | None
    subfolder: str | None
    text: str


def parse_base(text: str) -> Location:
    """A directory, one `.safetensors` file, or a Hub id `org/name[@revision]`; `name[@revision]` for the Hub's oldest
    models, which have no owner.

    Raises InputMissingError for what is neither, MalformedInputError for a file of another kind.
    """
    path = _expanded(text)
    if io.is_dir(path) or (os.path.isfile(path) and path.endswith(".safetensors")):
        return Location(path, None, None, None, text)
    if io.exists(path):
        raise MalformedInputError(
            path, "a base is a directory, one `.safetensors` file, or a Hub id `org/name[@revision]`"
        )
    return _on_hub(text, text, owner_needed=False)


def parse_adapter(text: str) -> Location:
    """A directory, `DIR:subfolder`, or a Hub id `org/name[@revision][:subfolder]`.

    Raises InputMissingError for what is none of them, MalformedInputError for a file, UnsafeInputError for a
    subfolder that could lead outside.
    """
    path = _expanded(text)
    if io.is_dir(path):
        return Location(path, None, None, None, text)
    if io.exists(path):
        raise MalformedInputError(
            path, "an adapter is a directory", f"give the directory that holds the `{ADAPTER_CONFIG}`"
        )
    local, colon, subfolder = path.rpartition(":")
    if colon and io.is_dir(local):
        folder = _subfolder(text, subfolder)
        if not io.is_dir(os.path.join(local, folder)):
            raise InputMissingError(os.path.join(local, folder))
        return Location(local, None, None, folder, text)
    repository, colon, subfolder = text.partition(":")
    location = _on_hub(text, repository, owner_needed=True)
    return replace(location, subfolder=_subfolder(text, subfolder)) if colon else location


def _expanded(text: str) -> str:
    if "\0" in text:
        raise InputMissingError(text, "is no path: it holds a NUL character")
    return os.path.expanduser(text)


def _on_hub(text: str, identifier: str, *, owner_needed: bool) -> Location:
    """The Hub id in `identifier`, or an InputMissingError that says why `text` is not one."""
    repository, at, revision = identifier.partition("@")
    if redacted(text) != text:
        advice = "log in with `hf auth login`, or set HF_TOKEN, and name the repository alone"
        raise InputMissingError(redacted(text), "holds what looks like a secret, and is no path that exists", advice)
    if _is_path(identifier):
        raise InputMissingError(text)
    found = _REPOSITORY.fullmatch(repository)
    if found is None or (owner_needed and found["owner"] is None):
        raise InputMissingError(text, "is neither an existing path nor a Hub id such as `org/name`")
    if at and _REVISION.fullmatch(revision) is None:
        raise InputMissingError(
            text, "has no usable revision after `@`", "a branch, a tag, or a commit: `org/name@main`"
        )
    return Location(None, repository, revision if at else None, None, text)


def _is_path(identifier: str) -> bool:
    """Whether a name that does not exist was meant as a path: by its first character, a backslash, more than one
    slash (those of a `@refs/pr/1` do not count), or a file's ending."""
    repository, _, revision = identifier.partition("@")
    counted = repository if revision.startswith("refs/") else identifier
    looks = identifier.startswith((".", "/", "~")) or "\\" in identifier or counted.count("/") > 1
    return looks or repository.endswith(("/", *_FILE_ENDINGS))


def _subfolder(text: str, subfolder: str) -> str:
    try:
        folder = plain_subfolder(subfolder, text)
    except UnsafeInputError as error:
        raise UnsafeInputError(text, error.reason, "a subfolder is a relative path without `..`") from None
    if not folder:
        raise InputMissingError(text, "names no subfolder after `:`")
    return folder
