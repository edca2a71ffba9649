"""The layer with kernels of our own, against transformers' layer."""

import pytest
import tiny
import torch

from engine.layers import run_layer
from engine.packing import Paths, pack
from engine.prompt_layer import KINDS, run_prompt_layer

PROMPTS = [tiny.random_prompt(1, 30) + tiny.random_prompt(k, 5 + k) for k in range(6)]


def one_pass(live, engine, device, dtype):
    """What a layer is given for PROMPTS, packed: module, hidden states, paths, rotary factors, positions."""
    packed = pack(PROMPTS)
    positions = torch.from_numpy(packed.positions)[None].to(device)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(
        1, len(packed.ids), live.config.hidden_size, generator=generator, device=device, dtype=dtype
    )
    rotary = live.backbone.rotary_emb(hidden, positions)
    window = engine.windows[live.attention_kinds()[0]]
    return live.layers[0].module, hidden, Paths(packed, 0, window, device), rotary, positions, None


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_without_a_gpu_it_is_the_layer_of_transformers(tiny_pair, family):
    live = tiny_pair(family).live()
    given = one_pass(live, tiny_pair(family).engine(live), torch.device("cpu"), torch.float32)
    assert torch.equal(run_prompt_layer(*given), run_layer(*given))


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_layer_is_as_exact_as_that_of_transformers(tiny_pair, family, dtype):
    """Against the layer in float64: no further from it than transformers' own by more than a tenth."""
    device = torch.device("cuda", 0)
    live = tiny_pair(family).live(dtype=dtype)
    live.model.to(device)
    engine = tiny_pair(family).engine(live)
    module, hidden, paths, rotary, positions, cache = given = one_pass(live, engine, device, dtype)
    assert type(module) in KINDS
    ours, theirs = run_prompt_layer(*given), run_layer(*given)
    exact = run_layer(
        module.double(), hidden.double(), paths, tuple(t.double() for t in rotary), positions, cache
    )
    error = [(t.double() - exact).square().mean().sqrt() for t in (ours, theirs)]
    assert error[0] <= 1.1 * error[1] + 1e-7
    assert not torch.equal(ours, hidden)
