"""Running a model's code away from us: a separate process with inputs in, JSON outputs out, and hard
limits."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress

# Runs in the child, with no file of ours in reach. Audit hooks cannot be removed; everything not named is
# refused.
_CHILD = r"""
import sys, os, json, resource
job = json.load(sys.stdin)
for name in job["modules"]:
    __import__(name)
out = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
root = os.getuid() == 0
try:
    os.unshare(os.CLONE_NEWNET | (0 if root else os.CLONE_NEWUSER))
except (AttributeError, OSError):
    pass
for name, limit in job["limits"].items():
    try:
        resource.setrlimit(getattr(resource, name), (limit, limit))
    except (AttributeError, ValueError, OSError):
        pass
if root:  # root is exempt from RLIMIT_NPROC
    try:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    except OSError:
        pass
def guard(event, args):
    if event not in {
            "compile", "exec", "object.__getattr__", "object.__setattr__", "sys._getframe",
            "sys._getframemodulename",
            "builtins.id", "time.sleep", "builtins.input", "builtins.input/result"}:
        raise (ImportError if event == "import" else PermissionError)(event)
def run(job, out, write=os.write, dumps=json.dumps):
    space = {"__name__": "answer"}
    results = []
    try:
        exec(compile(job["source"], "<answer>", "exec"), space)
        for args in job["calls"]:
            try:
                results.append([True, json.loads(dumps(space[job["function"]](*args)))])
            except Exception:
                results.append([False, None])
    except Exception:
        results = None
    text = ("\n" + job["nonce"] + dumps(results) + "\n").encode()
    while text:
        text = text[write(out, text):]
sys.addaudithook(guard)
del guard  # nothing that the code can reach refers to it now
run(job, out)
os._exit(0)
"""
_MODULES = (
    "__future__",
    "bisect",
    "collections",
    "collections.abc",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "textwrap",
    "time",
    "typing",
)
_OUTPUT_CAP = 65_536  # bytes


def run_limited(
    source: str,
    function: str,
    calls: list[tuple],
    *,
    wall_s: float = 10.0,
    cpu_s: int = 2,
    memory_mb: int = 512,
) -> tuple[list[tuple[bool, object]] | None, str]:
    """Calls `function` from `source` on each argument tuple in a separate process: ([(returned, value), ...],
    "") or (None, reason). Values come back as JSON (tuples as lists), on a line marked with a random nonce.

    The child has no environment, an empty directory to stand in, its output closed off, and limits on CPU
    seconds, memory, open files, file size (0) and processes (0, as "nobody" when started by root); an audit
    hook refuses files, sockets, processes, threads and imports beyond a list of pure modules; its process
    group is killed at the end or after `wall_s`. It is given inputs only, so a forged report would still have
    to hold the right outputs. Limits of this: the network is shut off by the kernel (a new namespace) only on
    Linux with Python 3.12 and enough rights, elsewhere by the hook alone; memory limits do not hold on macOS;
    and no audit hook stops an exploit of the interpreter itself. Against code written to escape, run the
    whole harness in a container. POSIX only.
    """
    # 1) what the child is told, through a file
    nonce = secrets.token_hex(16)
    limits = {
        "RLIMIT_CPU": cpu_s,
        "RLIMIT_AS": memory_mb << 20,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": 16,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    job = {
        "nonce": nonce,
        "source": source,
        "function": function,
        "calls": calls,
        "limits": limits,
        "modules": _MODULES,
    }
    # 2) the child, killed with all its group at the end or when its time is over
    expired = threading.Event()
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as given:
        given.write(json.dumps(job).encode())
        given.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _CHILD],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=empty,
            env={},
            start_new_session=True,
        )

        assert child.stdout is not None  # as a pipe was asked for

        def kill() -> None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(wall_s, lambda: (expired.set(), kill()))
        timer.start()
        try:
            output = child.stdout.read(_OUTPUT_CAP)
        finally:
            timer.cancel()
            timer.join()  # so that it cannot fire on a process id that has been given away
            kill()
            child.stdout.close()
            child.wait()

    # 3) what it reported
    marked = [line for line in output.decode("utf-8", "replace").splitlines() if line.startswith(nonce)]
    if not marked:
        return (
            None,
            "ran out of time" if expired.is_set() else "ended without a result (a limit, a crash or an exit)",
        )
    try:
        results = json.loads(marked[-1][len(nonce) :])
        return (
            ([(ok is True, value) for ok, value in results], "")
            if len(results) == len(calls)
            else (None, "incomplete")
        )
    except (ValueError, TypeError, RecursionError):
        return None, "could not be loaded, or gave no JSON"
