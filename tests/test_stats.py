"""stats.py against hand-computed values, slow obvious versions and brute-force enumeration."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.stats import norm

from analysis import curve, detection, stats


def dumps(value):
    return json.dumps(value, allow_nan=False)


# ---------------------------------------------------------------- Yes/No readings


def test_whatever_a_result_holds_becomes_plain_json():
    """Numpy's types, dataclasses within dictionaries, and numbers that JSON has not."""
    estimate = stats.Estimate(float("nan"), -math.inf, 1.0, 3, "none")
    found = stats.plain({1: (np.float32(0.5), np.bool_(True), estimate), "x": np.array([[1, 2]]), "y": None})
    as_json = {"value": None, "low": None, "high": 1.0, "n": 3, "method": "none"}
    assert found["1"][:2] == [0.5, True] and type(found["1"][1]) is bool and type(found["1"][0]) is float
    assert as_json.items() <= found["1"][2].items() and found["1"][2] == estimate.to_json()
    assert found["x"] == [[1, 2]] and type(found["x"][0][0]) is int and found["y"] is None


def test_readings_equal_a_slow_sum():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, size=(5, 50)).astype(np.float32)
    yes, no = [3, 7, 7], [11]
    got = stats.log_odds_from_logprobs(logits, yes, no)
    for i, row in enumerate(logits.tolist()):
        total = math.fsum(math.exp(v) for v in row)
        p = [math.exp(v) / total for v in row]
        p_yes, p_no = p[3] + p[7], p[11]
        want = dict(
            p_yes=p_yes,
            p_no=p_no,
            mass=p_yes + p_no,
            p_yes_normalized=p_yes / (p_yes + p_no),
            log_odds=math.log(p_yes / p_no),
            entropy=-math.fsum(v * math.log(v) for v in p),
        )
        assert {k: got[k][i] for k in want} == pytest.approx(want, rel=1e-6)
        assert got["finite"][i] and got["answered"][i] == (p_yes + p_no >= stats.MASS_FLOOR)
    shifted = stats.log_odds_from_logprobs(logits - 7, yes, no)
    assert shifted["log_odds"] == pytest.approx(got["log_odds"], abs=1e-4)


def test_destroyed_models_are_readings_without_nan_in_json():
    rows = np.log(np.full((7, 4), 0.25, dtype=np.float32))
    rows[0] = np.nan
    rows[1, 2] = np.inf
    rows[2] = -np.inf
    rows[3, 0] = -np.inf  # Yes impossible
    rows[4, :2] = -np.inf  # both impossible
    rows[5, :2] = -30
    got = stats.log_odds_from_logprobs(rows, [0], [1])
    assert got["finite"].tolist() == [False] * 5 + [True, True] and got["answered"].tolist() == [
        False
    ] * 6 + [True]
    out = stats.readings_to_json(got)
    dumps(out)
    assert out[0]["log_odds"] is None and out[0]["mass"] is None and out[3]["mass"] == pytest.approx(1 / 3)
    assert out[4]["mass"] == 0.0 and out[6]["entropy"] == pytest.approx(math.log(4))
    for yes, no in (([0], [0]), ([], [1]), ([0], [4]), ([-1], [1])):
        with pytest.raises(ValueError):
            stats.log_odds_from_logprobs(rows, yes, no)


# ---------------------------------------------------------------- general tools


def test_wilson_and_accuracy_by_hand():
    z, n, p = 1.959963984540054, 10, 0.8
    half = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n)
    mid = (p + z * z / 2 / n) / (1 + z * z / n)
    got = stats.wilson_interval(8, 10)
    assert (got.value, got.low, got.high) == pytest.approx((0.8, mid - half, mid + half))
    assert stats.accuracy(list("aabbb"), list("abbbb")).value == 0.8
    assert stats.wilson_interval(0, 0).value is None
    with pytest.raises(ValueError):
        stats.wilson_interval(3, 2)


def test_bootstrap_resamples_whole_questions():
    values = np.random.default_rng(1).gamma(2, size=25)
    alone = stats.bootstrap_ci(values)
    repeated = stats.bootstrap_ci(np.repeat(values, 6), clusters=np.repeat(np.arange(25), 6).tolist())
    assert alone.method == repeated.method == "bca" and alone.n == repeated.n == 25
    assert (repeated.value, repeated.low, repeated.high) == pytest.approx(
        (alone.value, alone.low, alone.high)
    )
    naive = stats.bootstrap_ci(np.repeat(values, 6))
    assert naive.high - naive.low < 0.6 * (alone.high - alone.low)
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * values.std() / 5, rel=0.15)
    assert stats.bootstrap_ci([1.0] * 9).low is None and stats.bootstrap_ci([]).value is None
    with pytest.raises(ValueError):
        stats.bootstrap_ci([1.0, 2.0], clusters=[1])


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(2)
    found = [stats.bootstrap_ci(rng.exponential(size=30), resamples=200) for _ in range(150)]
    assert 0.86 < np.mean([f.low <= 1 <= f.high for f in found]) <= 1


def test_sign_flip_p_value_equals_enumeration():
    rng = np.random.default_rng(3)
    before, after = rng.normal(size=8), rng.normal(0.7, size=8)
    d = after - before
    hits = sum(abs(np.mean(d * s)) >= abs(d.mean()) - 1e-12 for s in itertools.product((1, -1), repeat=8))
    got = stats.paired_difference(before, after)
    assert got.p_value == pytest.approx(hits / 256) and got.value == pytest.approx(d.mean())
    assert (got.before, got.after) == pytest.approx((before.mean(), after.mean()))
    with pytest.raises(ValueError):
        stats.paired_difference([1.0], [1.0, 2.0])


def test_mcnemar_by_hand():
    before, after = [0] * 8 + [1] + [1] * 20, [1] * 8 + [0] + [1] * 20
    got = stats.mcnemar_exact(before, after)
    assert got.p_value == pytest.approx(2 * (1 + 9) / 2**9) and got.value == pytest.approx(7 / 29)
    assert stats.mcnemar_exact([1, 0], [1, 0]).p_value == 1


def test_corrections_by_hand():
    p = [0.01, 0.04, None, 0.03, 0.005, math.nan]
    assert stats.holm(p) == pytest.approx([0.03, 0.06, None, 0.06, 0.02, None])
    assert stats.holm([]) == [] and stats.holm([0.9, 0.8]) == [1, 1]


def test_kappa_by_hand():
    a, b = "y" * 25 + "n" * 25, "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15
    got = stats.cohen_kappa(a, b)
    assert got.value == pytest.approx(0.4) and 0.1 < got.low < 0.4 < got.high < 0.65
    assert stats.cohen_kappa("aaa", "aaa").value is None and stats.cohen_kappa("abab", "abab").value == 1
    with pytest.raises(ValueError):
        stats.cohen_kappa("a", "ab")


def test_gap_in_points():
    questions = [f"q{i}" for i in range(30)]
    got = stats.summarize_gap({q: [1, 1] for q in questions}, {q: [0] for q in questions})
    missing = 1.959963984540054**2 / (30 + 1.959963984540054**2)  # Wilson at 30 of 30 leaves this much
    assert (got.value, got.low, got.high) == pytest.approx(
        (100, 100 - 100 * math.hypot(missing, missing), 100)
    )
    assert got.method == "newcombe" and got.p_value < 1e-3
    mixed = stats.summarize_gap(
        {q: [1, i % 2] for i, q in enumerate(questions)}, {q: [0, 0, 0] for q in questions}
    )
    assert (mixed.before, mixed.after, mixed.value) == pytest.approx(
        (0, 75, 75)
    ) and mixed.low < 75 < mixed.high
    with pytest.raises(ValueError):
        stats.summarize_gap({"a": [1]}, {"b": [1]})


def test_perplexity_is_token_weighted():
    got = stats.perplexity_contrast([2.0, 3.0, 2.5], [2.5, 3.1, 2.9], [100, 300, 200])
    assert got.before == pytest.approx(math.exp((200 + 900 + 500) / 600))
    assert got.value == pytest.approx((0.5 * 100 + 0.1 * 300 + 0.4 * 200) / 600)
    assert 0.1 <= got.low <= got.value <= got.high <= 0.5
    destroyed = stats.perplexity_contrast([2.0, 3.0], [math.nan, 1e4], [10, 10])
    assert destroyed.value is None and destroyed.after is None
    overflow = stats.perplexity_contrast([2.0, 3.0], [1e4, 2e4], [10, 10])
    assert overflow.after is None and overflow.value == pytest.approx(14997.5)
    dumps([destroyed.to_json(), overflow.to_json()])


# ---------------------------------------------------------------- placebos


def test_place_among_placebos_by_hand():
    assert stats.placebo_place(-0.5, [0.1, -0.2, 0.5, 0.6]) == (3 / 5, False)  # as far counts as beyond
    assert stats.placebo_place(0.61, [0.1, -0.2, 0.5, 0.6]) == (1 / 5, True)
    assert stats.placebo_place(0.0, [0.1, -0.2]) == (1, False)
    with pytest.raises(ValueError, match="placebos"):
        stats.placebo_place(0.5, [])


def test_auroc_equals_counting_pairs():
    rng = np.random.default_rng(4)
    a, b = rng.normal(0.8, 1, 21).round(1), rng.normal(0, 1, 18).round(1)  # rounded: ties
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b]
    got = stats.auroc(a, b)
    assert got.value == pytest.approx(np.mean(pairs)) and got.n == 39
    draws = []
    for _ in range(400):
        x, y = rng.choice(a, 21), rng.choice(b, 18)
        draws.append(np.mean((x[:, None] > y) + 0.5 * (x[:, None] == y)))
    assert (got.low, got.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)
    assert stats.auroc(b, a).value == pytest.approx(1 - got.value)


def test_auroc_at_its_edges():
    assert stats.auroc([1, 2], [0, 0, 0]) is None and stats.auroc([1, 2, 3], []) is None
    apart = stats.auroc([4, 5, 6], [1, 2, 3])
    assert (apart.value, apart.low, apart.high, apart.method) == (1.0, None, None, "none")
    assert stats.auroc([1, 1, 1], [1, 1, 1]).value == 0.5


# ---------------------------------------------------------------- what the last bit must not decide


LAST_BITS = np.random.default_rng(8).uniform(-3e-16, 3e-16, 24)


def test_a_mean_of_zero_but_for_rounding_is_no_effect():
    effect = np.tile([3.0, -3.0, 1.7, -1.7], 6)
    before = np.random.default_rng(9).normal(0, 5, 24)
    for bits in (LAST_BITS, -LAST_BITS, np.roll(LAST_BITS, 5)):
        assert stats.paired_difference(before, before + effect + bits, resamples=999).p_value == 1


def test_sign_flips_that_tie_with_the_observed_mean_count():
    effect = np.array([0.3, 0.1, -0.4, 1.1])
    flips = np.array(list(itertools.product([1, -1], repeat=4)))
    # in integers: no rounding
    exact = np.mean(np.abs((np.round(effect * 10).astype(int) * flips).sum(axis=1)) >= 11)
    for order in itertools.permutations(range(4)):  # each order of summing rounds in its own way
        assert stats.paired_difference(np.zeros(4), effect[list(order)]).p_value == pytest.approx(exact)


def test_scores_equal_but_for_rounding_are_ties():
    one_third = np.full(24, 1 / 3)
    assert stats.auroc(one_third + LAST_BITS, one_third - LAST_BITS).value == 0.5
    assert stats.placebo_place(1 / 3 + 1e-16, [1 / 3, -1 / 3, 0.1]) == (3 / 4, False)
    tiny = np.array([2e-9, 3e-9, 4e-9])  # P(Yes) of a sure model: small is not equal
    assert stats.auroc(tiny, tiny - 1.5e-9).value > 0.8


# ---------------------------------------------------------------- how well answers tell what is asked


def two_sided(seed, *, strength=0.6, lean=0.0, questions=12, framings=2):
    """Log-odds of yes-keyed and no-keyed wordings that differ by 2 * strength but for noise; questions."""
    rng = np.random.default_rng(seed)
    pull, label = rng.normal(0, 1, questions), [q for q in range(questions) for _ in range(framings)]
    yes, no = (
        np.array([sign * strength + pull[q] + lean + rng.normal(0, 0.7) for q in label]) for sign in (1, -1)
    )
    return yes, no, label


def test_discrimination_equals_counting_by_hand():
    yes, no, label = two_sided(0)
    yes[3] = no[3]  # a tie is half of a win
    found = stats.discrimination(yes, no, label)
    wins = [1.0 if y > n else 0.5 if y == n else 0.0 for y, n in zip(yes, no, strict=True)]
    assert found.pairs == pytest.approx(sum(wins) / len(wins)) and found.n == 12
    above = [1.0 if y > n else 0.5 if y == n else 0.0 for y in yes for n in no]
    assert found.auc == pytest.approx(sum(above) / len(above))
    assert found.d_prime == pytest.approx(math.sqrt(2) * np.mean(yes - no) / np.std(yes - no))


def test_discrimination_is_blind_to_a_leaning():
    yes, no, label = two_sided(1)
    leaning = stats.discrimination(yes + 9, no + 9, label)
    assert leaning.to_json() == pytest.approx(stats.discrimination(yes, no, label).to_json(), abs=1e-6)
    assert np.mean([yes + 9 > 0, no + 9 < 0]) == 0.5 and leaning.pairs > 0.75


def test_discrimination_intervals_hold_the_truth_as_often_as_they_say():
    """What normal answers come to: within a question noise of 0.7 differs, between two also their pulls."""
    for strength in (0.0, 0.6):
        within, between = (norm.cdf(2 * strength / math.sqrt(2 * v)) for v in (0.49, 1.49))
        truth = {
            "pairs": within,
            "auc": 23 / 24 * between + 1 / 24 * within,
            "d_prime": math.sqrt(2) * norm.ppf(within),
        }
        hits = {"pairs": 0, "auc": 0, "d_prime": 0}
        for seed in range(60):
            found = stats.discrimination(*two_sided(seed, strength=strength, questions=24))
            for name in hits:
                low, high = (getattr(found, f"{name}_{end}") for end in ("low", "high"))
                hits[name] += low <= truth[name] <= high
        assert min(hits.values()) >= 50, (strength, hits)  # 57 expected; 50 is 4 binomial errors below


def test_repeated_framings_make_discrimination_no_surer():
    yes, no, label = two_sided(2, framings=1)
    once, thrice = (stats.discrimination(*(np.repeat(v, k) for v in (yes, no, label))) for k in (1, 3))
    assert (thrice.pairs_low, thrice.pairs_high) == pytest.approx((once.pairs_low, once.pairs_high))
    assert thrice.d_prime_low == pytest.approx(once.d_prime_low) and thrice.n == once.n == 12


def test_discrimination_where_it_is_undefined():
    assert stats.discrimination([], [], []) == stats.Discrimination()
    same = stats.discrimination(
        [1.0, 2.0, 0.1 + 0.2], [0.0, 1.0, 0.3 - 1.0], "abc"
    )  # differ by 1, all of them
    assert same.pairs == 1 and same.pairs_low is None and same.d_prime is None
    tied = stats.discrimination([0.1 + 0.2, 1.0], [0.3, 1.0], "ab")  # equal but for the last bit
    assert tied.pairs == 0.5 and tied.d_prime is None
    alone = stats.discrimination([1.0, 2.0], [0.0, 3.0], "aa")
    assert alone.pairs == 0.5 and alone.pairs_low is alone.auc_low is alone.d_prime_low is None
    dumps(alone.to_json())
    with pytest.raises(ValueError, match="a question for each pair"):
        stats.discrimination([1.0], [0.0, 1.0], "a")


@pytest.mark.parametrize("resamples", [999, 9999])
@pytest.mark.parametrize("n", [2, 5, 12, 33])
def test_sign_flips_are_scipys_permutation_test_with_the_same_seed(n, resamples):
    rng = np.random.default_rng(n)
    old = rng.normal(size=n)
    for seed, new in enumerate((old + 0.3 * rng.normal(size=n), old + 0.2, np.round(old), old)):
        scale = np.abs([old, new]).max()
        slow = scipy_stats.permutation_test(
            (new, old),
            lambda x, y, axis, scale=scale: stats.snapped(np.mean(x - y, axis=axis), scale),
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            rng=seed,
        )
        assert stats.sign_flip_p_value(new - old, scale, resamples, seed) == slow.pvalue


def test_three_measures_of_telling_apart_are_each_bootstrapped_as_by_itself():
    rng = np.random.default_rng(3)
    yes, no = rng.normal(0.5, 1, 24), rng.normal(size=24)
    made = stats.discrimination(yes, no, [k // 2 for k in range(24)], seed=5)
    shares = [(yes > no)[2 * q : 2 * q + 2].mean() for q in range(12)]
    alone = stats.bootstrap_ci(shares, seed=5)
    assert (made.pairs, made.pairs_low, made.pairs_high) == pytest.approx(
        (alone.value, alone.low, alone.high)
    )


# ---------------------------------------------------------------- the same numbers as scipy.stats


def ends(interval):
    return interval.confidence_interval.low, interval.confidence_interval.high


@pytest.mark.parametrize("n", [5, 24])
def test_a_bootstrap_is_scipys_with_the_same_seed(n):
    values = np.random.default_rng(n).gamma(1, size=n)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=700, method="BCa", rng=3)
    ours = stats.bootstrap_ci(values, resamples=700, seed=3)
    assert (ours.low, ours.high) == pytest.approx(ends(theirs), rel=1e-9) and ours.method == "bca"
    clustered = stats.bootstrap_ci(values, np.median, range(n), resamples=700, seed=3)
    theirs = scipy_stats.bootstrap((values,), np.median, n_resamples=700, method="BCa", rng=3)
    assert (clustered.low, clustered.high) == pytest.approx(ends(theirs), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_resample_that_is_the_whole_in_another_order_ties_with_it(seed):
    """One in 26 of five units is. Of whole numbers their means are equal, so of tenths they must be."""
    rng = np.random.default_rng(seed)
    before, after, weights = rng.integers(1, 50, (3, 5)).astype(float)
    whole, tenths = (stats.perplexity_contrast(before * x, after * x, weights) for x in (1.0, 0.1))
    assert (tenths.low, tenths.high) == pytest.approx((whole.low / 10, whole.high / 10), rel=1e-9)
    yes, no = rng.integers(-20, 20, (2, 5)).astype(float)
    whole, tenths = (stats.discrimination(yes * x, no * x, range(5)) for x in (1.0, 0.1))
    for name, number in whole.to_json().items():
        found = getattr(tenths, name)
        assert found is number is None or found == pytest.approx(number, rel=1e-9), name


def test_an_area_is_scipys_mann_whitney_resampled_with_the_same_seed():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(0.5, 1, 12).round(1), rng.normal(0, 1, 9).round(1)

    def area(x, y, axis=-1):
        return scipy_stats.mannwhitneyu(x, y, axis=axis).statistic / (x.shape[axis] * y.shape[axis])

    expected = scipy_stats.bootstrap((ours, theirs), area, n_resamples=500, method="percentile", rng=4)
    found = stats.auroc(ours.tolist(), theirs.tolist(), resamples=500, seed=4)
    assert found.value == pytest.approx(area(ours, theirs))
    assert (found.low, found.high) == pytest.approx(ends(expected), rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_tests_of_counts_are_scipys(seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 12, (2, 2)).tolist()
    assert stats.fisher_p_value(table) == pytest.approx(scipy_stats.fisher_exact(table).pvalue)
    k, n = int(rng.integers(0, 20)), 20
    theirs = scipy_stats.binomtest(k, n).proportion_ci(method="wilson")
    ours = stats.wilson_interval(k, n)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    before, after = rng.integers(0, 2, (2, 30))
    gained, lost = int((after > before).sum()), int((after < before).sum())
    contrast = stats.mcnemar_exact(before.tolist(), after.tolist())
    assert contrast.p_value == pytest.approx(scipy_stats.binomtest(gained, gained + lost).pvalue)


@pytest.mark.parametrize("seed", range(4))
def test_a_rank_correlation_is_scipys(seed):
    x, y = np.random.default_rng(seed).normal(size=(2, 15)).round(1)
    theirs = scipy_stats.spearmanr(x, y, alternative="greater").pvalue
    assert detection._rank_p_value(curve.ranks(x), curve.ranks(y)) == pytest.approx(theirs)


def test_counting_or_picking_makes_the_same_resamples():
    picked = [row for part in stats._picks(7, 50, 2) for row in part]
    assert [np.bincount(row, minlength=7).tolist() for row in picked] == stats._copies(7, 50, 2).tolist()


@pytest.mark.parametrize("n", [1, 2, 7, 2000])
def test_a_quantile_is_numpys_to_the_bit(n):
    rng = np.random.default_rng(n)
    for values in (rng.normal(size=n), np.round(rng.normal(size=n)), 1e-9 * rng.normal(size=n)):
        ordered = np.sort(values)
        for share in (0.0, 1.0, 0.5, 0.025, 0.975, 1 / 3, *rng.random(40)):
            assert stats.quantile(ordered, share) == np.quantile(ordered, share)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_undefined_values_have_no_quantile(wrong):
    assert math.isnan(stats.quantile(np.sort([1.0, wrong, 2.0]), 0.5))
    assert math.isnan(stats.quantile(np.array([1.0, 2.0]), wrong))
