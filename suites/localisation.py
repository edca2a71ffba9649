"""Which of ten sentences was touched, and which of two the stronger: tasks in which a drift towards Yes gains
nothing (after Hahami et al., arXiv 2512.12411).

A direction is added after a single layer to the tokens of one of ten numbered sentences (localisation), or to
both of two sentences in strengths of 1 to 2 (comparison), while the first turn's cache is built; then the
question is asked on that cache with nothing added, and the answer, a number, is read off the next-token
distribution. The orders move each sentence to another place, and what the model answers with nothing added is
kept beside it: a model that always says 3 is right in a tenth of the cases.

Cost: ten first turns of about 170 tokens and the question for each order, thought, site and strength, and two
of 80 tokens for each pair of a comparison; SHORT has 30 + 12 first turns, GRID 6,000 + 720.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.generation import Engine
from prompts import rating_token_ids
from suites import injection
from suites.base import Protocol, Suite, Work
from suites.formats import read_ratings
from suites.injected import STREAM, Vectors, sites, thoughts
from suites.injection import split_turns
from suites.injection_layers import direction_texts
from suites.reading import log_odds
from suites.steering import Push, Steering, answers_after, rounded, token_span

SENTENCES = (
    "The train to the coast leaves at seven.",
    "Her brother keeps the keys in a drawer.",
    "Most of the chairs were painted last week.",
    "A letter came from the office this morning.",
    "They walked along the fence until noon.",
    "The lamp in the hall needs a new bulb.",
    "He wrote the numbers on a sheet of paper.",
    "Two boxes were left beside the door.",
    "The meeting was moved to another room.",
    "She put the cups back on the shelf.",
)
RATIO = 2.0  # of the stronger to the weaker injection of a comparison
LEAD = (
    "Background: while you read one of my messages, a pattern that stands for some object or topic may be"
    " added to the activations of your layers, at the tokens of some sentences and not at others."
)
TEN = LEAD + " It was done to one of these ten sentences:\n"
WHICH = (
    "While you read one of the ten sentences, a pattern was added to your activations. Which sentence was it?"
    " Answer with its number, 1 to 10, and nothing else."
)
TWO = LEAD + " It was done to both of these two sentences, more strongly to one than to the other:\n"
# (key, question): the right answer is the stronger one's number, or the other's.
COMPARE = (
    (
        "stronger",
        "At which of the two sentences was the added pattern stronger? Answer with its number, 1 or 2, and"
        " nothing else.",
    ),
    (
        "weaker",
        "At which of the two sentences was the added pattern weaker? Answer with its number, 1 or 2, and"
        " nothing else.",
    ),
)


@dataclass(frozen=True)
class Grid:
    """What is crossed with what: depths, strengths in STREAM's unit (of the weaker one in a comparison), how
    many concepts, random directions, orders of the ten sentences and pairs of two."""

    depths: tuple[float | None, ...]
    strengths: tuple[float, ...]
    concepts: int
    randoms: int
    orders: int
    pairs: int


SHORT = Grid((0.25,), (1.0,), 2, 1, 1, 2)
GRID = Grid((0.1, 0.25, 0.5, 0.59, 0.69), (0.5, 1.0, 2.0, 4.0), 4, 2, 5, 3)


def numbered(sentences: Sequence[str]) -> str:
    return "\n".join(f"{k}. {sentence}" for k, sentence in enumerate(sentences, 1))


def orders(count: int) -> list[list[int]]:
    """So many shuffled orders of SENTENCES: the first one moved on by three places each time, so that no
    sentence stands in one place twice in ten."""
    first = np.random.default_rng(0).permutation(len(SENTENCES))
    return [np.roll(first, 3 * k).tolist() for k in range(count)]


def spans(engine: Engine, opening: str, sentences: Sequence[str]) -> list[tuple[int, int]]:
    """The tokens of each numbered sentence within the first turn."""
    messages = [{"role": "user", "content": opening}, {"role": "assistant", "content": injection.REPLY}]
    text = engine.chat_text(messages, ask=False)
    after = text.index(numbered(sentences))
    return [token_span(engine.tokenizer, text, sentence, after) for sentence in sentences]


class Localisation(Suite):
    """The suite, over a Grid (by default SHORT)."""

    recorded_as = "localisation"
    turns = ("user", "assistant", "user")

    def __init__(self, grid: Grid | None = None):
        self.grid = grid or SHORT

    def measure(self, engine: Engine, protocol, replies) -> dict:
        where = sites(self.grid.depths, len(engine.live.order))
        what = thoughts(self.grid.concepts, self.grid.randoms)
        vectors = Vectors(engine, where, what)
        priors, cells = self._locate(engine, where, what, vectors)
        still, compared = self._compare(engine, where, what, vectors)
        return {
            "unit": STREAM,
            "strengths": list(self.grid.strengths),
            "sites": [site.to_json() for site in where],
            "contrast": {str(p): rounded(length) for p, length in vectors.contrast.items()},
            "texts": {
                "sentences": list(SENTENCES),
                "localisation": [TEN, injection.REPLY, WHICH],
                "comparison": [TWO, injection.REPLY, *(text for _, text in COMPARE)],
            },
            "orders": orders(self.grid.orders),
            "priors": priors,
            "cells": cells,
            "comparison": {
                "ratio": RATIO,
                "priors": still,
                "cells": compared,
            },
        }

    def _locate(self, engine: Engine, where, what, vectors: Vectors) -> tuple[list, list[dict]]:
        """(log-probabilities of 1 to 10 and their mass with nothing added, by order; a cell for each order,
        site, strength and thought, with those of all ten places of the injection)."""
        tokens, priors, cells = rating_token_ids(engine.tokenizer), [], []

        def read(_, logprobs: torch.Tensor) -> dict:
            (ratings,) = read_ratings(logprobs, len(tokens.open_ones), tokens)
            with np.errstate(all="ignore"):
                total = np.logaddexp.reduce(ratings)
                return {"logprobs": rounded(ratings - total), "mass": rounded(np.exp(total))}

        for number, order in enumerate(orders(self.grid.orders)):
            sentences = [SENTENCES[i] for i in order]
            opening = TEN + numbered(sentences)
            first, (follow,) = split_turns(engine, opening, [WHICH])
            places, heads = spans(engine, opening, sentences), []
            pushes: list[tuple[Push, ...]] = [()]
            for site in where:
                for strength in self.grid.strengths:
                    for thought in what:
                        head = {"kind": thought.kind, "name": thought.name, **site.to_json()}
                        heads.append({"order": number, **head, "strength": strength})
                        pushes += [vectors.pushes(site, thought, strength, *place) for place in places]
            follows = [follow, *(follow + (one,) for one in tokens.open_ones)]
            steering = Steering(vectors.table, pushes)
            prior, *read_off = answers_after(engine, first, follows, len(pushes), read, steering)
            priors.append(prior)
            for k, head in enumerate(heads):
                here = read_off[10 * k : 10 * k + 10]
                cells.append(head | {what: [one[what] for one in here] for what in ("logprobs", "mass")})
        return priors, cells

    def _compare(self, engine: Engine, where, what, vectors: Vectors) -> tuple[list, list[dict]]:
        """(readings with nothing added, by pair and question; a cell for each pair, site, strength and
        thought): log-odds of answering 1 against 2 with the first sentence's injection the stronger, then
        with the second's."""
        tokens, priors, cells = rating_token_ids(engine.tokenizer), [], []
        one, two = tokens.one_to_nine[0], tokens.one_to_nine[1]

        def read(_, logprobs: torch.Tensor) -> dict:
            answers = log_odds(logprobs, one, two)
            return {k: answers[k] for k in ("log_odds", "answered")}

        for pair in range(self.grid.pairs):
            sentences = SENTENCES[2 * pair : 2 * pair + 2]
            opening = TWO + numbered(sentences)
            first, follows = split_turns(engine, opening, [text for _, text in COMPARE])
            (a, b), heads = spans(engine, opening, sentences), []
            pushes: list[tuple[Push, ...]] = [()]
            for site in where:
                for strength in self.grid.strengths:
                    for thought in what:
                        head = {"kind": thought.kind, "name": thought.name, **site.to_json()}
                        heads.append({"pair": pair, **head, "strength": strength})
                        for x, y in ((RATIO, 1.0), (1.0, RATIO)):
                            pushes.append(
                                vectors.pushes(site, thought, x * strength, *a)
                                + vectors.pushes(site, thought, y * strength, *b)
                            )
            steering = Steering(vectors.table, pushes)
            prior, *read_off = answers_after(engine, first, follows, len(pushes), read, steering)
            priors.append(rounded(prior["log_odds"]))
            for head, (left, right) in zip(
                heads, zip(read_off[::2], read_off[1::2], strict=True), strict=True
            ):
                cells.append(
                    head
                    | {
                        key: {
                            "log_odds": rounded([left["log_odds"][k], right["log_odds"][k]]),
                            "answered": bool(left["answered"][k] and right["answered"][k]),
                        }
                        for k, (key, _) in enumerate(COMPARE)
                    }
                )
        return priors, cells

    def check_tokenizer(self, tokenizer) -> None:
        rating_token_ids(tokenizer)
        token_span(tokenizer, "One. Two.", "Two.")

    def fingerprint(self) -> str:
        parts = (injection.fingerprint(), self.grid, SENTENCES, RATIO, TEN, WHICH, TWO, COMPARE)
        return hashlib.sha256("\n".join(map(ascii, parts)).encode()).hexdigest()

    def work(self, protocol: Protocol) -> Work:
        grid = self.grid
        cells = len(grid.depths) * len(grid.strengths) * len(thoughts(grid.concepts, grid.randoms))
        ten = [TEN + numbered(SENTENCES), WHICH] * (grid.orders * (1 + 10 * cells))
        two = [TWO + numbered(SENTENCES[:2]), *(text for _, text in COMPARE)] * (grid.pairs * (1 + 2 * cells))
        return Work(direction_texts() + ten + two)
