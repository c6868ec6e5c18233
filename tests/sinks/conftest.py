"""A file system whose files can share blocks, for as long as a module's tests run."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SIZE = 400 * 2**20
"""XFS is not made on less than 300 MiB; the image is sparse."""


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mounted XFS. Skips where it cannot be made: that takes root, mkfs.xfs, loop devices and the kernel's XFS."""
    mkfs = shutil.which("mkfs.xfs") or shutil.which("mkfs.xfs", path="/usr/sbin:/sbin")
    if os.geteuid() != 0 or not mkfs:
        pytest.skip("mounting an XFS takes root and mkfs.xfs")
    image = tmp_path_factory.mktemp("sharing") / "image"
    with image.open("wb") as stream:
        stream.truncate(SIZE)
    # Not below pytest's own folder: were this process killed, later ones could not remove that.
    mounted = Path(tempfile.mkdtemp(prefix="streammerge-tests-"))
    try:
        for command in ([mkfs, "-q", "-m", "reflink=1", image], ["mount", "-o", "loop", image, mounted]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no XFS could be mounted: {done.stderr.strip()}")
        image.unlink()  # the loop device holds it
        try:
            yield mounted
        finally:
            # Lazily: a test that failed may still hold a file of it, by way of its traceback.
            subprocess.run(["umount", "--lazy", mounted], check=True)
    finally:
        mounted.rmdir()
        image.unlink(missing_ok=True)
