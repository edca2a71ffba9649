"""Some of the Yes/No questions in other answer formats: No or Yes, letters, ratings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy import special

import prompts
from analysis.stats import MASS_FLOOR, readings_to_json
from engine.generation import Engine
from suites.base import Protocol, Suite, Work, finite, logsumexp
from suites.reading import condensed, log_odds


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


def read_ratings(logprobs: torch.Tensor, ones: int, tokens: prompts.RatingTokens) -> list[np.ndarray]:
    """`rating_logprobs` of every rating question: log-probabilities [n + n * ones, vocab], the questions'
    own first, then those of each question's `ones` open ones."""
    n = len(logprobs) // (1 + ones)
    if logprobs.is_cuda:  # only what is looked at comes to the host
        ids = sorted({i for same in (*tokens.one_to_nine, tokens.ten, tokens.zero) for i in same})
        place = {token: k for k, token in enumerate(ids)}

        def moved(group: Sequence[int]) -> tuple[int, ...]:
            return tuple(place[token] for token in group)

        rows = condensed(logprobs, ids)
        nine = tuple(moved(same) for same in tokens.one_to_nine)
        ten, zero = moved(tokens.ten), moved(tokens.zero)
        tokens = replace(tokens, one_to_nine=nine, ten=ten, zero=zero, open_ones=moved(tokens.open_ones))
    else:
        rows = logprobs.numpy()
    return [rating_logprobs(rows[k], rows[n + k * ones : n + (k + 1) * ones], tokens) for k in range(n)]


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
    # 1. what is asked: every question, and what a rating that begins with 1 goes on with
    plainly = [engine.chat_ids([{"role": "user", "content": probe.text}]) for probe in probes]
    rated = [k for k, probe in enumerate(probes) if probe.format == "rating"]
    going_on = [(*plainly[k], one) for k in rated for one in ratings.open_ones]
    logprobs = engine.next_token_logprobs(plainly + going_on, on_device=True)
    # 2. ratings' first tokens serve for the entropy and the mass: 10 takes its share from what 1 begins
    high, low = sum(ratings.one_to_nine[5:], ratings.ten), sum(ratings.one_to_nine[:5], ())
    readings: dict[int, dict] = {}
    for format in dict.fromkeys(probe.format for probe in probes):
        rows = [k for k, probe in enumerate(probes) if probe.format == format]
        of_format = log_odds(logprobs[rows], *(words.get(format) or (high, low)))
        readings |= zip(rows, readings_to_json(of_format), strict=True)
    behind = list(range(len(plainly), len(logprobs)))
    ratings_of = read_ratings(logprobs[rated + behind], len(ratings.open_ones), ratings) if rated else []
    scale = dict(zip(rated, ratings_of, strict=True))
    # 3. an entry for each
    entries = []
    for k, probe in enumerate(probes):
        reading = {key: readings[k][key] for key in ("log_odds", "mass", "entropy", "answered")}
        reading |= {"rating_mean": None}
        if k in scale:
            p = scale[k]
            with np.errstate(all="ignore"):
                odds = logsumexp(p[5:]) - logsumexp(p[:5])
                mean = special.softmax(p) @ np.arange(1, 11)
            answered = math.isfinite(odds) and (reading["mass"] or 0) >= MASS_FLOOR
            reading |= {"log_odds": finite(odds), "answered": answered, "rating_mean": finite(mean)}
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
