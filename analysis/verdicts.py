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

from analysis.detection import MIN_EFFECT

ALPHA = 0.05
MAX_PERPLEXITY_RATIO = (
    10  # a tenth of the likelihood per token: far beyond what any working splice of a pair costs
)
MIN_ACCURACY = (
    0.6  # share of controls that the unmodified model must answer right to be able to report; half is chance
)
MIN_FLATTENING = (
    0.5  # controls of equal baseline hardly differ by half of their log-odds; see detection_score's limits
)


def verdict(row: dict, baseline: dict | None, twin: dict | None = None) -> dict | None:
    """{"word", "reason"} of an experiment's row of comparison.json, its corrections made; None for the
    baseline itself and for concept injection, which no row can judge.

    `baseline`: the unmodified model's row, None where there is none; `twin`: the row of this one's matched
    noise.
    """
    if row is baseline or row["control"] == "injection":
        return None
    if reason := _too_little(row, baseline):
        return {"word": "too little data", "reason": reason}
    if reason := _broken(row, baseline):
        return {"word": "broken", "reason": reason}
    found = row["detection"]
    weak = found["control_accuracy_before"] < MIN_ACCURACY
    caveat = (
        f"; the unmodified model answers only {found['control_accuracy_before']:.0%} of the control questions"
        " right: its Yes and No say little"
        if weak
        else ""
    )
    doubts = _doubts(row, twin)
    if found["call"] == "detects" and not doubts:
        return {
            "word": "too little data" if weak else "reports it",
            "reason": _score(found) + _support(row, twin) + caveat,
        }
    drift = row["yes_drift"]
    if _significant(drift) and drift["value"] >= MIN_EFFECT and drift["low"] > 0:
        return {
            "word": "drifts towards Yes",
            "reason": (
                f"{_drift(drift)}, whatever they are keyed; detection: {_explained(row, doubts)}{caveat}"
            ),
        }
    return {"word": "no change seen", "reason": _explained(row, doubts) + _other_way(drift) + caveat}


def _too_little(row: dict, baseline: dict | None) -> str | None:
    found = row["detection"]
    if row["status"] != "done":
        return f"the experiment failed: {row['error']['type']}" if row["error"] else "the experiment failed"
    if baseline is None:
        return "the unmodified model was not measured"
    if found is None:
        return "it and the unmodified model were not both asked the Yes/No probes"
    return "; ".join([found["reason"], *found["flags"]]) if found["cause"] == "too few probes" else None


def _broken(row: dict, baseline: dict) -> str | None:
    found, sides = (
        row["detection"],
        [r["perplexity"] and r["perplexity"]["perplexity"] for r in (baseline, row)],
    )
    if found["call"] == "not measurable":
        return found["reason"]
    if row["perplexity"] and sides[1] is None:
        return "its perplexity is undefined"
    if all(sides) and sides[1] > MAX_PERPLEXITY_RATIO * sides[0]:
        return (
            f"perplexity {sides[1]:.4g}, over {MAX_PERPLEXITY_RATIO} times the unmodified model's"
            f" {sides[0]:.4g}"
        )
    return None


def _doubts(row: dict, twin: dict | None) -> list[str]:
    """What else may explain a score: each rule of "reports it" beside the call that does not hold."""
    found, doubts = row["detection"], []
    if found["beyond_placebo"] is False:
        doubts.append(f"a placebo scores as far from 0 (p = {found['p_placebo']:.2g} among placebos)")
    if (
        twin
        and twin["detection"]
        and twin["detection"]["high"] is not None
        and found["score"] <= twin["detection"]["high"]
    ):
        doubts.append(f"noise of the same perplexity explains it ({_range(twin['detection'])})")
    share = found["flattening_to_explain"]
    if share is not None and share < MIN_FLATTENING:
        doubts.append(f"losing {share:.0%} more of their log-odds than controls lose would explain it")
    if share is None and found["keyed_after"] <= 0:
        doubts.append("the keyed answers do not stand on the noticing side")
    return doubts


def _support(row: dict, twin: dict | None) -> str:
    found, out = row["detection"], ""
    if found["beyond_placebo"]:
        out += f"; beyond every placebo (p = {found['p_placebo']:.2g} among them)"
    if twin:
        known = twin["detection"] and twin["detection"]["score"] is not None
        out += (
            f"; noise of {'the same' if twin['matched']['ok'] else 'another'} perplexity scores"
            f" {_range(twin['detection'])}"
            if known
            else "; its matched noise has no score"
        )
    share = found["flattening_to_explain"]
    return out + (
        f"; keyed answers stand at {found['keyed_after']:+.2f} nats"
        if share is None
        else f"; they would have to lose {share:.0%} more of their log-odds than controls to explain it"
    )


def _significant(found: dict | None) -> bool:
    """p < ALPHA: the adjusted one, where the row belongs to a family."""
    p = _p(found) if found else None
    return p is not None and p < ALPHA


def _p(found: dict) -> float | None:
    return found["p_value"] if found["p_adjusted"] is None else found["p_adjusted"]


def _range(found: dict) -> str:
    return f"{found['score']:+.2f}, {found['low']:+.2f} to {found['high']:+.2f}"


def _score(found: dict) -> str:
    after = "" if found["p_adjusted"] is None else " after Holm"
    return (
        f"{found['score']:+.2f} nats toward noticing beyond the controls ({found['low']:+.2f} to"
        f" {found['high']:+.2f}), p = {_p(found):.2g}{after}"
    )


def _drift(drift: dict) -> str:
    after = "" if drift["p_adjusted"] is None else " after Holm"
    return (
        f"introspective answers move {drift['value']:+.2f} nats toward Yes ({drift['low']:+.2f} to"
        f" {drift['high']:+.2f}), p = {_p(drift):.2g}{after}"
    )


def _explained(row: dict, doubts: list[str]) -> str:
    found = row["detection"]
    if found["call"] == "detects":
        return f"{_score(found)}, but {' and '.join(doubts)}"
    return _score(found) + (
        ": it denies, its answers moved away from noticing" if found["call"] == "denies" else ""
    )


def _other_way(drift: dict | None) -> str:
    if _significant(drift) and drift["value"] <= -MIN_EFFECT:
        return f"; {_drift(drift)}: a drift towards No"
    return ""
