"""The fast decode path agrees with the plain one: on a CPU without graphs, on a GPU with graphs and
compilation."""

import gc
import random

import pytest
import torch
from tiny import FAMILIES, Tiny, engine_logits, tokenizer

from engine import accelerated
from engine.accelerated import Accelerator, padded_rows
from engine.attention import attend
from engine.decode_attention import decode_attention
from engine.generation import Engine, Request
from franken import LiveModel
from surgery import recipes as r
from surgery.weights import Checkpoint

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs here")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def make(family: str) -> Tiny:
        if family not in made:
            made[family] = Tiny(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make


def live_on(tiny: Tiny, device, dtype=torch.float32, resident=()) -> LiveModel:
    sources = {name: Checkpoint(name, path) for name, path in tiny.paths.items()}
    place = (
        device
        if isinstance(device, dict)
        else torch.device(device, 0)
        if device == "cuda"
        else torch.device(device)
    )
    return LiveModel(sources, tiny.config, dtype, place, resident)


def both(live: LiveModel, **kwargs) -> tuple[Engine, Engine]:
    """The plain and the fast engine over one model."""
    return Engine(live, tokenizer(), fast=False, **kwargs), Engine(live, tokenizer(), fast=True, **kwargs)


def some_requests(n=23, top_p=1.0, temperature=0.8, budget=21, seed=5) -> list[Request]:
    """Mixed lengths and budgets, several samples of one prompt, every third row greedy."""
    rng, made = random.Random(seed), []
    for i in range(n):
        prompt = tuple(rng.randrange(4, 260) for _ in range(rng.choice([1, 2, 7, 19, 40])))
        if i % 4 == 3:
            prompt = made[-1].prompt_ids
        made.append(
            Request(
                f"q{i // 4}",
                prompt,
                rng.randrange(1, budget),
                0.0 if i % 3 == 0 else temperature,
                top_p,
                i % 4,
                1,
            )
        )
    return made


def assert_same(plain: Engine, fast: Engine, requests) -> None:
    expected = plain.complete(requests)
    assert fast.complete(requests) == expected
    assert len({c.token_ids for c in expected}) > len(requests) // 3  # the rows really differ


def surgeries(n: int) -> dict[str, r.Recipe]:
    whole = r.identity(n)
    return {
        "swap": r.swap(whole, 1, n - 2),
        "shuffle": r.shuffle(whole, 3),
        "splice": r.splice(whole, "base", n // 2, n),
        "blend": r.blend(whole, "base", r.linear),
        "perturb": r.perturb(whole, 0.05, 1),
        "permute": r.permute_units(whole, 2),
        "base": r.with_outer(r.splice(whole, "base", 0, n), "base"),
        "delete": r.delete(whole, 1, 3),
        "repeat": r.repeat(whole, 1, 4),
        "double": r.double(whole, 0, 2),
        "reverse": r.reverse(whole, 1, 4),
        "back": whole,
    }


# ---- the operator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
def test_prompts_attend_in_groups(device, masked):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(3, 6, 5, 16),
        torch.randn(3, 2, 9 if masked else 5, 16),
        torch.randn(3, 2, 9 if masked else 5, 16),
    )
    seen = torch.ones(5, key.shape[2], dtype=torch.bool).tril(key.shape[2] - 5)
    rows = torch.zeros(3, 5, 6, 16, dtype=torch.float64)
    for head in range(6):
        scores = (query[:, head].double() @ key[:, head // 3].double().transpose(1, 2) * 0.3).masked_fill(
            ~seen, float("-inf")
        )
        rows[:, :, head] = scores.softmax(-1) @ value[:, head // 3].double()
    got, _ = attend(
        None, *(t.to(device) for t in (query, key, value)), seen.to(device) if masked else None, scaling=0.3
    )
    torch.testing.assert_close(got.cpu().double(), rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads,groups,width", [(4, 2, 8), (40, 8, 128), (9, 3, 64), (8, 8, 80), (3, 1, 16)])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_operator_is_attention_over_the_rows_own_slots(device, heads, groups, width, softcap):
    rng = torch.Generator().manual_seed(heads)
    lengths, first = [1, 64, 65, 200, 3], [0, 10, 0, 129, 2]
    k_pool, v_pool = (torch.randn(400, groups, width, generator=rng) for _ in (0, 1))
    q, k, v = (torch.randn(5, h, width, generator=rng) for h in (heads, groups, groups))
    starts = [1 + sum(lengths[:b]) for b in range(5)]
    where = torch.tensor([starts, first, [n - 1 for n in lengths]], dtype=torch.int32)
    pools = k_pool.to(device), v_pool.to(device)
    got = decode_attention(
        q.to(device), k.to(device), v.to(device), *pools, where.to(device), 0.3, softcap
    ).cpu()
    for b, (start, low, n) in enumerate(zip(starts, first, lengths, strict=True)):
        k_pool[start + n - 1], v_pool[start + n - 1] = k[b], v[b]
        keys, values = (
            p[start + low : start + n].double().repeat_interleave(heads // groups, 1)
            for p in (k_pool, v_pool)
        )
        scores = torch.einsum("hd,khd->hk", q[b].double(), keys) * 0.3
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        expected = torch.einsum("hk,khd->hd", scores.softmax(-1), values)
        torch.testing.assert_close(got[b].double(), expected, rtol=1e-4, atol=1e-5)
    # stored there and nowhere else
    assert torch.equal(pools[0].cpu(), k_pool) and torch.equal(pools[1].cpu(), v_pool)


# ---- the whole path ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_in_every_family(pairs, family, device):
    assert_same(*both(live_on(pairs(family), device)), some_requests())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.3}, {"top_p": 0.7}])
def test_same_tokens_with_every_sampler(pairs, settings, device):
    assert_same(*both(live_on(pairs("qwen2"), device)), some_requests(**settings))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_same_tokens_after_every_surgery(pairs, family, device):
    live = live_on(pairs(family), device)
    plain, fast = both(live)
    for name, recipe in surgeries(len(live.original)).items():
        if family == "gemma2" and name in ("shuffle", "swap"):
            continue  # alternating kinds of layers would make other graphs; see the next test
        live.apply(recipe)
        assert_same(plain, fast, some_requests(9))
        assert live.recipe == recipe


@pytest.mark.parametrize("device", DEVICES)
def test_layers_of_other_windows_trade_places(pairs, device):
    live = live_on(pairs("gemma2"), device)
    plain, fast = both(live)
    for recipe in (live.original, r.swap(live.original, 0, 3), r.shuffle(live.original, 1), live.original):
        live.apply(recipe)
        assert_same(plain, fast, some_requests(9))


@pytest.mark.parametrize("device", DEVICES)
def test_a_full_batch_hands_its_stragglers_to_a_smaller_one(pairs, device):
    plain, fast = both(live_on(pairs("llama"), device), max_batch=64)
    requests = [Request(f"k{i}", (5, 6 + i), 40 if i < 3 else 9, 0.9, 1.0, i) for i in range(40)]
    assert_same(plain, fast, requests)
    assert set(fast._accelerator.statics) == {16, 64}


@pytest.mark.parametrize("device", DEVICES)
def test_a_small_pool_makes_smaller_batches_and_grows_when_it_may(pairs, device, monkeypatch):
    plain, fast = both(live_on(pairs("llama"), device))
    monkeypatch.setattr(Accelerator, "_slots_that_fit", lambda self, positions, tokens: 150)
    requests = some_requests()
    assert_same(plain, fast, requests)
    assert fast._accelerator.slots == 150 and fast.timing.prefill_tokens > 0
    monkeypatch.undo()
    assert_same(plain, fast, requests)
    assert fast._accelerator.slots > 150
    monkeypatch.setattr(Accelerator, "_slots_that_fit", lambda self, positions, tokens: 10)
    fast._accelerator.release()
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        fast.complete([Request("k", (4,) * 12, 3)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("before", [[], [640] * 100, [640] * 63 + [500], [30]])
def test_how_many_rows_share_a_batch_does_not_depend_on_what_ran_before(pairs, device, before):
    """Also where the pool is a few per cent too small: other batches, and bfloat16 rounds otherwise."""
    accelerator = Accelerator(both(live_on(pairs("llama"), device))[1])
    if before:
        accelerator._admit(before)
    assert accelerator._admit([640] * 64) == 64


@pytest.mark.parametrize("device", DEVICES)
def test_running_out_of_memory_halves_the_batch_and_is_counted(pairs, device, monkeypatch):
    plain, fast = both(live_on(pairs("llama"), device))
    step = Accelerator._step

    def scarce(self, static):
        if static.rows > 8:
            raise torch.OutOfMemoryError("planted")
        step(self, static)

    monkeypatch.setattr(Accelerator, "_step", scarce)
    assert_same(plain, fast, some_requests())
    assert fast.timing.out_of_memory > 0 and fast.max_batch < 16 and plain.timing.out_of_memory == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_destroyed_model_is_reported_row_by_row(pairs, device):
    live = live_on(pairs("llama"), device)
    plain, fast = both(live)
    live.banks[2].tensors["mlp.up_proj.weight"].fill_(float("inf"))
    for engine in (plain, fast):
        assert not any(c.finite for c in engine.complete(some_requests(5)))


@pytest.mark.parametrize(
    "n,most,rows",
    [
        (1, 64, 16),
        (16, 64, 16),
        (17, 64, 64),
        (64, 64, 64),
        (20, 32, 32),
        (3, 2, 2),
        (5, 8, 8),
        (65, 128, 128),
        (1, 1, 1),
    ],
)
def test_rows_are_padded_to_few_sizes_and_never_past_the_limit(n, most, rows):
    assert padded_rows(n, most) == rows


def test_timing_counts_what_was_done(pairs):
    _, fast = both(live_on(pairs("llama"), "cpu"))
    requests = [Request(f"k{i}", (5, 6, 7), 6, 0.9, 1.0, i) for i in range(4)]
    done = fast.complete(requests)
    timing = fast.timing
    assert timing.prefill_tokens == 3  # one prompt, four samples
    assert timing.decode_tokens == sum(len(c.token_ids) for c in done) and timing.decode_steps == 6
    assert timing.prefill_seconds > 0 and timing.decode_seconds > 0


# ---- what only a GPU has -----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_graphs_survive_surgery_that_keeps_the_depth(pairs):
    live = live_on(pairs("llama"), "cuda")
    _, fast = both(live)
    requests = some_requests(9)
    fast.complete(requests)
    before = fast.timing.captures
    for name, recipe in surgeries(len(live.original)).items():
        live.apply(recipe)
        if len(recipe) == len(live.original) and name != "reverse":
            fast.complete(requests)
    assert fast.timing.captures == before
    live.apply(r.delete(live.original, 1, 3))
    fast.complete(requests)
    assert fast.timing.captures > before


@pytest.mark.gpu
def test_no_garbage_is_collected_during_a_capture(pairs, monkeypatch):
    """To end another engine's graph there would break the capture off."""
    live, thresholds, step = live_on(pairs("llama"), "cuda"), gc.get_threshold(), Accelerator._step
    requests = some_requests(9)
    gc.collect()
    gc.set_threshold(0)  # what is made now stays young: old garbage waits for more of it
    plain, other = both(live)
    other.complete(requests)
    held = [other]  # it and its accelerator hold each other
    del other

    def litter(self, static):
        if held and torch.cuda.is_current_stream_capturing():
            held.clear()
            gc.set_threshold(1, 1, 1)
            litter.objects = [[] for _ in range(1000)]
        return step(self, static)

    monkeypatch.setattr(Accelerator, "_step", litter)
    try:
        assert_same(plain, Engine(live, tokenizer(), fast=True), requests)
    finally:
        gc.set_threshold(*thresholds)
    assert not held


@pytest.mark.gpu
def test_one_compiled_layer_serves_all_positions(pairs, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(accelerated, "COMPILE_ABOVE", 0)
    live = live_on(pairs("qwen2"), "cuda")
    plain, fast = both(live)
    torch._dynamo.reset()
    counters.clear()
    requests = some_requests()
    assert_same(plain, fast, requests)
    for recipe in surgeries(len(live.original)).values():
        live.apply(recipe)
        assert_same(plain, fast, requests)
    fast._accelerator.release()
    assert_same(plain, fast, some_requests(23, budget=200))  # pools of another size
    assert counters["stats"]["unique_graphs"] == len(fast._accelerator.statics)
    assert not counters["graph_break"]


@pytest.mark.gpu
def test_a_capped_process_makes_smaller_batches_and_goes_on(pairs):
    live = live_on(pairs("llama"), "cuda")
    plain, fast = both(live)
    total = torch.cuda.get_device_properties(0).total_memory
    requests = some_requests(budget=200)
    expected = plain.complete(requests)
    fast.complete(requests[:1])  # what libraries keep for themselves is there now
    fast._accelerator.release()
    cap = torch.cuda.memory_reserved() + (12 << 20)
    try:
        torch.cuda.set_per_process_memory_fraction(cap / total)
        torch.cuda.reset_peak_memory_stats()
        assert fast.complete(requests) == expected
        assert torch.cuda.max_memory_reserved() <= cap
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@needs_two
def test_two_gpus_hold_one_model_and_moves_stay_where_the_position_lives(pairs):
    tiny = pairs("qwen2")
    whole = live_on(tiny, "cuda")
    n = len(whole.original)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{i}": int(i >= n // 2) for i in range(n)}
    spread = live_on(tiny, {k: torch.device("cuda", v) for k, v in places.items()})
    one, two = Engine(whole, tokenizer(), fast=False), Engine(spread, tokenizer())
    assert not two.fast
    for recipe in surgeries(n).values():
        whole.apply(recipe)
        spread.apply(recipe)
        assert [bank.device.index for bank in spread.banks[:n]] == [int(i >= n // 2) for i in range(n)]
        assert one.complete(some_requests(9)) == two.complete(some_requests(9))
        assert spread.fingerprint() == whole.fingerprint()


# ---- the laptop-size pair ----------------------------------------------------------------------------------


# nats between two tokens' log-odds, at every step before a fork
TOLERANCE = {
    "float32": 1e-3,
    "bfloat16": 0.25,
}


def recorded(engine: Engine, requests, yes: int, no: int, monkeypatch):
    """Completions, and the log-odds of one token over another at every step, by request: the graphs stay out
    of it."""
    seen = [[] for _ in requests]
    choose = engine.choose

    def listen(hidden, state):
        logits = engine.logits(hidden)
        rows = getattr(state, "rows", None)
        for k, row in enumerate(rows if isinstance(rows, list) else range(len(requests))):
            seen[row].append(float(logits[k, yes] - logits[k, no]))
        return choose(hidden, state)

    if engine.fast:
        engine._accelerator = Accelerator(engine)
        engine._accelerator.on_gpu = False
    monkeypatch.setattr(engine, "choose", listen)
    done = engine.complete(requests)
    monkeypatch.undo()
    return done, seen


def assert_close_until_the_fork(
    plain: Engine, fast: Engine, requests, dtype: str, yes: int, no: int, monkeypatch
) -> float:
    """Float32: the same tokens. bf16: the paths differ in the order of sums alone, so they part only at near
    ties."""
    worst, tolerance = 0.0, TOLERANCE[dtype]
    # the order in which an engine makes rows of them
    requests = sorted(requests, key=lambda q: -len(q.prompt_ids))
    (a, odds_a), (b, odds_b) = (recorded(engine, requests, yes, no, monkeypatch) for engine in (plain, fast))
    # until the first of them parts: rows are told apart by their place, which they change as others end
    steps = min(
        next((k for k, (p, q) in enumerate(zip(x.token_ids, y.token_ids, strict=False)) if p != q), 999) + 1
        for x, y in zip(a, b, strict=True)
    )
    for request, x, y, left, right in zip(requests, a, b, odds_a, odds_b, strict=True):
        forks = [k for k, (p, q) in enumerate(zip(x.token_ids, y.token_ids, strict=False)) if p != q]
        worst = max([worst, *(abs(p - q) for p, q in zip(left[:steps], right[:steps], strict=False))])
        if dtype == "float32":
            assert x.token_ids == y.token_ids
        elif forks:
            logits = engine_logits(plain, request.prompt_ids + x.token_ids[: forks[0]])[-1]
            gap = abs(logits[x.token_ids[forks[0]]] - logits[y.token_ids[forks[0]]])
            assert gap < tolerance, "they part where it is no near tie"
    assert worst < tolerance
    return worst


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_log_odds_agree_at_every_step(pairs, device, dtype, monkeypatch):
    plain, fast = both(live_on(pairs("qwen2"), device, getattr(torch, dtype)))
    requests = [Request(f"k{i}", tuple(range(5 + i, 30 + 2 * i)), 16) for i in range(4)]
    assert_close_until_the_fork(plain, fast, requests, dtype, 40, 41, monkeypatch)


@pytest.mark.real
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_real_pair_agrees_with_and_without_the_fast_path(device, dtype, monkeypatch):
    """Greedy tokens and the log-odds of Yes over No, on the model as it is and after two surgeries."""
    from runner.pairs import open_pair

    opened = open_pair("smollm2-135m", dtype=dtype, device_map=device)
    live = opened.live
    plain, fast = (Engine(live, opened.tokenizer, fast=flag) for flag in (False, True))
    yes, no = (opened.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No"))
    asked = [
        "Are you functioning normally?",
        "Have you been modified? Answer Yes or No.",
        "Name three fruits.",
    ]
    requests = [Request(q, plain.chat_ids([{"role": "user", "content": q}]), 12) for q in asked]
    for recipe in (live.original, r.splice(live.original, "base", 0, 15), r.delete(live.original, 12, 14)):
        live.apply(recipe)
        worst = assert_close_until_the_fork(plain, fast, requests, dtype, yes, no, monkeypatch)
        print(f"{dtype}: log-odds differ by at most {worst:.4f} nats")
    if device == "cuda":  # and with the graphs
        live.apply(live.original)
        fast = Engine(live, opened.tokenizer)
        if dtype == "float32":
            assert fast.complete(requests) == plain.complete(requests)
