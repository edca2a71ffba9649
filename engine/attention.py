"""Attention as the engine asks decoder layers for it, and the caches that a layer finds at its position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from engine.packing import Paths, attend_along_paths
from errors import FrankenError

ATTENTION = "franken"


# passed on by layers, without effect on what is computed here: the mask has the window and the positions
PASSED_ON = frozenset(
    (
        "sliding_window",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "position_embeddings",
    )
)


@contextmanager
def sound_attention() -> Iterator[None]:
    """Within it no scaled_dot_product_attention is computed by cuDNN: for whatever is trained.

    torch 2.11 and later prefer cuDNN's kernels on Hopper. Their gradient of the queries is NaN where a mask
    is given, the width is 64 more than a multiple of 128, and a row's logits all lie below about -88, as they
    do in a head of Qwen2.5 (github.com/pytorch/pytorch/issues/196678). The forward pass is right.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def refuse_unknown(module, passed: dict) -> None:
    """Raises FrankenError where a layer asks attention for more than is computed here."""
    for name, value in passed.items():
        if name == "is_causal" and value is not False:
            continue
        if value is not None and name not in PASSED_ON:
            raise FrankenError(f"{type(module).__name__} passes {name} to attention, which is not supported")


def attend(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **kwargs
):
    """Attention as transformers calls it: query [B, H, S, D], key and value [B, G, K, D] -> [B, S, H, D],
    None.

    softcap bends the scores before the softmax (Gemma 2); s_aux [H] are attention sinks, one more score for
    every query that no value belongs to (gpt-oss). Raises FrankenError for anything else that is passed.

    `attention_mask` is boolean, or None for plain causal attention of a prompt to itself, or the Paths of
    packed prompts (engine/packing.py), or in a decode step RowsByLength. There
    the H / G query heads of a group are folded into the query length: the KV heads are read once instead of
    being expanded to H of them (batch 64 on the 32B shape: 80.6 -> 29.2 ms a step).
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    refuse_unknown(module, kwargs)
    if isinstance(attention_mask, Paths):
        if softcap is not None or s_aux is not None:
            raise FrankenError(f"{type(module).__name__}: packed prompts know no softcap and no sinks")
        return attend_along_paths(query, key, value, attention_mask, scaling), None
    if softcap is not None or s_aux is not None:  # which no fused kernel does
        return _attend_explicitly(query, key, value, attention_mask, scaling, softcap, s_aux), None
    if length == 1:
        folded = query.view(batch, groups, heads // groups, width)
        if isinstance(attention_mask, RowsByLength):
            seen, parts = attention_mask.mask, attention_mask.groups
        else:
            seen, parts = attention_mask, [(0, batch, key.shape[2])]
        outs = [
            _of_a_step(
                folded[a:b],
                key[a:b, :, :keys],
                value[a:b, :, :keys],
                None if seen is None else seen[a:b, ..., :keys],
                scaling,
            )
            for a, b, keys in parts
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.reshape(batch, 1, heads, width), None
    # the one fused kernel with masks wants all heads
    if query.is_cuda and attention_mask is not None and heads != groups:
        key, value = (t.repeat_interleave(heads // groups, 1) for t in (key, value))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None,
        scale=scaling,
        enable_gqa=heads != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def _of_a_step(query, key, value, seen, scaling):
    """Attention of the few query heads of a group: query [B, G, heads of a group, D], key and value
    [B, G, K, D]. A CPU is faster by two products in float32 (98 rows, 64 to 192 keys of SmolLM2: 2.3 to 3.5
    ms a layer by torch's kernel, 1.3 to 3.1 so)."""
    if seen is None or query.is_cuda or query.dtype != torch.float32:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scaling, key.transpose(2, 3)).masked_fill_(~seen, float("-inf"))
    return torch.matmul(scores.softmax(-1), value)


def _attend_explicitly(query, key, value, mask, scaling, softcap, sinks):
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : key.shape[2]].to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass(frozen=True)
class RowsByLength:
    """What a decode step's rows look at, where each reads no more keys than it needs: given where layers pass
    on a mask.

    mask: [B, 1, 1, K], as `attend` has it. groups: (first row, the row behind the last, keys that they read).
    """

    mask: torch.Tensor
    groups: Sequence[tuple[int, int, int]]


class KV:
    """The cache of one position, in the form decoder layers expect of `past_key_values`.

    k, v: [B, G, K, D]. In prefill (`at` is None) the prompt's keys are stored and handed back as they came;
    in a decode step row b writes at position at[1][b] and all K positions are handed back.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor] | None = None):
        self.k, self.v, self.at = k, v, at

    def update(self, key, value, layer_idx, *args, **kwargs):
        if self.at is None:
            self.k[:, :, : key.shape[2]] = key
            self.v[:, :, : value.shape[2]] = value
            return key, value
        rows, positions = self.at
        self.k[rows, :, positions] = key[:, :, 0]
        self.v[rows, :, positions] = value[:, :, 0]
        return self.k, self.v


class Placed:
    """The cache of one position while prompts are read: tokens of the pass go to places of their own.

    k, v: what is kept, in whose shape `places` index: rows and positions of caches, [rows, G, K, D] by (rows
    [T], all, positions [T]), or slots of a pool, [slots, G, D] by (slots [T],). source [T]: which of the
    pass's tokens goes to each, counted over all rows of the pass; a token may go to several.
    """

    def __init__(
        self, k: torch.Tensor, v: torch.Tensor, source: torch.Tensor, places: tuple[torch.Tensor | slice, ...]
    ):
        self.k, self.v, self.source, self.places = k, v, source, places

    def update(self, key, value, layer_idx, *args, **kwargs):
        for kept, new in ((self.k, key), (self.v, value)):
            kept[self.places] = new.transpose(1, 2).flatten(0, 1)[self.source]
        return key, value


class Continued:
    """The cache of one position while prompts go on after tokens that it already holds; what is new is not
    kept.

    k, v: [rows, G, P, D]; row b of the new batch follows on row `rows[b]`.
    """

    def __init__(self, cache: KV, rows: Sequence[int]):
        self.cache, self.rows = cache, torch.tensor(rows, device=cache.k.device)

    def update(self, key, value, layer_idx, *args, **kwargs):
        return (torch.cat([self.cache.k[self.rows], key], 2), torch.cat([self.cache.v[self.rows], value], 2))


def windows_of(config) -> dict[str, int | None]:
    """The sliding window in tokens of each attention kind, as transformers' masks have it; None: all is seen.

    It is the config that says so. A module may keep a window that does not hold for it (EXAONE 4).
    """
    window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) is None:
        return {"full_attention": window}
    return {"full_attention": None, "sliding_attention": window}


def rope_limits(config) -> tuple[int | None, int | None]:
    """(tokens beyond which all positions of a text have other rotary factors, tokens beyond which the factors
    change with every token); None where there is no such length.

    The first is longrope's (Phi-3, MiniCPM; arXiv 2402.13753), the second dynamic NTK scaling's.
    """
    stated = getattr(config, "rope_parameters", None) or {}
    scalings = [stated, *(inner for inner in stated.values() if isinstance(inner, dict))]
    switch = [s["original_max_position_embeddings"] for s in scalings if s.get("rope_type") == "longrope"]
    dynamic = any("dynamic" in str(s.get("rope_type")) for s in scalings)
    return (switch[0] if switch else None), (config.max_position_embeddings if dynamic else None)
