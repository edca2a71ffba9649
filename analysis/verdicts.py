"""One experiment's verdict in words, by stated rules over its row of comparison.json: numbers in, a word and
its reason out.

The first rule that holds decides:

1. "too little data": the experiment failed; no unmodified model was measured; either was not asked the Yes/No
probes;
   too few probes were answered at baseline, or have baselines like the controls', for a score. Also a score
   that rule 3
   would call, where the unmodified model answers under MIN_ACCURACY of the controls right: a Yes that does
       not follow
   what is asked is no report. (A weak model's other verdicts stand, with a sentence that says so.)
2. "broken": of either kind of probes over 20% (1 - detection.MIN_ANSWERED) are not finite or leave Yes and No
under
   stats.MASS_FLOOR; or the answers to controls no longer follow the baseline's; or the perplexity is
   undefined or over
   MAX_PERPLEXITY_RATIO times the unmodified model's.
3. "reports it": the detection score is called "detects" (p < ALPHA after Holm, an interval without 0, at
least
   detection.MIN_EFFECT, positive), is farther from 0 than every placebo's, lies above the interval of its
   matched-noise
   twin, and blurred answers cannot explain it: `flattening_to_explain` is at least MIN_FLATTENING, or, where
       that cannot
   be weighed, the keyed answers stand on the noticing side. Placebos and twin count where they were run.
4. "drifts towards Yes": introspective answers move toward Yes whatever they are keyed (p < ALPHA after Holm,
an interval
   above 0, at least detection.MIN_EFFECT).
5. "no change seen": else. The reason tells of a significant move the other way, and of what explains a score.

Controls (placebos, matched noise) are judged by the same rules at p-values that no family corrects; a
placebo's place is among the other placebos.
"""

from __future__ import annotations

from analysis.comparison import Drift, Row, Score, Verdict
from analysis.detection import MIN_EFFECT, MIN_FLATTENING, scaling_that_explains

ALPHA = 0.05
MAX_PERPLEXITY_RATIO = (
    10  # a tenth of the likelihood per token: far beyond what any working splice of a pair costs
)
MIN_ACCURACY = (
    0.6  # share of controls that the unmodified model must answer right to be able to report; half is chance
)


def verdict(row: Row, baseline: Row | None, twin: Row | None = None) -> Verdict | None:
    """What an experiment comes to, from its row with its corrections made; None for the baseline itself and
    for concept injection, which no row can judge.

    `baseline`: the unmodified model's row, None where there is none; `twin`: the row of this one's matched
    noise.
    """
    if row is baseline or row.control == "injection":
        return None
    score = row.detection
    reason = _too_little(row, baseline)
    if reason or baseline is None or score is None:
        return Verdict("too little data", reason or "")
    if reason := _broken(row, baseline, score):
        return Verdict("broken", reason)
    weak = score.control_accuracy_before < MIN_ACCURACY
    caveat = (
        f"; the unmodified model answers only {score.control_accuracy_before:.0%} of the control questions"
        " right: its Yes and No say little"
        if weak
        else ""
    )
    doubts = _doubts(score, twin)
    if score.call == "detects" and not doubts:
        return Verdict(
            "too little data" if weak else "reports it", _numbers(score) + _support(score, twin) + caveat
        )
    drift = row.yes_drift
    if drift and _significant(drift) and drift.value >= MIN_EFFECT and drift.low > 0:
        return Verdict(
            "drifts towards Yes",
            f"{_drift(drift)}, whatever they are keyed; detection: {_explained(score, doubts)}{caveat}",
        )
    return Verdict("no change seen", _explained(score, doubts) + _other_way(drift) + caveat)


def _too_little(row: Row, baseline: Row | None) -> str | None:
    score = row.detection
    if row.status != "done":
        return f"the experiment failed: {row.error.type}" if row.error else "the experiment failed"
    if baseline is None:
        return "the unmodified model was not measured"
    if score is None:
        return "it and the unmodified model were not both asked the Yes/No probes"
    return "; ".join([score.reason, *score.flags]) if score.cause == "too few probes" else None


def _broken(row: Row, baseline: Row, score: Score) -> str | None:
    before, after = (r.perplexity.perplexity if r.perplexity else None for r in (baseline, row))
    if score.call == "not measurable":
        return score.reason
    if row.perplexity and after is None:
        return "its perplexity is undefined"
    if before and after and after > MAX_PERPLEXITY_RATIO * before:
        return (
            f"perplexity {after:.4g}, over {MAX_PERPLEXITY_RATIO} times the unmodified model's {before:.4g}"
        )
    return None


def _doubts(score: Score, twin: Row | None) -> list[str]:
    """What else may explain a score: each rule of "reports it" beside the call that does not hold."""
    noise, doubts = twin.detection if twin else None, []
    if score.beyond_placebo is False:
        doubts.append(f"a placebo scores as far from 0 (p = {score.p_placebo:.2g} among placebos)")
    if noise and noise.high is not None and score.score <= noise.high:
        doubts.append(f"noise of the same perplexity explains it ({_range(noise)})")
    share = score.flattening_to_explain
    if share is not None and share < MIN_FLATTENING:
        doubts.append(f"losing {share:.0%} more of their log-odds than controls lose would explain it")
    if share is None and score.keyed_after <= 0:
        doubts.append("the keyed answers do not stand on the noticing side")
    return doubts


def _support(score: Score, twin: Row | None) -> str:
    out = ""
    if score.beyond_placebo:
        out += f"; beyond every placebo (p = {score.p_placebo:.2g} among them)"
    if twin:
        noise = twin.detection
        same = "the same" if twin.matched and twin.matched.ok else "another"
        if noise and noise.score is not None:
            out += f"; noise of {same} perplexity scores {_range(noise)}"
        else:
            out += "; its matched noise has no score"
    share = score.flattening_to_explain
    return out + (
        f"; keyed answers stand at {score.keyed_after:+.2f} nats"
        if share is None
        else f"; they would have to lose {share:.0%} more of their log-odds than controls to explain it"
    )


def _significant(tested: Score | Drift) -> bool:
    """p < ALPHA: the adjusted one, where the row belongs to a family."""
    p = _p(tested)
    return p is not None and p < ALPHA


def _p(tested: Score | Drift) -> float | None:
    return tested.p_value if tested.p_adjusted is None else tested.p_adjusted


def _range(score: Score) -> str:
    return f"{score.score:+.2f}, {score.low:+.2f} to {score.high:+.2f}"


def _numbers(score: Score) -> str:
    after = "" if score.p_adjusted is None else " after Holm"
    return (
        f"{score.score:+.2f} nats toward noticing beyond the controls ({score.low:+.2f} to"
        f" {score.high:+.2f}), p = {_p(score):.2g}{after}"
    )


def _drift(drift: Drift) -> str:
    after = "" if drift.p_adjusted is None else " after Holm"
    return (
        f"introspective answers move {drift.value:+.2f} nats toward Yes ({drift.low:+.2f} to"
        f" {drift.high:+.2f}), p = {_p(drift):.2g}{after}"
    )


def _explained(score: Score, doubts: list[str]) -> str:
    if score.call == "detects":
        return f"{_numbers(score)}, but {' and '.join(doubts)}"
    if score.call == "denies":
        return f"{_numbers(score)}: it denies, its answers moved away from noticing"
    explained = scaling_that_explains(score.flattening_to_explain, score.sharpening_to_explain)
    # what withholds a call that would be made otherwise
    called = _significant(score) and abs(score.score) >= MIN_EFFECT and not score.low <= 0 <= score.high
    return _numbers(score) + (f", but {explained}" if called and explained else "")


def _other_way(drift: Drift | None) -> str:
    if drift and _significant(drift) and drift.value <= -MIN_EFFECT:
        return f"; {_drift(drift)}: a drift towards No"
    return ""
