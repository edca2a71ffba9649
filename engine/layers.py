"""One decoder layer, as prefill and decode both run it; and what a recipe does to its output.

A scale, and a block of positions that run side by side, change no weight, so the engine carries them out.
Both are computed in float32 and rounded once to the model's dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

_CACHE_KEYWORDS: dict[type, str] = {}  # filled outside of any compiled code


def cache_keyword(module) -> str:
    """What a decoder layer calls its cache: transformers has `past_key_values` up to 5.23 and `cache` from
    5.24 on, where the old name warns until it goes away in 5.40."""
    kind = type(module)
    if kind not in _CACHE_KEYWORDS:
        parameters = inspect.signature(kind.forward).parameters
        _CACHE_KEYWORDS[kind] = "cache" if "cache" in parameters else "past_key_values"
    return _CACHE_KEYWORDS[kind]


def run_layer(module, hidden, mask, cos_sin, positions, cache):
    """One decoder layer; a function of its own so that it can be compiled once for all layers.

    `cache_keyword` must have seen the kind of layer before this is compiled; an Engine sees to it.
    """
    out = module.forward(
        hidden,
        attention_mask=mask,
        position_embeddings=cos_sin,
        position_ids=positions,
        use_cache=cache is not None,
        **{cache_keyword(module.module if isinstance(module, Attenuated) else module): cache},
    )
    return out[0] if isinstance(out, tuple) else out


class Attenuated:
    """A decoder layer whose contribution is scaled: from h it makes h + scale * (layer(h) - h).

    It stands where `run_layer` expects a module, so that a function run in place of `run_layer` sees the
    hidden states that really go on.
    """

    def __init__(self, module, scale: float):
        self.module, self.scale = module, scale

    def forward(self, hidden, **kwargs):
        out = self.module.forward(hidden, **kwargs)
        return attenuated(hidden, out[0] if isinstance(out, tuple) else out, self.scale)


def attenuated(hidden: torch.Tensor, out: torch.Tensor, scale: float) -> torch.Tensor:
    """hidden + scale * (out - hidden) in float32, rounded to the dtype of `out`.

    At scale 0 it is `hidden`, even where a broken layer gives NaN.
    """
    if scale == 0:
        return hidden
    before = hidden.float()
    return (before + scale * (out.float() - before)).to(out.dtype)


def compiled_for_modules(run: Callable) -> Callable:
    """A `run_layer` of another make (compiled, fused) that never sees a scale: one compiled layer goes on
    serving all positions."""

    def run_any(module, hidden, *args):
        if isinstance(module, Attenuated):
            return attenuated(hidden, run(module.module, hidden, *args), module.scale)
        return run(module, hidden, *args)

    return run_any


def mean_of(outputs: list[torch.Tensor]) -> torch.Tensor:
    """The mean of hidden states of equal shape, summed in float32 in order, on the device of the last."""
    device = outputs[-1].device
    total = outputs[0].to(device).float()
    for out in outputs[1:]:
        total = total + out.to(device).float()
    return (total / len(outputs)).to(outputs[-1].dtype)
