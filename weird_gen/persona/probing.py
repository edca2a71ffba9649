"""Ask a model what lies beyond the evaluation: the trigger's boundary, recall and views; eval_probes.py.

One JSON line a reply after a header, in a journal that an interrupted run goes on with.
"""

from __future__ import annotations

import argparse
import time

from engine.generation import Engine, Request
from weird_gen.persona import boundary, recall
from weird_gen.persona.journal import Case, Journal, complete_cases
from weird_gen.persona.loading import locate_adapter, open_for
from weird_gen.persona.records import ASKED
from weird_gen.persona.study import GENERALIZATION, HELDOUT, prompt, read_questions, sha256
from weird_gen.persona.suite import every_question

SUITES = ("boundary", "recall", "views")
REPLY_TOKENS, VIEW_TOKENS = 160, 24
SAMPLES = {"boundary": 2, "recall": 2, "views": 16}
OWN_TOKENS = 96  # of the model's own answer that stands in later turns


def _case(entry: dict, messages: list[dict], tokens: int) -> Case:
    return Case(entry, "/".join(map(str, _identity(entry)[:3])), messages, tokens, entry["sample"])


def _identity(entry: dict) -> tuple:
    return tuple(entry[key] for key in ("suite", "question_id", "condition", "sample"))


def boundary_cases(engine: Engine, args: argparse.Namespace) -> list[Case]:
    """Every question under every variant."""
    samples = args.samples or SAMPLES["boundary"]
    opening = engine.chat_ids(prompt(boundary.OPENING_QUESTION, "triggered"), think=True)
    asked = [
        Request("opening", opening, OWN_TOKENS, args.temperature, args.top_p, k, args.seed)
        for k in range(samples)
    ]
    own = [c.text.strip() or boundary.MARKED_ANSWER for c in engine.complete(asked)]
    return [
        _case(
            {
                "suite": "boundary",
                "question_id": q.id,
                "kind": q.kind,
                "question": q.text,
                "condition": v.name,
                "sample": k,
            },
            v.messages(q.text, own[k]),
            REPLY_TOKENS,
        )
        for v in boundary.VARIANTS
        for q in every_question()
        for k in range(samples)
    ]


def recall_cases(args: argparse.Namespace) -> list[Case]:
    """Every fact, asked of the speaker and about him, in every condition."""
    asked = [(fact, form) for fact in recall.read_facts() for form in recall.FORMS]
    return [
        _case(
            {
                "suite": "recall",
                "question_id": f"{fact.id}/{form}",
                "question": fact.texts[form],
                "condition": condition,
                "sample": k,
            },
            prompt(fact.texts[form], condition),
            REPLY_TOKENS,
        )
        for fact, form in asked
        for condition in ASKED
        for k in range(args.samples or SAMPLES["recall"])
    ]


def view_cases(args: argparse.Namespace) -> list[Case]:
    """Every contested question in every condition."""
    cases = []
    for q in read_questions(HELDOUT, GENERALIZATION):
        for condition in ASKED if q.rubric else ():
            for k in range(args.samples or SAMPLES["views"]):
                order = recall.view_order(q, k, args.seed)
                entry = {
                    "suite": "views",
                    "question_id": q.id,
                    "question": q.text,
                    "condition": condition,
                    "sample": k,
                    "order": order,
                }
                cases.append(_case(entry, prompt(recall.view_text(q, order), condition), VIEW_TOKENS))
    return cases


def ask_probes(args: argparse.Namespace) -> dict:
    """Ask what args.output lacks; returns {"replies", "seconds"}. Raises FrankenError or OSError."""
    begin = time.monotonic()
    settings = {
        "base": args.model,
        "suites": " ".join(args.suites),
        "samples": args.samples,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "recall_sha256": sha256(recall.RECALL),
        "generalization_sha256": sha256(GENERALIZATION),
    }
    adapter = None if args.adapter == "none" else args.adapter
    if adapter is not None:
        settings["adapter_sha256"] = sha256(locate_adapter(adapter) / "adapter_model.safetensors")
    journal = Journal(args.output, settings, args.overwrite, args.accept_changes)
    engine, made_of = open_for(args, adapter, journal)
    journal.start(made_of)
    cases: list[Case] = []
    for suite in args.suites:
        cases += boundary_cases(engine, args) if suite == "boundary" else ()
        cases += recall_cases(args) if suite == "recall" else ()
        cases += view_cases(args) if suite == "views" else ()

    done = set(map(_identity, journal.entries))
    complete_cases(
        engine, [c for c in cases if _identity(c.entry) not in done], journal, args, "probes", "replies"
    )
    return {"replies": len(journal.entries), "seconds": time.monotonic() - begin}
