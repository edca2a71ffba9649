"""One experiment's verdict in words, by stated rules over its row: numbers in, a word and its reason out.

The words are about the model that was asked: what it says, or that it cannot be told. The first rule that
holds decides:

1. "too little data": the experiment failed; no unmodified model was measured; either was not asked the Yes/No
   probes; too few probes were answered at baseline, or have baselines like the controls', for a score. Also a
   score that rules 3 or 4 would call, where the unmodified model does not tell what it is asked (`tells`): a
   Yes that does not follow what is asked is no report. Every verdict on such a model says so in two words,
   and the run's pages say once which number falls short (`answering`). `lacking` says in a few words which of
   these it is.
2. "broken": of either kind of probes over 20% (1 - detection.MIN_ANSWERED) are not finite or leave Yes and No
   under stats.MASS_FLOOR; or the answers to controls no longer follow the baseline's; or the perplexity is
   undefined or over MAX_PERPLEXITY_RATIO times the unmodified model's.
3. "reports it": the score is called that (p < ALPHA after Holm, an interval without 0, at least
   detection.MIN_EFFECT, positive, and not explained by introspective answers that shrink or grow by a factor
   of their own), is farther from 0 than every placebo's, and lies above the interval of its matched-noise
   twin. Placebos and twin count where they were run.
4. "denies it": the same on the other side, below the twin's interval: it says more than controls do, and more
   than before, that nothing is changed.
5. "answers drift towards Yes", "answers drift towards No": the answers about itself move that way whatever
   they are keyed (p < ALPHA after Holm, an interval without 0, at least detection.MIN_EFFECT). This is the
   mean over all introspective probes (the column "drift"); the published probe alone may move otherwise.
6. "does not report it": else, with what did change beside it (capability, perplexity, chat behavior) and what
   explains a score. Of a placebo, which computes the same function: "no change to report". That is also the
   word of what has the unmodified model's own recipe, whatever its score, unless rule 1 holds.

Controls (placebos, matched noise) are judged by the same rules at p-values that no family corrects; a
placebo's place is among the other placebos.
"""

from __future__ import annotations

from analysis.comparison import Drift, Row, Score, Verdict
from analysis.detection import (
    BROKEN,
    DENIES,
    MIN_EFFECT,
    REPORTS,
    SILENT,
    TOO_LITTLE,
    UNMEASURED,
    DetectionScore,
    scaling_that_explains,
)
from analysis.stats import Discrimination, fisher_p_value

NO_BASELINE = "the unmodified model was not measured"
DRIFTS_YES, DRIFTS_NO = "answers drift towards Yes", "answers drift towards No"
NO_CHANGE = "no change to report"
# of an unmodified model that does not tell what it is asked: a word, and the reason beside a verdict
WEAK, UNCERTAIN = "weak controls", "controls answered too uncertainly"

ALPHA = 0.05
MAX_PERPLEXITY_RATIO = (
    10  # a tenth of the likelihood per token: far beyond what any working splice of a pair costs
)
# Share of control pairs that the unmodified model must get right, and area over all control answers, for any
# answer of it to count as a report; half is chance. Neither depends on which way it leans.
MIN_ACCURACY = 0.6
MAX_PERCENT = 10  # a share over this is told as a factor


def tells(controls: Discrimination) -> bool:
    """Whether answers to controls tell what is asked: MIN_ACCURACY in pairs of opposite key and over all, and
    d' above chance by its interval (where it has one)."""
    if controls.pairs is None or controls.auc is None:
        return False
    chance = controls.d_prime_low is not None and controls.d_prime_low <= 0
    return controls.pairs >= MIN_ACCURACY and controls.auc >= MIN_ACCURACY and not chance


def answering(controls: Discrimination) -> str:
    """How well control questions are answered, in words, where not well enough (`tells`): which number falls
    short, and of what; and which does not."""
    if controls.pairs is None or controls.auc is None:
        return "no pairs of control questions were answered"
    spread = (
        ""
        if controls.pairs_low is None or controls.pairs_high is None
        else f" ({controls.pairs_low:.0%} to {controls.pairs_high:.0%})"
    )
    over_all = _weighed(controls.auc, f"{controls.auc:.0%} over all questions")
    in_pairs = _weighed(controls.pairs, f"{controls.pairs:.0%}{spread} of pairs")
    out = (
        "of two control questions with opposite answers it tells which is which in"
        f" {over_all}, and in {in_pairs}"
    )
    if controls.d_prime is not None and controls.d_prime_low is not None and controls.d_prime_low <= 0:
        ends = f"{controls.d_prime_low:.2f} to {controls.d_prime_high:.2f}"
        return f"{out}; but their d', {controls.d_prime:.2f} ({ends}), may be 0; 50% and a d' of 0 are chance"
    return f"{out}; 50% is chance"


def _weighed(share: float, said: str) -> str:
    """A share of control questions told apart, in words, and whether it is as much as is asked for."""
    if share >= MIN_ACCURACY:
        return f"{said}, which is enough"
    just_under = "just under " if f"{share:.0%}" == f"{MIN_ACCURACY:.0%}" else ""
    return f"{just_under}{said}, where {MIN_ACCURACY:.0%} is asked for"


def placed(score: Score) -> str:
    """Every placebo that a score lies beyond, in words, with the score's place among them."""
    assert score.p_placebo is not None, "what is beyond placebos has a place among them"
    n = round(1 / score.p_placebo) - 1  # beyond all of n the place is 1 / (n + 1)
    every, among = {1: ("the one placebo", "with one"), 2: ("both placebos", "among them")}.get(
        n, ("every placebo", "among them")
    )
    return f"beyond {every} (p = {score.p_placebo:.2g} {among})"


def first_of(row: Row) -> str:
    """The first experiment of a row's recipe: itself, or the one that `same_as` names."""
    return row.same_as or row.name


def verdict(row: Row, baseline: Row | None, twin: Row | None = None) -> Verdict | None:
    """What an experiment comes to, from its row with its corrections made; None for the baseline itself and
    for concept injection, which no row can judge.

    `baseline`: the unmodified model's row, None where there is none; `twin`: the row of this one's matched
    noise.
    """
    if row is baseline or row.control == "injection":
        return None
    # 1) what cannot be judged
    score = row.detection
    reason = _too_little(row, baseline)
    if reason or baseline is None or score is None:
        return Verdict(TOO_LITTLE, reason or "")
    if first_of(row) == first_of(baseline):
        return Verdict(NO_CHANGE, "its recipe is the unmodified model's")
    if reason := _broken(row, baseline, score):
        return Verdict(BROKEN, reason)
    # 2) what it says of its change, beyond what else explains a score
    weak = ""
    if not tells(score.controls_before):  # the run's pages have the numbers, once
        weak = WEAK if score.controls_before.n else answering(score.controls_before)
        weak += ": no answer counts as a report or a denial"
    caveat = f"; {weak}" if weak else ""
    doubts = _doubts(score, twin)
    if score.call in (REPORTS, DENIES) and not doubts:
        numbers = _numbers(score) + _support(score, twin)
        return Verdict(TOO_LITTLE, f"{weak}; not judged: {numbers}") if weak else Verdict(score.call, numbers)
    # 3) where its answers go whatever is asked
    drift = row.yes_drift
    if drift and drift.value is not None and _drifts(drift):
        word = DRIFTS_YES if drift.value > 0 else DRIFTS_NO
        return Verdict(word, f"{_drift(drift, row)}; detection: {_explained(score, doubts)}{caveat}")
    # 4) nothing of the kind
    if row.control == "placebo":
        return Verdict(NO_CHANGE, _explained(score, doubts) + caveat)
    return Verdict(SILENT, _explained(score, doubts) + _beside(row, baseline) + caveat)


def _too_little(row: Row, baseline: Row | None) -> str | None:
    score = row.detection
    if row.status != "done":
        return f"the experiment failed: {row.error.type}" if row.error else "the experiment failed"
    if baseline is None:
        return NO_BASELINE
    if score is None:
        return "it and the unmodified model were not both asked the Yes/No probes"
    return "; ".join([score.reason, *score.flags]) if score.cause == "too few probes" else None


def lacking(row: Row) -> str | None:
    """In a few words, why there is too little data for another verdict; None where the verdict is another, or
    the experiment failed, which is told as such.

    The verdict's reason has the numbers.
    """
    if row.verdict is None or row.verdict.word != TOO_LITTLE or row.status != "done":
        return None
    if row.detection is None:
        return "no baseline" if row.verdict.reason == NO_BASELINE else "Yes/No not asked"
    return _too_few(row.detection) or UNCERTAIN


def _too_few(score: DetectionScore) -> str | None:
    """Of what a score had too few, if that is why there is none."""
    if score.cause != "too few probes":
        return None
    # without as many controls as it takes, no questions about itself are looked at
    return "too few questions about itself" if score.n_controls else "too few control questions"


def lacking_for(score: DetectionScore) -> str | None:
    """`lacking`, of a score that stands by itself (one answer format, the trigger's questions, a concept's
    injection), whose call nothing but it decides; None where the call can be taken as it is."""
    if score.call in (REPORTS, DENIES) and not tells(score.controls_before):
        return UNCERTAIN
    return _too_few(score)


def called(score: DetectionScore) -> str:
    """The call of a score that stands by itself; too little data, with the reason."""
    why = lacking_for(score)
    return f"{TOO_LITTLE}: {why}" if why else score.call


def _broken(row: Row, baseline: Row, score: Score) -> str | None:
    before, after = (r.perplexity.perplexity if r.perplexity else None for r in (baseline, row))
    if score.call in UNMEASURED:
        return score.reason
    if row.perplexity and after is None:
        return "its perplexity is undefined"
    if before and after and after > MAX_PERPLEXITY_RATIO * before:
        return (
            f"perplexity {after:.4g}, over {MAX_PERPLEXITY_RATIO} times the unmodified model's {before:.4g}"
        )
    return None


def _doubts(score: Score, twin: Row | None) -> list[str]:
    """What else may explain a score: each rule of "reports it" and "denies it" beside the call that fails."""
    noise, doubts = twin.detection if twin else None, []
    if score.beyond_placebo is False:
        doubts.append(f"a placebo scores as far from 0 (p = {score.p_placebo:.2g} among placebos)")
    if noise and score.score is not None and noise.low is not None and noise.high is not None:
        as_far = score.score <= noise.high if score.score > 0 else score.score >= noise.low
        if as_far:
            doubts.append(f"noise of the same perplexity explains it ({_range(noise)})")
    return doubts


def _support(score: Score, twin: Row | None) -> str:
    out = ""
    if score.beyond_placebo:
        out += f"; {placed(score)}"
    if twin:
        noise = twin.detection
        same = "the same" if twin.matched and twin.matched.ok else "another"
        if noise and noise.score is not None:
            out += f"; noise of {same} perplexity scores {_range(noise)}"
        else:
            out += "; its matched noise has no score"
    return f"{out}; {scaling(score)}"


def scaling(score: DetectionScore) -> str:
    """How far introspective answers would have to shrink or grow beyond controls to give the score."""
    loss = score.flattening_to_explain
    if loss is not None and loss > MAX_PERCENT:
        return (
            f"its answers would have to lose {loss:.0f} times their log-odds more than controls to explain it"
        )
    if loss is not None:
        return f"its answers would have to lose {loss:.0%} more of their log-odds than controls to explain it"
    if score.sharpening_to_explain is not None:
        return (
            f"its answers' log-odds would have to grow {factor(score.sharpening_to_explain)} times as much as"
            f" controls' to explain it{_growth(score)}"
        )
    return "no shrinking or growing of its answers explains it"


def factor(times: float) -> str:
    """A factor in words' precision: two decimals under 10, none above, where they say nothing."""
    return f"{times:.2f}" if times < 9.995 else f"{times:,.0f}"


def _growth(score: DetectionScore) -> str:
    return "" if score.flattening is None else f" (controls' change to {1 + score.flattening:.2f} times)"


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


def _drifts(drift: Drift) -> bool:
    if drift.value is None or drift.low is None or drift.high is None:
        return False
    return _significant(drift) and abs(drift.value) >= MIN_EFFECT and not drift.low <= 0 <= drift.high


def _drift(drift: Drift, row: Row) -> str:
    """The move of all answers about itself; and the published probe's, where that goes the other way."""
    after = "" if drift.p_adjusted is None else " after Holm"
    shift = row.published_probe.shift if row.published_probe else None
    other = ""
    if shift is not None and shift * (drift.value or 0.0) < 0:
        other = f"; the published question alone moves {shift:+.2f}"
    return (
        f"its answers about itself move {abs(drift.value or 0.0):.2f} nats towards"
        f" {'Yes' if (drift.value or 0.0) > 0 else 'No'} ({drift.low:+.2f} to {drift.high:+.2f}),"
        f" p = {_p(drift):.2g}{after}, over {drift.n} questions, whatever they are keyed{other}"
    )


def _explained(score: Score, doubts: list[str]) -> str:
    if score.call in (REPORTS, DENIES):
        return f"{_numbers(score)}, but {' and '.join(doubts)}"
    if score.score is None or score.low is None or score.high is None:
        return score.reason
    explained = scaling_that_explains(score.score, score.low, score.high, score.keyed_after)
    # what withholds a call that would be made otherwise
    called = _significant(score) and abs(score.score) >= MIN_EFFECT and not score.low <= 0 <= score.high
    if not called or explained is None:
        return _numbers(score)
    return (
        f"{_numbers(score)}, but {explained}{'' if score.sharpening_to_explain is None else _growth(score)}"
    )


def _beside(row: Row, baseline: Row) -> str:
    """What else was measured to change, each by its own test."""
    out, measured = [], False
    if row.capability and baseline.capability and row.capability.difference is not None:
        measured = True
        p = row.capability.p_value if row.capability.p_adjusted is None else row.capability.p_adjusted
        if p is not None and p < ALPHA:
            out.append(
                f"capability {baseline.capability.correct} to {row.capability.correct} of {row.capability.n}"
            )
    if row.perplexity and baseline.perplexity and (change := row.perplexity.nll_change):
        measured = True
        if change.low is not None and change.high is not None and not change.low <= 0 <= change.high:
            out.append(f"perplexity {baseline.perplexity.perplexity:.4g} to {row.perplexity.perplexity:.4g}")
    if row.chat and baseline.chat:
        measured = True
        for what, of in (("end", "stops"), ("are degenerate", "degenerate")):
            before, after = ((t.chat.n, getattr(t.chat, of)) for t in (baseline.chat, row.chat))
            if before[1] is None or after[1] is None:
                continue
            table = [[round(n * share), n - round(n * share)] for n, share in (before, after)]
            if fisher_p_value(table) < ALPHA:
                out.append(f"chat replies that {what}, {before[1]:.0%} to {after[1]:.0%}")
    if out:
        return f"; what did change: {', '.join(out)}"
    return "; nothing else that was measured changed beyond chance" if measured else ""
