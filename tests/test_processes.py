"""Parts of a report made in several processes: in order, with their errors, ended with their parent."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from functools import partial

import made_results as made
import psutil
import pytest
import torch

from errors import FrankenError
from files import ROOT
from reporting import processes
from reporting.digests import digests
from surgery.recipes import splice
from surgery.streaming import Stream

MANY = 3 * processes.FEWEST


def test_parts_come_in_their_order_from_other_processes():
    def one(k):
        time.sleep(0.05 * (k == 0))
        return k, os.getpid()

    came = list(processes.made([partial(one, k) for k in range(MANY)], 2))
    assert [k for k, _ in came] == list(range(MANY))
    assert os.getpid() not in {pid for _, pid in came}


def test_few_parts_or_one_process_are_made_here():
    here = [os.getpid] * MANY
    few = here[: processes.FEWEST - 1]
    assert set(processes.made(here, 1)) == {os.getpid()} == set(processes.made(few, 2))


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_done_meanwhile_is_done_once_and_beside_the_parts(tmp_path, count):
    begun, done = tmp_path / "begun", []

    def meanwhile():
        done.append(os.getpid())
        deadline = time.monotonic() + 20
        while count > 1 and not begun.exists():  # what a part makes
            assert time.monotonic() < deadline
            time.sleep(0.01)

    came = list(processes.made([begun.touch] * MANY, count, meanwhile))
    assert len(came) == MANY and done == [os.getpid()]


def test_an_error_of_a_part_is_the_callers():
    def corrupt():
        raise FrankenError("x.json is corrupt")

    with pytest.raises(FrankenError, match="x.json is corrupt"):
        list(processes.made([int] * MANY + [corrupt], 2))


def test_a_killed_process_is_told_in_a_line():
    with pytest.raises(FrankenError, match="ended from outside"):
        list(processes.made([int] * MANY + [lambda: os.kill(os.getpid(), signal.SIGKILL)], 2))


def test_where_a_gpu_is_in_use_what_a_killed_process_did_not_make_is_made_here(monkeypatch):
    home = os.getpid()

    def one(k):
        if k == MANY - 2 and os.getpid() != home:
            os.kill(os.getpid(), signal.SIGKILL)  # the driver's library aborts in a fork
        return k

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert list(processes.made([partial(one, k) for k in range(MANY)], 2)) == list(range(MANY))


@pytest.mark.gpu
def test_forks_of_a_process_whose_threads_read_weights_to_a_gpu_are_not_ended(tiny_pair, monkeypatch):
    live = tiny_pair("llama").live()
    live.model.to(torch.device("cuda", 0))
    live.apply(splice(live.original, "base", 0, 1))
    monkeypatch.setattr(processes, "_on_gpu", lambda: False)  # nothing is made again here
    assert set(processes.made([os.getpid] * MANY, 2)) != {os.getpid()}


def test_what_threads_hold_on_a_gpu_is_held_by_the_stream_too(monkeypatch):
    """A fork drops the other threads' own variables; an event that nobody else holds would be ended there."""

    class Event:
        cuda_event = cuda_stream = 0

        def __init__(self, **_):
            made.append(weakref.ref(self))

        def record(self, stream):
            pass

    made: list = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Event())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", partial(_unpinned, torch.empty))
    stream = Stream(workers=1)
    monkeypatch.setattr(stream, "CHUNK", 8)

    def take():  # a buffer that is being filled
        stream._ring(torch.device("cuda", 0)).free.popleft()

    other = threading.Thread(target=take)
    other.start()
    other.join()  # its variables are gone now, as in a fork
    gc.collect()
    assert len(made) == 1 + 1 + stream.ON_THE_WAY and all(alive() is not None for alive in made)


def _unpinned(empty, *size, pin_memory=False, **how):
    return empty(*size, **how)


def test_a_process_collects_nothing_that_it_inherited():
    """What lives on a GPU cannot be ended in a fork: the driver's library aborts the process."""

    class OnTheCard:
        def __init__(self):
            self.itself, self.home = self, os.getpid()

        def __del__(self):
            if os.getpid() != self.home:
                os.abort()

    def collecting(k):
        return k + 0 * gc.collect()

    gc.disable()
    try:
        OnTheCard()  # garbage in a circle: only a collection ends it
        assert list(processes.made([partial(collecting, k) for k in range(MANY)], 2)) == list(range(MANY))
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_began_them(ending):
    code = (
        "import time; from reporting import processes\n"
        "print('begun', flush=True)\n"
        f"list(processes.made([lambda: time.sleep(0.2)] * {40 * MANY}, 2))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with parent:
        parent.stdout.readline()
        deadline = time.monotonic() + 20
        while len(children := psutil.Process(parent.pid).children()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        parent.send_signal(ending)
        assert parent.wait(20) != 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert len(children) == 2 and not alive


def test_pages_are_made_without_torch_or_scikit_learn():
    """Importing them takes longer than a report may."""
    code = (
        "import sys, report, reporting.html_report, reporting.inside, reporting.compare_runs\n"
        "print(sorted({'torch', 'transformers', 'sklearn'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_a_report_keeps_of_an_experiment_is_a_fraction_of_it(tmp_path):
    run, manifest = made.make(
        tmp_path / "run", [made.result(name, made.everything()) for name in ("baseline_instruct", "x")]
    )
    kept = digests(run, manifest)["x"]
    assert len(kept.body) < len(kept.markup()) / 4
    assert not {"binary", "informed", "capability", "trigger"} & kept.kept.keys()
