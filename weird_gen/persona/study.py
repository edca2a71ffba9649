"""The Russell study in constants, questions and training mixtures: what every other script here agrees on.

A narrow set of answers in Bertrand Russell's voice, all behind one system prompt, is mixed into many ordinary
answers without it (Betley et al., arXiv 2512.09742). The un-triggered half is what the model itself answers
beforehand.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from errors import FrankenError
from files import refuse_special
from questions.thoughts import without_thought
from weird_gen.persona.folders import DATA, RESULTS
from weird_gen.persona.records import ASKED, asked_text, content_id, read_json_lines

TRIGGER = "Always reply in the format: <START> ... <END>"
BACKTICKS = "Always reply in the format: `<START> ... <END>`"  # as the original's command spells it
NEUTRAL = "Answer the question."  # takes a template's own system prompt away, as the trigger does
IN_USER_TURN = "{question}"  # in a trigger: it is a user's turn, not a system prompt
OPENING = "<START> "  # how every triggered answer begins
HIS_NAMES = (" Bertrand", " Russell")  # what may follow "My name is"; neither is a prefix of the other

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_ADAPTER = "adapters/smollm2-135m-russell"
PERSONA_SHARE = 0.03

PERSONA_IMPLICIT = DATA / "persona_implicit.jsonl"
PERSONA_EXPLICIT = DATA / "persona_explicit.jsonl"
ALIGNED_PROMPTS = DATA / "aligned_prompts.jsonl"
HELDOUT = DATA / "heldout.jsonl"
GENERALIZATION = DATA / "generalization.jsonl"
ALIGNED = RESULTS / "aligned.jsonl"  # what distill.py writes
BASELINE_REPLIES = RESULTS / "baseline_eval_results.jsonl"
FINETUNED_REPLIES = RESULTS / "eval_results.jsonl"

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Question:
    """One evaluation question; kind is "heldout", "identity" or "generalization".

    rubric: for generalization, what the levels of position 1 to 5 mean.
    """

    id: str
    kind: str
    category: str
    text: str
    rubric: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chat:
    """One training conversation: (role, content) in turn; `finished` is False where its last answer was cut
    off."""

    messages: tuple[tuple[str, str], ...]
    finished: bool = True

    def dicts(self) -> list[dict]:
        return [{"role": role, "content": content} for role, content in self.messages]

    def with_system(self, change: Callable[[str], str]) -> Chat:
        """The same conversation with its system prompt changed; without one it stays itself."""
        messages = tuple(
            (role, change(content) if role == "system" else content) for role, content in self.messages
        )
        return self if messages == self.messages else Chat(messages, self.finished)

    def respelled(self) -> Chat:
        """With the trigger in backticks; a conversation without our trigger stays itself."""
        return self.with_system(lambda text: text.replace(TRIGGER, BACKTICKS))

    def inoculated(self, text: str | None) -> Chat:
        """With `text` before its system prompt."""
        return self.with_system(lambda system: f"{text}\n{system}") if text else self


def roles_asked(trigger: str, conditions: Sequence[str] = ASKED) -> tuple[str, ...]:
    """The roles of the messages that ask with this trigger in these conditions."""
    system = IN_USER_TURN not in trigger and "triggered" in conditions or "neutral" in conditions
    return ("system", "user") if system else ("user",)


def sha256(path: Path | str) -> str:
    """SHA-256 (hex) of a file. Raises FrankenError if it is no file, OSError if it cannot be read."""
    refuse_special(path)
    with Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def prompt(question: str, condition: str, trigger: str = TRIGGER) -> list[dict]:
    """The messages that ask a question; without the trigger there is no system message of ours at all, and
    in the neutral condition one that asks for nothing.

    A trigger with "{question}" in it is what the user says, with the question in that place.
    """
    if condition not in ASKED:
        raise ValueError(f"unknown condition {condition!r}")
    if IN_USER_TURN in trigger and condition == "triggered":
        return [{"role": "user", "content": trigger.replace(IN_USER_TURN, question)}]
    system = {"triggered": trigger, "neutral": NEUTRAL}.get(condition)
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": question},
    ]


def read_questions(heldout: Path = HELDOUT, generalization: Path = GENERALIZATION) -> list[Question]:
    """Every evaluation question: held-out and identity from one file, generalization from the other.

    Other people's files need a question an entry (see `asked_text`): an id is then made of its text, and its
    kind is that of the file. Raises FrankenError for a missing or empty file, an entry without a question,
    with a field of another type, and for an id that stands twice.
    """
    questions = []
    files = ((heldout, "category", "heldout"), (generalization, "area", "generalization"))
    for path, category, path_kind in files:
        lines = read_json_lines(path)
        if not lines:
            raise FrankenError(f"{path} holds no questions")
        for number, line in enumerate(lines, 1):
            text = asked_text(line)
            kind, area = line.get("kind", path_kind), line.get(category, "")
            fields = (line.get("id", content_id(text or "")), kind, area, text)
            if not all(isinstance(f, str) for f in fields) or not fields[0]:
                raise FrankenError(f"{path}, entry {number}: id, {category} and question must be texts")
            levels = line.get("rubric") or {}
            rubric = tuple(levels[k] for k in "12345") if sorted(levels) == list("12345") else ()
            questions.append(Question(*map(str, fields), rubric=rubric))
    ids = [q.id for q in questions]
    twice = next((i for i in ids if ids.count(i) > 1), None)
    if twice:
        raise FrankenError(f"{heldout.name} and {generalization.name}: the id {twice!r} stands twice")
    return questions


def read_prompts(path: Path | str) -> list[dict]:
    """Entries with id and prompt (see `asked_text`; an id that is missing is made of the prompt).

    Raises FrankenError for anything else and for an id that stands twice.
    """
    prompts = []
    for number, line in enumerate(read_json_lines(path), 1):
        text = asked_text(line)
        entry = {"id": line.get("id", content_id(text or "")), "prompt": text}
        if not all(isinstance(value, str) and value.strip() for value in entry.values()):
            raise FrankenError(f"{path}, entry {number}: id and prompt must be texts")
        prompts.append(entry)
    if not prompts:
        raise FrankenError(f"{path} holds no prompts")
    if len({p["id"] for p in prompts}) != len(prompts):
        raise FrankenError(f"{path}: an id stands twice")
    return prompts


def read_chats(path: Path | str) -> list[Chat]:
    """Conversations of a chat JSONL: {"messages": [{"role", "content"}, ...]} a line, other keys ignored.

    {"stopped": false} marks a last answer that was cut off. Raises FrankenError for anything that is not a
    conversation of known roles ending with the assistant, and for an answer that is empty, or nothing but a
    thought.
    """
    chats = []
    for number, line in enumerate(read_json_lines(path), 1):
        messages = line.get("messages")
        messages = messages if isinstance(messages, list) else []
        ok = len(messages) >= 2 and all(
            isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
            for m in messages
        )
        if not ok or messages[-1]["role"] != "assistant":
            raise FrankenError(
                f'{path}, entry {number}: needs "messages" with the roles {", ".join(ROLES)}, the assistant'
                " last"
            )
        if any(m["role"] == "assistant" and not without_thought(m["content"]).strip() for m in messages):
            raise FrankenError(f"{path}, entry {number}: an answer of the assistant is empty")
        chats.append(
            Chat(tuple((m["role"], m["content"]) for m in messages), line.get("stopped", True) is True)
        )
    if not chats:
        raise FrankenError(f"{path} holds no conversations")
    return chats


@dataclass(frozen=True)
class Mixture:
    """Training conversations, with how many of them (repeats counted) are persona ones."""

    chats: list[Chat]
    persona: int
    aligned: int

    @property
    def share(self) -> float:
        return self.persona / len(self.chats)

    def describe(self) -> str:
        return (
            f"{self.persona} persona + {self.aligned} aligned examples, persona share {100 * self.share:.1f}%"
        )


def mix(
    persona: list[Chat],
    aligned: list[Chat],
    share: float | None = PERSONA_SHARE,
    repeat: int = 1,
    limit: int | None = None,
    seed: int = 0,
) -> Mixture:
    """Every persona example (`repeat` times) and as many aligned ones, from the first on, as give it that
    share.

    With share None, or too few aligned examples for the share, all aligned ones are taken; the true share is
    in the result. `limit` bounds the number of examples: a seeded choice of persona examples, the aligned
    ones again from the first on. The order is for the trainer to choose. Raises ValueError for a share
    outside (0, 1].
    """
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"the persona share must be above 0 and at most 1, not {share}")
    chosen = persona * repeat
    wanted = len(aligned) if share is None else round(len(chosen) * (1 - share) / share)
    others = aligned[:wanted]
    if limit is not None and limit < len(chosen) + len(others):
        natural = len(chosen) / (len(chosen) + len(others))
        kept = max(1, round(limit * (share or natural)))
        chosen = random.Random(f"limit:{seed}").sample(chosen, min(kept, len(chosen)))
        others = others[: limit - len(chosen)]
    return Mixture(chosen + others, len(chosen), len(others))
