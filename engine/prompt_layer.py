"""A decoder layer of Llama's kind over packed prompts, with all but its products in three kernels of our own.

transformers' layer makes some twenty passes over its activations between the products (norms and rotation in
float32, SiLU, residuals); these kernels make five, and round where transformers rounds. Layers of other kinds
run as transformers has them, and so does everything without a GPU.
"""

# pyright: reportInvalidTypeForm=false
# Kernels are annotated with names of triton, which to pyright are no types: a CPU build of torch lacks it.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from engine.layers import run_layer
from engine.packing import Paths, attend_along_paths

if TYPE_CHECKING:  # what is checked must not depend on whether this machine has triton
    triton = cast(Any, None)
    tl = cast(Any, None)
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # a CPU build of torch: transformers' layers run there
        triton = None

# two norms before attention and MLP, separate projections, rotation by halves, a gated MLP; nothing else
KINDS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)
BLOCK = 4096  # numbers that one program of the SiLU kernel works on


def run_prompt_layer(module, hidden, mask, cos_sin, positions, cache):
    """What `run_layer` does for packed prompts: hidden [1, N, hidden] and Paths."""
    known = type(module) in KINDS and isinstance(module.mlp.act_fn, nn.SiLU | _silu_of_transformers())
    if triton is None or not hidden.is_cuda or not isinstance(mask, Paths) or not known:
        return run_layer(module, hidden, mask, cos_sin, positions, cache)
    return run_fused(module, hidden, mask, cos_sin, cache)


def _silu_of_transformers() -> type:
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])


def run_fused(module, hidden, paths: Paths, cos_sin, cache):
    """One layer of KINDS: hidden [1, N, hidden] -> the same."""
    # 1. attention
    attention, mlp = module.self_attn, module.mlp
    width = attention.head_dim
    _, x = add_and_norm(hidden, None, module.input_layernorm)
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    cos, sin = cos_sin
    for heads in (q, k):
        rotate_in_place(heads, cos, sin, width)
    q, k, v = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k, v))
    if cache is not None:
        k, v = cache.update(k, v, 0)
    out = attention.o_proj(attend_along_paths(q, k, v, paths, attention.scaling).flatten(2))
    # 2. the MLP
    hidden, x = add_and_norm(hidden, out, module.post_attention_layernorm)
    gate = mlp.gate_proj(x)
    silu_times_in_place(gate, mlp.up_proj(x))
    return hidden + mlp.down_proj(gate)


def add_and_norm(x: torch.Tensor, more: torch.Tensor | None, norm) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + more, their RMS norm) of [1, N, width], rounded as transformers does; without `more`, x and its
    norm."""
    x = x.contiguous()
    total, out = (x if more is None else torch.empty_like(x)), torch.empty_like(x)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    _norm_kernel[(rows,)](
        x,
        x if more is None else more.contiguous(),
        norm.weight,
        total,
        out,
        width,
        norm.variance_epsilon,
        ADD=more is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
    )
    return total, out


def rotate_in_place(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, width: int) -> None:
    """Rotary positions, by halves, of heads side by side: x [1, N, heads * width]; cos and sin [1, N,
    width]."""
    assert x.is_contiguous() and cos.shape[:2] == x.shape[:2], "fresh from a projection, one row"
    heads = x.shape[-1] // width
    _rotate_kernel[(x.shape[1],)](
        x,
        cos.contiguous(),
        sin.contiguous(),
        HEADS=heads,
        HEADS_2=triton.next_power_of_2(heads),
        HALF=width // 2,
        HALF_2=triton.next_power_of_2(width // 2),
        num_warps=4,
    )


def silu_times_in_place(gate: torch.Tensor, up: torch.Tensor) -> None:
    """gate becomes silu(gate) * up."""
    n = gate.numel()
    _silu_kernel[(triton.cdiv(n, BLOCK),)](gate, up, n, BLOCK=BLOCK, num_warps=8)


if triton is not None:

    @triton.jit
    def _norm_kernel(x, more, weight, total, out, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
        # one program: one token
        at = tl.arange(0, BLOCK)
        inside = at < width
        here = tl.program_id(0).to(tl.int64) * width + at
        value = tl.load(x + here, mask=inside, other=0.0)
        if ADD:
            other = tl.load(more + here, mask=inside, other=0.0)
            value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
            tl.store(total + here, value, mask=inside)
        wide = value.to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
        normed = (wide * scale).to(value.dtype).to(tl.float32)
        factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + here, (normed * factor).to(value.dtype), mask=inside)

    @triton.jit
    def _rotate_kernel(
        x, cos, sin, HEADS: tl.constexpr, HEADS_2: tl.constexpr, HALF: tl.constexpr, HALF_2: tl.constexpr
    ):
        # one program: all heads of one token
        token = tl.program_id(0).to(tl.int64)
        head, d = tl.arange(0, HEADS_2)[:, None], tl.arange(0, HALF_2)[None]
        real, inside = (head < HEADS) & (d < HALF), d < HALF
        low = x + token * HEADS * 2 * HALF + head * 2 * HALF + d
        angle = token * 2 * HALF + d
        a = tl.load(low, mask=real, other=0.0)
        b = tl.load(low + HALF, mask=real, other=0.0)
        kind = a.dtype
        a, b = a.to(tl.float32), b.to(tl.float32)
        cos_a = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        cos_b = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
        sin_a = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        sin_b = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
        # each product is rounded before they are added, as transformers' are
        new_a = (a * cos_a).to(kind).to(tl.float32) + (-b * sin_a).to(kind).to(tl.float32)
        new_b = (b * cos_b).to(kind).to(tl.float32) + (a * sin_b).to(kind).to(tl.float32)
        tl.store(low, new_a.to(kind), mask=real)
        tl.store(low + HALF, new_b.to(kind), mask=real)

    @triton.jit
    def _silu_kernel(gate, up, n, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        g = tl.load(gate + at, mask=inside, other=0.0)
        wide = g.to(tl.float32)
        silu = (wide / (1 + tl.exp(-wide))).to(g.dtype).to(tl.float32)
        u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(gate + at, (silu * u).to(g.dtype), mask=inside)
