"""How a decoder layer is handed its cache, before and after transformers renamed it."""

import pytest
import torch

from engine.layers import Attenuated, cache_keyword, run_layer


class Older(torch.nn.Module):
    def forward(self, hidden, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        return hidden if past_key_values is None else past_key_values + hidden


class Newer(torch.nn.Module):
    def forward(self, hidden, attention_mask=None, cache=None, use_cache=False, **kwargs):
        assert "past_key_values" not in kwargs
        return (hidden if cache is None else cache + hidden,)


@pytest.mark.parametrize("kind, keyword", [(Older, "past_key_values"), (Newer, "cache")])
def test_a_layer_gets_its_cache_by_the_name_it_knows(kind, keyword):
    layer, hidden, cache = kind(), torch.ones(1, 2), torch.full((1, 2), 3.0)
    assert cache_keyword(layer) == keyword
    assert run_layer(layer, hidden, None, None, None, cache).tolist() == [[4.0, 4.0]]
    assert run_layer(Attenuated(layer, 0.5), hidden, None, None, None, cache).tolist() == [[2.5, 2.5]]
    assert run_layer(layer, hidden, None, None, None, None).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("kind", [Older, Newer])
def test_a_compiled_layer_does_as_the_plain_one(kind):
    layer, hidden = kind(), torch.ones(1, 2)
    cache_keyword(layer)
    torch._dynamo.reset()
    compiled = torch.compile(run_layer, backend="eager", fullgraph=True)
    assert compiled(layer, hidden, None, None, None, hidden).tolist() == [[2.0, 2.0]]
