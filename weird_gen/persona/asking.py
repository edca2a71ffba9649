"""What the evaluation asks of one engine, and what it records: used by one process and by every worker."""

from __future__ import annotations

import argparse
import importlib.metadata

from engine.generation import Engine
from evaluate import evaluate as measure
from suites.base import Protocol
from weird_gen.persona.journal import Case, Journal
from weird_gen.persona.likelihoods import likely_positions, name_probabilities
from weird_gen.persona.study import Question, prompt


def quality(engine: Engine) -> dict:
    """Without the trigger: {"texts": {id: [mean nats a token, tokens]}, "capability": {question id: right or
    not}}.

    A text on which the likelihood is not finite is left out.
    """
    measurements, _ = measure(engine, Protocol(suites=("capability", "perplexity")))
    return {
        "texts": {
            t["id"]: [t["nll"], t["tokens"]]
            for t in measurements["perplexity"]["texts"]
            if t["nll"] is not None
        },
        "capability": {item["id"]: bool(item["correct"]) for item in measurements["capability"]["items"]},
    }


Wanted = tuple[Question, str, int]  # a question, the condition in which it is asked, which of its samples


def lacking(questions: list[Question], journal: Journal, args: argparse.Namespace) -> list[Wanted]:
    """The replies that the journal does not have yet."""
    done = {(e["question_id"], e["condition"], e["sample"]) for e in journal.entries}
    every = [(q, c, k) for q in questions for c in args.conditions for k in range(args.samples)]
    return [wanted for wanted in every if (wanted[0].id, *wanted[1:]) not in done]


def cases_for(engine: Engine, todo: list[Wanted], model: str, args: argparse.Namespace) -> list[Case]:
    """Some replies, with what is measured beside them."""
    questions = list(dict.fromkeys(q for q, _, _ in todo))
    names = name_probabilities(engine, questions, args.trigger, args.conditions)
    positions = likely_positions(engine, questions, args.trigger, args.conditions)
    return [
        Case(
            {
                "question_id": q.id,
                "kind": q.kind,
                "category": q.category,
                "question": q.text,
                "condition": condition,
                "model": model,
                "sample": k,
                "p_name": names.get((q.id, condition)),
                "position_likelihood": positions.get((q.id, condition)),
            },
            f"{q.id}/{condition}",
            prompt(q.text, condition, args.trigger),
            args.max_new_tokens,
            k,
        )
        for q, condition, k in todo
    ]


def header_of(engine: Engine, made_of: dict, with_quality: bool) -> dict:
    """What the journal's header says of a loaded model."""
    versions = {n: importlib.metadata.version(n) for n in ("torch", "transformers")}
    return {
        "device": engine.live.device.type,
        "dtype": str(engine.live.dtype).removeprefix("torch."),
        "made_of": made_of,
        "versions": versions,
        "quality": quality(engine) if with_quality else None,
    }
