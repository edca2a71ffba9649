"""What is to be done next, by priority, and what has to wait for it: the order of a run over many workers.

Nothing here runs anything. A job is an experiment, or one measurement of the unmodified model's perplexity
under noise, which the search for noise twins asks for. An experiment that may have a twin waits until the
unmodified model's perplexity is known, as in one process; a twin waits for its experiment and for the
measurements of its search; a measurement that several searches need is made once.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field

from errors import FrankenError
from experiments import BASELINE, TWIN, Plan
from runner.batch import Record
from runner.matched_noise import Tried, search, unmeasured, wants
from surgery.recipes import Recipe

MOST_LOSSES = 3  # workers that one job may lose before it is taken to be what kills them


@dataclass(frozen=True)
class Raised:
    """An exception of a worker, which may be of a type that only exists there."""

    type: str
    message: str

    def exception(self) -> Exception:
        """One of that name and message."""
        return type(self.type, (Exception,), {})(self.message)


@dataclass(frozen=True, order=True)
class Job:
    """`place`: of its experiment among the plans; 0 comes first. With `plan` it is an experiment, with
    `fraction` a measurement of perplexity under that much noise. `failed`: what a twin's search raised."""

    place: int
    plan: Plan | None = field(default=None, compare=False)
    fraction: float | None = field(default=None, compare=False)
    failed: Raised | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        if self.plan is not None:
            return self.plan.experiment.name
        return f"perplexity with noise {self.fraction:g}" if self.fraction else "perplexity of the original"


@dataclass
class _Search:
    """A twin whose noise is being searched for."""

    place: int
    twin: Plan
    steps: Generator[float, float | None, Tried]
    fraction: float  # what it asks for now


class Schedule:
    """The jobs of a run that are not done yet. `record` says what is done, and keeps what is done here."""

    def __init__(self, record: Record):
        self.record, self.twins = record, record.twins
        self._queue: list[Job] = []
        self._waiting: list[tuple[int, Plan]] = []  # for the unmodified model's perplexity
        self._asked: dict[float, list[_Search]] = {}  # searches that wait for a measurement, by fraction
        self._losses: Counter[str] = Counter()
        referred = self.twins is not None and 0.0 not in self.twins.known
        for place, plan in enumerate(record.plans):
            done = record.finished[plan.experiment.name] is not None
            if referred and wants(plan.experiment):
                self._waiting.append((place, plan))
            elif not done:
                self._push(Job(place, plan))
            else:
                self._begin_search(place, plan)
        if self._waiting and not any(job.name == BASELINE for job in self._queue):
            self._push(Job(-1, fraction=0.0))
        # a reference that others wait for comes before everything else
        if self._waiting:
            self._queue = [
                Job(-1, job.plan) if job.plan and job.name == BASELINE else job for job in self._queue
            ]
            heapq.heapify(self._queue)

    def next(self) -> Job | None:
        """The job of highest priority that nothing has to be waited for; None where there is none now."""
        return heapq.heappop(self._queue) if self._queue else None

    def coming(self, most: int) -> tuple[Recipe, ...]:
        """The recipes of the experiments that are next by priority, at most so many; whichever worker gets
        them."""
        queued = [(job, job.plan.recipe) for job in self._queue if job.plan is not None]
        return tuple(recipe for _, recipe in heapq.nsmallest(most, queued, key=lambda one: one[0]))

    def empty(self) -> bool:
        """Whether nothing is left but what is being done."""
        return not (self._queue or self._waiting or self._asked)

    def lost(self, job: Job) -> Job | None:
        """Put a job back whose worker was lost; returns it instead where that happened MOST_LOSSES times.

        Raises FrankenError where it is a measurement that others need.
        """
        self._losses[job.name] += 1
        if self._losses[job.name] < MOST_LOSSES:
            self._push(job)
            return None
        if job.plan is None:
            raise FrankenError(
                f"{MOST_LOSSES} workers were lost while they measured {job.name}; the run stops"
            )
        return job

    def measured(self, job: Job, answer: float | None | Raised) -> None:
        """What a measurement gave. Raises FrankenError if the unmodified model could not be measured."""
        assert self.twins is not None and job.fraction is not None
        if job.fraction == 0.0:
            if isinstance(answer, Raised):
                raise unmeasured(answer.exception())
            self.twins.known[0.0] = answer
            self._release()
            return
        searches = self._asked.pop(job.fraction)
        if isinstance(answer, Raised):  # recorded as the twin's failure, as in one process
            for one in searches:
                self._push(Job(one.place, one.twin, failed=answer))
            return
        self.twins.known[job.fraction] = answer
        for one in searches:
            self._ask(one)

    def kept(self, job: Job) -> None:
        """An experiment's result is written: begin what waited for it."""
        assert job.plan is not None
        if job.name == BASELINE and self._waiting:
            if self.twins is not None and 0.0 in self.twins.known:
                self._release()
            else:  # it failed, or was not asked for its perplexity
                self._push(Job(-1, fraction=0.0))
        if job.plan.matched is None:
            self._begin_search(job.place, job.plan)

    def _release(self) -> None:
        waiting, self._waiting = self._waiting, []
        for place, plan in waiting:
            if self.record.finished[plan.experiment.name] is None:
                self._push(Job(place, plan))
            else:
                self._begin_search(place, plan)

    def _begin_search(self, place: int, plan: Plan) -> None:
        name = plan.experiment.name
        if self.twins is None or not self.record.has_twin(plan) or self.record.finished.get(name + TWIN):
            return
        self.record.add_twin(name)
        original = self.record.finished[name]
        assert original is not None
        target = original["measurements"]["perplexity"]["perplexity"]
        steps = search(target, self.twins.unmodified())
        self._ask(_Search(place, self.twins.twin(plan, target), steps, next(steps)))

    def _ask(self, one: _Search) -> None:
        """Answer a search with what is known; ask for the next measurement, or for the twin where it ends."""
        assert self.twins is not None
        known = self.twins.known
        while one.fraction in known:
            try:
                one.fraction = one.steps.send(known[one.fraction])
            except StopIteration as end:
                self._push(Job(one.place, self.twins.found(one.twin, end.value)))
                return
        if one.fraction not in self._asked:
            self._push(Job(one.place, fraction=one.fraction))
        self._asked.setdefault(one.fraction, []).append(one)

    def _push(self, job: Job) -> None:
        heapq.heappush(self._queue, job)
