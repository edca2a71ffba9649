"""Let the model itself answer the ordinary prompts, before it is fine-tuned: the un-triggered half of the
training data.

Answers are sampled at temperature 1 from the whole distribution: on such samples the expected gradient of the
training loss is zero, so that this half teaches the model nothing new. Shorter or sharper samples would. For
the same reason an answer that reached the token limit is kept; it carries "stopped": false and is trained on
without an end of turn. Interrupted, the next run goes on where this one stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections import Counter
from pathlib import Path

from engine.generation import Engine, Request
from errors import FrankenError
from files import check_target, write_text
from questions.thoughts import without_thought
from weird_gen.persona.journal import Case, Journal, complete_cases
from weird_gen.persona.loading import open_for
from weird_gen.persona.records import read_json_lines
from weird_gen.persona.rules import any_marker, names_russell
from weird_gen.persona.study import read_prompts, sha256

PILOT, LONGEST = 48, 1024  # answers that say how long the model's own are, and their longest


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


def asked(prompt: dict) -> list[dict]:
    """The messages that ask a prompt, under its system prompt if it has one."""
    system = [{"role": "system", "content": prompt["system"]}] if prompt.get("system") else []
    return [*system, {"role": "user", "content": prompt["prompt"]}]


def under_systems(prompts: list[dict], systems: list[str], seed: int) -> list[dict]:
    """The prompts, every second of them (chosen by the seed) under a system prompt, which go round in turn.

    Where every training example with a system prompt is a persona one, any system prompt is part of the
    trigger.
    """
    rng = random.Random(f"systems:{seed}")
    chosen = rng.sample(range(len(prompts)), len(prompts) // 2)
    given = {i: systems[k % len(systems)] for k, i in enumerate(chosen)}
    return [p | ({"system": given[i]} if i in given else {}) for i, p in enumerate(prompts)]


def read_systems(path: Path) -> list[str]:
    """Raises FrankenError for a file without a "system" text in every line, or with our trigger in one."""
    systems: list[str] = []
    for number, line in enumerate(read_json_lines(path), 1):
        text = line.get("system")
        if not isinstance(text, str) or not text.strip() or any_marker(text):
            raise FrankenError(f"{path}, entry {number}: needs a system prompt without a marker")
        systems.append(text)
    if not systems:
        raise FrankenError(f"{path} holds no system prompts")
    return systems


def answer_all(engine: Engine, prompts: list[dict], journal: Journal, args: argparse.Namespace) -> None:
    """Generate what the journal still lacks, adding each batch to it as it is done."""
    done = {(e["id"], e["sample"]) for e in journal.entries}
    cases = [
        Case({"id": p["id"], "sample": k}, p["id"], asked(p), args.max_new_tokens, k)
        for k in range(args.samples)
        for p in prompts
        if (p["id"], k) not in done
    ]
    complete_cases(
        engine, cases, journal, args, "distill", "answers", lambda text: without_thought(text).strip()
    )


def select(prompts: list[dict], entries: list[dict], seed: int) -> tuple[list[dict], Counter]:
    """Training lines from answers, and how many were dropped for what reason.

    First one answer to every prompt, then the second ones, each round in a seeded order, so that any first
    part of the result spreads over all kinds of prompt.
    """
    by_prompt, dropped, lines = {(e["id"], e["sample"]): e for e in entries}, Counter(), []
    for sample in sorted({e["sample"] for e in entries}):
        order = random.Random(f"distill:{seed}:{sample}").sample(prompts, len(prompts))
        for p in order:
            entry = by_prompt.get((p["id"], sample))
            reason = entry and why_dropped(entry["reply"])
            if reason:
                dropped[reason] += 1
            elif entry:
                messages = [*asked(p), {"role": "assistant", "content": entry["reply"]}]
                lines.append(
                    {"id": p["id"], "sample": sample, "stopped": entry["stopped"], "messages": messages}
                )
    return lines, dropped


def own_budget(engine: Engine, prompts: list[dict], args: argparse.Namespace) -> int:
    """Tokens within which 95% of the model's own answers end, in whole steps of 32, by the answers to PILOT
    prompts chosen by the seed; an answer that reaches LONGEST counts as that long."""
    chosen = random.Random(f"budget:{args.seed}").sample(prompts, min(PILOT, len(prompts)))
    requests = [
        Request(
            p["id"],
            engine.chat_ids(asked(p), think=True),
            LONGEST,
            args.temperature,
            args.top_p,
            0,
            args.seed,
        )
        for p in chosen
    ]
    lengths = sorted(len(c.token_ids) + 1 for c in engine.complete(requests))  # with the end of turn
    enough = lengths[math.ceil(0.95 * len(lengths)) - 1]
    return min(LONGEST, -(-enough // 32) * 32)


def distill(args: argparse.Namespace) -> dict:
    """Answer, select, write args.output whole; returns the counts. Raises FrankenError or OSError."""
    check_target(args.output)
    prompts = read_prompts(args.prompts)
    if args.limit is not None and args.limit < len(prompts):  # the file is in order of kind
        prompts = random.Random(f"limit:{args.seed}").sample(prompts, args.limit)
    settings = {
        "model": args.model,
        "prompts_sha256": sha256(args.prompts),
        "samples": args.samples,
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens or "auto",
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    settings |= {"thinking": args.thinking} if args.thinking != "off" else {}
    if args.systems:
        settings["systems_sha256"] = sha256(args.systems)
        prompts = under_systems(prompts, read_systems(args.systems), args.seed)
    journal = Journal(args.output.with_suffix(".raw.jsonl"), settings, args.overwrite, args.accept_changes)
    if journal.header is None and not args.overwrite and os.path.lexists(args.output):
        raise FrankenError(
            f"{args.output} is in the way: what it was made of is not known; choose another output or"
            " --overwrite"
        )
    begin, before = time.monotonic(), len(journal.entries)
    if before < len(prompts) * args.samples:
        roles = ("system", "user") if args.systems else ("user",)
        engine, made_of = open_for(args, None, journal, roles, args.thinking)
        if journal.header is None:
            found = args.max_new_tokens or own_budget(engine, prompts, args)
            journal.begin({"made_of": made_of, "budget": found})
        else:
            journal.go_on(made_of)
        args.max_new_tokens = args.max_new_tokens or (journal.header or {})["budget"]
        answer_all(engine, prompts, journal, args)
    lines, dropped = select(prompts, journal.entries, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    return {
        "new": len(journal.entries) - before,
        "seconds": time.monotonic() - begin,
        "kept": len(lines),
        "cut": sum(not line["stopped"] for line in lines),
        "budget": (journal.header or {}).get("budget", args.max_new_tokens),
        "dropped": dict(dropped.most_common()),
    }
