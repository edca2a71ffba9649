"""Layers that compute the same function from other weights: MLP units and attention heads in another order.

Every placebo is such a layer (surgery/recipes.py, `permute_units`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch

from errors import FrankenError
from surgery.recipes import Noise, Permute
from surgery.weights import Layer

_HEADS = tuple(f"self_attn.{p}_proj.weight" for p in "qkvo")
_UNITS = tuple(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down"))
_NUMBERED = re.compile(r"\.norms\.(\d+)\.")
_QUERY_OR_KEY = re.compile(r"^self_attn\.(q|k)(_norm|_layernorm|_ln)\.")


@dataclass(frozen=True)
class Drawn:
    """The orders that one edit draws: place i is taken by what place order[i] had."""

    units: torch.Tensor  # of the MLP
    groups: torch.Tensor  # key-value heads
    heads: torch.Tensor  # query heads, group by group in the groups' new order


def _draw(layer: Layer, edit: Permute, config) -> Drawn:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    digest = hashlib.sha256(f"permute:{edit.seed}:{edit.key}".encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    down = layer.get("mlp.down_proj.weight")
    # both are drawn where both are there, so that each is the same alone
    units = torch.randperm(0 if down is None else down.shape[1], generator=rng)
    order = torch.randperm(groups, generator=rng)
    per_group = heads // groups
    within = [g * per_group + torch.randperm(per_group, generator=rng) for g in order]
    return Drawn(units, order, torch.cat(within))


def key_value_order(layer: Layer, edits: Iterable[Noise | Permute], config) -> torch.Tensor:
    """In which order a layer with these edits has its key-value heads, and its cache holds them: head i is
    the one that the layer had as head order[i] before any edit; int64 [key-value heads], on the CPU."""
    order = torch.arange(config.num_key_value_heads)
    for edit in edits:
        if isinstance(edit, Permute) and edit.what != "mlp":
            order = order[_draw(layer, edit, config).groups]
    return order


def permute_units_in_place(layer: Layer, edit: Permute, config, back: bool = False) -> None:
    """Permute MLP units, or key-value groups and the query heads within each group, or both (`edit.what`);
    `back` undoes it, to the bit.

    Consistently over all tensors that are indexed by them: the function is unchanged up to the order of
    floating-point sums. Raises FrankenError, before anything is changed, for layers that are not built of
    separate q/k/v/o and gate/up/down projections, and for a tensor in the attention or the MLP of which it is
    not known how it is indexed.
    """
    # 1. what is permuted, and how
    needed = (*(() if edit.what == "mlp" else _HEADS), *(() if edit.what == "heads" else _UNITS))
    if not all(name in layer for name in needed):
        raise FrankenError(
            f"the function-preserving permutation of {edit.what} needs separate projections, and there is no"
            f" {next(name for name in needed if name not in layer)}"
        )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    drawn, query = _draw(layer, edit, config), layer.get("self_attn.q_proj.weight")
    units, width = drawn.units, 0 if query is None else query.shape[0] // heads
    rows = torch.arange(heads * width).view(heads, width)
    by_head = {
        "q": rows[drawn.heads].flatten(),
        "k": rows[:groups][drawn.groups].flatten(),
        "head": drawn.heads,
        "group": drawn.groups,
    }
    # 2. every tensor's new order, found before the first is written
    orders: dict[str, tuple[int, torch.Tensor]] = {}
    for name, tensor in layer.items():
        if edit.what != "heads" and name.startswith("mlp."):
            orders |= _unit_order(name, tensor, units)
        if edit.what != "mlp" and name.startswith("self_attn."):
            orders |= _head_order(name, tensor, by_head, width)
    # 3. in place
    if back:
        orders = {name: (dim, inverse(index)) for name, (dim, index) in orders.items()}
    before = {name: layer[name].clone() for name in orders if _NUMBERED.search(name)}
    for name, (dim, index) in orders.items():
        if name in before:  # one module a head: head i's place is taken by what head index[i] had
            i = int(cast(re.Match, _NUMBERED.search(name))[1])
            source = _NUMBERED.sub(f".norms.{int(index[i])}.", name)
            layer[name].copy_(before[source])
        else:
            layer[name].copy_(layer[name].index_select(dim, index.to(layer[name].device)))


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes one. Sorted for, it made the way back three times as long as the way
    there."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return inverse


def _unit_order(name: str, tensor: torch.Tensor, units: torch.Tensor) -> dict:
    """{name: (dimension, order)} of one of the MLP's tensors; empty if it is not indexed by units."""
    part, whole = name.removeprefix("mlp.").rpartition(".")[0], len(units)
    if part in ("gate_proj", "up_proj") and tensor.shape[0] == whole:
        return {name: (0, units)}
    if part == "down_proj":
        return {name: (1, units)} if tensor.ndim == 2 else {}
    if tensor.numel() == 1:  # an activation's parameter
        return {}
    if tensor.shape == (whole,):  # a norm before the down projection (BitNet)
        return {name: (0, units)}
    raise _unknown(name, tensor)


def _head_order(name: str, tensor: torch.Tensor, by_head: dict[str, torch.Tensor], width: int) -> dict:
    """{name: (dimension, order)} of one of the attention's tensors; empty if it is not indexed by heads."""
    part = name.removeprefix("self_attn.").rpartition(".")[0]
    side = {"q_proj": "q", "k_proj": "k", "v_proj": "k"}.get(part)
    if side and tensor.shape[0] == len(by_head[side]):
        return {name: (0, by_head[side])}
    if part == "o_proj":
        if tensor.ndim == 1:
            return {}
        if tensor.shape[1] == len(by_head["q"]):
            return {name: (1, by_head["q"])}
    if name == "self_attn.sinks" and tensor.shape == by_head["head"].shape:
        return {name: (0, by_head["head"])}
    if match := _QUERY_OR_KEY.match(name):
        rows = by_head[match[1]]
        one_each = by_head["head" if match[1] == "q" else "group"]
        if _NUMBERED.search(name):
            return {name: (0, one_each)}
        if tensor.shape == (width,):  # the same for every head
            return {}
        if tensor.shape == rows.shape:
            return {name: (0, rows)}
        if tensor.shape == (len(one_each), width):
            return {name: (0, one_each)}
    raise _unknown(name, tensor)


def _unknown(name: str, tensor: torch.Tensor) -> FrankenError:
    return FrankenError(
        f"the function-preserving permutation does not know how {name} {list(tensor.shape)} is indexed"
    )
