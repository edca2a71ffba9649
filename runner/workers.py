"""A run spread over workers: Ray actors that each hold a loaded pair, and this process, which owns the run.

This process has the folder, its lock, the manifest, the order and all writing; it loads no weights. A worker
loads the pair, takes one job at a time (`runner.schedule`) and returns what came of it. What a lost worker
had in hand is given to another one. Ray spreads the workers: on this machine, or over those that RAY_ADDRESS
joins.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from tqdm import tqdm

from engine.generation import Engine
from errors import FrankenError, first_line, printable
from experiments import Plan
from runner.batch import AHEAD, Record, look_ahead, run_experiment
from runner.crews import Crew, connected
from runner.matched_noise import Twins, noised_perplexity
from runner.replica import Loaded, ModelOptions, Replica, Shape, differences
from runner.schedule import MOST_LOSSES, Job, Raised, Schedule
from runner.threads import set_threads
from suites.base import Protocol
from surgery.recipes import Recipe

STATUS = "status"  # the thread of a worker that answers while another one works
LOOK = 0.5  # seconds between two looks at what the workers do
NARROW = 100  # columns, where the terminal's width is not known


# ---- in a worker -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """Why a worker cannot take part."""

    message: str


@dataclass(frozen=True)
class Doing:
    """What a worker does now."""

    what: str
    done: int = 0
    total: int = 0
    read: int = 0  # tokens, of this job
    written: int = 0


def _built(model):
    raise AssertionError("a plan's recipe was made before it was sent")


def portable(plan: Plan) -> Plan:
    """The plan without its function, which has done its work and may come from a user's file."""
    return replace(plan, experiment=replace(plan.experiment, build=_built))


class Worker:
    """A replica in a process of its own. One job at a time; `status` is answered meanwhile."""

    def __init__(self, setup: Callable[[], None], options: ModelOptions, threads: int | None):
        self.setup, self.options, self.threads = setup, options, threads
        self.doing = Doing("loading")
        self.replica: Replica | None = None
        self.protocol: Protocol | None = None

    def load(self) -> Shape | Refused:
        """Load the pair."""
        try:
            set_threads(self.threads)
            self.setup()
            self.replica = Replica(self.options)
        except FrankenError as e:
            return Refused(str(e))
        return self.replica.shape

    def ready(self, protocol: Protocol, moment: datetime) -> Loaded | Refused:
        """What the run has to know before this worker may be asked."""
        if self.replica is None:
            return Refused("it is not loaded")
        self.protocol = protocol
        try:
            set_threads(self.threads)
            loaded = self.replica.ready(protocol, moment)
        except FrankenError as e:
            return Refused(str(e))
        self.doing = Doing("")
        return loaded

    def process(self) -> int:
        """The process's id, on its machine."""
        return os.getpid()

    def status(self) -> Doing:
        return self.doing

    def experiment(
        self, plan: Plan, original: str, failed: Raised | None, coming: tuple[Recipe, ...] = ()
    ) -> dict:
        """One experiment's result; where its noise could not be found (`failed`), that it failed. coming: the
        recipes that are next, of which this worker will run some."""

        def fail(plan, on_progress):
            assert failed is not None
            raise failed.exception()

        engine, protocol = self._engine()
        look_ahead(engine, coming)
        try:
            return run_experiment(
                engine, plan, protocol, original, self._progress, fail if failed is not None else None
            )
        finally:
            self.doing = Doing("")

    def perplexity(self, fraction: float) -> float | None | Raised:
        """One measurement of the unmodified model under noise, which stays in it."""
        engine, protocol = self._engine()
        self.doing = Doing("perplexity")
        try:
            return noised_perplexity(engine, protocol, fraction)
        except Exception as e:
            return Raised(type(e).__name__, str(e)[:2000])
        finally:
            self.doing = Doing("")

    def _engine(self) -> tuple[Engine, Protocol]:
        set_threads(self.threads)  # in the thread that works: some libraries count by thread
        assert self.replica is not None and self.replica.engine is not None and self.protocol is not None
        self.replica.engine.on_work = self._work
        return self.replica.engine, self.protocol

    def _progress(self, what: str, done: int, total: int) -> None:
        self.doing = replace(self.doing, what=what, done=done, total=total)

    def _work(self, read: int, written: int) -> None:
        now = self.doing
        self.doing = replace(now, read=now.read + read, written=now.written + written)


# ---- in the run's process ----------------------------------------------------------------------------------


class Hand:
    """A worker as the run's process knows it."""

    def __init__(self, number: int, actor):
        self.number, self.actor = number, actor
        self.state = "loading"  # then "idle", "working", "gone"
        self.has_loaded = False
        self.job: Job | None = None
        self.doing = Doing("loading")

    def shown(self, briefly: bool) -> str:
        """What it does, for the progress line."""
        if self.state != "working" or self.job is None:
            return f"{self.number} {self.state}"
        part = ""
        if not briefly and self.doing.what:
            part = f": {self.doing.what} {self.doing.done}/{self.doing.total}"
        return f"{self.number} {self.job.name}{part}"


class Fleet:
    """The workers of one run. Use as a context manager; `open`, then `prepare`, then `run`.

    setup: called in every worker before it loads; it registers the suites that stand above this room.
    """

    def __init__(self, crew: Crew, options: ModelOptions, setup: Callable[[], None]):
        self.crew, self.options, self.setup = crew, options, setup
        self.hands: list[Hand] = []
        self.pending: dict[Any, Hand] = {}  # who was asked something, by Ray's reference to the answer
        self.asked_status: dict[Any, Hand] = {}
        self.refusals: list[str] = []
        self.said = 0  # how many of them the user knows
        self.first: Loaded | None = None
        self.begun: tuple[Protocol, datetime] | None = None
        self.replacements = 2 * crew.workers  # for lost workers; what loses more than that is not chance

    def __enter__(self) -> Fleet:
        self._ray = contextlib.ExitStack()
        self.options.fetch()  # once, and not by all workers at the same time
        self.ray = self._ray.enter_context(connected(self.crew))
        self._ray.callback(self._dismiss)
        resources = {"num_cpus": 0 if self.crew.cards else 1, "num_gpus": self.crew.cards}
        self.actor = self.ray.remote(concurrency_groups={STATUS: 1}, **resources)(Worker)
        for _ in range(self.crew.workers):
            self._hire()
        return self

    def __exit__(self, *exception) -> None:
        self._ray.close()

    def open(self) -> Shape:
        """What the first worker that is loaded says of the model. Raises FrankenError if none can be
        loaded."""
        while True:
            for hand, value in self._answers():
                if isinstance(value, Shape):
                    hand.has_loaded = True
                    return value
                self._missing(hand, value)

    def prepare(self, protocol: Protocol, moment: datetime) -> Loaded:
        """What the first worker says that is ready. All others have to say the same."""
        self.begun = protocol, moment
        for hand in self.hands:
            if hand.has_loaded:
                self._ask(hand, "ready")
        while self.first is None:
            for hand, value in self._answers():
                self._arrived(hand, value)
        self._say_refusals()
        return self.first

    def wait_for_all(self) -> None:
        """Until no worker is loading any more."""
        while any(hand.state == "loading" for hand in self.hands):
            for hand, value in self._answers():
                self._arrived(hand, value)

    def run(self, record: Record) -> int:
        """Everything that is not done yet. Returns how many experiments failed, over the whole run.

        Raises FrankenError as `runner.batch.run_batch` does, and where no worker is left.
        """
        schedule = Schedule(record)
        record.bar.bar_format = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}"
        try:
            while True:
                busy = self._assign(schedule, record.original)
                if not busy and schedule.empty():
                    return record.failed()
                for hand, value in self._answers(LOOK):
                    self._received(hand, value, schedule, record)
                self._look()
                self._show(record.bar)
        finally:
            record.bar.close()

    # ---- what comes back ---------------------------------------------------------------------------------

    def _received(self, hand: Hand, value, schedule: Schedule, record: Record) -> None:
        job, hand.job = hand.job, None
        if isinstance(value, _Lost):
            if job is not None and (hopeless := schedule.lost(job)) is not None:
                assert hopeless.plan is not None
                record.keep_lost(hopeless.plan, MOST_LOSSES)
                schedule.kept(hopeless)
            elif job is not None:
                said = f"worker {hand.number} was lost ({value.reason}); {job.name} is run again"
                tqdm.write(printable(said), file=sys.stderr)
            self._missing(hand, value)
        elif job is None:
            self._arrived(hand, value)
        else:
            hand.state = "idle"
            if job.plan is None:
                schedule.measured(job, value)
            else:
                record.keep(job.plan, value)
                schedule.kept(job)

    def _arrived(self, hand: Hand, value) -> None:
        """A worker that is loaded or ready, or cannot be."""
        if isinstance(value, Shape):
            hand.has_loaded = True
            if self.begun:
                self._ask(hand, "ready")
            return None
        if not isinstance(value, Loaded):
            return self._missing(hand, value)
        if self.first is None:
            self.first = value
        elif others := differences(self.first, value):
            reason = f"it has other {'; '.join(map(str, others))}"
            return self._missing(hand, Refused(reason))
        hand.state = "idle"
        return None

    def _missing(self, hand: Hand, value) -> None:
        """A worker that does not take part, or no more. Raises FrankenError if none is left."""
        loading, hand.state = hand.state == "loading", "gone"
        with contextlib.suppress(Exception):
            self.ray.kill(hand.actor)
        self.pending = {ref: of for ref, of in self.pending.items() if of is not hand}
        lost = isinstance(value, _Lost)
        reason = f"worker {hand.number} was lost ({value.reason})" if lost else value.message
        if loading:
            self.refusals.append(reason)
        if not loading and self.replacements > 0:
            self.replacements -= 1
            self._hire(hand.number)
        left = [other for other in self.hands if other.state != "gone"]
        if not left:
            raise FrankenError(self.refusals[0] if self.first is None else f"no worker is left: {reason}")
        if loading and self.first is not None:
            self._say_refusals()

    def _say_refusals(self) -> None:
        for reason in self.refusals[self.said :]:
            tqdm.write(printable(f"note: a worker takes no part: {reason}"), file=sys.stderr)
        self.said = len(self.refusals)

    def _answers(self, seconds: float | None = None) -> Iterator[tuple[Hand, Any]]:
        """Whatever was asked and is answered by now, waiting for the first at most so long."""
        if not self.pending:
            return
        ready, _ = self.ray.wait(list(self.pending), num_returns=1, timeout=seconds)
        if ready:  # all that are
            ready, _ = self.ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0)
        for ref in ready:
            if ref not in self.pending:  # its worker was found missing meanwhile
                continue
            hand = self.pending.pop(ref)
            try:
                yield hand, self.ray.get(ref)
            except self.ray.exceptions.RayTaskError as e:
                cause = e.cause if isinstance(e.cause, Exception) else e
                raise FrankenError(
                    f"worker {hand.number} failed: {type(cause).__name__}: {first_line(cause)}"
                ) from e
            except self.ray.exceptions.RayError as e:
                yield hand, _Lost(_why(e))

    def twins(self, protocol: Protocol, given, also) -> Twins:
        """The noise twins of a run, which this process only plans."""
        assert self.first is not None
        return Twins(self.first.layers, protocol, given, also)

    # ---- what is asked ------------------------------------------------------------------------------------

    def _hire(self, number: int | None = None) -> None:
        actor = self.actor.remote(self.setup, self.options, self.crew.threads)
        hand = Hand(number or len(self.hands) + 1, actor)
        self.hands = [other for other in self.hands if other.number != hand.number] + [hand]
        self.hands.sort(key=lambda other: other.number)
        self._ask(hand, "load")

    def _ask(self, hand: Hand, what: str, *given) -> None:
        if what == "ready":
            assert self.begun is not None
            given = self.begun
        self.pending[getattr(hand.actor, what).remote(*given)] = hand

    def _assign(self, schedule: Schedule, original: str) -> bool:
        """Give work to whoever is idle; whether anybody works."""
        for hand in self.hands:
            if hand.state != "idle" or (job := schedule.next()) is None:
                continue
            hand.state, hand.job, hand.doing = "working", job, Doing("")
            if job.plan is not None:
                coming = schedule.coming(AHEAD)
                self._ask(hand, "experiment", portable(job.plan), original, job.failed, coming)
            else:
                self._ask(hand, "perplexity", job.fraction)
        return any(hand.state == "working" for hand in self.hands)

    # ---- what is shown ------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Ask every worker at work what it does, without waiting for the answer: one may be slow."""
        ready, _ = (
            self.ray.wait(list(self.asked_status), num_returns=len(self.asked_status), timeout=0)
            if self.asked_status
            else ([], [])
        )
        for ref in ready:
            hand = self.asked_status.pop(ref)
            with contextlib.suppress(self.ray.exceptions.RayError):
                hand.doing = self.ray.get(ref)
        waiting = {id(hand) for hand in self.asked_status.values()}
        for hand in self.hands:
            if hand.state == "working" and id(hand) not in waiting:
                self.asked_status[hand.actor.status.options(concurrency_group=STATUS).remote()] = hand

    def _show(self, bar) -> None:
        width = shutil.get_terminal_size((NARROW, 24)).columns - 30
        for briefly in (False, True):
            line = " | ".join(hand.shown(briefly) for hand in self.hands)
            if len(line) <= width:
                break
        else:  # too many to name
            states = Counter(hand.state for hand in self.hands)
            counted = ", ".join(f"{n} {state}" for state, n in states.items())
            line = f"{counted}: {line}"
        bar.set_description_str(printable(line))

    def _dismiss(self) -> None:
        for hand in self.hands:
            with contextlib.suppress(Exception):
                self.ray.kill(hand.actor)


@dataclass(frozen=True)
class _Lost:
    """The answer of a worker that is no more."""

    reason: str


def _why(e: Exception) -> str:
    """What became of a worker, in a few words: Ray's own are a page long."""
    return {"NodeDiedError": "its machine is gone", "OutOfMemoryError": "no memory was left"}.get(
        type(e).__name__, "its process ended"
    )
