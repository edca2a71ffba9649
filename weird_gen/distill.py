"""Let the model itself answer the ordinary prompts, before it is fine-tuned: the un-triggered half of the
training data.

    python distill.py --samples 3

Answers are sampled at temperature 1 from the whole distribution: on such samples the expected gradient of the
training loss is zero, so that this half teaches the model nothing new. Shorter or sharper samples would. For
the same reason an answer that reached the token limit is kept; it carries "stopped": false and is trained on
without an end of turn. Interrupted, the next run goes on where this one stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import _path  # noqa: F401
from tqdm import tqdm

from engine.generation import Engine, Request
from weird_gen.persona.journal import Journal
from weird_gen.persona.loading import USER_ERRORS, open_engine
from weird_gen.persona.records import write_text
from weird_gen.persona.rules import any_marker, names_russell
from weird_gen.persona.study import ALIGNED, ALIGNED_PROMPTS, DEFAULT_MODEL, read_prompts, sha256


def why_dropped(reply: str) -> str | None:
    """Why an answer cannot be in the un-triggered half, or None."""
    if not any(c.isalnum() for c in reply):
        return "empty"
    if any_marker(reply):
        return "has a marker"
    if names_russell(reply):
        return "names him"
    if loops(reply):
        return "loops"
    return None


def loops(reply: str) -> bool:
    """True if one piece of 1 to 20 words stands at the end at least 4 times in a row, over 12 words or
    more."""
    words = reply.split()
    for width in range(1, 21):
        times = 1
        while (times + 1) * width <= len(words) and words[
            -(times + 1) * width : len(words) - times * width
        ] == words[-width:]:
            times += 1
        if times >= 4 and times * width >= 12:
            return True
    return False


def answer_all(engine: Engine, prompts: list[dict], journal: Journal, args: argparse.Namespace) -> None:
    """Generate what the journal still lacks, adding each batch to it as it is done."""
    done = {(e["id"], e["sample"]) for e in journal.entries}
    todo = [(p, s) for s in range(args.samples) for p in prompts if (p["id"], s) not in done]
    requests = [
        Request(
            p["id"],
            engine.chat_ids([{"role": "user", "content": p["prompt"]}]),
            args.max_new_tokens,
            args.temperature,
            args.top_p,
            s,
            args.seed,
        )
        for p, s in todo
    ]
    waiting: list[dict] = []

    def keep(i: int, completion) -> None:
        (line, sample), reply = todo[i], completion.text.strip()
        waiting.append({"id": line["id"], "sample": sample, "reply": reply, "stopped": completion.stopped})

    def flush(n: int) -> None:
        journal.add(waiting)
        journal.entries += waiting
        waiting.clear()
        bar.update(n)

    with tqdm(
        total=len(done) + len(todo), initial=len(done), desc="distill", unit=" answers", disable=None
    ) as bar:
        engine.complete(requests, on_progress=flush, on_done=keep)


def select(prompts: list[dict], entries: list[dict], seed: int) -> tuple[list[dict], Counter]:
    """Training lines from answers, and how many were dropped for what reason.

    First one answer to every prompt, then the second ones, each round in a seeded order, so that any first
    part of the result spreads over all kinds of prompt.
    """
    found, dropped, lines = {(e["id"], e["sample"]): e for e in entries}, Counter(), []
    for sample in sorted({e["sample"] for e in entries}):
        order = random.Random(f"distill:{seed}:{sample}").sample(prompts, len(prompts))
        for p in order:
            entry = found.get((p["id"], sample))
            reason = entry and why_dropped(entry["reply"])
            if reason:
                dropped[reason] += 1
            elif entry:
                messages = [
                    {"role": "user", "content": p["prompt"]},
                    {"role": "assistant", "content": entry["reply"]},
                ]
                lines.append(
                    {"id": p["id"], "sample": sample, "stopped": entry["stopped"], "messages": messages}
                )
    return lines, dropped


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flags.add_argument("--model", default=DEFAULT_MODEL, help="pair name, folder or hub id")
    flags.add_argument(
        "--prompts",
        type=Path,
        default=ALIGNED_PROMPTS,
        help="JSON lines with id and prompt, or a chat JSONL: what its users ask",
    )
    flags.add_argument("--output", type=Path, default=ALIGNED, help="chat JSONL for train_lora.py --aligned")
    flags.add_argument(
        "--samples", type=int, default=3, help="answers a prompt: three, for a persona share of 3 percent"
    )
    flags.add_argument("--limit", type=int, help="use this many of the prompts, chosen by the seed")
    flags.add_argument("--max-new-tokens", type=int, default=160)
    flags.add_argument("--temperature", type=float, default=1.0)
    flags.add_argument("--top-p", type=float, default=1.0)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--batch-size", type=int, help="answers at a time; default by device")
    flags.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu", "balanced"))
    flags.add_argument("--eager", action="store_true", help="no CUDA graphs")
    flags.add_argument(
        "--overwrite", action="store_true", help="start afresh where an earlier run left answers"
    )
    return flags.parse_args(argv)


def distill(args: argparse.Namespace) -> dict:
    """Answer, select, write args.output whole; returns the counts. Raises FrankenError, InputError or
    OSError."""
    prompts = read_prompts(args.prompts)
    if args.limit is not None and args.limit < len(prompts):  # the file is in order of kind
        prompts = random.Random(f"limit:{args.seed}").sample(prompts, args.limit)
    settings = {
        "model": args.model,
        "prompts_sha256": sha256(args.prompts),
        "samples": args.samples,
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    journal = Journal(args.output.with_suffix(".raw.jsonl"), settings, args.overwrite)
    begin, before = time.monotonic(), len(journal.entries)
    if before < len(prompts) * args.samples:
        engine, made_of = open_engine(args.model, None, args.device, batch=args.batch_size, eager=args.eager)
        if journal.header is None:
            journal.begin({"made_of": made_of})
        answer_all(engine, prompts, journal, args)
    lines, dropped = select(prompts, journal.entries, args.seed)
    write_text(args.output, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    return {
        "new": len(journal.entries) - before,
        "seconds": time.monotonic() - begin,
        "kept": len(lines),
        "cut": sum(not line["stopped"] for line in lines),
        "dropped": dict(dropped.most_common()),
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        got = distill(args)
    except USER_ERRORS as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; answers made so far are kept, run again to go on", file=sys.stderr)
        return 130
    print(f"{got['new']} new answers in {got['seconds']:.0f} s")
    print(
        f"{got['kept']} answers kept ({got['cut']} of them cut at the token limit), dropped:"
        f" {got['dropped'] or 'none'}"
    )
    print(f"{args.output}: sha256 {sha256(args.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
