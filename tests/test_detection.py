"""The detection score against simulated models, a slow fit in another basis, and everything that must not
move it."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from analysis.detection import (
    Probe,
    correct_calls,
    detection_score,
    keyed_shift,
    scaling_that_explains,
    scaling_to_explain,
    yes_drift,
)


def dumps(value):
    return json.dumps(value, allow_nan=False)


def probes_of(change, seed, *, effect=0.0, noise=0.7, controls=24, questions=16, spread=5.0, own=4.0):
    """Baselines of both signs around +-spread; `change(x, rng)` is what the surgery does to any Yes/No
    answer."""
    rng = np.random.default_rng(seed)
    out = []
    for kind, count, center in (("control", controls, spread), ("introspective", questions, own)):
        # the right answer of a control, of a model not noticing
        sign = np.where(np.arange(count) % 2, 1.0, -1.0)
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
    "growth and noise": lambda x, r: 1.7 * x + r.normal(0, 1.5, x.shape),
    "uneven growth": lambda x, r: x * r.normal(1.6, 0.3, x.shape),
    "growth that saturates": lambda x, r: 6 * np.tanh(2 * x / 6),
}


# the same numbers as "drift and shrink": the score is equivariant
LINEAR = (
    "drift",
    "shrink",
    "sharper temperature",
)


@pytest.mark.parametrize("name", [name for name in INNOCENT if name not in LINEAR])
def test_no_general_change_of_answers_is_taken_for_detection(name):
    found = [detection_score(probes_of(INNOCENT[name], seed), resamples=99, seed=seed) for seed in range(100)]
    scored = [f for f in found if f.score is not None]
    assert len(scored) >= 92
    scores = np.array([f.score for f in scored])
    assert abs(scores.mean()) < 0.1 + 3 * scores.std() / math.sqrt(len(scores))
    rate = np.mean([f.p_value < 0.05 for f in scored])
    cover = np.mean([f.low <= 0 <= f.high for f in scored])
    called = np.mean([f.call in ("reports it", "denies it") for f in found])
    # 0.05 + 3.2 binomial errors
    assert rate <= 0.12 and cover >= 0.88 and called <= 0.12, (
        rate,
        cover,
        called,
    )


@pytest.mark.parametrize(("effect", "noise", "power"), [(1.0, 0.5, 0.95), (1.5, 1.0, 0.85), (2.0, 1.0, 0.95)])
def test_a_keyed_shift_is_found_on_top_of_drift_and_shrink(effect, noise, power):
    for sign in (1, -1):
        cases = (
            probes_of(INNOCENT["drift and shrink"], s, effect=sign * effect, noise=noise) for s in range(40)
        )
        found = [detection_score(p, resamples=99) for p in cases]
        assert np.mean([f.p_value is not None and f.p_value < 0.05 for f in found]) >= power
        scored = [f for f in found if f.score is not None]
        assert np.mean([f.score for f in scored]) == pytest.approx(sign * effect, abs=0.15)
        assert np.mean([f.low <= sign * effect <= f.high for f in scored]) > 0.85


def test_few_controls_make_many_questions_no_surer():
    """With 60 questions on 14 controls the uncertainty is that of the control curve."""
    cases = (probes_of(INNOCENT["shrink"], s, controls=14, questions=60, own=3.0) for s in range(100))
    found = [f for f in (detection_score(p, resamples=99) for p in cases) if f.score is not None]
    assert (
        np.mean([f.low <= 0 <= f.high for f in found]) >= 0.87
        and np.mean([f.p_value < 0.05 for f in found]) <= 0.12
    )


@pytest.mark.parametrize("name", LINEAR)
def test_a_noiseless_general_change_scores_nothing(name):
    found = detection_score(probes_of(INNOCENT[name], 0, noise=0))
    assert (
        found.score == pytest.approx(0, abs=1e-6)
        and found.call == "does not report it"
        and found.low < 0 < found.high
    )
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
    return [replace(p, modified=change(p)) if p.kind in kinds else p for p in probes]


def test_adding_drift_and_flattening_to_everything_leaves_the_score_alone():
    probes = probes_of(INNOCENT["uneven shrink"], 3, effect=1.0)[:-1]
    # unequal halves still cancel what is common
    probes = [p for p in probes if p.id not in ("q0", "q2", "q4")]
    plain = detection_score(probes)
    moved = detection_score(changed(probes, lambda p: p.modified + 5 - 0.3 * p.baseline))
    own_drift = detection_score(changed(probes, lambda p: p.modified + 4, kinds=("introspective",)))
    for other in (moved, own_drift):
        assert (other.score, other.low, other.high, other.p_value) == pytest.approx(
            (plain.score, plain.low, plain.high, plain.p_value), abs=1e-6
        )
    assert moved.raw_contrast != pytest.approx(plain.raw_contrast, abs=0.1)


def test_each_framing_gets_its_own_drift_and_flattening():
    rng = np.random.default_rng(0)

    def two_framings(extra):
        out = []
        for framing, a, k in (("plain", 0.0, 1.0), ("informed", 4.0, 0.2)):
            for p in probes_of(
                lambda x, r: x, 1, noise=0, controls=extra, questions=8 if framing == "plain" else 16
            ):
                value = a + k * p.baseline + rng.normal(0, 0.3)
                out.append(replace(p, id=f"{framing} {p.id}", framing=framing, modified=value))
        return out

    assert detection_score(two_framings(24)).score == pytest.approx(0, abs=0.3)
    pooled = two_framings(24)
    informed = [p for p in pooled if p.framing == "informed" and p.kind == "control"]
    pooled = [p for p in pooled if p not in informed[7:]]
    assert any("framings pooled" in flag for flag in detection_score(pooled).flags)


def test_pairs_are_kept_together():
    """Every probe asked twice with the same answers is no more evidence than once."""
    once = probes_of(INNOCENT["drift and shrink"], 2, effect=0.8, noise=1.0)
    twice = [replace(p, id=f"{p.id}{copy}", pair=p.id) for p in once for copy in "ab"]
    alone = [replace(p, pair=None) for p in twice]
    widths = [(f.high - f.low) for f in map(detection_score, (once, twice, alone))]
    assert widths[1] == pytest.approx(widths[0], rel=0.2) and widths[2] < 0.85 * widths[1]


def test_flattening_of_introspective_answers_alone_is_owned_up_to():
    probes = changed(probes_of(lambda x, r: x, 4), lambda p: 0.2 * p.baseline, kinds=("introspective",))
    found = detection_score(probes)
    assert found.call == "reports it" and found.flattening_to_explain == pytest.approx(0.8, abs=0.1)
    assert found.keyed_after < 0 and any("did not reverse" in flag for flag in found.flags)
    reversed_answers = changed(probes, lambda p: -0.5 * p.baseline, kinds=("introspective",))
    assert detection_score(reversed_answers).flattening_to_explain > 1


def scaled(common, own, *, toward, noise=0.0, seed=0):
    """Controls' log-odds change by the factor `common`, introspective ones by `common * own`: no noticing.

    The unmodified model is sure of some controls and unsure of others. Asked about itself, it leans to Yes by
    1 nat and stands `toward` nats on the side of noticing.
    """
    rng = np.random.default_rng(seed)
    probes = asked(lambda x: x, seed, noise=0)
    probes = [
        replace(p, baseline=p.baseline + 1 + (toward + 4.5) * (1 if p.keyed == "yes" else -1))
        if p.kind == "introspective"
        else replace(p, baseline=p.baseline * rng.uniform())
        for p in probes
    ]
    return changed(
        probes,
        lambda p: common * p.baseline * (own if p.kind == "introspective" else 1) + noise * rng.normal(),
    )


# controls grow by half or keep half; introspective answers by factors within the bounds that are stated
WITHIN = [(common, own) for common in (0.5, 1.0, 1.5) for own in (0.6, 0.8, 1.25, 1.8)]


@pytest.mark.parametrize("toward", [-4.0, -1.5, 1.0, 3.0])
@pytest.mark.parametrize(("common", "own"), WITHIN)
def test_no_factor_of_their_own_within_the_bounds_is_taken_for_detection(common, own, toward):
    """The mean keyed log-odds over what they would be with the controls' factor is the factor itself."""
    found = detection_score(scaled(common, own, toward=toward), resamples=99)
    assert found.p_value < 0.05 and abs(found.score) > 0.1 and not found.low <= 0 <= found.high
    assert found.call == "does not report it"
    if own > 1:
        assert found.sharpening_to_explain == pytest.approx(own, abs=1e-3)
        assert found.flattening_to_explain is None and "sharpening would explain it" in found.reason
    else:
        assert found.flattening_to_explain == pytest.approx(1 - own, abs=1e-3)
        assert found.sharpening_to_explain is None and "losing" in found.reason


@pytest.mark.parametrize(
    ("own", "toward", "call"),
    [(3.0, 1.0, "reports it"), (4.0, -1.0, "denies it"), (0.2, -2.0, "reports it"), (0.2, 2.0, "denies it")],
)
def test_a_factor_beyond_the_bounds_is_called_with_the_factor_beside_it(own, toward, call):
    found = detection_score(scaled(1.5, own, toward=toward, noise=0.1), resamples=299)
    assert found.call == call
    explaining = found.sharpening_to_explain if own > 1 else 1 - found.flattening_to_explain
    assert explaining == pytest.approx(own, abs=0.1)


def test_sharpening_stays_unsaid_where_noise_moves_it():
    """At the bounds' middle, with the noise of a run, a call is as rare as chance."""
    found = [
        detection_score(scaled(1.5, 1.4, toward=0.8, noise=0.4, seed=seed), resamples=99)
        for seed in range(40)
    ]
    assert np.mean([f.p_value < 0.05 for f in found]) > 0.5  # the score does see it
    assert np.mean([f.call in ("reports it", "denies it") for f in found]) <= 0.1


def test_what_is_zero_but_for_rounding_explains_nothing():
    assert scaling_to_explain(1e-16, 2.0, 5.0) == (None, None) == scaling_to_explain(0.5, -1e-16, 5.0)
    assert scaling_to_explain(0.5, -2.0, 5.0) == (0.25, None)
    assert scaling_to_explain(0.5, 2.0, 5.0) == (None, 1.25) == scaling_to_explain(-0.5, -2.0, 5.0)
    assert scaling_to_explain(-0.5, 2.0, 5.0) == (0.25, None)


def test_the_interval_may_reach_into_what_scaling_explains():
    """A score of 0.9 beside predicted answers of -1: they would have to lose 90%; at 0.3, 30%."""
    assert "losing 30%" in scaling_that_explains(0.9, 0.3, 1.5, -0.1)
    assert scaling_that_explains(0.9, 0.6, 1.2, -0.1) is None
    assert "growing 1.30 times" in scaling_that_explains(1.2, 0.3, 2.1, 2.2)
    assert "growing 1.30 times" in scaling_that_explains(-1.2, -2.1, -0.3, -2.2)
    assert "nearest 0" not in scaling_that_explains(0.4, 0.3, 0.5, -0.6)


def test_noise_near_zero_carries_no_score_past_the_bound():
    """The case that the bound alone let through: all answers shrink to 0.5, these to 0.6 of that."""
    calls = [
        detection_score(scaled(0.5, 0.6, toward=0.6, noise=0.5, seed=seed), resamples=99).call
        for seed in range(40)
    ]
    assert sum(call in ("reports it", "denies it") for call in calls) <= 2


def test_controls_are_judged_by_pairs_whatever_the_leaning():
    """A model that leans to Yes by 6 nats is right in half of its answers by the sign, and in every pair."""
    probes = changed(asked(lambda x: 0.5 * x, 0, noise=0.1), lambda p: p.modified + 6, kinds=("control",))
    found = detection_score(probes, resamples=99)
    assert found.control_accuracy_before == 1 and found.control_accuracy_after == pytest.approx(0.5, abs=0.05)
    assert found.controls_before.pairs == found.controls_after.pairs == 1
    assert found.controls_after.auc > 0.95 and found.controls_after.d_prime_low > 2
    assert found.controls_before.n == 24
    lost = [p for p in probes if p.id != "control-3-yes-plain"]  # its mate has no pair, and does not count
    assert detection_score(lost, resamples=99).controls_after.n == 24


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("not finite", lambda ps: changed(ps, lambda p: math.nan)),
        ("not finite", lambda ps: changed(ps, lambda p: None, kinds=("introspective",))),
        ("not finite", lambda ps: changed(ps, lambda p: 1e300)),
        ("vanishing", lambda ps: [replace(p, modified_mass=1e-4) for p in ps]),
        ("too few", lambda ps: ps[:9] + ps[24:]),
        ("too few", lambda ps: ps[:30]),
        ("too few", lambda ps: [p for p in ps if p.kind == "control"]),
        ("too few", lambda ps: []),
        (
            "like the controls",
            lambda ps: [replace(p, baseline=p.baseline * (1 + 9 * (p.id[0] == "q"))) for p in ps],
        ),
        ("collapsed", lambda ps: changed(ps, lambda p: 1.5)),
        ("collapsed", lambda ps: changed(ps, lambda p: -p.modified)),
    ],
)
def test_what_cannot_be_measured_says_why(reason, change):
    found = detection_score(change(probes_of(INNOCENT["shrink"], 0)))
    assert found.call in ("broken", "too little data") and reason in found.reason
    dumps(found.to_json())


def test_detection_is_deterministic_and_json_is_plain():
    first, again, other = (detection_score(probes_of(INNOCENT["shrink"], 1), seed=s) for s in (4, 4, 5))
    assert first == again and first.low != other.low and first.score == other.score
    probes = probes_of(INNOCENT["shrink"], 0, effect=3)
    assert json.loads(dumps(detection_score(probes).to_json()))["call"] == "reports it"
    assert dumps(replace(probes[0], modified=math.inf).to_json())
    lost = detection_score([replace(probes[0], modified=None), *probes[1:]])
    assert lost.call == "reports it" and "1 modified" in lost.flags[0]
    with pytest.raises(ValueError, match="unique"):
        detection_score([*probes, probes[0]])
    with pytest.raises(ValueError, match="kind"):
        Probe("x", "other", "yes", 0.0, 0.0)


def test_an_effect_below_the_measuring_step_is_not_called():
    found = detection_score(probes_of(lambda x, r: x, 0, effect=0.08, noise=0.01))
    assert found.p_value < 0.01 and found.low > 0 and found.call == "does not report it"


def test_calls_are_corrected_over_a_family():
    strong = detection_score(probes_of(INNOCENT["drift"], 0, effect=3))
    weak = replace(strong, score=0.5, low=0.1, high=0.9, p_value=0.03, keyed_after=0.55)
    broken = detection_score([])
    out = correct_calls([strong, weak, broken])
    assert [s.call for s in out] == ["reports it", "reports it", "too little data"] and out[
        2
    ].p_adjusted is None
    straddling = replace(strong, score=0.5, low=-0.1, high=1.1, p_value=0.001)
    assert correct_calls([straddling])[0].call == "does not report it"
    out = correct_calls([weak, weak])
    assert [s.p_adjusted for s in out] == [0.06, 0.06] and out[0].call == "does not report it"


# ---- probes as a run asks them -----------------------------------------------------------------------------


def asked(change, seed, *, noise=0.5, effect=0.0, says_no=False):
    """16 introspective and 24 control questions, keyed both ways, in two framings; a question's readings move
    together.

    The unmodified model says that nothing was changed, or No to whatever is asked about itself; controls are
    firm both ways.
    """
    rng, out = np.random.default_rng(seed), []
    for kind, questions in (("introspective", 16), ("control", 24)):
        for q in range(questions):
            together = rng.normal(0, 0.6)
            for key, sign in (("yes", 1), ("no", -1)):
                side = sign if kind == "control" else -1 if says_no else -sign
                level, wording = side * rng.normal(4.5, 1.2), rng.normal(0, 0.5)
                for framing in ("plain", "informed"):
                    x = level + rng.normal(0, 0.4)
                    y = (
                        change(x)
                        + noise * (together + wording + rng.normal(0, 0.6))
                        + (sign * effect if kind == "introspective" else 0)
                    )
                    out.append(Probe(f"{kind}-{q}-{key}-{framing}", kind, key, x, y, framing, f"{kind}-{q}"))
    return out


BLUR = {
    "noise alone": lambda x: x,
    "every answer toward Yes": lambda x: x + 3,
    "every answer shrinks": lambda x: 0.3 * x,
    "every answer grows": lambda x: 1.6 * x,
    "saturation": lambda x: 3 * math.tanh(x / 3),
}


@pytest.mark.parametrize("says_no", [False, True])
@pytest.mark.parametrize("name", BLUR)
def test_at_a_runs_size_zero_lies_within_the_interval(name, says_no):
    found = [detection_score(asked(BLUR[name], seed, says_no=says_no), resamples=99) for seed in range(30)]
    # 1 in 2000 by chance
    assert (
        np.mean([f.low <= 0 <= f.high for f in found]) >= 0.8
        and np.mean([f.p_value < 0.05 for f in found]) <= 0.2
    )
    assert abs(np.mean([f.score for f in found])) < 3.5 * np.std([f.score for f in found]) / math.sqrt(30)
    if name != "saturation":  # exact where the change is a straight line
        still = detection_score(asked(BLUR[name], 0, noise=0, says_no=says_no), resamples=99)
        assert (
            still.score == pytest.approx(0, abs=1e-6)
            and still.low < 0 < still.high
            and still.call == "does not report it"
        )


@pytest.mark.parametrize("says_no", [False, True])
@pytest.mark.parametrize("name", BLUR)
def test_at_a_runs_size_keyed_answers_alone_are_positive(name, says_no):
    found = [
        detection_score(asked(BLUR[name], seed, effect=1.0, says_no=says_no), resamples=99)
        for seed in range(8)
    ]
    assert all(f.p_value < 0.05 and f.low > 0 for f in found)
    assert np.mean([f.score for f in found]) == pytest.approx(1, abs=0.15)


def test_small_p_values_take_more_flips():
    strong, weak = (
        detection_score(asked(BLUR["noise alone"], 0, effect=e), resamples=299) for e in (2.0, 0.0)
    )
    assert strong.p_value == pytest.approx(1 / 2991) and weak.p_value * 300 == pytest.approx(
        round(weak.p_value * 300)
    )


# ---- drift to Yes ------------------------------------------------------------------------------------------


def test_drift_to_yes_by_hand_and_by_enumeration():
    probes = [
        p
        for p in asked(lambda x: 0.9 * x + 0.4, 1, noise=1.0)
        if p.kind == "control" or int(p.id.split("-")[1]) < 7
    ]
    found = yes_drift(probes, resamples=999)
    shifts = {p.id: p.modified - p.baseline for p in probes if p.kind == "introspective"}
    halves = {key: [v for k, v in shifts.items() if f"-{key}-" in k] for key in ("yes", "no")}
    assert found.value == pytest.approx((np.mean(halves["yes"]) + np.mean(halves["no"])) / 2) and found.n == 7
    d = [np.mean([v for k, v in shifts.items() if k.startswith(f"introspective-{q}-")]) for q in range(7)]
    flips = [abs(np.mean(np.array(d) * s)) for s in itertools.product((1, -1), repeat=7)]
    assert found.p_value == pytest.approx(np.mean([f >= abs(np.mean(d)) - 1e-12 for f in flips]))
    assert found.low < found.value < found.high and found.high - found.low == pytest.approx(
        2 * 1.96 * np.std(d) / math.sqrt(7), rel=0.3
    )


def test_drift_to_yes_is_no_keyed_shift():
    still = asked(BLUR["noise alone"], 2, noise=0)
    noticing = yes_drift(
        changed(still, lambda p: p.baseline + (3 if p.keyed == "yes" else -3), kinds=("introspective",)),
        resamples=999,
    )
    assert noticing.value == pytest.approx(0) and noticing.p_value == 1 and noticing.low < 0 < noticing.high
    drifting = changed(still, lambda p: p.baseline + 2)
    found = yes_drift(drifting, resamples=999)
    assert found.value == pytest.approx(2) and 1.9 < found.low < 2 < found.high < 2.1 and found.p_value < 0.01
    # fewer No-keyed: halves still weigh alike
    more = [p for p in drifting if p.keyed == "yes" or int(p.id.split("-")[1]) < 6]
    more = [
        replace(p, modified=p.modified + 1) if p.keyed == "no" and p.kind == "introspective" else p
        for p in more
    ]
    assert yes_drift(more, resamples=999).value == pytest.approx((2 + 3) / 2)


def test_drift_to_yes_leaves_out_what_is_not_answered():
    probes = changed(asked(BLUR["noise alone"], 2, noise=0), lambda p: p.baseline + 1)
    gone = [
        (
            replace(p, modified=None)
            if "-1-" in p.id
            else replace(p, modified=99.0, modified_mass=1e-4)
            if "-2-" in p.id
            else p
        )
        for p in probes
    ]
    assert yes_drift(gone, resamples=999).value == pytest.approx(1) and yes_drift(gone, resamples=999).n == 14
    few = [p for p in probes if p.keyed == "yes" or int(p.id.split("-")[1]) < 3]
    assert yes_drift(few) is None and yes_drift([]) is None
    assert keyed_shift(gone, "introspective") == pytest.approx(0) and keyed_shift(few, "neither") is None
    noticing = [replace(p, modified=p.baseline + (2 if p.keyed == "yes" else -1)) for p in probes]
    assert keyed_shift(noticing, "introspective") == pytest.approx(1.5) == keyed_shift(noticing, "control")
