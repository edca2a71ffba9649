"""How torch's threads wait: teams are held while processors are short; reading leaves none behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from files import ROOT
from runner.threads import kept_waiting

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torch's threads are libgomp's there")


# In a process of its own: beside other tests' threads, which end when they like, no count stands still.
COUNTS = """
import os, time, torch
from runner.threads import CROWDED, Watch

def tasks():
    return len(os.listdir("/proc/self/task"))  # by the kernel's count, libgomp's threads among them

def came_to(count):
    until = time.monotonic() + 30
    while tasks() != count and time.monotonic() < until:
        time.sleep(0.01)
    return tasks()

torch.set_num_threads(2)
torch.zeros(1 << 16).add_(1)  # this thread's own team
watch, alone, processors = Watch(), tasks(), len(os.sched_getaffinity(0))
teams = 0
while 2 * teams <= processors:
    teams += 1
watch.look(2 * CROWDED)
held = came_to(alone + 2 * teams)
watch.look(2 * CROWDED)  # no more of them
time.sleep(0.3)
print(held - alone, tasks() - alone, processors)
watch.look(0)
print(came_to(alone) - alone, watch.held)
"""


def test_more_threads_in_teams_than_processors_while_kept_waiting():
    """libgomp then turns 100 times instead of 300,000; its manual has it at GOMP_SPINCOUNT."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    held, crowd = done.stdout.splitlines()
    first, second, processors = map(int, held.split())
    assert first == second > processors
    assert crowd == "0 None"


def test_reading_on_a_cpu_leaves_no_thread_behind(tiny_pair):
    """Each would keep a team, and libgomp take the processors for crowded."""
    live = tiny_pair("llama").live()
    live.fingerprint()
    assert [t.name for t in threading.enumerate() if t.name.startswith("stream")] == []


def test_time_without_a_processor_is_counted():
    """Two threads that compute on one processor each wait for half of the time."""
    code = (
        "import os, threading, time\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from runner.threads import kept_waiting\n"
        "import hashlib\n"
        "block, until = bytes(1 << 24), time.monotonic() + 1.5\n"
        "def work():\n"
        "    while time.monotonic() < until: hashlib.sha256(block)\n"
        "before = kept_waiting()\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]\n"
        "[t.start() for t in threads]\n"
        "time.sleep(1.2)\n"
        "print(kept_waiting() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.6
    assert kept_waiting() >= 0


@pytest.mark.parametrize(
    "given", [{"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "passive"}, {"OMP_NUM_THREADS": "1"}]
)
def test_how_threads_wait_is_left_to_who_says_so(given):
    assert watched(**given) == "False"


def test_the_load_is_watched_where_several_threads_compute():
    assert watched(OMP_NUM_THREADS="2") == str(not torch.cuda.is_available())


def watched(**given: str) -> str:
    """Whether a process that begins so looks at the load."""
    without = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    code = "import threading; from runner.threads import *; set_threads(); set_threads()"
    code += "; print('watch of the load' in [t.name for t in threading.enumerate()])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=without | given,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()
