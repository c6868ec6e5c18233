"""Checkpoints and adapters from the Hugging Face Hub, by way of its cache.

The only door to the network. Fetches the files that hub_files names, all of one commit; where the Hub cannot be
reached, takes the same files of the cached snapshot, if every one of them is there. The client's own messages may hold
URLs and headers, so none of their text is passed on: no error of ours can carry a token.
"""

from __future__ import annotations

import contextlib
import errno
import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from streammerge.core import io
from streammerge.core.errors import HubError, InputMissingError, MalformedInputError
from streammerge.core.text import some_of
from streammerge.sources.hub_files import HEADS, adapter_files, base_files
from streammerge.sources.locate import Location

_DEFAULT_REVISION = "main"
_TRANSPORTS = frozenset({"httpx", "httpx2", "requests"})
"""The libraries that releases of huggingface_hub have used; their errors share no base class."""
_STORAGE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM})
_BUGS = (TypeError, AttributeError, NameError, AssertionError, ImportError)
"""What no answer of the Hub explains: passed on as it is. Xet transfers fail with bare RuntimeErrors."""
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class HubCheckpoint:
    """A snapshot in the Hub's cache, and which one it is: `org/name@<commit>`, with an adapter's `:subfolder`."""

    path: Path
    identity: str


def fetch_base(location: Location, *, quiet: bool = True) -> HubCheckpoint:
    """The weights and sidecars of a base, without weights in other formats; `quiet` shows no progress bars.

    Raises HubError, and InputMissingError or MalformedInputError for a repository that is no checkpoint.
    """
    repo, revision = _named(location)
    with _progress(quiet):
        listed = _listing(repo, revision)
        if isinstance(listed, HubError):
            root = _cached(repo, revision, listed, HEADS, lambda names, root: base_files(repo, names, root))
            return HubCheckpoint(root, f"{repo}@{root.name}")
        commit, names = listed
        heads = [name for name in HEADS if name in names]
        small = _download(repo, revision, commit, heads) if heads else None
        return HubCheckpoint(_download(repo, commit, commit, base_files(repo, names, small)), f"{repo}@{commit}")


def fetch_adapter(location: Location, *, quiet: bool = True) -> HubCheckpoint:
    """An adapter and the tokenizer beside it, and the configs of adapters in subfolders, so that they can be named.
    `path` is the snapshot, whose `location.subfolder` holds the adapter.

    Raises HubError, and InputMissingError for a repository without an adapter there.
    """
    repo, revision = _named(location)
    folder = f"{location.subfolder}/" if location.subfolder else ""
    with _progress(quiet):
        listed = _listing(repo, revision)
        if isinstance(listed, HubError):
            root = _cached(repo, revision, listed, (), lambda names, _: adapter_files(repo, names, folder))
        else:
            commit, names = listed
            root = _download(repo, revision, commit, adapter_files(repo, names, folder))
    return HubCheckpoint(root, f"{repo}@{root.name}{f':{location.subfolder}' if folder else ''}")


# --- fetching -------------------------------------------------------------------------------------------------------
def _named(location: Location) -> tuple[str, str]:
    return location.repo or location.text, location.revision or _DEFAULT_REVISION


def _listing(repo: str, revision: str) -> tuple[str, list[str]] | HubError:
    """The commit that `revision` stands for and its files, or the HubError of a Hub that cannot be reached."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="streammerge")
    try:
        commit = api.model_info(repo, revision=revision).sha or revision
        return commit, api.list_repo_files(repo, revision=commit)
    except Exception as error:
        refusal = _refusal(repo, revision, error)
        if _is_outage(error):
            return refusal
        raise refusal from None


def _download(repo: str, revision: str, commit: str, names: Sequence[str]) -> Path:
    """The snapshot of `commit` with `names` in it. Asking by `revision` lets the cache remember what it stood for."""
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    root = _asked(
        repo,
        revision,
        lambda: snapshot_download(repo, revision=revision, allow_patterns=patterns, library_name="streammerge"),
    )
    if root.name != commit:
        raise HubError(
            repo, f"`{revision}` moved to another commit while it was being fetched", "run the same command again"
        )
    missing = _absent(root, names)
    if missing:
        raise HubError(
            repo,
            f"the download ended without {some_of(missing)}",
            "run the same command again; finished files are kept",
        )
    return root


def _cached(
    repo: str,
    revision: str,
    outage: HubError,
    heads: Sequence[str],
    choose: Callable[[Sequence[str], Path], list[str]],
) -> Path:
    """The cached snapshot of a repository that cannot be asked, if all files that `choose` names are in it; `heads`
    are those that `choose` reads."""
    from huggingface_hub import snapshot_download

    advice = "connect to the Hub once, without HF_HUB_OFFLINE, and run the same command"
    not_local = f"if `{repo}` was meant as a local path, it does not exist; otherwise {advice}"
    try:
        # No pattern: which files make it complete is known only once its listing and its index are read.
        root = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except OSError:
        raise HubError(repo, f"{outage.reason}, and `{revision}` is not in the local cache", not_local) from None
    names = _remembered(repo, root.name) or io.list_tree(root)
    try:
        missing = _absent(root, [name for name in heads if name in names]) or _absent(root, choose(names, root))
    except (InputMissingError, MalformedInputError) as error:
        reason = f"{outage.reason}, and the cached snapshot is incomplete: {error.summary()}"
        raise HubError(repo, reason, advice) from None
    if missing:
        advice += f"; or give the directory `{root}`, to take it as it is"
        raise HubError(repo, f"{outage.reason}, and the cached snapshot lacks {some_of(missing)}", advice)
    return root


def _absent(root: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if not io.exists(root / name)]


def _remembered(repo: str, commit: str) -> list[str]:
    """The files of a commit as the cache remembers them; empty with older clients, which do not record that."""
    import huggingface_hub

    recall = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if recall is None:
        return []
    try:
        return [file.path for file in recall(repo, revision=commit)]
    except huggingface_hub.errors.CachedRepoTreeNotFoundError:
        return []


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[None]:
    """Without the client's progress bars if `quiet`; they have no other switch than one for the process, which is
    put back. Where the environment has decided, it stays so."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not quiet or HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# --- what went wrong ------------------------------------------------------------------------------------------------
def _asked(repo: str, revision: str, call: Callable[[], str]) -> Path:
    try:
        return Path(call())
    except Exception as error:
        raise _refusal(repo, revision, error) from None


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_outage(error: BaseException) -> bool:
    """Whether the Hub was not reached or is out of order, rather than having answered."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status == 429
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or bool(modules & _TRANSPORTS)


def _refusal(repo: str, revision: str, error: Exception) -> HubError:
    """The HubError for an exception of the client, in our words."""
    from huggingface_hub import errors

    status = _status(error)
    cause = error.__cause__
    match error:
        case errors.OfflineModeIsEnabled():
            return HubError(repo, "HF_HUB_OFFLINE forbids to ask it", "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE")
        case errors.GatedRepoError():
            return HubError(repo, "its authors restrict access", f"ask for access on the model's page, then {_LOG_IN}")
        case errors.RepositoryNotFoundError():
            advice = f"check the name; if it is private, {_LOG_IN}. A local path would have to exist"
            return HubError(repo, "no such repository, or it is private", advice)
        case errors.RevisionNotFoundError():
            return HubError(
                repo, f"it has no branch, tag or commit `{revision}`", "look at the model's page for its revisions"
            )
        case errors.DisabledRepoError():
            return HubError(repo, "access to it is disabled")
        case errors.HFValidationError():
            return HubError(repo, "the Hub does not allow such a name")
        case errors.LocalEntryNotFoundError() if isinstance(cause, Exception) and (_is_outage(cause) or _status(cause)):
            return _refusal(repo, revision, cause)
        case OSError() if error.errno in _STORAGE:
            return HubError(repo, f"its cache cannot be written: {error.strerror}", "HF_HOME says where the cache is")
    if status in (401, 403):
        return HubError(repo, f"access is refused (status {status})", _LOG_IN)
    if status is not None:
        advice = "try again later; finished files are kept" if _is_outage(error) else ""
        return HubError(repo, f"the Hub answered with status {status}", advice)
    if isinstance(error, _BUGS):
        raise error
    return HubError(
        repo, f"the connection failed ({type(error).__name__})", "run the same command again; finished files are kept"
    )
