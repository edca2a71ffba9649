"""What a recipe asks of its sources: whether they have it, where it lies on disk, what is added to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from errors import FrankenError
from surgery.recipes import Outer, Permute, Recipe, Ref, parts_of
from surgery.tensors import TensorRef, read_tensor
from surgery.weights import Layer, Source


def check_recipe(
    recipe: Recipe,
    sources: Mapping[str, Source],
    kinds: Sequence[int],
    tied: bool,
    refused: Mapping[str, str],
) -> None:
    """Raises FrankenError for a recipe that no model of these sources can hold.

    Args:
        kinds: of each layer; layers of equal kind have equal plain attributes.
        refused: Permute.what -> why it would change the function here.
    """
    for source in recipe.sources:
        if source not in sources:
            raise FrankenError(
                f"the recipe takes layers from {source!r}; the sources here are {', '.join(sources)}"
            )
    if tied and recipe.embed != recipe.head:
        raise FrankenError(
            "embedding and output head are one tensor in this model and cannot come from two sources"
        )
    built = [{name: t.shape for name, t in layer.items()} for layer in next(iter(sources.values())).layers]
    mixed = any(layer != built[0] for layer in built)
    if mixed and len(recipe) != len(built):
        raise FrankenError(
            "this model's layers are not all built alike (some have experts, say): it is not made deeper or"
            " shallower"
        )
    for p, slot in enumerate(recipe.slots):
        for edit in slot.edits:
            if isinstance(edit, Permute) and edit.what in refused:
                raise FrankenError(refused[edit.what])
        for ref, _ in slot.mix:
            if not 0 <= ref.layer < min(len(kinds), len(sources[ref.source].layers)):
                raise FrankenError(f"position {p}: layer {ref.layer} of {ref.source} does not exist")
        if mixed and any(built[ref.layer] != built[p] for ref, _ in slot.mix):
            raise FrankenError(
                f"position {p} cannot hold layer {slot.mix[0][0].layer}: the two are not built alike (one has"
                " experts, say)"
            )
        if len({kinds[ref.layer] for ref, _ in slot.mix}) > 1:
            raise FrankenError(f"position {p} mixes layers of different attention kinds")


def tensor_refs(source: Source) -> list[TensorRef]:
    """Every tensor of a source that a recipe can ask for, as it lies on disk."""
    parts = [*source.layers, *source.outer.values()]
    return [ref for part in parts for ref in part.values()]


def layer_jobs(source: Source, ref: Ref, into: Layer) -> list:
    """What a Stream reads to fill `into` with a source's layer. Raises FrankenError where names differ."""
    have = source.layers[ref.layer]
    if set(have) != set(into):
        odd = sorted(set(have) ^ set(into))[0]
        raise FrankenError(
            f"layer {ref.layer} of {ref.source} does not match the model: {odd} is only on one side"
        )
    return [(have[name], tensor) for name, tensor in into.items()]


def outer_refs(sources: Mapping[str, Source], wanted: str | Outer, part: str, name: str) -> list[TensorRef]:
    """Where the tensors lie that make one of embedding, norm and head. Raises FrankenError if one is
    missing."""
    refs = []
    for source, _ in parts_of(wanted):
        if name not in sources[source].outer[part]:
            raise FrankenError(f"source {source} has no tensor for the {part} ({name})")
        refs.append(sources[source].outer[part][name])
    return refs


def add_delta(source: Source, ref: Ref, into: Layer) -> None:
    """Add what a source has beside the layer that was read: an adapter's change."""
    for name, tensor in into.items():
        delta = source.delta(ref.layer, name, tensor.device)
        if delta is None:
            continue
        stored, under = source.layers[ref.layer][name], tensor
        # was rounded on the way: the sum is rounded once
        if stored.dtype.itemsize > tensor.dtype.itemsize:
            under = read_tensor(stored).to(tensor.device)
        tensor.copy_(under.float() + delta)
