"""Yes/No readings, contrasts, intervals and corrections: numbers in, numbers out (numpy and scipy only).

Everything is deterministic: whatever is random takes a seed. Every result is a frozen dataclass whose
`to_json()` holds only finite floats, ints, strings, booleans, lists and None. Log-odds are in nats. Bad input
raises ValueError.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import numpy as np
from scipy import special

Numbers = Sequence[float] | np.ndarray
MASS_FLOOR = 0.01  # under 1% of the next-token mass on Yes+No, their ratio is not an answer


def plain(value) -> Any:
    """The same value for JSON: numpy types unwrapped, dataclasses as dictionaries, and every NaN or infinity
    turned into None."""
    # by type and the commonest first: a thousand rows of a comparison are a hundred thousand values
    kind = type(value)
    if value is None or kind is str or kind is int or kind is bool:
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field: plain(getattr(value, field)) for field in value.__dataclass_fields__}
    return plain(value.item()) if isinstance(value, np.generic) else value


def snapped(values, scale: float | None = None) -> np.ndarray:
    """`values` on a grid of 2**-40 of their scale, so that what is equal but for rounding becomes equal.

    Sums differ in their last bits between processors (OpenBLAS picks a kernel for each); a rank or a
    comparison with an observed statistic must not turn on that. `scale`: the largest magnitude that went into
    the values, by default their own.
    """
    values = np.asarray(values, dtype=float)
    if scale is None:
        scale = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(initial=0.0)
    if not scale or not math.isfinite(scale):
        return values
    grid = 2.0 ** (math.frexp(scale)[1] - 40)  # a power of two: dividing by it is exact
    return np.round(values / grid) * grid


class Json:
    """A dataclass that turns into plain JSON. The string under a field is its description in a schema."""

    # read by pydantic, where a schema is made of such dataclasses (analysis/comparison.py)
    __pydantic_config__ = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
        "json_schema_serialization_defaults_required": True,
    }

    def to_json(self) -> dict:
        assert is_dataclass(self) and not isinstance(self, type), "only dataclasses inherit this"
        return plain(self)


def log_odds_from_logprobs(logprobs: np.ndarray, yes_ids: Sequence[int], no_ids: Sequence[int]) -> dict:
    """Read Yes/No answers off next-token log-probabilities [n, vocab] (nats; renormalized here in float64).

    `yes_ids`, `no_ids`: token ids of all spellings. Returns arrays [n]: `log_odds` (summed Yes over summed
    No), `p_yes`, `p_no`, `mass` (their sum), `p_yes_normalized`, `entropy` (nats, whole vocabulary), and the
    booleans `finite` (usable, with finite log-odds) and `answered` (finite, and mass >= MASS_FLOOR). What a
    destroyed model leaves undefined is NaN here and None in `readings_to_json`; nothing raises on it.
    """
    logprobs = np.asarray(logprobs)
    yes, no = np.unique(np.asarray(yes_ids, dtype=int)), np.unique(np.asarray(no_ids, dtype=int))
    if logprobs.ndim != 2 or not len(yes) or not len(no):
        raise ValueError(
            "log-odds need [n, vocab] log-probabilities and at least one token id for Yes and for No"
        )
    if set(yes) & set(no) or min(yes[0], no[0]) < 0 or max(yes[-1], no[-1]) >= logprobs.shape[1]:
        raise ValueError("Yes and No token ids must differ from each other and lie inside the vocabulary")
    names = ["log_odds", "p_yes", "p_no", "mass", "p_yes_normalized", "entropy"]
    out = {name: np.full(len(logprobs), np.nan) for name in names}
    # a row at a time: float64 copies of a whole batch of 150k-token rows are large
    for i, row in enumerate(logprobs):
        if not np.isfinite(row.max()):  # NaN or +inf somewhere, or -inf everywhere
            continue
        row = row.astype(np.float64)
        row -= row.max()
        # once: a row of 152,064 takes a seventh of the time (0.43 ms; with log_softmax and entr 3.05)
        p = np.exp(row)
        total = p.sum()
        log_yes, log_no = (special.logsumexp(row[ids]) - np.log(total) for ids in (yes, no))
        out["p_yes"][i], out["p_no"][i] = np.exp(log_yes), np.exp(log_no)
        out["mass"][i] = min(1.0, out["p_yes"][i] + out["p_no"][i])
        # where p is 0, so that 0 * -inf is 0
        out["entropy"][i] = np.log(total) - p @ np.maximum(row, -1e4) / total
        if np.isfinite(log_yes) and np.isfinite(log_no):
            out["log_odds"][i] = log_yes - log_no
            out["p_yes_normalized"][i] = special.expit(log_yes - log_no)
    out["finite"] = np.isfinite(out["log_odds"])
    out["answered"] = out["finite"] & (np.nan_to_num(out["mass"]) >= MASS_FLOOR)
    return out


def readings_to_json(readings: dict[str, np.ndarray]) -> list[dict]:
    """One JSON-ready dictionary per prompt from `log_odds_from_logprobs`; what is undefined is None."""
    return [plain(dict(zip(readings, row, strict=True))) for row in zip(*readings.values(), strict=True)]


@dataclass(frozen=True)
class Estimate(Json):
    """A value with its interval, from `n` independent units (questions, texts, items); None where undefined.

    For a paired contrast `value` is after - before, with both sides and the two-sided p-value.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: str
    before: float | None = None
    after: float | None = None
    p_value: float | None = None


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> Estimate:
    """k successes of n with the Wilson (1927) score interval; no value if n = 0."""
    if not 0 <= k <= n:
        raise ValueError(f"{k} successes of {n} is not a proportion")
    if n == 0:
        return Estimate(None, None, None, 0, "wilson")
    return Estimate(k / n, *_wilson(k, n, confidence), int(n), "wilson")


def _wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Ends of the Wilson interval of k successes of n, at least one."""
    z = float(special.ndtri(0.5 + confidence / 2))
    center, reach = k + z**2 / 2, z * math.sqrt(k * (n - k) / n + z**2 / 4)
    # in rounding alone these ends are not exact
    low = 0.0 if k == 0 else (center - reach) / (n + z**2)
    return low, 1.0 if k == n else (center + reach) / (n + z**2)


def accuracy(answers: Sequence, truths: Sequence) -> Estimate:
    """Share of answers equal to their truth, with its Wilson interval."""
    return wilson_interval(sum(a == t for a, t in zip(answers, truths, strict=True)), len(truths))


def _mean(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=-1)


def bootstrap_ci(
    values: Sequence | np.ndarray,
    statistic: Callable[[np.ndarray], float | np.ndarray] = _mean,
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """`statistic` of `values` ([n] or [n, ...] rows) with its BCa interval (Efron 1987), percentile if BCa is
    undefined.

    Whole clusters (questions) are resampled if given, else rows. One cluster, or a statistic that no resample
    moves, has no interval: low and high are None then.
    """
    data = np.asarray(values, dtype=float)
    rows: dict[Hashable, list[int]] = {}
    for i, label in zip(range(len(data)), range(len(data)) if clusters is None else clusters, strict=True):
        rows.setdefault(label, []).append(i)
    members, n = list(rows.values()), len(rows)
    if statistic is _mean and n == len(data) and data.ndim == 1:
        return _weighted_mean(data, np.ones(n), confidence=confidence, resamples=resamples, seed=seed)
    value = float(statistic(data)) if n else math.nan
    if n < 2 or not math.isfinite(value):
        return Estimate(plain(value), None, None, n, "none")
    made = [
        statistic(data[np.concatenate([members[i] for i in row])])
        for part in _picks(n, resamples, seed)
        for row in part
    ]
    low, high, draws = _bca(np.array(made, dtype=float)[None], n, confidence)
    return _estimate(value, draws[0], low[0], high[0], n, data, confidence)


def _weighted_mean(
    values: np.ndarray,
    weights: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """The mean of `values` [n] by `weights` [n] with its BCa interval, from the same resamples as
    `bootstrap_ci`: how often each value is in them is multiplied, instead of copying it that often."""
    n = len(values)
    value = float(np.average(values, weights=weights)) if n else math.nan
    if n < 2 or not math.isfinite(value):
        return Estimate(plain(value), None, None, n, "none")
    sums = _copies(n, resamples, seed) @ np.column_stack([weights * values, weights])
    low, high, draws = _bca((sums[:, 0] / sums[:, 1])[None], n, confidence)
    return _estimate(value, draws[0], low[0], high[0], n, values, confidence)


def _bca(values: np.ndarray, n: int, confidence: float) -> tuple[list[float], list[float], np.ndarray]:
    """(lower ends, upper ends, what each resample gave [statistics, resamples]) of statistics of n units: the
    BCa intervals (Efron 1987), NaN where one is undefined.

    `values` [statistics, resamples + 1 + n]: of the resamples, of the whole, and of the whole without each
    unit. The numbers are those of scipy.stats.bootstrap with the same seed; importing scipy.stats takes
    longer than reading a run of 68 experiments.
    """
    draws, value, without = values[:, : -n - 1], values[:, -n - 1, None], values[:, -n:]
    with np.errstate(all="ignore"):  # a degenerate one is NaN, seen to in _estimate
        # a resample that is the whole in another order ties with it, which its last bits must not decide
        near = 1e-12 * np.abs(draws).max(-1, keepdims=True)
        below = (draws < value - near).sum(-1) + (draws <= value + near).sum(-1)
        bias = special.ndtri(below / (2 * draws.shape[-1]))
        pulls = (n - 1) * (without.mean(-1, keepdims=True) - without)
        skew = (pulls**3).sum(-1) / n**3 / (6 * ((pulls**2).sum(-1) / n**2) ** 1.5)
        z = special.ndtri((1 - confidence) / 2)
        low, high = (special.ndtr(bias + (bias + side) / (1 - skew * (bias + side))) for side in (z, -z))
    ordered = np.sort(draws)
    lower, upper = (
        [quantile(row, float(share)) for row, share in zip(ordered, of, strict=True)] for of in (low, high)
    )
    return lower, upper, draws


def quantile(ordered: np.ndarray, share: float) -> float:
    """The quantile of ascending values [n] at a share, to the bit what numpy.quantile gives, which takes a
    tenth of a millisecond; NaN at NaN, and of values with NaN or infinity."""
    last = len(ordered) - 1
    if not all(map(math.isfinite, (share, ordered[0], ordered[last]))):
        return math.nan
    place = share * last
    below = math.floor(place)
    low, high = float(ordered[below]), float(ordered[min(below + 1, last)])
    step, beyond = high - low, place - below
    return low + step * beyond if beyond < 0.5 else high - step * (1 - beyond)


# Bootstrap resamples, the whole, and the whole without each: [resamples, n], [1, n], [n, n - 1]
Samples = tuple[np.ndarray, np.ndarray, np.ndarray]


@functools.lru_cache(maxsize=8)
def _picks(n: int, resamples: int, seed: int) -> Samples:
    """Samples of n units as the numbers of those that are in them. They depend on nothing else, so that a
    run's experiments share them."""
    every = np.arange(n)
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    return drawn, every[None], np.tile(every, (n, 1))[~np.eye(n, dtype=bool)].reshape(n, n - 1)


@functools.lru_cache(maxsize=8)
def _copies(n: int, resamples: int, seed: int) -> np.ndarray:
    """The same samples, one after the other, as how often each of the n units is in them
    [resamples + 1 + n, n]."""
    drawn = _picks(n, resamples, seed)[0] + n * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    return np.vstack([counts.astype(float), np.ones((1, n)), 1 - np.eye(n)])


def _estimate(
    value: float, draws: np.ndarray, low: float, high: float, n: int, data: np.ndarray, confidence: float
) -> Estimate:
    """A value with its BCa ends, or the percentiles of its draws where these are undefined; without an
    interval where no draw moved it."""
    draws = draws[np.isfinite(draws)]
    if not len(draws) or _still(draws, data):
        return Estimate(value, None, None, n, "none")
    method = "bca"
    if not (math.isfinite(low) and math.isfinite(high)):
        (low, high), method = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2]), "percentile"
    return Estimate(value, float(low), float(high), n, method)


def _still(draws: np.ndarray, values: np.ndarray) -> bool:
    """No resample moved the statistic by more than rounding (1e-12 of what went into it)."""
    return bool(
        np.ptp(draws)
        <= 1e-12 * max(1.0, np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max())
    )


def paired_difference(before: Numbers, after: Numbers, *, resamples: int = 9999, seed: int = 0) -> Estimate:
    """Mean of after - before over questions (one value each, same order), bootstrapped over questions.

    p-value: two-sided sign-flip permutation test, exact where 2**n <= resamples; without an effect, each
    difference is assumed as likely to have the other sign.
    """
    old, new = _paired(before, after)
    difference = bootstrap_ci(new - old, seed=seed)
    if difference.value is None:
        return difference
    p = sign_flip_p_value(new - old, np.abs([old, new]).max(), resamples, seed)
    return replace(difference, before=float(old.mean()), after=float(new.mean()), p_value=p)


def sign_flip_p_value(differences: np.ndarray, scale: float, resamples: int, seed: int) -> float:
    """What scipy.stats.permutation_test gives for the mean of paired `differences` [n], two-sided, with
    permutation_type="samples" and the same seed; exact where 2**n <= resamples.

    The signs that are drawn depend on n, `resamples` and the seed alone, so that a run's experiments share
    them. `scale`: the largest magnitude that went into the differences.
    """
    signs, exact = _signs(len(differences), resamples, seed)
    # the sum of each eight under all of their signs, of which every flip adds up its own
    sums = [EIGHT[:, : len(eight)] @ eight for eight in np.split(differences, range(8, len(differences), 8))]
    total = np.zeros(signs.shape[1])
    for of, which in zip(sums, signs, strict=True):
        total += of.take(which, mode="clip")  # no byte is over 255, and "raise" would look
    # a flip that ties with the observed mean must tie in its last bit, too
    null = snapped(total / len(differences), scale)
    observed = float(snapped(differences.mean(), scale))
    near = abs(100 * np.finfo(float).eps * observed)
    beyond = min(np.count_nonzero(null <= observed + near), np.count_nonzero(null >= observed - near))
    extra = 0 if exact else 1
    return float(min(1.0, 2 * (beyond + extra) / (signs.shape[1] + extra)))


# 1.0 where a bit of 0 to 255 is 0, else -1.0; the highest bit first [256, 8]
EIGHT = 1.0 - 2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)


@functools.lru_cache(maxsize=32)  # 100 kB for 16 values; experiments answer different numbers of questions
def _signs(n: int, resamples: int, seed: int) -> tuple[np.ndarray, bool]:
    """(signs of n values, eight in a byte, where a bit says that one is swapped [bytes, flips]; whether these
    are all that there are)"""
    if exact := 2**n <= resamples:
        swapped = np.array(list(itertools.product((0, 1), repeat=n)))
    else:
        drawn = np.random.default_rng(seed).permuted(np.tile([0, 1], (resamples, n, 1)), axis=-1)
        swapped = drawn[..., 0]
    return np.packbits(swapped.astype(np.uint8), axis=1).T.copy(), exact


def mcnemar_exact(before: Sequence[bool], after: Sequence[bool], *, seed: int = 0) -> Estimate:
    """Difference of paired right/wrong rates, with McNemar's (1947) exact two-sided p-value, of discordant
    items alone."""
    old, new = _paired(before, after)
    gained, lost = int(np.sum(new > old)), int(np.sum(old > new))
    # exact and two-sided: both tails of a fair coin, which are one where they meet
    p = min(1.0, 2 * float(special.bdtr(min(gained, lost), gained + lost, 0.5))) if gained + lost else 1.0
    rates = bootstrap_ci(new - old, seed=seed)
    return replace(rates, before=float(old.mean()), after=float(new.mean()), p_value=p)


def fisher_p_value(table: Sequence[Sequence[int]]) -> float:
    """Two-sided p-value of Fisher's exact test of two rows of two counts: the chance of all tables with its
    margins that are no likelier than it."""
    (a, b), (c, d) = table
    row, column, whole = a + b, a + c, a + b + c + d
    ways = {
        k: math.comb(row, k) * math.comb(whole - row, column - k)
        for k in range(max(0, column + row - whole), min(row, column) + 1)
    }
    return sum(w for w in ways.values() if w <= ways[a]) / math.comb(whole, column)


def _paired(before: Numbers, after: Numbers) -> tuple[np.ndarray, np.ndarray]:
    old, new = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if old.ndim != 1 or old.shape != new.shape or not len(old):
        raise ValueError("a paired comparison needs the same questions on both sides, at least one")
    return old, new


def summarize_gap(
    triggered: Mapping[str, Numbers], untriggered: Mapping[str, Numbers], *, seed: int = 0
) -> Estimate:
    """Triggered (`after`) minus untriggered (`before`) rate in percentage points, from 0/1 outcomes by
    question.

    Questions weigh the same. Where all questions agree (30 of 30 against 0 of 30) the bootstrap has no width;
    the interval is then Newcombe's (1998, method 10) hybrid of two Wilson intervals over questions.
    """
    if triggered.keys() != untriggered.keys() or not all(
        map(len, [*triggered.values(), *untriggered.values()])
    ):
        raise ValueError("both conditions need the same questions, with at least one sample each")
    rates = [[100 * float(np.mean(side[q])) for q in triggered] for side in (untriggered, triggered)]
    gap = paired_difference(*rates, seed=seed)
    if gap.low is None:
        assert gap.value is not None, "shares of outcomes are finite"
        hits = [round(float(np.mean(side)) * gap.n / 100) for side in rates]
        (u_low, u_high), (t_low, t_high) = (_wilson(k, gap.n) for k in hits)
        u, t = (k / gap.n for k in hits)
        down, up = math.hypot(t - t_low, u_high - u), math.hypot(t_high - t, u - u_low)
        gap = replace(gap, low=gap.value - 100 * down, high=gap.value + 100 * up, method="newcombe")
    return gap


def perplexity_contrast(
    nll_before: Numbers, nll_after: Numbers, tokens: Sequence[int], *, seed: int = 0
) -> Estimate:
    """Change of the mean negative log-likelihood in nats a token; `before` and `after` are the two
    perplexities.

    Inputs: each text's mean nats a token, and its length in tokens (its weight). Bootstrap over texts; no
    p-value.
    """
    before, after = _paired(nll_before, nll_after)
    _, weights = _paired(before, tokens)
    with np.errstate(all="ignore"):  # a destroyed model's perplexity overflows: None
        delta = _weighted_mean(after - before, weights, seed=seed)
        sides = [plain(np.exp(np.average(x, weights=weights))) for x in (before, after)]
    return replace(delta, before=sides[0], after=sides[1])


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """Agreement of two raters beyond chance (Cohen 1960), bootstrapped over items; None if all labels are the
    same."""
    codes = {label: i for i, label in enumerate(dict.fromkeys([*a, *b]))}

    def kappa(pairs):
        table = np.zeros((len(codes), len(codes)))
        np.add.at(table, tuple(pairs.astype(int).T), 1 / len(pairs))
        chance = table.sum(axis=0) @ table.sum(axis=1)
        return (np.trace(table) - chance) / (1 - chance) if chance < 1 - 1e-12 else math.nan

    return bootstrap_ci([[codes[x], codes[y]] for x, y in zip(a, b, strict=True)], kappa, seed=seed)


def placebo_place(score: float, placebos: Numbers) -> tuple[float, bool]:
    """(two-sided permutation p-value, whether |score| is beyond every placebo's) of a score among placebo
    scores.

    p = (1 + #{|placebo| >= |score|}) / (1 + n) (Phipson & Smyth 2010): the score is one more draw under the
    null, so that n placebos cannot give less than 1 / (n + 1). Raises ValueError without placebos.
    """
    if not len(placebos):
        raise ValueError("a place among placebos needs placebos")
    distances = snapped(np.abs([score, *placebos]))
    as_far = int(np.count_nonzero(distances[1:] >= distances[0]))
    return (1 + as_far) / (1 + len(placebos)), as_far == 0


def auroc(
    positives: Numbers, negatives: Numbers, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate | None:
    """P(a positive scores above a negative), ties half: Mann-Whitney's U / (n m), with its percentile
    bootstrap interval.

    Either side is resampled by itself. `n` is of both sides; None with fewer than 3 on a side; no interval
    where no resample moves the value (sides that do not overlap: 0 or 1).
    """
    if min(len(positives), len(negatives)) < 3:
        return None
    ours, theirs = np.split(snapped([*positives, *negatives]), [len(positives)])
    # what a pair counts: 1 where the positive is above, half where they tie
    above = 0.5 + 0.5 * np.sign(ours[:, None] - theirs)
    # each side resampled by itself, as scipy.stats.bootstrap does it with this seed
    rng = np.random.default_rng(seed)
    copies = []
    for side in above.shape:
        picked = rng.integers(0, side, (resamples, side)) + side * np.arange(resamples)[:, None]
        copies.append(np.bincount(picked.ravel(), minlength=resamples * side).reshape(resamples, side))
    draws = ((copies[0] @ above) * copies[1]).sum(axis=1) / above.size
    value, n = float(above.mean()), len(ours) + len(theirs)
    if np.ptp(draws) < 1e-12:
        return Estimate(value, None, None, n, "none")
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high), n, "percentile")


@dataclass(frozen=True)
class Discrimination(Json):
    """How well answers tell what is asked, whatever their leaning to Yes or No; None where undefined."""

    pairs: float | None = None
    """Share of pairs of opposite key in which the yes-keyed wording has the higher log-odds, ties half: the
    proportion correct of a two-alternative choice. 0.5 is chance."""
    pairs_low: float | None = None
    """Lower end of its 95% interval, bootstrapped over questions."""
    pairs_high: float | None = None
    """Upper end."""
    auc: float | None = None
    """The same over all yes-keyed against all no-keyed readings: what a question pulls by its topic counts as
    noise."""
    auc_low: float | None = None
    """Lower end of its 95% interval, bootstrapped over questions."""
    auc_high: float | None = None
    """Upper end."""
    d_prime: float | None = None
    """sqrt(2) * mean / standard deviation of the pairs' differences; 0 is chance (Macmillan & Creelman 2005,
    ch. 7: under normality `pairs` is Phi(d' / sqrt(2)))."""
    d_prime_low: float | None = None
    """Lower end of its 95% interval, bootstrapped over questions."""
    d_prime_high: float | None = None
    """Upper end."""
    n: int = 0
    """Questions."""


def discrimination(
    yes_keyed: Numbers,
    no_keyed: Numbers,
    questions: Sequence[Hashable],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Discrimination:
    """`Discrimination` of pairs: log-odds of a wording whose answer is Yes, of its mate whose answer is No,
    and the question that both ask (a unit of the bootstrap: its wordings and framings go together).

    Undefined without pairs; no interval from one question. `d_prime` is undefined where all differences are
    equal. Raises ValueError if the three differ in length.
    """
    yes, no = (np.asarray(side, dtype=float) for side in (yes_keyed, no_keyed))
    if not yes.shape == no.shape == (len(questions),):
        raise ValueError(
            "discrimination needs a yes-keyed and a no-keyed reading and a question for each pair"
        )
    if not len(yes):
        return Discrimination()
    yes, no = np.split(snapped([*yes, *no]), 2)
    # 1) sums over each question's pairs, so that a resample is an index into them
    codes = {label: k for k, label in enumerate(dict.fromkeys(questions))}
    member = np.eye(len(codes))[:, [codes[q] for q in questions]]
    difference = yes - no
    scale = np.abs([yes, no]).max() or 1.0
    wins = 0.5 + 0.5 * np.sign(difference)
    above = 0.5 + 0.5 * np.sign(yes[:, None] - no)
    size, won, total, squares = (member @ v for v in (np.ones(len(yes)), wins, difference, difference**2))
    between = member @ above @ member.T

    # 2) the three statistics of samples of questions, written as how often each is in them [samples, n]
    of_question = np.stack([won, size, total, squares], axis=1)

    def three(copies: np.ndarray) -> np.ndarray:
        right, count, shift, square = (copies @ of_question).T
        area = ((copies @ between) * copies).sum(-1) / count**2
        mean = shift / count
        variance = square / count - mean**2
        spread = np.sqrt(np.where(variance > 1e-12 * scale**2, variance, np.nan))
        return np.stack([right / count, area, math.sqrt(2) * mean / spread])

    # 3) with their intervals, all three from the same resamples
    n, every = len(codes), np.arange(len(codes))
    made = three(_copies(n, resamples, seed) if n > 1 else np.ones((1, n)))
    values = made[:, -n - 1 if n > 1 else 0].tolist()
    resampled = _bca(made, n, 0.95) if n > 1 else None
    intervals = {}
    for k, (name, value) in enumerate(zip(("pairs", "auc", "d_prime"), values, strict=True)):
        if resampled is None or not math.isfinite(value):
            intervals[name] = Estimate(plain(value), None, None, n, "none")
            continue
        lower, upper, draws = resampled
        intervals[name] = _estimate(value, draws[k], lower[k], upper[k], n, every, 0.95)
    ends = {
        name + end: getattr(one, key)
        for name, one in intervals.items()
        for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    return Discrimination(**ends, n=n)


DAMAGE = 0.1  # of the rise in nats per token; noise that does another damage is no match


def share_of_damage(reached: float | None, target: float | None, unmodified: float | None) -> float | None:
    """How far noise raises the mean nats per token above the unmodified model's, as a share of how far an
    experiment does, from three perplexities; None where one is undefined or the experiment raises nothing."""
    if reached is None or target is None or unmodified is None or target <= unmodified:
        return None
    return math.log(reached / unmodified) / math.log(target / unmodified)


def as_damaged(share: float | None) -> bool:
    """Whether noise does as much damage as the experiment that it is matched to, within DAMAGE."""
    return share is not None and abs(share - 1) <= DAMAGE


def holm(pvalues: Sequence[float | None]) -> list[float | None]:
    """Holm (1979) step-down adjusted p-values (family-wise error); None stays None and does not count."""
    out = plain(list(pvalues))
    order = sorted((i for i, p in enumerate(out) if p is not None), key=out.__getitem__)
    rising = np.array([out[i] for i in order]) * np.arange(len(order), 0, -1)
    for i, p in zip(order, np.minimum(1, np.maximum.accumulate(rising)), strict=True):
        out[i] = float(p)
    return out
