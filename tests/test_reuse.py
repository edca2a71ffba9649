"""What is computed once: tokens that prompts begin with, and layers below a change; the same numbers from
less work."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moves import BRANCHES, instruct

from engine import forward, prompt_layer
from engine.generation import Engine
from engine.packing import shared_prefixes
from engine.reuse import Entered, in_common, marks
from surgery import recipes as r

SHARED = tiny.random_prompt(1, 90)
PROMPTS = [SHARED + tiny.random_prompt(k, n) for k, n in enumerate((4, 9, 6))] + [tiny.random_prompt(9, 11)]
PAIRS = [(tiny.random_prompt(11, 8), tiny.random_prompt(12, 9))]


def ask(engine):
    return engine.next_token_logprobs(PROMPTS), engine.loglikelihood(PAIRS)[0]


def same(a, b):
    return torch.equal(a[0], b[0]) and np.array_equal(a[1], b[1])


@pytest.fixture
def runs(monkeypatch):
    """How many layers have run so far."""
    count, run = [0], forward.run_layer

    def counted(*args):
        count[0] += 1
        return run(*args)

    monkeypatch.setattr(forward, "run_layer", counted)
    monkeypatch.setattr(prompt_layer, "run_layer", counted)
    return count


def changes(n):
    """(what, operation, how many layers below it stay) in an order that goes up, down, and away from the
    layers."""
    yield from ((f"window {a}", lambda x, a=a: r.splice(x, "base", a, a + 1), a) for a in range(n))
    yield "all noise", lambda x: r.perturb(x, 0.1, 0), 0
    yield "delete", lambda x: r.delete(x, 2, 3), 2
    yield "double", lambda x: r.double(x, 3, 4), 4
    yield "the last taken away", lambda x: r.delete(x, n - 1, n), n - 1
    yield "outer", lambda x: r.with_outer(r.splice(x, "base", n - 1, n), "base"), 0
    yield "nothing", lambda x: x, n
    yield "first", lambda x: r.splice(x, "base", 0, 1), 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_reusing_changes_no_bit(tiny_pair, family):
    """Every change asked of one engine in a row, against an engine that has never seen another model."""
    pair = tiny_pair(family)
    live = pair.live()
    engine = pair.engine(live)
    for what, operation, below in changes(len(live.original)):
        live.apply(operation(live.original))
        assert in_common(live.recipe, live.original) == below, what
        assert same(ask(engine), ask(pair.engine(live))), what


def test_a_window_sweep_runs_the_lower_layers_once(tiny_pair, runs):
    """n windows need n * (n + 1) / 2 layers a batch, and each lower layer once more on the way up."""
    pair = tiny_pair("llama")
    live = pair.live()
    engine, n = pair.engine(live, packed=False), len(live.original)
    engine.loglikelihood(PAIRS)
    assert runs[0] == n
    for a in range(n):
        live.apply(r.splice(live.original, "base", a, a + 1))
        engine.loglikelihood(PAIRS)
    assert runs[0] == n + n * (n + 1) // 2 + (n - 1)
    live.apply(live.original)
    engine.loglikelihood(PAIRS)  # the unmodified model has all of them in common
    assert runs[0] == n + n * (n + 1) // 2 + (n - 1) + 1


def test_an_injected_beginning_is_never_reused(tiny_pair):
    """Caches that hold more than tokens and weights say: the same prompts on other caches get other
    numbers."""
    pair = tiny_pair("llama")
    live = pair.live()
    engine = pair.engine(live)
    live.apply(r.splice(live.original, "base", 2, 3))
    found = []
    for scale in (1.0, 3.0):
        caches = engine.empty_caches(1, len(SHARED))
        engine.prefill([SHARED], caches)
        for cache in caches:
            cache.v *= scale
        found.append(engine.next_token_logprobs([p[len(SHARED) :] for p in PROMPTS[:3]], caches, [0, 0, 0]))
    assert not torch.allclose(*found) and not engine._entered


def test_little_memory_keeps_little(tiny_pair, monkeypatch):
    monkeypatch.setattr(forward, "KEPT_BYTES", 0)
    pair = tiny_pair("llama")
    live = pair.live()
    engine = pair.engine(live)
    live.apply(r.splice(live.original, "base", 2, 3))
    assert same(ask(engine), ask(engine)) and not engine._entered


def test_a_full_memory_gives_up_what_is_kept(tiny_pair, monkeypatch):
    pair = tiny_pair("llama")
    live = pair.live()
    engine, forward, kept = pair.engine(live, packed=False), Engine.forward, []
    live.apply(r.splice(live.original, "base", 2, 3))
    expected = ask(engine)

    def full_once(self, ids, *args, **kwargs):
        kept.append(len(self._entered))
        if len(ids) > 1 and not self.timing.out_of_memory:
            raise torch.OutOfMemoryError
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(Engine, "forward", full_once)
    found = ask(engine)
    assert torch.allclose(found[0], expected[0], atol=1e-5) and np.allclose(found[1], expected[1], atol=1e-5)
    assert engine.timing.out_of_memory == 1
    assert kept[0] > 1
    assert 0 in kept


# ---- beginnings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_shared_beginning_is_computed_once_and_changes_nothing(tiny_pair, family):
    """Prefixes longer than the sliding windows, suffixes shorter and longer, one layer at two positions."""
    pair = tiny_pair(family)
    live = pair.live()
    engine = pair.engine(live, packed=False)
    live.apply(r.repeat(r.swap(live.original, 0, 1), 0, 3))
    rebuilt = pair.rebuilt(instruct(1, 0, 2, 1, 0, 2, 3, 4, 5))
    want = [tiny.hf_logits(rebuilt, prompt).log_softmax(-1) for prompt in BRANCHES]
    engine.timing.prefill_tokens = 0
    got = engine.next_token_logprobs(BRANCHES)
    assert engine.timing.prefill_tokens == sum(map(len, BRANCHES)) - 4 * 30 - 4 * 45
    torch.testing.assert_close(got, torch.stack([w[-1] for w in want]), atol=3e-4, rtol=1e-4)
    engine.prefill_tokens = 120
    torch.testing.assert_close(engine.next_token_logprobs(BRANCHES), got, atol=3e-5, rtol=0)
    pairs = [(p[:k], p[k:]) for p in BRANCHES[:9] for k in (len(p) - 1, 40) if k < len(p)]
    engine.timing.prefill_tokens = 0
    for (prefix, target), found in zip(pairs, engine.loglikelihood(pairs), strict=True):
        logp = want[BRANCHES.index(prefix + target)]
        np.testing.assert_allclose(
            found, [float(logp[len(prefix) + k - 1, t]) for k, t in enumerate(target)], atol=3e-4, rtol=1e-4
        )
    assert engine.timing.prefill_tokens < 0.6 * sum(len(a) + len(b) for a, b in pairs)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 70), st.integers(0, 3), st.integers(1, 5)), max_size=7
    ),
    st.integers(0, 40),
)
def test_groups_of_shared_beginnings_are_the_cheapest(rows, cost):
    """Against trying all cuts of the sorted prompts; groups are complete, and leave what is needed."""
    prompts = [((0,) * min(k, 20) + (branch,) * k)[:k] + (7,) * tail + (5,) for branch, k, tail, _ in rows]
    needed = [min(n, len(p)) for p, (*_, n) in zip(prompts, rows, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.packing.PASS_TOKENS", cost)
        groups = shared_prefixes(prompts, needed)
    assert sorted(i for _, group in groups for i in group) == list(range(len(prompts)))
    for shared, group in groups:
        assert len({prompts[i][:shared] for i in group}) == 1 and all(
            len(prompts[i]) - shared >= needed[i] for i in group
        )

    def most(order):
        """Tokens saved by the best way to cut this order into groups."""
        best = 0 if len(order) < 2 else most(order[1:])
        for n in range(2, len(order) + 1):
            room = min(len(prompts[i]) - needed[i] for i in order[:n])
            shared = next((k for k in range(room) if len({prompts[i][k] for i in order[:n]}) > 1), room)
            best = max(best, ((n - 1) * shared - cost if shared else 0) + most(order[n:]))
        return best

    saved = sum((len(group) - 1) * shared - cost for shared, group in groups if shared)
    assert saved == most(sorted(range(len(prompts)), key=lambda i: prompts[i]))


# ---- recipes to come ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_what_recipes_to_come_begin_with_is_computed_once_and_changes_no_bit(tiny_pair, runs, packed):
    """The base alone, then the base's first layers: no layer of the unmodified model is among those."""
    pair = tiny_pair("llama")
    live = pair.live()
    n = len(live.original)
    whole = r.splice(live.original, "base", 0, n)
    first, two = (r.splice(live.original, "base", 0, k) for k in (3, 2))
    engine = pair.engine(live, packed=packed)
    recipes = [live.original, whole, first, two, r.swap(live.original, 3, 4)]
    for k, recipe in enumerate(recipes):
        engine.coming = tuple(recipes[k + 1 :])
        live.apply(recipe)
        runs[0] = 0
        got = ask(engine)
        ran = runs[0]
        assert same(got, ask(pair.engine(live, packed=packed))), k
        alone = runs[0] - ran
        if packed:  # otherwise the beginning that prompts share is read anew, as what stands in caches is
            assert alone - ran == [0, 0, 3, 2, 3][k] * alone // n, k
        assert (ran < alone) == (k > 1)


def test_hidden_states_are_kept_where_they_save_most():
    original = r.identity(8)
    window = [r.splice(original, "base", k, k + 1) for k in (2, 5, 5, 6, 7)]
    assert marks(original, tuple(window), 1) == {5}
    assert marks(original, tuple(window), 2) == {5, 7}
    assert marks(original, tuple(window), 3) == {2, 5, 7}
    assert marks(original, (original, r.with_outer(original, "base")), 3) == set()
    blocks = r.parallel(original, 3, 5)
    assert in_common(blocks, original) == in_common(original, blocks) == 3


@pytest.mark.parametrize("most, kept", [(4 * 10, 1), (8 * 10, 2), (3 * 10, 0)])
def test_what_is_kept_fits_its_bytes_and_the_latest_stays(most, kept):
    store, recipe = Entered(), r.identity(6)
    for at in (1, 2, 3):
        store.keep(("q",), recipe, at, torch.full((10,), float(at)), 5, most)
    assert store.best(("q",), recipe)[0] == (3 if kept else 0)
    assert sum(map(len, store._kept.values())) == kept
    assert store.best(("other",), recipe) == (0, None)
