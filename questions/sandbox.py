"""Running a model's code away from us: a separate process with inputs in, JSON outputs out, and hard limits.

**In bubblewrap** (`bwrap`), which is what `--execute-code` means, the process has namespaces of its own: it
sees no other process and no network, of the files only the interpreter's and the system's libraries, which
it cannot write to, no home, no `/proc`, can start no process and open no socket, and ends with us. What that
does not keep off is an exploit of the kernel.

**Unsandboxed** there are only the limits and the audit hook below. Code written to escape can reach through
built-in modules what no audit event announces: it can signal any process of the same user, move it to other
cores, and make pipes wherever that user may write.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import platform
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

from errors import FrankenError

# Runs in the child, with no file of ours in reach. Audit hooks cannot be removed; everything not named is
# refused.
_CHILD = r"""
import sys, os, json, resource
os.write(1, b"ready\n")
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
        os._exit(3)  # root's rights cannot be given up: nothing is run with them
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
UNSANDBOXED: Literal["unsandboxed"] = "unsandboxed"
Execute = bool | Literal["unsandboxed"]  # whether code is run, and whether without bubblewrap
INSTALL = "install it (Debian and Ubuntu: `apt install bubblewrap`, Fedora: `dnf install bubblewrap`)"
WEAKER = "or take --execute-code-unsandboxed, which code written to escape can get out of"
# By machine: (its number for seccomp, system calls that answer "no such call", those that answer "not
# allowed"). clone3 has its arguments in memory, where no filter sees them. The rest start processes, look
# into others, make namespaces, devices or memory that no limit counts, or reach what has no namespace:
# a vsock socket of a virtual machine speaks with its host from any network namespace.
_CALLS = {
    "x86_64": (
        0xC000003E,
        (435,),  # clone3
        (
            *(56, 57, 58, 101, 272, 308),  # clone fork vfork ptrace unshare setns
            *(310, 311, 312, 434, 438),  # process_vm_readv process_vm_writev kcmp pidfd_open pidfd_getfd
            *(41, 53, 240),  # socket socketpair mq_open
            *(29, 64, 68, 319, 447),  # shmget semget msgget memfd_create memfd_secret
            *(133, 259, 165, 303, 304),  # mknod mknodat mount name_to_handle_at open_by_handle_at
            # open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr
            *(428, 429, 430, 431, 432, 433, 442),
            *(248, 249, 250, 254, 300),  # add_key request_key keyctl inotify_add_watch fanotify_init
            # perf_event_open bpf userfaultfd io_uring_setup, _enter, _register
            *(298, 321, 323, 425, 426, 427),
            *(135, 154),  # personality modify_ldt
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (435,),
        (
            *(220, 117, 97, 268),  # as above; without fork, vfork, mknod and modify_ldt, which are x86's
            *(270, 271, 272, 434, 438),
            *(198, 199, 180),
            *(194, 190, 186, 279, 447),
            *(33, 40, 264, 265),
            *(428, 429, 430, 431, 432, 433, 442),
            *(217, 218, 219, 27, 262),
            *(241, 280, 282, 425, 426, 427),
            92,
        ),
    ),
}


def check(execute: Execute) -> None:
    """Raises FrankenError with the way on where code could not be run under the guard asked for."""
    if not execute:
        return
    if execute != UNSANDBOXED and shutil.which("bwrap") is None:
        raise FrankenError(
            "--execute-code runs what a model wrote, inside bubblewrap, and there is no `bwrap` here:"
            f" {INSTALL}, {WEAKER}"
        )
    got, why = run_limited("def f(x):\n return x + 1", "f", [(1,)], execute=execute)
    if got == [(True, 2)]:
        return
    if execute == UNSANDBOXED:
        raise FrankenError(
            f"--execute-code-unsandboxed: code cannot be run here, not even with what rights it must not have"
            f" taken away ({why}); leave it out, and code answers are parsed alone"
        )
    raise FrankenError(
        f"--execute-code: bubblewrap cannot run here ({_bwrap_says() or why}); in a container it needs leave"
        f" to make user namespaces. Leave the flag out, and code answers are parsed alone, {WEAKER}"
    )


def _bwrap_says() -> str:
    """The last line of bubblewrap's own words when it is asked for an empty box."""
    tried = subprocess.run([*_bwrap(), "true"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return (tried.stderr.strip().splitlines() or [""])[-1]


@functools.cache
def _bwrap() -> tuple[str, ...]:
    """bubblewrap's command line up to the command that runs in it."""
    python = Path(sys.base_prefix).resolve()
    places = [Path("/usr"), *map(Path, ("/lib", "/lib64", "/lib32", "/etc/ld.so.cache"))]
    if not python.is_relative_to("/usr"):
        places.append(python)
    shown = [word for place in places for word in ("--ro-bind-try", str(place), str(place))]
    return (
        *(shutil.which("bwrap") or "bwrap", "--unshare-user", "--unshare-all", "--as-pid-1"),
        *("--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *("--uid", "65534", "--gid", "65534", "--clearenv"),
        *("--hostname", "answer", *shown, "--dev", "/dev", "--remount-ro", "/dev", "--dir", "/empty"),
        *("--remount-ro", "/", "--chdir", "/empty"),
    )


@functools.cache
def _filter() -> bytes:
    """A seccomp program (classic BPF, see seccomp(2)) for this machine; none for one that _CALLS lacks."""
    if platform.machine() not in _CALLS:
        return b""
    machine, absent, refused = _CALLS[platform.machine()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    kill, allow, error = 0x80000000, 0x7FFF0000, 0x00050000
    program = [
        (load, 0, 0, 4),  # the machine that the call is made for
        (equal, 1, 0, machine),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),  # the call's number
        (at_least, 0, 1, 0x40000000),  # x86's second table of calls
        (answer, 0, 0, kill),
    ]
    for calls, number in ((absent, errno.ENOSYS), (refused, errno.EPERM)):
        for call in calls:
            program += [(equal, 0, 1, call), (answer, 0, 0, error | number)]
    program.append((answer, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *line) for line in program)


def _interpreter() -> str:
    """The interpreter itself: a virtual environment's is a link to it, from where the box shows nothing."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _end(child: subprocess.Popen) -> None:
    """Kills a run and all that belongs to it.

    In bubblewrap that is the box's first process, with which the kernel ends the rest. bubblewrap, outside,
    waits for it and ends too; killed before, it would leave a dead process to the machine's first one, which
    in a container may be this program and waits for nobody.
    """
    try:
        inside = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    except OSError:  # ended, or a kernel that does not tell
        inside = []
    with suppress(ProcessLookupError, PermissionError):
        for pid in inside:
            os.kill(int(pid), signal.SIGKILL)
    if inside:
        with suppress(subprocess.TimeoutExpired):
            child.wait(5)
            return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run_limited(
    source: str,
    function: str,
    calls: list[tuple],
    *,
    execute: Execute = True,
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
    to hold the right outputs. All of this inside bubblewrap, unless `execute` is UNSANDBOXED; see the
    module's words on what each keeps off. Where bubblewrap is not there nothing is run. POSIX only.
    """
    if execute != UNSANDBOXED and shutil.which("bwrap") is None:
        return None, "there is no bubblewrap to run it in"
    # 1) what the child is told
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
    with ExitStack() as held:
        empty = held.enter_context(tempfile.TemporaryDirectory())
        rules = held.enter_context(tempfile.TemporaryFile())
        rules.write(_filter())
        rules.seek(0)
        command = [_interpreter(), "-I", "-S", "-B", "-c", _CHILD]
        if execute != UNSANDBOXED:
            filtered = ["--seccomp", str(rules.fileno())] if _filter() else []
            command = [*_bwrap(), *filtered, *command]
        child = subprocess.Popen(
            command,
            pass_fds=[rules.fileno()] if execute != UNSANDBOXED else [],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=empty,
            env={},
            start_new_session=True,
        )

        assert child.stdin is not None and child.stdout is not None  # as pipes were asked for
        timer = threading.Timer(wall_s, lambda: (expired.set(), _end(child)))
        try:
            timer.start()
            # told once it runs, and so has been bound to our life: nothing runs after us
            child.stdout.readline(16)
            with suppress(BrokenPipeError):
                child.stdin.write(json.dumps(job).encode())
                child.stdin.close()
            output = child.stdout.read(_OUTPUT_CAP)
            child.stdout.close()
            child.wait()  # bubblewrap's own end, as it waits for what ran in it
        finally:
            timer.cancel()
            if timer.is_alive():
                timer.join()  # so that it cannot fire on a process id that has been given away
            with suppress(BrokenPipeError):
                child.stdin.close()
            child.stdout.close()
            if child.returncode is None:
                _end(child)

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
