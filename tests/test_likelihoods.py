"""Next-token distributions and likelihoods of the engine, against transformers' own logits."""

import numpy as np
import pytest
import tiny
import torch
from moves import SHORT as PROMPTS
from moves import instruct

from engine import reading
from engine.generation import Request
from surgery import recipes as r


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logprobs_equal_transformers(tiny_pair, family):
    pair = tiny_pair(family)
    live = pair.live()
    engine = pair.engine(live)
    live.apply(r.repeat(r.swap(live.original, 0, 1), 0, 3))
    rebuilt = pair.rebuilt(instruct(1, 0, 2, 1, 0, 2, 3, 4, 5))
    got = engine.next_token_logprobs(PROMPTS)
    assert got.dtype == torch.float32 and got.shape == (len(PROMPTS), tiny.VOCAB)
    for prompt, row in zip(PROMPTS, got, strict=True):
        torch.testing.assert_close(
            row, tiny.hf_logits(rebuilt, prompt)[-1].log_softmax(-1), atol=3e-4, rtol=1e-4
        )
    pairs = [(p[:k], p[k:]) for p in PROMPTS if len(p) > 2 for k in (1, len(p) - 1)]
    for (prefix, target), found in zip(pairs, engine.loglikelihood(pairs), strict=True):
        logp = tiny.hf_logits(rebuilt, prefix + target).log_softmax(-1)
        want = [float(logp[len(prefix) + k - 1, t]) for k, t in enumerate(target)]
        assert found.dtype == np.float32 and found.shape == (len(target),)
        np.testing.assert_allclose(found, want, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_likelihoods_from_parts_of_the_vocabulary(tiny_pair, monkeypatch, family):
    """On a CPU few rows of the head at once; Gemma 2 bends its logits."""
    engine = tiny_pair(family).engine()
    pairs = [(p[:2], p[2:]) for p in PROMPTS]
    whole = [
        engine.logits(engine.prefill([a + b])[0])
        .log_softmax(-1)[len(a) - 1 : -1]
        .gather(1, torch.tensor([b]).T)
        for a, b in pairs
    ]
    monkeypatch.setattr(reading, "VOCABULARY_ON_CPU", 7)
    monkeypatch.setattr(reading, "TOKENS_ON_CPU", 5)
    for got, want in zip(engine.loglikelihood(pairs), whole, strict=True):
        np.testing.assert_allclose(got, want[:, 0], atol=1e-5)


def test_likelihoods_longer_than_one_block_and_of_nothing(tiny_pair):
    engine = tiny_pair("llama").engine()
    text = tiny.random_prompt(3, 400)
    whole = engine.loglikelihood([(text[:1], text[1:])])[0]
    assert whole.shape == (399,)
    np.testing.assert_allclose(engine.loglikelihood([(text[:200], text[200:])])[0], whole[199:], atol=1e-4)
    assert engine.loglikelihood([(text[:3], ())])[0].shape == (0,)
    assert engine.next_token_logprobs([]).shape == (0, tiny.VOCAB)
    with pytest.raises(ValueError, match="context"):
        engine.loglikelihood([((), (1, 2))])


def test_bf16_logits_are_computed_in_float32(tmp_path):
    """The readout: hidden states of the bf16 model times the output rows, without rounding the products."""
    pair = tiny.Tiny(tmp_path, "qwen2", names=("instruct",))
    live = pair.live(dtype=torch.bfloat16)
    engine = pair.engine(live)
    prompts = [tiny.random_prompt(k, 9) for k in range(60)]
    logits = []
    head = live.model.lm_head.weight
    # twins one bf16 step apart in one weight: once rounded, their logits are mostly equal
    head[1::2] = head[::2]
    head[1::2, 0] *= 1 + 2**-7
    for prompt in prompts:
        hidden = live.backbone.norm(engine.prefill([prompt])[0, -1])
        logits.append(head.double() @ hidden.double())
        torch.testing.assert_close(
            engine.next_token_logprobs([prompt])[0].double(), logits[-1].log_softmax(-1), atol=1e-5, rtol=0
        )
    engine.stop_ids = []
    assert sum(len(set(row.bfloat16().topk(2).values.tolist())) == 1 for row in logits) > 20
    # greedy too, though the decode step's products are rounded
    for prompt, row in zip(prompts, logits, strict=True):
        assert row[engine.complete([Request("k", prompt, 1)])[0].token_ids[0]] == row.max()
