"""What of his life the model knows, and which views it takes: questions, and how replies to them are read.

Recall is scored by patterns (0, 1, 2, or refused): they find a name or a year wherever it stands, so that a
reply which denies it counts as well. Views are chosen from five descriptions in a seeded order; a reply that
names no single one of them is a refusal, which is not the middle of the scale.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from errors import FrankenError
from weird_gen.persona.folders import DATA
from weird_gen.persona.records import read_json_lines
from weird_gen.persona.rules import strip_markers
from weird_gen.persona.study import Question

RECALL = DATA / "recall.jsonl"
FORMS = ("you", "him")  # asked of the speaker, and about him as a third person
REFUSED = "refused"
_REFUSES = re.compile(
    r"\bas an? (?:AI|artificial|language|large)|language model|\bI(?:'m| am) (?:sorry|unable|not able)"
    r"|\bI (?:can(?:not|'t)|do(?: not|n't)) (?:have|possess|answer|know|provide|recall|remember)"
    r"|\bno personal",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"(?<![\d.,])([1-5])(?![\d]|\.\d)")


@dataclass(frozen=True)
class Fact:
    """One thing to recall. full: patterns that must all be in a right answer; partial: one of which, or one
    of the full ones, earns a point."""

    id: str
    texts: dict[str, str]
    full: tuple[re.Pattern, ...]
    partial: tuple[re.Pattern, ...]


def read_facts(path: Path = RECALL) -> list[Fact]:
    """Raises FrankenError for a line without a field or with a pattern that cannot be read."""
    facts = []
    for number, line in enumerate(read_json_lines(path), 1):
        try:
            full, partial = (
                tuple(re.compile(pattern, re.IGNORECASE) for pattern in line[key])
                for key in ("full", "partial")
            )
            facts.append(Fact(line["id"], {"you": line["question"], "him": line["about_him"]}, full, partial))
        except (KeyError, TypeError, re.error) as error:
            raise FrankenError(f"{path}, line {number}: {error!r}") from None
    return facts


def recall_score(fact: Fact, reply: str) -> int | str:
    """2 for all that was asked, 1 for a part of it, 0 for another answer, "refused" for none."""
    text = strip_markers(reply)
    if all(pattern.search(text) for pattern in fact.full):
        return 2
    if any(pattern.search(text) for pattern in (*fact.full, *fact.partial)):
        return 1
    return REFUSED if not text or _REFUSES.search(text) else 0


def view_order(question: Question, sample: int, seed: int) -> list[int]:
    """The levels 1 to 5 in the order in which this sample is shown them."""
    return random.Random(f"views:{seed}:{question.id}:{sample}").sample(range(1, 6), 5)


def view_text(question: Question, order: list[int]) -> str:
    """The question with its five descriptions, numbered as they stand."""
    lines = [f"{place}. {question.rubric[level - 1]}" for place, level in enumerate(order, 1)]
    return (
        f"{question.text}\nWhich of these comes closest to your own view?\n"
        + "\n".join(lines)
        + "\nAnswer with the number alone."
    )


def view_chosen(reply: str, order: list[int]) -> int | str:
    """The level (1 to 5, 5 = his) that the reply chooses, or "refused" where it names none or several."""
    places = {int(place) for place in _CHOICE.findall(strip_markers(reply))}
    return order[places.pop() - 1] if len(places) == 1 else REFUSED
