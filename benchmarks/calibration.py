#!/usr/bin/env python3
"""How often the detection score calls what is not there, and how large an effect it finds: simulated runs, no
model.

`python benchmarks/calibration.py --output results/reference/calibration.md`. A simulated experiment has the
binary probes' own questions, keys and framings. The change moves each answer by a function of its baseline
and by noise; an effect moves the introspective answers toward their keys. Baselines, noise and changes' own
spread share parts of their variance between the readings of one question, as the reference run of the
laptop-size pair has it. `--noise-from RUN` measures these parts, the noise and the unmodified model's own
answers in a run, and adds lines with a model that answers as that one.
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

from analysis.compare import paired_probes
from analysis.detection import (
    DENIES,
    MIN_EFFECT,
    MIN_FLATTENING,
    MIN_SHARPENING,
    REPORTS,
    UNMEASURED,
    Probe,
    detection_score,
    yes_drift,
)
from analysis.stats import wilson_interval
from analysis.verdicts import ALPHA
from command_line import ends_in_one_line, parser_of
from errors import FrankenError
from experiments import BASELINE
from prompts import BINARY_PROBES
from runner.results import Run, read_json, write_text

# kind, key, framing, question
ASKED = [(p.kind, p.if_changed, p.framing, p.question) for p in BINARY_PROBES]
SIGN = np.array([1.0 if keyed == "yes" else -1.0 for _, keyed, _, _ in ASKED])
ITSELF = np.array([kind == "introspective" for kind, *_ in ASKED])
# Parts of the variance shared by all readings of a question, both framings of a wording, both wordings in a
# framing, none.
SHARED = (0.3, 0.15, 0.2, 0.35)
SHARING = (
    [(q,) for *_, q in ASKED],
    [(q, k) for _, k, _, q in ASKED],
    [(q, f) for *_, f, q in ASKED],
    list(enumerate(ASKED)),
)
# Log-odds in nats: of "nothing is changed" and of what is right, then toward Yes in questions about itself
# and others; spread.
BASELINES = {
    "firm": (4.0, 4.0, 0.0, 0.0, 1.5),
    "No to all about itself": (0.0, 4.0, -4.0, 0.0, 1.5),
    "undecided": (0.0, 0.2, -0.6, -0.9, 0.7),
    "leaning to Yes and to noticing": (-0.6, 1.0, 1.5, 1.0, 1.0),
}
CHANGES = {
    "noise alone": lambda x, rng: x,
    "drift by 2 nats": lambda x, rng: x + 2,
    "shrinkage to 0.5": lambda x, rng: 0.5 * x,
    "uneven shrinkage, 0.6 +- 0.25": lambda x, rng: x * rng.normal(0.6, 0.25, x.shape),
    "saturation at 3 nats": lambda x, rng: 3 * np.tanh(x / 3),
    "heavy-tailed noise (t, 2.5 df)": lambda x, rng: x + 0.5 * rng.standard_t(2.5, x.shape),
    "growth to 1.5": lambda x, rng: 1.5 * x,
    "growth to 3": lambda x, rng: 3 * x,
    "uneven growth, 1.5 +- 0.3": lambda x, rng: x * rng.normal(1.5, 0.3, x.shape),
    "growth to 2, saturating at 6 nats": lambda x, rng: 6 * np.tanh(2 * x / 6),
}
# What only introspective answers do, beyond what all do: a factor of their own that is no noticing.
SCALED = {
    f"all {'shrink' if common < 1 else 'grow'} to {common:g}, introspective ones to {own:g} of that": (
        lambda x, rng, common=common, own=own: common * x * np.where(ITSELF, own, 1.0)
    )
    for common in (0.5, 1.5)
    for own in (0.6, 0.8, 1.25, 1.6)
}
CHANGES |= SCALED
# of a firm baseline
NO_DRIFT = {
    "noise alone",
    "shrinkage to 0.5",
    "uneven shrinkage, 0.6 +- 0.25",
    "saturation at 3 nats",
    "heavy-tailed noise (t, 2.5 df)",
    "growth to 1.5",
    "growth to 3",
    "uneven growth, 1.5 +- 0.3",
    "growth to 2, saturating at 6 nats",
}
EFFECTS, NOISES = (0.1, 0.25, 0.5, 1.0, 2.0), (0.1, 0.3, 1.0)
FAMILY = 28  # the named experiments beside the baseline


@dataclass(frozen=True)
class Case:
    """One line of a table. `noise` (standard deviation of a reading) and `effect` in nats; `shared`: the
    parts of the noise's variance, as SHARED; `levels`: log-odds as those of BASELINES, None: of its name."""

    change: str
    baseline: str = "firm"
    noise: float = 0.5
    effect: float = 0.0
    resamples: int = 299
    shared: tuple[float, ...] = SHARED
    levels: tuple[float, ...] | None = None


NULLS = [Case(change) for change in CHANGES if change not in SCALED]
NULLS += [
    Case(change, baseline)
    for baseline in list(BASELINES)[1:]
    for change in ("shrinkage to 0.5", "saturation at 3 nats", "growth to 1.5")
]
LIMITS = [Case(change, baseline) for baseline in BASELINES for change in SCALED]


# ---- what a run's readings are like


@dataclass(frozen=True)
class Measured:
    """A run's unmodified model and the noise of its readings. `levels` as in BASELINES; `noises`: standard
    deviation of a reading about the controls' line, nats, by experiment; `shared` as SHARED."""

    name: str
    levels: tuple[float, ...]
    noises: dict[str, float]
    shared: tuple[float, ...]


def shared_parts(residuals: np.ndarray) -> tuple[float, ...]:
    """SHARED by the method of moments: residuals [n, questions, 2 keys, 2 framings], each of mean 0 over its
    n-th's; negative parts are taken as 0."""
    r = residuals / residuals.std(axis=(1, 2, 3), keepdims=True)
    both = np.mean(r[:, :, 0] * r[:, :, 1])  # another key, the same framing
    framings = np.mean(r[:, :, :, 0] * r[:, :, :, 1])  # the same key, another framing
    apart = np.mean((r[:, :, 0, 0] * r[:, :, 1, 1] + r[:, :, 0, 1] * r[:, :, 1, 0]) / 2)
    parts = np.maximum([apart, framings - apart, both - apart, 1 - framings - both + apart], 0)
    return tuple(float(part) for part in parts / parts.sum())


def measure(path: Path) -> Measured:
    """The noise and the baseline of a run, from its experiments that leave the model answering.

    Raises FrankenError if the folder holds no run, or none whose probes are the ones asked here.
    """
    run = Run(path)
    if not run.manifest_path.exists():
        raise FrankenError(f"{path} holds no run: no {run.manifest_path.name}")
    manifest = read_json(run.manifest_path)
    results = {name: result for name in manifest["experiments"] if (result := run.load(name)) is not None}
    still = results.get(BASELINE, {"measurements": {}})["measurements"].get("binary")
    if still is None:
        raise FrankenError(f"{path} has no {BASELINE} that was asked the Yes/No probes")
    order = {p.id: k for k, p in enumerate(BINARY_PROBES)}  # that of ASKED

    # 1) readings in the order of ASKED: [n] log-odds before, and after each change
    def readings(binary: dict, side: str) -> np.ndarray | None:
        at = {p.id: getattr(p, side) for p in paired_probes(still, binary)}
        if at.keys() != order.keys() or any(v is None for v in at.values()):
            return None
        return np.array([at[id] for id in order])

    x = readings(still, "baseline")
    if x is None:
        raise FrankenError(f"{path}: the unmodified model was asked other probes, or did not answer some")

    # 2) what the change does to any answer is a line through the controls; what remains is noise
    residuals = {}
    for name, result in results.items():
        binary = result["measurements"].get("binary")
        control = result["experiment"].get("control")
        if binary is None or name == BASELINE or control == "injection":
            continue
        y = readings(binary, "modified")
        if y is None or detection_score(paired_probes(still, binary), resamples=99).call in UNMEASURED:
            continue
        slope, intercept = np.polyfit(x[~ITSELF], (y - x)[~ITSELF], 1)
        residual = y - x - intercept - slope * x
        for group in (ITSELF, ~ITSELF):
            residual[group] -= residual[group].mean()
        residuals[name] = residual
    if not residuals:
        raise FrankenError(f"{path} has no experiment that leaves the model answering every probe")

    # 3) its parts, and the unmodified model's own levels
    questions = list(dict.fromkeys((kind, q) for kind, *_, q in ASKED))
    index = {cell: k for k, cell in enumerate(ASKED)}
    cells = [
        [[index[kind, key, framing, q] for framing in ("plain", "informed")] for key in ("yes", "no")]
        for kind, q in questions
    ]
    levels = [x[group & (s == SIGN)].mean() for group in (ITSELF, ~ITSELF) for s in (1, -1)]
    spread = np.mean([x[group & (s == SIGN)].std() for group in (ITSELF, ~ITSELF) for s in (1, -1)])
    own, right = -(levels[0] - levels[1]) / 2, (levels[2] - levels[3]) / 2
    return Measured(
        manifest["pair"] or path.name,
        (own, right, (levels[0] + levels[1]) / 2, (levels[2] + levels[3]) / 2, float(spread)),
        {name: float(residual.std()) for name, residual in residuals.items()},
        shared_parts(np.stack([residual[cells] for residual in residuals.values()])),
    )


# ---- simulated experiments


def _correlated(rng: np.random.Generator, shared: tuple[float, ...] = SHARED) -> np.ndarray:
    """Standard normal deviates of all probes [n], correlated as `shared` says."""
    total = np.zeros(len(ASKED))
    for part, labels in zip(shared, SHARING, strict=True):
        codes = {label: k for k, label in enumerate(dict.fromkeys(labels))}
        total += math.sqrt(part) * rng.normal(size=len(codes))[[codes[label] for label in labels]]
    return total


def simulate(case: Case, rng: np.random.Generator) -> list[Probe]:
    """One experiment's probes, before and after the change."""
    own, right, drift_itself, drift_else, spread = case.levels or BASELINES[case.baseline]
    x = np.where(ITSELF, drift_itself - SIGN * own, drift_else + SIGN * right) + spread * _correlated(rng)
    noise = case.noise * _correlated(rng, case.shared)
    y = CHANGES[case.change](x, rng) + noise + np.where(ITSELF, SIGN * case.effect, 0)
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


def null_line(case: Case, outcomes: list) -> str:
    scores = [f for f, _ in outcomes if f.score is not None and f.call not in UNMEASURED]
    drift = (
        share([p < ALPHA for _, p in outcomes], ALPHA)
        if case.baseline == "firm" and case.change in NO_DRIFT
        else ""
    )
    return (
        f"| {case.change} | {case.baseline} | {share([f.p_value < ALPHA for f in scores], ALPHA)} |"
        f" {share([not f.low <= 0 <= f.high for f in scores], ALPHA)} |"
        f" {share([f.call in (REPORTS, DENIES) for f in scores])} |"
        f" {np.mean([f.score for f in scores]):+.3f} |"
        f" {len(outcomes) - len(scores)} | {drift} |"
    )


def found_at(f, alpha: float) -> bool:
    return f.p_value is not None and f.p_value < alpha and f.low > 0 and f.score >= MIN_EFFECT


def limit_line(case: Case, outcomes: list) -> str:
    scores = [f for f, _ in outcomes if f.score is not None and f.call not in UNMEASURED]
    return (
        f"| {case.change} | {case.baseline} | {share([f.p_value < ALPHA for f in scores])} |"
        f" {share([f.call == REPORTS for f in scores])} | {share([f.call == DENIES for f in scores])} |"
        f" {np.mean([f.score for f in scores]):+.2f} |"
    )


def measured_lines(measured: Measured, nulls: dict, limits: dict) -> list[str]:
    """What a run's readings are like, and the score on a model that answers as that one."""
    own, right, itself, other, spread = measured.levels
    noises = np.array(list(measured.noises.values()))
    named = ("its question", "its wording", "its question and framing", "nothing")
    return [
        f"## With the readings of {measured.name}",
        "",
        (
            f"Unmodified, it answers with {own:+.2f} nats that nothing is changed and with {right:+.2f} nats"
            f" what is right, leaning by {itself:+.2f} nats to Yes in questions about itself and by"
            f" {other:+.2f} in others, +- {spread:.2f}. Noise of a reading about the line through the"
            f" controls, over {len(noises)} experiments that leave it answering: median"
            f" {np.median(noises):.2f} nats"
            f" ({noises.min():.2f} to {noises.max():.2f}); of its variance a reading shares "
            + ", ".join(f"{part:.0%} with {what}" for part, what in zip(measured.shared, named, strict=True))
            + f". The lines below have that noise, at its median and its {NOISY:.0%} quantile"
            f" ({np.quantile(noises, NOISY):.2f} nats)."
        ),
        "",
        *NULL_HEAD,
        *(null_line(case, outcomes) for case, outcomes in nulls.items()),
        "",
        *LIMIT_HEAD,
        *(limit_line(case, outcomes) for case, outcomes in limits.items()),
        "",
    ]


NOISY = 0.9  # quantile
NULL_HEAD = (
    "| change | baseline | p < 0.05 | 0 outside the 95% interval | called, either way | mean score |"
    " no score | drift, p < 0.05 |",
    "|---|---|---|---|---|---|---|---|",
)
LIMIT_HEAD = (
    '| change | baseline | p < 0.05 | called "reports it" | called "denies it" | mean score |',
    "|---|---|---|---|---|---|",
)


def report(nulls: dict, power: dict, limits: dict, command: str, measured: list[str] | None = None) -> str:
    """The page of results."""
    runs, power_runs = len(next(iter(nulls.values()))), len(next(iter(power.values())))
    # 1) what is counted
    counts = {kind: sum(k == kind for k, *_ in ASKED) for kind in ("introspective", "control")}
    questions = {kind: len({q for k, _, _, q in ASKED if k == kind}) for kind in counts}
    # 2) without an effect, and the head of the power table
    lines = [
        "# Calibration of the detection score",
        "",
        (
            f"Written by `{command}`. Simulated, no model: {counts['introspective']}"
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
        *NULL_HEAD,
        *(null_line(case, outcomes) for case, outcomes in nulls.items()),
        "",
        (
            'firm: 4 +- 1.5 nats for "nothing is changed" and for the right answer; No to all about itself:'
            " -4 in every introspective question; undecided: as the 135M model, -0.6 and -0.9 +- 0.7 whatever"
            " is asked; leaning to Yes and to noticing: 1 to 1.5 nats to Yes whatever is asked, 1 nat to what"
            " is right, and 0.6 nats to what a model that notices would say. The last column is empty where"
            " answers do drift."
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
        "## Answers about itself that scale by a factor of their own",
        "",
        f"All answers shrink or grow, and introspective ones to another share of their log-odds, which is no"
        f" noticing. The score does see it. A score that such a factor between {MIN_FLATTENING:g} and"
        f" {MIN_SHARPENING:g} explains (`flattening_to_explain`, `sharpening_to_explain`) is not called;"
        f" {len(next(iter(limits.values())))} experiments a line, noise of 0.5 nats. Any call here is a false"
        " one.",
        "",
        *LIMIT_HEAD,
        *(limit_line(case, outcomes) for case, outcomes in limits.items()),
        "",
        *(measured or []),
    ]
    return "\n".join(lines)


def parse() -> tuple[argparse.Namespace, Measured | None]:
    """The command line, and the noise of the run that it names. Raises FrankenError if that is no run."""
    parser = parser_of(__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/reference/calibration.md"))
    parser.add_argument(
        "--runs", type=int, default=1000, help="simulated experiments a line, without an effect"
    )
    parser.add_argument("--power-runs", type=int, default=150, help="and with one, or with a factor")
    parser.add_argument(
        "--noise-from",
        type=Path,
        metavar="RUN",
        help="a run's folder, whose unmodified model and noise of readings get lines of their own",
    )
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    return options, measure(options.noise_from) if options.noise_from else None


@ends_in_one_line("interrupted; nothing was written")
def main() -> int:
    options, measured = parse()
    with ProcessPoolExecutor(options.processes) as pool:

        def run(case: Case, runs: int) -> list:
            return list(pool.map(one, [case] * runs, range(runs), chunksize=20))

        # 1. without an effect, with one, and where the score reaches its limits
        nulls = {case: run(case, options.runs) for case in NULLS}
        power = {
            (effect, noise): run(
                Case("shrinkage to 0.5", noise=noise, effect=effect, resamples=599), options.power_runs
            )
            for effect in EFFECTS
            for noise in NOISES
        }
        limits = {case: run(case, options.power_runs) for case in LIMITS}
        # 2. with a run's own noise
        lines = None
        if measured:
            noises = list(measured.noises.values())
            like = [
                Case(
                    change,
                    f"noise {noise:.2f}",
                    noise=float(noise),
                    shared=measured.shared,
                    levels=measured.levels,
                )
                for noise in (np.median(noises), np.quantile(noises, NOISY))
                for change in ("noise alone", "shrinkage to 0.5", "growth to 1.5", *SCALED)
            ]
            by_case = {
                case: run(case, options.power_runs if case.change in SCALED else options.runs)
                for case in like
            }
            sides = ({c: f for c, f in by_case.items() if (c.change in SCALED) is s} for s in (False, True))
            lines = measured_lines(measured, *sides)
    # 3. the page
    command = f"python benchmarks/calibration.py --runs {options.runs} --power-runs {options.power_runs}"
    command += f" --noise-from {options.noise_from}" if measured else ""
    text = report(nulls, power, limits, command, lines)
    write_text(options.output, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
