"""What the further injection suites add, and where: concepts and random directions at single layers.

`concept` directions are those of suites/injection.py. A `random` direction is Gaussian, drawn anew for every
layer, and as long as a concept's: what it does, any disturbance of that size does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.generation import Engine
from suites import injection
from suites.injection import find_directions, middle_third
from suites.steering import FOREVER, Push, single_layers

STREAM = (
    "times the mean norm of the residual stream after that layer, at the last token of the neutral prompts"
)
CONTRAST = (
    "times the contrast of the concept's prompts and the neutral ones itself, as open-introspection has it"
)


@dataclass(frozen=True)
class Site:
    """Where something is added: after these layers. `depth` is the one asked for; None: the middle third."""

    depth: float | None
    layers: tuple[int, ...]

    def to_json(self) -> dict:
        return {"depth": self.depth, "layers": [self.layers[0], self.layers[-1] + 1]}


def sites(depths: Sequence[float | None], layers: int) -> list[Site]:
    """The single layers at these depths, without those that fall together, and the middle third for None."""
    single = single_layers([depth for depth in depths if depth is not None], layers)
    made = [Site(depth, (p,)) for p, depth in single.items()]
    return made + ([Site(None, tuple(middle_third(layers)))] if None in depths else [])


@dataclass(frozen=True)
class Thought:
    """One direction: a concept by its name, or a random one by its number."""

    kind: str  # "concept" or "random"
    name: str


def thoughts(concepts: int, randoms: int) -> list[Thought]:
    """The first so many CONCEPTS, then so many random directions."""
    made = [Thought("concept", name) for name in injection.CONCEPTS[:concepts]]
    return made + [Thought("random", f"random {k + 1}") for k in range(randoms)]


class Vectors:
    """The table of vectors for `Steering`: every thought after every layer of the sites.

    Args:
        unit: STREAM scales all directions of a layer alike, CONTRAST keeps each concept's own length; a
            random direction is then as long as the mean of all concepts'.
    """

    def __init__(self, engine: Engine, where: Sequence[Site], what: Sequence[Thought], unit: str = STREAM):
        layers = sorted({p for site in where for p in site.layers})
        directions = find_directions(engine, layers)
        self.contrast = {p: float(directions.contrast[p].mean()) for p in layers}
        self._index: dict[tuple[int, Thought], int] = {}
        rows = []
        for p in layers:
            for thought in what:
                self._index[p, thought] = len(rows)
                rows.append(self._direction(directions.added[p], directions.contrast[p], p, thought, unit))
        self.table = torch.stack(rows)

    @staticmethod
    def _direction(added, contrast, layer: int, thought: Thought, unit: str) -> torch.Tensor:
        if thought.kind == "concept":
            c = injection.CONCEPTS.index(thought.name)
            return added[c] * (contrast[c] if unit == CONTRAST else 1.0)
        number = int(thought.name.split()[1])
        drawn = torch.randn(added.shape[1], generator=torch.Generator().manual_seed(1000 * number + layer))
        length = added.norm(dim=-1).mean() * (contrast.mean() if unit == CONTRAST else 1.0)
        return drawn / drawn.norm() * length

    def pushes(
        self, site: Site, thought: Thought, strength: float, start: int = 0, stop: int = FOREVER
    ) -> tuple[Push, ...]:
        """What Steering takes for one row."""
        return tuple(Push(p, self._index[p, thought], strength, start, stop) for p in site.layers)
