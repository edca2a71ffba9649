"""The named configurations, in order of priority; planning/ has what an experiment is, and the sweeps.

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

import contextlib
import difflib
import re
import symtable
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import prompts
from errors import FrankenError, RecipeError  # noqa: F401  what users' files may raise
from files import ROOT, read_bytes
from planning import mergekit
from planning.experiment import (
    CONTROLS,
    EVERYTHING,
    PUBLISHED_DEPTH,
    QUICK,
    USER_FILE,
    Experiment,
    Model,
    Plan,  # noqa: F401
    one_line,
)
from planning.sweeps import SIZED, SWEEP_FIELDS, SWEEPS, sweep, window_sweep  # noqa: F401  offered here too
from surgery import recipes
from surgery.recipes import *  # every operation, for this file and for users' files

BASELINE = "baseline_instruct"
TWIN = "__matched_noise"  # ends the name of an experiment's noise twin; see matched_noise.py


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
        "As concept_injection, in one strength and with the mechanism explained",
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


def with_suites(
    chosen: Sequence[Experiment],
    given: tuple[str, ...] | None,
    matched_noise: bool = False,
    also: tuple[str, ...] = (),
    default: tuple[str, ...] = EVERYTHING,
) -> list[Experiment]:
    """The experiments with what each will be asked: what is given, else its own suites, else the default;
    and `also`.

    The injection keeps its own, which makes sense for it alone. The baseline is asked whatever the others are
    asked, with `matched_noise` also what the noise twins will be.
    """
    assigned = [
        replace(
            e,
            suites=(given if e.control != "injection" else None) or e.suites or default,
            also=also if e.control != "injection" else (),
        )
        for e in chosen
    ]
    union = {
        name for e in assigned if e.control != "injection" and e.name != BASELINE for name in e.suites or ()
    } | {*((given or QUICK) if matched_noise else ())}
    whole = tuple(name for name in prompts.SUITES if name in union) or given or default
    return [replace(e, suites=whole) if e.name == BASELINE else e for e in assigned]


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
        "FrankenError moved: write `from errors import FrankenError`; the rest is in `surgery.weights` and"
        " `surgery.streaming`"
    ),
}


class _Operations(ModuleType):
    """`franken` for a user's file while it is run: the operations at once, whatever else franken.py offers
    once it is asked for. That needs torch, which takes seconds to import, and a mistake in the file is told
    before."""

    def __init__(self):
        super().__init__("franken")
        self.__file__ = str(ROOT / "franken.py")
        self.__dict__.update({name: getattr(recipes, name) for name in recipes.__all__})

    def __getattr__(self, name: str):
        if name == "__all__":  # `from franken import *`
            return [name for name in vars(self._whole()) if not name.startswith("_")]
        if name.startswith("__") or name not in self._bound():
            raise AttributeError(f"module 'franken' has no attribute {name!r}", name=name, obj=self)
        return getattr(self._whole(), name)

    @staticmethod
    @cache
    def _bound() -> frozenset[str]:
        """The names that franken.py's own statements bind, by its text; __init__ has those of its one star
        import."""
        text = read_bytes(ROOT / "franken.py").decode()
        symbols = symtable.symtable(text, "franken.py", "exec").get_symbols()
        return frozenset(s.get_name() for s in symbols if s.is_imported() or s.is_assigned())

    def _whole(self) -> ModuleType:
        if sys.modules.get("franken") is self:
            del sys.modules["franken"]
        return import_module("franken")


@contextlib.contextmanager
def _light_franken() -> Iterator[None]:
    """Inside, `franken` is _Operations where it has not been imported."""
    light = sys.modules.setdefault("franken", _Operations())
    try:
        yield
    finally:
        if isinstance(light, _Operations) and sys.modules.get("franken") is light:
            del sys.modules["franken"]


def load_file(path: str) -> list[Experiment]:
    """The EXPERIMENTS of a user's Python file, which is run, or the one of mergekit's YAML, which is read.
    Raises FrankenError with the reason if that fails."""
    if Path(path).suffix.lower() in (".yaml", ".yml"):
        return mergekit.load(path)
    try:
        module = ModuleType(USER_FILE)
        module.__file__ = str(Path(path).resolve())
        # as an import would: dataclasses in the file look themselves up there
        sys.modules[module.__name__] = module
        # the file itself and no bytecode that lies beside it: a run's manifest has this file's hash
        code = compile(read_bytes(path), module.__file__, "exec", dont_inherit=True)
        with _light_franken():
            exec(code, module.__dict__)
        if not hasattr(module, "EXPERIMENTS"):
            raise FrankenError(f"{path}: there is no EXPERIMENTS in it")
        experiments = list(module.EXPERIMENTS)
        if not experiments:
            raise FrankenError(f"{path}: EXPERIMENTS is empty")
    except FrankenError:
        raise
    except ModuleNotFoundError as e:
        hint = f"; {MOVED[e.name]}" if e.name in MOVED else ""
        raise FrankenError(f"{path}: cannot be used as an experiments file: {one_line(e)}{hint}") from e
    except (Exception, SystemExit) as e:  # sys.exit(0) would end the command as if all were done
        raise FrankenError(f"{path}: cannot be used as an experiments file: {one_line(e)}") from e
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
            raise FrankenError(
                f"unknown experiment {name!r}; the nearest is {near[0]!r} (run_all.py --list shows all)"
            )
    return [by_name[name] for name in dict.fromkeys(names)]
