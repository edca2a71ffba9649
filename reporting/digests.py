"""What a report keeps of each experiment. A result is read and checked once, and let go.

A result in memory takes some 0.4 MB, what is kept of it some 15 kB: its row, a few numbers for figures and
tables, and its part of the page as compressed HTML. So a report of a thousand experiments needs little more
memory than one of ten.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from markupsafe import Markup

from analysis.compare import baseline_of, row_of, together
from analysis.comparison import Comparison, Row
from analysis.phases import PhaseScore, scores_of
from analysis.rows import named
from errors import RecipeError
from experiments import BASELINE
from reporting import experiment_tables, pages, processes
from runner.results import Run
from runner.tables import key_of
from surgery.recipes import Recipe

# Suites whose measurements are read over several experiments. Few experiments of a run are asked these.
KEPT = ("injection", "injection_layers", "injection_generation", "localisation", "activations", "lm_eval")


@dataclass(frozen=True)
class Digest:
    """What is kept of one experiment. `row` has nothing yet of what other experiments decide."""

    row: Row
    recipe: dict
    recipe_key: str
    """Equal for equal recipes."""
    hypothesis: str
    performance: dict
    shifts: dict[tuple[str, str], float] | None
    """Mean shift of log-odds (nats) by (kind, keyed) of the Yes/No questions; None for the baseline."""
    categories: dict | None
    """Capability by category."""
    kept: dict[str, Any]
    """What the suites KEPT measured."""
    phases: list[PhaseScore]
    body: bytes
    """Its part of the page, compressed."""

    def markup(self) -> Markup:
        """Its part of the page."""
        return Markup(zlib.decompress(self.body).decode())


def group_shifts(before: dict, after: dict) -> dict[tuple[str, str], float]:
    """Mean shift of log-odds(Yes:No), nats, of each group of probes: {(kind, keyed): shift}."""
    shifts, old = defaultdict(list), {probe["id"]: probe["log_odds"] for probe in before["probes"]}
    for probe in after["probes"]:
        new, was = probe["log_odds"], old.get(probe["id"])
        if new is not None and was is not None:
            shifts[probe["kind"], probe["keyed"]].append(new - was)
    return {key: fmean(values) for key, values in shifts.items()}


def recipe_text(recipe: dict) -> str:
    try:
        return str(Recipe.from_json(recipe))
    except RecipeError:
        return str(recipe)


def digest_of(result: dict, baseline: dict | None, manifest: dict) -> Digest:
    """What is kept of a result; `baseline`: the unmodified model's measurements, None without any."""
    measured, experiment = result["measurements"], result["experiment"]
    seed = manifest["protocol"]["seed"]
    row = row_of(result, baseline, seed)
    before = baseline if baseline is not None and baseline is not measured else {}
    body = pages.part(
        "body.html.j2",
        r=result,
        e=experiment,
        m=measured,
        before=before,
        brief=not named([row]),
        matched=row.matched,
        layers=manifest["layers"],
        parts=experiment_tables,
        recipe_text=recipe_text,
    )
    return Digest(
        row=row,
        recipe=experiment["recipe"],
        recipe_key=key_of(experiment["recipe"]),
        hypothesis=experiment["hypothesis"],
        performance=result["performance"],
        shifts=(
            group_shifts(before["binary"], measured["binary"])
            if "binary" in before and "binary" in measured
            else None
        ),
        categories=measured["capability"]["by_category"] if "capability" in measured else None,
        kept={suite: measured[suite] for suite in KEPT if suite in measured},
        phases=scores_of(result, seed),
        # lone surrogates, which a model may write, are spelled out already
        body=zlib.compress(body.encode(), 1),
    )


def digests(run: Run, manifest: dict, meanwhile: Callable[[], object] = lambda: None) -> dict[str, Digest]:
    """What is kept of each experiment that has run, by name, in the manifest's order.

    meanwhile: called once, while other processes have begun with it. Raises FrankenError if a result is
    corrupt.
    """
    return {digest.row.name: digest for digest in _made(run, manifest, meanwhile)}


def _made(run: Run, manifest: dict, meanwhile: Callable[[], object]) -> Iterator[Digest]:
    whole = run.load(BASELINE) if BASELINE in manifest["experiments"] else None
    baseline = baseline_of(whole)

    def one(name: str) -> Digest | None:
        result = whole if name == BASELINE else run.load(name)
        return None if result is None else digest_of(result, baseline, manifest)

    parts = [partial(one, name) for name in manifest["experiments"]]
    yield from (digest for digest in processes.made(parts, meanwhile=meanwhile) if digest is not None)


def compared(run: Run, manifest: dict, made: dict[str, Digest]) -> Comparison:
    """The run's comparison, from what is kept of its experiments."""
    baseline = made.get(BASELINE)
    return together(
        [digest.row for digest in made.values()],
        {name: digest.recipe_key for name, digest in made.items()},
        [digest.kept["injection"] for digest in made.values() if "injection" in digest.kept],
        manifest,
        run.path.name,
        BASELINE if baseline is not None and baseline.row.status == "done" else None,
    )
