"""Packed prompts: the same numbers as each prompt by itself, and no token computed twice."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moves import BRANCHES

from engine import prompt_layer, reading
from engine.attention import Placed
from engine.generation import Engine, Request
from engine.packing import pack, packed_batches
from errors import FrankenError
from prompts import BINARY_PROBES
from runner.pairs import open_pair
from suites import injection
from suites.injection import changing
from suites.steering import answers_after
from surgery import recipes as r

STEM = tiny.random_prompt(1, 30)
PROMPTS = [
    STEM + tiny.random_prompt(2, 7),
    STEM,
    tiny.random_prompt(3, 12),
    STEM[:9] + tiny.random_prompt(4, 20),
    STEM,
    (5,),
]
FAMILIES = ["qwen2", "llama", "mistral", "gemma3", "qwen3"]


def prefixes(sequences):
    """Every different beginning: what has to be computed at least."""
    return {s[:k] for s in sequences for k in range(1, len(s) + 1)}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in tiny.FAMILIES])
def test_packed_prompts_give_what_each_gives_alone(tiny_pair, family):
    live = tiny_pair(family).live()
    plain, packed = (tiny_pair(family).engine(live, packed=on) for on in (False, True))
    alone = torch.cat([plain.next_token_logprobs([p]) for p in PROMPTS])
    torch.testing.assert_close(packed.next_token_logprobs(PROMPTS), alone, atol=5e-5, rtol=0)
    assert packed.timing.prefill_tokens == len(prefixes(PROMPTS))
    pairs = [(p[:1], p[1:]) for p in PROMPTS if len(p) > 1]
    for a, b in zip(packed.loglikelihood(pairs), plain.loglikelihood(pairs), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in tiny.FAMILIES])
def test_packed_prompts_go_on_after_full_caches(tiny_pair, family):
    live = tiny_pair(family).live()
    plain, packed = (tiny_pair(family).engine(live, packed=on) for on in (False, True))
    stems = [tiny.random_prompt(k, 18) for k in range(3)]
    caches = plain.empty_caches(3, 18)
    plain.prefill(stems, caches)
    follows, rows = [*PROMPTS, *PROMPTS[:2]], [0, 1, 2, 0, 1, 2, 0, 2]
    want = plain.next_token_logprobs([stems[row] + f for row, f in zip(rows, follows, strict=True)])
    got = packed.next_token_logprobs(follows, caches, rows)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=0)


def test_a_broken_token_reaches_no_other_prompt(tiny_pair):
    live = tiny_pair("qwen2").live()
    engine = tiny_pair("qwen2").engine(live, packed=True)
    live.model.get_input_embeddings().weight[0] = float("nan")
    asked = [STEM, (*STEM, 0), (*STEM, 4, 0, 4), (*STEM, 4)]
    assert engine.next_token_logprobs(asked).isfinite().all(-1).tolist() == [True, False, False, True]


def test_replies_on_the_fast_path_are_those_of_padded_prompts(tiny_pair):
    live = tiny_pair("qwen2").live()
    requests = [
        Request(f"q{k}", p, 9, temperature, sample=k % 2)
        for k, (p, temperature) in enumerate([(p, t) for p in PROMPTS for t in (0.0, 0.8)])
    ]
    replies = [
        tiny_pair("qwen2").engine(live, fast=True, packed=on).complete(requests) for on in (False, True)
    ]
    assert replies[0] == replies[1]


def test_layers_below_a_change_are_not_computed_again(tiny_pair):
    live = tiny_pair("llama").live()
    engine = tiny_pair("llama").engine(live, packed=True)
    for p in (1, 3, 2):
        live.apply(r.splice(live.original, "base", p, p + 1))
        fresh = tiny_pair("llama").engine(live, packed=True)
        assert torch.equal(engine.next_token_logprobs(PROMPTS), fresh.next_token_logprobs(PROMPTS))


def test_what_rows_have_in_common_is_computed_for_one_of_them(tiny_pair, monkeypatch):
    """Two first turns, changed from position 2 on; the questions below it need one row's work."""
    live = tiny_pair("qwen2").live()
    plain, packed = (tiny_pair("qwen2").engine(live, packed=on) for on in (False, True))
    first, follows = tiny.random_prompt(1, 12), [tiny.random_prompt(k, 5 + k) for k in range(4)]

    def changed(rows):
        return changing(lambda p, hidden: hidden + (0.3 * torch.tensor(rows)[:, None, None] if p >= 2 else 0))

    def ask(engine, common=None):
        return injection.answers(engine, first, follows, 3, lambda rows: None, common=common)

    monkeypatch.setattr(injection, "changing", lambda _: None)
    monkeypatch.setattr(injection, "answers_after", lambda *args: answers_after(*args[:5], changed, args[6]))
    want, runs, real = ask(plain), [], prompt_layer.run_layer
    monkeypatch.setattr(prompt_layer, "run_layer", lambda *a: (runs.append(a[1].shape[1]), real(*a))[1])
    common = reading.CommonStates(3)
    for got, row in zip(ask(packed, common), want, strict=True):
        np.testing.assert_allclose(got, row, atol=5e-5)
    depth, tokens = len(live.order), sum(map(len, follows))
    assert sum(runs) == 3 * tokens + (depth - 3) * 3 * tokens
    runs.clear()
    for got, row in zip(ask(packed, common), want, strict=True):  # with what is kept
        np.testing.assert_allclose(got, row, atol=5e-5)
    assert sum(runs) == (depth - 3) * 3 * tokens
    assert np.abs(want[0] - want[1]).max() > 0.01


def test_a_pass_that_does_not_fit_is_halved(tiny_pair, monkeypatch):
    engine = tiny_pair("llama").engine(packed=True)
    want, real = engine.next_token_logprobs(BRANCHES), Engine.prefill_packed

    def tight(self, packed, *args):
        if len(packed.paths) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, packed, *args)

    monkeypatch.setattr(Engine, "prefill_packed", tight)
    torch.testing.assert_close(engine.next_token_logprobs(BRANCHES), want, atol=3e-5, rtol=0)
    assert engine.timing.out_of_memory >= 1


TOKENS = st.lists(st.integers(1, 3), min_size=1, max_size=9).map(tuple)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(TOKENS, st.integers(0, 2)), min_size=1, max_size=12), st.integers(0, 5))
def test_paths_spell_their_prompts(prompts, start):
    sequences, rows = [s for s, _ in prompts], [row for _, row in prompts]
    packed = pack(sequences, rows, start)
    for sequence, path in zip(sequences, packed.paths, strict=True):
        assert tuple(packed.ids[path]) == sequence
        assert packed.positions[path].tolist() == list(range(start, start + len(sequence)))
    assert len(packed.ids) == len({(row, p) for s, row in prompts for p in prefixes([s])})
    assert sum(new for _, new in packed.segments) == len(packed.ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TOKENS, st.integers(0, 2)), min_size=1, max_size=12), st.integers(1, 20))
def test_batches_hold_every_prompt_and_no_more_tokens_than_allowed(prompts, most):
    sequences, rows = [s for s, _ in prompts], [row for _, row in prompts]
    batches = packed_batches(sequences, rows, most)
    assert sorted(i for batch in batches for i in batch) == list(range(len(prompts)))
    for batch in batches:
        computed = len(pack([sequences[i] for i in batch], [rows[i] for i in batch]).ids)
        assert computed <= max(most, max(len(sequences[i]) for i in batch))


@pytest.mark.parametrize("rows_of_the_pass", [1, 2])
def test_tokens_go_to_their_places_in_caches_and_in_a_pool(rows_of_the_pass):
    torch.manual_seed(0)
    key, value = torch.randn(2, rows_of_the_pass, 2, 6, 4).unbind()  # [rows, G, tokens, D]
    source, rows, positions = (torch.tensor(where) for where in ([5, 0, 2, 5], [1, 1, 0, 2], [3, 0, 1, 3]))
    if rows_of_the_pass > 1:
        source = source + torch.tensor([6, 0, 6, 0])
    caches, pool = torch.zeros(2, 3, 2, 5, 4), torch.zeros(2, 15, 2, 4)
    in_rows = Placed(*caches, source, (rows, slice(None), positions))
    in_slots = Placed(*pool, source, (5 * rows + positions,))
    for placed in (in_rows, in_slots):
        assert placed.update(key, value, 0) == (key, value)
    want = torch.zeros(2, 3, 2, 5, 4)
    for token, row, position in zip(source.tolist(), rows.tolist(), positions.tolist(), strict=True):
        for kept, new in ((want[0], key), (want[1], value)):
            kept[row, :, position] = new[token // 6, :, token % 6]
    assert torch.equal(caches, want)
    assert torch.equal(pool.view(2, 3, 5, 2, 4).transpose(2, 3), want)


@pytest.mark.real
def test_real_questions_are_answered_alike_packed(smollm2):
    from evaluate import SUITES
    from runner.pairs import open_pair
    from suites.base import Protocol

    opened = open_pair(None, instruct=str(smollm2), device_map="cpu", dtype="float32")
    plain, packed = (
        Engine(opened.live, opened.tokenizer, opened.stop_ids, packed=on) for on in (False, True)
    )
    asked = [
        plain.chat_ids([{"role": "user", "content": text}])
        for text in SUITES["binary"]().work(Protocol()).texts[:12]
    ]
    torch.testing.assert_close(
        packed.next_token_logprobs(asked), plain.next_token_logprobs(asked), atol=2e-3, rtol=0
    )
    assert packed.timing.prefill_tokens < plain.timing.prefill_tokens


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_prompt_is_refused(tiny_pair, packed):
    engine = tiny_pair("llama").engine(packed=packed)
    with pytest.raises(FrankenError, match="at least one token"):
        engine.next_token_logprobs([STEM, ()])


def test_prompts_are_packed_without_a_gpu_where_that_is_possible(tiny_pair):
    live = tiny_pair("llama").live()
    assert tiny_pair("llama").engine(live).packed
    assert not tiny_pair("llama").engine(live, deterministic=True).packed


@pytest.mark.real
def test_a_real_model_answers_packed_as_it_does_padded(smollm2):
    opened = open_pair("smollm2-135m", dtype="float32")
    plain, packed = (
        Engine(opened.live, opened.tokenizer, opened.stop_ids, packed=on) for on in (False, True)
    )
    asked = [plain.chat_ids([{"role": "user", "content": p.text}]) for p in BINARY_PROBES[:12]]
    got, want = (engine.next_token_logprobs(asked) for engine in (packed, plain))
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
    assert packed.timing.prefill_tokens < plain.timing.prefill_tokens
