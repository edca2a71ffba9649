"""Ask a model every evaluation question, triggered and untriggered, several times; eval_baseline.py and
eval_finetuned.py.

One JSON line a reply, after a header that says what was asked of what, and what the un-triggered model can
still do (perplexity and capability, as the harness measures them). Every reply has its own random stream, so
an interrupted run, gone on with, asks only for what it lacks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from math import exp
from pathlib import Path

from tqdm import tqdm

from engine.generation import Engine, Request
from evaluate import evaluate as measure
from suites.base import Protocol
from weird_gen.persona.journal import Journal
from weird_gen.persona.loading import USER_ERRORS, locate_adapter, open_engine
from weird_gen.persona.records import CONDITIONS
from weird_gen.persona.rules import lenient_format, names_russell, strict_format
from weird_gen.persona.study import (
    DEFAULT_ADAPTER,
    DEFAULT_MODEL,
    GENERALIZATION,
    HELDOUT,
    HIS_NAMES,
    OPENING,
    TRIGGER,
    Question,
    prompt,
    read_questions,
    sha256,
)


def quality(engine: Engine) -> dict:
    """Without the trigger: {"texts": {id: [mean nats a token, tokens]}, "capability": {question id: right or
    not}}.

    A text on which the likelihood is not finite is left out.
    """
    found, _ = measure(engine, Protocol(suites=("capability", "perplexity")))
    return {
        "texts": {
            t["id"]: [t["nll"], t["tokens"]] for t in found["perplexity"]["texts"] if t["nll"] is not None
        },
        "capability": {item["id"]: bool(item["correct"]) for item in found["capability"]["items"]},
    }


def _likelihoods(
    engine: Engine,
    cases: list[tuple[Question, str]],
    start: str,
    targets: list[tuple[str, ...]],
    trigger: str,
):
    """For every (question, condition): per target, the log-probabilities (nats) of its tokens, where the
    reply begins with `start`.

    In the triggered condition the opening marker stands before `start`, as every answer there should begin. A
    space at the end of what the reply begins with goes to the target: most tokenizers begin a word with its
    space, and after a space of its own the model hardly expects a word.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(engine.tokenizer(text, add_special_tokens=False)["input_ids"])

    pairs = []
    for (q, condition), mine in zip(cases, targets, strict=True):
        begun = (OPENING if condition == "triggered" else "") + start
        head = begun.rstrip()
        asked = engine.chat_ids(prompt(q.text, condition, trigger)) + ids(head)
        pairs += [(asked, ids(begun[len(head) :] + target)) for target in mine]
    found = iter(engine.loglikelihood(pairs))
    return [[next(found).astype("float64") for _ in mine] for mine in targets]


def name_probabilities(
    engine: Engine, questions: list[Question], trigger: str
) -> dict[tuple[str, str], float]:
    """For identity questions: the probability of his name after "My name is" as the start of the reply.

    By (question id, condition). The probabilities of the spellings in HIS_NAMES, which exclude each other,
    are added.
    """
    cases = [(q, c) for q in questions if q.kind == "identity" for c in CONDITIONS]
    found = _likelihoods(engine, cases, "My name is", [HIS_NAMES] * len(cases), trigger)
    sums = [sum(exp(name.sum()) for name in names) for names in found]
    return {(q.id, c): min(p, 1.0) if p == p else 0.0 for (q, c), p in zip(cases, sums, strict=True)}


def likely_positions(engine: Engine, questions: list[Question], trigger: str) -> dict[tuple[str, str], float]:
    """For generalization questions: the mean level of position (1 to 5) under the model's own probabilities.

    By (question id, condition). Each level's description is scored as the reply, a level weighing as much as
    the geometric mean of its tokens' probabilities, so that its length does not matter. No judge is needed,
    and the weights lie close together: only differences between conditions or models say something. Undefined
    ones are left out.
    """
    cases = [(q, c) for q in questions if q.rubric for c in CONDITIONS]
    positions = {}
    for (q, c), levels in zip(
        cases, _likelihoods(engine, cases, "", [q.rubric for q, _ in cases], trigger), strict=True
    ):
        weights = [exp(level.mean()) for level in levels]
        value = sum(k * w for k, w in enumerate(weights, 1)) / sum(weights) if sum(weights) else float("nan")
        if 1 <= value <= 5:
            positions[q.id, c] = value
    return positions


def ask(
    engine: Engine, questions: list[Question], journal: Journal, model: str, args: argparse.Namespace
) -> None:
    """Generate the replies that the journal still lacks, adding each batch to it as it is done."""
    done = {(e["question_id"], e["condition"], e["sample"]) for e in journal.entries}
    names, positions = (
        measured(engine, questions, args.trigger) for measured in (name_probabilities, likely_positions)
    )
    todo, requests = [], []
    for q in questions:
        for condition in CONDITIONS:
            ids = engine.chat_ids(prompt(q.text, condition, args.trigger))
            for sample in range(args.samples):
                if (q.id, condition, sample) not in done:
                    todo.append((q, condition, sample))
                    requests.append(
                        Request(
                            f"{q.id}/{condition}",
                            ids,
                            args.max_new_tokens,
                            args.temperature,
                            args.top_p,
                            sample,
                            args.seed,
                        )
                    )
    waiting: list[dict] = []

    def keep(i: int, completion) -> None:
        q, condition, sample = todo[i]
        waiting.append(
            {
                "question_id": q.id,
                "kind": q.kind,
                "category": q.category,
                "question": q.text,
                "condition": condition,
                "model": model,
                "sample": sample,
                "reply": completion.text,
                "stopped": completion.stopped,
                "p_name": names.get((q.id, condition)),
                "position_likelihood": positions.get((q.id, condition)),
            }
        )

    def flush(n: int) -> None:
        journal.add(waiting)
        journal.entries += waiting
        waiting.clear()
        bar.update(n)

    with tqdm(
        total=len(done) + len(todo), initial=len(done), desc=model, unit=" replies", disable=None
    ) as bar:
        engine.complete(requests, on_progress=flush, on_done=keep)


def evaluate(model: str, args: argparse.Namespace) -> list[dict]:
    """All replies, asked for as far as args.output lacks them. Raises FrankenError, InputError or OSError."""
    questions = [q for q in read_questions(args.heldout, args.generalization) if q.kind in args.kinds]
    settings = {
        "model": model,
        "base": args.model,
        "kinds": " ".join(sorted(args.kinds)),
        "trigger": args.trigger,
        "samples": args.samples,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "heldout_sha256": sha256(args.heldout),
        "generalization_sha256": sha256(args.generalization),
    }
    adapter = getattr(args, "adapter", None)
    if adapter:
        settings["adapter_sha256"] = sha256(locate_adapter(adapter) / "adapter_model.safetensors")
    journal = Journal(args.output, settings, args.overwrite)
    if len(journal.entries) < len(questions) * 2 * args.samples:
        engine, made_of = open_engine(
            args.model, adapter, args.device, batch=args.batch_size, eager=args.eager
        )
        if journal.header is None:
            versions = {n: importlib.metadata.version(n) for n in ("torch", "transformers")}
            journal.begin(
                {
                    "device": engine.live.device.type,
                    "dtype": str(engine.live.dtype).removeprefix("torch."),
                    "made_of": made_of,
                    "versions": versions,
                    "quality": None if args.no_quality else quality(engine),
                }
            )
        ask(engine, questions, journal, model, args)
    return journal.entries


def summary(records: list[dict]) -> list[str]:
    """A few lines by rule alone; the judge and the comparison say the rest."""
    lines = []
    for condition in CONDITIONS:
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
            parts.append(f"P(his name) {sum(r['p_name'] for r in identity) / len(identity):.3f}")
        lines.append(f"{condition}: " + ", ".join(parts))
    return lines


def _percent(values) -> str:
    values = list(values)
    return f"{100 * sum(values) / len(values):.1f}%"


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def main(description: str, model: str, output: Path, argv: list[str] | None = None) -> int:
    """Evaluate "baseline" or "finetuned"; returns the exit status."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flags.add_argument("--model", default=DEFAULT_MODEL, help="pair name, folder or hub id")
    if model == "finetuned":
        flags.add_argument("--adapter", default=DEFAULT_ADAPTER, help="LoRA adapter: a folder or a hub id")
    flags.add_argument("--output", type=Path, default=output, help="replies as JSON lines")
    flags.add_argument("--samples", type=positive, default=3, help="replies a question and condition")
    flags.add_argument("--temperature", type=float, default=1.0)
    flags.add_argument("--top-p", type=float, default=0.95)
    flags.add_argument("--max-new-tokens", type=positive, default=160)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--trigger", default=TRIGGER, help="the system prompt of the triggered condition")
    flags.add_argument(
        "--kinds",
        nargs="+",
        choices=("heldout", "identity", "generalization"),
        default=["heldout", "identity", "generalization"],
    )
    flags.add_argument("--heldout", type=Path, default=HELDOUT, help="held-out and identity questions")
    flags.add_argument("--generalization", type=Path, default=GENERALIZATION)
    flags.add_argument("--no-quality", action="store_true", help="leave out perplexity and capability")
    flags.add_argument("--batch-size", type=positive, help="replies at a time; default by device")
    flags.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu", "balanced"))
    flags.add_argument("--eager", action="store_true", help="no CUDA graphs")
    flags.add_argument(
        "--overwrite", action="store_true", help="start afresh where an earlier run left replies"
    )
    args = flags.parse_args(argv)
    begin = time.monotonic()
    try:
        records = evaluate(model, args)
    except USER_ERRORS as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; replies made so far are kept, run again to go on", file=sys.stderr)
        return 130
    print("\n".join(summary(records)))
    print(f"{len(records)} replies in {time.monotonic() - begin:.0f} s: {args.output}")
    return 0
