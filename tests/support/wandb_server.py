"""A W&B server on loopback: it answers wandb's requests and records what they contain.

wandb itself is not replaced: it talks to this server over HTTP as to the real server, through GraphQL
and its file stream, whose offsets give the positions of lines.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Run:
    """The server's record of a run."""

    values: dict[str, Any] = field(default_factory=dict)
    """Group, tags, config and so on, from the last `UpsertBucket` that contained each of them."""
    files: dict[str, list[str]] = field(default_factory=dict)
    """Lines by file name."""
    exit_code: int | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The run's history with `_step`, without the other values that wandb adds."""
        rows = [json.loads(line) for line in self.files.get("wandb-history.jsonl", [])]
        internal = ("_timestamp", "_runtime")
        return [{key: value for key, value in row.items() if key not in internal} for row in rows]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.files.get("wandb-summary.json", [])
        return json.loads(lines[-1]) if lines else {}

    @property
    def config(self) -> dict[str, Any]:
        """The run's config, without the values that wandb adds."""
        config = json.loads(self.values.get("config") or "{}")
        return {key: entry["value"] for key, entry in config.items() if key != "_wandb"}


@dataclass
class Server:
    """A running server.

    Args:
        address: The address, for `WANDB_BASE_URL`.
        state: `up`; `dropping` (every connection); `busy` (answers 503); or `hanging`.
        runs: The runs by id.
        said: The body of every request.
    """

    address: str = ""
    state: str = "up"
    runs: dict[str, Run] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    sweep: str = ""
    """YAML of the only sweep."""
    trials: list[dict[str, Any]] = field(default_factory=list)
    """Values by key of the trials that no agent has begun yet; the ids are `trial-<number left>`."""
    moved: threading.Event = field(default_factory=threading.Event)
    """Releases the requests that hang."""

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """The history of a run; empty if the server does not know the run."""
        return self.runs[run_id].rows if run_id in self.runs else []

    def become(self, state: str) -> None:
        """Change the state; connections that hang are dropped."""
        self.state = state
        self.moved.set()
        self.moved = threading.Event()


@contextmanager
def serving() -> Iterator[Server]:
    """Serve until the block ends."""
    known = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self._body()
            known.said.append(body)
            match known.state:
                case "up":
                    self._send(200, _answer(known, self.path, json.loads(body or "{}")))
                case "dropping":
                    self.close_connection = True
                case "busy":
                    self._send(503, {})
                case "hanging":
                    known.moved.wait()
                    self.close_connection = True
                case _:
                    raise NotImplementedError(known.state)

        def do_PUT(self) -> None:
            known.said.append(self._body())
            self._send(200, {})

        def _body(self) -> str:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")

        def _send(self, status: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Ignore clients that were killed."""

    server = Quiet(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    known.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    try:
        yield known
    finally:
        known.become("dropping")
        server.shutdown()
        server.server_close()


def _answer(known: Server, path: str, asked: dict[str, Any]) -> dict[str, Any]:
    if path.startswith("/sdk"):  # telemetry
        return {}
    if path != "/graphql":
        return _stream(known.runs[urlsplit(path).path.split("/")[4]], asked)
    values = asked.get("variables") or {}
    query = asked["query"]
    if "UpsertBucket" in query:
        run = known.runs.setdefault(values["name"], Run())
        config = json.loads(run.values.get("config", "{}")) | json.loads(values["config"] or "{}")
        run.values |= {key: value for key, value in values.items() if value is not None}
        run.values["config"] = json.dumps(config)
        return {"data": {"upsertBucket": {"bucket": _bucket(values["name"], run), "inserted": True}}}
    if "RunResumeStatus" in query:
        run = known.runs.get(values["name"])
        bucket = None if run is None else _bucket(values["name"], run)
        return {"data": {"model": {"id": "p", "name": "p", "entity": _ENTITY, "bucket": bucket}}}
    if "SweepWithRuns" in query:
        sweep = {"id": "s", "name": values["sweep"], "config": known.sweep, "runs": {"edges": []}}
        return {"data": {"project": {"sweep": sweep}}}
    if "CreateAgent" in query:
        return {"data": {"createAgent": {"agent": {"id": "a"}}}}
    if "Heartbeat" in query:
        running = any(json.loads(values["runState"] or "{}").values())
        commands = [] if running else [_next_command(known)]
        return {"data": {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(commands)}}}
    if "CreateRunFiles" in query:
        files = [{"name": name, "uploadUrl": f"{known.address}/put/{name}"} for name in values["files"]]
        return {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}}
    return {"data": {"viewer": _ENTITY | {"entity": "me", "username": "me", "flags": "{}"}}}


def _next_command(known: Server) -> dict[str, Any]:
    if not known.trials:
        return {"type": "exit"}
    name = f"trial-{len(known.trials)}"
    values = {key: {"value": value} for key, value in known.trials.pop(0).items()}
    return {"type": "run", "run_id": name, "program": "", "args": values}


_ENTITY = {"id": "e", "name": "me"}


def _bucket(name: str, run: Run) -> dict[str, Any]:
    lines = {kind: run.files.get(f"wandb-{kind}.jsonl", []) for kind in ("history", "events")}
    return {
        "id": f"id-{name}",
        "name": name,
        "displayName": run.values.get("displayName"),
        "config": run.values.get("config", "{}"),
        "tags": run.values.get("tags"),
        "summaryMetrics": json.dumps(run.summary),
        "project": {"id": "p", "name": run.values.get("project", "p"), "entity": _ENTITY},
        "logLineCount": len(run.files.get("output.log", [])),
        "wandbConfig": '{"t": 1}',
    } | {
        key: value
        for kind in lines
        for key, value in (
            (f"{kind}LineCount", len(lines[kind])),
            (f"{kind}Tail", json.dumps(lines[kind][-1:])),
        )
    }


def _stream(run: Run, told: dict[str, Any]) -> dict[str, Any]:
    for name, part in (told.get("files") or {}).items():
        lines = run.files.setdefault(name, [])
        start = part["offset"]
        lines[start : start + len(part["content"])] = part["content"]
    if told.get("complete"):
        run.exit_code = told.get("exitcode")
    return {"limits": {}}
