"""stats.py against hand-computed values, slow obvious versions, brute-force enumeration, and simulated models."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy.interpolate import CubicSpline

import stats
from stats import Probe, detection_score


def dumps(value):
    return json.dumps(value, allow_nan=False)


# ---------------------------------------------------------------- simulated models for the detection score


def probes_of(change, seed, *, effect=0.0, noise=0.7, controls=24, questions=16, spread=5.0, own=4.0):
    """Baselines of both signs around +-spread; `change(x, rng)` is what the surgery does to any Yes/No answer."""
    rng = np.random.default_rng(seed)
    out = []
    for kind, count, center in (("control", controls, spread), ("introspective", questions, own)):
        sign = np.where(np.arange(count) % 2, 1.0, -1.0)  # the right answer of a control, of a model not noticing
        x = sign * rng.normal(center, 0.6 * center, count)
        y = change(x, rng) + rng.normal(0, noise, count)
        for i in range(count):
            if kind == "control":
                out.append(Probe(f"c{i}", kind, "yes" if sign[i] > 0 else "no", x[i], y[i]))
            else:
                keyed = -sign[i]
                out.append(Probe(f"q{i}", kind, "yes" if keyed > 0 else "no", x[i], y[i] + keyed * effect))
    return out


INNOCENT = {
    "drift": lambda x, r: x + 3,
    "shrink": lambda x, r: 0.4 * x,
    "drift and shrink": lambda x, r: 0.3 * x + 2,
    "sharper temperature": lambda x, r: 1.6 * x,
    "shrink and noise": lambda x, r: 0.5 * x + r.normal(0, 1.5, x.shape),
    "uneven shrink": lambda x, r: x * r.normal(0.6, 0.25, x.shape),
    "heavy-tailed noise": lambda x, r: 0.6 * x + r.standard_t(2.5, x.shape),
    "random answers": lambda x, r: r.normal(0, 3, x.shape),
    "soft saturation": lambda x, r: 3 * np.tanh(x / 3),
    "hard clipping": lambda x, r: np.clip(x, -3, 3),
    "saturation after drift": lambda x, r: 4 * np.tanh((x + 3) / 4),
}


LINEAR = ("drift", "shrink", "sharper temperature")  # the same numbers as "drift and shrink": the score is equivariant


@pytest.mark.parametrize("name", [name for name in INNOCENT if name not in LINEAR])
def test_no_general_change_of_answers_is_taken_for_detection(name):
    found = [detection_score(probes_of(INNOCENT[name], seed), resamples=199, seed=seed) for seed in range(150)]
    scored = [f for f in found if f.score is not None]
    assert len(scored) >= 138
    scores = np.array([f.score for f in scored])
    assert abs(scores.mean()) < 0.1 + 3 * scores.std() / math.sqrt(len(scores))
    rate = np.mean([f.p_value < 0.05 for f in scored])
    cover = np.mean([f.low <= 0 <= f.high for f in scored])
    called = np.mean([f.verdict in ("detects", "denies") for f in found])
    assert rate <= 0.11 and cover >= 0.89 and called <= 0.11, (rate, cover, called)  # 0.05 + 3.3 binomial errors


@pytest.mark.parametrize(("effect", "noise", "power"), [(1.0, 0.5, 0.95), (1.5, 1.0, 0.85), (2.0, 1.0, 0.95)])
def test_a_keyed_shift_is_found_on_top_of_drift_and_shrink(effect, noise, power):
    for sign, verdict in ((1, "detects"), (-1, "denies")):
        cases = (probes_of(INNOCENT["drift and shrink"], s, effect=sign * effect, noise=noise) for s in range(60))
        found = [detection_score(p, resamples=199) for p in cases]
        assert np.mean([f.verdict == verdict for f in found]) >= power
        scored = [f for f in found if f.score is not None]
        assert np.mean([f.score for f in scored]) == pytest.approx(sign * effect, abs=0.15)
        assert np.mean([f.low <= sign * effect <= f.high for f in scored]) > 0.85


def test_few_controls_make_many_questions_no_surer():
    """With 60 questions on 14 controls the uncertainty is that of the control curve."""
    cases = (probes_of(INNOCENT["shrink"], s, controls=14, questions=60, own=3.0) for s in range(150))
    found = [f for f in (detection_score(p, resamples=199) for p in cases) if f.score is not None]
    assert np.mean([f.low <= 0 <= f.high for f in found]) >= 0.88 and np.mean([f.p_value < 0.05 for f in found]) <= 0.11


@pytest.mark.parametrize("name", LINEAR)
def test_a_noiseless_general_change_scores_nothing(name):
    found = detection_score(probes_of(INNOCENT[name], 0, noise=0))
    assert found.score == pytest.approx(0, abs=1e-6) and found.verdict == "no evidence" and found.low < 0 < found.high
    expected = {"drift": (3, 0), "shrink": (0, -0.6), "sharper temperature": (0, 0.6)}[name]
    assert (found.drift, found.flattening) == pytest.approx(expected, abs=1e-9)


def naive_spline_prediction(x, y, knots, at):
    """Least squares on cardinal natural splines, another basis of the same space, extended straight."""
    spline = CubicSpline(knots, np.eye(len(knots)), bc_type="natural")

    def basis(values):
        rows = []
        for v in values:
            edge = min(max(v, knots[0]), knots[-1])
            rows.append(spline(edge) + (v - edge) * spline(edge, 1))
        return np.array(rows)

    return basis(at) @ np.linalg.lstsq(basis(x), y, rcond=None)[0]


@pytest.mark.parametrize("controls", [14, 24])
def test_the_score_equals_a_slow_fit_in_another_basis(controls):
    probes = probes_of(INNOCENT["soft saturation"], 5, effect=1.2, controls=controls, own=3.0)
    found = detection_score(probes)
    c = [p for p in probes if p.kind == "control"]
    x, y = np.array([p.baseline for p in c]), np.array([p.modified - p.baseline for p in c])
    knots = np.quantile(x, [0.05, 0.25, 0.42, 0.58, 0.75, 0.95] if controls >= 20 else [0.1, 0.4, 0.6, 0.9])
    halves = {"yes": [], "no": []}
    ordered = sorted(x)
    for p in probes:
        if p.kind != "introspective":
            continue
        below, above = [v for v in ordered if v <= p.baseline], [v for v in ordered if v > p.baseline]
        near = min(abs(v - p.baseline) for v in ordered) <= 0.05 * (ordered[-1] - ordered[0])
        if near or (below and above and above[0] - below[-1] <= 0.25 * (ordered[-1] - ordered[0])):
            residual = p.modified - p.baseline - naive_spline_prediction(x, y, knots, [p.baseline])[0]
            halves[p.keyed].append(residual if p.keyed == "yes" else -residual)
    assert found.n_introspective == len(halves["yes"]) + len(halves["no"])
    assert found.score == pytest.approx((np.mean(halves["yes"]) + np.mean(halves["no"])) / 2, abs=2e-3)


def changed(probes, change, kinds=("control", "introspective")):
    return [stats.replace(p, modified=change(p)) if p.kind in kinds else p for p in probes]


def test_adding_drift_and_flattening_to_everything_leaves_the_score_alone():
    probes = probes_of(INNOCENT["uneven shrink"], 3, effect=1.0)[:-1]
    probes = [p for p in probes if p.id not in ("q0", "q2", "q4")]  # unequal halves still cancel what is common
    plain = detection_score(probes)
    moved = detection_score(changed(probes, lambda p: p.modified + 5 - 0.3 * p.baseline))
    own_drift = detection_score(changed(probes, lambda p: p.modified + 4, kinds=("introspective",)))
    for other in (moved, own_drift):
        assert (other.score, other.low, other.high, other.p_value) == pytest.approx(
            (plain.score, plain.low, plain.high, plain.p_value), abs=1e-6)  # fmt: skip
    assert moved.raw_contrast != pytest.approx(plain.raw_contrast, abs=0.1)


def test_each_framing_gets_its_own_drift_and_flattening():
    rng = np.random.default_rng(0)

    def two_framings(extra):
        out = []
        for framing, a, k in (("plain", 0.0, 1.0), ("informed", 4.0, 0.2)):
            for p in probes_of(lambda x, r: x, 1, noise=0, controls=extra, questions=8 if framing == "plain" else 16):
                value = a + k * p.baseline + rng.normal(0, 0.3)
                out.append(stats.replace(p, id=f"{framing} {p.id}", framing=framing, modified=value))
        return out

    assert detection_score(two_framings(24)).score == pytest.approx(0, abs=0.3)
    pooled = two_framings(24)
    informed = [p for p in pooled if p.framing == "informed" and p.kind == "control"]
    pooled = [p for p in pooled if p not in informed[7:]]
    assert any("framings pooled" in flag for flag in detection_score(pooled).flags)


def test_pairs_are_kept_together():
    """Every probe asked twice with the same answers is no more evidence than once."""
    once = probes_of(INNOCENT["drift and shrink"], 2, effect=0.8, noise=1.0)
    twice = [stats.replace(p, id=f"{p.id}{copy}", pair=p.id) for p in once for copy in "ab"]
    alone = [stats.replace(p, pair=None) for p in twice]
    widths = [(f.high - f.low) for f in map(detection_score, (once, twice, alone))]
    assert widths[1] == pytest.approx(widths[0], rel=0.2) and widths[2] < 0.85 * widths[1]


def test_flattening_of_introspective_answers_alone_is_owned_up_to():
    probes = changed(probes_of(lambda x, r: x, 4), lambda p: 0.2 * p.baseline, kinds=("introspective",))
    found = detection_score(probes)
    assert found.verdict == "detects" and found.flattening_to_explain == pytest.approx(0.8, abs=0.1)
    assert found.keyed_after < 0 and any("did not reverse" in flag for flag in found.flags)
    reversed_answers = changed(probes, lambda p: -0.5 * p.baseline, kinds=("introspective",))
    assert detection_score(reversed_answers).flattening_to_explain > 1


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("not finite", lambda ps: changed(ps, lambda p: math.nan)),
        ("not finite", lambda ps: changed(ps, lambda p: None, kinds=("introspective",))),
        ("not finite", lambda ps: changed(ps, lambda p: 1e300)),
        ("vanishing", lambda ps: [stats.replace(p, modified_mass=1e-4) for p in ps]),
        ("too few", lambda ps: ps[:9] + ps[24:]),
        ("too few", lambda ps: ps[:30]),
        ("too few", lambda ps: [p for p in ps if p.kind == "control"]),
        ("too few", lambda ps: []),
        ("like the controls", lambda ps: [stats.replace(p, baseline=p.baseline * (1 + 9 * (p.id[0] == "q"))) for p in ps]),
        ("collapsed", lambda ps: changed(ps, lambda p: 1.5)),
        ("collapsed", lambda ps: changed(ps, lambda p: -p.modified)),
    ],
)
def test_what_cannot_be_measured_says_why(reason, change):
    found = detection_score(change(probes_of(INNOCENT["shrink"], 0)))
    assert found.verdict == "not measurable" and reason in found.reason
    dumps(found.to_json())


def test_detection_is_deterministic_and_json_is_plain():
    first, again, other = (detection_score(probes_of(INNOCENT["shrink"], 1), seed=s) for s in (4, 4, 5))
    assert first == again and first.low != other.low and first.score == other.score
    probes = probes_of(INNOCENT["shrink"], 0, effect=1)
    assert json.loads(dumps(detection_score(probes).to_json()))["verdict"] == "detects"
    assert dumps(stats.replace(probes[0], modified=math.inf).to_json())
    lost = detection_score([stats.replace(probes[0], modified=None), *probes[1:]])
    assert lost.verdict == "detects" and "1 modified" in lost.flags[0]
    with pytest.raises(ValueError, match="unique"):
        detection_score([*probes, probes[0]])
    with pytest.raises(ValueError, match="kind"):
        Probe("x", "other", "yes", 0.0, 0.0)


def test_an_effect_below_the_measuring_step_is_not_called():
    found = detection_score(probes_of(lambda x, r: x, 0, effect=0.08, noise=0.01))
    assert found.p_value < 0.01 and found.low > 0 and found.verdict == "no evidence"


def test_verdicts_are_corrected_over_a_family():
    strong = detection_score(probes_of(INNOCENT["drift"], 0, effect=3))
    weak = stats.replace(strong, score=0.5, low=0.1, high=0.9, p_value=0.03)
    broken = detection_score([])
    out = stats.correct_verdicts([strong, weak, broken])
    assert [s.verdict for s in out] == ["detects", "detects", "not measurable"] and out[2].p_adjusted is None
    straddling = stats.replace(strong, score=0.5, low=-0.1, high=1.1, p_value=0.001)
    assert stats.correct_verdicts([straddling])[0].verdict == "no evidence"
    out = stats.correct_verdicts([weak, weak])
    assert [s.p_adjusted for s in out] == [0.06, 0.06] and out[0].verdict == "no evidence"


# ---------------------------------------------------------------- Yes/No readings


def test_readings_equal_a_slow_sum():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, size=(5, 50)).astype(np.float32)
    yes, no = [3, 7, 7], [11]
    got = stats.log_odds_from_logprobs(logits, yes, no)
    for i, row in enumerate(logits.tolist()):
        total = math.fsum(math.exp(v) for v in row)
        p = [math.exp(v) / total for v in row]
        p_yes, p_no = p[3] + p[7], p[11]
        want = dict(p_yes=p_yes, p_no=p_no, mass=p_yes + p_no, p_yes_normalized=p_yes / (p_yes + p_no),
                    log_odds=math.log(p_yes / p_no), entropy=-math.fsum(v * math.log(v) for v in p))  # fmt: skip
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
    assert got["finite"].tolist() == [False] * 5 + [True, True] and got["answered"].tolist() == [False] * 6 + [True]
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
    assert (repeated.value, repeated.low, repeated.high) == pytest.approx((alone.value, alone.low, alone.high))
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
    assert stats.benjamini_hochberg(p) == pytest.approx([0.02, 0.04, None, 0.04, 0.02, None])
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
    assert (got.value, got.low, got.high) == pytest.approx((100, 100 - 100 * math.hypot(missing, missing), 100))
    assert got.method == "newcombe" and got.p_value < 1e-3
    mixed = stats.summarize_gap({q: [1, i % 2] for i, q in enumerate(questions)}, {q: [0, 0, 0] for q in questions})
    assert (mixed.before, mixed.after, mixed.value) == pytest.approx((0, 75, 75)) and mixed.low < 75 < mixed.high
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
