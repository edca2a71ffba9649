"""Recipes: what every layer position of a model is made of, as data.

A `Recipe` is a frozen value. The operations below are plain functions from recipe to recipe and compose; none
of them touches a tensor. `franken.LiveModel.apply` makes a model out of one.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp, isfinite

from errors import RecipeError

# What `from surgery.recipes import *` brings; `experiments` and `franken` offer it by their own names
# too: an operation of your own joins this list.
__all__ = [
    "PERMUTED",
    "Mixing",
    "Noise",
    "Outer",
    "Permute",
    "Recipe",
    "Ref",
    "Slot",
    "describe_change",
    "identity",
    "plain",
    "attenuate",
    "blend",
    "delete",
    "double",
    "keep_every",
    "linear",
    "parallel",
    "permute_units",
    "perturb",
    "repeat",
    "reverse",
    "shuffle",
    "sigmoid",
    "splice",
    "swap",
    "swap_chunks",
    "with_outer",
]


@dataclass(frozen=True, order=True)
class Ref:
    """Layer number `layer` of the source called `source`."""

    source: str
    layer: int


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on every tensor of a layer: `fraction` of that tensor's own standard deviation.

    The stream of random numbers is a function of (seed, key, tensor name); `key` is the position at which the
    noise was asked for, so the noise stays with the layer when it is moved afterwards.
    """

    fraction: float
    seed: int
    key: int


PERMUTED = {"mlp": "MLP units", "heads": "attention heads", "both": "MLP units and attention heads"}


@dataclass(frozen=True)
class Permute:
    """Reorder the hidden units of the MLP, the attention heads, or both: other weights, the same function.

    The negative control: whatever a model reports under this change cannot come from a change in what it
    computes. `what` is "mlp", "heads" (query heads within their key-value group, and the groups themselves)
    or "both".
    """

    seed: int
    key: int
    what: str = "both"

    def __post_init__(self):
        if self.what not in PERMUTED:
            raise RecipeError(f"what can be permuted is {', '.join(PERMUTED)}, not {self.what!r}")


METHODS = ("linear", "slerp")


@dataclass(frozen=True)
class Mixing:
    """How a mixture is made of its parts; by default their weighted sum.

    method: "linear", or "slerp": spherical interpolation (Shoemake 1985) between two, by the second's weight;
        tensors that are nearly parallel are interpolated linearly.
    normalize: the weighted sum is divided by the sum of the weights.
    by_name: (text, weights): other weights for the tensors whose name in the layer, with a dot before it,
        holds the text; the first that fits counts.
    """

    method: str = "linear"
    normalize: bool = False
    by_name: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self):
        if self.method not in METHODS:
            raise RecipeError(f"layers are mixed by {' or '.join(METHODS)}, not by {self.method!r}")

    def check(self, weights: Sequence[float]) -> None:
        """Raises RecipeError if parts with these weights cannot be mixed so."""
        if self.method == "slerp" and len(weights) != 2:
            raise RecipeError(f"slerp is between two, not {len(weights)}")
        for each in (weights, *(other for _, other in self.by_name)):
            if len(each) != len(weights) or not all(isfinite(w) for w in each):
                raise RecipeError(f"a mixture of {len(weights)} has as many finite weights, not {list(each)}")
            if self.normalize and sum(each) == 0:
                raise RecipeError("weights that sum to zero cannot be normalized")

    def weights_of(self, name: str, weights: Sequence[float]) -> Sequence[float]:
        """The weights of one tensor, `weights` being those of the mixture."""
        return next((other for text, other in self.by_name if text in f".{name}"), weights)

    def to_json(self) -> dict:
        by_name = {"by_name": [[text, list(weights)] for text, weights in self.by_name]}
        return {"method": self.method, "normalize": self.normalize} | (by_name if self.by_name else {})

    @staticmethod
    def from_json(data: dict) -> Mixing:
        by_name = tuple((str(t), tuple(float(w) for w in ws)) for t, ws in data.get("by_name", ()))
        return Mixing(data["method"], bool(data["normalize"]), by_name)


SUM = Mixing()


@dataclass(frozen=True)
class Outer:
    """Embedding, final norm or output head as a mixture of several sources'."""

    mix: tuple[tuple[str, float], ...]
    mixing: Mixing = SUM

    def __post_init__(self):
        if len(self.mix) < 2:
            raise RecipeError(f"a mixture has two parts or more, not {list(self.mix)}")
        self.mixing.check([w for _, w in self.mix])

    def __str__(self) -> str:
        text = " + ".join(f"{w:.3g}*{source}" for source, w in self.mix)
        return text if self.mixing == SUM else f"{self.mixing.method}({text})"

    def to_json(self) -> dict:
        return {"mix": [list(part) for part in self.mix]} | _mixing_json(self.mixing)


def _mixing_json(mixing: Mixing) -> dict:
    return {} if mixing == SUM else {"mixing": mixing.to_json()}


def _mixing_from(data: dict) -> Mixing:
    return Mixing.from_json(data["mixing"]) if "mixing" in data else SUM


def _outer_from(data: str | dict) -> str | Outer:
    if isinstance(data, str):
        return data
    return Outer(tuple((str(s), float(w)) for s, w in data["mix"]), _mixing_from(data))


@dataclass(frozen=True)
class Slot:
    """What one position holds: a mixture of layers (usually one), then edits in order.

    `scale` says how much of the layer's contribution enters the residual stream: with hidden states h before
    the position, h + scale * (layer(h) - h) come out. It changes no weight, and it moves with the layer.
    """

    mix: tuple[tuple[Ref, float], ...]
    edits: tuple[Noise | Permute, ...] = ()
    scale: float = 1.0
    mixing: Mixing = SUM

    def __post_init__(self):
        if not isfinite(self.scale):
            raise RecipeError(f"the scale of a layer's contribution must be finite, not {self.scale}")
        if (
            not self.mix
            or not all(isfinite(w) for _, w in self.mix)
            or (len(self.mix) == 1 and self.mix[0][1] != 1)
        ):
            raise RecipeError(
                "a position holds one layer with weight 1 or a mixture with finite weights, not"
                f" {list(self.mix)}"
            )
        if self.mixing != SUM:
            self.mixing.check([w for _, w in self.mix])

    @property
    def is_plain(self) -> bool:
        """Whether the slot is one layer of one source, copied to the bit and run as it is."""
        return len(self.mix) == 1 and not self.edits and self.scale == 1 and self.mixing == SUM

    @property
    def weights(self) -> Slot:
        """What has to lie in memory for this position: the slot without its scale."""
        return _scaled(self, 1.0)

    def __str__(self) -> str:
        text = " + ".join(
            f"{r.source}[{r.layer}]" if w == 1 else f"{w:.3g}*{r.source}[{r.layer}]" for r, w in self.mix
        )
        if self.mixing != SUM:
            text = f"{self.mixing.method}({text})"
        for edit in self.edits:
            text += (
                f" ~{100 * edit.fraction:g}%"
                if isinstance(edit, Noise)
                else f" {PERMUTED[edit.what]} permuted"
            )
        return text if self.scale == 1 else f"{text} scaled by {self.scale:g}"


@functools.lru_cache(maxsize=4096, typed=True)
def plain(source: str, layer: int) -> Slot:
    """One layer of one source, as it is."""
    return Slot(((Ref(source, layer), 1.0),))


def _scaled(slot: Slot, scale: float) -> Slot:
    return slot if slot.scale == scale else replace(slot, scale=scale)


@dataclass(frozen=True)
class Recipe:
    """For every position that will run, where its weights come from; and the same for what surrounds the
    layers.

    `parallel` lists the blocks [start, stop) of positions that run side by side: all of a block read the
    hidden states that enter it, and the mean of what they give back goes on. Blocks stand in order, are two
    positions long or longer, and do not overlap. They belong to positions: what is swapped into one runs
    there.
    """

    slots: tuple[Slot, ...]
    embed: str | Outer
    norm: str | Outer
    head: str | Outer
    parallel: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        end = 0
        for start, stop in self.parallel:
            if not end <= start < stop - 1 < len(self.slots):
                raise RecipeError(
                    f"positions [{start}:{stop}] cannot run side by side: such a block has two positions or"
                    f" more of {len(self.slots)}, and shares none with another"
                )
            end = stop

    def __len__(self) -> int:
        return len(self.slots)

    def __str__(self) -> str:
        runs, k = [], 0
        while k < len(self):
            stop, first = k + 1, self.slots[k]
            if first.weights.is_plain:
                ((ref, _),) = first.mix
                while stop < len(self) and self.slots[stop] == _scaled(
                    plain(ref.source, ref.layer + stop - k), first.scale
                ):
                    stop += 1
                ending = str(first).removeprefix(str(first.weights))
                runs.append(
                    f"{ref.source}[{ref.layer}:{ref.layer + stop - k}]{ending}"
                    if stop > k + 1
                    else str(first)
                )
            else:
                runs.append(str(first))
            k = stop
        outer = {self.embed, self.norm, self.head}
        return " ".join(runs + _parallel_text(self)) + (
            f" | {outer.pop()} outside"
            if len(outer) == 1 and isinstance(self.embed, str)
            else f" | embed {self.embed}, norm {self.norm}, head {self.head}"
        )

    @property
    def sources(self) -> set[str]:
        layers = {ref.source for slot in self.slots for ref, _ in slot.mix}
        outer = [parts_of(part) for part in (self.embed, self.norm, self.head)]
        return layers.union(*({source for source, _ in parts} for parts in outer))

    def to_json(self) -> dict:
        slots = []
        for slot in self.slots:
            edits = [{"kind": type(e).__name__.lower(), **asdict(e)} for e in slot.edits]
            slots.append(
                {"mix": [[r.source, r.layer, w] for r, w in slot.mix]}
                | ({"edits": edits} if edits else {})
                | ({"scale": slot.scale} if slot.scale != 1 else {})
                | _mixing_json(slot.mixing)
            )
        outer = {
            name: part if isinstance(part, str) else part.to_json()
            for name, part in (("embed", self.embed), ("norm", self.norm), ("head", self.head))
        }
        parallel = {"parallel": [list(block) for block in self.parallel]} if self.parallel else {}
        return {"slots": slots} | outer | parallel

    @staticmethod
    def from_json(data: dict) -> Recipe:
        """The inverse of to_json. Raises RecipeError for anything else."""
        kinds = {"noise": Noise, "permute": Permute}
        try:
            slots = []
            for entry in data["slots"]:
                match entry:
                    case {"mix": [[source, layer, 1]]} if len(entry) == 1:  # as most are
                        slots.append(plain(source, int(layer)))
                        continue
                edits = tuple(
                    kinds[e["kind"]](**{k: v for k, v in e.items() if k != "kind"})
                    for e in entry.get("edits", ())
                )
                mix = tuple((Ref(s, int(i)), float(w)) for s, i, w in entry["mix"])
                slots.append(Slot(mix, edits, float(entry.get("scale", 1.0)), _mixing_from(entry)))
            parallel = tuple((int(a), int(b)) for a, b in data.get("parallel", ()))
            embed, norm, head = (_outer_from(data[part]) for part in ("embed", "norm", "head"))
            return Recipe(tuple(slots), embed, norm, head, parallel)
        except (KeyError, TypeError, ValueError) as e:
            raise RecipeError(f"not a recipe: {e!r}") from e


def parts_of(outer: str | Outer) -> tuple[tuple[str, float], ...]:
    """(source, weight) of what embedding, norm or head is made of."""
    return ((outer, 1.0),) if isinstance(outer, str) else outer.mix


def identity(n_layers: int, source: str = "instruct") -> Recipe:
    """The unmodified model of a source."""
    return Recipe(tuple(plain(source, i) for i in range(n_layers)), source, source, source)


def _check(recipe: Recipe, positions: Iterable[int]) -> None:
    for p in positions:
        if not 0 <= p < len(recipe):
            raise RecipeError(f"layer {p} is out of range: the model has layers 0 to {len(recipe) - 1}")


def _check_block(recipe: Recipe, start: int, stop: int) -> None:
    if not 0 <= start < stop <= len(recipe):
        raise RecipeError(
            f"layers [{start}:{stop}] are empty or out of range: the model has layers 0 to {len(recipe) - 1}"
        )


def _check_serial(recipe: Recipe) -> None:
    if recipe.parallel:
        raise RecipeError(
            "positions that run side by side cannot be counted anew: change the depth first, use `parallel`"
            " last"
        )


def _edit(recipe: Recipe, changed: dict[int, Slot]) -> Recipe:
    return replace(recipe, slots=tuple(changed.get(p, slot) for p, slot in enumerate(recipe.slots)))


def swap(recipe: Recipe, i: int, j: int) -> Recipe:
    """Exchange the layers at positions i and j."""
    _check(recipe, (i, j))
    return _edit(recipe, {i: recipe.slots[j], j: recipe.slots[i]})


def swap_chunks(recipe: Recipe, a: tuple[int, int], b: tuple[int, int]) -> Recipe:
    """Exchange two blocks [start, stop) of equal length; they may touch but not overlap."""
    (a0, a1), (b0, b1) = sorted((a, b))
    _check_block(recipe, a0, a1)
    _check_block(recipe, b0, b1)
    if a1 - a0 != b1 - b0:
        raise RecipeError(f"chunks [{a0}:{a1}] and [{b0}:{b1}] differ in length")
    if a1 > b0:
        raise RecipeError(f"chunks [{a0}:{a1}] and [{b0}:{b1}] overlap")
    changed = {}
    for k in range(a1 - a0):
        changed[a0 + k], changed[b0 + k] = recipe.slots[b0 + k], recipe.slots[a0 + k]
    return _edit(recipe, changed)


def shuffle(recipe: Recipe, seed: int) -> Recipe:
    """A random order of all positions in which none stays where it was (Sattolo's cycle)."""
    order, rng = list(range(len(recipe))), random.Random(f"shuffle:{seed}")
    for k in range(len(order) - 1, 0, -1):
        other = rng.randrange(k)
        order[k], order[other] = order[other], order[k]
    return replace(recipe, slots=tuple(recipe.slots[p] for p in order))


def splice(recipe: Recipe, source: str, start: int, stop: int) -> Recipe:
    """Replace positions [start, stop) by the same layers of `source`; what surrounds the layers stays."""
    _check_block(recipe, start, stop)
    return _edit(recipe, {p: plain(source, p) for p in range(start, stop)})


def with_outer(recipe: Recipe, source: str) -> Recipe:
    """Take embedding, final norm and output head from `source`."""
    return replace(recipe, embed=source, norm=source, head=source)


def blend(recipe: Recipe, source: str, share: Sequence[float] | Callable[[float], float]) -> Recipe:
    """Position i becomes (1 - s) * itself + s * source[i], with s = share[i] or share(i / (n - 1))."""
    n = len(recipe)
    shares = [share(p / max(n - 1, 1)) for p in range(n)] if callable(share) else list(share)
    if len(shares) != n or not all(isfinite(s) for s in shares):
        raise RecipeError(f"a blend needs {n} finite shares, one a layer, and got {len(shares)}")
    changed = {}
    for p, s in enumerate(shares):
        if recipe.slots[p].edits:
            raise RecipeError(f"position {p} is already perturbed: blend first, perturb afterwards")
        if recipe.slots[p].mixing != SUM:
            raise RecipeError(f"position {p} is mixed by {recipe.slots[p].mixing.method}: blend first")
        weights: dict[Ref, float] = {ref: w * (1 - s) for ref, w in recipe.slots[p].mix}
        weights[Ref(source, p)] = weights.get(Ref(source, p), 0.0) + s
        mix = [(ref, w) for ref, w in weights.items() if w != 0]
        changed[p] = replace(recipe.slots[p], mix=tuple(mix) if len(mix) > 1 else ((mix[0][0], 1.0),))
    return _edit(recipe, changed)


def linear(depth: float) -> float:
    """Share that grows linearly with depth."""
    return depth


def sigmoid(steepness: float) -> Callable[[float], float]:
    """Share 1 / (1 + exp(-steepness * (depth - 1/2))): rising for positive steepness, centered on the
    middle."""
    return lambda depth: 1 / (1 + exp(-steepness * (depth - 0.5)))


def perturb(recipe: Recipe, fraction: float, seed: int, positions: Iterable[int] | None = None) -> Recipe:
    """Add Gaussian noise of `fraction` of each tensor's own standard deviation at the positions (all by
    default)."""
    if not (isfinite(fraction) and fraction >= 0):
        raise RecipeError(f"a noise fraction must be finite and not negative, not {fraction}")
    positions = range(len(recipe)) if positions is None else list(positions)
    _check(recipe, positions)
    slots = recipe.slots
    return _edit(
        recipe, {p: replace(slots[p], edits=(*slots[p].edits, Noise(fraction, seed, p))) for p in positions}
    )


def permute_units(recipe: Recipe, seed: int, what: str = "both") -> Recipe:
    """The function-preserving permutation at every position; see Permute. Raises RecipeError for another
    `what`."""
    return replace(
        recipe,
        slots=tuple(replace(s, edits=(*s.edits, Permute(seed, p, what))) for p, s in enumerate(recipe.slots)),
    )


def delete(recipe: Recipe, start: int, stop: int) -> Recipe:
    """Leave out positions [start, stop); at least one layer must remain."""
    _check_block(recipe, start, stop)
    _check_serial(recipe)
    if stop - start == len(recipe):
        raise RecipeError("at least one layer must remain")
    return replace(recipe, slots=recipe.slots[:start] + recipe.slots[stop:])


def repeat(recipe: Recipe, start: int, stop: int, times: int = 2, scale: float = 1.0) -> Recipe:
    """Run the block [start, stop) `times` times in a row: a b -> a b a b.

    scale: of what the layers contribute in every run but the first; see `attenuate`.
    """
    _check_block(recipe, start, stop)
    _check_serial(recipe)
    if times < 1:
        raise RecipeError(f"a block can be repeated 1 or more times, not {times}")
    again = attenuate(recipe, scale, start, stop).slots[start:stop]
    return replace(recipe, slots=recipe.slots[:stop] + again * (times - 1) + recipe.slots[stop:])


def double(recipe: Recipe, start: int, stop: int, scale: float = 1.0) -> Recipe:
    """Run every layer of [start, stop) twice in place: a b -> a a b b; `scale` as in `repeat`."""
    _check_block(recipe, start, stop)
    _check_serial(recipe)
    again = attenuate(recipe, scale, start, stop).slots
    twice = tuple(slot for p in range(start, stop) for slot in (recipe.slots[p], again[p]))
    return replace(recipe, slots=recipe.slots[:start] + twice + recipe.slots[stop:])


def attenuate(recipe: Recipe, scale: float, start: int, stop: int) -> Recipe:
    """Multiply what the positions [start, stop) contribute to the residual stream by `scale`.

    From hidden states h, such a position makes h + scale * (layer(h) - h): 0 is as if it were deleted, 1 as
    it was, more than 1 amplifies. Weights stay as they are. Raises RecipeError for a scale that is not
    finite.
    """
    _check_block(recipe, start, stop)
    slots = recipe.slots
    return _edit(recipe, {p: replace(slots[p], scale=slots[p].scale * scale) for p in range(start, stop)})


def parallel(recipe: Recipe, start: int, stop: int) -> Recipe:
    """Let the positions [start, stop) run side by side: all read what enters the block, the mean of what they
    give back goes on.

    After Sun et al., "Transformer Layers as Painters", arXiv 2407.09298. Raises RecipeError for less than two
    positions and for positions that run side by side with others already.
    """
    _check_block(recipe, start, stop)
    return replace(recipe, parallel=tuple(sorted((*recipe.parallel, (start, stop)))))


def reverse(recipe: Recipe, start: int, stop: int) -> Recipe:
    """Run the block [start, stop) backwards."""
    _check_block(recipe, start, stop)
    return replace(recipe, slots=recipe.slots[:start] + recipe.slots[start:stop][::-1] + recipe.slots[stop:])


def keep_every(recipe: Recipe, n: int, first: int = 0) -> Recipe:
    """Keep positions first, first + n, first + 2n, ..."""
    if n < 1:
        raise RecipeError(f"every n-th layer needs n >= 1, not {n}")
    if not 0 <= first < len(recipe):
        raise RecipeError(f"layer {first} is out of range: the model has layers 0 to {len(recipe) - 1}")
    _check_serial(recipe)
    return replace(recipe, slots=recipe.slots[first::n])


def describe_change(recipe: Recipe, original: Recipe, limit: int = 8) -> str:
    """One line for people: which positions differ from `original`, and how; neighbors treated alike are one
    item."""
    if len(recipe) != len(original):
        parts = [f"{len(original)} -> {len(recipe)} layers: {str(recipe).partition(' | ')[0]}"]
    else:
        runs: list[list] = []  # [start, stop, what happened]
        for p, (slot, before) in enumerate(zip(recipe.slots, original.slots, strict=True)):
            if slot != before:
                how = _how(slot, before, p)
                if runs and runs[-1][1:] == [p, how]:
                    runs[-1][1] = p + 1
                else:
                    runs.append([p, p + 1, how])
        parts = [_run_text(*run) for run in runs[:limit]]
        parts += [f"and {len(runs) - limit} more changes"] if len(runs) > limit else []
    if len(recipe) == len(original) and recipe.parallel != original.parallel:
        parts += _parallel_text(recipe)
    for part in ("embed", "norm", "head"):
        if getattr(recipe, part) != getattr(original, part):
            parts.append(f"{part} <- {getattr(recipe, part)}")
    return "; ".join(parts) or "nothing changes"


def _how(slot: Slot, before: Slot, p: int) -> tuple[str, int | None, str]:
    """(source, how many positions its layer moved, edits) of a changed position; no move for blends and mere
    edits."""
    edits = str(slot)[len(str(replace(slot, edits=(), scale=1.0))) :]
    if len(slot.mix) > 1:
        how = "blended" if slot.mixing == SUM else f"mixed ({slot.mixing.method})"
        return f"{how} of " + " and ".join(dict.fromkeys(r.source for r, _ in slot.mix)), None, edits
    ref, _ = next(iter(slot.mix))
    return ("", None, edits) if slot.mix == before.mix else (ref.source, ref.layer - p, edits)


def _run_text(start: int, stop: int, how: tuple[str, int | None, str]) -> str:
    source, shift, edits = how

    def span(k):
        return f"[{start + k}:{stop + k}]" if stop > start + 1 else f"[{start + k}]"

    where = span(0)
    return (
        f"{where} <- {source}{span(shift)}{edits}"
        if shift is not None
        else f"{where} {source}{edits}".replace("  ", " ")
    )


def _parallel_text(recipe: Recipe) -> list[str]:
    return [f"[{start}:{stop}] side by side" for start, stop in recipe.parallel]
