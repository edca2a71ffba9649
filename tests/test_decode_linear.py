"""Linears of one input as one operator: the same products, and a traced layer computes what it computed."""

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES

from engine.decode_linear import MOST_ROWS, linears, merge_linears
from engine.layers import run_layer

SHAPES = [([96, 32, 32], 128), ([64], 256), ([200, 1], 384), ([130, 70], 200), ([16, 16, 16, 16], 128)]


@pytest.mark.parametrize(
    "device, dtype",
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("widths, depth", SHAPES)
@pytest.mark.parametrize("rows", [1, 16, 23, 64, MOST_ROWS + 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_of_one_input(device, dtype, widths, depth, rows, with_bias):
    torch.manual_seed(0)
    x = torch.randn(rows, 1, depth).to(device, dtype)
    weights = [torch.randn(n, depth).to(device, dtype) for n in widths]
    biases = [10 * torch.randn(n).to(device, dtype) for n in widths] if with_bias else []
    for i, out in enumerate(linears(x, weights, biases)):
        exact = x.cpu().double() @ weights[i].cpu().double().T + (
            biases[i].cpu().double() if with_bias else 0
        )
        assert out.shape == (rows, 1, widths[i]) and out.dtype == dtype
        rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(out.cpu().double(), exact, rtol=rounding, atol=rounding * depth**0.5)


@pytest.mark.gpu
def test_what_lies_behind_the_last_row_and_column_is_left_alone():
    buffer = torch.full((40, 256), float("nan"), dtype=torch.bfloat16, device="cuda")
    buffer[:16, :] = 1.0
    weights = torch.full((80, 256), float("nan"), dtype=torch.bfloat16, device="cuda")
    weights[:70] = 2.0
    (out,) = linears(buffer[:16], [weights[:70]], [])
    assert out.shape == (16, 70) and bool((out == 512).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_traced_layer_with_merged_linears_gives_the_same_to_the_bit(family, tiny_pair):
    live = tiny_pair(family).live()
    layer, merged = live.layers[0].module, []

    def backend(module, inputs):
        merged.append((sum(n.target is F.linear for n in module.graph.nodes), merge_linears(module.graph)))
        module.graph.lint()
        module.recompile()
        assert not any(n.target is F.linear for n in module.graph.nodes)
        calls = [n for n in module.graph.nodes if n.target is torch.ops.franken.linears.default]
        merged.append([len(n.args[1]) for n in calls])
        return module.forward

    hidden = torch.randn(3, 1, live.config.hidden_size)
    around = torch.randn(2, 3, 1, layer.self_attn.head_dim).unbind(0)
    positions = torch.zeros(3, 1, dtype=torch.long)
    torch._dynamo.reset()
    with torch.inference_mode():
        plain = run_layer(layer, hidden, None, around, positions, None)
        traced = torch.compile(run_layer, backend=backend, dynamic=False)(
            layer, hidden, None, around, positions, None
        )
    assert torch.equal(plain, traced)
    assert merged[0] == (7, 7) and merged[1] == [3, 1, 2, 1]  # query, key, value; output; gate and up; down
