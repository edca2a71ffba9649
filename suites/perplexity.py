"""Perplexity on neutral text."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from engine.generation import Engine
from suites.base import Protocol, Suite, Work, finite

WINDOW, CONTEXT = 768, 256  # tokens scored per forward pass of a long text, and context kept before them


class Perplexity(Suite):
    """exp of the mean negative log-likelihood per token over the protocol's texts, weighted by tokens.

    The first token of a text is context only. Long texts are scored in windows of WINDOW tokens with CONTEXT
    before.
    """

    def measure(self, engine: Engine, protocol: Protocol, replies) -> dict:
        pieces, owner = [], []
        for name, text in protocol.texts:
            ids = engine.text_ids(text)
            for start in range(1, len(ids), WINDOW):
                pieces.append((ids[max(0, start - CONTEXT) : start], ids[start : start + WINDOW]))
                owner.append(name)
        nll: dict[str, list[np.ndarray]] = defaultdict(list)
        for name, logprobs in zip(owner, engine.loglikelihood(pieces), strict=True):
            nll[name].append(-logprobs.astype(np.float64))
        texts = []
        for name, _ in protocol.texts:
            values = np.concatenate(nll[name]) if nll[name] else np.zeros(0)
            mean = values.mean() if len(values) else math.nan
            texts.append({"id": name, "tokens": len(values), "nll": finite(mean), "perplexity": _exp(mean)})
        every = np.concatenate([v for parts in nll.values() for v in parts])
        return {
            "tokens": len(every),
            "nll": finite(every.mean()),
            "perplexity": _exp(every.mean()),
            "texts": texts,
        }

    def work(self, protocol: Protocol) -> Work:
        return Work([text for _, text in protocol.texts])


def _exp(value: float) -> float | None:
    with np.errstate(over="ignore"):
        return finite(np.exp(value))
