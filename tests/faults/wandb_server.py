"""A W&B server for one test: enough of the protocol of wandb 0.31 to start a run, log, resume it and finish it."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Run:
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    starts: int = 0


class Server(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, Run] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Clients drop connections that they had kept open."""


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Not to the test's output."""

    def answer(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            data = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        self.body()
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if self.path.endswith("/graphql"):
            query = json.loads(body)
            name = query.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", query["query"])[1]
            self.answer({"data": self.graphql(name, query.get("variables") or {})})
        elif "file_stream" in self.path:
            self.stream(json.loads(body))
            self.answer({"limits": {}})
        else:
            self.answer({})

    def stream(self, content: dict[str, Any]) -> None:
        run = self.server.runs[self.path.split("/")[-2]]
        for name, part in (content.get("files") or {}).items():
            if "history" in name:
                run.history += [json.loads(line) for line in part["content"]]
            if "summary" in name:
                run.summary = json.loads(part["content"][-1])

    def graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "me"}}
        name = variables.get("name")
        if operation == "Viewer":
            viewer = {"id": "V", "entity": "me", "username": "me", "email": "a@b", "admin": False, "flags": "{}"}
            return {"viewer": {**viewer, "teams": {"edges": []}}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if "ResumeStatus" in operation:
            return {"model": {**project, "bucket": self.resume_status(name)}}
        if operation == "UpsertBucket":
            inserted = name not in self.server.runs
            run = self.server.runs.setdefault(name, Run())
            run.starts += 1
            bucket = {"id": "R", "name": name, "displayName": name, "description": None, "config": "{}"}
            bucket |= {"sweepName": None, "project": project, "historyLineCount": len(run.history)}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if operation == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.server.url}/up/{f}"} for f in variables.get("files", [])]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        return {}

    def resume_status(self, name: str) -> dict[str, Any] | None:
        run = self.server.runs.get(name)
        if run is None:
            return None
        tail = json.dumps([json.dumps(line) for line in run.history[-1:]])
        counts = {"logLineCount": 0, "historyLineCount": len(run.history), "eventsLineCount": 0}
        texts = {"summaryMetrics": json.dumps(run.summary), "historyTail": tail, "eventsTail": "[]", "config": "{}"}
        return {"id": "R", "name": name, "displayName": "n", "tags": [], "wandbConfig": '{"t":1}', **counts, **texts}
