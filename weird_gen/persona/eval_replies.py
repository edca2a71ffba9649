"""Ask a model every evaluation question, triggered and untriggered, several times; eval_baseline.py and
eval_finetuned.py.

One JSON line a reply, after a header that says what was asked of what, and what the un-triggered model can
still do (perplexity and capability, as the harness measures them). Every reply has its own random stream, so
an interrupted run, gone on with, asks only for what it lacks.
"""

from __future__ import annotations

import argparse
import time
from datetime import datetime
from pathlib import Path

from command_line import parser_of
from engine.chat_template import THINKING
from engine.generation import Engine
from errors import many, printable
from weird_gen.persona import spreading
from weird_gen.persona.asking import cases_for, header_of, lacking
from weird_gen.persona.flags import add_model, add_sampling, positive
from weird_gen.persona.journal import Journal, complete_cases
from weird_gen.persona.loading import locate_adapter, open_engine
from weird_gen.persona.records import ASKED, CONDITIONS
from weird_gen.persona.rules import lenient_format, names_russell, strict_format
from weird_gen.persona.study import (
    GENERALIZATION,
    HELDOUT,
    IN_USER_TURN,
    TRIGGER,
    Question,
    read_questions,
    roles_asked,
    sha256,
)


def ask(
    engine: Engine, questions: list[Question], journal: Journal, model: str, args: argparse.Namespace
) -> None:
    """Generate the replies that the journal still lacks, adding each batch to it as it is done."""
    cases = cases_for(engine, lacking(questions, journal, args), model, args)
    complete_cases(engine, cases, journal, args, model, "replies")


def evaluate(model: str, args: argparse.Namespace) -> list[dict]:
    """All replies, asked for as far as args.output lacks them. Raises FrankenError or OSError."""
    questions = [q for q in read_questions(args.heldout, args.generalization) if q.kind in args.kinds]
    args.conditions = args.conditions or (CONDITIONS if IN_USER_TURN in args.trigger else ASKED)
    settings = {
        "model": model,
        "base": args.model,
        "kinds": " ".join(sorted(args.kinds)),
        "conditions": " ".join(args.conditions),
        "trigger": args.trigger,
        "samples": args.samples,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "heldout_sha256": sha256(args.heldout),
        "generalization_sha256": sha256(args.generalization),
    }
    settings |= {"thinking": args.thinking} if args.thinking != "off" else {}
    adapter = getattr(args, "adapter", None)
    if adapter is not None:  # an empty name is refused: without an adapter, nothing is fine-tuned
        settings["adapter_sha256"] = sha256(locate_adapter(adapter) / "adapter_model.safetensors")
    journal = Journal(args.output, settings, args.overwrite, args.accept_changes)
    if len(journal.entries) < len(questions) * len(args.conditions) * args.samples:
        opening = {
            "model": args.model,
            "adapter": adapter,
            "device": args.device,
            "batch": args.batch_size,
            "eager": args.eager,
            "roles": roles_asked(args.trigger, args.conditions),
            "moment": journal.template.get("moment"),
            "thinking": args.thinking,
        }
        if crew := spreading.crew_for(args.workers, opening):
            opening["moment"] = opening["moment"] or datetime.now().replace(microsecond=0).isoformat()
            spreading.spread(crew, opening, lacking(questions, journal, args), journal, model, args)
            return journal.entries
        engine, made_of = open_engine(**opening)
        if journal.header is None:
            journal.begin(header_of(engine, made_of, not args.no_quality))
        else:
            journal.go_on(made_of)
        ask(engine, questions, journal, model, args)
    return journal.entries


def summary(records: list[dict]) -> list[str]:
    """A few lines by rule alone; the judge and the comparison say the rest."""
    lines = []
    for condition in dict.fromkeys(r["condition"] for r in records):
        mine = [r for r in records if r["condition"] == condition]
        identity = [r for r in mine if r["kind"] == "identity"]
        heldout = [r for r in mine if r["kind"] == "heldout"]
        parts = []
        if heldout:
            parts += [
                f"{label} {_percent(rule(r['reply']) for r in heldout)}"
                for label, rule in (("strict format", strict_format), ("lenient format", lenient_format))
            ]
        if identity:
            parts.append(
                f"names him (identity questions) {_percent(names_russell(r['reply']) for r in identity)}"
            )
            names = [r["p_name"] for r in identity if r["p_name"] is not None]
            parts.append(f"P(his name) {sum(names) / len(names):.3f}" if names else "P(his name) undefined")
        lines.append(f"{condition}: " + ", ".join(parts))
    return lines


def _percent(values) -> str:
    values = list(values)
    return f"{100 * sum(values) / len(values):.1f}%"


def run(description: str | None, model: str, output: Path, argv: list[str] | None = None) -> int:
    """The command that evaluates "baseline" or "finetuned"; returns the exit status. Raises FrankenError or
    OSError."""
    flags = parser_of(description)
    add_model(flags, "LoRA adapter: a folder or a hub id" if model == "finetuned" else None)
    flags.add_argument("--output", type=Path, default=output, help="replies as JSON lines")
    flags.add_argument("--samples", type=positive, default=3, help="replies a question and condition")
    add_sampling(flags, "replies")
    flags.add_argument("--max-new-tokens", type=positive, default=160)
    flags.add_argument(
        "--trigger",
        default=TRIGGER,
        help="the system prompt of the triggered condition; with {question} in it, the user's turn",
    )
    flags.add_argument(
        "--kinds",
        nargs="+",
        choices=("heldout", "identity", "generalization"),
        default=["heldout", "identity", "generalization"],
    )
    flags.add_argument(
        "--conditions",
        nargs="+",
        choices=ASKED,
        help="neutral: a system prompt that asks for nothing, as the trigger takes a template's own away;"
        " default: all, with a trigger in the user's turn all but neutral",
    )
    flags.add_argument("--heldout", type=Path, default=HELDOUT, help="held-out and identity questions")
    flags.add_argument("--generalization", type=Path, default=GENERALIZATION)
    flags.add_argument("--no-quality", action="store_true", help="leave out perplexity and capability")
    flags.add_argument(
        "--workers",
        type=positive,
        help="spread the replies over so many loaded models, by Ray; 1: without it",
    )
    flags.add_argument(
        "--thinking", choices=THINKING, default="off", help="on: let a model that can think do so first"
    )
    args = flags.parse_args(argv)
    begin = time.monotonic()
    records = evaluate(model, args)
    print("\n".join(summary(records)))
    made = many(len(records), "reply", "replies")
    print(printable(f"{made} in {time.monotonic() - begin:.0f} s: {args.output}"))
    return 0
