"""Generation against transformers recomputing everything from scratch, alone against in a batch, and what
goes wrong."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from moves import BRANCHES, MOVES, STARTS
from moves import SHORT as PROMPTS

from engine import generation
from engine.chat_template import find_stop_ids
from engine.generation import Completion, Engine, Request
from engine.layers import spread_linear
from errors import FrankenError
from runner.pairs import open_pair
from surgery import recipes as r
from surgery.weights import Checkpoint


def greedy(prompts, budget=14):
    return [Request(f"q{k}", p, budget) for k, p in enumerate(prompts)]


def sampled(prompts, budget=14, **kwargs):
    return [
        Request(f"q{k}", p, budget, **({"temperature": 1.0, "top_p": 0.9, "seed": 1} | kwargs))
        for k, p in enumerate(prompts)
    ]


# ---- the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cached_generation_equals_recomputing_after_every_surgery(tiny_pair, family):
    """Greedy tokens from a batch of unequal prompts, each against the argmax of a rebuilt model without a
    cache."""
    pair = tiny_pair(family)
    live = pair.live()
    engine, prompts = pair.engine(live), PROMPTS[:3]
    for name, (operation, layers) in MOVES.items():
        live.apply(operation(live.original))
        rebuilt = pair.rebuilt(layers)
        for prompt, got in zip(prompts, engine.complete(greedy(prompts, 9)), strict=True):
            best = tiny.hf_logits(rebuilt, prompt + got.token_ids)[len(prompt) - 1 :].argmax(-1).tolist()
            assert best[: len(got.token_ids)] == list(got.token_ids), (name, prompt)
            assert best[len(got.token_ids)] in engine.stop_ids if got.stopped else len(got.token_ids) == 9, (
                name,
                prompt,
            )


def test_cached_generation_after_edits_of_weights(tiny_pair):
    """The same, and truly from scratch: the oracle runs the whole sequence again for every token."""
    pair = tiny_pair("gemma3")
    live = pair.live()
    engine = pair.engine(live)
    for edit in (
        lambda x: r.perturb(x, 0.2, 1),
        lambda x: r.permute_units(x, 1),
        lambda x: r.blend(x, "base", r.linear),
    ):
        recipe = r.double(edit(live.original), 2, 4)
        live.apply(recipe)
        layers = [({k: t.clone() for k, t in b.tensors.items()}, b.held.mix[0][0].layer) for b in live.layers]
        rebuilt = pair.rebuilt(layers)
        for prompt, got in zip(PROMPTS[:2], engine.complete(greedy(PROMPTS[:2])), strict=True):
            assert (list(got.token_ids), got.stopped) == tiny.hf_greedy(rebuilt, prompt, 14)


# ---- alone and in company ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_same_alone_and_in_any_batch(tiny_pair, family):
    engine = tiny_pair(family).engine()
    alone = torch.cat([engine.next_token_logprobs([p]) for p in PROMPTS])
    together = engine.next_token_logprobs(PROMPTS)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert torch.equal(engine.next_token_logprobs(PROMPTS[::-1]).flip(0), together)
    requests = greedy(PROMPTS) + sampled(PROMPTS)
    one_by_one = [engine.complete([q])[0] for q in requests]
    assert engine.complete(requests) == one_by_one
    assert engine.complete(requests[::-1])[::-1] == one_by_one
    engine.max_batch = 5
    assert engine.complete(requests) == one_by_one


def test_streams_belong_to_the_question_and_the_sample(tiny_pair):
    engine = tiny_pair("qwen2").engine()
    prompt = PROMPTS[1]
    base = Request("k", prompt, 20, temperature=1.0, top_p=0.95, sample=0, seed=0)
    variants = [
        base,
        *(dataclasses.replace(base, **change) for change in ({"sample": 1}, {"seed": 1}, {"key": "other"})),
    ]
    texts = [c.token_ids for c in engine.complete(variants)]
    assert len(set(texts)) == len(texts)
    assert (
        engine.complete([base, base])[0]
        == engine.complete([base])[0]
        == engine.complete([*sampled(PROMPTS), base])[-1]
    )
    longer = engine.complete([dataclasses.replace(base, max_new_tokens=40)])[0]
    assert longer.token_ids[:20] == texts[0]  # a larger budget only continues
    assert np.array_equal(dataclasses.replace(base, max_new_tokens=40).uniforms()[:20], base.uniforms())
    u = dataclasses.replace(base, max_new_tokens=20000).uniforms()
    assert u.dtype == np.float32
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01


def test_temperatures_and_nuclei_do_not_leak_between_rows(tiny_pair):
    engine = tiny_pair("qwen2").engine()
    prompt = PROMPTS[2]
    settings_ = [(0.0, 1.0), (0.3, 1.0), (1.5, 1.0), (1.0, 0.1), (1.0, 0.7), (2.0, 0.999)]
    requests = [Request("k", prompt, 12, temperature=t, top_p=p) for t, p in settings_]
    assert engine.complete(requests) == [engine.complete([q])[0] for q in requests]
    assert (
        engine.complete([Request("k", prompt, 12, temperature=1.0, top_p=1e-9)])[0]
        == engine.complete([Request("k", prompt, 12)])[0]
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_few_rows_are_spread_over_threads(tiny_pair, family, monkeypatch):
    """Each thread multiplies rows of the weight of its own (Qwen2 adds a bias); what comes out is what one
    thread gives, and the model's own layers are as they were afterwards."""
    engine, spread = tiny_pair(family).engine(), []
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *given: spread.append(given) or real(*given))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = engine.complete(greedy(PROMPTS) + sampled(PROMPTS))
        assert not spread
        torch.set_num_threads(2)
        assert engine.complete(greedy(PROMPTS) + sampled(PROMPTS)) == alone
        layers = len(engine.live.order) * 7
        assert len(spread) > layers
        for rows in (2, 8, 32):
            x, linear = torch.randn(rows, 1, 24), torch.nn.Linear(24, 10)
            torch.testing.assert_close(spread_linear(x, linear.weight, linear.bias), linear(x))
    finally:
        torch.set_num_threads(before)
    assert not [m for m in engine.live.model.modules() if type(m) is torch.nn.Linear and "forward" in vars(m)]


def test_finished_rows_wait_without_harm(tiny_pair):
    """One long prompt with a budget of 1 among short ones with large budgets: its row outlives its part of
    the cache."""
    engine = tiny_pair("qwen2").engine()
    engine.stop_ids = []
    requests = [Request("a", tiny.random_prompt(0, 50), 1)] + [
        Request(f"b{k}", tiny.random_prompt(k, 5), 40) for k in range(7)
    ]
    got = engine.complete(requests)
    assert [len(c.token_ids) for c in got] == [1] + [40] * 7
    assert got == [engine.complete([q])[0] for q in requests]


def test_rows_leave_the_batch_as_they_finish(tiny_pair, monkeypatch):
    engine = tiny_pair("llama").engine()
    engine.stop_ids = []
    requests = [
        Request(f"q{k}", tiny.random_prompt(k, 4 + k % 3), 3 * k + 2, temperature=k % 2) for k in range(9)
    ]
    want = [engine.complete([q])[0] for q in requests]
    sizes = []
    real = Engine._decode_step

    def step(self, state, caches, layer=None):
        sizes.append(len(state.rows))
        return real(self, state, caches, layer)

    monkeypatch.setattr(Engine, "_decode_step", step)
    assert engine.complete(requests) == want
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 9
    assert sizes[-1] == 1
    assert len(sizes) == 25  # the longest budget, less the token that comes from the prefill
    for used, size in zip(range(2, 27), sizes, strict=True):
        unfinished = sum(q.max_new_tokens >= used for q in requests)
        assert unfinished <= size < max(unfinished / 0.75, unfinished + 1)


def test_samples_of_one_prompt_share_its_prefill(tiny_pair):
    engine = tiny_pair("llama").engine()
    requests = [Request("k", PROMPTS[1], 5, temperature=1.0, sample=s) for s in range(8)]
    engine.timing.prefill_tokens = 0
    together = engine.complete(requests)
    assert engine.timing.prefill_tokens == len(PROMPTS[1])
    assert together == [engine.complete([q])[0] for q in requests] and len(set(together)) > 1


# ---- stopping and reporting --------------------------------------------------------------------------------


def test_stop_tokens_end_a_turn_and_are_not_part_of_it(tiny_pair):
    pair = tiny_pair("qwen2")
    plain = pair.engine()
    plain.stop_ids = []
    prompt = PROMPTS[4]
    free = plain.complete([Request("k", prompt, 12)])[0]
    assert len(free.token_ids) == 12 and not free.stopped
    stop = free.token_ids[5]
    first = free.token_ids.index(stop)
    engine = pair.engine(stop_ids=[stop])
    assert {1, 3, stop} == set(engine.stop_ids)  # the tokenizer's own end tokens as well
    got = engine.complete([Request("k", prompt, 12)])[0]
    assert got == Completion(
        engine.tokenizer.decode(free.token_ids[:first], skip_special_tokens=True),
        free.token_ids[:first],
        True,
    )
    cut = engine.complete([Request("k", prompt, first)])[0]
    assert not cut.stopped and cut.token_ids == free.token_ids[:first]


def test_text_has_no_special_tokens(tiny_pair):
    engine = tiny_pair("llama").engine()
    assert engine.completion([2, *engine.text_ids("hé"), 0], True, True).text == "hé"


def test_callbacks_and_progress(tiny_pair):
    engine = tiny_pair("llama").engine(max_batch=2)
    done, counts = {}, []
    requests = greedy(PROMPTS)
    result = engine.complete(requests, on_progress=counts.append, on_done=lambda i, c: done.setdefault(i, c))
    assert [done[i] for i in range(len(requests))] == result
    assert counts == [2, 2, 2]
    assert engine.complete([]) == []


def test_stop_ids_of_tokenizers():
    made = tiny.tokenizer()
    assert find_stop_ids(made) == {1, 3}
    made.eos_token = None
    assert find_stop_ids(made) == {1, 3}


def test_chat_and_text_ids(tiny_pair):
    engine = tiny_pair("llama").engine()
    ids = engine.chat_ids([{"role": "user", "content": "Hi"}])
    assert engine.tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == 2 and ids.count(2) == 2 and 3 in ids  # special tokens, not their spelling
    assert engine.tokenizer.decode(engine.text_ids("Hi there")) == "Hi there"


# ---- broken models and full memory -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_model_is_a_result(tiny_pair, value, temperature):
    pair = tiny_pair("qwen2")
    live = pair.live()
    engine = pair.engine(live)
    live.layers[3].tensors["mlp.down_proj.weight"].fill_(value)
    requests = [dataclasses.replace(q, temperature=temperature, top_p=0.9) for q in greedy(PROMPTS)]
    for completion in engine.complete(requests):
        assert not completion.finite
        assert isinstance(completion.text, str)
        assert len(completion.token_ids) <= 14
    assert not engine.next_token_logprobs(PROMPTS).isfinite().any()
    assert not np.isfinite(engine.loglikelihood([(PROMPTS[1][:3], PROMPTS[1][3:])])[0]).any()
    live.layers[3].held = None  # as after a failed write: unknown, so the next apply reads it again
    live.apply(live.original)
    assert all(c.finite for c in engine.complete(greedy(PROMPTS)))


def test_a_broken_row_does_not_spread(tiny_pair):
    """One token's embedding is NaN: only prompts that hold it are lost, also beside longer rows (padding)."""
    live = tiny_pair("qwen2").live()
    engine = tiny_pair("qwen2").engine(live)
    good, bad = PROMPTS[0], (*PROMPTS[1], 0)
    long = tiny.random_prompt(9, 40)
    want = engine.complete(greedy([good, bad, long], 6))
    assert all(c.finite for c in want)
    live.model.get_input_embeddings().weight[0] = float("nan")
    got = engine.complete(greedy([good, bad, long], 6))
    clean = [k for k in (0, 2) if 0 not in want[k].token_ids]
    assert clean and [got[k] for k in clean] == [want[k] for k in clean]
    assert not got[1].finite
    assert engine.next_token_logprobs([good, bad, long]).isfinite().all(-1).tolist() == [True, False, True]
    group = [STARTS[1] + good, STARTS[1] + bad, STARTS[1] + long]
    engine.timing.prefill_tokens = 0
    assert engine.next_token_logprobs(group).isfinite().all(-1).tolist() == [True, False, True]
    # the prefix once for all three
    assert engine.timing.prefill_tokens == sum(map(len, group)) - 2 * len(STARTS[1])
    assert not engine.next_token_logprobs([bad + STARTS[1] + p for p in PROMPTS]).isfinite().any()


def out_of_memory_above(rows):
    """A replacement for a method that fails while more than `rows` rows are asked for, and then calls the
    real one."""

    def wrap(real):
        def method(self, batch, *args, **kwargs):
            if len(getattr(batch, "paths", batch)) > rows:  # of packed prompts, how many they are
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(self, batch, *args, **kwargs)

        return method

    return wrap


@pytest.mark.parametrize("where", ["_complete_batch", "prefill", "prefill_packed"])
def test_a_batch_is_halved_until_it_fits(tiny_pair, monkeypatch, where):
    engine = tiny_pair("llama").engine(packed=where != "prefill")
    requests = greedy(PROMPTS) + sampled(PROMPTS)
    pairs = [(p[:1], p[1:]) for p in PROMPTS if len(p) > 1]
    want = engine.complete(requests), engine.next_token_logprobs(BRANCHES), engine.loglikelihood(pairs)
    engine.alone = False  # as on a GPU, where a batch's prompts are read together
    monkeypatch.setattr(Engine, where, out_of_memory_above(2)(getattr(Engine, where)))
    done = []
    assert engine.complete(requests, on_done=lambda i, c: done.append(i)) == want[0]
    assert sorted(done) == list(range(len(requests)))  # each reported once, in spite of the second attempts
    assert engine.max_batch <= 3 and engine.timing.out_of_memory >= 1
    torch.testing.assert_close(engine.next_token_logprobs(BRANCHES), want[1], atol=3e-5, rtol=0)
    for a, b in zip(engine.loglikelihood(pairs), want[2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_one_row_that_does_not_fit_is_an_error(tiny_pair, monkeypatch):
    engine = tiny_pair("llama").engine(packed=False)
    monkeypatch.setattr(Engine, "prefill", out_of_memory_above(0)(Engine.prefill))
    with pytest.raises(torch.OutOfMemoryError):
        engine.complete(greedy(PROMPTS))
    with pytest.raises(torch.OutOfMemoryError):
        engine.next_token_logprobs(PROMPTS)


@pytest.mark.parametrize("prompt, budget", [((), 5), ((5, 6), 0)])
def test_requests_for_nothing_are_refused(tiny_pair, prompt, budget):
    engine = tiny_pair("llama").engine()
    with pytest.raises(FrankenError, match="at least one token"):
        engine.complete([Request("k", prompt, budget, temperature=1.0)])
    if not prompt:
        with pytest.raises(FrankenError, match="at least one token"):
            engine.next_token_logprobs([prompt])


def test_prefill_batches_are_bounded_and_complete(tiny_pair):
    engine = tiny_pair("llama").engine()
    engine.prefill_tokens = 50
    lengths = [3, 60, 12, 12, 25, 1, 49, 26]
    batches = engine.prefill_batches(lengths)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 50 for b in batches)


# ---- the real weights --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(smollm2):
    """(engine in float32, transformers' own model with eager attention) of SmolLM2-135M-Instruct."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from franken import LiveModel

    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config = AutoModelForCausalLM.from_pretrained(smollm2).config
    live = LiveModel(
        {"instruct": Checkpoint("instruct", smollm2)}, config, torch.float32, torch.device("cpu")
    )
    return Engine(live, AutoTokenizer.from_pretrained(smollm2)), theirs


QUESTIONS = [
    "What is the capital of France?",
    "Is something wrong with you right now? Answer Yes or No.",
    "Name three colors.",
]


@pytest.mark.real
@pytest.mark.timeout(120)
def test_real_generation_equals_generate(real):
    engine, theirs = real
    prompts = [engine.chat_ids([{"role": "user", "content": q}]) for q in QUESTIONS]
    got = engine.complete(greedy(prompts, 24))
    for prompt, completion in zip(prompts, got, strict=True):
        want = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, repetition_penalty=1.0
        )[0, len(prompt) :]
        want = [t for t in want.tolist() if t not in engine.stop_ids]
        assert list(completion.token_ids) == want
    assert "Paris" in got[0].text
    engine.live.apply(r.shuffle(engine.live.original, 0))
    assert engine.complete(greedy(prompts, 24)) != got
    engine.live.apply(engine.live.original)
    assert engine.complete(greedy(prompts, 24)) == got


@pytest.mark.real
def test_real_logprobs_equal_transformers(real):
    engine, theirs = real
    prompts = [engine.chat_ids([{"role": "user", "content": q}]) for q in QUESTIONS]
    for prompt, row in zip(prompts, engine.next_token_logprobs(prompts), strict=True):
        torch.testing.assert_close(row, tiny.hf_logits(theirs, prompt)[-1].log_softmax(-1), atol=2e-3, rtol=0)
    for recipe, order in (
        (r.double(engine.live.original, 10, 12), [*range(10), 10, 10, 11, 11, *range(12, 30)]),
        (r.keep_every(engine.live.original, 2), range(0, 30, 2)),
    ):
        engine.live.apply(recipe)
        state = theirs.state_dict()
        stack = {
            f"model.layers.{p}.{k}": v
            for p, i in enumerate(order)
            for k, v in tiny.layer_state(state, i).items()
        }
        rebuilt = tiny.build(engine.config, {k: v for k, v in state.items() if ".layers." not in k} | stack)
        torch.testing.assert_close(
            engine.next_token_logprobs(prompts[:1])[0],
            tiny.hf_logits(rebuilt, prompts[0])[-1].log_softmax(-1),
            atol=2e-3,
            rtol=0,
        )
    engine.live.apply(engine.live.original)


# ---- replies that no batch changes -------------------------------------------------------------------------


def many() -> list[Request]:
    """Greedy and sampled requests of many lengths and budgets, two of them of one prompt."""
    lengths = [1, 2, 5, 9, 17, 30, 31, 44, 58, 63, 64, 65, 90, 101, 120, 127, 128, 129, 140, 150]
    requests = [
        Request(f"q{n}", tiny.random_prompt(n, n), 3 + 5 * (n % 7), 0.7 * (n % 2), seed=n) for n in lengths
    ]
    return [*requests, Request("again", requests[3].prompt_ids, 12, 1.0, 0.9)]


def logits_of(engine, requests) -> dict[int, list[torch.Tensor]]:
    """By request: the hidden states of its steps, as they come from batches."""
    seen: dict[int, list[torch.Tensor]] = {}
    choose = engine.choose

    def watch(hidden, state):
        taken = set()  # the rows that fill a batch up are copies of its last one
        for place, row in enumerate(state.rows):
            k = requests.index(state.batch[row])
            if k not in taken and not state.over(row):
                seen.setdefault(k, []).append(hidden[place].clone())
            taken.add(k)
        return choose(hidden, state)

    engine.choose = watch
    engine.complete(requests)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deterministic_replies_depend_on_their_request_alone_to_the_bit(tiny_pair, dtype):
    requests = many()
    pair = tiny_pair("qwen2-alternating")

    def states(chosen, **kwargs):
        engine = Engine(pair.live(dtype=dtype), tiny.tokenizer(), deterministic=True, **kwargs)
        return logits_of(engine, chosen)

    together = states(requests)
    assert set(together) == set(range(len(requests)))
    for k in (0, 7, 12, 20):
        alone = states([requests[k]], max_batch=1)[0]
        mine = together[k][: len(alone)]
        assert all(torch.equal(a, b) for a, b in zip(alone, mine, strict=True))


def test_deterministic_replies_are_those_of_any_batch(tiny_pair):
    """In float32 nothing hangs on the last bits: the plain engine is the oracle."""
    requests, pair = many(), tiny_pair("qwen2-alternating")
    plain = Engine(pair.live(), tiny.tokenizer(), max_batch=1)
    engine = Engine(pair.live(), tiny.tokenizer(), deterministic=True)
    assert engine.complete(requests) == plain.complete(requests)
    assert engine.timing.decode_tokens == plain.timing.decode_tokens


@pytest.mark.parametrize("family", ["qwen2-alternating", "llama"])  # the first has a sliding window
def test_rows_of_many_lengths_read_their_own_keys_alone(tiny_pair, monkeypatch, family):
    """Each row by itself is the oracle."""
    requests, pair, read = many(), tiny_pair(family), set()
    want = Engine(pair.live(), tiny.tokenizer(), max_batch=1).complete(requests)
    real = generation.RowsByLength
    monkeypatch.setattr(
        generation,
        "RowsByLength",
        lambda mask, groups: (read.add(tuple(keys for *_, keys in groups)), real(mask, groups))[1],
    )
    engine = Engine(pair.live(), tiny.tokenizer())
    assert engine.complete(requests) == want
    # the prompts have 1 to 150 tokens: rows of every number of steps of 64 stood in one batch
    assert (64, 128, 192) in read


def test_a_cpu_keeps_no_more_caches_than_it_may(tiny_pair, monkeypatch):
    pair, requests = tiny_pair("llama"), many()
    want = pair.engine().complete(requests)
    engine, made = pair.engine(), []
    per_token = 2 * engine.kv_heads * engine.head_dim * 4 * len(engine.live.order)  # float32
    monkeypatch.setattr(generation, "CACHE_BYTES", 5 * 192 * per_token)  # five rows of the longest
    real = engine.empty_caches
    monkeypatch.setattr(engine, "empty_caches", lambda n, room: (made.append(n * room), real(n, room))[1])
    assert engine.complete(requests) == want
    assert len(made) > 1 and max(made) <= 5 * 192


def test_deterministic_never_decodes_fewer_rows(tiny_pair, monkeypatch):
    engine = Engine(tiny_pair("llama").live(), tiny.tokenizer(), deterministic=True)
    monkeypatch.setattr(Engine, "_complete_batch", out_of_memory_above(2)(Engine._complete_batch))
    with pytest.raises(FrankenError, match="--deterministic decodes 16 rows"):
        engine.complete(greedy(PROMPTS))


@pytest.mark.real
def test_in_bf16_no_batch_changes_a_deterministic_reply_of_the_real_model(smollm2):
    """Without it, a processor that multiplies bfloat16 matrices by itself gave another third reply."""
    opened = open_pair(instruct=str(smollm2), dtype="bfloat16", device_map="cpu")
    engine = Engine(opened.live, opened.tokenizer, opened.stop_ids, deterministic=True)
    texts = ("Name a river.", "What is 17 + 5? Reply with just the number.", "Why is the sky blue?")
    asked = [engine.chat_ids([{"role": "user", "content": text}]) for text in texts]
    requests = [
        Request(text, ids, 8 + k, 0.7 * k) for k, (text, ids) in enumerate(zip(texts, asked, strict=True))
    ]
    assert engine.complete(requests) == [reply for one in requests for reply in engine.complete([one])]
