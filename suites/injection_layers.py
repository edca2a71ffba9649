"""Injection layer by layer: the keyed questions and the naming of suites/injection.py, with the first turn's
cache changed after a single layer, over a grid of depths and strengths, beside what must not count.

Cells of four kinds: `none` (nothing added), `concept`, `random` (directions of equal norm) and `garbled`
(nothing added, but the first message's words shuffled or replaced by random tokens: an odd input is not an
odd model). Every cell is asked all questions and control questions, and the naming in shuffled orders of the
list, so that a name's place in it is not what is read.

Cost: one reading of a first turn and, on it, of every question and naming, for each cell: SHORT has 9 cells
of one framing, GRID 291 of each of two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.generation import Engine
from prompts import answer_token_ids
from suites import injection
from suites.base import Protocol, Suite, Work
from suites.injected import STREAM, Site, Vectors, sites, thoughts
from suites.injection import Names, questions, split_turns, turns_with
from suites.reading import log_odds
from suites.steering import Push, Steering, answers_after, rounded, token_span

ORDERS = 5  # of the list in the naming question
GARBLED = ("shuffled words", "random tokens")


@dataclass(frozen=True)
class Grid:
    """What is crossed with what. depths: fractions of the depth, None for the middle third; strengths in
    STREAM's unit; concepts, randoms: how many; framings: of suites/injection.py."""

    depths: tuple[float | None, ...]
    strengths: tuple[float, ...]
    concepts: int
    randoms: int
    framings: tuple[str, ...] = field(default_factory=lambda: tuple(injection.FRAMINGS))


SHORT = Grid((0.69,), (0.5, 2.0), 2, 1, ("informed",))
GRID = Grid((0.25, 0.5, 0.59, 0.64, 0.69, None), (0.25, 0.5, 1.0, 2.0), 9, 3)


def orders(names: Sequence[str]) -> list[list[int]]:
    """The names' indices in ORDERS shuffled orders, the same in every run."""
    return [np.random.default_rng(k).permutation(len(names)).tolist() for k in range(ORDERS)]


def naming(order: Sequence[int]) -> str:
    """The naming question with the list in that order."""
    words = [injection.CONCEPTS[i] for i in order]
    return (
        f"Which of these words is on your mind: {', '.join(words[:-1])} or {words[-1]}? Answer with one word."
    )


def shuffled_words(text: str) -> str:
    words = text.split()
    return " ".join(words[i] for i in np.random.default_rng(0).permutation(len(words)))


def random_tokens(tokenizer, ids: Sequence[int], span: tuple[int, int]) -> tuple[int, ...]:
    """The ids with those in [span) replaced by ordinary tokens of the vocabulary, drawn evenly."""
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ordinary = np.array(sorted(set(tokenizer.get_vocab().values()) - special))
    drawn = np.random.default_rng(0).choice(ordinary, span[1] - span[0]).tolist()
    return (*ids[: span[0]], *drawn, *ids[span[1] :])


def _log_odds(logprobs: torch.Tensor, answers) -> dict:
    """The cell's readings, a list each over its questions."""
    read = log_odds(logprobs, *answers)
    return {k: rounded(read[k]) for k in ("log_odds", "mass", "entropy")} | {
        "answered": read["answered"].tolist()
    }


class InjectionLayers(Suite):
    """The suite, over a Grid (by default SHORT)."""

    recorded_as = "injection_layers"
    turns = ("user", "assistant", "user")

    def __init__(self, grid: Grid | None = None):
        self.grid = grid or SHORT

    def measure(self, engine: Engine, protocol, replies) -> dict:
        where = sites(self.grid.depths, len(engine.live.order))
        what = thoughts(self.grid.concepts, self.grid.randoms)
        listed, answers = orders(injection.CONCEPTS), answer_token_ids(engine.tokenizer)
        asked = turns_with(injection.OPENING, naming(listed[0]))
        vectors, names = Vectors(engine, where, what), Names(engine, asked, injection.CONCEPTS)
        cells, probes = [], []

        for framing in self.grid.framings:
            opening, second_turn = injection.FRAMINGS[framing], questions(framing)
            probes += [
                {k: getattr(p, k) for k in ("id", "kind", "pair", "text", "question")} for p in second_turn
            ]
            for probe, p in zip(probes[-len(second_turn) :], second_turn, strict=True):
                probe |= {"keyed": p.if_changed, "framing": framing}
            texts = [p.text for p in second_turn] + [naming(order) for order in listed]

            def read_cells(heads: list[dict], first, follows, steering=None, second_turn=second_turn):
                plain, named = follows[: len(second_turn)], follows[len(second_turn) :]
                all_follows = plain + [row for ids in named for row in names.rows(ids)]

                def read(row: int, logprobs: torch.Tensor) -> dict:
                    each = np.split(logprobs[len(second_turn) :].cpu().numpy(), len(listed))
                    return heads[row] | {
                        **_log_odds(logprobs[: len(second_turn)], answers),
                        "naming": rounded([names.logprobs(rows) for rows in each]),
                    }

                return answers_after(engine, first, all_follows, len(heads), read, steering)

            # 1) nothing and every thought, at every site, in every strength, on the same first turn
            first, follows = split_turns(engine, opening, texts)
            heads: list[dict] = [self._head(framing, "none", "none")]
            pushes: list[tuple[Push, ...]] = [()]
            for site in where:
                for strength in self.grid.strengths:
                    for thought in what:
                        heads.append(self._head(framing, thought.kind, thought.name, site, strength))
                        pushes.append(vectors.pushes(site, thought, strength))
            cells += read_cells(heads, first, follows, Steering(vectors.table, pushes))

            # 2) garbled first turns on the model as it is
            garbled = opening.replace(injection.OPENING, shuffled_words(injection.OPENING))
            turns = [split_turns(engine, garbled, texts), (self._random(engine, opening, first), follows)]
            for name, (first, follows) in zip(GARBLED, turns, strict=True):
                cells += read_cells([self._head(framing, "garbled", name)], first, follows)
        return {
            "unit": STREAM,
            "concepts": list(injection.CONCEPTS),
            "contrast": {str(p): rounded(length) for p, length in vectors.contrast.items()},
            "strengths": list(self.grid.strengths),
            "sites": [site.to_json() for site in where],
            "orders": listed,
            "probes": probes,
            "cells": cells,
            "texts": {
                "first_turn": {f: [injection.FRAMINGS[f], injection.REPLY] for f in self.grid.framings},
                "naming": [naming(order) for order in listed],
            },
        }

    @staticmethod
    def _head(framing: str, kind: str, name: str, site: Site | None = None, strength: float = 0.0) -> dict:
        where = site.to_json() if site else {"depth": None, "layers": None}
        return {"framing": framing, "kind": kind, "name": name, **where, "strength": strength}

    @staticmethod
    def _random(engine: Engine, opening: str, first: tuple[int, ...]) -> tuple[int, ...]:
        messages = [{"role": "user", "content": opening}, {"role": "assistant", "content": injection.REPLY}]
        text = engine.chat_text(messages, ask=False)
        return random_tokens(engine.tokenizer, first, token_span(engine.tokenizer, text, injection.OPENING))

    def check_tokenizer(self, tokenizer) -> None:
        answer_token_ids(tokenizer)
        token_span(tokenizer, "Yes or no", "or")

    def fingerprint(self) -> str:
        parts = (injection.fingerprint(), self.grid, [naming(o) for o in orders(injection.CONCEPTS)], GARBLED)
        return hashlib.sha256("\n".join(map(ascii, parts)).encode()).hexdigest()

    def work(self, protocol: Protocol) -> Work:
        pushed = len(self.grid.depths) * len(self.grid.strengths)
        cells = 1 + pushed * len(thoughts(self.grid.concepts, self.grid.randoms)) + len(GARBLED)
        texts = direction_texts()
        for framing in self.grid.framings:
            second_turn = [p.text for p in questions(framing)] + [
                naming(o) for o in orders(injection.CONCEPTS)
            ]
            texts += [injection.FRAMINGS[framing], *second_turn] * cells
        return Work(texts)


def direction_texts() -> list[str]:
    """What is read to find the directions."""
    words = (*injection.CONCEPTS, *injection.NEUTRAL)
    return [about.format(word) for about in injection.ABOUT for word in words]
