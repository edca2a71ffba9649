"""The evaluation's replies, spread over several loaded models by Ray.

This process owns the journal; a worker holds an engine, takes a chunk of the replies that are lacking and
returns their records. A lost worker's chunk goes to another one. Every reply has its own random stream, so
that who answers it makes no difference. `runner.workers` does the same for experiments.
"""

from __future__ import annotations

import argparse
from typing import Any

from tqdm import tqdm

from errors import FrankenError
from runner.crews import Crew, choose_crew, connected
from runner.known_pairs import PAIRS
from runner.replica import ModelOptions
from runner.threads import set_threads
from weird_gen.persona.asking import cases_for, header_of
from weird_gen.persona.journal import Journal, requests_for
from weird_gen.persona.loading import open_engine

CHUNK = 32  # replies that a worker is asked for at a time
MOST_LOSSES = 3  # workers lost one after the other, without a chunk in between


class Asker:
    """A loaded model in a process of its own."""

    def __init__(self, opening: dict, threads: int | None):
        self.opening, self.threads = opening, threads

    def load(self, quality: bool) -> dict | str:
        """What the journal's header says of the model; why it cannot be opened, as text."""
        set_threads(self.threads)
        try:
            self.engine, made_of = open_engine(**self.opening)
        except FrankenError as e:
            return str(e)
        return header_of(self.engine, made_of, quality)

    def ask(self, todo: list, model: str, args: argparse.Namespace) -> list[dict]:
        """The records of some replies."""
        set_threads(self.threads)
        cases = cases_for(self.engine, todo, model, args)
        replies = self.engine.complete(requests_for(self.engine, cases, args))
        return [case.answered(reply) for case, reply in zip(cases, replies, strict=True)]


def crew_for(workers: int | None, opening: dict) -> Crew | None:
    """The workers that --workers asks for; None: this process alone. Raises FrankenError if they cannot be
    had."""
    if workers is None:
        return None
    options = ModelOptions(
        pair=opening["model"],
        base=None,
        instruct=None,
        base_revision=None,
        instruct_revision=None,
        instruct_adapter=None,
        source=(),
        dtype="auto",
        device_map=opening["device"],
        resident=False,
        batch_size=None,
        deterministic=False,
        thinking="off",
    )
    if opening["model"] not in PAIRS:
        options = ModelOptions(**options.__dict__ | {"pair": None, "instruct": opening["model"]})
    return choose_crew(workers, options)


def spread(
    crew: Crew, opening: dict, todo: list, journal: Journal, model: str, args: argparse.Namespace
) -> None:
    """Ask for all that the journal lacks, adding every chunk to it as it comes. Raises FrankenError if the
    model cannot be opened, or where workers are lost one after the other."""
    chunks = [todo[k : k + CHUNK] for k in range(0, len(todo), CHUNK)][::-1]
    quality = journal.header is None and not args.no_quality
    done, losses = len(journal.entries), 0
    with (
        connected(crew) as ray,
        tqdm(total=done + len(todo), initial=done, desc=model, unit=" replies", disable=None) as bar,
    ):
        actor = ray.remote(num_cpus=0 if crew.cards else 1, num_gpus=crew.cards)(Asker)
        at_work: dict[Any, tuple[Any, list | None]] = {}

        def hire(quality: bool = False) -> None:
            made = actor.remote(opening, crew.threads)
            at_work[made.load.remote(quality)] = made, None

        for k in range(crew.workers):
            hire(quality and k == 0)
        waiting: list[Any] = []  # loaded before the header is written
        while at_work:
            (ref,), _ = ray.wait(list(at_work), num_returns=1)
            one, chunk = at_work.pop(ref)
            try:
                answer = ray.get(ref)
            except ray.exceptions.RayActorError as e:
                losses += 1
                if losses >= MOST_LOSSES:
                    raise FrankenError(f"{losses} workers were lost one after the other") from e
                if chunk is not None:
                    chunks.append(chunk)
                hire(quality and journal.header is None and chunk is None)
                continue
            if isinstance(answer, str):
                raise FrankenError(answer)
            if isinstance(answer, dict) and journal.header is None:
                if quality and answer["quality"] is None:
                    waiting.append(one)
                    continue
                journal.begin(answer)
            elif isinstance(answer, dict):
                journal.go_on(answer["made_of"])
            elif isinstance(answer, list):
                losses = 0
                journal.add(answer)
                journal.entries += answer
                bar.update(len(answer))
            for free in (one, *waiting):
                if chunks:
                    given = chunks.pop()
                    at_work[free.ask.remote(given, model, args)] = free, given
            waiting = []
