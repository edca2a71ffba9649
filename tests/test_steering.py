"""Vectors added in the engine's loop against transformers' own generate() and forward() with hooks."""

import numpy as np
import pytest
import tiny
import torch

from engine.generation import Engine, Request
from suites.steering import Push, Steering, answers_after, rounded, single_layers, token_span

PROMPTS = [tiny.random_prompt(k, n) for k, n in enumerate((9, 14, 9, 21))]
VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(5)) * 3
# None at all; a single layer from some token on, also while generating; two layers; part of the prompt only.
PUSHES = [
    (),
    (Push(2, 0, 1.0, 7),),
    (Push(1, 1, 0.5, 0), Push(4, 2, -1.0, 12)),
    (Push(3, 2, 2.0, 5, 11), Push(3, 0, 1.0, 15, 19)),
]


def hooked(model, pushes):
    """Handles of forward hooks that add a row's pushes at absolute token positions; a pass begins after what
    the cache holds."""

    def hook(push):
        def add(module, args, kwargs, out):
            at = kwargs["position_ids"][0]
            out = out.clone()
            for k, position in enumerate(at.tolist()):
                if push.start <= position < push.stop:
                    out[0, k] += push.strength * VECTORS[push.vector]
            return out

        return add

    return [model.model.layers[p.layer].register_forward_hook(hook(p), with_kwargs=True) for p in pushes]


@torch.no_grad()
def by_transformers(model, prompt, pushes, budget):
    """generate(), greedy, a row at a time."""
    handles = hooked(model, pushes)
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=budget,
        do_sample=False,
        eos_token_id=[1, 3],
        pad_token_id=0,
    )
    for handle in handles:
        handle.remove()
    return [t for t in out[0, len(prompt) :].tolist() if t not in (1, 3)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_generation_with_vectors_added_equals_generate_with_hooks(tiny_pair, family):
    """Rows of one batch with pushes of their own, budgets that end at different steps: rows leave on the
    way."""
    pair = tiny_pair(family)
    engine, model = pair.engine(), pair.rebuilt([("instruct", k) for k in range(6)])
    engine.max_batch = 5  # the eight requests take two batches
    requests = [Request(f"q{k}", PROMPTS[k % 4], 4 + 5 * (k // 4) + k % 3) for k in range(8)]
    steering = Steering(VECTORS, [PUSHES[k % 4] for k in range(8)])
    got = engine.complete(requests, layer=steering)
    for k, (request, completion) in enumerate(zip(requests, got, strict=True)):
        want = by_transformers(model, request.prompt_ids, PUSHES[k % 4], request.max_new_tokens)
        assert list(completion.token_ids) == want, k
    plain = engine.complete(requests)
    assert plain[0].token_ids == got[0].token_ids and plain[4].token_ids == got[4].token_ids
    assert sum(plain[k].token_ids != got[k].token_ids for k in (1, 2, 3, 5, 6, 7)) >= 4


def test_requests_of_one_prompt_are_steered_apart(tiny_pair):
    """Samples of one prompt share their prefill, but for pushes of their own."""
    engine = tiny_pair("llama").engine()
    same = [Request("q", PROMPTS[1], 8)] * 3
    steering = Steering(VECTORS, [(), PUSHES[1], ()])
    none, pushed, again = engine.complete(same, layer=steering)
    assert none == again == engine.complete(same)[0] and pushed.token_ids != none.token_ids


def test_a_batch_halved_for_memory_keeps_each_rows_pushes(tiny_pair, monkeypatch):
    pair = tiny_pair("llama")
    requests = [Request(f"q{k}", PROMPTS[k % 4], 6) for k in range(8)]
    steering = Steering(VECTORS, [PUSHES[k % 4] for k in range(8)])
    want = pair.engine().complete(requests, layer=steering)
    real = Engine._complete_batch

    def full(self, batch, *args):
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, *args)

    monkeypatch.setattr(Engine, "_complete_batch", full)
    assert pair.engine().complete(requests, layer=steering) == want


def test_a_first_turn_with_vectors_added_equals_hooks_and_a_second_forward(tiny_pair):
    pair = tiny_pair("gemma3")
    engine, model = pair.engine(), pair.rebuilt([("instruct", k) for k in range(6)])
    first, follows = tiny.random_prompt(3, 17), [tiny.random_prompt(4, 5), tiny.random_prompt(5, 3)]
    rows = [PUSHES[k % 4] for k in range(19)]  # more than are asked at once
    read = answers_after(
        engine, first, follows, len(rows), lambda row, logprobs: (row, logprobs), Steering(VECTORS, rows)
    )
    for k, (row, logprobs) in enumerate(read):
        assert row == k
        for follow, got in zip(follows, logprobs, strict=True):
            handles = hooked(model, rows[k])
            with torch.no_grad():
                cache = model(torch.tensor([first]), use_cache=True).past_key_values
                for handle in handles:
                    handle.remove()
                logits = model(torch.tensor([follow]), past_key_values=cache, use_cache=True).logits[0, -1]
            np.testing.assert_allclose(got, logits.log_softmax(-1), atol=2e-4, rtol=1e-4)
    assert np.abs(read[0][1] - read[1][1]).max() > 0.01


def test_a_direction_that_is_not_a_number_stays_in_its_row(tiny_pair):
    engine = tiny_pair("llama").engine()
    broken = torch.full((1, 32), float("nan"))
    rows = [(Push(2, 0, 1.0, 6),), ()]
    hidden = engine.prefill([PROMPTS[0]] * 2, layer=Steering(broken, rows)([0, 1]))
    clean = engine.prefill([PROMPTS[0]] * 2)
    assert hidden[0, 6:].isnan().all() and torch.equal(hidden[1], clean[1])


def test_depths_are_layers_of_the_model_at_hand():
    assert single_layers((0.25, 0.5, 0.59, 0.64, 0.69), 64) == {
        16: 0.25,
        32: 0.5,
        38: 0.59,
        41: 0.64,
        44: 0.69,
    }
    assert list(single_layers((0.59, 0.64, 0.69), 28)) == [17, 18, 19]
    assert single_layers((0.59, 0.64, 0.69), 6) == {4: 0.59}
    assert single_layers((0.0, 1.0), 2) == {0: 0.0, 1: 1.0}


def test_token_spans_by_offsets():
    made = tiny.tokenizer()
    text = made.apply_chat_template([{"role": "user", "content": "Hé. So. Hé."}], tokenize=False)
    ids = made(text, add_special_tokens=False)["input_ids"]
    a, b = token_span(made, text, "Hé.")
    assert made.decode(ids[a:b]) == "Hé."
    c, d = token_span(made, text, "Hé.", text.index("So."))
    assert c > b and made.decode(ids[c:d]) == "Hé."
    with pytest.raises(ValueError):
        token_span(made, text, "nowhere")
    made_slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(ValueError, match="offsets"):
        token_span(made_slow, text, "So.")


def test_rounded_holds_no_nan():
    assert rounded(np.array([[1.23456, np.nan], [np.inf, 2.0]])) == [[1.2346, None], [None, 2.0]]
