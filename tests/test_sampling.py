"""Drawing tokens: against sorting the vocabulary the slow way, and against the distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.generation import draw
from engine.sampling import nucleus_by_bisection, nucleus_by_sorting


def slow_nucleus(logits, temperature, top_p, u):
    """Sort, cut, renormalize, walk the cumulative sum in order of token id; None where u is too near a
    boundary."""
    x = logits.astype(np.float64) / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    kept, total = set(), 0.0
    for token in np.argsort(-p, kind="stable"):
        if total >= top_p:
            break
        if abs(total + p[token] - top_p) < 1e-5:
            return None
        kept.add(int(token))
        total += p[token]
    walked = 0.0
    for token in sorted(kept):
        walked += p[token]
        if abs(walked / total - u) < 1e-5:
            return None
        if walked / total > u:
            return token
    return max(kept)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.2, 3),
    top_p=st.floats(0.05, 1),
    u=st.floats(0, 1, exclude_max=True, width=32),
    spread=st.floats(0.1, 8),
    vocab=st.sampled_from([60, 512, 1300]),
)
def test_draw_equals_sorting_the_vocabulary(seed, temperature, top_p, u, spread, vocab):
    logits = np.random.default_rng(seed).normal(size=vocab).astype(np.float32) * np.float32(spread)
    want = slow_nucleus(logits, temperature, top_p, u)
    if want is not None:
        vectors = [torch.tensor([v], dtype=torch.float32) for v in (temperature, top_p, u)]
        assert int(draw(torch.tensor(logits)[None], vectors[0], vectors[1], vectors[2])) == want


@pytest.mark.parametrize("spread", [0.3, 3, 12])
def test_both_ways_to_a_nucleus_keep_the_same_tokens(spread):
    """One for a CPU and one for a GPU; a row that is no distribution loses nothing in either."""
    torch.manual_seed(0)
    p = (torch.randn(40, 3000) * spread).softmax(-1)
    p[7] = math.nan
    top_p = torch.linspace(0.02, 1, 40)
    kept = [p >= low(p, top_p)[:, None] for low in (nucleus_by_sorting, nucleus_by_bisection)]
    apart = (kept[0] != kept[1]).nonzero().tolist()
    for row, token in apart:  # only where the sum of all before it is top_p itself, to rounding
        before = p[row][p[row] > p[row, token]].double().sum()
        assert min(abs(before - top_p[row]), abs(before + p[row, token] - top_p[row])) < 1e-5
    assert len(apart) < 40
    assert nucleus_by_sorting(p, top_p)[7] == nucleus_by_bisection(p, top_p)[7] == 0


def test_draw_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    n = 20000
    u = (torch.arange(n) + 0.5) / n
    for top_p, kept in ((None, 4), (0.9, 3), (0.6, 1)):
        p = logits.softmax(-1).clone()
        p[kept:] = 0
        nucleus = None if top_p is None else torch.full((n,), top_p)
        tokens = draw(logits.expand(n, -1), torch.ones(n), nucleus, u)
        np.testing.assert_allclose(torch.bincount(tokens, minlength=5) / n, p / p.sum(), atol=2 / n)
    # never a token of probability 0
    assert int(draw(logits[None], torch.ones(1), None, torch.tensor([1 - 2**-24]))) == 3
    assert int(draw(logits[None].roll(1), torch.ones(1), None, torch.zeros(1))) == 1
    late = torch.full((1, 2000), float("-inf"))
    late[0, [1500, 1501]] = 0.0
    for u, want in ((0.0, 1500), (0.49, 1500), (0.51, 1501), (1 - 2**-24, 1501)):
        assert int(draw(late, torch.ones(1), None, torch.tensor([u]))) == want


def test_a_row_without_a_nucleus_loses_nothing_to_a_neighbor_with_one():
    """Many heads whose float32 probabilities may round up to a sum of 1 without the tail, and a draw from
    that tail."""
    u = torch.tensor([1 - 2**-24] * 2)
    for heads in range(2, 300):
        logits = torch.cat([torch.zeros(heads), torch.full((10,), math.log(2e-8 * heads))])[None].expand(
            2, -1
        )
        both = draw(logits, torch.ones(2), torch.tensor([1.0, 0.5]), u)
        assert both[0] == draw(logits[:1], torch.ones(1), None, u[:1])[0] >= heads, heads
