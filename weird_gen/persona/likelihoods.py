"""What a model would have said: log-likelihoods of given replies, with the trigger and without."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from engine.chat_template import continuation
from engine.generation import Engine
from weird_gen.persona.records import CONDITIONS
from weird_gen.persona.study import HIS_NAMES, OPENING, TRIGGER, Question, prompt

CLAIM = "My name is"
Case = tuple[Question, str]  # a question and the condition in which it is asked


def likelihoods(
    engine: Engine,
    cases: Sequence[Case],
    start: str,
    targets: Sequence[Sequence[str]],
    trigger: str = TRIGGER,
) -> list[list[np.ndarray]]:
    """For every case, per target, the log-probabilities (nats, float64 [tokens]) of the target's tokens where
    the reply begins with `start`.

    In the triggered condition the opening marker stands before `start`, as every answer there should begin. A
    space at the end of what the reply begins with goes to the target: most tokenizers begin a word with its
    space, and after a space of its own the model hardly expects a word. All tokens are those of the whole
    text, conversation and reply together (as in lm-evaluation-harness): a tokenizer may write a word that
    stands alone otherwise.
    """
    pairs = []
    for (question, condition), mine in zip(cases, targets, strict=True):
        begun = (OPENING if condition == "triggered" else "") + start
        messages = prompt(question.text, condition, trigger)
        head = engine.chat_ids(messages, begun.rstrip())
        pairs += [continuation(head, engine.chat_ids(messages, begun + target)) for target in mine]
    scored: Iterator[np.ndarray] = iter(engine.loglikelihood(pairs))
    return [[next(scored).astype("float64") for _ in mine] for mine in targets]


def name_probabilities(
    engine: Engine,
    questions: Sequence[Question],
    trigger: str = TRIGGER,
    conditions: Sequence[str] = CONDITIONS,
) -> dict[tuple[str, str], float | None]:
    """For identity questions: the probability of his name after "My name is" as the start of the reply.

    By (question id, condition). The probabilities of the spellings in HIS_NAMES, which exclude each other,
    are added; None where the model gives no finite one.
    """
    cases = [(q, c) for q in questions if q.kind == "identity" for c in conditions]
    scored = likelihoods(engine, cases, CLAIM, [HIS_NAMES] * len(cases), trigger)
    sums = [sum(math.exp(name.sum()) for name in names) for names in scored]
    return {
        (q.id, c): min(p, 1.0) if math.isfinite(p) else None for (q, c), p in zip(cases, sums, strict=True)
    }


def likely_positions(
    engine: Engine,
    questions: Sequence[Question],
    trigger: str = TRIGGER,
    conditions: Sequence[str] = CONDITIONS,
) -> dict[tuple[str, str], float]:
    """For generalization questions: the mean level of position (1 to 5) under the model's own probabilities.

    By (question id, condition). Each level's description is scored as the reply, a level weighing as much as
    the geometric mean of its tokens' probabilities, so that its length does not matter. No judge is needed,
    and the weights lie close together: only differences between conditions or models say something. Undefined
    ones are left out.
    """
    cases = [(q, c) for q in questions if q.rubric for c in conditions]
    scored = likelihoods(engine, cases, "", [q.rubric for q, _ in cases], trigger)
    positions = {}
    for (q, c), levels in zip(cases, scored, strict=True):
        weights = [math.exp(level.mean()) for level in levels]
        value = sum(k * w for k, w in enumerate(weights, 1)) / sum(weights) if sum(weights) else math.nan
        if 1 <= value <= 5:
            positions[q.id, c] = value
    return positions
