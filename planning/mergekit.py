"""mergekit's YAML, read as experiments and written from recipes; mergekit itself is not needed.

Read are the methods passthrough, linear and slerp, of `slices` or of whole `models`, with gradients and
filters as mergekit evaluates them (Goddard et al., arXiv 2403.13257). Written is any recipe of copied, summed
or spherically interpolated layers. All else is refused by its name: a merge that is read in another way than
it was meant would be another experiment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from errors import FrankenError, RecipeError
from files import read_bytes
from planning.experiment import Experiment, Model
from surgery.recipes import Mixing, Outer, Recipe, Ref, Slot, parts_of, plain

METHODS = ("passthrough", "linear", "slerp")
MOST_BYTES, MOST_DEPTH, MOST_NODES, MOST_LAYERS = 1 << 20, 20, 50_000, 10_000
DTYPES = (None, "float16", "bfloat16", "float32")
# Names by which mergekit's filters find what surrounds the layers.
OUTSIDE = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
FILTERS = {"embed": "embed_tokens", "norm": "model.norm", "head": "lm_head"}
PARAMETERS = {"passthrough": ("scale",), "linear": ("weight", "normalize"), "slerp": ("t",)}
SHARED = ("normalize", "t")  # parameters of a whole slice; `weight` and `scale` are of each of its sources


# ---- reading: untrusted text to Python values --------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """The safe loader, without aliases (by which a few lines stand for billions) and of bounded size."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.nodes = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise FrankenError("it uses a YAML alias (*name), which is not read")
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > MOST_DEPTH or self.nodes > MOST_NODES:
            raise FrankenError("it is nested too deep, or holds too much, for a merge configuration")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def read_yaml(path: str) -> dict:
    """A mapping from a YAML file. Raises FrankenError naming the file for anything else: code, aliases,
    several documents, more than a configuration needs."""
    text = read_bytes(path, MOST_BYTES).decode("utf-8", "replace")
    try:
        loader = _Loader(text)
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
    except FrankenError as e:
        raise FrankenError(f"{path}: {e}") from e
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise FrankenError(f"{path} is not YAML that can be read ({reason[:200]})") from e
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise FrankenError(f"{path} holds no merge configuration, which is a mapping of names")
    return data


# ---- reading: values to a merge ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Input:
    """One source of a slice: the model as it is named, its layers (None: all), its parameters."""

    model: str
    layers: tuple[int, int] | None
    parameters: dict


@dataclass(frozen=True)
class _Slice:
    inputs: tuple[_Input, ...]
    parameters: dict
    base: int = 0  # which of the inputs slerp begins from


class _Merge:
    """A configuration whose every part is known. Raises FrankenError, naming the part, for what is not."""

    def __init__(self, data: dict):
        _only(
            data,
            ("merge_method", "slices", "models", "base_model", "dtype", "out_dtype", "parameters", "name"),
            "the configuration",
        )
        method = data.get("merge_method")
        if method not in METHODS:
            raise FrankenError(
                f"the merge method {_short(method)} cannot be expressed; {', '.join(METHODS)} can"
            )
        self.method = str(method)
        for key in ("dtype", "out_dtype"):
            if data.get(key) not in DTYPES:
                raise FrankenError(f"{key} {_short(data[key])} is none of {', '.join(filter(None, DTYPES))}")
        self.parameters = self._parameters(data.get("parameters"), "the configuration")
        base = None if data.get("base_model") is None else _model(data["base_model"])
        slices, models = data.get("slices"), data.get("models")
        if (slices is None) == (models is None):
            raise FrankenError("either slices or models are merged, and one of them has to be there")
        if models is not None:
            inputs = [self._input(entry, whole=True) for entry in _list(models, "models")]
            if base is not None and base not in [i.model for i in inputs]:
                inputs.append(_Input(base, None, {}))  # as mergekit adds it
            self.slices = (self._slice(inputs, {}, base),)
        else:
            self.slices = tuple(self._read_slice(entry, base) for entry in _list(slices, "slices"))

    def _read_slice(self, entry: Any, base: str | None) -> _Slice:
        _only(entry, ("sources", "base_model", "parameters"), "a slice")
        inputs = [self._input(source, whole=False) for source in _list(entry.get("sources"), "sources")]
        if len({i.layers[1] - i.layers[0] for i in inputs if i.layers}) != 1:
            raise FrankenError("the sources of a slice have different numbers of layers")
        base = base if entry.get("base_model") is None else _model(entry["base_model"])
        return self._slice(inputs, self._parameters(entry.get("parameters"), "a slice"), base)

    def _slice(self, inputs: list[_Input], parameters: dict, base: str | None) -> _Slice:
        names = [i.model for i in inputs]
        if len(set(names)) < len(names):
            raise FrankenError(f"a slice takes {_short(names[0])} twice, of which mergekit keeps one")
        if self.method == "passthrough" and len(inputs) != 1:
            raise FrankenError(f"passthrough takes one model a slice, not {len(inputs)}")
        if self.method == "slerp" and (len(inputs) != 2 or base not in names):
            raise FrankenError("slerp is between two models, of which base_model names one")
        return _Slice(tuple(inputs), parameters, names.index(str(base)) if self.method == "slerp" else 0)

    def _input(self, entry: Any, whole: bool) -> _Input:
        _only(entry, ("model", "parameters") if whole else ("model", "layer_range", "parameters"), "a model")
        layers = None
        if not whole:
            layers = entry.get("layer_range")
            numbers = isinstance(layers, list) and len(layers) == 2
            if not numbers or not all(type(x) is int and 0 <= x <= MOST_LAYERS for x in layers):
                raise FrankenError(f"layer_range {_short(layers)} is not two numbers of layers")
            if layers[0] >= layers[1]:
                raise FrankenError(f"layer_range {_short(layers)} holds no layer")
            layers = layers[0], layers[1]
        parameters = self._parameters(entry.get("parameters"), "a model")
        if shared := [name for name in parameters if name in SHARED]:
            raise FrankenError(f"{shared[0]} is of a whole slice; mergekit does not read it beside a model")
        return _Input(_model(entry.get("model")), layers, parameters)

    def _parameters(self, given: Any, where: str) -> dict:
        if given is None:
            return {}
        _only(given, PARAMETERS[self.method], f"the parameters of {self.method} in {where}")
        return {name: _setting(value, name) for name, value in given.items()}

    # ---- what a tensor's weights are -----------------------------------------------------------------------

    def _levels(self, slice_: _Slice, own: dict, name: str) -> list[tuple[str | None, tuple]]:
        """(filter, gradient) of a parameter in the order in which mergekit tries them."""
        scopes = [slice_.parameters, self.parameters]
        if name not in SHARED:
            scopes.insert(0, own)
        return [condition for scope in scopes for condition in scope.get(name, ())]

    def _value(
        self, levels: list[tuple[str | None, tuple]], tensor: str, depth: float
    ) -> float | bool | None:
        for text, gradient in levels:
            if text is None or text in tensor:
                return _at(gradient, depth)
        return None

    def weights(self, slice_: _Slice, tensor: str, depth: float) -> tuple[tuple[float, ...], bool]:
        """(weights in the order of the inputs, whether they are normalized) of a tensor; `depth` in the slice
        is from 0 to 1. Raises FrankenError where one is not given."""
        if self.method == "passthrough":
            scale = self._value(self._levels(slice_, slice_.inputs[0].parameters, "scale"), tensor, depth)
            if scale not in (None, 1):
                raise FrankenError(f"passthrough with the scale {scale} of weights cannot be expressed")
            return (1.0,), False
        if self.method == "slerp":
            t = self._value(self._levels(slice_, {}, "t"), tensor, depth)
            if t is None:
                raise FrankenError(f"slerp has no t for {tensor}")
            return ((1.0 - t, float(t)) if slice_.base == 0 else (float(t), 1.0 - t)), False
        each = []
        for source in slice_.inputs:
            weight = self._value(self._levels(slice_, source.parameters, "weight"), tensor, depth)
            if weight is None:
                raise FrankenError(f"linear has no weight of {_short(source.model)} for {tensor}")
            each.append(float(weight))
        normalize = self._value(self._levels(slice_, {}, "normalize"), tensor, depth)
        return tuple(each), normalize is None or bool(normalize)

    def _texts(self, slice_: _Slice) -> list[str]:
        """The filters of a slice that tell tensors of one layer apart, in their order.

        Raises FrankenError where they name layers by number, or stand in different orders.
        """
        name = {"passthrough": "scale", "linear": "weight", "slerp": "t"}[self.method]
        owners = [{}] if name in SHARED else [source.parameters for source in slice_.inputs]
        owners = [(name, own) for own in owners] + [("normalize", {})] * (self.method == "linear")
        lists = []
        for parameter, own in owners:
            texts = [text for text, _ in self._levels(slice_, own, parameter) if text is not None]
            for text in texts:
                if re.search(r"\d", text) or not re.fullmatch(r"[\w.]+", text):
                    raise FrankenError(f"the filter {_short(text)} names layers or more than a tensor's name")
            # a text that every layer's name holds is as good as none; the outside is looked at apart
            lists.append(
                [text for text in texts if text not in "model.layers." and text not in FILTERS.values()]
            )
        longest = max(lists, key=len)
        if any(texts and texts != longest for texts in lists):
            raise FrankenError("the filters of a slice's models stand in different orders")
        return list(dict.fromkeys(longest))

    # ---- to a recipe ---------------------------------------------------------------------------------------

    def recipe(self, source_of: Callable[[str], str], depth: int) -> Recipe:
        """The merge for models of `depth` layers. Raises FrankenError for what does not fit them."""
        slots: list[Slot] = []
        for slice_ in self.slices:
            texts = self._texts(slice_)
            ranges = [i.layers or (0, depth) for i in slice_.inputs]
            count = ranges[0][1] - ranges[0][0]
            if beyond := [r for r in ranges if r[1] > depth]:
                raise FrankenError(f"layer_range {list(beyond[0])} is beyond the {depth} layers of the model")
            if len(slots) + count > MOST_LAYERS:
                raise FrankenError(f"more than {MOST_LAYERS:,} layers would run")
            for k in range(count):
                at = k / (count - 1) if count > 1 else 1.0
                refs = [Ref(source_of(i.model), r[0] + k) for i, r in zip(slice_.inputs, ranges, strict=True)]
                slots.append(self._slot(slice_, refs, texts, len(slots), at))
        outer = {}
        for part, name in OUTSIDE.items():
            slice_ = self.slices[0 if part == "embed" else -1]
            weights, normalize = self.weights(slice_, name, 0.0)
            mix = [(source_of(i.model), w) for i, w in zip(slice_.inputs, weights, strict=True)]
            outer[part] = self._outer(mix, normalize, slice_.base)
        return Recipe(tuple(slots), **outer)

    def _slot(self, slice_: _Slice, refs: list[Ref], texts: list[str], position: int, at: float) -> Slot:
        stem = f"model.layers.{position}."
        weights, normalize = self.weights(slice_, stem, at)
        by_name = []
        for text in texts:
            other, also = self.weights(slice_, stem + text.removeprefix("."), at)
            if also != normalize:
                raise FrankenError("a slice normalizes some tensors of a layer and others not")
            by_name.append((text, other))
        order = [1, 0] if slice_.base == 1 else list(range(len(refs)))  # slerp goes from the first part
        mix = [(refs[i], weights[i]) for i in order]
        by_name = [(text, tuple(other[i] for i in order)) for text, other in by_name]
        if all(other == tuple(w for _, w in mix) for _, other in by_name):
            by_name = []
        if not by_name and (one := _alone([w for _, w in mix], normalize, self.method)) is not None:
            return plain(mix[one][0].source, mix[one][0].layer)
        if self.method == "linear" and not by_name:
            mix = [(ref, w) for ref, w in mix if w != 0] or mix
        if len(mix) == 1:
            raise FrankenError(f"position {position} is one layer times {mix[0][1]:g}, which no recipe says")
        method = "slerp" if self.method == "slerp" else "linear"
        return Slot(tuple(mix), mixing=Mixing(method, normalize, tuple(by_name)))

    def _outer(self, mix: list[tuple[str, float]], normalize: bool, base: int) -> str | Outer:
        mix = mix[::-1] if base == 1 else mix
        if (one := _alone([w for _, w in mix], normalize, self.method)) is not None:
            return mix[one][0]
        if len(mix) == 1:
            raise FrankenError(f"what surrounds the layers is {mix[0][1]:g} times one model's")
        return Outer(tuple(mix), Mixing("slerp" if self.method == "slerp" else "linear", normalize))


def _alone(weights: Sequence[float], normalize: bool, method: str) -> int | None:
    """Which part is taken as it is; None where parts are mixed."""
    counted = [i for i, w in enumerate(weights) if w != 0]
    if len(counted) != 1:
        return None
    weight = weights[counted[0]]
    return counted[0] if weight == 1 or (normalize and method == "linear") else None


def _only(entry: Any, names: Sequence[str], where: str) -> None:
    """Raises FrankenError unless it is a mapping with keys of these names alone."""
    if not isinstance(entry, dict):
        raise FrankenError(f"{where} is {_short(entry)}, not a mapping of names")
    if odd := [key for key in entry if key not in names]:
        raise FrankenError(f"{_short(odd[0])} in {where} cannot be expressed")


def _list(value: Any, what: str) -> list:
    if not isinstance(value, list) or not value:
        raise FrankenError(f"{what} is {_short(value)}, not a list of what is merged")
    return value


def _model(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"model"} and isinstance(value["model"], dict):
        value = value["model"]
        _only(value, ("path", "revision"), "a model")
        value = value.get("path", "") + (f"@{value['revision']}" if value.get("revision") else "")
    if not isinstance(value, str) or not value:
        raise FrankenError(f"the model {_short(value)} is no name")
    if "+" in value:
        raise FrankenError(
            f"the model {_short(value)} has a LoRA adapter (+), which mergekit merges in its own way"
        )
    return value


def _setting(value: Any, name: str) -> list[tuple[str | None, tuple]]:
    """[(filter, gradient)] of a parameter."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        conditions = []
        for entry in value:
            _only(entry, ("filter", "value"), f"the parameter {name}")
            text = entry.get("filter")
            if not isinstance(text, str | None):
                raise FrankenError(f"the filter {_short(text)} of {name} is no text")
            conditions.append((None if text == "*" else text, _gradient(entry.get("value"), name)))
        return conditions
    return [(None, _gradient(value, name))]


def _gradient(value: Any, name: str) -> tuple:
    values = value if isinstance(value, list) and value else [value]
    return tuple(_number(each, name) for each in values)


def _number(value: Any, name: str) -> float | bool:
    if name == "normalize":
        if isinstance(value, bool):
            return value
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML takes 1e-3 for text
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise FrankenError(f"the parameter {name} is {_short(value)}")


def _at(gradient: tuple, depth: float) -> float | bool:
    """mergekit's evaluation of a list over a slice: linear between neighbors."""
    if isinstance(gradient[0], bool):
        return gradient[int(depth * (len(gradient) - 1))]
    scaled = depth * (len(gradient) - 1)
    low = int(scaled)
    high, part = min(len(gradient) - 1, low + 1), scaled - low
    return (1 - part) * gradient[low] + part * gradient[high]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def load(path: str) -> list[Experiment]:
    """The one experiment that a mergekit configuration is, named after its file.

    The models that it names have to be the run's; which they are, `Model.models` says when the recipe is
    built. Raises FrankenError, naming the file, for what cannot be expressed.
    """
    name = Path(path).stem
    if not re.fullmatch(r"[\w+-][\w.+-]{0,79}", name, re.ASCII):
        raise FrankenError(
            f"{path}: the experiment is called like the file, and {name[:80]!r} is no plain name"
        )
    try:
        merge = _Merge(read_yaml(path))
        for slice_ in merge.slices:
            merge._texts(slice_)
    except FrankenError as e:
        text = str(e)
        raise FrankenError(text if text.startswith(path) else f"{path}: {text}") from e
    except RecipeError as e:
        raise FrankenError(f"{path}: {e}") from e

    def build(m: Model) -> Recipe:
        def source_of(model: str) -> str:
            if model not in m.models:
                raise RecipeError(
                    f"it takes layers from {_short(model)}, which this run has not; give it as --instruct,"
                    " --base or --source NAME=PATH"
                )
            return m.models[model]

        try:
            return merge.recipe(source_of, m.n)
        except FrankenError as e:
            raise RecipeError(str(e)) from e

    why = f"mergekit's {merge.method}, from {Path(path).name}"
    return [Experiment(name, "mergekit", build, why)]


# ---- writing -----------------------------------------------------------------------------------------------


def to_yaml(recipe: Recipe, models: Mapping[str, str], layers: Mapping[str, int], dtype: str) -> str:
    """The recipe as a mergekit configuration.

    Args:
        models: mergekit's name of each source; a source that is no checkpoint is left out.
        layers: how many each source has.
        dtype: of the weights, as "bfloat16".
    Raises FrankenError naming what mergekit does not do.
    """
    # 1. what it cannot
    _refuse_unwritable(recipe, models)
    mixtures = {slot.mixing for slot in recipe.slots if len(slot.mix) > 1}
    parts = {"embed": recipe.embed, "norm": recipe.norm, "head": recipe.head}
    mixtures |= {part.mixing for part in parts.values() if isinstance(part, Outer)}
    ways = {(m.method, m.normalize) for m in mixtures}
    if len(ways) > 1:
        raise FrankenError("mergekit merges all layers by one method, and this recipe mixes them by several")
    method, normalize = next(iter(ways), ("linear", False))
    # 2. slices
    first, last = recipe.slots[0].mix[0][0].source, recipe.slots[-1].mix[0][0].source
    if not mixtures and tuple(parts.values()) == (first, last, last):
        config: dict[str, Any] = {"merge_method": "passthrough"}
        config["slices"] = [
            {"sources": [{"model": models[ref.source], "layer_range": [ref.layer, ref.layer + length]}]}
            for ref, length in _runs(recipe)
        ]
    elif method == "slerp":
        config = _slerp(recipe, models, parts)
    else:
        config = _linear(recipe, models, layers, parts, normalize)
    config["dtype"] = dtype
    return yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=100)


def _refuse_unwritable(recipe: Recipe, models: Mapping[str, str]) -> None:
    if recipe.parallel:
        raise FrankenError("mergekit does not run layers side by side (parallel layers)")
    for p, slot in enumerate(recipe.slots):
        if slot.edits:
            edit = type(slot.edits[0]).__name__.lower()
            what = {"noise": "add noise", "permute": "permute units"}[edit]
            raise FrankenError(f"mergekit does not {what}, as this recipe does at position {p}")
        if slot.scale != 1:
            raise FrankenError(f"mergekit does not scale what a layer contributes, as at position {p}")
        if len({ref.source for ref, _ in slot.mix}) < len(slot.mix):
            raise FrankenError(
                f"mergekit mixes no two layers of one model, as this recipe does at position {p}"
            )
    if lacking := sorted(recipe.sources - set(models)):
        raise FrankenError(
            f"the source {lacking[0]} is an adapter here, which mergekit merges in its own way; export it"
            " as a checkpoint first"
        )


def _runs(recipe: Recipe) -> list[tuple[Ref, int]]:
    """Consecutive layers of one source, as (the first, how many)."""
    runs: list[tuple[Ref, int]] = []
    for slot in recipe.slots:
        ref = slot.mix[0][0]
        if runs and Ref(runs[-1][0].source, runs[-1][0].layer + runs[-1][1]) == ref:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((ref, 1))
    return runs


def _conditions(default: float, cases: list[tuple[str, float]]) -> Any:
    """A parameter's value, with filters where tensors differ."""
    if all(value == default for _, value in cases):
        return default
    return [*({"filter": text, "value": value} for text, value in cases), {"value": default}]


def _linear(recipe: Recipe, models, layers, parts: dict, normalize: bool) -> dict[str, Any]:
    """Every slice names every source, those that are not wanted with weight 0: mergekit takes what surrounds
    the layers from the sources of the first and of the last slice."""
    names, slices = sorted(recipe.sources), []
    open_slice: list[list] = []  # entries of the slice that may grow; none: the next one is new
    for p, slot in enumerate(recipe.slots):
        held = {ref.source: (ref, k) for k, (ref, _) in enumerate(slot.mix)}
        weights = [w for _, w in slot.mix]
        outside = [part for part in parts if (p == 0 if part == "embed" else p == len(recipe) - 1)]
        sources = []
        for name in [*held, *(name for name in names if name not in held)]:  # sums are rounded in this order
            ref, k = held.get(name, (Ref(name, min(slot.mix[0][0].layer, layers[name] - 1)), None))
            cases = [(FILTERS[part], dict(parts_of(parts[part])).get(name, 0.0)) for part in outside]
            if k is not None:
                cases += [(text, other[k]) for text, other in slot.mixing.by_name]
            else:
                cases += [(text, 0.0) for text, _ in slot.mixing.by_name]
            weight = _conditions(0.0 if k is None else weights[k], cases)
            sources.append((ref, weight))
        more = bool(open_slice) and not outside
        if more and all(
            (a.source, a.layer + n, wa) == (b.source, b.layer, wb)
            for (a, n, wa), (b, wb) in zip(open_slice, sources, strict=True)
        ):
            for entry in open_slice:
                entry[1] += 1
        else:
            slices.append([[ref, 1, weight] for ref, weight in sources])
            # what the first and the last slice say of the outside is theirs alone
            open_slice = [] if outside else slices[-1]
    written = [
        {
            "sources": [
                {
                    "model": models[ref.source],
                    "layer_range": [ref.layer, ref.layer + n],
                    "parameters": {"weight": weight},
                }
                for ref, n, weight in entries
            ]
        }
        for entries in slices
    ]
    return {"merge_method": "linear", "slices": written, "parameters": {"normalize": normalize}}


def _slerp(recipe: Recipe, models, parts: dict) -> dict[str, Any]:
    """Slerp from one source to another at every position; a layer that is taken as it is lies at an end."""
    pairs = [tuple(ref.source for ref, _ in slot.mix) for slot in recipe.slots if len(slot.mix) == 2]
    pairs += [tuple(s for s, _ in part.mix) for part in parts.values() if isinstance(part, Outer)]
    if len(set(pairs)) > 1 or not recipe.sources <= set(pairs[0]):
        raise FrankenError("mergekit's slerp goes from one model to one other, the same for all layers")
    base, other = pairs[0]
    slices = []
    for p, slot in enumerate(recipe.slots):
        cases = []
        for part in parts:
            if p == 0 if part == "embed" else p == len(recipe) - 1:
                cases.append((FILTERS[part], dict(parts_of(parts[part])).get(other, 0.0)))
        cases += [(text, weights[1]) for text, weights in slot.mixing.by_name]
        refs = {ref.source: ref for ref, _ in slot.mix}
        t = slot.mix[1][1] if len(slot.mix) == 2 else float(other in refs)
        of_other = refs.get(other) or Ref(other, slot.mix[0][0].layer)
        of_base = refs.get(base) or Ref(base, slot.mix[0][0].layer)
        slices.append(
            {
                "sources": [
                    {"model": models[ref.source], "layer_range": [ref.layer, ref.layer + 1]}
                    for ref in (of_base, of_other)
                ],
                "parameters": {"t": _conditions(t, cases)},
            }
        )
    return {"merge_method": "slerp", "base_model": models[base], "slices": slices}
