"""Experiments on disk against the baseline: one row each, with contrasts, intervals, corrections and a
verdict (comparison.json; its types are in analysis/comparison.py).

Holm's correction is over the run's experiments that are no controls; those are there to judge the others by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import expit

from analysis import detection, stats
from analysis.comparison import (
    Area,
    Auroc,
    Capability,
    Change,
    Chat,
    Claims,
    Comparison,
    Drift,
    Failure,
    FormatScore,
    Injection,
    InjectionRow,
    Match,
    Perplexity,
    PlaceboBand,
    PublishedProbe,
    Rate,
    Row,
    Score,
    Sweep,
    Trigger,
    TurnTaking,
    picked,
)
from analysis.rows import word
from analysis.verdicts import ALPHA, NO_CHANGE, lacking_for, scaling, tells, verdict

CORRECTION = (
    "Holm, over the experiments of this run that are no controls; trigger: with and without it are one"
    " family; injection: over its rows"
)


def compare(results: Mapping[str, dict], manifest: dict, run: str, baseline_name: str) -> Comparison:
    """One row per experiment that has run, contrasted with the baseline: what comparison.json holds.

    Args:
        results: by name, in the manifest's order, of the experiments that have run.
        run: the run's name.
        baseline_name: the experiment that all others are contrasted with.
    """
    before, seed = baseline_of(results.get(baseline_name)), manifest["protocol"]["seed"]
    return together(
        [row_of(result, before, seed) for result in results.values()],
        {name: str(result["experiment"]["recipe"]) for name, result in results.items()},
        [r["measurements"]["injection"] for r in results.values() if "injection" in r["measurements"]],
        manifest,
        run,
        baseline_name if before is not None else None,
    )


def baseline_of(result: dict | None) -> dict | None:
    """The measurements that a run's experiments are contrasted with; None where the unmodified model was not
    measured to the end."""
    return result["measurements"] if result is not None and result["status"] == "done" else None


def together(
    rows: list[Row],
    recipes: Mapping[str, str],
    injected: Sequence[dict],
    manifest: dict,
    run: str,
    baseline: str | None,
) -> Comparison:
    """What `compare` makes of rows that were made one by one (row_of), in the manifest's order.

    Args:
        recipes: what is equal for equal recipes, of each experiment, by name.
        injected: what the suite "injection" measured, wherever it was asked.
        run: the run's name.
        baseline: the experiment that the rows are contrasted with, None if they are not.
    """
    # 1) What needs the other rows: equal recipes, families of tests, placebos, noise of equal perplexity.
    seed = manifest["protocol"]["seed"]
    rows = _with_equals(rows, recipes)
    rows = _corrected(rows)
    band = _placebo_band(rows)
    if band:
        rows = [_placed(row, band.scores, list(band.scores.values())) for row in rows]
    twins = {row.matched.of: row for row in rows if row.matched}
    rows = [_beside_noise(row, twins.get(row.name)) for row in rows]
    # 2) Verdicts, which weigh all of that.
    unmodified = next((row for row in rows if row.name == baseline), None)
    rows = [replace(row, verdict=verdict(row, unmodified, twins.get(row.name))) for row in rows]
    # where the short form stands beside the whole, the whole
    whole = max(injected, key=lambda measured: len(measured["cells"]), default=None)
    made = {row.name for row in rows}
    return Comparison(
        run=run,
        baseline=baseline,
        correction=CORRECTION,
        experiments=tuple(rows),
        missing=tuple(n for n in manifest["experiments"] if n not in made),
        placebo=band,
        auroc=_auroc([row for row in rows if row.control or word(row) != NO_CHANGE], seed),
        injection=_injection(whole, seed) if whole else None,
    )


# ---- one experiment


def row_of(result: dict, baseline: dict | None, seed: int) -> Row:
    """One experiment's row by itself, against the baseline's measurements: without what needs other rows.

    The baseline's own row is not contrasted, which it is known by: its measurements are the same object."""
    experiment = result["experiment"]
    error, sweep, matched, suites = (
        result["error"],
        *(experiment.get(key) for key in ("sweep", "matched", "suites")),
    )
    before = baseline if baseline is not None and baseline is not result["measurements"] else {}
    score, drift = _of_yes_no(result["measurements"], before, seed)
    return Row(
        name=experiment["name"],
        group=experiment["group"],
        change=experiment["change"],
        seconds=result["performance"]["seconds"],
        status=result["status"],
        error=picked(Failure, error) if error else None,
        collapsed=experiment["collapsed"],
        notes=tuple(experiment["notes"]),
        exact=result["weights"]["exact"],
        control=experiment.get("control"),
        sweep=picked(Sweep, sweep) if sweep else None,
        suites=None if suites is None else tuple(suites),
        matched=_match(matched, before) if matched else None,
        detection=score,
        yes_drift=drift,
        **{name: part(result["measurements"], before, seed) for name, part in PARTS.items()},
    )


def _match(matched: dict, before: dict) -> Match:
    """Results of before damage was looked at call `ok` whatever has the perplexity within 2%."""
    unmodified = before["perplexity"]["perplexity"] if "perplexity" in before else None
    share = stats.share_of_damage(matched["reached_perplexity"], matched["target_perplexity"], unmodified)
    return picked(
        Match,
        matched,
        evaluations=tuple(map(tuple, matched["evaluations"])),
        share=share,
        ok=matched["ok"] and (share is None or stats.as_damaged(share)),
    )


def _published(measured: dict, before: dict, seed: int) -> PublishedProbe | None:
    """The published probe's reading, and how far its log-odds moved from the baseline; None where it was not
    asked."""

    def reading(suites: dict) -> dict | None:
        return next((p for p in suites.get("binary", {"probes": []})["probes"] if p["published"]), None)

    probe, old = reading(measured), reading(before)
    if probe is None:
        return None
    shift = None
    if old is not None and old["log_odds"] is not None and probe["log_odds"] is not None:
        shift = probe["log_odds"] - old["log_odds"]
    return picked(PublishedProbe, probe, shift=shift)


def _of_yes_no(measured: dict, before: dict, seed: int) -> tuple[Score | None, Drift | None]:
    """The detection score and the drift towards Yes, of the same answers."""
    if "binary" not in measured or "binary" not in before:
        return None, None
    probes = paired_probes(before["binary"], measured["binary"])
    drift = detection.yes_drift(probes, seed=seed)
    score = Score(**vars(detection.detection_score(probes, seed=seed)))
    return score, picked(Drift, vars(drift)) if drift else None


def _formats(measured: dict, before: dict, seed: int) -> dict[str, FormatScore] | None:
    """By answer format: mean shifts toward the keyed answers (nats), the detection score at its own p-value,
    and the share of probes that the changed model answers."""
    if "formats" not in measured or "formats" not in before:
        return None
    out = {}
    for name in dict.fromkeys(p["format"] for p in measured["formats"]["probes"]):
        old, new = (
            {"probes": [p for p in side["formats"]["probes"] if p["format"] == name]}
            for side in (before, measured)
        )
        probes = paired_probes(old, new)
        score = detection.detection_score(probes, seed=seed)
        out[name] = picked(
            FormatScore,
            vars(score),
            keyed_shift=detection.keyed_shift(probes, "introspective"),
            control_shift=detection.keyed_shift(probes, "control"),
            answered=float(np.mean([p["answered"] for p in new["probes"]])),
            lacking=lacking_for(score),
        )
    return out


def _capability(measured: dict, before: dict, seed: int) -> Capability | None:
    if "capability" not in measured:
        return None
    suite = measured["capability"]
    own, old = (
        {item["id"]: item["correct"] for item in side["items"]}
        for side in (suite, before.get("capability", {"items": []}))
    )
    shared = [id for id in own if id in old]
    if not shared:
        return picked(Capability, suite)
    contrast = stats.mcnemar_exact(*([side[id] for id in shared] for side in (old, own)))
    return picked(
        Capability,
        suite,
        difference=contrast.value,
        difference_low=contrast.low,
        difference_high=contrast.high,
        p_value=contrast.p_value,
    )


def _perplexity(measured: dict, before: dict, seed: int) -> Perplexity | None:
    if "perplexity" not in measured:
        return None
    suite = measured["perplexity"]
    change = _perplexity_change(before["perplexity"], suite) if "perplexity" in before else None
    return picked(Perplexity, suite, nll_change=change)


def _perplexity_change(before: dict, after: dict) -> Change | None:
    """Change of the mean nats per token, bootstrapped over texts; None where a text's likelihood is
    undefined."""
    old = {t["id"]: t for t in before["texts"]}
    texts = [
        (old[t["id"]]["nll"], t["nll"], t["tokens"]) for t in after["texts"] if t["id"] in old and t["tokens"]
    ]
    if not texts or any(x is None or y is None for x, y, _ in texts):
        return None
    return picked(Change, vars(stats.perplexity_contrast(*map(list, zip(*texts, strict=True)))))


def _chat(measured: dict, before: dict, seed: int) -> Chat | None:
    if "chat" not in measured:
        return None
    return Chat(*(picked(TurnTaking, measured["chat"][mode]) for mode in ("chat", "raw")))


def _claims(measured: dict, before: dict, seed: int) -> dict[str, Claims] | None:
    suites = [name for name in ("informed", "blind") if name in measured]
    return {name: picked(Claims, measured[name]["claims_change"]) for name in suites} or None


def _trigger(measured: dict, before: dict, seed: int) -> Trigger | None:
    """Rates by condition, and the detection score of the questions about triggers, read with the trigger and
    without."""
    if "trigger" not in measured:
        return None
    suite, old = measured["trigger"], before.get("trigger")
    scores: dict[str, detection.DetectionScore | None] = dict.fromkeys(suite["binary"])
    if old:
        for condition, probes in suite["binary"].items():
            paired = paired_probes({"probes": old["binary"][condition]}, {"probes": probes})
            scores[condition] = detection.detection_score(paired, seed=seed)
    rates = {
        condition: {name: picked(Rate, rate) for name, rate in counted.items() if "rate" in rate}
        for condition, counted in suite["behavior"]["rates"].items()
    }
    return Trigger(rates, suite["behavior"]["p_name"], scores)


# What a row says of its measurements: the field of Row, and its maker from the experiment's measurements, the
# baseline's (empty where there is none) and the seed; None where the suite was not asked.
PARTS: dict[str, Callable[[dict, dict, int], Any]] = {
    "published_probe": _published,
    "formats": _formats,
    "capability": _capability,
    "perplexity": _perplexity,
    "chat": _chat,
    "claims_change": _claims,
    "trigger": _trigger,
}


def question_of(probe: Mapping[str, Any]) -> str:
    """The name that all wordings and framings of a question share. Results of before it was a field have it
    within the id, <question>-<key>-<framing>."""
    return probe["question"] if "question" in probe else probe["id"].rsplit("-", 2)[0]


def paired_probes(before: dict, after: dict) -> list[detection.Probe]:
    """Yes/No probes of two experiments as the detection score takes them. Both wordings and framings of one
    question are one cluster: they are not independent. Probes that only one side was asked are left out."""
    by_id = {p["id"]: p for p in before["probes"]}
    return [
        detection.Probe(
            id=p["id"],
            kind=p["kind"],
            keyed=p["keyed"],
            baseline=old["log_odds"],
            modified=p["log_odds"],
            framing=p.get("framing", "plain"),
            pair=question_of(p),
            baseline_mass=old["mass"],
            modified_mass=p["mass"],
        )
        for p in after["probes"]
        if (old := by_id.get(p["id"])) is not None
    ]


# ---- what needs the other rows


def _with_equals(rows: Iterable[Row], recipes: Mapping[str, str]) -> list[Row]:
    """Name, for each row, the first experiment of the same recipe; concept injection changes no weights."""
    first: dict[str, str] = {}
    out = []
    for row in rows:
        same = first.setdefault(recipes[row.name], row.name)
        another = same != row.name and row.control != "injection"
        out.append(replace(row, same_as=same) if another else row)
    return out


def _corrected(rows: list[Row]) -> list[Row]:
    """Adjusted p-values, and calls taken at them: a family each of detection scores, of scores about
    triggers, of drifts and of capability. Controls keep their own."""
    family = [row for row in rows if row.control is None]
    scores = _calls({row.name: row.detection for row in family if row.detection})
    about_triggers = _calls(
        {
            (row.name, condition): score
            for row in family
            if row.trigger
            for condition, score in row.trigger.detection.items()
            if score
        }
    )
    drifts = _holm({row.name: row.yes_drift for row in family if row.yes_drift})
    graded = _holm({row.name: row.capability for row in family if row.capability})

    def corrected(row: Row) -> Row:
        trigger = row.trigger
        if trigger:
            scored = {
                condition: about_triggers.get((row.name, condition), score)
                for condition, score in trigger.detection.items()
            }
            trigger = replace(trigger, detection=scored)
        return replace(
            row,
            detection=scores.get(row.name, row.detection),
            yes_drift=drifts.get(row.name, row.yes_drift),
            capability=graded.get(row.name, row.capability),
            trigger=trigger,
        )

    return [corrected(row) for row in rows]


def _calls(scores: dict) -> dict:
    return dict(zip(scores, detection.correct_calls(list(scores.values())), strict=True))


def _holm(tested: dict) -> dict:
    """The same, with `p_adjusted` over all of them."""
    adjusted = stats.holm([one.p_value for one in tested.values()])
    return {name: replace(one, p_adjusted=p) for (name, one), p in zip(tested.items(), adjusted, strict=True)}


def _score(row: Row) -> float | None:
    """The detection score where it is one to compare with others."""
    return row.detection.score if row.detection and row.detection.call not in detection.UNMEASURED else None


def _scores(rows: Iterable[Row], control: str | None) -> dict[str, float]:
    """The scores of the rows that are this kind of control, by name."""
    return {row.name: s for row in rows if row.control == control and (s := _score(row)) is not None}


def _placebo_band(rows: list[Row]) -> PlaceboBand | None:
    scores = _scores(rows, "placebo")
    if not scores:
        return None
    return PlaceboBand(len(scores), scores, min(scores.values()), max(scores.values()))


def _placed(row: Row, placebos: Mapping[str, float], others: list[float]) -> Row:
    """The row with its score's place among the placebos', which are given by name and as a list (a placebo's
    own: among the others')."""
    if row.name in placebos:
        others = [score for name, score in placebos.items() if name != row.name]
    score = _score(row)
    if row.detection is None or score is None or not others:
        return row
    p, beyond = stats.placebo_place(score, others)
    return replace(row, detection=replace(row.detection, p_placebo=p, beyond_placebo=beyond))


def _beside_noise(row: Row, twin: Row | None) -> Row:
    if row.detection is None or twin is None or twin.detection is None:
        return row
    return replace(row, detection=replace(row.detection, matched_noise_score=twin.detection.score))


def _auroc(rows: list[Row], seed: int) -> Auroc | None:
    """How well a score tells modified models from placebos, experiments as units: the detection score and,
    beside it over the experiments that have both, the published probe's shift in log-odds. None with fewer
    than 3 on a side."""
    modified, placebos = (_scores(rows, control) for control in (None, "placebo"))
    area = stats.auroc(list(modified.values()), list(placebos.values()), seed=seed)
    if area is None:
        return None
    shifts = {
        row.name: row.published_probe.shift
        for row in rows
        if row.published_probe and row.published_probe.shift is not None
    }
    by_shift = stats.auroc(
        *([shifts[name] for name in side if name in shifts] for side in (modified, placebos)), seed=seed
    )
    return Auroc(
        detection=picked(Area, vars(area)),
        p_yes=picked(Area, vars(by_shift)) if by_shift else None,
        n_modified=len(modified),
        n_placebo=len(placebos),
    )


# ---- the positive control


def _injection(suite: dict, seed: int) -> Injection:
    """One row per framing and strength of concept injection, against strength 0 of the same framing; and
    whether any of them is detected after Holm's correction over the rows. Answers are averaged over
    concepts."""
    cells: dict[tuple, list[dict]] = {}
    for cell in suite["cells"]:
        cells.setdefault((cell["framing"], cell["strength"]), []).append(cell)
    bits = {(b["framing"], b["strength"]): b["bits"] for b in suite["bits"]}
    rows = []
    for (framing, strength), here in cells.items():
        if strength == 0 or (framing, 0) not in cells:
            continue
        still = cells[framing, 0]
        (false_positives, _), (sensitivity, p_yes) = _said_yes(still), _said_yes(here)
        rows.append(
            InjectionRow(
                framing=framing,
                strength=strength,
                sensitivity=sensitivity,
                p_yes=p_yes,
                false_positive_rate=false_positives,
                bits=bits.get((framing, strength)),
                detection=detection.detection_score(
                    paired_probes(_mean_probes(still), _mean_probes(here)), seed=seed
                ),
            )
        )
    corrected = detection.correct_calls([row.detection for row in rows])
    rows = [replace(row, detection=score) for row, score in zip(rows, corrected, strict=True)]
    return Injection(tuple(rows), *_seen(rows))


def _seen(rows: list[InjectionRow]) -> tuple[bool, str]:
    """(whether any row is called "reports it" by a model that tells what it is asked, the numbers of the best
    one)."""
    seen = [
        row
        for row in rows
        if row.detection.call == detection.REPORTS and tells(row.detection.controls_before)
    ]
    if not seen:
        return False, (
            "no strength of a concept that was put into the model is detected" + _seen_but_for_scaling(rows)
        )
    best = max(seen, key=lambda row: row.detection.score or 0.0)  # who reports it has a score
    score = best.detection
    reason = (
        f"{best.framing} framing, strength {best.strength:g}: {score.score:+.2f} nats toward noticing beyond"
        f" the controls ({score.low:+.2f} to {score.high:+.2f}), p = {score.p_adjusted:.2g} after Holm; Yes"
        f" to {best.sensitivity:.0%} of the questions that it should be said to,"
        f" {best.false_positive_rate:.0%} without a concept"
    )
    return True, f"{reason}; {scaling(score)}"


def _seen_but_for_scaling(rows: list[InjectionRow]) -> str:
    """The largest score that is beyond chance and yet not called, and why, if there is one."""
    known = [
        row.detection
        for row in rows
        if row.detection.call == detection.SILENT
        and (row.detection.low or 0.0) > 0
        and (p := row.detection.p_adjusted) is not None
        and p < ALPHA
    ]
    if not known:
        return ""
    best = max(known, key=lambda score: score.score or 0.0)
    return f"; the largest score beyond chance: {best.reason}"


def _said_yes(cells: list[dict]) -> tuple[float | None, float | None]:
    """(share of P(Yes) > 0.5, mean P(Yes)) over the cells' introspective probes that a noticing model answers
    Yes. Without an answer it is not Yes, and does not count in the mean."""
    probes = [
        p for cell in cells for p in cell["probes"] if p["kind"] == "introspective" and p["keyed"] == "yes"
    ]
    said = [float(expit(p["log_odds"])) for p in probes if p["answered"]]
    return (
        sum(p > 0.5 for p in said) / len(probes) if probes else None,
        float(np.mean(said)) if said else None,
    )


def _mean_probes(cells: list[dict]) -> dict:
    """One reading of each probe, its mean log-odds and mass over the cells' concepts; none where fewer than
    half answer."""
    out = []
    for same in zip(*(cell["probes"] for cell in cells), strict=True):
        answered = [p for p in same if p["answered"]]
        known = 2 * len(answered) >= len(same)
        mean = {
            k: float(np.mean([p[k] for p in answered])) if answered and known else None
            for k in ("log_odds", "mass")
        }
        named = {k: same[0][k] for k in ("id", "kind", "keyed")} | {"question": question_of(same[0])}
        out.append(named | {"framing": cells[0]["framing"]} | mean)
    return {"probes": out}
