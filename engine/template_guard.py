"""A chat template is a program from a checkpoint: it may never end, or take all memory, and only for certain
words. Every conversation is first written in a process of its own, with limits on time, memory and text.

What it writes there is not used: the tokenizer writes the conversation itself once it is known to end.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jinja2

from errors import FrankenError

TEMPLATE_BYTES, WRITTEN_BYTES = (
    1 << 20,
    1 << 20,
)  # of a template; of what it adds to a conversation's own texts
TEMPLATE_SECONDS, TEMPLATE_MEMORY = 10, 1 << 30  # of processor time for one conversation; bytes
REPEATED = 8  # how often a template may write what it is given
NO_MEMORY, TOO_LONG = 3, 4  # exit statuses of the child

# Templates are written as transformers does it: the same sandbox, extensions and functions.
_CHILD = r"""
import json, resource, signal, sys
settings = json.loads(sys.argv[1])
sys.path.insert(0, settings["jinja2"])
from datetime import datetime
import jinja2, jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)  # sent to the whole group: the end of the input ends this process
resource.setrlimit(resource.RLIMIT_AS, (settings["memory"], settings["memory"]))
class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)
    def _same(self, caller):
        return caller()
def refuse(message):
    raise jinja2.TemplateError(message)
def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                     extensions=[Generation, "jinja2.ext.loopcontrols"])
made.filters["tojson"] = tojson
made.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
class Impossible(jinja2.nodes.Impossible):
    # compiling works out what is constant, also in parts that a conversation does not reach, and goes on
    # without where memory is short; where there are no limits, it would take it
    def __init__(self, *given):
        if isinstance(sys.exc_info()[1], MemoryError):
            sys.exit(settings["no memory"])
        super().__init__(*given)
jinja2.nodes.Impossible = Impossible
compiled = {}
print("ready", flush=True)
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_PROF, settings["seconds"])
    try:
        job = json.loads(line)
        variables = job["variables"]
        if job["moment"]:
            variables["strftime_now"] = datetime.fromisoformat(job["moment"]).strftime
        if job["source"] not in compiled:
            compiled = {job["source"]: made.from_string(job["source"])}
        length = 0
        for piece in compiled[job["source"]].generate(
            messages=job["messages"], add_generation_prompt=job["ask"], tools=None, documents=None,
            **variables
        ):
            length += len(piece)
            if length > job["most"]:
                sys.exit(settings["too long"])
    except MemoryError:
        sys.exit(settings["no memory"])
    except Exception:
        pass  # what a template refuses, its user says
    signal.setitimer(signal.ITIMER_PROF, 0)
    print("done", flush=True)
"""


class _Child:
    """The process, started when it is first asked and again after it has ended or this one was forked."""

    def __init__(self):
        self.process: subprocess.Popen[str] | None = None
        self.limits, self.owner, self.lock = (0, 0), 0, threading.Lock()

    def ask(self, job: dict) -> int | None:
        """None where the template ends, else the status with which the process ended: of the child's own, or
        minus the signal's number."""
        with self.lock:
            process = self._running()
            try:
                process.stdin.write(json.dumps(job) + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                if self._answer(process, 12 * TEMPLATE_SECONDS) == "done\n":
                    return None
            except BrokenPipeError:
                pass
            self.process = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            if process.returncode is None:  # it takes no processor time either
                process.kill()
            return process.wait()

    def _running(self) -> subprocess.Popen[str]:
        """The child, ready to be asked. Raises FrankenError where it cannot be started."""
        limits = (TEMPLATE_SECONDS, TEMPLATE_MEMORY)
        if (
            self.process
            and (self.owner, self.limits) == (os.getpid(), limits)
            and self.process.poll() is None
        ):
            return self.process
        if self.process and self.owner == os.getpid():
            self.end()
        settings = {
            "seconds": TEMPLATE_SECONDS,
            "memory": TEMPLATE_MEMORY,
            "no memory": NO_MEMORY,
            "too long": TOO_LONG,
            "jinja2": str(Path(jinja2.__file__).parents[1]),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.owner, self.limits = os.getpid(), limits
        if self._answer(self.process, 120) != "ready\n":
            self.end()
            raise FrankenError("the process in which chat templates are tried does not start")
        return self.process

    @staticmethod
    def _answer(process: subprocess.Popen[str], seconds: float) -> str:
        """The child's next line; "" where it has ended or says nothing for so long."""
        until = time.monotonic() + seconds
        assert process.stdout is not None  # it was started with a pipe
        while (left := until - time.monotonic()) > 0:
            if select.select([process.stdout], [], [], left)[0]:
                return process.stdout.readline()
        return ""

    def end(self) -> None:
        if self.process and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None


_child = _Child()
atexit.register(_child.end)


def problem(
    source: str,
    messages: Sequence[dict],
    ask: bool = True,
    moment: str | None = None,
    variables: dict | None = None,
) -> str | None:
    """Why a conversation must not be written by a template, as what follows "the chat template"; None where
    it can be.

    Args:
        source: the template's text.
        ask: whether the assistant's turn is begun.
        moment: ISO 8601, what `strftime_now` tells; None: the time as it is.
        variables: what else the template is given, as JSON.
    Raises FrankenError where it cannot be tried.
    """
    if len(source.encode("utf-8", "replace")) > TEMPLATE_BYTES:
        return f"is over {TEMPLATE_BYTES >> 20} MiB long"
    texts = sum(len(str(value)) for message in messages for value in message.values())
    job = {
        "source": source,
        "messages": list(messages),
        "ask": ask,
        "moment": moment,
        "variables": variables or {},
        "most": WRITTEN_BYTES + REPEATED * texts,
    }
    status = _child.ask(job)
    if status is None:
        return None
    return {
        NO_MEMORY: f"takes over {TEMPLATE_MEMORY >> 30} GiB of memory for a conversation",
        TOO_LONG: f"writes over {WRITTEN_BYTES >> 20} MiB for a conversation",
        -signal.SIGPROF: f"does not end: a conversation took it over {TEMPLATE_SECONDS} s",
        -signal.SIGKILL: f"does not end: a conversation took it over {TEMPLATE_SECONDS} s",
    }.get(status, f"ended the process in which it was tried (status {status})")
