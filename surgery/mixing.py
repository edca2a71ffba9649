"""What a recipe does to one position's tensors: layers mixed, noise added, units reordered."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from surgery.permuting import permute_units_in_place
from surgery.recipes import Mixing, Noise, Slot
from surgery.weights import Layer


def mix_in_place(into: Layer, others: Sequence[Layer], slot: Slot) -> None:
    """Turn the first layer of a slot's mixture into the mixture with `others`, the rest of it in order:
    summed in float32, rounded once."""
    if not others:
        return
    weights = [w for _, w in slot.mix]
    for name, tensor in into.items():
        tensor.copy_(mix([tensor, *(layer[name] for layer in others)], weights, slot.mixing, name))


def mix(tensors: Sequence[torch.Tensor], weights: Sequence[float], how: Mixing, name: str) -> torch.Tensor:
    """Tensors of one shape mixed into a float32 one; `name`, of the tensor in its layer, may decide its
    weights."""
    weights = how.weights_of(name, weights)
    if how.method == "slerp":
        return slerp(tensors[0], tensors[1], weights[1])
    # multiplied and added at once, as mergekit does: on most processors rounded once
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.addcmul_(tensor.float(), total.new_tensor(weight))
    return total.div_(torch.tensor(weights).sum().item()) if how.normalize else total


def slerp(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """The tensor `share` of the way from a to b along the arc between them, each seen as one vector; float32.

    Where the cosine of their angle is beyond 0.9995 either way the chord is taken, as mergekit does.
    """
    a, b = a.float(), b.float()
    lengths = [
        length if (length := torch.linalg.vector_norm(t)) > 1e-8 else length.new_ones(()) for t in (a, b)
    ]
    cosine = ((a / lengths[0]) * (b / lengths[1])).sum().clamp(-1, 1).double()
    if cosine.abs() > 0.9995:
        return a * (1 - share) + b * share
    angle = torch.acos(cosine)
    of_a, of_b = (torch.sin(angle * part) / torch.sin(angle) for part in (1 - share, share))
    return a * of_a.float() + b * of_b.float()


def edit_in_place(layer: Layer, slot: Slot, config) -> None:
    """Noise and permutations of a slot, in order."""
    for edit in slot.edits:
        if isinstance(edit, Noise):
            for name, tensor in layer.items():
                tensor.copy_(tensor.float() + noise_for(tensor, edit, name))
        else:
            permute_units_in_place(layer, edit, config)


def noise_for(tensor: torch.Tensor, noise: Noise, name: str) -> torch.Tensor:
    """Float32 Gaussian noise for one tensor: standard deviation `fraction` times the tensor's own
    (population) one.

    Seeded by (seed, key, tensor name), drawn on the tensor's own device: equal from run to run on one kind of
    device, not between CPU and GPU.
    """
    digest = hashlib.sha256(f"noise:{noise.seed}:{noise.key}:{name}".encode()).digest()
    generator = torch.Generator(tensor.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    draws = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32)
    return draws.mul_(tensor.float().std(correction=0) * noise.fraction)
