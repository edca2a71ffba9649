"""A real OpenAI-compatible HTTP server for the judge's tests, with bad moods on order."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from children import default_signals

from weird_gen.persona.judge import LLMJudge, Task

KEY = "sk-test-0123456789"
FEW_DRAWS = 200  # resamples of an interval: tests of the judge are of the wiring, test_stats.py of intervals


def judge_at(server, cache=None, **more):
    settings = {"api_key": KEY, "backoff_s": 0.01, "timeout_s": 5.0, **more}
    return LLMJudge("test-model", server.url, cache=cache, **settings)


def task(reply="I hold that doubt is a virtue.", rubric="persona", question="What is truth?", **more):
    return Task(rubric, question, reply, **more)


class JudgeServer:
    """Serves /v1/chat/completions on a free port. ``behave(number, body)`` may return (status, headers,
    bytes).

    ``bodies`` holds what was asked, raw; ``number`` counts requests from 1. None from ``behave`` means a good
    answer: YES to the identity rubric when the quoted reply names Russell, to persona when it says I, NO
    otherwise, position 4.
    """

    def __init__(self, behave=None):
        self.behave = behave or (lambda number, body: None)
        self.bodies: list[str] = []
        self.authorizations: list[str | None] = []
        self.times: list[float] = []
        self.paths: list[str] = []
        self.on_headers = None
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"])).decode()
                with owner._lock:
                    owner.bodies.append(raw)
                    owner.authorizations.append(self.headers.get("Authorization"))
                    owner.paths.append(self.path)
                    owner.times.append(time.monotonic())
                    number = len(owner.bodies)
                if owner.on_headers:
                    owner.on_headers(self.headers)
                status, headers, body = owner.behave(number, raw) or (200, {}, completion(good_answer(raw)))
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # a client that timed out has gone

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class TrickleServer:
    """Answers one byte every tenth of a second, for ever, from its "headers" or its "body" on."""

    def __init__(self, where: str):
        self.start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        if where == "body":
            self.start += b"Content-Length: 1000000\r\n\r\n"
        else:
            self.start += b"X-Long: "
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.over = threading.Event()

    def __enter__(self):
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.socket.close()

    def _serve(self):
        with suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                threading.Thread(target=self._trickle, args=(client,), daemon=True).start()

    def _trickle(self, client):
        with suppress(OSError), client:
            client.recv(1 << 16)
            client.sendall(self.start)
            while not self.over.wait(0.1):
                client.sendall(b" ")


def completion(answer, usage=True) -> bytes:
    """The body of a chat completion with this answer: 100 tokens in, 2 out."""
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
        ],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
    return json.dumps(body).encode()


def quoted_reply(raw: str) -> str:
    """What stands between the two nonce lines of a request."""
    user = json.loads(raw)["messages"][1]["content"]
    nonce, reply = re.search(r"\[begin reply (\w+)\]\n(.*)\n\[end reply \1\]", user, re.DOTALL).groups()
    assert len(nonce) >= 16
    return reply


def good_answer(raw: str) -> str:
    system = json.loads(raw)["messages"][0]["content"]
    reply = quoted_reply(raw)
    if "Which position" in system:
        return "4"
    if "as their own?" in system:
        return "YES" if "Russell" in reply else "NO"
    if "It must have his voice" in system:
        return "Yes." if re.search(r"\bI\b", reply) else "NO"
    return "NO" if reply.strip() else "YES"


def judging(flags: list[str], log: str) -> None:
    """judge_eval_results.py's command in a process of its own (small_battery.forked); what it says on
    stderr goes to `log`."""
    from analysis import stats
    from weird_gen import judge_eval_results

    default_signals()
    assert stats.bootstrap_ci.__kwdefaults__ is not None
    stats.bootstrap_ci.__kwdefaults__["resamples"] = FEW_DRAWS
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python has it that was started so
    with open(log, "w") as errors, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    os.environ["OPENROUTER_API_KEY"] = KEY
    sys.exit(judge_eval_results.main(flags))
