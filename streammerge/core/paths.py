"""Where a path leads: out of a checkpoint or not, and onto a network or not. Nothing is opened here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from streammerge.core import io
from streammerge.core.errors import UnsafeInputError

NETWORK_FILE_SYSTEMS = frozenset(
    {
        0x6969, 0xFF534D42, 0x517B, 0xFE534D42, 0x0BD00BD0, 0x47504653, 0x65735546, 0x19830326, 0x01021997, 0x00C36400,
        0x5346414F, 0x6B414653, 0x73757245, 0x7461636F, 0x01161970, 0xAAD7AAEA, 0x786F4256,
    }
)  # fmt: skip
"""statfs magic numbers of NFS, CIFS, SMB, SMB2, Lustre, GPFS, FUSE, BeeGFS, 9P, Ceph, AFS (two), Coda, OCFS2, GFS2,
PanFS and VirtualBox's folders: a file there can shrink under a mapping, which kills the process."""
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")
"""Below `CACHE/blobs`, where huggingface_hub 2 keeps files that several repositories share."""


def resolve_inside(root: str | os.PathLike[str], name: str) -> str:
    """The real path of `name` below `root`. Links are followed inside `root`, and from a snapshot of the Hub cache to
    the blobs of the same repository or the cache's shared Xet blobs; any other link is an UnsafeInputError."""
    path = os.path.join(root, name)
    with io.reading(path, "resolve"):
        home = os.path.realpath(root, strict=True)
        target = os.path.realpath(path, strict=True)
    if not Path(target).is_relative_to(home) and not _is_blob_of(home, target):
        raise UnsafeInputError(path, f"a link that leads out of the checkpoint, to `{target}`")
    return target


def _is_blob_of(home: str, target: str) -> bool:
    """Whether `home` is (in) `CACHE/models--*/snapshots/*` and `target` a blob that the Hub client links there."""
    for folder in Path(home).parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            shared = os.path.relpath(target, folder.parent.parent / "blobs")
            return Path(target).parent == folder.parent / "blobs" or _SHARED_BLOB.fullmatch(shared) is not None
    return False


def is_on_network(path: str | os.PathLike[str]) -> bool:
    """Whether `path` lies on a file system of NETWORK_FILE_SYSTEMS."""
    kind = _file_system_type(os.fspath(path))
    return kind is not None and kind in NETWORK_FILE_SYSTEMS


def _file_system_type(path: str) -> int | None:
    import ctypes

    try:
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(256)
        if libc.statfs(os.fsencode(path), buffer) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return int.from_bytes(buffer.raw[:8], "little") & 0xFFFFFFFF
