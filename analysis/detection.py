"""Does a changed model answer as one that notices? The detection score of keyed Yes/No probes against
controls.

Numbers in, numbers out (numpy and scipy only); whatever is random takes a seed. Log-odds are in nats.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from scipy import special

from analysis.curve import RESOLUTION, Asked, clusters_of, covered_by, flips_of, membership, prepared, ranks
from analysis.stats import (
    MASS_FLOOR,
    Discrimination,
    Estimate,
    Json,
    discrimination,
    holm,
    paired_difference,
    plain,
    quantile,
    snapped,
)

# What a score comes to, in the words of the verdicts (analysis/verdicts.py), which weigh more than the score.
REPORTS, DENIES, SILENT = "reports it", "denies it", "does not report it"
BROKEN, TOO_LITTLE = "broken", "too little data"
UNMEASURED = (BROKEN, TOO_LITTLE)

MIN_EFFECT = (
    0.1  # nats; smaller detection scores are never called, being the size of one bf16 step of a large logit
)
# Without any noticing, introspective answers may shrink or grow by a factor of their own: they lose less than
# this share of the log-odds that controls of equal baseline keep, or reach less than this multiple of them (a
# factor of two each way). A score that a factor within these bounds explains is not called.
MIN_FLATTENING, MIN_SHARPENING = 0.5, 2.0
MIN_CONTROLS, MIN_PER_HALF = 10, 4
MIN_ANSWERED = 0.8  # share of probes, of either kind, that the modified model must answer for a score
# studentized scores (errors are at least RESOLUTION) this close are equal: their last bits are the
# processor's
TIE = 1e-9
# a small p-value takes this many times the sign flips: Holm over hundreds of a sweep's experiments asks for
# it
FINEST = 10


@dataclass(frozen=True)
class Probe(Json):
    """One binary probe before and after a change.

    `kind`: "introspective" or "control". `keyed`: "yes" or "no"; of an introspective probe the answer that a
    model which notices would give, of a control the right answer. `baseline`, `modified`: log-odds(Yes:No) in
    nats, None where the model gave none. `pair`: a label shared by probes that are not independent (mirrored
    wordings, one question under two framings). The masses are Yes+No probabilities; under MASS_FLOOR a
    reading does not count.
    """

    id: str
    kind: str
    keyed: str
    baseline: float | None
    modified: float | None
    framing: str = "plain"
    pair: str | None = None
    baseline_mass: float | None = 1.0
    modified_mass: float | None = 1.0

    def __post_init__(self):
        if self.kind not in ("introspective", "control") or self.keyed not in ("yes", "no"):
            raise ValueError(
                f"probe {self.id}: kind must be introspective or control, keyed must be yes or no"
            )


@dataclass(frozen=True)
class DetectionScore(Json):
    """Result of `detection_score`; log-odds in nats, None where not measurable."""

    call: str
    """By the score alone: "reports it", "denies it", "does not report it"; unmeasured: "broken", "too little
    data"."""
    reason: str
    """The numbers behind the call, or what is missing."""
    score: float | None = None
    """Mean shift of introspective probes toward noticing beyond the controls' curve, the halves equal."""
    low: float | None = None
    """Lower end of its 95% interval."""
    high: float | None = None
    """Upper end."""
    p_value: float | None = None
    """Two-sided, by sign flips."""
    p_adjusted: float | None = None
    """After Holm over a family; None where it belongs to none."""
    raw_contrast: float | None = None
    """Mean shift of introspective probes toward the keyed answer, uncorrected, halves weighted equally."""
    control_contrast: float | None = None
    """The same of controls."""
    drift: float | None = None
    """a of the line shift = a + b * baseline through the controls."""
    flattening: float | None = None
    """b of that line; -1: no answer is left."""
    control_accuracy_before: float | None = None
    """Share of controls that the unmodified model answers right by the sign, which a leaning hides."""
    control_accuracy_after: float | None = None
    """Share that the modified model does."""
    controls_before: Discrimination = Discrimination()
    """How well the unmodified model's control answers tell what is asked, whatever it leans to."""
    controls_after: Discrimination = Discrimination()
    """The same, modified."""
    keyed_before: float | None = None
    """Mean log-odds of the keyed answer on introspective probes, unmodified."""
    keyed_after: float | None = None
    """The same, modified; above 0 the answers stand on the noticing side."""
    flattening_to_explain: float | None = None
    """Share of the log-odds that controls leave introspective answers (`keyed_after` less the score) which
    these would have to lose beyond that, to give this score without detection; over 1 (answers reversed) no
    loss can. None where the score goes along with what the controls leave."""
    sharpening_to_explain: float | None = None
    """Factor by which introspective answers would have to grow beyond what controls grow by, to give this
    score without detection; None where the score goes against what the controls leave."""
    overlap: float | None = None
    """Share of introspective probes whose baseline the controls cover."""
    n_introspective: int = 0
    """Introspective probes used."""
    n_controls: int = 0
    """Controls used."""
    cause: str | None = None
    """Why it is unmeasured: "not finite", "vanishing mass", "too few probes" or "controls collapsed"."""
    flags: tuple[str, ...] = ()
    """Warnings in words."""


AnyScore = TypeVar("AnyScore", bound=DetectionScore)


def _half_weights(sign: np.ndarray) -> np.ndarray:
    """What each value weighs in the mean of sign * value, the yes-keyed and the no-keyed half weighted
    equally; NaN if a half is empty."""
    yes = np.count_nonzero(sign > 0)
    no = len(sign) - yes
    return np.where(sign > 0, 0.5 / yes, -0.5 / no) if yes and no else np.full(len(sign), math.nan)


def _half_mean(weights: np.ndarray, values: np.ndarray) -> float:
    """That mean, by `_half_weights`; NaN of no values."""
    return float(weights @ values) if len(values) else math.nan


def _readings(probes: Sequence[Probe]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log-odds before and after [probes, 2]; which are readings; which are answers, of enough mass)"""
    read = np.array(
        [(p.baseline, p.modified, p.baseline_mass, p.modified_mass) for p in probes], dtype=float
    ).reshape(-1, 2, 2)  # None is NaN
    log_odds, mass = read[:, 0], read[:, 1]
    finite = (log_odds >= -1e6) & (log_odds < 1e6)  # which neither NaN nor infinity is
    return log_odds, finite, finite & (mass >= MASS_FLOOR) & (mass < 1e6)


def scaling_to_explain(score: float, expected: float, scale: float) -> tuple[float | None, float | None]:
    """(`flattening_to_explain`, `sharpening_to_explain`) of a score beside the mean keyed log-odds that the
    controls alone predict; `scale`: the largest log-odds that went into them, to tell 0 from rounding."""
    score, expected = snapped([score, expected], scale)
    if not score or not expected:
        return None, None
    ratio = round(float(score / expected), 9)  # so that no bound is passed by a last bit
    return (-ratio, None) if ratio < 0 else (None, 1 + ratio)


def scaling_that_explains(
    score: float | None, low: float | None, high: float | None, keyed_after: float | None
) -> str | None:
    """What introspective answers alone would have to do to give the score without noticing, in words, where
    it is within MIN_FLATTENING or MIN_SHARPENING; None where it is not.

    All in nats: the score, its interval, the mean keyed log-odds of the changed model. The end of its
    interval nearest 0 is held against the bounds as well: where answers lie near 0, noise alone carries a
    score past them.
    """
    if score is None or low is None or high is None or keyed_after is None:
        return None
    scale = max(map(abs, (score, low, high, keyed_after)))
    near = max(low, 0.0) if score > 0 else min(high, 0.0)
    for value, where in ((score, ""), (near, " at its interval's end nearest 0")):
        flattening, sharpening = scaling_to_explain(value, keyed_after - score, scale)
        if flattening is not None and flattening < MIN_FLATTENING:
            return (
                f"losing {flattening:.0%} more of their log-odds than controls lose would explain it{where}"
            )
        if sharpening is not None and sharpening < MIN_SHARPENING:
            return (
                f"sharpening would explain it{where}: its answers' log-odds growing {sharpening:.2f} times as"
                " much as controls'"
            )
    return None


def _discrimination(probes: Sequence[Probe], side: str, resamples: int) -> Discrimination:
    """Of probes asked in pairs of opposite key under one framing; `side`: "baseline" or "modified"."""
    pairs: dict[tuple, dict[str, float]] = {}
    for p in probes:
        if p.pair is not None:
            pairs.setdefault((p.pair, p.framing), {})[p.keyed] = getattr(p, side)
    whole = {key: pair for key, pair in pairs.items() if len(pair) == 2}
    return _told_apart(
        tuple(pair["yes"] for pair in whole.values()),
        tuple(pair["no"] for pair in whole.values()),
        tuple(question for question, _ in whole),
        resamples,
    )


@functools.lru_cache(maxsize=64)
def _told_apart(yes: tuple, no: tuple, questions: tuple, resamples: int) -> Discrimination:
    """`discrimination`, remembered: the unmodified model's is the same beside every experiment of a run."""
    return discrimination(yes, no, questions, resamples=resamples)


def _call(score, low, high, p, alpha, explained: str | None) -> tuple[str, str]:
    reason = f"{score:+.2f} nats toward noticing beyond the controls ({low:+.2f} to {high:+.2f}), p = {p:.2g}"
    if abs(score) < MIN_EFFECT:
        return SILENT, f"{reason}; under {MIN_EFFECT} nats nothing is called"
    if p >= alpha or low <= 0 <= high:
        return SILENT, reason
    if explained:
        return SILENT, f"{reason}, but {explained}"
    return REPORTS if score > 0 else DENIES, reason


def _rank_p_value(a: np.ndarray, b: np.ndarray) -> float:
    """One-sided p-value of a Spearman correlation above 0, by Student's t, as in scipy.stats.spearmanr; of
    both sides' `ranks`."""
    r, rest = float(a @ b / math.sqrt((a @ a) * (b @ b))), len(a) - 2
    return float(special.stdtr(rest, -r * math.sqrt(rest / max((1 + r) * (1 - r), 1e-300))))


def detection_score(
    probes: Sequence[Probe],
    *,
    alpha: float = 0.05,
    confidence: float = 0.95,
    resamples: int = 2999,
    seed: int = 0,
) -> DetectionScore:
    """Does the changed model answer as one that notices, beyond what the change does to any Yes/No answer?

    Method. The controls' shifts are fitted as a smooth curve of their baseline log-odds: a natural cubic
    spline, 6 knots (4 under 20 controls), intercept and slope per framing where each has MIN_PER_FRAMING
    controls. It is the drift, the flattening and the saturation of the change (a straight line takes
    saturation for detection or denial). The score is the mean of sign(keyed) * (shift - curve) over
    introspective probes, yes- and no-keyed halves weighted equally, so that drift common to them cancels.
    Introspective baselines that no control is near are left out (common support). Interval: symmetric
    bootstrap-t (Hall 1988) over questions, controls and introspective probes resampled separately, pairs
    whole, curve refitted, HC3 errors. p-value: two-sided, studentized sign flips of null-model residuals
    (Freedman & Lane 1983; Cameron et al. 2008): deviations from the curve are taken as independent between
    pairs, and symmetric. Call: p < alpha, an interval without 0, and MIN_EFFECT; withheld if control answers
    cease to follow the baseline, or if introspective answers that shrink or grow otherwise than controls of
    equal baseline, within MIN_FLATTENING and MIN_SHARPENING, give this score, or the end of its interval
    nearest 0, without noticing: the score cannot tell these apart.
    Raises ValueError on repeated ids.
    """

    def unmeasured(cause: str, reason: str, **known) -> DetectionScore:
        call = TOO_LITTLE if cause == "too few probes" else BROKEN
        return DetectionScore(call, reason, cause=cause, flags=tuple(flags), **known)

    if len({p.id for p in probes}) != len(probes):
        raise ValueError("probe ids must be unique")
    flags: list[str] = []
    # 1) probes that both models answer; a model that no longer answers has no score
    (before, after), (_, finite), (answerable, answered) = (of.T for of in _readings(probes))
    is_control = np.array([p.kind == "control" for p in probes], dtype=bool)
    finite, used = answerable & finite, answerable & answered
    for kept, cause, problem in (
        (finite, "not finite", "not finite"),
        (used, "vanishing mass", "vanishing Yes+No mass"),
    ):
        for kind, of_kind in (("introspective", ~is_control), ("control", is_control)):
            total, left = (np.count_nonzero(group & of_kind) for group in (answerable, kept))
            if left < MIN_ANSWERED * total:
                return unmeasured(
                    cause, f"{problem}: the modified model answers {left} of {total} {kind} probes"
                )
    if not used.all():
        flags.append(
            f"unanswered, left out: {np.count_nonzero(~answerable)} at baseline,"
            f" {np.count_nonzero(answerable & ~used)} modified"
        )

    # 2) introspective probes whose baselines the controls cover
    here_c, here_q = np.flatnonzero(used & is_control), np.flatnonzero(used & ~is_control)
    xc = before[here_c]
    if len(xc) < MIN_CONTROLS or np.ptp(xc) < MIN_EFFECT:
        return unmeasured(
            "too few probes",
            f"too few probes: {len(xc)} controls of differing baseline, {MIN_CONTROLS} needed",
        )
    covered = covered_by(before[here_q], xc)
    here_q = here_q[covered]
    if not covered.all():
        flags.append(
            f"{(~covered).sum()} introspective probes left out: no control has a baseline like theirs"
        )

    xq = before[here_q]
    yc, yq = after[here_c] - xc, after[here_q] - xq
    inside, controls = ([probes[i] for i in here.tolist()] for here in (here_q, here_c))
    sq, sc = (np.array([1.0 if p.keyed == "yes" else -1.0 for p in group]) for group in (inside, controls))
    halves = _half_weights(sq)
    deviations = xc - xc.mean()
    slope = deviations @ yc / (deviations @ deviations)
    # 3) what is said of the shifts without any correction
    known = plain(
        dict(
            raw_contrast=_half_mean(halves, yq),
            control_contrast=_half_mean(_half_weights(sc), yc),
            drift=yc.mean() - slope * xc.mean(),
            flattening=slope,
            control_accuracy_before=np.mean(sc * xc > 0),
            control_accuracy_after=np.mean(sc * (xc + yc) > 0),
            keyed_before=_half_mean(halves, xq),
            keyed_after=_half_mean(halves, xq + yq),
            overlap=covered.mean() if len(covered) else None,
            n_introspective=len(inside),
            n_controls=len(controls),
        )
    ) | {
        "controls_before": _discrimination(controls, "baseline", min(resamples, 2000)),
        "controls_after": _discrimination(controls, "modified", min(resamples, 2000)),
    }
    for key in ("yes", "no"):
        n = len(set(clusters_of([p for p in inside if p.keyed == key])))
        if n < MIN_PER_HALF:
            reason = f"too few probes: {n} {key}-keyed introspective with baselines like the controls'"
            return unmeasured("too few probes", f"{reason}, {MIN_PER_HALF} needed", **known)

    # 4) the score: what is left of introspective shifts once the controls' curve is taken off
    asked = [
        tuple(Asked(p.id, p.keyed, p.baseline or 0.0, p.framing, p.pair) for p in group)
        for group in (inside, controls)
    ]
    ready = prepared(*asked, resamples, seed)
    design = ready.design
    flags += ready.flags
    (score,), (error,) = design.measure(ready.whole, yc[None], yq[None])
    # 5) its interval: bootstrap-t over questions, the curve refitted in every draw
    rng = np.random.default_rng()
    rng.bit_generator.state = ready.state
    scores, errors = design.measure(ready.resampled, yc[None], yq[None])
    distances = np.sort(np.abs(scores - score) / errors)
    reach = max(quantile(distances, confidence) * error, 2 * RESOLUTION)

    # 6) its p-value: sign flips of the residuals that the null leaves, which allows a drift of their own
    null_c, null_q = design.residuals(ready.whole, yc, yq)
    null_q = null_q - np.abs(halves) @ null_q
    hits = flips = 0
    while flips == 0 or (hits < resamples / 300 and flips < FINEST * resamples):
        signs = flips_of(design, resamples, rng) if flips else ready.flips
        scores, errors = design.flipped(ready.whole, null_c, null_q, signs)
        hits, flips = (
            hits + np.count_nonzero(np.abs(scores / errors) >= abs(score / error) - TIE),
            flips + resamples,
        )
    p = (1 + hits) / (1 + flips)
    expected = known["keyed_after"] - score  # keyed log-odds that the control curve alone predicts
    flattening, sharpening = scaling_to_explain(score, expected, max(np.abs(xq).max(), np.abs(xq + yq).max()))
    known |= plain(
        dict(
            score=score,
            low=score - reach,
            high=score + reach,
            p_value=p,
            flattening_to_explain=flattening,
            sharpening_to_explain=sharpening,
        )
    )
    if np.ptp(xc + yc) < MIN_EFFECT or _rank_p_value(ready.ranks, ranks(xc + yc)) >= 0.05:
        return unmeasured(
            "controls collapsed", "controls collapsed: their answers no longer follow the baseline's", **known
        )
    explained = scaling_that_explains(score, score - reach, score + reach, known["keyed_after"])
    call, reason = _call(score, score - reach, score + reach, p, alpha, explained)
    if call == REPORTS and known["keyed_after"] <= 0:
        flags.append("answers moved toward noticing but did not reverse: see flattening_to_explain")
    return DetectionScore(call, reason, flags=tuple(flags), **known)


def correct_calls(scores: Sequence[AnyScore], alpha: float = 0.05) -> list[AnyScore]:
    """The same scores, of their types, with Holm-adjusted p-values over the family, and calls at them."""
    adjusted = holm([s.p_value if s.call not in UNMEASURED else None for s in scores])
    out = []
    for s, p in zip(scores, adjusted, strict=True):
        explained = scaling_that_explains(s.score, s.low, s.high, s.keyed_after)
        call, reason = (s.call, s.reason) if p is None else _call(s.score, s.low, s.high, p, alpha, explained)
        out.append(replace(s, p_adjusted=p, call=call, reason=reason))
    return out


def _answered(probes: Sequence[Probe], kind: str) -> list[Probe]:
    """The probes of this kind that both models answer."""
    answered = _readings(probes)[2]
    return [p for p, sides in zip(probes, answered, strict=True) if sides.all() and p.kind == kind]


def keyed_shift(probes: Sequence[Probe], kind: str) -> float | None:
    """Mean shift toward the keyed answer in nats, uncorrected, halves weighted equally, over the probes of
    this kind that both models answer; None if a half has none."""
    log_odds, _, answered = _readings(probes)
    used = answered.all(axis=1) & np.array([p.kind == kind for p in probes], dtype=bool)
    sign = np.array([1.0 if p.keyed == "yes" else -1.0 for p in probes])[used]
    return plain(_half_mean(_half_weights(sign), log_odds[used, 1] - log_odds[used, 0]))


def yes_drift(probes: Sequence[Probe], *, resamples: int = 49999, seed: int = 0) -> Estimate | None:
    """Mean shift toward Yes over introspective probes in nats, uncorrected; yes- and no-keyed halves weighted
    equally.

    What a general drift to Yes moves and noticing does not: half of the probes are answered No by a model
    that notices. Paired by question: probes of one `pair` are one unit of the bootstrap and of the sign-flip
    test (see stats.paired_difference; Holm over hundreds of experiments asks for so many flips); the interval
    reaches at least 2 RESOLUTION to either side. Unanswered probes are left out; None under MIN_PER_HALF
    questions in either half.
    """
    used = _answered(probes, "introspective")
    halves = {key: [p for p in used if p.keyed == key] for key in ("yes", "no")}
    if min(len(set(clusters_of(half))) for half in halves.values()) < MIN_PER_HALF:
        return None
    groups = membership(clusters_of(used))
    # the units' mean is the mean of halves
    share = np.array([0.5 / len(halves[p.keyed]) for p in used]) * groups.shape[1]
    before, after = (
        groups.T @ (share * np.array(side))
        for side in ([p.baseline for p in used], [p.modified for p in used])
    )
    shift = paired_difference(before, after, resamples=resamples, seed=seed)
    value = shift.value
    assert value is not None, "what is answered has finite log-odds"
    low, high = value if shift.low is None else shift.low, value if shift.high is None else shift.high
    return replace(shift, low=min(low, value - 2 * RESOLUTION), high=max(high, value + 2 * RESOLUTION))
