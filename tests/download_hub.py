"""A model hub on this machine, with as much of the hub's interface as a download needs."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class Hub:
    """Serves folders as models "tiny/NAME".

    asked: (method, path, range) of every request for a file. held: names of models whose weights stop in the
    middle of each file until `go` is set; broken: of those whose connection breaks there.
    """

    def __init__(self, folders: dict[str, Path]):
        self.folders, self.asked, self.go = folders, [], threading.Event()
        self.held, self.broken = set(), set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.go.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request, body: bool) -> None:
        parts = request.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api" and len(parts) < 5:  # nothing that a download needs
            return self.send(request, 404, b"{}", {}, body)
        if parts[0] == "api":
            name, what = parts[3], parts[4]
            told = {"id": f"tiny/{name}", "sha": COMMIT} if what == "revision" else self.tree(name)
            if name not in self.folders:
                return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
            return self.send(request, 200, json.dumps(told).encode(), {}, body)
        name, file = parts[1], self.folders[parts[1]] / "/".join(parts[4:])
        if not file.exists():
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        data, given = file.read_bytes(), request.headers.get("Range")
        self.asked.append((request.command, request.path, given))
        etag = hashlib.sha256(data).hexdigest()
        head = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        status = 200
        if given:
            start = int(given.removeprefix("bytes=").split("-")[0])
            head["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        if file.suffix != ".safetensors" or given:
            return self.send(request, status, data, head, body)
        slow = (name in self.held) + 2 * (name in self.broken)
        return self.send(request, status, data, head, body, slow)

    def send(self, request, status, data, headers, body, slow=0) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if not body:
            return
        try:
            half = len(data) // 2 if slow else len(data)
            request.wfile.write(data[:half])
            request.wfile.flush()
            if slow > 1:
                request.close_connection = True
            elif slow:
                self.go.wait(60)
                request.wfile.write(data[half:])
        except (BrokenPipeError, ConnectionResetError):  # who asked has gone
            request.close_connection = True

    def tree(self, name: str) -> list[dict]:
        files = []
        for file in sorted(self.folders.get(name, Path("/nowhere")).glob("*")):
            data = file.read_bytes()
            entry = {"type": "file", "path": file.name, "size": len(data), "oid": "0" * 40}
            if file.suffix == ".safetensors":
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
            files.append(entry)
        return files
