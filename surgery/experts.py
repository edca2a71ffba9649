"""Experts of a mixture-of-experts layer: one tensor each on disk, one tensor for all in memory.

transformers holds the experts of a layer as `experts.gate_up_proj` [experts, 2 x intermediate, hidden] (for
each expert its gate, then its up projection) and `experts.down_proj` [experts, hidden, intermediate];
checkpoints name every matrix of every expert. In memory both are the same numbers one after the other.
"""

from __future__ import annotations

import re

from surgery.tensors import TensorRef, joined

# As checkpoints name them (gate, up, down), and the module that has them in transformers
STYLES = (
    (re.compile(r"^mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$"), "mlp"),
    (re.compile(r"^block_sparse_moe\.experts\.(\d+)\.(w1|w3|w2)\.weight$"), "mlp"),
)
PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
ROUTERS = {"block_sparse_moe.gate.weight": "mlp.gate.weight"}


def fused(layer: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors of a layer with those of its experts joined; any other layer as it is."""
    experts: dict[str, dict[int, TensorRef]] = {"gate": {}, "up": {}, "down": {}}
    rest: dict[str, TensorRef] = {}
    module = ""
    for name, ref in layer.items():
        for pattern, home in STYLES:
            if match := pattern.match(name):
                experts[PARTS[match[2]]][int(match[1])] = ref
                module = home
                break
        else:
            rest[name] = ref
    count = len(experts["down"])
    shapes = [{ref.shape for ref in part.values()} for part in experts.values()]
    whole = count and all(sorted(part) == list(range(count)) for part in experts.values())
    if not whole or any(len(each) != 1 for each in shapes):
        return layer  # refused as not matching the model, by name
    (wide,), (other,), (narrow,) = shapes
    if wide != other or len(wide) != 2 or len(narrow) != 2:
        return layer
    pairs = [experts[side][k] for k in range(count) for side in ("gate", "up")]
    rest = {ROUTERS.get(name, name): ref for name, ref in rest.items()}
    rest[f"{module}.experts.gate_up_proj"] = joined(pairs, (count, 2 * wide[0], wide[1]))
    rest[f"{module}.experts.down_proj"] = joined([experts["down"][k] for k in range(count)], (count, *narrow))
    return rest
