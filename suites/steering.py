"""Adding vectors to the residual stream of some rows, at some layers and tokens, and reading what follows.

What all suites that inject something have in common. Weights and modules are not touched: the engine's own
loop over the layers adds the vectors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.generation import Engine
from engine.layers import run_layer
from engine.reading import CommonStates

ASKED_AT_ONCE = 8  # rows whose questions are read together: 8 x 45 x 152k float32 numbers are 220 MB
FOREVER = 2**31 - 1  # a token position beyond every sequence


@dataclass(frozen=True)
class Push:
    """`strength` times row `vector` of a table of vectors, added after the layer at running position `layer`,
    at token positions [start, stop) of a sequence."""

    layer: int
    vector: int
    strength: float
    start: int = 0
    stop: int = FOREVER


class Steering:
    """The pushes of every row: what `Engine.complete(layer=...)` takes.

    Args:
        vectors: float32 [vectors, hidden].
        rows: for every row (or request) its pushes; none leaves it as it is.
    """

    def __init__(self, vectors: torch.Tensor, rows: Sequence[Sequence[Push]]):
        self.vectors, self.rows = vectors, rows
        self._grouped: tuple[tuple[int, ...], dict[int, list]] = ((), {})

    def __call__(self, rows: Sequence[int]) -> Callable:
        """What runs each layer in one pass over a batch that holds these rows, in this order."""
        by_layer, position, placed = self._by_layer(tuple(rows)), itertools.count(), {}

        def layer(module, hidden, mask, cos_sin, at, cache):
            out, p = run_layer(module, hidden, mask, cos_sin, at, cache), next(position)
            if p not in by_layer:
                return out
            index, amount, start, stop = by_layer[p] = [t.to(out.device) for t in by_layer[p]]
            if out.device not in placed:
                placed[out.device] = at.expand(len(out), -1)
            tokens = placed[out.device][index]
            here = (tokens >= start[:, None]) & (tokens < stop[:, None])
            # where, not a product: a broken model's direction may be NaN and is not to reach other tokens
            added = torch.where(here[..., None], amount.to(out.dtype)[:, None], 0)
            return out.index_add(0, index, added)

        return layer

    def _by_layer(self, rows: tuple[int, ...]) -> dict[int, list]:
        """{position: [row in the batch, what is added [k, hidden], start, stop]}; kept until rows leave."""
        if self._grouped[0] != rows:
            pushes: dict[int, list[tuple[int, Push]]] = {}
            for place, row in enumerate(rows):
                for push in self.rows[row]:
                    pushes.setdefault(push.layer, []).append((place, push))
            made = {}
            for p, here in pushes.items():
                strength = torch.tensor([push.strength for _, push in here])
                made[p] = [
                    torch.tensor([place for place, _ in here]),
                    strength[:, None] * self.vectors[[push.vector for _, push in here]],
                    torch.tensor([push.start for _, push in here]),
                    torch.tensor([push.stop for _, push in here]),
                ]
            self._grouped = rows, made
        return self._grouped[1]


@torch.inference_mode()
def answers_after(
    engine: Engine,
    first: tuple[int, ...],
    follows: Sequence[tuple[int, ...]],
    rows: int,
    read: Callable[[int, torch.Tensor], object],
    layer: Callable[[list[int]], Callable] | None = None,
    common: CommonStates | None = None,
) -> list:
    """read(row, next-token log-probabilities (nats) after each of `follows` [follows, vocab]) for each of
    `rows` first turns; they are where the model is.

    layer(rows of a batch) makes what runs the layers while their first turn is read (see Engine.prefill); the
    questions are asked on that cache with nothing added. None leaves the first turn alone. `common` says
    below which position all rows' caches are the same; one serves all calls with these turns and weights.
    """
    results: list = [None] * rows

    def run(batch: list[int]) -> None:
        caches = engine.empty_caches(len(batch), len(first))
        engine.prefill([first] * len(batch), caches, layer=layer and layer(batch))
        for begin in range(0, len(batch), ASKED_AT_ONCE):
            here = range(begin, min(begin + ASKED_AT_ONCE, len(batch)))
            logprobs = engine.next_token_logprobs(
                [*follows] * len(here),
                caches,
                [row for row in here for _ in follows],
                on_device=True,
                common=common,
            )
            for row, part in zip(here, logprobs.split(len(follows)), strict=True):
                results[batch[row]] = read(batch[row], part)

    engine.in_batches([len(first)] * rows, run)
    return results


def single_layers(depths: Iterable[float], layers: int) -> dict[int, float]:
    """{position: depth} of the layers nearest to depths from 0 to 1, as 0.69 of 64 is layer 44; the first
    depth of those that fall together on a shallow model."""
    by_position: dict[int, float] = {}
    for depth in depths:
        by_position.setdefault(min(layers - 1, round(depth * layers)), depth)
    return by_position


def token_span(tokenizer, text: str, part: str, after: int = 0) -> tuple[int, int]:
    """[first, last + 1) of the tokens of `text` that overlap with `part`, looked for from character `after`.

    Raises ValueError if the text does not hold the part or the tokenizer gives no offsets.
    """
    begin = text.index(part, after)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("a tokenizer without offsets cannot say which tokens a sentence has")
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    inside = [k for k, (a, b) in enumerate(offsets) if a < begin + len(part) and b > begin]
    return inside[0], inside[-1] + 1


def rounded(values, digits: int = 4):
    """Floats cut to so many decimals, None where undefined, for lists of any depth: results stay small."""
    if isinstance(values, list | tuple | np.ndarray):
        return [rounded(value, digits) for value in values]
    return round(float(values), digits) if math.isfinite(values) else None
