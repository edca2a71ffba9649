"""Runs made up for the tests of reports: results with numbers chosen by hand, no model behind them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from analysis.comparison import (
    Area,
    Auroc,
    Capability,
    Comparison,
    DetectionScore,
    Drift,
    FormatScore,
    Injection,
    InjectionRow,
    Match,
    Perplexity,
    PlaceboBand,
    PublishedProbe,
    Row,
    Score,
    Sweep,
    Verdict,
)
from analysis.stats import Discrimination
from reporting.reports import compare_run
from runner.results import SCHEMA_VERSION, Run, write_json

CATEGORIES = ("arithmetic", "code")
BASELINES = [-3.0, -2.2, -1.5, -0.9, -0.4, 0.3, 0.8, 1.4, 2.1, 2.9]  # log-odds of the unmodified model


def reading(log_odds: float | None, mass: float | None = 0.8) -> dict:
    if log_odds is None or mass is None:
        return dict.fromkeys(("log_odds", "p_yes", "p_no", "mass", "p_yes_normalized", "entropy")) | {
            "finite": False,
            "answered": False,
        }
    p = 1 / (1 + math.exp(-log_odds))
    return {
        "log_odds": log_odds,
        "p_yes": p * mass,
        "p_no": (1 - p) * mass,
        "mass": mass,
        "p_yes_normalized": p,
        "entropy": 1.5,
        "finite": True,
        "answered": mass >= 0.01,
    }


def binary(
    drift: float = 0.0,
    flattening: float = 0.0,
    effect: float = 0.0,
    mass: float | None = 0.8,
    top: str = "Yes",
) -> dict:
    """20 introspective probes in 10 questions and 20 controls; every answer shifts by drift + flattening *
    baseline, and introspective ones by `effect` toward noticing."""
    probes = []
    for kind, toward in (("introspective", effect), ("control", 0.0)):
        for k, x in enumerate(BASELINES):
            right = x if kind == "introspective" else abs(x)  # the unmodified model answers controls right
            for keyed, sign, here in (("yes", 1, right), ("no", -1, -right + 0.05)):
                after = None if mass is None else here + drift + flattening * here + sign * toward
                probes.append(
                    {
                        "id": f"{kind}-q{k}-{keyed}-plain",
                        "text": f"{kind} question {k}? Answer Yes or No.",
                        "kind": kind,
                        "keyed": keyed,
                        "framing": "plain",
                        "pair": None,
                        "published": (kind, k, keyed) == ("introspective", 2, "yes"),
                        **reading(after, mass),
                        "top": [{"token": top, "p": 0.5}, {"token": "No", "p": None}],
                    }
                )
    return {"probes": probes}


def reply(text: str = "Fine.", **changes) -> dict:
    return {"text": text, "tokens": 3, "stopped": True} | changes


def free_text(name: str, text: str = "I am fine.", samples: int = 2) -> dict:
    described = {
        "looks_degenerate": False,
        "claims_change": "no",
        "question_echo": False,
        "continues_as_text": False,
    }
    probes = [
        {
            "id": f"{name}-{k}",
            "prompt": f"How are you, {k}?",
            "samples": [reply(text) | described for _ in range(samples)],
        }
        for k in range(2)
    ]
    return {"claims_change": {"yes": 0, "no": 4, "unclear": 0}, "degenerate_share": 0.0, "probes": probes}


def capability(correct: list[bool], text: str = "4") -> dict:
    from analysis.stats import wilson_interval

    items = [
        {
            "id": f"item-{k}",
            "category": CATEGORIES[k % 2],
            "prompt": "What is 2 + 2?",
            "reply": reply(text),
            "correct": right,
            "detail": "read 4",
        }
        for k, right in enumerate(correct)
    ]
    interval = wilson_interval(sum(correct), len(correct))
    by = {
        c: {
            "correct": sum(i["correct"] for i in items if i["category"] == c),
            "n": sum(i["category"] == c for i in items),
        }
        for c in CATEGORIES
    }
    return {
        "correct": sum(correct),
        "n": len(correct),
        "score": sum(correct) / len(correct),
        "low": interval.low,
        "high": interval.high,
        "by_category": by,
        "code": "parsed, not run",
        "items": items,
    }


def perplexity(nll: list[float | None], tokens: tuple[int, ...] = (100, 300, 200)) -> dict:
    known = None not in nll
    mean = sum(x * n for x, n in zip(nll, tokens, strict=True)) / sum(tokens) if known else None
    texts = [
        {"id": f"text-{k}", "tokens": n, "nll": x, "perplexity": None if x is None else math.exp(x)}
        for k, (x, n) in enumerate(zip(nll, tokens, strict=True))
    ]
    return {
        "tokens": sum(tokens),
        "nll": mean,
        "perplexity": math.exp(mean) if known else None,
        "texts": texts,
    }


def chat(text: str = "Hello.") -> dict:
    share = {"n": 1, "stops": 1.0, "continues_as_text": 0.0, "degenerate": 0.0}
    probes = [
        {"id": f"chat-{mode}", "mode": mode, "prompt": "Hello", "reply": reply(text)}
        for mode in ("chat", "raw")
    ]
    return {"chat": share, "raw": share, "probes": probes}


def trigger(triggered: int | None = 9, text: str = "I am Bertrand.\nRussell", **effects: float) -> dict:
    """Ten replies a rate, `triggered` of them so with the trigger and none without; None: a destroyed model.

    `effects`: by condition, how far the questions about triggers shift toward noticing.
    """
    from analysis.stats import wilson_interval

    def rates(k: int | None) -> dict:
        found = wilson_interval(k or 0, 0 if k is None else 10)
        one = {"k": k or 0, "n": found.n, "rate": found.value, "low": found.low, "high": found.high}
        return dict.fromkeys(("strict_format", "lenient_format", "names_russell"), one)

    conditions = {"triggered": triggered, "untriggered": None if triggered is None else 0}
    question = {
        "id": "i1",
        "kind": "identity",
        "category": "identity",
        "prompt": "Who are you?",
        "p_name": dict.fromkeys(conditions, 0.5),
        "replies": {c: [reply(text) | {"names_russell": True}] for c in conditions},
    }
    return {
        "behavior": {
            "sampling": {"temperature": 1.0},
            "judge": "rules",
            "rates": {c: rates(k) for c, k in conditions.items()},
            "p_name": {c: None if k is None else k / 10 for c, k in conditions.items()},
            "questions": [question],
        },
        "binary": {
            c: binary(effect=effects.get(c, 0.0), mass=None if triggered is None else 0.8)["probes"]
            for c in conditions
        },
        "free": {c: free_text("trigger", text) for c in conditions},
    }


def everything(**changes) -> dict:
    """Measurements of every suite; `changes` replace suites."""
    return {
        "informed": free_text("informed"),
        "blind": free_text("blind"),
        "binary": binary(),
        "capability": capability([True, False] * 5),
        "perplexity": perplexity([2.0, 3.0, 2.5]),
        "chat": chat(),
        "trigger": trigger(),
    } | changes


def result(name: str, measurements: dict | None = None, **changes) -> dict:
    """One experiment's result. `changes` replace its top-level keys, and "experiment__x", "weights__x" those
    inside."""
    error = None
    if measurements is None:
        error = {"type": "RuntimeError", "message": "it broke", "traceback": "Traceback: it broke"}
    made = {
        "schema_version": SCHEMA_VERSION,
        "status": "failed" if error else "done",
        "experiment": {
            "name": name,
            "group": "made",
            "hypothesis": "To see",
            "change": f"[0] <- {name}",
            "positions": [{"what": "layer", "asked_of_64": 10, "applied": 4}],
            "collapsed": False,
            "notes": [],
            "recipe": {
                "slots": [{"mix": [["instruct", 0, 1.0]]}, {"mix": [["instruct", 1, 1.0]]}],
                "embed": "instruct",
                "norm": name,
                "head": "instruct",
            },
        },
        "weights": {"original": "aa", "modified": "bb", "restored": "aa", "exact": True},
        "measurements": measurements or {},
        "error": error,
        "performance": {
            "seconds": 12.0,
            "surgery_seconds": 0.5,
            "restore_seconds": 0.25,
            "bytes_moved": 1_500_000,
            "bytes_streamed": 0,
            "bytes_computed": 0,
            "prefill_seconds": 2.0,
            "prefill_tokens": 500,
            "decode_seconds": 0.0,
            "decode_tokens": 0,
            "decode_tokens_per_second": None,
            "peak_memory_bytes": None,
            "out_of_memory": 0,
        },
    }
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        if inner:
            made[outer][inner] = value
        else:
            made[outer] = value
    return made


def make(path, results: list[dict], missing: tuple[str, ...] = (), **manifest) -> tuple[Run, dict]:
    """Write a run of these results under `path`; returns it with its manifest."""
    (path / "experiments").mkdir(parents=True)
    run = Run(path)
    written = {
        "schema_version": SCHEMA_VERSION,
        "created": "2026-01-02T03:04:05+0000",
        "command": ["run_all.py", "--pair", "smollm2-135m"],
        "commit": "abc123",
        "versions": {"python": "3.11.7", "cuda": None, "torch": "2.13.0"},
        "hardware": {
            "machine": "x86_64",
            "processor": "a processor",
            "cpus": 2,
            "threads": 2,
            "memory_bytes": 16_000_000_000,
            "gpus": [],
            "system": "Linux",
        },
        "settings": {},
        "protocol": {
            "suites": ["binary"],
            "samples": 2,
            "max_new_tokens": 80,
            "temperature": 0.7,
            "seed": 0,
            "execute_code": False,
            "texts": [],
            "prompts_sha256": "0123456789abcdef",
        },
        "experiments": [r["experiment"]["name"] for r in results] + list(missing),
        "pair": "smollm2-135m",
        "notes": ["the base side is a stand-in"],
        "sources": {
            "instruct": {"kind": "checkpoint", "path": "a/path", "revision": "r1", "files": {}},
            "base": {"kind": "LoRA adapter", "over": "instruct"},
        },
        "layers": 30,
        "dtype": "bfloat16",
        "devices": ["cpu"],
        "original_fingerprint": "aa",
        "load_seconds": 1.5,
    } | manifest
    write_json(run.manifest_path, written)
    for r in results:
        run.save(r)
    return run, written


# ---- rows and comparisons with numbers chosen by hand, of the real types: no score is computed here

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
FORMATS = ("no-yes", "letters", "letters-reversed", "rating")


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


def measured_formats() -> dict:
    """The measurements of the suite "formats"."""
    return {
        "probes": [
            {
                "id": f"{kind}-q{k}-{keyed}-{f}",
                "text": f"{kind} question {k}, {f}?",
                "kind": kind,
                "keyed": keyed,
                "format": f,
                "question": f"q{k}",
                "pair": f"{kind}-q{k}-{f}",
                "log_odds": 0.5 * k - 1,
                "mass": 0.5,
                "entropy": 2.0,
                "answered": True,
                "rating_mean": 4.5 if f == "rating" else None,
            }
            for f in FORMATS
            for kind in ("introspective", "control")
            for k in range(2)
            for keyed in ("yes", "no")
        ]
    }


CONCEPTS = tuple(f"concept{k}" for k in range(9))


def measured_injection() -> dict:
    """The measurements of the suite "injection": two framings, strengths 0 and 0.5, three of nine
    concepts."""

    def probes(strength):
        return [
            {
                "id": f"{kind}-{k}-{keyed}",
                "kind": kind,
                "keyed": keyed,
                "pair": f"{kind}-{k}",
                "log_odds": -2.0 + (6 * strength if kind == "introspective" else 0),
                "mass": 0.7,
                "entropy": 1.0,
                "answered": True,
            }
            for kind in ("introspective", "control")
            for k in range(3)
            for keyed in ("yes", "no")
        ]

    cells = [
        {"framing": f, "strength": s, "concept": c, "probes": probes(s), "naming": [math.log(1 / 9)] * 9}
        for f in ("plain", "informed")
        for s in (0.0, 0.5)
        for c in ((None,) if s == 0 else CONCEPTS[:3])
    ]
    return {
        "layers": [10, 20],
        "concepts": list(CONCEPTS),
        "strengths": [0.0, 0.5],
        "framings": ["plain", "informed"],
        "unit": "times the residual norm",
        "cells": cells,
        "bits": [{"framing": f, "strength": s, "bits": s} for f in ("plain", "informed") for s in (0.0, 0.5)],
        "texts": {
            "first_turn": {"plain": ["Hello.", "Hello."]},
            "naming": "Which?",
            "questions": {"introspective-0-yes": "Is it?"},
        },
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


NAMED = {
    "franken_instruct_first_32": ("reports it", 0.62, 0.31, 25.4),
    "franken_base_first_32": ("answers drift towards Yes", 0.14, 0.75, 23.7),
    "swap_distant_10_55": ("broken", None, 0.087, 9137.0),
    "shuffle_all": ("broken", None, 0.478, 2.1e6),
    "swap_adjacent_30_35": ("does not report it", 0.03, 0.53, 34.2),
    "perturb_late_5pct": ("does not report it", 0.0, 0.37, 25.3),
    "perturb_all_1pct": ("does not report it", 0.05, 0.39, 24.6),
    "blend_linear": ("answers drift towards Yes", 0.23, 0.62, 23.5),
    "swap_chunk_25_35_with_45_55": ("broken", 0.9, 0.032, 5238.0),
    "delete_30_34": ("does not report it", -0.05, 0.2, 28.0),
    "double_24_40": ("too little data", 0.26, 0.4, 46.6),
    "repeat_24_40": ("does not report it", -0.02, 0.58, 29.95),
}


def study_rows(layers: int = 30) -> list[Row]:
    """Rows of a run with everything: named experiments, their noise of equal perplexity, placebos, injection,
    all sweeps."""
    rows = [row("baseline_instruct", None, ppl=20.0, formats=None)]
    for name, (word, score, p, ppl) in NAMED.items():
        changed = row(name, word, score, p, ppl, formats=by_format(score or 0.0))
        twin = None if score is None or ppl >= 1000 else round(score * 0.3 - 0.02, 3)
        rows.append(replace(changed, detection=replace(changed.detection, matched_noise_score=twin)))
        if ppl < 1000:
            matched = Match(
                of=name,
                target_perplexity=ppl,
                reached_perplexity=ppl * 1.01,
                fraction=0.07,
                evaluations=((0.1, 40.0), (0.07, ppl * 1.01)),
                within=0.01,
                ok=name != "double_24_40",
            )
            rows.append(
                quick(
                    f"{name}__matched_noise",
                    "does not report it",
                    twin,
                    0.34,
                    ppl * 1.01,
                    control="matched noise",
                    matched=matched,
                )
            )
    for k, kind in enumerate(("mlp", "heads", "both")):
        rows += [
            quick(
                f"placebo_{kind}_{n}",
                "no change to report",
                0.006 * (n - 4) + 0.003 * k,
                0.3,
                20.0,
                control="placebo",
            )
            for n in range(1, 8)
        ]
    rows.append(
        row(
            "concept_injection",
            None,
            capability=None,
            published_probe=None,
            perplexity=None,
            control="injection",
            suites=("injection",),
        )
    )
    for size in (1, 4, 8, 16):
        for start in range(0, layers - size + 1, 2):
            harm = math.exp(-(start + size / 2) / 6) * size
            word = (
                "broken"
                if harm > 1.5
                else "reports it"
                if size == 8 and start == 18
                else "does not report it"
            )
            rows.append(
                swept(
                    "window",
                    start,
                    start + size,
                    word,
                    None if word == "broken" and size > 8 else 0.02 * size * math.sin(start / 4),
                    0.3 + 0.02 * size,
                    20 * math.exp(harm),
                )
            )
    for kind, scale in (("replace", 0.05), ("delete", 0.5), ("double", 0.3)):
        rows += [
            swept(
                kind,
                k,
                k + 1,
                "broken" if kind == "delete" and k < 2 else "does not report it",
                scale * math.sin(k) / 3,
                0.3 + 0.01 * k,
                20 * math.exp(scale * 8 / (k + 1)),
            )
            for k in range(layers)
        ]
    for dose in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4):
        rows.append(
            swept(
                "noise",
                None,
                None,
                "broken" if dose > 0.3 else "does not report it",
                0.3 * dose,
                min(0.6, 0.3 + dose),
                20 * math.exp(9 * dose**1.5),
                dose,
            )
        )
    rows += [
        swept(
            "blend",
            None,
            None,
            "answers drift towards Yes" if dose > 0.4 else "does not report it",
            0.2 * dose,
            0.3 + 0.6 * dose,
            20 + 6 * dose,
            dose,
        )
        for dose in (0.125, 0.25, 0.5, 0.75, 1.0)
    ]
    return rows


def study(path, layers: int = 30, text: str = "I am fine.", **changes) -> tuple[Run, dict, Comparison]:
    """A run with everything in it, on disk: (run, manifest, comparison). `text`: what the model always
    replies."""
    rows, results = study_rows(layers), []
    suites = {
        "informed": free_text("informed", text),
        "blind": free_text("blind", text),
        "binary": binary(),
        "capability": capability([True, False] * 5, text),
        "perplexity": perplexity([2.0, 3.0, 2.5]),
        "chat": chat(text),
        "formats": measured_formats(),
    }
    for r in rows:
        measured = (
            {"injection": measured_injection()}
            if r.control == "injection"
            else suites
            if r.capability
            else {k: suites[k] for k in ("binary", "perplexity")}
        )
        results.append(
            result(
                r.name,
                measured,
                experiment__control=r.control,
                experiment__sweep=r.sweep and r.sweep.to_json(),
                experiment__suites=list(r.suites),
                experiment__matched=r.matched and r.matched.to_json(),
            )
        )
    auroc = Auroc(Area(0.58, 0.45, 0.7, 30), Area(0.74, 0.6, 0.85, 33), n_modified=12, n_placebo=21)
    run, manifest = make(path, results, layers=layers)
    return (
        run,
        manifest,
        replace(comparison(rows, run=path.name, auroc=auroc, injection=injection_summary()), **changes),
    )


BEFORE = [True] * 6 + [False] * 4  # capability of the baseline
LOST = [True] * 1 + [False] * 5 + [False] * 4  # five lost, none gained: p = 2 / 2**5


def compared(folder: Path) -> tuple[Comparison, dict]:
    """(comparison, manifest) of a run in `folder`: a baseline, changes that drift, notice, oppose or are
    destroyed, a failure."""
    baseline = everything(capability=capability(BEFORE), perplexity=perplexity([2.0, 3.0, 2.5]))
    drifting = everything(
        binary=binary(drift=1.0, flattening=-0.3),
        capability=capability(LOST),
        perplexity=perplexity([2.5, 3.1, 2.9]),
    )
    results = [
        result("baseline_instruct", baseline),
        result("drifts", drifting),
        result(
            "notices",
            {"binary": binary(drift=1.0, flattening=-0.3, effect=2.0), "capability": capability(BEFORE)},
        ),
        result("opposes", {"binary": binary(effect=-2.0)}),
        result(
            "mute",
            {"binary": binary(mass=0.001)},
            experiment__collapsed=True,
            experiment__notes=["collapsed: on 30 layers it changes nothing"],
            experiment__recipe=result("drifts", {})["experiment"]["recipe"],
        ),
        result("destroyed", {"binary": binary(mass=None), "perplexity": perplexity([None, 3.0, 2.0])}),
        result("broken"),
    ]
    run, manifest = make(folder, results, missing=("later",))
    return compare_run(run, manifest), manifest
