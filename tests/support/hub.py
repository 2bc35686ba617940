"""A Hugging Face hub on loopback, which serves folders as repositories.

The libraries are not replaced: transformers, sae-lens and datasets talk to it over HTTP as to the real
hub.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The commit of `main` in every repository."""


def commit_of(branch: str) -> str:
    """The commit of a branch other than `main`."""
    return hashlib.sha1(branch.encode()).hexdigest()


@dataclass
class Hub:
    """A running hub.

    Args:
        root: Folder of the repositories `models/<org>/<name>/` and `datasets/<org>/<name>/`. A folder
            `<name>@<branch>/` is another branch, with slashes as `%2F`.
        address: The address, for `HF_ENDPOINT`.
        gated: Repositories that answer 403.
        truncated: Names of files of which only the first half is sent.
        closed: Organisations that no token may write to.
        private: Private repositories.
        requests: Every request line so far.
        listen: Accept connections; before this they are refused, if the hub is not yet `listening`.
    """

    root: Path
    address: str = ""
    gated: set[str] = field(default_factory=set)
    truncated: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    listen: Callable[[], None] = lambda: None


@contextmanager
def serving(root: Path, *, listening: bool = True) -> Iterator[Hub]:
    """Serve the folder until the block ends, at once or after `Hub.listen`."""
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            _answer(self, hub, with_body=True)

        def do_HEAD(self) -> None:
            _answer(self, hub, with_body=False)

        def do_POST(self) -> None:
            _answer(self, hub, with_body=True)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.daemon_threads = True
    server.server_bind()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)

    def listen() -> None:
        server.server_activate()
        thread.start()

    hub.listen = listen
    if listening:
        listen()
    try:
        yield hub
    finally:
        if thread.is_alive():
            server.shutdown()
        server.server_close()


def _answer(request: BaseHTTPRequestHandler, hub: Hub, *, with_body: bool) -> None:
    path = urlsplit(request.path).path
    hub.requests.append(f"{request.command} {path}")
    body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    if path == "/api/repos/create":
        return _create(request, hub, json.loads(body))
    if path == "/api/validate-yaml":
        return _send_json(request, {"errors": [], "warnings": []}, with_body)
    if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path):
        repo, action, revision = match.groups()
        return _write(request, hub, repo, action, revision, body)
    if match := re.fullmatch(
        r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/(.+))?", path
    ):
        kind, repo, action, remainder = match.groups()
        revision, _, subfolder = (remainder or "main").partition("/")
        folder, commit = _branch(hub.root / kind / repo, unquote(revision))
        if _refused(request, hub, folder, repo):
            return None
        match action:
            case "tree":
                subfolder = unquote(subfolder)
                if not (folder / subfolder).is_dir():
                    return _send_error(request, HTTPStatus.NOT_FOUND, "EntryNotFound")
                recursive = "recursive=true" in urlsplit(request.path).query.lower()
                return _send_json(request, _entries(folder, folder / subfolder, recursive), with_body)
            case "paths-info":
                names = json.loads(body)["paths"]
                files = [folder / name for name in names if (folder / name).exists()]
                return _send_json(request, [_entry(folder, file) for file in files], with_body)
            case _:
                files = [entry for entry in _entries(folder, folder, True) if entry["type"] == "file"]
                siblings = [{"rfilename": entry["path"]} for entry in files]
                info = {"id": repo, "sha": commit, "siblings": siblings, "tags": []}
                details = {"private": repo in hub.private, "lastModified": "2026-01-01T00:00:00.000Z"}
                return _send_json(request, info | details, with_body)
    if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
        kind, repo, revision, name = match.groups()
        name = unquote(name)
        repository = hub.root / ("datasets" if kind else "models") / repo
        folder, commit = _branch(repository, unquote(revision))
        if _refused(request, hub, folder, repo):
            return None
        if not (folder / name).is_file():
            return _send_error(request, HTTPStatus.NOT_FOUND, "EntryNotFound")
        return _send_file(request, hub, folder / name, commit, with_body)
    return _send_error(request, HTTPStatus.NOT_FOUND, "RepoNotFound")


def _create(request: BaseHTTPRequestHandler, hub: Hub, request_body: dict[str, Any]) -> None:
    repo = f"{request_body['organization']}/{request_body['name']}"
    folder = hub.root / "models" / repo
    if not request.headers.get("Authorization"):
        return _send_error(request, HTTPStatus.UNAUTHORIZED, "")
    if request_body["organization"] in hub.closed:
        return _send_error(request, HTTPStatus.FORBIDDEN, "")
    status = HTTPStatus.CONFLICT if folder.exists() else HTTPStatus.OK
    if not folder.exists() and request_body.get("visibility") == "private":
        hub.private.add(repo)
    folder.mkdir(parents=True, exist_ok=True)
    return _send_json(request, {"url": f"{hub.address}/{repo}"}, True, status)


def _write(
    request: BaseHTTPRequestHandler, hub: Hub, repo: str, action: str, revision: str, body: bytes
) -> None:
    revision = unquote(revision)
    repository = hub.root / "models" / repo
    if action == "branch":
        repository.with_name(f"{repository.name}@{quote(revision, safe='')}").mkdir(exist_ok=True)
        return _send_json(request, {}, True)
    if action == "preupload":
        names = [file["path"] for file in json.loads(body)["files"]]
        files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
        return _send_json(request, {"files": files}, True)
    folder, commit = _branch(repository, revision)
    for entry in map(json.loads, body.splitlines()):
        if entry["key"] == "file":
            content = base64.b64decode(entry["value"]["content"])
            file = folder / entry["value"]["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    address = f"{hub.address}/{repo}/commit/{commit}"
    return _send_json(request, {"commitUrl": address, "commitOid": commit}, True)


def _branch(repository: Path, revision: str) -> tuple[Path, str]:
    """The folder of a revision (a branch, or its commit), and the commit."""
    for folder in repository.parent.glob(f"{repository.name}@*"):
        branch = unquote(folder.name.partition("@")[2])
        if revision in (branch, commit_of(branch)):
            return folder, commit_of(branch)
    return repository, COMMIT


def _refused(request: BaseHTTPRequestHandler, hub: Hub, folder: Path, repo: str) -> bool:
    if repo in hub.gated:
        _send_error(request, HTTPStatus.FORBIDDEN, "GatedRepo")
        return True
    if not folder.is_dir():
        _send_error(request, HTTPStatus.UNAUTHORIZED, "RepoNotFound")
        return True
    return False


def _entries(root: Path, folder: Path, recursive: bool) -> list[dict[str, Any]]:
    return [_entry(root, path) for path in sorted(folder.rglob("*") if recursive else folder.iterdir())]


def _entry(root: Path, path: Path) -> dict[str, Any]:
    kind = "file" if path.is_file() else "directory"
    oid = hashlib.sha1(str(path).encode()).hexdigest()
    size = path.stat().st_size if path.is_file() else 0
    return {"type": kind, "path": path.relative_to(root).as_posix(), "size": size, "oid": oid}


def _send_json(
    request: BaseHTTPRequestHandler, value: Any, with_body: bool, status: HTTPStatus = HTTPStatus.OK
) -> None:
    content = json.dumps(value).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if with_body:
        request.wfile.write(content)


def _send_error(request: BaseHTTPRequestHandler, status: HTTPStatus, code: str) -> None:
    request.send_response(status)
    request.send_header("X-Error-Code", code)
    request.send_header("X-Error-Message", f"{code} on the tests' hub")
    request.send_header("Content-Length", "0")
    request.end_headers()


def _send_file(
    request: BaseHTTPRequestHandler, hub: Hub, path: Path, commit: str, with_body: bool
) -> None:
    content = path.read_bytes()
    etag = hashlib.sha256(content).hexdigest()
    size = len(content)
    start, end = 0, size - 1
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or ""):
        start, end = int(match[1]), min(int(match[2] or size - 1), size - 1)
        request.send_response(HTTPStatus.PARTIAL_CONTENT)
        request.send_header("Content-Range", f"bytes {start}-{end}/{size}")
    else:
        request.send_response(HTTPStatus.OK)
    request.send_header("ETag", f'"{etag}"')
    request.send_header("X-Repo-Commit", commit)
    request.send_header("Accept-Ranges", "bytes")
    request.send_header("Content-Length", str(end - start + 1))
    request.end_headers()
    if with_body:
        part = content[start : end + 1]
        if path.name in hub.truncated:
            request.wfile.write(part[: len(part) // 2])
            request.close_connection = True
        else:
            request.wfile.write(part)
