"""One decoder layer, as prefill and decode both run it."""

from __future__ import annotations


def run_layer(module, hidden, mask, cos_sin, positions, cache):
    """One decoder layer; a function of its own so that it can be compiled once for all layers."""
    out = module.forward(
        hidden,
        attention_mask=mask,
        position_embeddings=cos_sin,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return out[0] if isinstance(out, tuple) else out
