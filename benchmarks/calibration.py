#!/usr/bin/env python3
"""How often the detection score calls what is not there, and how large an effect it finds: simulated runs, no
model.

`python benchmarks/calibration.py --output results/reference/calibration.md` (about 3 minutes on two cores). A
simulated experiment has the binary probes' own questions, keys and framings. The change moves each answer by
a function of its baseline and by noise; an effect moves the introspective answers toward their keys.
Baselines, noise and changes' own spread share parts of their variance between the readings of one question,
as the reference run of the laptop- size pair has it.
"""

from __future__ import annotations

import argparse
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.detection import MIN_EFFECT, Probe, detection_score, yes_drift
from analysis.stats import wilson_interval
from analysis.verdicts import ALPHA, MIN_FLATTENING
from prompts import BINARY_PROBES
from runner.results import write_text

# kind, key, framing, question
ASKED = [(p.kind, p.if_changed, p.framing, p.question) for p in BINARY_PROBES]
SIGN = np.array([1.0 if keyed == "yes" else -1.0 for _, keyed, _, _ in ASKED])
ITSELF = np.array([kind == "introspective" for kind, *_ in ASKED])
# Parts of the variance shared by all readings of a question, both framings of a wording, both wordings in a
# framing, none.
SHARED = (
    (0.3, [(q,) for *_, q in ASKED]),
    (0.15, [(q, k) for _, k, _, q in ASKED]),
    (0.2, [(q, f) for *_, f, q in ASKED]),
    (0.35, list(enumerate(ASKED))),
)
# Log-odds in nats: of "nothing is changed" and of what is right, then toward Yes in questions about itself
# and others; spread.
BASELINES = {
    "firm": (4.0, 4.0, 0.0, 0.0, 1.5),
    "No to all about itself": (0.0, 4.0, -4.0, 0.0, 1.5),
    "undecided": (0.0, 0.2, -0.6, -0.9, 0.7),
}
CHANGES = {
    "noise alone": lambda x, rng: x,
    "drift by 2 nats": lambda x, rng: x + 2,
    "shrinkage to 0.5": lambda x, rng: 0.5 * x,
    "uneven shrinkage, 0.6 +- 0.25": lambda x, rng: x * rng.normal(0.6, 0.25, x.shape),
    "saturation at 3 nats": lambda x, rng: 3 * np.tanh(x / 3),
    "heavy-tailed noise (t, 2.5 df)": lambda x, rng: x + 0.5 * rng.standard_t(2.5, x.shape),
    "introspective answers shrink by 20% more": lambda x, rng: 0.5 * x * np.where(ITSELF, 0.8, 1.0),
}
# of a firm baseline
NO_DRIFT = {
    "noise alone",
    "shrinkage to 0.5",
    "uneven shrinkage, 0.6 +- 0.25",
    "saturation at 3 nats",
    "heavy-tailed noise (t, 2.5 df)",
}
EFFECTS, NOISES = (0.1, 0.25, 0.5, 1.0, 2.0), (0.1, 0.3, 1.0)
FAMILY = 28  # the named experiments beside the baseline


@dataclass(frozen=True)
class Case:
    """One line of a table. `noise` (standard deviation of a reading) and `effect` in nats."""

    change: str
    baseline: str = "firm"
    noise: float = 0.5
    effect: float = 0.0
    resamples: int = 299


NULLS = [Case(change) for change in CHANGES][:-1]
NULLS += [
    Case(change, baseline)
    for baseline in list(BASELINES)[1:]
    for change in ("shrinkage to 0.5", "saturation at 3 nats")
]


def _correlated(rng: np.random.Generator) -> np.ndarray:
    """Standard normal deviates of all probes [n], correlated as SHARED says."""
    total = np.zeros(len(ASKED))
    for part, labels in SHARED:
        codes = {label: k for k, label in enumerate(dict.fromkeys(labels))}
        total += math.sqrt(part) * rng.normal(size=len(codes))[[codes[label] for label in labels]]
    return total


def simulate(case: Case, rng: np.random.Generator) -> list[Probe]:
    """One experiment's probes, before and after the change."""
    own, right, drift_itself, drift_else, spread = BASELINES[case.baseline]
    x = np.where(ITSELF, drift_itself - SIGN * own, drift_else + SIGN * right) + spread * _correlated(rng)
    y = CHANGES[case.change](x, rng) + case.noise * _correlated(rng) + np.where(ITSELF, SIGN * case.effect, 0)
    return [
        Probe(str(k), kind, keyed, float(a), float(b), framing, question)
        for k, ((kind, keyed, framing, question), a, b) in enumerate(zip(ASKED, x, y, strict=True))
    ]


def one(case: Case, seed: int):
    """(detection score, p-value of the drift to Yes) of one simulated experiment."""
    probes = simulate(case, np.random.default_rng([seed, *str(case).encode()]))
    drift = None
    if case.baseline == "firm" and not case.effect:
        drift = yes_drift(probes, resamples=999, seed=seed)
    return detection_score(probes, resamples=case.resamples, seed=seed), drift and drift.p_value


def share(hits, expected: float | None = None) -> str:
    """A rate with its Wilson interval; marked where that does not hold the expected one."""
    rate = wilson_interval(sum(hits), len(hits))
    if rate.value is None or rate.low is None or rate.high is None:
        return "-"
    off = expected is not None and not rate.low <= expected <= rate.high
    return f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%}){' (!)' if off else ''}"


def null_line(case: Case, found: list) -> str:
    scores = [f for f, _ in found if f.score is not None and f.call != "not measurable"]
    drift = (
        share([p < ALPHA for _, p in found], ALPHA)
        if case.baseline == "firm" and case.change in NO_DRIFT
        else ""
    )
    return (
        f"| {case.change} | {case.baseline} | {share([f.p_value < ALPHA for f in scores], ALPHA)} |"
        f" {share([not f.low <= 0 <= f.high for f in scores], ALPHA)} |"
        f" {share([f.call == 'detects' for f in scores])} | {np.mean([f.score for f in scores]):+.3f} |"
        f" {len(found) - len(scores)} | {drift} |"
    )


def found_at(f, alpha: float) -> bool:
    return f.p_value is not None and f.p_value < alpha and f.low > 0 and f.score >= MIN_EFFECT


def report(nulls: dict, power: dict, limits: list) -> str:
    """The page of results."""
    runs, power_runs = len(next(iter(nulls.values()))), len(next(iter(power.values())))
    # 1) what is counted
    counts = {kind: sum(k == kind for k, *_ in ASKED) for kind in ("introspective", "control")}
    questions = {kind: len({q for k, _, _, q in ASKED if k == kind}) for kind in counts}
    blurred = [
        f.flattening_to_explain is not None and f.flattening_to_explain < MIN_FLATTENING
        for f, _ in limits
        if f.call == "detects"
    ]
    # 2) without an effect, and the head of the power table
    lines = [
        "# Calibration of the detection score",
        "",
        (
            f"Written by `python benchmarks/calibration.py`. Simulated, no model: {counts['introspective']}"
            f" introspective probes ({questions['introspective']} questions, keyed Yes and No, two framings)"
            f" and {counts['control']} controls ({questions['control']} questions)."
        ),
        "",
        "## Without an effect",
        "",
        (
            f"{runs} experiments a line, noise of 0.5 nats; 95% Wilson intervals. A rate whose interval does"
            " not hold 5% is marked (!); of"
            f" {2 * len(NULLS) + sum(c.baseline == 'firm' and c.change in NO_DRIFT for c in NULLS)} rates one"
            " or two are by chance."
        ),
        "",
        (
            '| change | baseline | p < 0.05 | 0 outside the 95% interval | called "detects" | mean score | no'
            " score | drift to Yes, p < 0.05 |"
        ),
        "|---|---|---|---|---|---|---|---|",
        *(null_line(case, found) for case, found in nulls.items()),
        "",
        (
            'firm: 4 +- 1.5 nats for "nothing is changed" and for the right answer; No to all about itself:'
            " -4 in every introspective question; undecided: as the 135M model, -0.6 and -0.9 +- 0.7 whatever"
            " is asked. The last column is empty where answers do move toward Yes."
        ),
        "",
        "## Power",
        "",
        (
            f"Share of {power_runs} experiments found (p, interval, at least {MIN_EFFECT} nats, toward"
            f" noticing): at p < 0.05, and at p < 0.05 / {FAMILY}, what Holm asks of the best of {FAMILY}"
            f" experiments. An effect of {MIN_EFFECT} is found half of the time at best: the score must reach"
            " it. Answers also shrink to 0.5. Columns: standard deviation of a reading's noise, nats."
        ),
        "",
        "| effect, nats | " + " | ".join(f"noise {noise}" for noise in NOISES) + " |",
        "|---|" + "---|" * len(NOISES),
    ]
    # 3) power, a line an effect
    for effect in EFFECTS:
        cells = [[f for f, _ in power[effect, noise]] for noise in NOISES]
        lines.append(
            f"| {effect} | "
            + " | ".join(
                f"{np.mean([found_at(f, ALPHA) for f in here]):.0%},"
                f" {np.mean([found_at(f, ALPHA / FAMILY) for f in here]):.0%}"
                for here in cells
            )
            + " |"
        )
    # 4) the limit
    lines += [
        "",
        "## What it cannot tell apart",
        "",
        "Where every answer shrinks to 0.5 and introspective ones, of a firm baseline, by 20% more, "
        f'{share([f.call == "detects" for f, _ in limits])} are called "detects": no control shows such a'
        " loss. Of these "
        f"{share(blurred)} have a `flattening_to_explain` under {MIN_FLATTENING}, which keeps them from the"
        ' verdict "reports it".',
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("results/reference/calibration.md"))
    parser.add_argument(
        "--runs", type=int, default=1000, help="simulated experiments a line, without an effect"
    )
    parser.add_argument("--power-runs", type=int, default=150, help="and with one")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.processes) as pool:

        def run(case: Case, runs: int) -> list:
            return list(pool.map(one, [case] * runs, range(runs), chunksize=20))

        nulls = {case: run(case, options.runs) for case in NULLS}
        power = {
            (effect, noise): run(
                Case("shrinkage to 0.5", noise=noise, effect=effect, resamples=599), options.power_runs
            )
            for effect in EFFECTS
            for noise in NOISES
        }
        limits = run(Case(list(CHANGES)[-1]), options.power_runs)
    text = report(nulls, power, limits)
    write_text(options.output, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
