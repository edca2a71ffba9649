"""What the further injection suites show: effects with intervals, one for each condition of each task.

Every proportion has its Wilson interval over trials. Trials of one condition share concepts and sentences, so
they are less independent than an interval takes them to be; a control of the same condition (nothing added,
random directions, the share expected by chance) stands beside each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy import special

from analysis import detection
from analysis.stats import Json, plain, wilson_interval

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Effect(Json):
    """One number about one condition: a task, what was added where, and what came of it."""

    task: Literal["in words", "questions", "naming", "localisation", "comparison"]
    """Of the suites injection_generation, injection_layers (two) and localisation (two)."""
    measure: str
    """What `value` is."""
    kind: Literal["none", "concept", "random", "garbled"]
    """What was added: nothing, a concept's direction, a random one; garbled: the first message was."""
    condition: str
    """The framing, question or span of tokens, where a task has several."""
    depth: float | None
    """Of the layer, from 0 to 1; None: the middle third, or nothing was added."""
    strength: float
    """In the suite's unit."""
    n: int
    """Trials, or questions behind a score."""
    value: float | None
    """A share, a score in nats or bits; None where nothing was answered."""
    low: float | None
    """Lower end of the 95% interval."""
    high: float | None
    """Upper end."""
    chance: float | None
    """What guessing gives; None where the row of kind "none" says it."""


def effects(measured: Iterable[Mapping[str, Any]], seed: int = 0) -> tuple[Effect, ...]:
    """All effects in these results' measurements (each {suite: its measurements}), in order."""
    read: dict[str, Callable[[Cell], list[Effect]]] = {
        "injection_layers": lambda suite: question_effects(suite, seed) + naming_effects(suite),
        "injection_generation": word_effects,
        "localisation": lambda suite: localisation_effects(suite) + comparison_effects(suite),
    }
    return tuple(
        effect for one in measured for name, of in read.items() if name in one for effect in of(one[name])
    )


def _share(task, measure: str, cell: Cell, condition: str, hits: Sequence[bool], chance=None) -> Effect:
    interval = wilson_interval(int(sum(hits)), len(hits))
    return Effect(
        task=task,
        measure=measure,
        kind=cell["kind"],
        condition=condition,
        depth=cell.get("depth"),
        strength=cell["strength"],
        n=interval.n,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        chance=chance,
    )


def _grouped(cells: Iterable[Cell], *keys: str) -> list[list[Cell]]:
    """Cells that agree in these keys and in what was added where, in order of their first."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        where = tuple(cell["layers"] or ())
        groups.setdefault((*(cell[k] for k in keys), cell["kind"], where, cell["strength"]), []).append(cell)
    return list(groups.values())


# ---- in words


def word_effects(suite: Cell) -> list[Effect]:
    """Shares of replies that detect a thought, detect and name the right one, name a concept that was not
    injected, refuse and are incoherent. Refusals are counted apart, and stay in the denominator. Without an
    injection the right one is that whose random numbers the reply had."""
    out = []
    for cell in suite["cells"]:
        replies = cell["replies"]
        condition = ", ".join(filter(None, (cell["question"], cell["span"])))
        said = {
            "detects": [r["outcome"] == "detects" for r in replies],
            "detects and names it": [
                r["outcome"] == "detects" and r["thought"] in r["names"] for r in replies
            ],
            "names it": [r["thought"] in r["names"] for r in replies],
            "names another": [bool(set(r["names"]) - {r["thought"]}) for r in replies],
            "refuses": [r["outcome"] == "refuses" for r in replies],
            "incoherent": [r["outcome"] == "incoherent" for r in replies],
        }
        out += [_share("in words", measure, cell, condition, hits) for measure, hits in said.items()]
    return out


# ---- single layers


def question_effects(suite: Cell, seed: int = 0) -> list[Effect]:
    """The detection score of every condition against nothing added in the same framing, answers averaged over
    concepts, with the share of Yes among the questions that a noticing model answers so."""
    scores, shares = [], []
    still = {cell["framing"]: cell for cell in suite["cells"] if cell["kind"] == "none"}
    cells = [cell for cell in suite["cells"] if cell["kind"] != "garbled"]
    garbled = [[cell] for cell in suite["cells"] if cell["kind"] == "garbled"]
    for group in _grouped(cells, "framing") + garbled:
        head = group[0]
        framing, probes = head["framing"], [p for p in suite["probes"] if p["framing"] == head["framing"]]
        condition = f"{framing}, {head['name']}" if head["kind"] == "garbled" else framing
        yes = [k for k, p in enumerate(probes) if p["kind"] == "introspective" and p["keyed"] == "yes"]
        said = [bool(c["answered"][k]) and (c["log_odds"][k] or 0) > 0 for c in group for k in yes]
        shares.append(_share("questions", "says Yes", head, condition, said))
        if head["kind"] == "none":
            continue
        before, after = _mean_readings([still[framing]]), _mean_readings(group)
        probes = [
            detection.Probe(
                id=p["id"],
                kind=p["kind"],
                keyed=p["keyed"],
                baseline=before[k][0],
                modified=after[k][0],
                framing=framing,
                pair=p["question"],
                baseline_mass=before[k][1],
                modified_mass=after[k][1],
            )
            for k, p in enumerate(probes)
        ]
        score = detection.detection_score(probes, seed=seed)
        measured = replace(shares[-1], measure="detection score", n=len(probes))
        scores.append(replace(measured, value=score.score, low=score.low, high=score.high, chance=0.0))
    return scores + shares


def _mean_readings(cells: Sequence[Cell]) -> list[tuple[float | None, float | None]]:
    """(log-odds, mass) of each question, averaged over the cells that answer; None where fewer than half
    do."""
    out: list[tuple[float | None, float | None]] = []
    for k, _ in enumerate(cells[0]["log_odds"]):
        answered = [c for c in cells if c["answered"][k]]
        if not answered or 2 * len(answered) < len(cells):
            out.append((None, None))
            continue
        mean = [float(np.mean([c[what][k] for c in answered])) for what in ("log_odds", "mass")]
        out.append((mean[0], mean[1]))
    return out


def naming_effects(suite: Cell) -> list[Effect]:
    """Of concept injections: how often the concept is the name that gains most on what is answered in the
    same order with nothing added (so that frequent words and first places gain nothing), how often it is the
    likeliest name, and bits, each order's averaged."""
    out, concepts = [], list(suite["concepts"])
    prior = {c["framing"]: _numbers(c["naming"]) for c in suite["cells"] if c["kind"] == "none"}
    for group in _grouped([c for c in suite["cells"] if c["kind"] == "concept"], "framing"):
        head, right = group[0], [concepts.index(c["name"]) for c in group]
        named = np.array([_numbers(c["naming"]) for c in group])  # [cells, orders, concepts]
        for measure, read in (
            ("gains most", named - prior[head["framing"]]),
            ("likeliest", named),
        ):
            hits = [
                bool(np.isfinite(row).all() and int(row.argmax()) == k)
                for rows, k in zip(read, right, strict=True)
                for row in rows
            ]
            out.append(_share("naming", measure, head, head["framing"], hits, 1 / len(concepts)))
        bits = np.mean([_bits(named[:, order]) for order in range(named.shape[1])])
        effect = replace(out[-1], measure="bits", value=plain(bits), low=None, high=None, chance=0.0)
        out.append(replace(effect, n=len(group)))
    return out


def _numbers(values) -> np.ndarray:
    return np.array(values, dtype=float)  # None becomes NaN


def _bits(logprobs: np.ndarray) -> float:
    """suites/injection.py's mutual information: [concepts injected, names], normalized, in nats."""
    p = np.exp(logprobs)
    return float(special.rel_entr(p, p.mean(0)).sum(-1).mean() / np.log(2))


# ---- where, and which more strongly


def localisation_effects(suite: Cell) -> list[Effect]:
    """How often the sentence that was touched is the number that gains most on the answers with nothing
    added, and how often it is the likeliest number; chance is a tenth."""
    out = []
    prior = [_numbers(p["logprobs"]) for p in suite["priors"]]
    for group in _grouped(suite["cells"]):
        hits: dict[str, list[bool]] = {"gains most": [], "likeliest": []}
        for cell, (place, row) in itertools.chain.from_iterable(
            zip(itertools.repeat(c), enumerate(_numbers(c["logprobs"])), strict=False) for c in group
        ):
            for measure, read in (("gains most", row - prior[cell["order"]]), ("likeliest", row)):
                hits[measure].append(bool(np.isfinite(read).all() and int(read.argmax()) == place))
        out += [_share("localisation", m, group[0], "ten sentences", h, 0.1) for m, h in hits.items()]
    return out


def comparison_effects(suite: Cell) -> list[Effect]:
    """How often the answer moves to the right side when the stronger injection does, whatever the model leans
    to, and how often each answer is right as it stands; chance is a half. A question that is not answered is
    not right."""
    out = []
    for group in _grouped(suite["comparison"]["cells"]):
        moves, right = [], []
        for cell in group:
            for key, sign in (("stronger", 1), ("weaker", -1)):
                first, second = _numbers(cell[key]["log_odds"])
                known = cell[key]["answered"]
                moves.append(bool(known and sign * (first - second) > 0))
                right += [bool(known and sign * first > 0), bool(known and sign * second < 0)]
        for measure, hits in (("moves with it", moves), ("as it stands", right)):
            out.append(_share("comparison", measure, group[0], "two sentences", hits, 0.5))
    return out
