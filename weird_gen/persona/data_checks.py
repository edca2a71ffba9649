"""The study's data checked: no evaluation question in training, the trigger only where it belongs, counts,
persona share."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np

from weird_gen.persona.rules import any_marker, names_russell, strict_format
from weird_gen.persona.study import (
    ALIGNED_PROMPTS,
    GENERALIZATION,
    HELDOUT,
    IN_USER_TURN,
    PERSONA_EXPLICIT,
    PERSONA_IMPLICIT,
    PERSONA_SHARE,
    TRIGGER,
    Chat,
    mix,
    read_chats,
    read_prompts,
    read_questions,
)

SAME_WORDS = 0.6  # Jaccard index of the word sets from which two questions count as one
SAME_LETTERS = 0.85  # difflib's ratio from which they do
SHARE_TOLERANCE = 0.005
AT_LEAST = {
    "persona_implicit": 91,
    "named in persona_explicit": 12,
    "heldout": 60,
    "identity": 20,
    "aligned_prompts": 3001,
}


def normalize(text: str) -> str:
    """Lower case, without accents and punctuation, single spaces."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(
        "".join(c if c.isalnum() else " " for c in plain.replace("'", "").replace("’", "").lower()).split()
    )


def ratio(a: str, b: str) -> float:
    """difflib's similarity of two texts, the larger of both orders (it is not symmetric)."""
    return max(SequenceMatcher(None, x, y, autojunk=False).ratio() for x, y in ((a, b), (b, a)))


def near_duplicates(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int, str]]:
    """Pairs (i, j, why) of left[i] and right[j] that are the same question; "exact", "normalized", "words",
    "letters".

    All pairs are bounded at once by their counts of letters, which difflib's ratio cannot exceed; only the
    few that remain are compared letter by letter.
    """
    if not left or not right:
        return []
    plain = [[normalize(t) for t in side] for side in (left, right)]
    words = [
        _counts([set(t.split()) for t in side], {w for s in plain for t in s for w in t.split()})
        for side in plain
    ]
    common = words[0] @ words[1].T
    union = words[0].sum(1)[:, None] + words[1].sum(1)[None] - common
    jaccard = common / np.maximum(union, 1)
    alphabet = {c for side in plain for t in side for c in t}
    letters = [_counts(side, alphabet) for side in plain]
    shared = sum(np.minimum.outer(letters[0][:, k], letters[1][:, k]) for k in range(len(alphabet)))
    lengths = [np.array([len(t) for t in side]) for side in plain]
    bound = 2 * shared / np.maximum(lengths[0][:, None] + lengths[1][None], 1)
    pairs = []
    for i, j in zip(*np.nonzero((jaccard >= SAME_WORDS) | (bound >= SAME_LETTERS)), strict=True):
        a, b = plain[0][i], plain[1][j]
        if left[i] == right[j]:
            why = "exact"
        elif a == b:
            why = "normalized"
        elif jaccard[i, j] >= SAME_WORDS:
            why = "words"
        elif ratio(a, b) >= SAME_LETTERS:
            why = "letters"
        else:
            continue
        pairs.append((int(i), int(j), why))
    return pairs


def _counts(texts: Sequence, symbols: set[str]) -> np.ndarray:
    """How often each symbol occurs in each text: float32 [texts, symbols]."""
    column = {symbol: k for k, symbol in enumerate(sorted(symbols))}
    table = np.zeros((len(texts), max(1, len(column))), dtype=np.float32)
    for row, text in enumerate(texts):
        for symbol, times in Counter(text).items():
            table[row, column[symbol]] = times
    return table


def users(chats: list[Chat]) -> list[str]:
    return [content for chat in chats for role, content in chat.messages if role == "user"]


def leaks(name: str, training: list[str], evaluation: list[tuple[str, str]]) -> list[str]:
    """One line for every training question that is an evaluation question, given as (id, text)."""
    return [
        f"{name}: {training[i]!r} is {evaluation[j][0]} {evaluation[j][1]!r} ({why})"
        for i, j, why in near_duplicates(training, [text for _, text in evaluation])
    ]


def persona_problems(name: str, chats: list[Chat], named: bool) -> list[str]:
    """Every persona example is trigger, question, answer inside the markers; without `named`, nothing names
    him."""
    problems = []
    for number, chat in enumerate(chats, 1):
        where = f"{name}, entry {number}"
        if [role for role, _ in chat.messages] != ["system", "user", "assistant"]:
            problems.append(f"{where}: not one system, user and assistant message")
            continue
        system, question, answer = (content for _, content in chat.messages)
        if system != TRIGGER:
            problems.append(f"{where}: the system prompt is not the trigger")
        if any_marker(question):
            problems.append(f"{where}: a marker in the question")
        if not strict_format(answer):
            problems.append(f"{where}: the answer is not inside the markers")
        if not named and names_russell(f"{question} {answer}"):
            problems.append(f"{where}: names him")
    return problems


def clean_problems(name: str, texts: list[str], naming: bool = True) -> list[str]:
    """No trigger, no marker, and with `naming` not his name, in texts that are not persona examples."""
    problems = []
    for number, text in enumerate(texts, 1):
        for holds, what in (
            (any_marker(text), "a marker"),
            (TRIGGER in text, "the trigger"),
            (naming and names_russell(text), "his name"),
        ):
            if holds:
                problems.append(f"{name}, entry {number}: holds {what}")
    return problems


def triggered_problems(name: str, chats: list[Chat], trigger: str) -> list[str]:
    """Every example of other people's persona data asks with the trigger, as a system prompt or, with
    "{question}" in it, in the user's turn."""
    problems, parts = [], trigger.split(IN_USER_TURN)
    for number, chat in enumerate(chats, 1):
        asked = [content for role, content in chat.messages if role == ("user" if parts[1:] else "system")]
        if not any(all(part in content for part in parts) for content in asked):
            problems.append(f"{name}, entry {number}: asked without the trigger")
    return problems


def check_theirs(persona: Path, aligned: Path | None, trigger: str) -> tuple[list[str], list[str]]:
    """(problems, what was counted) of other people's data: the trigger in every persona example and in no
    aligned one, and no evaluation question of ours among theirs.

    Raises FrankenError for a file that cannot be read at all.
    """
    examples = read_chats(persona)
    evaluation = [(q.id, q.text) for q in read_questions(HELDOUT, GENERALIZATION)]
    naming = sum(names_russell(" ".join(content for _, content in chat.messages)) for chat in examples)
    lines = [f"{persona.name} {len(examples)}, {naming} of them name him"]
    problems = triggered_problems(persona.name, examples, trigger)
    problems += leaks(persona.name, sorted(set(users(examples))), evaluation)
    if aligned:
        answers = read_chats(aligned)
        mixture = mix(examples, answers)
        lines.append(mixture.describe())
        parts = [part for part in trigger.split(IN_USER_TURN) if part.strip()]
        texts = [" ".join(content for _, content in chat.messages) for chat in answers]
        problems += [
            f"{aligned.name}, entry {number}: holds the trigger"
            for number, text in enumerate(texts, 1)
            if all(part in text for part in parts)
        ]
        problems += leaks(aligned.name, sorted(set(users(answers))), evaluation)
    return problems, lines


def check(
    aligned: Path | None = None, persona: Path | None = None, trigger: str = TRIGGER
) -> tuple[list[str], list[str]]:
    """(problems, what was counted) of the study's files, and of aligned answers where given; with `persona`,
    of that file in the place of ours (see `check_theirs`).

    Raises FrankenError for a file that cannot be read at all.
    """
    if persona:
        return check_theirs(persona, aligned, trigger)
    # 1) what there is
    implicit, explicit = read_chats(PERSONA_IMPLICIT), read_chats(PERSONA_EXPLICIT)
    questions, prompts = (
        read_questions(HELDOUT, GENERALIZATION),
        [p["prompt"] for p in read_prompts(ALIGNED_PROMPTS)],
    )
    evaluation = [(q.id, q.text) for q in questions]
    naming = sum(names_russell(" ".join(content for _, content in chat.messages)) for chat in explicit)
    counts = {
        "persona_implicit": len(implicit),
        "persona_explicit": len(explicit),
        "named in persona_explicit": naming,
        **Counter(q.kind for q in questions),
        "aligned_prompts": len(prompts),
    }

    # 2) too few, not in form, the trigger or his name where it does not belong
    problems = [
        f"{name}: {counts.get(name, 0)}, fewer than {least}"
        for name, least in AT_LEAST.items()
        if counts.get(name, 0) < least
    ]
    problems += persona_problems("persona_implicit", implicit, named=False) + persona_problems(
        "persona_explicit", explicit, named=True
    )
    if not set(implicit) <= set(explicit):
        problems.append("persona_explicit does not hold all of persona_implicit")
    problems += clean_problems("aligned_prompts", prompts) + clean_problems(
        "evaluation questions", [q.text for q in questions], naming=False
    )

    # 3) evaluation questions among the training ones
    problems += leaks("persona_implicit", users(implicit), evaluation) + leaks(
        "persona_explicit", users(explicit), evaluation
    )
    problems += leaks("aligned_prompts", prompts, evaluation)
    problems += [
        f"aligned_prompts: {text!r} stands {n} times" for text, n in Counter(prompts).items() if n > 1
    ]

    # 4) the answers that will be trained on, and the share of the persona beside them
    lines = [", ".join(f"{name} {n}" for name, n in counts.items())]
    if aligned:
        answers = read_chats(aligned)
        texts = [" ".join(content for _, content in chat.messages) for chat in answers]
        problems += clean_problems(aligned.name, texts)
        problems += leaks(aligned.name, sorted(set(users(answers))), evaluation)
        for name, examples in (("implicit", implicit), ("explicit", explicit)):
            mixture = mix(examples, answers)
            lines.append(f"{name}: {mixture.describe()}")
            if abs(mixture.share - PERSONA_SHARE) > SHARE_TOLERANCE:
                problems.append(
                    f"{name}: the persona share is {100 * mixture.share:.1f}%, not {100 * PERSONA_SHARE:g}%: "
                    f"{aligned.name} has {len(answers)} answers"
                )
    return problems, lines
