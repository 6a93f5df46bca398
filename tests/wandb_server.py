"""As much of a W&B server as wandb 0.31 needs to run online: runs, their history, their summary. Loopback only.

It answers the GraphQL operations that the client sends before and during a run and keeps what is streamed to it. It
pins the shape of the traffic of that version; a newer client may ask for more.
"""

from __future__ import annotations

import gzip
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StoredRun:
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # group, tags, config of the newest upsert
    starts: int = 0  # upserts that came with a configuration


class WandbServer:
    """Use as a context manager; `environment` points wandb at it."""

    def __enter__(self) -> WandbServer:
        self.runs: dict[str, StoredRun] = {}
        owner = self

        class Handler(_Handler):
            server_state = owner

        self.http = _Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40}

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name")
        project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "me"}}
        if operation == "Viewer":
            viewer = {"id": "V", "entity": "me", "username": "me", "email": "a@b", "admin": False, "flags": "{}"}
            return {"viewer": {**viewer, "teams": {"edges": []}}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if "ResumeStatus" in operation:
            return {"model": {**project, "bucket": self._bucket(name) if name in self.runs else None}}
        if operation == "UpsertBucket":
            inserted = name not in self.runs
            run = self.runs.setdefault(name, StoredRun())
            run.settings |= {k: v for k, v in variables.items() if v is not None}
            run.starts += variables.get("config") is not None
            bucket = {"id": "R", "name": name, "displayName": name, "description": None, "config": "{}"}
            bucket |= {"sweepName": None, "project": project, "historyLineCount": len(run.history)}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if operation == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/upload/{f}"} for f in variables.get("files", [])]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        return {}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        bucket = {"id": "R", "name": name, "displayName": name, "summaryMetrics": json.dumps(run.summary)}
        bucket |= {"historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]"}
        tail = json.dumps([json.dumps(line) for line in run.history[-1:]])
        return {**bucket, "historyTail": tail, "config": "{}", "tags": [], "wandbConfig": '{"t": 1}'}

    def stream(self, name: str, files: dict[str, Any]) -> None:
        run = self.runs.setdefault(name, StoredRun())
        for file, chunk in files.items():
            if "history" in file:
                run.history += [json.loads(line) for line in chunk["content"]]
            elif "summary" in file:
                run.summary = json.loads(chunk["content"][-1])


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients drop connections that they kept alive."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server_state: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/graphql"):
            query = json.loads(body)
            name = query.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", query["query"]).group(1)
            self._reply({"data": self.server_state.answer(name, query.get("variables") or {})})
        elif "file_stream" in self.path:
            self.server_state.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
            self._reply({"limits": {}})
        else:  # telemetry of the client itself
            self._reply({})

    def _body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
