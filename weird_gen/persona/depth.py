"""The model that carries the adapter, changed: where in depth the persona lives and what it survives;
eval_surgery.py.

Every change is a recipe over two sources, the model as it is and the same model with the adapter added in.
Each is asked the trigger suite's questions with the trigger, without it and under a neutral system prompt,
and plain texts say how much of the model itself a change leaves. One JSON line a reply after a header, in a
journal that an interrupted run goes on with.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace

from engine.generation import Engine
from errors import FrankenError, RecipeError, nearest, printable
from evaluate import evaluate as measure
from suites.base import Protocol
from surgery.recipes import (
    Mixing,
    Recipe,
    Ref,
    Slot,
    blend,
    delete,
    identity,
    permute_units,
    perturb,
    splice,
)
from weird_gen.persona.journal import Case, Journal, complete_cases
from weird_gen.persona.likelihoods import name_probabilities
from weird_gen.persona.loading import SOURCE, locate_adapter, open_for
from weird_gen.persona.records import ASKED
from weird_gen.persona.study import prompt, sha256
from weird_gen.persona.suite import every_question

PARTS = 8  # windows into which the depth is cut
WHOLE, PLACEBO, NOISE = "whole", "placebo", "noise"
ONLY, MISSING, DELETED = "adapter only in", "adapter missing in", "deleted"
WEAKER, MODULES = "adapter scaled", "adapter only on"
GROUPS = (WHOLE, ONLY, MISSING, MODULES, WEAKER, DELETED, NOISE, PLACEBO)
SCALES = (0.25, 0.5, 0.75, 1.5)
NOISES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
QUARTER_NOISE = 0.2
PLAIN = "plain texts"  # the question_id of the line that closes a change


@dataclass(frozen=True)
class Change:
    """What is made of the model. layers: the [start, stop) that it is about, where it is about some; level:
    the adapter's scale or the noise, as a share."""

    name: str
    group: str
    recipe: Recipe
    layers: tuple[int, int] | None = None
    level: float | None = None


def _windows(n: int) -> list[tuple[int, int]]:
    """Halves, quarters, eighths, then what leads up to and on from each eighth's boundary; none twice."""
    cuts = [round(k * n / PARTS) for k in range(PARTS + 1)]
    blocks = [
        (cuts[k], cuts[k + step])
        for step in (PARTS // 2, PARTS // 4, PARTS // 8)
        for k in range(0, PARTS, step)
    ]
    ends = [(0, cut) for cut in cuts[1:-1]] + [(cut, n) for cut in cuts[1:-1]]
    return [(a, b) for a, b in dict.fromkeys(blocks + ends) if a < b and (a, b) != (0, n)]


def _only_on(n: int, part: str) -> Recipe:
    """The adapter on the tensors whose name holds `part` alone."""
    mixing = Mixing(by_name=((part, (0.0, 1.0)),))
    slots = tuple(Slot(((Ref("instruct", p), 1.0), (Ref(SOURCE, p), 0.0)), mixing=mixing) for p in range(n))
    return replace(identity(n, "instruct"), slots=slots)


def changes(n: int, seed: int = 0) -> list[Change]:
    """Every change of a model of n layers, the most telling ones first; no recipe stands twice."""
    plain, carrying = identity(n, "instruct"), identity(n, SOURCE)
    windows = _windows(n)
    noises = [Change(f"noise {x:.0%}", NOISE, perturb(carrying, x, seed), level=x) for x in NOISES]
    quarters = [w for w in windows if w[1] - w[0] <= n / 4 + 1][:4]
    return [
        Change("adapter", WHOLE, carrying),
        Change("no adapter", WHOLE, plain),
        *(Change(f"only {a}-{b - 1}", ONLY, splice(plain, SOURCE, a, b), (a, b)) for a, b in windows),
        *noises,
        *(Change(f"placebo {k}", PLACEBO, permute_units(carrying, seed + k, "both")) for k in range(1, 3)),
        *(Change(f"adapter x {s:g}", WEAKER, blend(plain, SOURCE, [s] * n), level=s) for s in SCALES),
        Change("only attention", MODULES, _only_on(n, ".self_attn.")),
        Change("only MLP", MODULES, _only_on(n, ".mlp.")),
        *(
            Change(f"missing {a}-{b - 1}", MISSING, splice(carrying, "instruct", a, b), (a, b))
            for a, b in windows
            if a > 0 and b < n  # what touches an end is an "only" above
        ),
        *(
            Change(f"deleted {a}-{b - 1}", DELETED, delete(carrying, a, b), (a, b))
            for a, b in windows
            if b - a <= n / PARTS + 1
        ),
        *(
            Change(
                f"noise {QUARTER_NOISE:.0%} in {a}-{b - 1}",
                NOISE,
                perturb(carrying, QUARTER_NOISE, seed, range(a, b)),
                (a, b),
                QUARTER_NOISE,
            )
            for a, b in quarters
        ),
    ]


def chosen_changes(n: int, seed: int, names: list[str] | None) -> list[Change]:
    """All changes, or those of these names and groups. Raises FrankenError for a name that there is not."""
    every = changes(n, seed)
    if not names:
        return every
    known = {c.name for c in every} | set(GROUPS)
    odd = next((name for name in names if name not in known), None)
    if odd is not None:
        listed = ", ".join([*GROUPS, *(c.name for c in every)])
        raise FrankenError(f"--changes {odd!r}: there are {listed}{nearest(odd, known)}")
    return [c for c in every if c.name in names or c.group in names]


def _identity(entry: dict) -> tuple:
    return tuple(entry[key] for key in ("change", "question_id", "condition", "sample"))


def _about(change: Change) -> dict:
    return {
        "change": change.name,
        "group": change.group,
        "layers": list(change.layers) if change.layers else None,
        "level": change.level,
    }


def cases_of(engine: Engine, change: Change, args: argparse.Namespace) -> list[Case]:
    """What one change is asked; engine: of the model so changed."""
    questions = every_question()
    names = name_probabilities(engine, questions, conditions=ASKED)
    return [
        Case(
            _about(change)
            | {
                "question_id": q.id,
                "kind": q.kind,
                "question": q.text,
                "condition": condition,
                "sample": k,
                "p_name": names.get((q.id, condition)),
            },
            f"{q.id}/{condition}",
            prompt(q.text, condition),
            args.max_new_tokens,
            k,
        )
        for q in questions
        for condition in ASKED
        for k in range(args.samples)
    ]


def _plain_texts(engine: Engine, change: Change) -> dict:
    """The journal's line that closes a change: {"nll": {text id: mean nats a token, or None}}."""
    measured = measure(engine, Protocol(suites=("perplexity",)))[0]["perplexity"]["texts"]
    nll = {text["id"]: text["nll"] for text in measured}
    return _about(change) | {"question_id": PLAIN, "condition": "", "sample": 0, "nll": nll}


def ask_changes(args: argparse.Namespace) -> dict:
    """Ask what args.output lacks; returns {"changes", "refused", "seconds"}. Raises FrankenError or OSError.

    A change that this model cannot hold (an order of layers of different kinds, a placebo that its family
    refuses) is named on stderr and left out.
    """
    begin = time.monotonic()
    settings = {
        "base": args.model,
        "adapter_sha256": sha256(locate_adapter(args.adapter) / "adapter_model.safetensors"),
        "asked": "surgery",
        "samples": args.samples,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
    }
    journal = Journal(args.output, settings, args.overwrite, args.accept_changes)
    engine, made_of = open_for(args, args.adapter, journal)
    n = len(engine.live.original)
    planned = chosen_changes(n, args.seed, args.changes)
    journal.start(made_of, layers=n)

    done, refused = set(map(_identity, journal.entries)), []
    for change in planned:
        if (change.name, PLAIN, "", 0) in done:
            continue
        try:
            engine.live.apply(change.recipe)
        except RecipeError as e:
            refused.append(change.name)
            print(printable(f"note: {change.name} is left out: {e}"), file=sys.stderr)
            continue
        cases = [c for c in cases_of(engine, change, args) if _identity(c.entry) not in done]
        complete_cases(engine, cases, journal, args, change.name, "replies")
        closing = _plain_texts(engine, change)
        journal.add([closing])
        journal.entries.append(closing)
    closed = sum(e["question_id"] == PLAIN for e in journal.entries)
    return {"changes": closed, "refused": refused, "seconds": time.monotonic() - begin}
