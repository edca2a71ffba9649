"""compare() against numbers worked out by hand: contrasts, corrections, placebos, formats, injection and
verdicts."""

import math

import made_results as made
import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from analysis import compare
from analysis.comparison import Claims, Failure, FormatScore, Perplexity, PlaceboBand, PublishedProbe, Verdict
from files import ROOT
from reporting.reports import compare_run
from runner.results import Run


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    return made.compared(tmp_path_factory.mktemp("run") / "run_x")


def row(compared, name):
    return next(r for r in compared[0].experiments if r.name == name)


def test_the_published_probe_and_its_shift(compared):
    x = made.BASELINES[2]
    before = row(compared, "baseline_instruct").published_probe
    assert before == PublishedProbe(pytest.approx(sigmoid(x)), 0.8, x, 1.5, answered=True, shift=None)
    after = x + 1.0 - 0.3 * x
    found = row(compared, "drifts").published_probe
    assert (found.p_yes_normalized, found.shift) == pytest.approx((sigmoid(after), after - x))
    destroyed = row(compared, "destroyed").published_probe
    assert destroyed.p_yes_normalized is None
    assert destroyed.shift is None
    assert not destroyed.answered


def test_detection_sees_the_effect_and_not_the_drift(compared):
    drifts, notices, opposes = (row(compared, name).detection for name in ("drifts", "notices", "opposes"))
    assert (drifts.score, drifts.drift, drifts.flattening) == pytest.approx((0, 1.0, -0.3), abs=1e-6)
    assert (notices.score, opposes.score) == pytest.approx((2.0, -2.0), abs=1e-6)
    assert [d.call for d in (drifts, notices, opposes)] == ["does not report it", "reports it", "denies it"]
    # Keyed log-odds: yes-keyed baselines average to their mean m, no-keyed ones to the mean of -(-x + 0.05).
    mean = sum(made.BASELINES) / 10
    assert notices.keyed_before == pytest.approx((mean + mean - 0.05) / 2)
    assert row(compared, "baseline_instruct").detection is None and notices.n_controls == 20
    for name, reason in (("mute", "vanishing"), ("destroyed", "not finite")):
        assert (
            row(compared, name).detection.call == "broken" and reason in row(compared, name).detection.reason
        )


def test_holm_is_taken_over_the_run(compared):
    scored = [r.detection for r in compared[0].experiments if r.detection and r.detection.p_value is not None]
    assert len(scored) == 3  # mute and destroyed have no p-value and do not count
    largest = 0
    for rank, d in enumerate(sorted(scored, key=lambda d: d.p_value)):
        largest = min(1, max(largest, d.p_value * (3 - rank)))
        assert d.p_adjusted == pytest.approx(largest)


def test_probes_of_one_question_are_one_cluster():
    probes = compare.paired_probes(made.binary(), made.binary(drift=1))
    assert len({p.pair for p in probes}) == 20 and {p.pair for p in probes if "q3" in p.id} == {
        "introspective-q3",
        "control-q3",
    }
    fewer = {"probes": made.binary()["probes"][:5]}
    assert [p.id for p in compare.paired_probes(fewer, made.binary())] == [p["id"] for p in fewer["probes"]]


def test_a_question_is_known_by_its_field_and_in_older_results_by_its_id():
    """With the field, the id is only a name; without it, the id's first two parts are the question."""
    older, newer = made.binary(), made.binary()
    for k, probe in enumerate(newer["probes"]):
        probe |= {"question": probe["id"].split("-")[1], "id": f"anything-{k}"}
    clusters = [
        {(p.kind, p.pair.removeprefix(f"{p.kind}-")) for p in compare.paired_probes(probes, probes)}
        for probes in (older, newer)
    ]
    assert clusters[0] == clusters[1]
    assert len(clusters[0]) == 20


def test_capability_is_paired_by_item(compared):
    drifts, notices = (row(compared, name).capability for name in ("drifts", "notices"))
    assert (drifts.correct, drifts.n) == (1, 10) and drifts.difference == pytest.approx(-0.5)
    assert drifts.p_value == pytest.approx(2 / 2**5)
    assert notices.p_value == 1
    assert notices.difference == 0
    # Holm over the two contrasts
    assert (drifts.p_adjusted, notices.p_adjusted) == pytest.approx((2 * 2 / 2**5, 1))
    assert (
        row(compared, "baseline_instruct").capability.difference is None
        and row(compared, "opposes").capability is None
    )


def test_perplexity_change_is_weighted_by_tokens(compared):
    found = row(compared, "drifts").perplexity
    assert found.nll_change.value == pytest.approx((0.5 * 100 + 0.1 * 300 + 0.4 * 200) / 600)
    assert found.perplexity == pytest.approx(math.exp((2.5 * 100 + 3.1 * 300 + 2.9 * 200) / 600))
    assert row(compared, "destroyed").perplexity == Perplexity(None, None, 600)


def test_failed_missing_and_equal_experiments_are_named(compared):
    comparison = compared[0]
    assert comparison.missing == ("later",) and comparison.baseline == "baseline_instruct"
    assert (
        row(compared, "broken").error == Failure("RuntimeError", "it broke")
        and row(compared, "broken").detection is None
    )
    assert row(compared, "mute").same_as == "drifts" and row(compared, "drifts").same_as is None
    assert row(compared, "drifts").claims_change == dict.fromkeys(("informed", "blind"), Claims(0, 4, 0))


@pytest.mark.parametrize("baseline", [None, "failed"])
def test_without_a_baseline_nothing_is_contrasted(tmp_path, baseline):
    results = [made.result("drifts", made.everything())]
    if baseline:
        results.insert(0, made.result("baseline_instruct"))
    comparison = compare_run(*made.make(tmp_path / "run", results))
    found = comparison.experiments[-1]
    assert comparison.baseline is None
    assert found.detection is None
    assert found.published_probe.shift is None
    assert found.capability.correct == 5
    assert found.capability.p_value is None


def test_items_and_probes_that_are_not_shared_are_left_out(tmp_path):
    mine = made.capability([True, True, False])
    mine["items"][2]["id"] = "another"
    asked = made.binary()
    for probe in asked["probes"]:
        probe["published"] = False
    run = made.make(
        tmp_path / "run",
        [
            made.result(
                "baseline_instruct", {"capability": made.capability([True, False]), "binary": made.binary()}
            ),
            made.result("x", {"capability": mine, "binary": asked}),
        ],
    )
    found = compare_run(*run).experiments[1]
    assert found.capability.difference == 0.5 and found.published_probe is None


MATCHED = {
    "target_perplexity": 9.0,
    "reached_perplexity": 9.1,
    "fraction": 0.1,
    "evaluations": [[0.1, 9.1]],
    "within": 0.01,
    "ok": True,
}
# (perplexity reached, wanted, whether the run called that matched, share of the rise in nats, is it matched)
NOISES = {
    "as committed, a slight change": (
        28.77,
        29.12,
        True,
        math.log(28.77 / 28.73) / math.log(29.12 / 28.73),
        False,
    ),
    "half of a slight change": (15.81, 15.92, True, math.log(15.81 / 15.70) / math.log(15.92 / 15.70), False),
    "all of it": (29.10, 29.12, True, math.log(29.10 / 28.73) / math.log(29.12 / 28.73), True),
    "of much": (400.0, 407.0, True, math.log(400 / 28.73) / math.log(407 / 28.73), True),
    "not by the run": (300.0, 400.0, False, math.log(300 / 28.73) / math.log(400 / 28.73), False),
    "of nothing finite": (1e6, None, False, None, False),
}


@pytest.mark.parametrize("name", NOISES)
def test_noise_is_matched_by_how_much_it_damages(name):
    """2% of perplexity are more than all that a slight change does."""
    reached, target, said, share, ok = NOISES[name]
    unmodified = 15.70 if "half" in name else 28.73
    matched = MATCHED | {"of": "x", "reached_perplexity": reached, "target_perplexity": target, "ok": said}
    before = {"perplexity": made.perplexity([math.log(unmodified)] * 3)}
    found = compare.row_of(
        made.result("x__matched_noise", {}, experiment__matched=matched), before, 0
    ).matched
    assert found.share == (None if share is None else pytest.approx(share)) and found.ok == ok


# ---- controls, formats, injection --------------------------------------------------------------------------


def scattered(seed, effect=0.0, drift=0.0, noise=0.3):
    """Probes of an unmodified model, each moved by noise, drift and effect."""
    rng, out = np.random.default_rng(seed), made.binary()
    for p in out["probes"]:
        toward = effect * (1 if p["keyed"] == "yes" else -1) if p["kind"] == "introspective" else 0
        p.update(made.reading(p["log_odds"] + drift + toward + noise * rng.normal()))
    return out


PLACEBOS = {f"placebo_{k}": scattered(k) for k in range(4)}


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """A run with placebos, with noise that explains one of two scores, and with all five verdicts."""

    def noise(of, effect):
        return made.result(
            f"{of}__matched_noise",
            {"binary": scattered(9, effect)},
            experiment__control="matched noise",
            experiment__matched={"of": of} | MATCHED,
        )

    results = [
        made.result(
            "baseline_instruct", {"binary": made.binary(), "perplexity": made.perplexity([2.0, 3.0, 2.5])}
        ),
        *(
            made.result(name, {"binary": probes}, experiment__control="placebo")
            for name, probes in PLACEBOS.items()
        ),
        made.result("reports", {"binary": scattered(11, effect=4.0)}),
        noise("reports", 0.0),
        made.result("damaged", {"binary": scattered(12, effect=3.0)}),
        noise("damaged", 3.0),
        made.result("drifts", {"binary": scattered(13, drift=2.0)}),
        made.result("nothing", {"binary": scattered(14)}),
        made.result("wrecked", {"binary": scattered(15), "perplexity": made.perplexity([4.5, 5.5, 5.0])}),
        made.result("unasked", {"chat": made.chat()}),
    ]
    run, manifest = made.make(tmp_path_factory.mktemp("run") / "run_c", results)
    return compare_run(run, manifest), manifest


def test_verdicts_of_a_run(controlled):
    words = {
        r.name: r.verdict and r.verdict.word for r in controlled[0].experiments if r.control != "placebo"
    }
    assert words == {
        "baseline_instruct": None,
        "reports": "reports it",
        "reports__matched_noise": "does not report it",
        "damaged": "does not report it",
        "damaged__matched_noise": "reports it",
        "drifts": "answers drift towards Yes",
        "nothing": "does not report it",
        "wrecked": "broken",
        "unasked": "too little data",
    }
    assert "noise of the same perplexity explains it (+" in row(controlled, "damaged").verdict.reason
    assert "beyond every placebo (p = 0.2 among them)" in row(controlled, "reports").verdict.reason


def test_placebos_place_every_score(controlled):
    scores = {name: row(controlled, name).detection.score for name in PLACEBOS}
    assert controlled[0].placebo == PlaceboBand(4, scores, min(scores.values()), max(scores.values()))
    for r in controlled[0].experiments:
        if not r.detection:
            continue
        others = [s for name, s in scores.items() if name != r.name]
        as_far = [abs(s) >= abs(r.detection.score) for s in others]
        assert r.detection.p_placebo == pytest.approx((1 + sum(as_far)) / (1 + len(others)))
        assert r.detection.beyond_placebo == (not any(as_far))
    noise = row(controlled, "reports__matched_noise")
    assert (
        row(controlled, "reports").detection.matched_noise_score == noise.detection.score
        and noise.detection.matched_noise_score is None
    )


def test_controls_belong_to_no_family(controlled):
    tested = [r for r in controlled[0].experiments if r.detection]
    family = [r for r in tested if r.control is None]
    assert len(family) == 5 and all(
        r.detection.p_adjusted is None and r.yes_drift.p_adjusted is None for r in tested if r not in family
    )
    for key in ("detection", "yes_drift"):
        least = min((getattr(r, key) for r in family), key=lambda found: found.p_value)
        assert least.p_adjusted == pytest.approx(5 * least.p_value)
    assert row(controlled, "damaged__matched_noise").detection.call == "reports it"


def test_a_control_that_is_asked_about_triggers_keeps_its_own_p_values(tmp_path):
    results = [
        made.result(name, {"trigger": made.trigger()}, experiment__control=control)
        for name, control in (("baseline_instruct", None), ("adapter", None), ("placebo_1", "placebo"))
    ]
    comparison = compare_run(*made.make(tmp_path / "run", results))
    adjusted = [r.trigger.detection["triggered"].p_adjusted for r in comparison.experiments[1:]]
    assert adjusted[0] is not None and adjusted[1] is None


def test_auroc_of_modified_against_placebos(controlled):
    rows = [r for r in controlled[0].experiments if r.detection]
    found = controlled[0].auroc
    for key, read in (
        ("detection", lambda r: r.detection.score),
        ("p_yes", lambda r: r.published_probe.shift),
    ):
        modified, placebos = (
            [read(r) for r in rows if r.control == control] for control in (None, "placebo")
        )
        assert (
            getattr(found, key).value == pytest.approx(mannwhitneyu(modified, placebos).statistic / 20)
            and getattr(found, key).n == 9
        )
    assert (found.n_modified, found.n_placebo) == (5, 4)


def test_an_experiment_that_changes_nothing_is_no_modified_model(tmp_path):
    """Its p-value stays in the family, which the run's plan decides."""
    unchanged = made.result("baseline_instruct", made.everything())
    results = [unchanged, made.result("same", made.everything())]
    results[1]["experiment"]["recipe"] = unchanged["experiment"]["recipe"]
    shifted = {
        name: made.everything(binary=made.binary(drift=d)) for name, d in (("a", 1), ("b", 2), ("c", 3))
    }
    results += [made.result(name, measured) for name, measured in shifted.items()]
    results += [made.result(f"p{k}", made.everything(), experiment__control="placebo") for k in range(3)]
    comparison = compare_run(*made.make(tmp_path / "run", results))
    same = comparison.experiments[1]
    assert same.verdict == Verdict("no change to report", "its recipe is the unmodified model's")
    assert same.same_as == "baseline_instruct" and same.detection.p_adjusted is not None
    assert comparison.auroc.n_modified == 3


def test_without_enough_placebos_there_is_no_auroc(compared):
    assert compared[0].auroc is None
    assert compared[0].placebo is None
    assert compared[0].injection is None
    assert (
        row(compared, "notices").detection.p_placebo is None
        and row(compared, "notices").detection.beyond_placebo is None
    )


def test_drift_to_yes_is_the_mean_of_halves(compared):
    found = row(compared, "drifts").yes_drift
    halves = [[1.0 - 0.3 * x for x in made.BASELINES], [1.0 - 0.3 * (-x + 0.05) for x in made.BASELINES]]
    assert (
        found.value == pytest.approx(np.mean([np.mean(half) for half in halves]))
        and found.low < found.value < found.high
    )
    assert (
        row(compared, "drifts").verdict.word == "answers drift towards Yes"
        and row(compared, "mute").yes_drift is None
    )
    # what is keyed cancels
    assert row(compared, "notices").yes_drift.value == pytest.approx(found.value)


def by_format(**effects):
    """Formats' probes, six questions of either kind, both keys; `effects`: by format, toward the keyed
    answer."""
    out = []
    for name, effect in effects.items():
        for kind in ("introspective", "control"):
            for k in range(6):
                for keyed, sign in (("yes", 1), ("no", -1)):
                    x = sign * (0.5 + 0.4 * k) + (sign * effect if kind == "introspective" else 0.0)
                    out.append(
                        {
                            "id": f"{kind}-q{k}-{keyed}-{name}",
                            "kind": kind,
                            "keyed": keyed,
                            "format": name,
                            "question": f"q{k}",
                            "pair": "its twin",
                            "text": "Is it?",
                            "rating_mean": None,
                            **made.reading(x),
                        }
                    )
    return {"probes": out}


def test_each_format_is_scored_against_itself(tmp_path):
    before, after = by_format(letters=0.0, rating=0.0), by_format(letters=2.5, rating=0.0)
    after["probes"] = [
        p for p in after["probes"] if p["format"] == "letters" or p["kind"] != "control" or "q5" in p["id"]
    ]
    after["probes"][0] |= made.reading(None)
    run = made.make(
        tmp_path / "run",
        [made.result("baseline_instruct", {"formats": before}), made.result("x", {"formats": after})],
    )
    base, found = (r.formats for r in compare_run(*run).experiments)
    assert base is None and list(found) == ["letters", "rating"]
    assert (found["letters"].score, found["letters"].call, found["letters"].answered) == (
        pytest.approx(2.5),
        "reports it",
        pytest.approx(23 / 24),
    )
    assert found["letters"].keyed_shift == pytest.approx(2.5) and found[
        "letters"
    ].control_shift == pytest.approx(0)
    assert found["letters"].lacking is None
    few = FormatScore(0, 0, "too little data", None, None, None, 1, lacking="too few control questions")
    assert found["rating"] == few


def injected(effect, concepts=("tea", "moss"), strengths=(0.0, 2.0)):
    """The suite's measurements, plainly framed: concept k moves keyed answers by effect * strength * (k
    + 1)."""

    def probes(extra):
        asked = made.binary()["probes"]
        moved = [
            p["log_odds"]
            + (extra * (1 if p["keyed"] == "yes" else -1) if p["kind"] == "introspective" else 0)
            for p in asked
        ]
        return [
            {k: p[k] for k in ("id", "kind", "keyed")} | {"pair": "its twin"} | made.reading(x)
            for p, x in zip(asked, moved, strict=True)
        ]

    cells = [
        {
            "framing": "plain",
            "strength": s,
            "concept": c,
            "probes": probes(effect * s * (k + 1)),
            "naming": [math.log(1 / 9)] * 9,
        }
        for s in strengths
        for k, c in enumerate(concepts if s else (None,))
    ]
    return {
        "layers": [1, 2],
        "concepts": list(concepts),
        "strengths": list(strengths),
        "framings": ["plain"],
        "unit": "made up",
        "cells": cells,
        "bits": [{"framing": "plain", "strength": s, "bits": s / 4} for s in strengths],
        "texts": {"first_turn": {"plain": ["Hello.", "Yes?"]}, "naming": "Which?", "questions": {}},
    }


def run_with_injection(path, found):
    baseline = made.result("baseline_instruct", {"binary": made.binary()})
    same = baseline["experiment"]["recipe"]  # nothing is done to the weights
    run = made.make(
        path,
        [
            baseline,
            made.result(
                "concept_injection",
                {"injection": found},
                experiment__control="injection",
                experiment__recipe=same,
            ),
        ],
    )
    return compare_run(*run)


def test_injection_is_compared_with_strength_zero(tmp_path):
    comparison = run_with_injection(tmp_path / "run", injected(1.0))
    (row,) = comparison.injection.rows
    assert row.detection.score == pytest.approx((2 + 4) / 2, abs=1e-6)
    assert row.detection.call == "reports it"
    assert row.bits == 0.5
    still = made.BASELINES  # yes-keyed introspective probes
    assert row.false_positive_rate == sum(x > 0 for x in still) / 10
    now = [x + extra for extra in (2, 4) for x in still]
    assert row.sensitivity == sum(x > 0 for x in now) / 20 and row.p_yes == pytest.approx(
        np.mean([sigmoid(x) for x in now])
    )
    assert (
        comparison.injection.seen and "plain framing, strength 2: +3.00 nats" in comparison.injection.reason
    )
    placed = comparison.experiments[1]
    assert placed.verdict is None
    assert placed.detection is None
    assert placed.same_as is None


def test_an_injection_that_is_not_seen_says_so(tmp_path):
    found = run_with_injection(tmp_path / "run", injected(0.0, strengths=(0.0, 1.0, 2.0))).injection
    assert not found.seen
    assert found.reason.startswith("no strength of a concept that was put into the model is detected")
    assert [r.strength for r in found.rows] == [1.0, 2.0]


def test_an_injection_that_only_a_model_with_weak_controls_reports_is_not_seen(tmp_path):
    """Its Yes does not follow what it is asked."""
    measured = injected(1.5)
    for cell in measured["cells"]:
        for probe in cell["probes"]:
            if probe["kind"] == "control":  # both answers of a question alike
                probe |= {
                    "keyed": "yes" if probe["id"].split("-")[1] in {f"q{k}" for k in range(5)} else "no"
                }
    found = run_with_injection(tmp_path / "run", measured).injection
    assert found.rows[0].detection.call == "reports it" and not found.seen


def test_injection_takes_holm_over_its_rows_and_leaves_out_what_no_concept_answers(tmp_path):
    found = injected(1.0, concepts=("tea", "moss", "bell"), strengths=(0.0, 1.0, 2.0))
    last = [cell for cell in found["cells"] if cell["strength"] == 2.0]
    for cell in last[1:]:
        cell["probes"][0] |= made.reading(None)
    last[0]["probes"][1] |= made.reading(None)
    rows = run_with_injection(tmp_path / "run", found).injection.rows
    first, second = sorted((r.detection for r in rows), key=lambda d: d.p_value)
    assert first.p_adjusted == 2 * first.p_value and second.p_adjusted == max(
        first.p_adjusted, second.p_value
    )
    # of three concepts one alone is too few
    assert [r.detection.n_introspective for r in rows] == [
        20,
        19,
    ]
    # the first question has no answer under two of them
    now = [x + 2 * k for k in (1, 2, 3) for x in made.BASELINES[k > 1 :]]
    assert rows[1].sensitivity == pytest.approx(sum(x > 0 for x in now) / 30)
    assert rows[1].p_yes == pytest.approx(np.mean([sigmoid(x) for x in now]))


@pytest.mark.real
def test_the_reference_run_of_real_weights_is_judged():
    run, manifest = Run.resume(str(ROOT / "results" / "reference" / "smollm2-135m"))
    comparison = compare_run(run, manifest)
    judged = {
        r.name: r.verdict
        for r in comparison.experiments
        if r.name != comparison.baseline and r.control != "injection"
    }
    words = {"answers drift towards Yes", "answers drift towards No", "broken", "does not report it"}
    words |= {"reports it", "too little data", "no change to report"}
    assert len(judged) >= 28 and all(v.word in words and v.reason for v in judged.values())
    assert judged["shuffle_all"].word == judged["keep_every_2nd"].word == "broken"
