"""Layers that two recipes begin with alike: what enters the first that differs is computed once for both.

Of everything that is asked, hidden states are kept at a few positions: where the recipe that runs departs
from the unmodified one, and where it departs from recipes that are to come, if they are known.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from surgery.recipes import Recipe

MARKS = 3  # at most at so many positions of a recipe hidden states are kept for recipes to come


def in_common(a: Recipe, b: Recipe) -> int:
    """How many leading positions hold the same in both and run one after the other; 0 with another
    embedding."""
    if a.embed != b.embed:
        return 0
    serial = min(recipe.parallel[0][0] if recipe.parallel else len(recipe) for recipe in (a, b))
    pairs = zip(a.slots[:serial], b.slots, strict=False)
    return next((p for p, (one, other) in enumerate(pairs) if one != other), min(serial, len(b)))


@lru_cache(8)  # asked at every pass over the layers
def marks(recipe: Recipe, coming: tuple[Recipe, ...], most: int = MARKS) -> frozenset[int]:
    """The positions at which hidden states of `recipe` are worth most to the recipes that are to come: each
    of them begins at the last one up to which it is the same. Greedily, `most` of them."""
    shared = [p for p in (in_common(recipe, other) for other in coming) if 0 < p < len(recipe)]
    chosen: set[int] = set()
    for _ in range(most):
        saved = {
            at: sum(max([p for p in chosen | {at} if p <= reach], default=0) for reach in shared)
            for at in set(shared) - chosen
        }
        if not saved:
            break
        chosen.add(max(saved, key=lambda at: (saved[at], at)))
    return frozenset(chosen)


class Entered:
    """Hidden states that entered a position, by what was asked, and by the embedding and the positions before
    it that they went through."""

    def __init__(self):
        self._kept: dict[tuple, dict[tuple, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self._kept.clear()

    def best(self, asked: tuple, recipe: Recipe) -> tuple[int, torch.Tensor | None]:
        """(position, what enters it) of the last position up to which an earlier recipe was the same; (0,
        None) where there is none."""
        serial = recipe.parallel[0][0] if recipe.parallel else len(recipe)
        fitting = [
            (len(slots), hidden)
            for (embed, slots), hidden in self._kept.get(asked, {}).items()
            if embed == recipe.embed and len(slots) <= serial and recipe.slots[: len(slots)] == slots
        ]
        return max(fitting, key=lambda one: one[0], default=(0, None))

    def keep(
        self, asked: tuple, recipe: Recipe, at: int, hidden: torch.Tensor, beside: int, most: int
    ) -> None:
        """Keep what enters position `at`, beside at most `beside` others of the same question, the latest; of
        all questions at most `most` bytes."""
        mine = self._kept.pop(asked, {})
        key = recipe.embed, recipe.slots[:at]
        mine.pop(key, None)
        while len(mine) > beside:
            del mine[next(iter(mine))]
        held = sum(t.nbytes for others in self._kept.values() for t in others.values())
        while mine and held + sum(t.nbytes for t in mine.values()) + hidden.nbytes > most:
            del mine[next(iter(mine))]
        if held + sum(t.nbytes for t in mine.values()) + hidden.nbytes <= most:
            mine[key] = hidden
        if mine:
            self._kept[asked] = mine
