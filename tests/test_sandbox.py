"""The limited process, in bubblewrap and without: what honest code gets, and what hostile code does not."""

import errno
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import guards
import pytest
from children import default_signals

from errors import FrankenError
from questions import sandbox
from questions.coding import Code
from questions.sandbox import UNSANDBOXED, run_limited


@pytest.fixture(params=guards.EACH)
def run(request):
    """run(source, *calls) under each guard."""

    def under_this_guard(source, *calls, **limits):
        return run_limited(source, "f", list(calls) or [(2,)], execute=request.param, **limits)

    under_this_guard.guard = request.param
    return under_this_guard


def failed(outcome):
    """No value came back: the run ended without a result, or the call raised."""
    values, why = outcome
    return bool(why) if values is None else not any(ok for ok, _ in values)


@pytest.mark.parametrize(
    "source",
    [
        "def f(x):\n return x + 1",
        "from __future__ import annotations\nimport math\ndef f(x):\n return math.ceil(x + 0.5)",
        (
            "from collections import namedtuple\nP = namedtuple('P', 'a b', defaults=(1,))\ndef f(x):\n"
            " return P(x).a + P(x).b"
        ),
        "from dataclasses import dataclass\n@dataclass\nclass A:\n a: int\ndef f(x):\n return A(x + 1).a",
        "import functools\n@functools.cache\ndef f(x):\n return 1 if x < 1 else f(x - 1) + 1",
        "def f(x):\n print('noise ' * 10**6)\n return x + 1",
    ],
)
def test_honest_code_returns_its_values(run, source):
    assert run(source) == ([(True, 3)], "")


def test_calls_are_separate_and_in_order_and_one_error_leaves_the_others(run):
    values, why = run("def f(x):\n x.append(1)\n return [10 // x[0], len(x)]", ([5],), ([0],), ([2],))
    assert (values, why) == ([(True, [2, 2]), (False, None), (True, [5, 2])], "")


def test_an_infinite_loop_and_a_long_sleep_end(run):
    start = time.monotonic()
    assert failed(run("def f(x):\n while True: pass", cpu_s=1))
    assert run("import time\ndef f(x):\n time.sleep(60)", wall_s=0.7) == (None, "ran out of time")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "source",
    [
        "def f(x):\n return len('a' * 10**10)",
        "def f(x):\n data = []\n while True: data.append(bytearray(10**7))",
        "import os\ndef f(x):\n return os.fork()",
        "import os\ndef f(x):\n return os.system('true')",
        "import os\ndef f(x):\n return os.posix_spawn('/bin/sh', ['sh'], {})",
        "import os\ndef f(x):\n os.kill(os.getppid(), 9)",
        "import subprocess\ndef f(x):\n return subprocess.call(['true'])",
        "import threading\ndef f(x):\n return threading.active_count()",
        "import socket\ndef f(x):\n return 1",
        "import ctypes\ndef f(x):\n return 1",
        "def f(x):\n return open('/etc/hosts').read()",
        "def f(x):\n return open('/proc/self/environ').read()",
        "import os\ndef f(x):\n return os.listdir('/')",
        "import sys\ndef f(x):\n sys.path.append('/')\n import grading\n return 1",
        "import __main__, os\n__main__.guard = lambda *a: None\ndef f(x):\n return os.listdir('/')",
        "def f(x):\n raise SystemExit",
        "import os\ndef f(x):\n os._exit(0)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n return f(x) + 1",
        "def f(x):\n return 'a' * 10**6",
        "def f(x):\n return object()",
        "def g(x):\n return 1",
        "def f(x) return 1",
        "def f(x):\n return '\ud800'",
    ],
)
def test_hostile_or_broken_code_returns_nothing(run, source):
    assert failed(run(source, cpu_s=1, memory_mb=160))


def test_the_memory_limit_is_the_one_given(run):
    source = "def f(x):\n return len(bytearray(10**8))"
    assert run(source) == ([(True, 10**8)], "")
    assert failed(run(source, memory_mb=100))


def test_nothing_is_written_and_the_directory_is_empty_and_gone(run, tmp_path):
    target = tmp_path / "written.txt"
    assert failed(run(f"def f(x):\n open({str(target)!r}, 'w').write('x')\n return 1"))
    assert failed(run(f"import os\ndef f(x):\n return os.open({str(target)!r}, os.O_CREAT | os.O_WRONLY)"))
    assert not target.exists()
    values, _ = run("import os\ndef f(x):\n return os.getcwd()")
    if values[0][0]:  # as "nobody" the child may not even be allowed to ask
        assert not os.path.exists(values[0][1])


def test_the_environment_is_not_there(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-parent")
    ((ok, environment),) = run("import os\ndef f(x):\n return dict(os.environ)")[0]
    assert ok and set(environment) <= {"LC_CTYPE", "PWD", "__CF_USER_TEXT_ENCODING"}


def test_a_printed_result_line_counts_for_nothing(run):
    line = json.dumps([[True, 99]])
    assert run(f"def f(x):\n print({line!r})\n return x + 1") == ([(True, 3)], "")
    assert failed(
        run(f"import os\nos.write(1, {line.encode()!r})\nos.write(4, {line.encode()!r})\nos._exit(0)")
    )


def test_a_forged_report_that_finds_the_nonce_still_does_not_know_the_outputs(run):
    forged = (
        "import os, sys\n"
        "def f(x):\n"
        " frame = sys._getframe(1).f_locals\n"
        " given = {k: v for k, v in frame['job'].items() if k != 'source'}\n"
        " assert str(10**6 + 234567) not in str(given)\n"  # the expected output never reaches the child
        " os.write(frame['out'], ('\\n' + frame['job']['nonce'] + '[[true, 5]]\\n').encode())\n"
        " os._exit(0)\n"
    )
    assert run(forged) == ([(True, 5)], "")
    assert not Code("f", 1, (((2,), 1234567),)).grade(forged + "\n return x\n", execute=run.guard).correct


def test_an_object_that_claims_to_equal_everything_does_not_pass(run):
    source = (
        "class E(int):\n    def __eq__(self, other):\n        return True\n\ndef f(x):\n    return E(x)\n"
    )
    assert not Code("f", 1, (((2,), 7),)).grade(source, execute=run.guard).correct
    assert not Code("f", 1, (((2,), True),)).grade("def f(x):\n    return x - 1", execute=run.guard).correct


# ---- past the audit hook: built-in modules whose functions it is not told of -------------------------------

REACH = "import sys\nposix, signals = sys.modules['posix'], sys.modules['_signal']\n"


@pytest.fixture
def victim():
    """A process of ours that would rather live."""
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


def boxed(body: str, **limits):
    return run_limited(f"{REACH}def f(x):\n {body}", "f", [(2,)], **limits)


@guards.needs_box
def test_no_process_outside_can_be_signalled_or_moved_to_other_cores(victim):
    for body in (
        f"return signals.pidfd_send_signal(posix.pidfd_open({victim.pid}), 9)",
        f"return posix.sched_setaffinity({victim.pid}, {{0}})",
        f"return posix.sched_getaffinity({victim.pid})",
        f"return posix.getpgid({victim.pid})",
        f"return posix.getpgid({os.getpid()})",
    ):
        assert failed(boxed(body.replace("return ", "return [") + "]")), body
    assert victim.poll() is None and boxed("return posix.getppid()")[0][0][1] <= 1


@guards.needs_box
def test_nothing_can_be_made_anywhere_and_no_home_is_there(tmp_path):
    tmp_path.chmod(0o777)
    inside = ["/tmp", "/", "/empty", "/dev", "/dev/shm", "/usr", str(tmp_path)]
    for place in inside:
        for body in (
            f"posix.mkfifo('{place}/pipe', 0o666)\n return 1",
            f"posix.mknod('{place}/device', 0o20666, 259)\n return 1",
            f"posix.mknod('{place}/file', 0o100666)\n return 1",
        ):
            assert failed(boxed(body)), body
    assert list(tmp_path.iterdir()) == []
    for path in (os.path.expanduser("~/.cache"), "/proc/self", "/etc/passwd", __file__):
        exists = f"posix.lstat({path!r})\n return 1"
        assert failed(boxed(exists)), path
    assert boxed("posix.lstat('/usr')\n return 1") == ([(True, 1)], "")


@guards.needs_box
def test_no_process_is_started_not_even_as_root():
    """RLIMIT_NPROC does not count root's; the filter of system calls does not ask who calls."""
    script = (
        "import sys, os, ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "out = []\n"
        "for call in (56, 57, 58, 435, 101, 272, 308):\n"
        "    got = libc.syscall(call, 17, 0, 0, 0, 0)\n"
        "    if got == 0 and call in (56, 57, 58, 435): os._exit(0)\n"
        "    out.append((got, ctypes.get_errno()))\n"
        "print(out)"
    )
    if platform.machine() != "x86_64":
        pytest.skip("the numbers are x86's")
    done = in_the_box(script)
    no, not_there = (-1, errno.EPERM), (-1, errno.ENOSYS)
    assert done.stdout.strip() == str([no, no, no, not_there, no, no, no]), done.stderr


@guards.needs_box
def test_the_network_is_the_boxs_own():
    """A listener of ours on loopback, and a process without the audit hook in the same box."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        script = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)"
        done = subprocess.run(
            [*sandbox._bwrap(), sandbox._interpreter(), "-I", "-c", script], capture_output=True, text=True
        )
    assert done.returncode != 0 and "refused" in done.stderr or "unreachable" in done.stderr


def in_the_box(script):
    """A process with the box's walls and its filter of system calls, and without the audit hook."""
    with tempfile.TemporaryFile() as rules:
        rules.write(sandbox._filter())
        rules.seek(0)
        filtered = ["--seccomp", str(rules.fileno())]
        command = [*sandbox._bwrap(), *filtered, sandbox._interpreter(), "-I", "-c", script]
        return subprocess.run(command, pass_fds=[rules.fileno()], capture_output=True, text=True, env={})


@guards.needs_box
@pytest.mark.skipif(platform.machine() not in sandbox._CALLS, reason="no filter for this machine")
def test_no_socket_is_made_of_any_family():
    """A vsock socket has no namespace: in a virtual machine it speaks with the host's side."""
    done = in_the_box(
        "import socket\n"
        "for name in [n for n in dir(socket) if n.startswith('AF_')]:\n"
        "    for kind in (1, 2, 3, 5):\n"
        "        try: socket.socket(getattr(socket, name), kind)\n"
        "        except PermissionError: continue\n"
        "        except OSError as e: print(name, kind, e)\n"
        "        else: print(name, kind, 'made')\n"
        "try: socket.socketpair()\n"
        "except PermissionError: print('end')"
    )
    assert done.stdout.strip() == "end", done.stdout + done.stderr


@guards.needs_box
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are x86's")
@pytest.mark.parametrize(
    "call, arguments",
    [
        ("shmget", (29, 0, 1 << 28, 0o1600)),  # memory that RLIMIT_AS counts only while it is attached
        ("msgget", (68, 0, 0o1600)),
        ("semget", (64, 0, 5, 0o1600)),
        ("mq_open", (240, b"queue", 0o102, 0o600, 0)),
        ("memfd_create", (319, b"name", 0)),
        ("memfd_secret", (447, 0)),
        ("process_vm_readv", (310, 1, 0, 0, 0, 0, 0)),
        ("pidfd_open", (434, 1, 0)),
        ("kcmp", (312, 1, 1, 0, 0, 0)),
        ("request_key", (249, b"user", b"name", 0, 0)),
        ("mount", (165, b"none", b"/", b"tmpfs", 0, 0)),
        ("open_by_handle_at", (304, -100, 0, 0)),
        ("io_uring_enter", (426, 0, 0, 0, 0, 0)),
        ("modify_ldt", (154, 0, 0, 0)),
        ("personality", (135, 0x40000)),
    ],
)
def test_no_memory_beside_the_limits_and_no_look_into_others(call, arguments):
    done = in_the_box(
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"print(libc.syscall(*{arguments!r}), ctypes.get_errno())"
    )
    assert done.stdout.split() == ["-1", str(errno.EPERM)], done


@guards.needs_box
def test_nothing_is_open_in_the_box_but_the_three_and_the_way_out():
    """By fcntl's command 1, which asks for a descriptor's flags."""
    body = "import time\nfcntl = sys.modules['posix'].fstat\ndef f(x):\n n = []\n"
    body += " for k in range(64):\n  try: fcntl(k); n.append(k)\n  except OSError: pass\n return len(n)"
    ((ok, count),) = run_limited("import sys\n" + body, "f", [(2,)])[0]
    assert ok and count <= 5  # standard input, output and error, the way out, /dev/null


# What stands in for a container's first process that waits for nobody: orphans become its children.
FIRST_PROCESS = """
import ctypes, pathlib, sys, threading
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
from questions.sandbox import run_limited
for source in ("def f(x):\\n return x + 1", "def f(x):\\n while True: pass",
               "import time\\ndef f(x):\\n time.sleep(60)",
               "def f(x):\\n return 'a' * 10**6", "import sys\\ndef f(x):\\n sys.modules['posix'].abort()"):
    run_limited(source, "f", [(1,)], execute=EXECUTE, wall_s=3.0, cpu_s=1)
left = [p for p in pathlib.Path("/proc/self/task").glob("*/children") if p.read_text().strip()]
print("left", [p.read_text() for p in left])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
@pytest.mark.parametrize("execute", guards.EACH)
def test_no_dead_process_is_left_to_a_first_process_that_waits_for_nobody(execute):
    """As `docker run IMAGE python run_all.py`: 12 answers an experiment would fill the table of processes."""
    script = FIRST_PROCESS.replace("EXECUTE", repr(execute))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=sandbox.__file__.rsplit("/", 2)[0]
    )
    assert done.stdout.strip() == "left []", done.stdout + done.stderr


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def until(asked, seconds=20.0):
    end = time.monotonic() + seconds
    while not (answer := asked()):
        assert time.monotonic() < end, asked
        time.sleep(0.02)
    return answer


SLEEPS = "import time\ndef f(x):\n time.sleep(60)"


@guards.needs_box
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_answer_does_not_outlive_the_harness(how):
    script = f"from questions.sandbox import run_limited\nrun_limited({SLEEPS!r}, 'f', [(1,)], wall_s=60.0)"
    root = sandbox.__file__.rsplit("/", 2)[0]
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stderr=subprocess.DEVNULL, preexec_fn=default_signals
    ) as harness:
        (outer,) = until(lambda: children(harness.pid))
        (inner,) = until(lambda: children(outer))
        harness.send_signal(how)
        harness.wait(20)
    until(lambda: not alive(outer) and not alive(inner))


@pytest.mark.parametrize("execute", guards.EACH)
def test_where_no_time_limit_can_be_kept_nothing_stays_running(execute, monkeypatch):
    def none_left(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", none_left)
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(RuntimeError):
        run_limited(SLEEPS, "f", [(1,)], execute=execute, wall_s=60.0)
    assert started[0].returncode is not None


# ---- where there is no bubblewrap --------------------------------------------------------------------------


def test_without_bubblewrap_nothing_is_run_and_the_way_on_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert run_limited("def f(x):\n return 1", "f", [(2,)]) == (None, "there is no bubblewrap to run it in")
    with pytest.raises(FrankenError) as caught:
        sandbox.check(True)
    said = str(caught.value)
    assert "apt install bubblewrap" in said and "--execute-code-unsandboxed" in said and "\n" not in said
    sandbox.check(False)
    sandbox.check(UNSANDBOXED)


def test_a_bubblewrap_that_may_not_make_namespaces_is_one_line(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    sandbox._bwrap.cache_clear()
    try:
        with pytest.raises(FrankenError, match="setting up uid map: Permission denied.*--execute-code-unsa"):
            sandbox.check(True)
        assert failed(run_limited("def f(x):\n return 1", "f", [(2,)]))
    finally:
        sandbox._bwrap.cache_clear()


@pytest.mark.skipif(os.getuid() != 0, reason="only root has rights to give up")
def test_root_that_cannot_give_up_its_rights_runs_nothing(tmp_path):
    """As in a container without capabilities: setuid is refused, and the code must not run as root."""
    ran = tmp_path / "ran"
    body = f"import sys\nsys.modules['posix'].mkfifo({str(ran)!r}, 0o666)\ndef f(x):\n return 1"
    script = (
        "from questions.sandbox import *\n"
        f"print(run_limited({body!r}, 'f', [(1,)], execute=UNSANDBOXED))\n"
        "try: check(UNSANDBOXED)\nexcept FrankenError as e: print(e)"
    )
    capless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--", sys.executable, "-c", script]
    done = subprocess.run(capless, capture_output=True, text=True, cwd=sandbox.__file__.rsplit("/", 2)[0])
    first, second = done.stdout.splitlines()
    assert first.startswith("(None, ") and not ran.exists()
    assert second.startswith("--execute-code-unsandboxed: code cannot be run here")
