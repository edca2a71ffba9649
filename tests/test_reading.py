"""Readings of Yes/No answers where the distributions lie, against those of numpy."""

import numpy as np
import pytest
import torch

import prompts
from analysis.stats import log_odds_from_logprobs
from suites.formats import rating_logprobs
from suites.reading import condensed, log_odds, log_odds_on_device

INF = float("inf")


def rows(n=70, vocab=300):
    """Ordinary rows, unnormalized ones, very sharp ones, and what a destroyed model gives."""
    logprobs = 4 * torch.randn(n, vocab, generator=torch.Generator().manual_seed(0))
    logprobs[1] *= 100
    logprobs[2, 7] = float("nan")
    logprobs[3, 9] = INF
    logprobs[4] = -INF
    logprobs[5, [3, 4]] = -INF  # no Yes at all
    logprobs[6, 20:] = -INF
    return logprobs


def test_readings_on_the_device_are_those_of_numpy():
    yes, no = [3, 4, 4], [5]
    want = log_odds_from_logprobs(rows().numpy(), yes, no)
    got = log_odds_on_device(rows(), yes, no)
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_allclose(got[name].astype(float), want[name].astype(float), rtol=1e-12, atol=1e-14)
    assert want["answered"].any() and not want["finite"][2:6].any()


def test_on_a_cpu_numpy_reads():
    got, want = log_odds(rows(), [3], [5]), log_odds_from_logprobs(rows().numpy(), [3], [5])
    assert all(np.array_equal(got[k], want[k], equal_nan=True) for k in want)


def test_a_condensed_vocabulary_keeps_ratings():
    tokens = prompts.RatingTokens(tuple((2 * k, 2 * k + 1) for k in range(9)), (), (0, 1), (30, 31))
    logprobs = rows()[7:]
    ids = [*range(18), 30, 31]
    small = condensed(logprobs, ids)
    assert small.shape == (len(logprobs), len(ids) + 1)
    moved = prompts.RatingTokens(tokens.one_to_nine, (), (0, 1), (18, 19))
    for k in range(0, 60, 3):
        want = rating_logprobs(logprobs[k].numpy(), logprobs[k + 1 : k + 3].numpy(), tokens)
        got = rating_logprobs(small[k], small[k + 1 : k + 3], moved)
        np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.gpu
def test_readings_on_a_gpu_are_those_of_numpy():
    want = log_odds_from_logprobs(rows().numpy(), [3, 4], [5])
    got = log_odds(rows().cuda(), [3, 4], [5])
    for name in want:
        np.testing.assert_allclose(got[name].astype(float), want[name].astype(float), rtol=1e-12, atol=1e-14)
