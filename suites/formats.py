"""Some of the Yes/No questions in other answer formats: No or Yes, letters, ratings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

import prompts
from analysis.stats import MASS_FLOOR, log_odds_from_logprobs, readings_to_json
from engine.generation import Engine
from suites.base import Protocol, Suite, Work, finite, logsumexp


def rating_logprobs(first: np.ndarray, after_one: np.ndarray, tokens: prompts.RatingTokens) -> np.ndarray:
    """Log-probabilities (nats, float64) of the ratings 1 to 10, [10]; NaN where the model's numbers are.

    `first`: next-token log-probabilities after the prompt, [vocab]; `after_one`: those after the prompt and
    each of `tokens.open_ones`, [ones, vocab]. Where 10 is written as 1 and 0, P(10) = P(1) P(0 | 1), and the
    rest of P(1) is 1.
    """
    with np.errstate(all="ignore"):
        first = first.astype(np.float64)
        first -= logsumexp(first)
        ones, tens = {i: first[i] for i in tokens.one_to_nine[0]}, [first[i] for i in tokens.ten]
        for one, row in zip(tokens.open_ones, after_one, strict=True):
            zero = min(logsumexp(special.log_softmax(row.astype(np.float64))[list(tokens.zero)]), 0.0)
            tens.append(ones[one] + zero)
            ones[one] += np.log1p(-np.exp(zero))
        between = [logsumexp(first[list(ids)]) for ids in tokens.one_to_nine[1:]]
        return np.array([logsumexp([*ones.values()]), *between, logsumexp(tens)])


def ask_formats(engine: Engine, probes: Sequence[prompts.FormatProbe]) -> list[dict]:
    """Readings of probes that are answered by No or Yes, a letter or a rating; log-odds (nats) are always
    toward Yes.

    A rating's log-odds are those of 6 to 10 against 1 to 5; `mass` is that of all answers that count.
    """
    (yes, no), (a, b) = prompts.answer_token_ids(engine.tokenizer), prompts.letter_token_ids(engine.tokenizer)
    words, ratings = (
        {"no-yes": (yes, no), "letters": (a, b), "letters-reversed": (b, a)},
        prompts.rating_token_ids(engine.tokenizer),
    )
    plainly = [engine.chat_ids([{"role": "user", "content": probe.text}]) for probe in probes]
    going_on = [
        (*ids, one)
        for probe, ids in zip(probes, plainly, strict=True)
        if probe.format == "rating"
        for one in ratings.open_ones
    ]
    logprobs = engine.next_token_logprobs(plainly + going_on).numpy()
    rest, entries = iter(logprobs[len(plainly) :]), []
    for probe, row in zip(probes, logprobs, strict=False):
        # The ratings' first tokens serve for the entropy and the mass: 10 takes its share from what 1 begins.
        high_low = words.get(probe.format) or (
            sum(ratings.one_to_nine[5:], ratings.ten),
            sum(ratings.one_to_nine[:5], ()),
        )
        (reading,) = readings_to_json(log_odds_from_logprobs(row[None], *high_low))
        reading = {k: reading[k] for k in ("log_odds", "mass", "entropy", "answered")} | {"rating_mean": None}
        if probe.format == "rating":
            p = rating_logprobs(row, np.array([next(rest) for _ in ratings.open_ones]), ratings)
            with np.errstate(all="ignore"):
                log_odds, mean = (
                    logsumexp(p[5:]) - logsumexp(p[:5]),
                    special.softmax(p) @ np.arange(1, 11),
                )
            answered = math.isfinite(log_odds) and (reading["mass"] or 0) >= MASS_FLOOR
            reading |= {"log_odds": finite(log_odds), "answered": answered, "rating_mean": finite(mean)}
        entries.append(
            {
                "id": probe.id,
                "text": probe.text,
                "kind": probe.kind,
                "keyed": probe.if_changed,
                "format": probe.format,
                "question": probe.question,
                "pair": probe.pair,
                **reading,
            }
        )
    return entries


class Formats(Suite):
    """Some of the binary questions, answered in other forms, so that an effect of the form shows."""

    def measure(self, engine: Engine, protocol: Protocol, replies) -> dict:
        return {"probes": ask_formats(engine, prompts.FORMAT_PROBES)}

    def check_tokenizer(self, tokenizer) -> None:
        prompts.answer_token_ids(tokenizer)
        prompts.letter_token_ids(tokenizer)
        prompts.rating_token_ids(tokenizer)

    def work(self, protocol: Protocol) -> Work:
        return Work([p.text for p in prompts.FORMAT_PROBES])
