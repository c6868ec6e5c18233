"""A Hub on the loopback interface, just enough of it for the unmodified client: listings, files, errors.

`FakeHub` serves repositories given as dicts of bytes; `ask` runs a call of streammerge.sources.hub in a process of its
own, because the client reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE once, when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Repository:
    """Commits by their hash, and what the branches and tags stand for."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What requests with `needle` in their path get instead: a status with headers, or a cut connection (status 0)."""

    needle: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)


class FakeHub:
    """The server; `requests` holds `METHOD path` of everything it was asked, `tokens` every Authorization header."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.on_request: Callable[[str], None] = lambda path: None
        self.requests: list[str] = []
        self.tokens: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def commit(self, repo: str, files: Mapping[str, bytes], revision: str = "main") -> str:
        """Make `files` the content of a branch; returns the commit's hash."""
        content = b"".join(name.encode() + b"\0" + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        stored = self.repositories.setdefault(repo, Repository())
        stored.commits[commit] = dict(files)
        stored.revisions[revision] = commit
        return commit

    def downloaded(self) -> set[str]:
        """The names of all files whose bytes were sent."""
        paths = [line.removeprefix("GET ") for line in self.requests if line.startswith("GET ") and "/resolve/" in line]
        return {path.partition("/resolve/")[2].partition("/")[2] for path in paths}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path without its query."""
        if path.startswith("/api/models/"):
            return self._api(path.removeprefix("/api/models/"))
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        found = self._find(repo, unquote(revision))
        if isinstance(found, str):
            return _error(404, found)
        commit, files = found
        name = unquote(name)
        if name not in files:
            return _error(404, "EntryNotFound")
        etag = f'"{_blob(files[name])}"'
        return 200, {"X-Repo-Commit": commit, "ETag": etag}, files[name]

    def _api(self, path: str) -> tuple[int, dict[str, str], bytes]:
        repo, kind, revision = path, "", "main"
        for separator in ("/revision/", "/tree/"):
            if separator in path:
                repo, kind, revision = path.partition(separator)
        found = self._find(repo, unquote(revision))
        if isinstance(found, str):
            return _error(404, found)
        commit, files = found
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
            for name, data in sorted(files.items())
        ]
        info = {"id": repo, "sha": commit, "siblings": [{"rfilename": entry["path"]} for entry in tree]}
        return 200, {"Content-Type": "application/json"}, json.dumps(tree if kind == "/tree/" else info).encode()

    def _find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | str:
        stored = self.repositories.get(repo)
        if stored is None:
            return "RepoNotFound"
        commit = stored.revisions.get(revision, revision)
        return (commit, stored.commits[commit]) if commit in stored.commits else "RevisionNotFound"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                hub.requests.append(f"{self.command} {path}")
                hub.on_request(path)
                hub.tokens.append(self.headers.get("Authorization", ""))
                fault = next((fault for fault in hub.faults if fault.needle in path), None)
                if fault is not None and fault.status == 0:
                    self.close_connection = True
                    return
                status, headers, body = (fault.status, fault.headers, b"") if fault else hub.answer(path)
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Keep the test's output clean."""

        return Handler


def _blob(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": code}, b""


_CALL = """
import json, sys
from streammerge.core.errors import StreamMergeError
from streammerge.sources import hub, locate
kind, text, quiet = json.loads(sys.argv[1])
parse, fetch = (locate.parse_base, hub.fetch_base) if kind == "base" else (locate.parse_adapter, hub.fetch_adapter)
try:
    found = fetch(parse(text), quiet=quiet)
    answer = {"path": str(found.path), "identity": found.identity}
except StreamMergeError as error:
    answer = {**error.data(), "text": str(error)}
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
answer["bars_disabled_after"] = are_progress_bars_disabled()
print(json.dumps(answer))
"""


@dataclass(frozen=True)
class Answer:
    """What a call gave (`path` and `identity`, or the error's data and `text`), and what it wrote to stderr."""

    data: dict[str, str]
    stderr: str

    @property
    def files(self) -> dict[str, bytes]:
        """Name to content of everything in the snapshot."""
        root = Path(self.data["path"])
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def ask(kind: str, text: str, endpoint: str, home: Path, *, quiet: bool = True, **environment: str) -> Answer:
    """`fetch_base` or `fetch_adapter` (`kind` is `base` or `adapter`) of what the user typed."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", _CALL, json.dumps([kind, text, quiet])]
    ran = subprocess.run(
        command,
        env={**kept, **settings, "no_proxy": "127.0.0.1", "PYTHONPATH": str(ROOT), **environment},
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return Answer(json.loads(ran.stdout), ran.stderr)
