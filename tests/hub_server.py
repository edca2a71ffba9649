"""A stand-in for the model hub's API, as far as huggingface_hub needs it to send a folder."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class HubStandIn:
    """What was sent: `files` by path, `commits` as (title, paths), `requests`; `down` refuses commits."""

    endpoint: str = ""
    token: str = "hf_secret"
    private: bool | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    down: bool = False


@contextlib.contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    hub = HubStandIn()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, status: int, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            hub.requests.append(f"GET {self.path}")
            self.answer(200, {"id": "me/runs", "sha": "0" * 40, "siblings": [], "private": True})

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"POST {self.path}")
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.answer(401, {"error": "Invalid credentials in Authorization header"})
            if self.path == "/api/repos/create":
                made = json.loads(body)  # older clients say `private`, newer ones `visibility`
                hub.private = made.get("private", made.get("visibility") == "private")
                return self.answer(200, {"url": f"{hub.endpoint}/datasets/me/runs", "name": "me/runs"})
            if "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for f in json.loads(body)["files"]
                ]
                return self.answer(200, {"files": files})
            if "/commit/" in self.path and not hub.down:
                lines = [json.loads(line) for line in body.decode().splitlines()]
                sent = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                hub.files |= sent
                title = next(line["value"]["summary"] for line in lines if line["key"] == "header")
                hub.commits.append((title, sorted(sent)))
                url = f"{hub.endpoint}/datasets/me/runs/commit/{'0' * 40}"
                return self.answer(200, {"commitUrl": url, "commitOid": "0" * 40, "success": True})
            return self.answer(500, {"error": f"no such thing: {self.path} {hub.token}"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
