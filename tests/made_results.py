"""Runs made up for the tests of reports: results with numbers chosen by hand, no model behind them."""

from __future__ import annotations

import math
from pathlib import Path

from analysis.comparison import (
    Comparison,
)
from reporting.reports import compare_run
from runner.results import SCHEMA_VERSION, Run, write_json

CATEGORIES = ("arithmetic", "code")
FORMATS = ("no-yes", "letters", "letters-reversed", "rating")
BASELINES = [-3.0, -2.2, -1.5, -0.9, -0.4, 0.3, 0.8, 1.4, 2.1, 2.9]  # log-odds of the unmodified model


WEIGHTS = {"model.safetensors": {"bytes": 8, "sha256": "a" * 64}}


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
            "instruct": {"kind": "checkpoint", "path": "a/path", "revision": "r1", "files": WEIGHTS},
            "base": {"kind": "LoRA adapter", "over": "instruct", "files": WEIGHTS},
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
