"""The batch: apply one plan after the other, measure each, go back, prove it, and write what came of it."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from itertools import islice

import torch
from tqdm import tqdm

import evaluate
from engine.forward import Timing
from errors import FrankenError, printable
from experiments import BASELINE, TWIN, Plan
from franken import Surgery
from runner.arrays import save_arrays
from runner.matched_noise import Matcher, Twins, wants
from runner.replica import Loaded, ModelOptions, Replica, Shape
from runner.results import SCHEMA, SCHEMA_VERSION, write_json
from runner.resuming import Change, marked
from runner.threads import set_threads
from surgery.recipes import Recipe


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
    weights = {
        "original": original,
        "modified": modified,
        "restored": restored,
        "exact": restored == original,
    }
    return _result(plan, weights, measurements, error, performance)


def _result(plan: Plan, weights: dict, measurements: dict, error: dict | None, performance: dict) -> dict:
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "failed" if error else "done",
        "experiment": plan.to_json(),
        "weights": weights,
        "measurements": measurements,
        "error": error,
        "performance": performance,
    }


AHEAD = 64  # so many of the experiments to come are looked at for layers that they begin with alike


def look_ahead(engine, recipes: Iterable[Recipe]) -> None:
    """Tell the engine what may run next, of which it looks at AHEAD."""
    # on a CPU, where memory is not short of the bytes: on a GPU it has not been measured
    few = AHEAD if engine.live.device.type == "cpu" else 0
    engine.coming = tuple(islice(recipes, few))


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


def outline(result: dict) -> dict:
    """Of a result that is on disk what the rest of the batch needs: a run of a thousand experiments keeps no
    replies in memory."""
    experiment = {key: result["experiment"].get(key) for key in ("recipe", "suites")}
    perplexity = result["measurements"].get("perplexity")
    measured = {} if perplexity is None else {"perplexity": {"perplexity": perplexity["perplexity"]}}
    return {"status": result["status"], "experiment": experiment, "measurements": measured}


def as_sources_arrive(plans: Sequence, live) -> Iterator:
    """The plans in order, but those that need a source which is not here yet after all others."""
    left = list(plans)
    while left:
        here = (plan for plan in left if not plan.recipe.sources & set(live.coming))
        plan = next(here, left[0])
        left.remove(plan)
        yield plan


class Record:
    """What a batch writes down: results in the run's folder, twins in its manifest, the progress bar.

    Args:
        plans: of all experiments but the noise twins.
        original: fingerprint of the unmodified model.
        twins: which experiments have a noise twin, None where none is asked for.
        changed: what is not as it was when the run began, written into every new result.

    `finished` has what is on disk (see `outline`) by name, None where an experiment has not run. Raises
    FrankenError if the run is packed, or a result on disk is corrupt or of another recipe.
    """

    def __init__(
        self,
        run,
        manifest: dict,
        plans: Sequence[Plan],
        original: str,
        twins: Twins | None = None,
        changed: Sequence[Change] = (),
    ):
        run.refuse_packed()  # which may have been done while the model was loaded
        self.run, self.manifest, self.plans, self.original = run, manifest, plans, original
        self.twins, self.changed = twins, changed
        self.on_kept: Callable[[dict], object] = lambda result: None  # told of every result that is on disk
        # all checked before anything runs
        self.finished: dict[str, dict | None] = {}
        for name in manifest["experiments"]:
            result = run.load(name)
            self.finished[name] = None if result is None else outline(result)
        for plan in plans:
            result = self.finished[plan.experiment.name]
            for what in ("recipe", "suites"):  # a user's file may have changed since
                if result and result["experiment"].get(what) != plan.to_json()[what]:
                    raise FrankenError(
                        f"{run.file(plan.experiment.name)} was made with"
                        f" {'another recipe' if what == 'recipe' else 'other suites'} of that name; start a"
                        " new run"
                    )
        if twins and (baseline := self.finished.get(BASELINE)):
            self._learn(baseline)
        self.bar = tqdm(
            total=len(self.finished),
            initial=sum(r is not None for r in self.finished.values()),
            unit="experiment",
            dynamic_ncols=True,
        )

    def has_twin(self, plan: Plan) -> bool:
        """Whether an experiment that is done has a noise twin, as far as is known."""
        result = self.finished[plan.experiment.name]
        if self.twins is None or not wants(plan.experiment) or not result or result["status"] != "done":
            return False
        return not self.twins.refusal(result)

    def add_twin(self, name: str) -> None:
        """Name the noise twin of experiment `name` in the manifest, as soon as it is known that there is
        one."""
        if name + TWIN not in self.manifest["experiments"]:
            place = self.manifest["experiments"].index(name) + 1
            self.manifest["experiments"].insert(place, name + TWIN)
            write_json(self.run.manifest_path, self.manifest)
            self.bar.total += 1
        self.finished.setdefault(name + TWIN, None)

    def keep(self, plan: Plan, result: dict) -> dict:
        """Write a result, say if it failed, and return its outline. Raises FrankenError if it cannot be
        written, or (once it is) if the weights were not back to the original afterwards."""
        kept = self._write(plan, result)
        if not result["weights"]["exact"]:
            raise FrankenError(
                f"after {plan.experiment.name} the weights are not back to the original (fingerprint"
                f" {result['weights']['restored']}, expected {self.original}); the run stops"
            )
        return kept

    def _write(self, plan: Plan, result: dict) -> dict:
        name = plan.experiment.name
        twins = self.twins if wants(plan.experiment) and result["status"] == "done" else None
        if twins is not None and (note := twins.refusal(result)):
            result["experiment"]["notes"].append(note)
        result = marked(result, self.changed)
        save_arrays(self.run.path / "experiments", result)
        self.run.save(result)
        self.on_kept(result)
        if result["error"]:
            first_line = (result["error"]["message"].splitlines() or [""])[0]
            said = f"{name} failed: {result['error']['type']}: {first_line}"
            tqdm.write(printable(said), file=sys.stderr)
        self.bar.update()
        self.finished[name] = kept = outline(result)
        if self.twins and name == BASELINE:
            self._learn(kept)
        return kept

    def keep_lost(self, plan: Plan, workers: int) -> None:
        """Write that an experiment failed because every worker that tried it was lost."""
        error = {
            "type": "WorkerLost",
            "message": f"{workers} workers were lost one after the other while they ran it",
        }
        weights = {"original": self.original, "modified": None, "restored": None, "exact": False}
        performance = dict.fromkeys(SCHEMA["properties"]["performance"]["required"], 0)
        performance |= {"decode_tokens_per_second": None, "peak_memory_bytes": None}
        self._write(plan, _result(plan, weights, {}, error, performance))

    def failed(self) -> int:
        """How many experiments failed, over the whole run."""
        return sum(bool(r) and r["status"] == "failed" for r in self.finished.values())

    def _learn(self, baseline: dict) -> None:
        if self.twins is not None and "perplexity" in baseline["measurements"]:
            self.twins.known[0.0] = baseline["measurements"]["perplexity"]["perplexity"]


class Alone:
    """The one process of a run that is not spread: it loads the pair, and does one experiment after the
    other. `runner.workers.Fleet` is its counterpart."""

    def __init__(self, options: ModelOptions, threads: int | None = None):
        self.options, self.threads = options, threads

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *exception) -> None:
        pass

    def open(self) -> Shape:
        """Load the pair. Raises FrankenError as `runner.pairs.open_pair` does."""
        set_threads(self.threads)
        self.replica = Replica(self.options)
        return self.replica.shape

    def prepare(self, protocol, moment: datetime) -> Loaded:
        """Make the engine. Raises FrankenError where these questions cannot be asked of this model."""
        self.protocol = protocol
        return self.replica.ready(protocol, moment)

    def twins(self, protocol, given, also) -> Twins:
        """The noise twins of a run, which are measured here."""
        return Matcher(self._engine(), protocol, given, also)

    def run(self, record: Record) -> int:
        """Everything that is not done yet; see `run_batch`."""
        return run_batch(record, self._engine(), self.protocol)

    def _engine(self):
        assert self.replica.engine is not None, "`prepare` comes first"
        return self.replica.engine


def run_batch(record: Record, engine, protocol) -> int:
    """Run what has not been run yet, in this process. Returns how many experiments failed, over the whole
    run.

    With a matched_noise.Matcher as the record's `twins`, every experiment that is no control is followed by
    its noise twin, whose name is added to the manifest as soon as it is known that there will be one. Raises
    FrankenError if going back was not exact or if results cannot be written.
    """
    matcher = record.twins if isinstance(record.twins, Matcher) else None

    def measure(plan, find=None) -> dict:
        name = plan.experiment.name
        record.bar.set_description(name)
        with inner_bar(engine, name) as progress:
            result = run_experiment(engine, plan, protocol, record.original, progress, find)
        return record.keep(plan, result)

    left = [plan for plan in record.plans if not record.finished[plan.experiment.name]]
    try:
        for plan in as_sources_arrive(record.plans, engine.live):
            name = plan.experiment.name
            left = [other for other in left if other is not plan]
            look_ahead(engine, (other.recipe for other in left))
            if matcher is not None and wants(plan.experiment) and not record.finished[name]:
                matcher.unmodified()  # before the experiment, so that none is lost if this fails
            result = record.finished[name] or measure(plan)
            if matcher is None or record.finished.get(name + TWIN) or not record.has_twin(plan):
                continue
            record.add_twin(name)
            twin = matcher.twin(plan, result["measurements"]["perplexity"]["perplexity"])
            measure(twin, matcher.find)
    finally:
        record.bar.close()
        engine.coming = ()
    return record.failed()
