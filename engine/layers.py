"""One decoder layer, as prefill and decode both run it; and what a recipe does to its output.

A scale, and a block of positions that run side by side, change no weight, so the engine carries them out.
Both are computed in float32 and rounded once to the model's dtype.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

FEW_ROWS = 96  # with more MKL gives every thread its part
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


def linears_of(modules: Iterable[nn.Module | None]) -> list[nn.Linear]:
    """The linear layers of float32 within these modules, of no class of their own."""
    inside = (child for module in modules if module is not None for child in module.modules())
    plain = (child for child in inside if type(child) is nn.Linear and child.weight.dtype == torch.float32)
    return list(dict.fromkeys(plain))


def spread_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, in which each of torch's threads has its own rows of the weight, where a CPU multiplies few
    rows in float32: MKL leaves the others idle there (8 rows on two free cores, ten layers of SmolLM2: 23.4
    ms, so 15.6). x [..., in], weight [out, in], bias [out] -> [..., out]."""
    rows, parts = x.shape[:-1].numel(), math.gcd(len(weight), torch.get_num_threads())
    spread = parts > 1 and 1 < rows <= FEW_ROWS and weight.device.type == "cpu" and weight.is_contiguous()
    if not spread or weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    split = weight.view(parts, -1, weight.shape[1]).transpose(1, 2)
    out = torch.bmm(x.reshape(1, rows, -1).expand(parts, -1, -1), split)
    out = out.transpose(0, 1).reshape(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias


@contextmanager
def spread_products(linears: Sequence[nn.Linear]) -> Iterator[None]:
    """Within it these run as `spread_linear`."""
    for linear in linears:
        vars(linear)["forward"] = partial(spread_linear, weight=linear.weight, bias=linear.bias)
    try:
        yield
    finally:
        for linear in linears:
            del vars(linear)["forward"]


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
