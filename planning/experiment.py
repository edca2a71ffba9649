"""An experiment: a name and a function that builds a recipe for a model of any depth.

Positions are those of the published 64-layer pair, scaled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from traceback import walk_tb
from types import FrameType, ModuleType

import prompts
from errors import FrankenError, RecipeError, nearest
from surgery import recipes
from surgery.recipes import Recipe, describe_change, identity

PUBLISHED_DEPTH = 64
CONTROLS = ("placebo", "matched noise", "injection")
QUICK, SHORT, EVERYTHING = (prompts.GROUPS[name] for name in ("quick", "short", "all"))


@dataclass
class Model:
    """What an experiment builds on: the unmodified recipe, and positions of the 64-layer pair scaled to its
    depth."""

    recipe: Recipe
    seed: int = 0
    scaled: list[tuple[str, object, object]] = field(default_factory=list)  # (what, asked for, applied)
    models: Mapping[str, str] = field(
        default_factory=dict
    )  # a model's path or hub id -> the source it is here

    @property
    def n(self) -> int:
        """Layers."""
        return len(self.recipe)

    @property
    def model(self) -> Recipe:
        """Another name of `recipe`, which users' files have."""
        return self.recipe

    def _scale(self, position: int) -> int:
        return position * self.n // PUBLISHED_DEPTH

    def at(self, layer: int) -> int:
        """The layer that lies as deep as `layer` of 64. Raises RecipeError if there is no such layer of
        64."""
        if not 0 <= layer < PUBLISHED_DEPTH:
            raise RecipeError(
                f"layer {layer} is out of range: positions are given for {PUBLISHED_DEPTH} layers"
            )
        self.scaled.append(("layer", layer, self._scale(layer)))
        return self._scale(layer)

    def cut(self, boundary: int) -> int:
        """The boundary as deep as the one before layer `boundary` of 64 (64: the end)."""
        if not 0 <= boundary <= PUBLISHED_DEPTH:
            raise RecipeError(
                f"boundary {boundary} is out of range: positions are given for {PUBLISHED_DEPTH} layers"
            )
        self.scaled.append(("boundary", boundary, self._scale(boundary)))
        return self._scale(boundary)

    def block(self, start: int, stop: int) -> tuple[int, int]:
        """The layers [start, stop) of 64; at least one layer. Raises RecipeError if 64 layers have no such
        block."""
        _check_published(start, stop)
        a = min(self._scale(start), self.n - 1)
        b = max(self._scale(stop), a + 1)
        self.scaled.append(("layers", [start, stop], [a, b]))
        return a, b

    def chunks(
        self, first: tuple[int, int], second: tuple[int, int]
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Two blocks of equal length; where rounding makes them differ, both take the shorter length.

        Raises RecipeError if 64 layers have no such blocks or they differ in length there.
        """
        for block in (first, second):
            _check_published(*block)
        if first[1] - first[0] != second[1] - second[0]:
            raise RecipeError(f"chunks {list(first)} and {list(second)} differ in length")
        (a, a_end), (b, b_end) = ((self._scale(x), self._scale(y)) for x, y in (first, second))
        length = max(1, min(a_end - a, b_end - b))
        self.scaled += [("layers", list(first), [a, a + length]), ("layers", list(second), [b, b + length])]
        return (a, a + length), (b, b + length)


def _check_published(start: int, stop: int) -> None:
    if not 0 <= start < stop <= PUBLISHED_DEPTH:
        raise RecipeError(
            f"layers [{start}:{stop}] are empty or out of range: positions are given for {PUBLISHED_DEPTH}"
            " layers"
        )


USER_FILE = "user_experiments"  # what a user's file of experiments is called as a module


def one_line(e: Exception | SystemExit) -> str:
    """An error's kind and the first line of its message, with the place in a user's file that led to it."""
    frames = [(frame, line) for frame, line in walk_tb(e.__traceback__)]
    own = [(f.f_code.co_filename, line) for f, line in frames if f.f_globals.get("__name__") == USER_FILE]
    place = f" ({os.path.basename(own[-1][0])}, line {own[-1][1]})" if own else ""
    return f"{type(e).__name__}: {(str(e).splitlines() or ['no message'])[0]}{place}{_meant(e, frames)}"


def _meant(e: Exception | SystemExit, frames: Sequence[tuple[FrameType, int]]) -> str:
    """The nearest name, where a user's file asks for one that there is not."""
    if isinstance(e, ImportError) and (wanted := re.match(r"cannot import name '(\w+)'", str(e))):
        return nearest(wanted[1], [*recipes.__all__, "Experiment"])
    if isinstance(e, NameError) and frames and e.name:
        return nearest(e.name, {**frames[-1][0].f_globals, **frames[-1][0].f_locals})
    if isinstance(e, AttributeError) and isinstance(e.obj, Model | ModuleType) and e.name:
        return nearest(e.name, dir(e.obj))
    return ""


@dataclass(frozen=True)
class Experiment:
    """A named surgery. `build` takes a Model and returns the Recipe; it must not depend on anything else."""

    name: str
    group: str
    build: Callable[[Model], Recipe]
    hypothesis: str = ""
    changes_nothing: bool = False  # the baseline and the injection: not being changed is their point
    suites: tuple[str, ...] | None = None  # what it is asked; None: the run's
    control: str | None = None  # what kind of control it is; see CONTROLS
    sweep: dict | None = None  # of which sweep, and where in it; see `sweep`
    also: tuple[str, ...] = ()  # suites that it is asked besides, where they can be asked of its recipe

    def plan(self, n_layers: int, seed: int = 0, models: Mapping[str, str] | None = None) -> Plan:
        """The recipe for a model of this depth, with what was asked for; `models` as in Model. Raises
        FrankenError naming the experiment."""
        model = Model(identity(n_layers), seed, models=models or {})
        try:
            recipe = self.build(model)
        except RecipeError as e:
            raise FrankenError(f"experiment {self.name}: {e}") from e
        except (Exception, SystemExit) as e:  # a user's own function may raise anything
            raise FrankenError(f"experiment {self.name}: {one_line(e)}") from e
        if not isinstance(recipe, Recipe):
            raise FrankenError(
                f"experiment {self.name}: build returned {type(recipe).__name__}, not a Recipe"
            )
        suites, notes = self._asked(recipe, model.recipe)
        asked = [(what, str(a)) for what, a, _ in model.scaled]
        applied = [(what, str(b)) for what, _, b in model.scaled]
        merged = len(set(applied)) < len(set(asked))
        if merged:
            notes.append(
                f"collapsed: on {n_layers} layers, different positions of the {PUBLISHED_DEPTH}-layer pair"
                " become one"
            )
        idle = recipe == model.recipe and not self.changes_nothing
        if idle:
            notes.append(f"collapsed: on {n_layers} layers this experiment changes nothing")
        change = describe_change(recipe, model.recipe)
        return Plan(
            replace(self, suites=suites), recipe, change, model.scaled, notes, collapsed=merged or idle
        )

    def _asked(self, recipe: Recipe, original: Recipe) -> tuple[tuple[str, ...] | None, list[str]]:
        """What this recipe is asked, with notes on what of `also` it cannot be.

        Raises FrankenError for a suite of its own that hands a cache between recipes of different depth.
        """
        suites, notes = self.suites, []
        for name in prompts.ONE_DEPTH:
            if len(recipe) == len(original):
                continue
            depths = f"{len(original)} layers in the intact model, {len(recipe)} in the changed one"
            if name in (suites or ()):
                raise FrankenError(
                    f"experiment {self.name}: the suite {name} hands one model's cache to the other, which"
                    f" needs equal depths: {depths} (--also {name} asks it only where it can be asked)"
                )
            if name in self.also:
                notes.append(f"not asked {name}, which needs equal depths: {depths}")
        if self.also:
            fits = len(recipe) == len(original) and recipe != original
            more = [name for name in self.also if fits or name not in prompts.ONE_DEPTH]
            suites = tuple(dict.fromkeys([*(suites or EVERYTHING), *more]))
        return suites, notes


@dataclass(frozen=True)
class Plan:
    """An experiment fitted to a model's depth."""

    experiment: Experiment
    recipe: Recipe
    change: str  # one line for people
    scaled: list[tuple[str, object, object]]
    notes: list[str]
    collapsed: bool = False  # on this depth its positions coincide, or it changes nothing
    matched: dict | None = None  # how noise was matched to another experiment; see matched_noise.py

    def to_json(self) -> dict:
        e = self.experiment
        positions = [
            {"what": what, "asked_of_64": asked, "applied": applied} for what, asked, applied in self.scaled
        ]
        return {
            "name": e.name,
            "group": e.group,
            "hypothesis": e.hypothesis,
            "suites": None if e.suites is None else list(e.suites),
            "control": e.control,
            "sweep": e.sweep,
            "matched": self.matched,
            "change": self.change,
            "positions": positions,
            "collapsed": self.collapsed,
            "notes": self.notes,
            "recipe": self.recipe.to_json(),
        }
