"""The named configurations, in order of priority, and the sweeps.

Configurations are written for the 64-layer pair and scale to any depth: `m.at(10)` is the layer that lies as
deep as layer 10 of 64 does, `m.cut(32)` the boundary as deep as between layers 31 and 32. What was asked for
and what was applied are both recorded. One line adds an experiment; to add one of your own without editing
this file, put

    from experiments import Experiment, swap
    EXPERIMENTS = [Experiment("swap_5_6", "mine", lambda m: swap(m.recipe, m.at(5), m.at(6)), "why")]

into a file and pass it with --experiments-file. A build function gets a `Model` m and returns a recipe:

- `m.recipe`: the unmodified recipe; `m.n`: how many layers it has; `m.seed`: the run's seed;
- `m.at(10)`: the layer as deep as layer 10 of 64; `m.cut(32)`: the boundary as deep as that before layer 32;
- `m.block(24, 40)`: (start, stop) of the layers as deep as 24 to 39 of 64, at least one;
  `m.chunks((16, 32), (32, 48))`: two such blocks of equal length, for swap_chunks.

These lead from recipe to recipe, with positions counted from 0; [start, stop) leaves out stop, and a position
that there is not raises RecipeError. `from experiments import *` brings all of them:

- order: `swap(recipe, i, j)`, `swap_chunks(recipe, (a, b), (c, d))`, `shuffle(recipe, seed)`,
  `reverse(recipe, start, stop)`;
- depth: `delete(recipe, start, stop)`, `keep_every(recipe, n, first=0)`,
  `repeat(recipe, start, stop, times=2, scale=1.0)` (a b a b),
  `double(recipe, start, stop, scale=1.0)` (a a b b);
- how layers run: `attenuate(recipe, scale, start, stop)` scales what they contribute,
  `parallel(recipe, start, stop)` lets them read the same input and hands on the mean;
- another source's weights: `splice(recipe, source, start, stop)`, `with_outer(recipe, source)`,
  `blend(recipe, source, shares)` (with `linear` or `sigmoid(steepness)` for shares that follow the depth);
- other weights: `perturb(recipe, fraction, seed, positions=None)`,
  `permute_units(recipe, seed, what="both")` (the same function).
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import prompts
from errors import FrankenError, RecipeError
from files import read_bytes
from surgery.recipes import (
    PERMUTED,
    Recipe,
    attenuate,
    blend,
    delete,
    describe_change,
    double,
    identity,
    keep_every,
    linear,
    parallel,
    permute_units,
    perturb,
    repeat,
    reverse,
    shuffle,
    sigmoid,
    splice,
    swap,
    swap_chunks,
    with_outer,
)

PUBLISHED_DEPTH = 64
BASELINE = "baseline_instruct"
CONTROLS = ("placebo", "matched noise", "injection")
TWIN = "__matched_noise"  # ends the name of an experiment's noise twin; see matched_noise.py


@dataclass
class Model:
    """What an experiment builds on: the unmodified recipe, and positions of the 64-layer pair scaled to its
    depth."""

    recipe: Recipe
    seed: int = 0
    scaled: list[tuple[str, object, object]] = field(default_factory=list)  # (what, asked for, applied)

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


def _one_line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or ['no message'])[0]}"


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

    def plan(self, n_layers: int, seed: int = 0) -> Plan:
        """The recipe for a model of this depth, with what was asked for. Raises FrankenError naming the
        experiment."""
        model = Model(identity(n_layers), seed)
        try:
            recipe = self.build(model)
        except RecipeError as e:
            raise FrankenError(f"experiment {self.name}: {e}") from e
        except Exception as e:  # a user's own function may raise anything
            raise FrankenError(f"experiment {self.name}: {_one_line(e)}") from e
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


def _base_first(k: int):
    return lambda m: splice(m.recipe, "base", *m.block(0, k))


def _instruct_first(k: int):
    return lambda m: splice(m.recipe, "base", *m.block(k, PUBLISHED_DEPTH))


def _noise(fraction: float, start: int = 0):
    return lambda m: perturb(m.recipe, fraction, m.seed, range(m.cut(start), m.n))


def _swap(i: int, j: int):
    return lambda m: swap(m.recipe, m.at(i), m.at(j))


def _swap_chunks(a: tuple[int, int], b: tuple[int, int]):
    return lambda m: swap_chunks(m.recipe, *m.chunks(a, b))


PLACEBO_SEEDS = 7
QUICK, EVERYTHING = prompts.GROUPS["quick"], prompts.GROUPS["all"]


def _placebo(what: str, k: int) -> Experiment:
    """Other weights, the same function. No two placebos of any runs with seeds below a million share random
    numbers."""
    number = list(PERMUTED).index(what) * PLACEBO_SEEDS + k
    return Experiment(
        f"placebo_{what}_{k}",
        "control",
        lambda m: permute_units(m.recipe, number * 10**6 + m.seed, what),
        f"{PERMUTED[what]} permuted: other weights, the same function",
        suites=QUICK,
        control="placebo",
    )


def _on_block(operation, start: int, stop: int, *args):
    return lambda m: operation(m.recipe, *m.block(start, stop), *args)


def _repeat_layer(layer: int, times: int):
    def build(m: Model) -> Recipe:
        at = m.at(layer)
        return repeat(m.recipe, at, at + 1, times)

    return build


def _parallel(start: int, stop: int):
    def build(m: Model) -> Recipe:
        a, b = m.block(start, stop)
        return parallel(m.recipe, a, b) if b - a > 1 else m.recipe  # one layer beside itself changes nothing

    return build


def _depth(name: str, build: Callable[[Model], Recipe], why: str) -> Experiment:
    return Experiment(name, "depth", build, why)


def _surgeries_of_one_model() -> list[Experiment]:
    """The study's second version, on the instruct model alone; what stands further up is not repeated here.

    Its critical region is layers 36 to 51 of 64: the 16 that, taken from the base, raised P(Yes) most in its
    first version.
    """
    # 1. which layers, and why
    deleted = {
        "delete_first_4": (0, 4, "The first layers are fragile"),
        "delete_first_8": (0, 8, "The first eighth"),
        "delete_first_16": (0, 16, "The first quarter"),
        "delete_28_36": (28, 36, "The middle 8 layers; delete_30_34 has the middle 4"),
        "delete_24_40": (24, 40, "The middle 16 layers"),
        "delete_last_4": (60, 64, "The last layers write the answer"),
        "delete_last_8": (56, 64, "The last eighth"),
        "delete_last_16": (48, 64, "The last quarter"),
        "delete_36_52": (36, 52, "The critical region left out"),
        "keep_first_half": (32, 64, "The first half only"),
        "keep_second_half": (0, 32, "The second half only"),
    }
    reversed_ = {
        "reverse_first_half": (0, 32, "The first half backwards"),
        "reverse_second_half": (32, 64, "The second half backwards"),
        "reverse_all": (0, 64, "All layers backwards"),
        "reverse_21_43": (21, 43, "The middle third backwards"),
        "reverse_36_52": (36, 52, "The critical region backwards"),
        "reverse_27_37": (27, 37, "A middle block of 10 backwards"),
    }
    again = {
        "double_30_34": (double, 30, 34, "Each of 4 middle layers twice"),
        "repeat_30_34": (repeat, 30, 34, "A block of 4 middle layers twice"),
        "double_36_52": (double, 36, 52, "Each layer of the critical region twice"),
        "repeat_36_52": (repeat, 36, 52, "The critical region twice"),
        "double_all": (double, 0, 64, "Every layer twice in place: 128 layers"),
        "repeat_all": (repeat, 0, 64, "The whole model twice: 128 layers"),
    }
    often = {
        "repeat_32_x3": (32, 3, "A middle layer three times"),
        "repeat_32_x5": (32, 5, "A middle layer five times"),
        "repeat_32_x10": (32, 10, "A middle layer ten times"),
        "repeat_0_x5": (0, 5, "The first layer five times"),
        "repeat_63_x5": (63, 5, "The last layer five times"),
        "repeat_44_x5": (44, 5, "A layer of the critical region five times"),
    }
    # 2. experiments of them
    return [
        *(_depth(name, _on_block(delete, a, b), why) for name, (a, b, why) in deleted.items()),
        _depth("keep_every_3rd", lambda m: keep_every(m.recipe, 3), "A third of the depth"),
        _depth("keep_every_4th", lambda m: keep_every(m.recipe, 4), "A quarter of the depth"),
        _depth("keep_odd", lambda m: keep_every(m.recipe, 2, 1), "Layers 1, 3, 5, ...: the odd ones only"),
        *(_depth(name, _on_block(do, a, b), why) for name, (do, a, b, why) in again.items()),
        *(_depth(name, _on_block(reverse, a, b), why) for name, (a, b, why) in reversed_.items()),
        *(_depth(name, _repeat_layer(layer, times), why) for name, (layer, times, why) in often.items()),
    ]


def _contributions() -> list[Experiment]:
    """Repeats that count for less, and layers side by side ("Layers as Painters", arXiv 2407.09298)."""
    scaled = {
        "repeat_24_40_half": (_on_block(repeat, 24, 40, 2, 0.5), "The middle block again, by half"),
        "double_24_40_half": (_on_block(double, 24, 40, 0.5), "Every middle layer again, by half"),
        "attenuate_24_40_half": (
            lambda m: attenuate(m.recipe, 0.5, *m.block(24, 40)),
            "The middle layers contribute half of what they did",
        ),
    }
    beside = {
        "parallel_28_36": (28, 36, "8 middle layers read the same input, and their outputs are averaged"),
        "parallel_24_40": (24, 40, "16 middle layers side by side"),
        "parallel_16_48": (16, 48, "The middle half side by side"),
    }
    return [
        *(Experiment(name, "contribution", build, why) for name, (build, why) in scaled.items()),
        *(Experiment(name, "contribution", _parallel(a, b), why) for name, (a, b, why) in beside.items()),
    ]


def _injected(suite: str, hypothesis: str) -> Experiment:
    """The unmodified model, asked one of the injection suites."""
    return Experiment(
        suite,
        "control",
        lambda m: m.recipe,
        hypothesis,
        changes_nothing=True,
        suites=(suite,),
        control="injection",
    )


E = Experiment
# In order of priority: --priority-limit N takes the first N. The first six are a small whole story: both
# unmodified sides, the study's headline splice either way round, a placebo, the positive control in short.
# Embedding, final norm and head stay the instruct model's except in baseline_base.
EXPERIMENTS: list[Experiment] = [
    E("baseline_instruct", "baseline", lambda m: m.recipe, "The control", changes_nothing=True),
    E(
        "baseline_base",
        "baseline",
        lambda m: with_outer(splice(m.recipe, "base", 0, m.n), "base"),
        "The other control: no chat tuning anywhere",
    ),
    E(
        "franken_instruct_first_32",
        "franken",
        _instruct_first(32),
        "Understands instructions, outputs completions",
    ),
    E("franken_base_first_32", "franken", _base_first(32), "Understands nothing, formats nicely?"),
    _placebo("both", 1),
    E(
        "concept_injection_short",
        "control",
        lambda m: m.recipe,
        "As concept_injection, in one strength",
        changes_nothing=True,
        suites=("injection_short",),
        control="injection",
    ),
    E(
        "swap_distant_10_55",
        "swap",
        _swap(10, 55),
        "Breaks hard: the residual stream's meaning differs at the two depths",
    ),
    E("shuffle_all", "swap", lambda m: shuffle(m.recipe, m.seed), "Complete destruction (control)"),
    E(
        "concept_injection",
        "control",
        lambda m: m.recipe,
        "A concept's direction added to the first turn: what the probes must see if they see anything",
        changes_nothing=True,
        suites=("injection",),
        control="injection",
    ),
    E("swap_adjacent_30_35", "swap", _swap(30, 35), "Mild disruption, maybe recoverable"),
    E("perturb_late_5pct", "perturb", _noise(0.05, 48), "Degraded but functional?"),
    E("perturb_all_1pct", "perturb", _noise(0.01), "Small cumulative effect"),
    E(
        "franken_instruct_first_48",
        "franken",
        _instruct_first(48),
        "Mostly instruct, only the last layers base",
    ),
    E(
        "blend_linear",
        "blend",
        lambda m: blend(m.recipe, "base", linear),
        "Base share grows with depth: smooth transition or phase boundary?",
    ),
    E(
        "swap_chunk_25_35_with_45_55",
        "swap",
        _swap_chunks((25, 35), (45, 55)),
        "The published peak: badly damaged, most willing to say Yes",
    ),
    E(
        "swap_chunk_16_32_with_32_48",
        "swap",
        _swap_chunks((16, 32), (32, 48)),
        "Two touching quarters exchanged",
    ),
    E("franken_instruct_first_16", "franken", _instruct_first(16), "Only the first quarter is tuned"),
    E("franken_base_first_16", "franken", _base_first(16), "Only the first quarter is base"),
    E("franken_base_first_48", "franken", _base_first(48), "Only the last quarter is tuned"),
    E("swap_distant_5_60", "swap", _swap(5, 60), "As 10 <-> 55, nearer to the fragile ends"),
    E("swap_adjacent_31_32", "swap", _swap(31, 32), "Neighbors: barely visible"),
    E(
        "blend_early_base",
        "blend",
        lambda m: blend(m.recipe, "base", sigmoid(-10)),
        "Base at the bottom, instruct on top, smooth in between",
    ),
    E(
        "blend_late_base",
        "blend",
        lambda m: blend(m.recipe, "base", sigmoid(10)),
        "Instruct at the bottom, base on top, smooth in between",
    ),
    E("perturb_late_1pct", "perturb", _noise(0.01, 48), "Barely visible"),
    E("perturb_late_10pct", "perturb", _noise(0.10, 48), "Strong noise where the answer is formed"),
    E("perturb_all_5pct", "perturb", _noise(0.05), "Noise everywhere"),
    E("delete_30_34", "depth", _on_block(delete, 30, 34), "Middle layers are redundant"),
    E("double_24_40", "depth", _on_block(double, 24, 40), "Every middle layer twice"),
    E("repeat_24_40", "depth", _on_block(repeat, 24, 40, 2), "The middle block run twice"),
    E("reverse_24_40", "depth", _on_block(reverse, 24, 40), "Middle layers tolerate reordering"),
    E("keep_every_2nd", "depth", lambda m: keep_every(m.recipe, 2), "Half the depth: the even layers only"),
    _injected(
        "injection_layers",
        "A concept's direction at single layers while the first turn is read, beside random directions and a"
        " garbled first turn",
    ),
    _injected(
        "injection_generation",
        "A concept's direction at a single layer while the model writes: does it say so, and name it?",
    ),
    _injected(
        "localisation",
        "Which of ten sentences, and which of two the more strongly: a drift towards Yes gains nothing",
    ),
    *_surgeries_of_one_model(),
    *_contributions(),
    *(
        _placebo(what, k)
        for what in PERMUTED
        for k in range(1, PLACEBO_SEEDS + 1)
        if (what, k) != ("both", 1)
    ),
]
# The injection suites over whole grids of depth and strength: a GPU's work, so they run only by name.
GRIDS: list[Experiment] = [
    _injected(f"{name}_grid", f"`{name}` over a whole grid of depths and strengths; for a GPU")
    for name in ("injection_layers", "injection_generation", "localisation")
]


SWEEPS = ("window", "replace", "delete", "double", "repeat", "parallel", "noise", "blend")
SIZED = ("window", "delete", "double", "repeat", "parallel")  # --size and --step say of what, and how densely
WINDOW = GRID = (
    4  # layers of a window, and between two boundaries of the scan over repeats, if nothing is said
)
SWEEP_FIELDS = {
    "kind": str,
    "source": str | None,
    "size": int | None,
    "start": int | None,
    "stop": int | None,
    "dose": float | None,
}
NOISE_LADDER = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
BLEND_LADDER = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def _step(
    kind: str,
    name: str,
    build: Callable[[Model], Recipe],
    why: str,
    source=None,
    start=None,
    stop=None,
    dose=None,
) -> Experiment:
    where = {
        "kind": kind,
        "source": source,
        "size": None if start is None else stop - start,
        "start": start,
        "stop": stop,
        "dose": dose,
    }
    return Experiment(name, f"sweep_{kind}", build, why, suites=QUICK, sweep=where)


def window_sweep(
    width: int, n_layers: int, source: str = "base", stride: int | None = None
) -> list[Experiment]:
    """Replace each window of `width` layers by `source`'s, at native depth, every `stride` (default: width)
    layers.

    Windows that would reach beyond the model are left out. Raises FrankenError for a width that does not fit
    at all.
    """
    if not 1 <= width <= n_layers:
        raise FrankenError(f"a window of {width} layers does not fit a model of {n_layers}")
    return [
        _step(
            "window",
            f"window_{source}_{a}_{a + width}",
            lambda m, a=a: splice(m.recipe, source, a, a + width),
            f"{source} in layers [{a}:{a + width}]",
            source,
            a,
            a + width,
        )
        for a in range(0, n_layers - width + 1, stride or width)
    ]


def sweep(
    kind: str, n_layers: int, sizes: Sequence[int] | None = None, step: int | None = None
) -> list[Experiment]:
    """Where and how much, at native depth: a sweep over layers or blocks, or a ladder of doses over all.

    "window" and "replace" take the base's layers, the one in windows, the other one by one; "delete" and
    "double" take single layers or windows, "parallel" windows whose layers run side by side. "repeat" runs
    [start, stop) once more for every start and stop on a grid, as the block scans of RYS do. "noise" and
    "blend" (base share) change all layers. Every experiment's `sweep` says where it stands: kind, source,
    size, start, stop (layers of this model), dose.

    sizes: layers in a window; if None, 4 for window and parallel, 1 for delete and double, any for repeat.
    step: layers from one window to the next (if None, the size), or between the grid's lines (4). Raises
    FrankenError for sizes that do not fit the model.
    """
    # 1. blocks of layers, and single ones
    if kind == "window":
        windows = [w for size in sizes or (WINDOW,) for w in window_sweep(size, n_layers, stride=step)]
        # in this order the layers below a window need not be computed again
        return sorted(windows, key=lambda w: w.sweep["start"] if w.sweep else 0)
    if kind == "repeat":
        return _repeat_scan(n_layers, sizes, step or GRID)
    if kind == "replace":
        return [
            _step(
                kind,
                f"replace_{k}",
                lambda m, k=k: splice(m.recipe, "base", k, k + 1),
                f"base in layer {k}",
                "base",
                k,
                k + 1,
            )
            for k in range(n_layers)
        ]
    if kind in BLOCKS:
        return _block_sweep(kind, n_layers, sizes or (WINDOW if kind == "parallel" else 1,), step)
    # 2. doses over all layers
    if kind == "noise":
        return [
            _step(
                kind,
                f"noise_{f}",
                lambda m, f=f: perturb(m.recipe, f, m.seed),
                f"{100 * f:g}% noise on all layers",
                dose=f,
            )
            for f in NOISE_LADDER
        ]
    return [
        _step(
            kind,
            f"blend_{s}",
            lambda m, s=s: blend(m.recipe, "base", [s] * m.n),
            f"base share {s} in all layers",
            "base",
            dose=s,
        )
        for s in BLEND_LADDER
    ]


# What a sweep does to a block of layers, and how it is said of a block; of a single layer.
BLOCKS = {
    "delete": (delete, "without layers", "without layer"),
    "double": (double, "twice through each of layers", "twice through layer"),
    "parallel": (parallel, "side by side layers", ""),
}


def _check_sizes(kind: str, n_layers: int, sizes: Sequence[int]) -> None:
    least, most = (2 if kind == "parallel" else 1), (n_layers - 1 if kind == "delete" else n_layers)
    for size in sizes:
        if not least <= size <= most:
            raise FrankenError(
                f"--sweep {kind}: a block of {size} does not fit, of {n_layers} it takes {least} to {most}"
            )


def _block_sweep(kind: str, n_layers: int, sizes: Sequence[int], step: int | None) -> list[Experiment]:
    _check_sizes(kind, n_layers, sizes)
    operation, of_block, of_layer = BLOCKS[kind]
    blocks = [(a, a + size) for size in sizes for a in range(0, n_layers - size + 1, step or size)]
    return [
        _step(
            kind,
            f"{kind}_{a}" if b == a + 1 else f"{kind}_window_{a}_{b}",
            lambda m, a=a, b=b: operation(m.recipe, a, b),
            f"{of_layer} {a}" if b == a + 1 else f"{of_block} [{a}:{b}]",
            None,
            a,
            b,
        )
        for a, b in sorted(blocks)
    ]


def _repeat_scan(n_layers: int, sizes: Sequence[int] | None, step: int) -> list[Experiment]:
    """Every block between two boundaries of the grid 0, step, 2 step, ..., run once more; of the given sizes,
    if any. In the order of their ends: layers up to there are as in the unmodified model."""
    _check_sizes("repeat", n_layers, sizes or ())
    lines = range(0, n_layers + 1, step)
    blocks = [(a, b) for b in lines for a in lines if a < b and (sizes is None or b - a in sizes)]
    if not blocks:
        raise FrankenError(f"--sweep repeat: no such block of {n_layers} layers lies on a grid of {step}")
    return [
        _step(
            "repeat",
            f"repeat_window_{a}_{b}",
            lambda m, a=a, b=b: repeat(m.recipe, a, b),
            f"layers [{a}:{b}] once more",
            None,
            a,
            b,
        )
        for a, b in blocks
    ]


def with_suites(
    chosen: Sequence[Experiment],
    given: tuple[str, ...] | None,
    matched_noise: bool = False,
    also: tuple[str, ...] = (),
) -> list[Experiment]:
    """The experiments with what each will be asked: what is given, else its own suites, else everything; and
    `also`.

    The injection keeps its own, which makes sense for it alone. The baseline is asked whatever the others are
    asked, with `matched_noise` also what the noise twins will be.
    """
    asked = [
        replace(
            e,
            suites=(given if e.control != "injection" else None) or e.suites or EVERYTHING,
            also=also if e.control != "injection" else (),
        )
        for e in chosen
    ]
    union = {
        name for e in asked if e.control != "injection" and e.name != BASELINE for name in e.suites or ()
    } | {*((given or QUICK) if matched_noise else ())}
    whole = tuple(name for name in prompts.SUITES if name in union) or given or EVERYTHING
    return [replace(e, suites=whole) if e.name == BASELINE else e for e in asked]


def for_source(name: str) -> list[Experiment]:
    """Where in depth does a further source's behavior live: the whole of it, each half, each quarter."""
    cuts = {
        "whole": (0, 64),
        "early_half": (0, 32),
        "late_half": (32, 64),
        "window_0_16": (0, 16),
        "window_16_32": (16, 32),
        "window_32_48": (32, 48),
        "window_48_64": (48, 64),
    }
    return [
        Experiment(
            f"{name}_{label}",
            name,
            lambda m, a=a, b=b: splice(m.recipe, name, *m.block(a, b)),
            f"{name} in {label.replace('_', ' ')}",
        )
        for label, (a, b) in cuts.items()
    ]


# What users' files of the first release import, and what to write instead.
MOVED = {
    "recipes": "the operations moved: write `from franken import swap, perturb, ...`",
    "weights": (
        "FrankenError moved: write `from errors import FrankenError`; the rest is in `surgery.weights`"
    ),
}


def load_file(path: str) -> list[Experiment]:
    """The EXPERIMENTS of a user's Python file, which is run. Raises FrankenError with the reason if that
    fails."""
    try:
        module = ModuleType("user_experiments")
        module.__file__ = str(Path(path).resolve())
        # as an import would: dataclasses in the file look themselves up there
        sys.modules[module.__name__] = module
        # the file itself and no bytecode that lies beside it: a run's manifest has this file's hash
        exec(compile(read_bytes(path), module.__file__, "exec", dont_inherit=True), module.__dict__)
        if not hasattr(module, "EXPERIMENTS"):
            raise FrankenError(f"{path}: there is no EXPERIMENTS in it")
        experiments = list(module.EXPERIMENTS)
    except FrankenError:
        raise
    except ModuleNotFoundError as e:
        hint = f"; {MOVED[e.name]}" if e.name in MOVED else ""
        raise FrankenError(f"{path}: cannot be used as an experiments file: {_one_line(e)}{hint}") from e
    except Exception as e:
        raise FrankenError(f"{path}: cannot be used as an experiments file: {_one_line(e)}") from e
    names = set()
    for entry in experiments:
        if (
            not isinstance(entry, Experiment)
            or not isinstance(entry.name, str)
            or not re.fullmatch(r"[\w.+-]{1,80}", entry.name, re.ASCII)
            or entry.name.endswith(TWIN)
        ):
            raise FrankenError(
                f"{path}: EXPERIMENTS holds {_short(entry)}, not an Experiment with a plain name"
            )
        if not (isinstance(entry.group, str) and isinstance(entry.hypothesis, str) and callable(entry.build)):
            raise FrankenError(
                f"{path}: experiment {entry.name} needs a group and a hypothesis in text and a build function"
            )
        if (
            entry.control not in (None, *CONTROLS)
            or not _is_sweep(entry.sweep)
            or not _are_suites(entry.suites)
        ):
            raise FrankenError(
                f"{path}: experiment {entry.name} has suites, a control or a sweep that there is not"
            )
        if entry.name in names:
            raise FrankenError(f"{path}: there are two experiments called {entry.name!r}")
        names.add(entry.name)
    return experiments


def _are_suites(value: object) -> bool:
    return value is None or (
        isinstance(value, tuple) and bool(value) and all(name in prompts.SUITES for name in value)
    )


def _is_sweep(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and set(value) == set(SWEEP_FIELDS)
        and all(isinstance(value[k], t) for k, t in SWEEP_FIELDS.items())
    )


def _short(entry: object) -> str:
    return (
        f"one called {str(entry.name)[:90]!r}"
        if isinstance(entry, Experiment)
        else f"an entry of type {type(entry).__name__}"
    )


def select(names: Sequence[str], known: Sequence[Experiment]) -> list[Experiment]:
    """Experiments by name, in the order given. Raises FrankenError with the nearest name for one that is
    unknown."""
    by_name = {e.name: e for e in known}
    for name in names:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, 1, 0.0)
            raise FrankenError(f"unknown experiment {name!r}; the nearest is {near[0]!r} (--list shows all)")
    return [by_name[name] for name in dict.fromkeys(names)]
