"""Experiments on disk against the baseline: one row each, with contrasts, intervals and corrections (comparison.json)."""

from __future__ import annotations

import detection
import stats
from results import SCHEMA_VERSION, Run

BASELINE = "baseline_instruct"


def compare(run: Run, manifest: dict) -> dict:
    """One row per experiment that has run, contrasted with the baseline: what comparison.json holds."""
    results = {name: found for name in manifest["experiments"] if (found := run.load(name)) is not None}
    baseline = results.get(BASELINE)
    if baseline is not None and baseline["status"] != "done":
        baseline = None
    rows = [_row(result, baseline, manifest) for result in results.values()]
    recipes: dict[str, str] = {}
    for row, result in zip(rows, results.values(), strict=True):
        row["same_as"] = recipes.get(str(result["experiment"]["recipe"]))
        recipes.setdefault(str(result["experiment"]["recipe"]), row["name"])
    scored = [row for row in rows if row["detection"]]
    corrected = detection.correct_calls([row["detection"] for row in scored])
    for row, score in zip(scored, corrected, strict=True):
        row["detection"] = score.to_json()
    noticed = [row["trigger"]["detection"] for row in rows if row["trigger"]]
    noticed = [(found, c) for found in noticed for c in found if found[c]]
    for (found, c), score in zip(noticed, detection.correct_calls([found[c] for found, c in noticed]), strict=True):
        found[c] = score.to_json()
    adjusted = stats.holm([(row["capability"] or {}).get("p_value") for row in rows])
    for row, p in zip(rows, adjusted, strict=True):
        if row["capability"]:
            row["capability"]["p_adjusted"] = p
    return {"schema_version": SCHEMA_VERSION, "run": run.path.name, "baseline": BASELINE if baseline else None,
            "correction": "Holm, over the experiments of this run; trigger: with and without it are one family", "missing": [n for n in manifest["experiments"] if n not in results],
            "experiments": rows}


def _row(result: dict, baseline: dict | None, manifest: dict) -> dict:
    experiment, measured = result["experiment"], result["measurements"]
    row = {"name": experiment["name"], "group": experiment["group"], "change": experiment["change"], "status": result["status"],
           "error": result["error"] and {k: result["error"][k] for k in ("type", "message")}, "collapsed": experiment["collapsed"],
           "notes": experiment["notes"], "exact": result["weights"]["exact"], "seconds": result["performance"]["seconds"],
           "published_probe": None, "detection": None, "capability": None, "perplexity": None, "chat": None, "claims_change": None, "trigger": None}
    against = baseline["measurements"] if baseline and baseline is not result else {}
    if "binary" in measured:
        row["published_probe"] = _published(measured["binary"], against.get("binary"))
        if "binary" in against:
            row["detection"] = detection.detection_score(paired_probes(against["binary"], measured["binary"]), seed=manifest["protocol"]["seed"])
    if "capability" in measured:
        row["capability"] = {k: measured["capability"][k] for k in ("correct", "n", "low", "high")}
        graded = [{item["id"]: item["correct"] for item in side["items"]} for side in (against.get("capability", {"items": []}), measured["capability"])]
        shared = [id for id in graded[1] if id in graded[0]]
        if shared:
            found = stats.mcnemar_exact(*([side[id] for id in shared] for side in graded))
            row["capability"] |= {"difference": found.value, "difference_low": found.low, "difference_high": found.high, "p_value": found.p_value}
    if "perplexity" in measured:
        row["perplexity"] = {k: measured["perplexity"][k] for k in ("perplexity", "nll", "tokens")}
        if "perplexity" in against:
            row["perplexity"]["nll_change"] = _perplexity_change(against["perplexity"], measured["perplexity"])
    if "chat" in measured:
        row["chat"] = {mode: measured["chat"][mode] for mode in ("chat", "raw")}
    for suite in ("informed", "blind"):
        if suite in measured:
            row["claims_change"] = (row["claims_change"] or {}) | {suite: measured[suite]["claims_change"]}
    if "trigger" in measured:
        row["trigger"] = _trigger(measured["trigger"], against.get("trigger"), manifest["protocol"]["seed"])
    return row


def _trigger(found: dict, before: dict | None, seed: int) -> dict:
    """Rates by condition, and the detection score of the questions about triggers, read with the trigger and without."""
    scores = {c: detection.detection_score(paired_probes({"probes": before["binary"][c]}, {"probes": probes}), seed=seed) if before else None
              for c, probes in found["binary"].items()}
    return {k: found["behavior"][k] for k in ("rates", "p_name")} | {"detection": scores}


def _published(binary: dict, before: dict | None) -> dict | None:
    """The published probe's reading, and how far its log-odds moved from the baseline; None where it was not asked."""
    probe = next((p for p in binary["probes"] if p["published"]), None)
    if probe is None:
        return None
    found = {k: probe[k] for k in ("p_yes_normalized", "mass", "log_odds", "entropy", "answered")}
    old = next((p for p in before["probes"] if p["published"]), None) if before else None
    known = old and old["log_odds"] is not None and probe["log_odds"] is not None
    return found | {"shift": probe["log_odds"] - old["log_odds"] if known else None}


def paired_probes(before: dict, after: dict) -> list[detection.Probe]:
    """Binary probes of two experiments as the detection score takes them. Both wordings and framings of one question
    are one cluster: they are not independent."""
    old = {p["id"]: p for p in before["probes"]}
    return [detection.Probe(p["id"], p["kind"], p["keyed"], old[p["id"]]["log_odds"], p["log_odds"], p["framing"], p["id"].rsplit("-", 2)[0],
                        old[p["id"]]["mass"], p["mass"]) for p in after["probes"] if p["id"] in old]


def _perplexity_change(before: dict, after: dict) -> dict | None:
    """Change of the mean nats per token, bootstrapped over texts; None where a text's likelihood is undefined."""
    old = {t["id"]: t for t in before["texts"]}
    rows = [(old[t["id"]]["nll"], t["nll"], t["tokens"]) for t in after["texts"] if t["id"] in old and t["tokens"]]
    if not rows or any(x is None or y is None for x, y, _ in rows):
        return None
    found = stats.perplexity_contrast(*map(list, zip(*rows, strict=True)))
    return {"value": found.value, "low": found.low, "high": found.high}
