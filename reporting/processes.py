"""Independent parts of a report in several processes.

A report is made of parts that need nothing of each other: an experiment's numbers and replies, a figure. On
Linux they are shared out over forked processes, which find everything that is loaded as it is.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from errors import FrankenError

Made = TypeVar("Made")
FEWEST = 8  # parts for which it pays to start processes
MOST = 8  # processes
DIES_WITH_ITS_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)

_parts: Sequence[Callable] = ()


def processes() -> int:
    """How many to use: the processors that this process may run on."""
    return min(MOST, len(os.sched_getaffinity(0))) if sys.platform == "linux" else 1


def made(
    parts: Sequence[Callable[[], Made]],
    count: int | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[Made]:
    """What each part gives, in their order, from `count` processes (as many as there are processors).

    meanwhile: called here once, when the processes have begun: an import, for instance, that only what
    follows needs. Only what a part gives is sent between processes. An error of a part is raised when its
    turn comes; raises FrankenError if a process is ended from outside, by the system for want of memory for
    instance. Where a GPU is in use, whose library ends forks that touch it, what is missing then is made
    here.
    """
    count = min(processes() if count is None else count, len(parts))
    if count < 2 or len(parts) < FEWEST:
        meanwhile()
        yield from (part() for part in parts)
        return
    # A fork that collects what it inherited would end what lives on a GPU there, and abort: nothing is left
    # to collect, and what is there is never looked at again.
    if "torch" in sys.modules:
        gc.collect()
    gc.freeze()
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _begin, (parts,))
    done = 0
    try:
        # which starts all of them; a hundredth of many small parts is handed over at once
        results = pool.map(_make, range(len(parts)), chunksize=max(1, len(parts) // (100 * count)))
        meanwhile()
        for result in results:
            done += 1
            yield result
    except BrokenProcessPool as e:
        if _on_gpu():
            yield from (part() for part in parts[done:])
            return
        raise FrankenError("a process that made a part of the report was ended from outside") from e
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


def _on_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _begin(parts: Sequence[Callable]) -> None:
    """In each process: end with the one that began it, which alone is told of Ctrl-C."""
    global _parts
    _parts = parts
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(DIES_WITH_ITS_PARENT, signal.SIGKILL)


def _make(number: int):
    return _parts[number]()
