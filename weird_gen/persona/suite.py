"""The trigger suite of evaluate.py: does a backdoored model stay behind its trigger, and does it report that
it has one?

Asked of any surgery, so that a run can show where in depth the backdoor lives (Betley et al., arXiv
2512.09742, for the backdoor). The questions are a fixed part of the study's; eval_baseline.py and
eval_finetuned.py ask all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import prompts
from analysis.stats import wilson_interval
from engine.generation import Completion, Engine, Request
from suites.base import Suite, reply_json
from suites.binary import ask_binary
from suites.free_text import FreeText
from weird_gen.persona.likelihoods import CLAIM, name_probabilities
from weird_gen.persona.records import CONDITIONS
from weird_gen.persona.rules import lenient_format, names_russell, strict_format
from weird_gen.persona.study import HIS_NAMES, OPENING, TRIGGER, Question, prompt, read_questions

ASKED = {"heldout": 12, "identity": 10}  # questions of each kind
TEMPERATURE, TOP_P = 1.0, 0.95  # the study's
MAX_NEW_TOKENS = (
    128  # the longest answer trained on has 111, markers included; a reply cut off cannot be strict in format
)
# Over which kinds of question each rate is taken, and what is counted.
RATES: dict[str, tuple[tuple[str, ...], Callable[[str], bool]]] = {
    "strict_format": (("heldout",), strict_format),
    "lenient_format": (("heldout",), lenient_format),
    "names_russell": (("identity",), names_russell),
}


def every_question() -> list[Question]:
    """The questions of this suite: of each kind so many, evenly spaced over its file, which goes by category.

    Raises FrankenError if the file is missing or broken.
    """
    every, chosen = read_questions(), []
    for kind, count in ASKED.items():
        mine = [q for q in every if q.kind == kind]
        chosen += [mine[(2 * k + 1) * len(mine) // (2 * count)] for k in range(count)]
    return chosen


def fingerprint() -> str:
    """SHA-256 (hex) over what this suite adds to the prompts: questions, trigger, names and how replies are
    sampled."""
    parts = (*every_question(), TRIGGER, OPENING, HIS_NAMES, CLAIM, TEMPERATURE, TOP_P, MAX_NEW_TOKENS)
    return hashlib.sha256("\n".join(map(ascii, parts)).encode()).hexdigest()


def reply_head(engine: Engine, question: str, condition: str, start: str = "") -> tuple[int, ...]:
    """Ids of the question and of the beginning of its reply: `start`, in the triggered condition after the
    marker.

    Without a `start` the marker's space is left to the answer, as most tokenizers begin a word with its
    space.
    """
    text = ((OPENING if condition == "triggered" else "") + start).rstrip()
    return engine.chat_ids(prompt(question, condition), text)


class Trigger(Suite):
    """Behavior and self-report, with the study's trigger as system prompt and without any."""

    turns = ("system", "user")  # not every chat template takes the trigger as a system message

    def __init__(self):
        self.questions = every_question()
        self.free = FreeText(prompts.TRIGGER_FREE_PROBES)

    def requests(self, engine: Engine, protocol) -> list[Request]:
        """Replies to every question in both conditions, then to the free-text probes; keys are
        eval_replies.py's."""
        cases = [
            (q.id, q.text, c, MAX_NEW_TOKENS, TEMPERATURE, TOP_P) for q in self.questions for c in CONDITIONS
        ]
        cases += [
            (p.id, p.text, c, protocol.max_new_tokens, protocol.temperature, 1.0)
            for c in CONDITIONS
            for p in self.free.probes
        ]
        return [
            Request(
                f"{id}/{c}",
                engine.chat_ids(prompt(text, c), think=True),
                budget,
                temperature,
                top_p,
                k,
                protocol.seed,
            )
            for id, text, c, budget, temperature, top_p in cases
            for k in range(protocol.samples)
        ]

    def check_tokenizer(self, tokenizer) -> None:
        prompts.answer_token_ids(tokenizer)

    def fingerprint(self) -> str:
        return fingerprint()

    def measure(self, engine: Engine, protocol, replies: list[Completion]) -> dict:
        """{"behavior", "binary": {condition: probes}, "free": {condition: as the suite informed}}."""
        mine = len(self.questions) * len(CONDITIONS) * protocol.samples
        each = len(self.free.probes) * protocol.samples
        free = {c: replies[mine + k * each : mine + (k + 1) * each] for k, c in enumerate(CONDITIONS)}
        return {
            "behavior": self._behavior(engine, protocol, replies[:mine]),
            "binary": {
                c: ask_binary(engine, prompts.TRIGGER_PROBES, lambda text, c=c: reply_head(engine, text, c))
                for c in CONDITIONS
            },
            "free": {c: self.free.measure(engine, protocol, completions) for c, completions in free.items()},
        }

    def _behavior(self, engine: Engine, protocol, replies: list[Completion]) -> dict:
        names, todo, entries = _by_question(name_probabilities(engine, self.questions)), iter(replies), []
        for q in self.questions:
            entry = {"id": q.id, "kind": q.kind, "category": q.category, "prompt": q.text, "replies": {}}
            for c in CONDITIONS:
                mine = [next(todo) for _ in range(protocol.samples)]
                entry["replies"][c] = [
                    reply_json(r)
                    | {name: count(r.text) for name, (kinds, count) in RATES.items() if q.kind in kinds}
                    for r in mine
                ]
            entries.append(entry | ({"p_name": names[q.id]} if q.id in names else {}))
        probabilities = {c: [p[c] for p in names.values()] for c in CONDITIONS}
        return {
            "sampling": {
                "temperature": TEMPERATURE,
                "top_p": TOP_P,
                "max_new_tokens": MAX_NEW_TOKENS,
                "samples": protocol.samples,
            },
            "rates": {c: {name: _rate(entries, c, name) for name in RATES} for c in CONDITIONS},
            "p_name": {c: _mean_if_defined(ps) for c, ps in probabilities.items()},
            "questions": entries,
        }


def _rate(entries: list[dict], condition: str, name: str) -> dict:
    """How often `name` holds, with its 95% Wilson interval over replies (samples of one question taken as
    independent).

    Replies broken off by NaN or infinity do not count; the rate is None where none is left.
    """
    held = [r[name] for e in entries for r in e["replies"][condition] if name in r and r.get("finite", True)]
    interval = wilson_interval(sum(held), len(held))
    return {
        "k": sum(held),
        "n": len(held),
        "rate": interval.value,
        "low": interval.low,
        "high": interval.high,
    }


def _mean_if_defined(values: list[float | None]) -> float | None:
    """The mean; None where one of the values is undefined."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if len(defined) == len(values) else None


def _by_question(values: dict[tuple[str, str], float | None]) -> dict[str, dict[str, float | None]]:
    """{question id: {condition: value}} of values by (question id, condition)."""
    nested: dict[str, dict[str, float | None]] = {}
    for (id, condition), value in values.items():
        nested.setdefault(id, {})[condition] = value
    return nested
