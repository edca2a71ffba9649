"""Matrix products of a decode step, where reading the weights is all the work: linears of one input as one
kernel.

A layer asks for its query, key and value (gate and up) one after another, and a product that small leaves the
memory idle at its start and end. `compile_layer` is a backend for torch.compile that hands all linears of one
input to one operator; modules and weights stay as they are. One H200, the 32B shape, 16 rows, microseconds:
query, key, value 37 -> 21, gate and up 138 -> 135, down 74 -> 72.
"""

# pyright: reportInvalidTypeForm=false
# Kernels are annotated with names of triton, which to pyright are no types: a CPU build of torch lacks it.

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import library

if TYPE_CHECKING:  # what is checked must not depend on whether this machine has triton
    triton = cast(Any, None)
    tl = cast(Any, None)
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # a CPU build of torch: plain linears serve there
        triton = None

TOGETHER = 3  # linears of one launch
MOST_ROWS = 64  # beyond, there is arithmetic to do as well: left to cuBLAS, not measured
# of the weights at once, reads in flight: the best of 15 shapes, or within 3%, for 16 and 64 rows
COLUMNS, DEPTH, WARPS, STAGES = (
    64,
    128,
    4,
    6,
)


@library.custom_op("franken::linears", mutates_args=())
def linears(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Linear layers of one input: x [..., K], weights [N, K] each, biases [N] each or none at all -> [..., N]
    each."""
    rows, depth = x.numel() // x.shape[-1], x.shape[-1]
    thin = x.is_cuda and x.element_size() == 2 and rows <= MOST_ROWS and depth % DEPTH == 0
    if triton is None or not thin or len(weights) > TOGETHER or not all(w.is_contiguous() for w in weights):
        return [F.linear(x, w, b) for w, b in zip(weights, biases or [None] * len(weights), strict=True)]
    outs = [x.new_empty(*x.shape[:-1], len(w)) for w in weights]
    padded = [(*parts, *[parts[0]] * (TOGETHER - len(parts))) for parts in (weights, biases or weights, outs)]
    widths = [len(w) for w in weights] + [0] * (TOGETHER - len(weights))
    tiles = [triton.cdiv(width, COLUMNS) for width in widths]
    _linears_kernel[(sum(tiles),)](
        x.contiguous(),
        *padded[0],
        *padded[1],
        *padded[2],
        rows,
        depth,
        *widths,
        *tiles[:-1],
        BIAS=bool(biases),
        ROWS=max(16, triton.next_power_of_2(rows)),
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        STAGES=STAGES,
        num_warps=WARPS,
    )
    return outs


@linears.register_fake
def _(x, weights, biases):
    return [x.new_empty(*x.shape[:-1], len(w)) for w in weights]


def merge_linears(graph: torch.fx.Graph) -> int:
    """Replace linears in the graph by the operator, those of one input together; returns how many were
    replaced.

    The graph is what Dynamo traced from a layer: weights and biases are its inputs, so that all are there at
    the first.
    """
    groups: dict[tuple, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.linear and not node.kwargs:
            x, weight, bias = (*node.args, None)[:3]
            if all(p is None or p.op in ("placeholder", "get_attr") for p in (weight, bias)):
                groups.setdefault((x, bias is None), []).append(node)
    for (x, plain), nodes in groups.items():
        for k in range(0, len(nodes), TOGETHER):
            some = nodes[k : k + TOGETHER]
            with graph.inserting_before(some[0]):
                outs = graph.call_function(
                    torch.ops.franken.linears.default,
                    (x, [n.args[1] for n in some], [] if plain else [n.args[2] for n in some]),
                )
                parts = [graph.call_function(operator.getitem, (outs, i)) for i in range(len(some))]
            for node, part in zip(some, parts, strict=True):
                node.replace_all_uses_with(part)
                graph.erase_node(node)
    return sum(map(len, groups.values()))


def compile_layer(module: torch.fx.GraphModule, inputs: list):
    """A backend of torch.compile: inductor's, after `merge_linears`."""
    from torch._inductor.compile_fx import compile_fx

    merge_linears(module.graph)
    module.recompile()
    return compile_fx(module, inputs)


if triton is not None:

    @triton.jit
    def _linears_kernel(
        x,
        w0,
        w1,
        w2,
        b0,
        b1,
        b2,
        y0,
        y1,
        y2,
        rows,
        depth,
        n0,
        n1,
        n2,
        tiles0,
        tiles1,
        BIAS: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        # One program reads COLUMNS rows of one weight matrix, once, and all of x, which lies in the L2 cache.
        # 1. whose tile this is
        tile = tl.program_id(0)
        if tile < tiles0:
            w = w0
            b = b0
            y = y0
            width = n0
        elif tile < tiles0 + tiles1:
            w = w1
            b = b1
            y = y1
            width = n1
            tile -= tiles0
        else:
            w = w2
            b = b2
            y = y2
            width = n2
            tile -= tiles0 + tiles1
        # 2. the product, along the depth
        w = tl.multiple_of(w, 16)
        row, column, at = tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
        real, inside = (row < rows)[None], (column < width)[:, None]
        total = tl.zeros((COLUMNS, ROWS), tl.float32)
        w_at = w + column[:, None].to(tl.int64) * depth + at[None]
        x_at = x + row[None] * depth + at[:, None]
        for k in tl.range(0, depth, DEPTH, num_stages=STAGES):
            weight = tl.load(w_at + k, mask=inside, other=0.0, eviction_policy="evict_first")
            part = tl.load(x_at + k, mask=real, other=0.0, eviction_policy="evict_last")
            total = tl.dot(weight, part, total)
        # 3. the bias, and out
        if BIAS:
            total += tl.load(b + column[:, None], mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row[None] * width + column[:, None], total.to(y.dtype.element_ty), mask=real & inside)
