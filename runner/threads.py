"""How many threads compute, and how they wait for each other beside other work on the same processors.

libgomp, which torch's CPU builds bring, lets a thread that waits for the others of its team turn 300,000
times (milliseconds) before it sleeps. Where every thread has a processor that is the fastest way: to wake a
thread costs more than most products of a decode step. Beside other jobs the thread that is waited for may be
off its processor meanwhile, and a run spends its share turning. Once a process has more threads in teams than
it may use processors, libgomp turns only 100 times (GOMP_SPINCOUNT in its manual). So teams that do nothing
are held while this process's threads are kept waiting for processors, and let go where they are not. Neither
changes how sums are split, so no number depends on it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import torch

EVERY = 2.0  # seconds between looks
CROWDED = 0.1  # of the time by the clock, spent ready and without a processor, over all threads
IN_PARALLEL = 1 << 16  # numbers that torch adds up with a team; above its grain of 32,768
_watching: list[Watch] = []


def allowed_threads() -> int:
    """As many threads as this process may use: OMP_NUM_THREADS, else its affinity and its container's
    quota."""
    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
        return max(1, int(given))
    if not hasattr(os, "sched_getaffinity"):
        return torch.get_num_threads()
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return allowed


def set_threads(threads: int | None = None) -> None:
    """Use this many threads; None: as many as this process may, unless OMP_NUM_THREADS is set.

    Without a GPU, on Linux, how they wait follows the load from now on, unless GOMP_SPINCOUNT or
    OMP_WAIT_POLICY says how.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(min(allowed_threads(), torch.get_num_threads()))
    given = any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"))
    alone = torch.get_num_threads() < 2 or torch.cuda.is_available()
    if sys.platform == "linux" and not (given or alone or any(w.is_alive() for w in _watching)):
        _watching[:] = [Watch()]
        _watching[0].start()


def kept_waiting() -> float:
    """Seconds that this process's present threads have been ready to run without a processor, by the
    kernel's count (schedstat); 0 where it keeps none."""
    nanoseconds = 0
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that has ended
            nanoseconds += int(Path(f"/proc/self/task/{task}/schedstat").read_text().split()[1])
    return nanoseconds / 1e9


class Watch(threading.Thread):
    """Looks EVERY seconds at how long threads were kept waiting, and holds idle teams while it was long."""

    def __init__(self):
        super().__init__(name="watch of the load", daemon=True)
        self.held: threading.Event | None = None  # set, it lets the teams go

    def run(self) -> None:
        before, then = kept_waiting(), time.monotonic()
        while True:
            time.sleep(EVERY)
            waited, now = kept_waiting(), time.monotonic()
            self.look((waited - before) / (now - then))
            before, then = waited, now

    def look(self, share: float) -> None:
        """Hold teams or let them go, for this share of the time kept waiting."""
        if share > CROWDED and self.held is None:
            self.held = threading.Event()
            teams = len(os.sched_getaffinity(0)) // torch.get_num_threads() + 1
            for _ in range(teams):
                threading.Thread(target=_hold_a_team, args=(self.held,), daemon=True).start()
        elif share <= CROWDED and self.held is not None:
            self.held.set()
            self.held = None


def _hold_a_team(until: threading.Event) -> None:
    torch.zeros(IN_PARALLEL).add_(1)
    until.wait()
