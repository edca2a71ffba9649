"""The limited process: what honest code gets, and what hostile code does not."""

import json
import os
import time

import pytest

from questions.grading import Code
from questions.sandbox import run_limited


def run(source, *calls, **limits):
    return run_limited(source, "f", list(calls) or [(2,)], **limits)


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
def test_honest_code_returns_its_values(source):
    assert run(source) == ([(True, 3)], "")


def test_calls_are_separate_and_in_order_and_one_error_leaves_the_others():
    values, why = run("def f(x):\n x.append(1)\n return [10 // x[0], len(x)]", ([5],), ([0],), ([2],))
    assert (values, why) == ([(True, [2, 2]), (False, None), (True, [5, 2])], "")


def test_an_infinite_loop_and_a_long_sleep_end():
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
def test_hostile_or_broken_code_returns_nothing(source):
    assert failed(run(source, cpu_s=1, memory_mb=160))


def test_the_memory_limit_is_the_one_given():
    source = "def f(x):\n return len(bytearray(10**8))"
    assert run(source) == ([(True, 10**8)], "")
    assert failed(run(source, memory_mb=100))


def test_nothing_is_written_and_the_directory_is_empty_and_gone(tmp_path):
    target = tmp_path / "written.txt"
    assert failed(run(f"def f(x):\n open({str(target)!r}, 'w').write('x')\n return 1"))
    assert failed(run(f"import os\ndef f(x):\n return os.open({str(target)!r}, os.O_CREAT | os.O_WRONLY)"))
    assert not target.exists()
    values, _ = run("import os\ndef f(x):\n return os.getcwd()")
    if values[0][0]:  # as "nobody" the child may not even be allowed to ask
        assert not os.path.exists(values[0][1])


def test_the_environment_is_not_there(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-parent")
    ((ok, environment),) = run("import os\ndef f(x):\n return dict(os.environ)")[0]
    assert ok and set(environment) <= {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"}


def test_a_printed_result_line_counts_for_nothing():
    line = json.dumps([[True, 99]])
    assert run(f"def f(x):\n print({line!r})\n return x + 1") == ([(True, 3)], "")
    assert failed(
        run(f"import os\nos.write(1, {line.encode()!r})\nos.write(4, {line.encode()!r})\nos._exit(0)")
    )


def test_a_forged_report_that_finds_the_nonce_still_does_not_know_the_outputs():
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
    assert not Code("f", 1, (((2,), 1234567),)).grade(forged + "\n return x\n", execute=True).correct


def test_an_object_that_claims_to_equal_everything_does_not_pass():
    source = (
        "class E(int):\n    def __eq__(self, other):\n        return True\n\ndef f(x):\n    return E(x)\n"
    )
    assert not Code("f", 1, (((2,), 7),)).grade(source, execute=True).correct
    assert not Code("f", 1, (((2,), True),)).grade("def f(x):\n    return x - 1", execute=True).correct
