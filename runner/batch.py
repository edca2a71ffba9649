"""The batch: apply one plan after the other, measure each, go back, prove it, and write what came of it."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
from engine.generation import Timing
from errors import FrankenError, printable
from experiments import BASELINE, TWIN
from franken import Surgery
from runner.arrays import save_arrays
from runner.matched_noise import wants
from runner.results import SCHEMA_VERSION, write_json
from runner.resuming import marked


def set_threads() -> None:
    """As many threads as this process may use: its affinity and its container's quota, unless OMP_NUM_THREADS
    is set."""
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    torch.set_num_threads(min(allowed, torch.get_num_threads()))


def peak_memory() -> int:
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return max(torch.cuda.max_memory_allocated(k) for k in range(torch.cuda.device_count()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_experiment(engine, plan, protocol, original: str, on_progress=None, find=None) -> dict:
    """Apply one plan, measure, go back, prove it. Whatever goes wrong inside is part of the result, not
    raised.

    `find(plan, on_progress)`, if given, measures first what the plan's recipe is to be, and returns the whole
    plan.
    """
    # 1. apply and measure
    live, begin = engine.live, time.perf_counter()
    engine.timing, surgery, undo = Timing(), Surgery(), Surgery()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    measurements, error, modified, restored, phases = {}, None, None, None, {}
    try:
        plan = find(plan, on_progress) if find else plan
        surgery = live.apply(plan.recipe)
        modified = live.fingerprint()
        measurements, phases = evaluate.evaluate(
            engine, replace(protocol, suites=plan.experiment.suites or protocol.suites), on_progress
        )
    except Exception as e:
        error = {
            "type": type(e).__name__,
            "message": str(e)[:2000],
            "traceback": "".join(traceback.format_exception(e)[-3:])[-4000:],
        }
        measurements = {}
    # 2. go back
    try:
        undo = live.apply(live.original)
        restored = live.fingerprint()
    except Exception as e:
        error = error or {"type": type(e).__name__, "message": f"going back failed: {e}"[:2000]}
    # 3. what came of it, and what it cost
    timing = asdict(engine.timing)
    rate = timing["decode_tokens"] / timing["decode_seconds"] if timing["decode_seconds"] else None
    performance = {
        "seconds": time.perf_counter() - begin,
        "surgery_seconds": surgery.seconds,
        "restore_seconds": undo.seconds,
        "bytes_moved": surgery.bytes_moved,
        "bytes_streamed": surgery.bytes_streamed,
        "bytes_computed": surgery.bytes_computed,
        "prefill_seconds": timing["prefill_seconds"],
        "prefill_tokens": timing["prefill_tokens"],
        "decode_seconds": timing["decode_seconds"],
        "decode_tokens": timing["decode_tokens"],
        "decode_tokens_per_second": rate,
        "peak_memory_bytes": peak_memory(),
        "out_of_memory": timing["out_of_memory"],
        "suites": phases,
        "max_batch": engine.max_batch,
        "graph_captures": timing["captures"],
        "capture_seconds": timing["capture_seconds"],
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "failed" if error else "done",
        "experiment": plan.to_json(),
        "weights": {
            "original": original,
            "modified": modified,
            "restored": restored,
            "exact": restored == original,
        },
        "measurements": measurements,
        "error": error,
        "performance": performance,
    }


# no rate and no time left: the suites of one experiment differ in length by a factor of a thousand
INNER = "{desc}: {n_fmt} of {total_fmt} done [{elapsed}{postfix}]"


@contextlib.contextmanager
def inner_bar(engine, name: str) -> Iterator[Callable[[str, int, int], None]]:
    """The second line of progress: what of experiment `name` runs now, and how many tokens it has read and
    written, which moves within a long suite too. Yields what evaluate.evaluate takes as on_progress."""
    with tqdm(total=1, leave=False, position=1, dynamic_ncols=True, mininterval=0.5, bar_format=INNER) as bar:
        tokens, shown = [0, 0], 0.0

        def progress(what: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description_str(f"  {name}: {what}")

        def work(read: int, written: int) -> None:
            nonlocal shown
            tokens[0] += read
            tokens[1] += written
            bar.set_postfix_str(f"{tokens[0]:,} tokens read, {tokens[1]:,} written", refresh=False)
            if time.monotonic() - shown > bar.mininterval:
                shown = time.monotonic()
                bar.refresh()

        engine.on_work = work
        try:
            yield progress
        finally:
            engine.on_work = lambda read, written: None


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, a batch system's SIGTERM and a dropped connection's SIGHUP raise KeyboardInterrupt, as Ctrl-C
    does."""

    def stop(signum, frame):
        raise KeyboardInterrupt

    def hang_up(signum, frame):
        for stream in (1, 2):  # the terminal is gone: writing there would fail
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        raise KeyboardInterrupt

    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup asks for
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def outline(result: dict) -> dict:
    """Of a result that is on disk what the rest of the batch needs: a run of a thousand experiments keeps no
    replies in memory."""
    experiment = {key: result["experiment"].get(key) for key in ("recipe", "suites")}
    perplexity = result["measurements"].get("perplexity")
    measured = {} if perplexity is None else {"perplexity": {"perplexity": perplexity["perplexity"]}}
    return {"status": result["status"], "experiment": experiment, "measurements": measured}


def run_batch(
    run, manifest: dict, engine, plans: list, protocol, original: str, matcher=None, changed: Sequence = ()
) -> int:
    """Run what has not been run yet. Returns how many experiments failed, over the whole run.

    With a matched_noise.Matcher, every experiment that is no control is followed by its noise twin, whose
    name is added to the manifest as soon as it is known that there will be one. Raises FrankenError if the
    run is packed, a result on disk is corrupt or of another recipe, if going back was not exact or if results
    cannot be written. `changed`, what is not as it was when the run began (runner.resuming.Change), is
    written into every new result.
    """
    # 1. what has been run already, and whether it is what is asked now
    run.refuse_packed()  # which may have been done while the model was loaded
    # all checked before anything runs
    finished = {name: (r := run.load(name)) and outline(r) for name in manifest["experiments"]}
    for plan in plans:
        result = finished[plan.experiment.name]
        for what in ("recipe", "suites"):  # a user's file may have changed since
            if result and result["experiment"].get(what) != plan.to_json()[what]:
                raise FrankenError(
                    f"{run.file(plan.experiment.name)} was made with"
                    f" {'another recipe' if what == 'recipe' else 'other suites'} of that name; start a"
                    " new run"
                )
    # 2. one experiment: measured, written, and the weights proved to be back
    bar = tqdm(
        total=len(finished),
        initial=sum(r is not None for r in finished.values()),
        unit="experiment",
        dynamic_ncols=True,
    )

    def measure(plan, find=None) -> dict:
        name = plan.experiment.name
        bar.set_description(name)
        with inner_bar(engine, name) as progress:
            result = run_experiment(engine, plan, protocol, original, progress, find)
        if (
            matcher
            and wants(plan.experiment)
            and result["status"] == "done"
            and (note := matcher.refusal(result))
        ):
            result["experiment"]["notes"].append(note)
        result = marked(result, changed)
        save_arrays(run.path / "experiments", result)
        run.save(result)
        if result["error"]:
            first_line = (result["error"]["message"].splitlines() or [""])[0]
            said = f"{name} failed: {result['error']['type']}: {first_line}"
            tqdm.write(printable(said), file=sys.stderr)
        if not result["weights"]["exact"]:
            raise FrankenError(
                f"after {name} the weights are not back to the original (fingerprint"
                f" {result['weights']['restored']}, expected {original}); the run stops"
            )
        bar.update()
        return result

    # 3. all of them, each with its noise twin
    try:
        for plan in plans:
            name = plan.experiment.name
            matching = matcher if matcher is not None and wants(plan.experiment) else None
            if matching and not finished[name]:
                matching.unmodified()  # before the experiment, so that none is lost if this fails
            result = finished[name] = finished[name] or outline(measure(plan))
            if matcher and name == BASELINE and "perplexity" in result["measurements"]:
                matcher.known[0.0] = result["measurements"]["perplexity"]["perplexity"]
            if (
                matching is None
                or result["status"] != "done"
                or finished.get(name + TWIN)
                or matching.refusal(result)
            ):
                continue
            if name + TWIN not in manifest["experiments"]:
                manifest["experiments"].insert(manifest["experiments"].index(name) + 1, name + TWIN)
                write_json(run.manifest_path, manifest)
                bar.total += 1
            twin = matching.twin(plan, result["measurements"]["perplexity"]["perplexity"])
            finished[name + TWIN] = outline(measure(twin, matching.find))
    finally:
        bar.close()
    return sum(r["status"] == "failed" for r in finished.values())
