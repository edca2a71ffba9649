"""Rows and comparisons made up for tests, of the real types with numbers chosen by hand: no score is computed
here."""

from __future__ import annotations

import math
from dataclasses import replace

from made_results import FORMATS

from analysis.comparison import (
    Capability,
    Comparison,
    DetectionScore,
    Drift,
    FormatScore,
    Injection,
    InjectionRow,
    Perplexity,
    PlaceboBand,
    PublishedProbe,
    Row,
    Score,
    Sweep,
    Verdict,
)
from analysis.stats import Discrimination

CALLS = {
    "reports it": "reports it",
    "answers drift towards Yes": "does not report it",
    "broken": "broken",
    "does not report it": "does not report it",
    "no change to report": "does not report it",
    "answers drift towards No": "does not report it",
    "denies it": "denies it",
    "too little data": "too little data",
}


def found_score(
    score: float | None, half: float = 0.12, call: str = "does not report it", **changes
) -> Score:
    """A detection score in its place among the controls; `half`: half the width of its interval, nats."""
    placed = {
        "p_placebo": 0.04 if score is not None else None,
        "beyond_placebo": bool(score) and abs(score) > 0.1,
    }
    return Score(**_scored(score, half, call) | placed | changes)


def own_score(score: float | None, half: float = 0.12, call: str = "does not report it") -> DetectionScore:
    """A detection score that stands by itself."""
    return DetectionScore(**_scored(score, half, call))


def _scored(score: float | None, half: float, call: str) -> dict:
    known = score is not None
    numbers = (
        "raw_contrast",
        "control_contrast",
        "drift",
        "flattening",
        "keyed_before",
        "keyed_after",
        "p_value",
        "p_adjusted",
    )
    return {
        "call": call,
        "reason": "made up",
        "score": score,
        "low": score - half if known else None,
        "high": score + half if known else None,
        **dict.fromkeys(numbers, 0.04 if known else None),
        "controls_before": Discrimination(0.8, 0.7, 0.9, 0.75, 0.65, 0.85, 1.2, 0.8, 1.6, 24),
        "control_accuracy_before": 0.9,
        "control_accuracy_after": 0.8,
        "overlap": 1.0,
        "n_introspective": 64,
        "n_controls": 80,
    }


def row(
    name: str,
    word: str | None = "does not report it",
    score: float | None = 0.0,
    p: float | None = 0.3,
    ppl: float | None = 20.0,
    **changes,
) -> Row:
    """One experiment's row; `word`: its verdict's; `score`: nats; `p`: P(Yes); `ppl`: perplexity."""
    mass = None if p is None else 0.002 if word == "broken" else 0.6
    right = 0 if word == "broken" else 5
    made = Row(
        name=name,
        group="made",
        change=f"[0] <- {name}",
        seconds=12.0,
        suites=("informed", "blind", "binary", "capability", "perplexity", "chat"),
        published_probe=PublishedProbe(
            p_yes_normalized=p,
            mass=mass,
            log_odds=None if p is None else math.log(p / (1 - p)),
            entropy=2.0,
            answered=bool(mass and mass >= 0.01),
            shift=None if p is None else math.log(p / (1 - p)) - math.log(0.3 / 0.7),
        ),
        detection=None if word is None else found_score(score, call=CALLS[word]),
        capability=Capability(right, 10, right / 10 * 0.6, min(1.0, right / 10 + 0.3)),
        perplexity=Perplexity(ppl, ppl and math.log(ppl), 600),
        verdict=Verdict(word, f"made up to be: {word}") if word else None,
        yes_drift=Drift(0.2, 0.1, 0.3, 0.01, 0.05) if word else None,
    )
    return replace(made, **changes)


def quick(name: str, *args, **changes) -> Row:
    """A row of the quick protocol: probes and perplexity."""
    return row(name, *args, **{"capability": None, "suites": ("binary", "perplexity")} | changes)


def swept(
    kind: str,
    start: int | None,
    stop: int | None,
    word: str,
    score: float | None,
    p: float,
    ppl: float,
    dose: float | None = None,
) -> Row:
    source = "base" if kind in ("window", "replace", "blend") else None
    name = f"{kind}_{dose:g}" if dose is not None else f"{kind}_{source or 'x'}_{start}_{stop}"
    size = None if dose is not None else 1
    if kind == "window":
        size = stop - start
    return quick(
        name,
        word,
        score,
        p,
        ppl,
        sweep=Sweep(kind, source, size, start, stop, dose),
    )


def by_format(score: float = 0.1, call: str = "does not report it") -> dict[str, FormatScore]:
    """A row's `formats`."""
    return {
        f: FormatScore(score + 0.1 * k, 0.1 * k, call, score, score - 0.3, score + 0.3, answered=0.9)
        for k, f in enumerate(FORMATS)
    }


def injection_summary(strengths: tuple[float, ...] = (0.05, 0.15, 0.5), seen: bool = True) -> Injection:
    """A comparison's `injection`."""
    rows = tuple(
        InjectionRow(
            framing=f,
            strength=s,
            sensitivity=min(0.95, 0.02 + gain * s),
            p_yes=min(0.95, 0.05 + gain * s),
            false_positive_rate=0.02,
            detection=own_score(gain * 5 * s, 0.3, "reports it" if gain * s > 0.2 else "does not report it"),
            bits=min(3.0, gain * 2 * s),
        )
        for f, gain in (("plain", 0.16), ("informed", 0.96))
        for s in strengths
    )
    return Injection(
        rows, seen, "at strength 0.5 with the explanation, 50% of injections are reported, 2% without one"
    )


def comparison(rows: list[Row], **changes) -> Comparison:
    """A run of these rows, with the placebos' band taken from them."""
    scores = {
        r.name: r.detection.score
        for r in rows
        if r.control == "placebo" and r.detection and r.detection.score is not None
    }
    made = Comparison(
        run="run_x",
        baseline="baseline_instruct" if any(r.name == "baseline_instruct" for r in rows) else None,
        correction="Holm",
        experiments=tuple(rows),
        placebo=PlaceboBand(len(scores), scores, min(scores.values()), max(scores.values()))
        if scores
        else None,
    )
    return replace(made, **changes)
