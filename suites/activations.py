"""The residual stream at the answer position of the Yes/No questions: what there is for a model to report.

A model that says nothing of its change may not represent it, or may represent it and not say it. This suite
keeps the hidden states from which the next token, the answer, is read: after every running layer their mean
over all questions, and those of a few single questions after a few layers. `analysis.probe` asks of them how
well a linear probe tells changed models from placebos.
"""

from __future__ import annotations

import numpy as np
import torch

import prompts
from engine.attention import Continued
from engine.generation import Engine
from engine.layers import run_layer
from engine.packing import shared_prefixes
from suites.base import ARRAYS, Protocol, Suite, Work

SINGLE_PROBES = 8  # questions whose own states are kept
SINGLE_DEPTHS = (0.25, 0.5, 0.75, 1.0)  # shares of the running layers after which they are


@torch.inference_mode()
def answer_states(engine: Engine, sequences: list[tuple[int, ...]]) -> np.ndarray:
    """Residual stream at the last token of each prompt: float32 [layers, prompts, hidden], before the final
    norm; [p] is what running position p + 1 reads, the last one what the final norm reads.

    Where positions run side by side, all but the last of them are given what enters their block, as the
    stream goes past them.
    """
    depth = len(engine.live.order)
    states = np.zeros((depth, len(sequences), engine.config.hidden_size), dtype=np.float32)
    for start, group in shared_prefixes(sequences, [1] * len(sequences)):
        caches = engine.empty_caches(1, start) if start else []
        if caches:
            engine.prefill([sequences[group[0]][:start]], caches)
        rest = [sequences[i][start:] for i in group]

        def run(batch: list[int], rest=rest, start=start, caches=caches, group=group) -> None:
            here = [group[k] for k in batch]
            last = [len(rest[k]) - 1 for k in batch]
            position = 0

            def keep(p: int, hidden: torch.Tensor) -> None:
                states[p, here] = hidden[range(len(batch)), last].float().cpu().numpy()

            def layer(module, hidden, *args):
                nonlocal position
                if position:
                    keep(position - 1, hidden)
                position += 1
                return run_layer(module, hidden, *args)

            continued = [Continued(cache, [0] * len(batch)) for cache in caches]
            keep(depth - 1, engine.prefill([rest[k] for k in batch], continued or None, start, layer=layer))

        engine.in_batches([start + len(ids) for ids in rest], run)
    return states


def packed(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float16 [n, hidden] within [-1, 1], float32 [n] by which to multiply it): vectors [n, hidden] in half
    the room, whatever their size. What is not finite stays so."""
    with np.errstate(all="ignore"):
        scale = np.abs(values).max(-1)
        scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0).astype(np.float32)
        return (values / scale[:, None]).astype(np.float16), scale


def unpacked(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The inverse of `packed`, in float32, to a relative 2^-11 of each number."""
    return values.astype(np.float32) * scale[:, None]


def single_layers(depth: int) -> list[int]:
    """The running positions after which the states of single questions are kept."""
    return sorted({max(0, round(share * depth) - 1) for share in SINGLE_DEPTHS})


def single_probes(count: int) -> list[int]:
    """Which of `count` questions are kept singly: evenly spread over them."""
    return sorted({k * count // SINGLE_PROBES for k in range(SINGLE_PROBES)}) if count else []


class Activations(Suite):
    """The residual stream at the answer position of the binary probes."""

    def measure(self, engine: Engine, protocol: Protocol, replies) -> dict:
        probes = prompts.BINARY_PROBES
        states = answer_states(
            engine, [engine.chat_ids([{"role": "user", "content": p.text}]) for p in probes]
        )
        depth, count, width = states.shape
        layers, chosen = single_layers(depth), single_probes(count)
        mean, mean_scale = packed(states.mean(1))
        single, single_scale = packed(states[np.ix_(layers, chosen)].reshape(-1, width))
        return {
            "layers": depth,
            "hidden": width,
            "probes": count,
            "single_layers": layers,
            "single_probes": [probes[k].id for k in chosen],
            "finite": bool(np.isfinite(states).all()),
            ARRAYS: {
                "mean": mean,
                "mean_scale": mean_scale,
                "single": single.reshape(len(layers), len(chosen), width),
                "single_scale": single_scale.reshape(len(layers), len(chosen)),
            },
        }

    def work(self, protocol: Protocol) -> Work:
        return Work([p.text for p in prompts.BINARY_PROBES])
