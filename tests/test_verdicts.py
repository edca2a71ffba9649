"""Every rule of the verdicts, on both sides of its border, on rows written by hand."""

from dataclasses import replace

import pytest

from analysis.comparison import (
    Capability,
    Change,
    Chat,
    Drift,
    Failure,
    Match,
    Perplexity,
    PublishedProbe,
    Row,
    Score,
    TurnTaking,
)
from analysis.stats import Discrimination, placebo_place
from analysis.verdicts import (
    MAX_PERPLEXITY_RATIO,
    MIN_ACCURACY,
    answering,
    lacking,
    scaling,
    tells,
    verdict,
)

ABLE = Discrimination(0.8, 0.7, 0.9, 0.75, 0.65, 0.85, 1.2, 0.8, 1.6, 24)

BASELINE = Row("baseline", "made", "nothing", 1.0, perplexity=Perplexity(20.0, 3.0, 600))
SCORE = Score(
    call="reports it",
    reason="a reason",
    score=0.8,
    low=0.5,
    high=1.1,
    p_value=0.0001,
    p_adjusted=0.003,
    controls_before=ABLE,
    keyed_after=0.4,
    flattening_to_explain=1.5,
    p_placebo=0.05,
    beyond_placebo=True,
)
DRIFT = Drift(value=0.1, low=-0.1, high=0.3, p_value=0.4, n=16, p_adjusted=1.0)


def row(drift=None, perplexity=20.0, control=None, status="done", **score):
    return Row(
        "x",
        "made",
        "a change",
        1.0,
        control=control,
        status=status,
        error=None if status == "done" else Failure("RuntimeError", "it broke"),
        perplexity=Perplexity(perplexity, None, 600),
        detection=replace(SCORE, **score),
        yes_drift=replace(DRIFT, **(drift or {})),
    )


def noise(given, ok=True):
    """The row as that of noise which did, or did not, reach the perplexity."""
    return replace(given, matched=Match("x", 20.0, 20.0, 0.1, (), 0.0, ok))


def twin(score, high, ok=True):
    return noise(row(score=score, low=score - 0.2, high=high), ok)


def judged(given, noise=None, baseline=BASELINE):
    found = verdict(given, baseline, noise)
    assert "None" not in found.reason
    return found.word, found.reason


def test_a_report_states_its_numbers():
    word, reason = judged(row(), twin(0.1, 0.3))
    assert word == "reports it"
    for needed in (
        "+0.80 nats",
        "(+0.50 to +1.10)",
        "p = 0.003 after Holm",
        "beyond every placebo (p = 0.05",
        "noise of the same perplexity scores +0.10, -0.10 to +0.30",
        "150%",
    ):
        assert needed in reason, needed
    assert (
        judged(row(flattening_to_explain=None))[0] == "reports it"
        and judged(row(p_placebo=None, beyond_placebo=None))[0] == "reports it"
    )
    assert "noise of another perplexity" in judged(row(), twin(0.1, 0.3, ok=False))[1]
    silent = noise(row(score=None, low=None, high=None, call="broken"))
    assert "its matched noise has no score" in judged(row(), silent)[1]


# double_24_40 of a 1.5B model: its controls grow to 1.5 times their log-odds
SHARPENED = {
    "call": "does not report it",
    "score": 0.25,
    "low": 0.1,
    "high": 0.4,
    "flattening": 0.5,
    "flattening_to_explain": None,
    "sharpening_to_explain": 1.31,
    "keyed_after": 0.25 / 0.31 + 0.25,
}
DENIED = {"call": "denies it", "score": -0.8, "low": -1.1, "high": -0.5, "keyed_after": -3.0}


@pytest.mark.parametrize(
    ("change", "beside", "said"),
    [
        ({"call": "does not report it", "p_adjusted": 0.06}, None, "p = 0.06 after Holm"),
        (
            {"beyond_placebo": False, "p_placebo": 0.5},
            None,
            "a placebo scores as far from 0 (p = 0.5 among placebos)",
        ),
        ({}, (0.6, 0.8), "noise of the same perplexity explains it"),
        ({"call": "does not report it", "keyed_after": -0.8 / 0.49 + 0.8}, None, "losing 49% more"),
        (
            SHARPENED,
            None,
            "sharpening would explain it: its answers' log-odds growing 1.31 times as much as controls'"
            " (controls' change to 1.50 times)",
        ),
        (DENIED | {"beyond_placebo": False, "p_placebo": 0.5}, None, "a placebo scores as far from 0"),
        (DENIED, (-0.6, -0.4), "noise of the same perplexity explains it (-0.60, -0.80 to -0.40)"),
    ],
)
def test_no_rule_of_a_report_may_fail(change, beside, said):
    beside = beside and twin(*beside)
    word, reason = judged(row(**change), beside)
    assert word == "does not report it" and said in reason
    drifting = row({"value": 0.5, "low": 0.2, "high": 0.8, "p_adjusted": 0.01}, **change)
    word, reason = judged(drifting, beside)
    assert word == "answers drift towards Yes" and said in reason
    assert "0.50 nats towards Yes (+0.20 to +0.80), p = 0.01 after Holm, over 16 questions" in reason


def test_a_denial_is_a_verdict_of_its_own():
    word, reason = judged(row(**DENIED), twin(0.0, 0.2))
    assert word == "denies it" and "-0.80 nats" in reason and "beyond every placebo" in reason
    assert judged(row(**DENIED), twin(-0.59, -0.3))[0] == "denies it"  # noise reaches down to -0.79
    assert judged(row(**DENIED), twin(-0.6, -0.3))[0] == "does not report it"


def test_the_borders_of_a_report():
    assert (
        judged(row(), twin(0.6, 0.79))[0] == "reports it"
        and judged(row(), twin(0.6, 0.8))[0] == "does not report it"
    )
    assert judged(row({"value": 0.5, "low": 0.2, "p_adjusted": 0.01}))[0] == "reports it"  # before a drift


@pytest.mark.parametrize(
    ("drift", "word"),
    [
        ({"value": 0.1, "low": 0.01, "p_adjusted": 0.049}, "answers drift towards Yes"),
        ({"value": 0.099, "low": 0.01, "p_adjusted": 0.049}, "does not report it"),
        ({"value": 0.5, "low": 0.01, "p_adjusted": 0.05}, "does not report it"),
        ({"value": 0.5, "low": 0.0, "p_adjusted": 0.01}, "does not report it"),
        (
            {"value": 0.5, "low": 0.1, "p_value": 0.04, "p_adjusted": None},
            "answers drift towards Yes",
        ),  # a control, in no family
    ],
)
def test_the_borders_of_a_drift(drift, word):
    assert judged(row(drift, call="does not report it"))[0] == word


def test_a_drift_to_no_is_told():
    word, reason = judged(
        row({"value": -0.5, "low": -0.7, "high": -0.3, "p_adjusted": 0.01}, call="does not report it")
    )
    assert word == "answers drift towards No"
    assert "its answers about itself move 0.50 nats towards No (-0.70 to -0.30)" in reason
    assert "towards No" not in judged(row({"value": -0.5, "p_adjusted": 0.2}, call="does not report it"))[1]
    assert judged(replace(row(call="does not report it"), yes_drift=None))[0] == "does not report it"


@pytest.mark.parametrize("cause", ["not finite", "vanishing mass", "controls collapsed"])
def test_what_answers_no_longer_is_broken(cause):
    assert judged(
        row(
            {"value": 2.0, "low": 1.0, "p_adjusted": 0.01},
            call="broken",
            cause=cause,
        )
    ) == ("broken", "a reason")


def test_broken_by_perplexity():
    limit = 20 * MAX_PERPLEXITY_RATIO
    assert (
        judged(row(perplexity=limit))[0] == "reports it" and judged(row(perplexity=limit + 1))[0] == "broken"
    )
    word, reason = judged(row(perplexity=None))
    assert word == "broken" and "undefined" in reason
    assert judged(replace(row(), perplexity=None))[0] == "reports it"
    assert judged(row(perplexity=1e9), baseline=replace(BASELINE, perplexity=None))[0] == "reports it"


def test_too_little_data_goes_first():
    few = row(
        perplexity=None,
        call="too little data",
        cause="too few probes",
        flags=("unanswered, left out: 60 at baseline, 0 modified",),
    )
    assert judged(few) == ("too little data", "a reason; unanswered, left out: 60 at baseline, 0 modified")
    assert judged(row(status="failed", perplexity=None)) == (
        "too little data",
        "the experiment failed: RuntimeError",
    )
    assert judged(replace(row(), detection=None), baseline=None) == (
        "too little data",
        "the unmodified model was not measured",
    )
    assert "asked" in judged(replace(row(), detection=None))[1]


@pytest.mark.parametrize(
    ("given", "baseline", "why"),
    [
        (replace(row(), detection=None), None, "no baseline"),
        (replace(row(), detection=None), BASELINE, "Yes/No not asked"),
        (row(call="too little data", cause="too few probes"), BASELINE, "too few control questions"),
        (
            row(call="too little data", cause="too few probes", n_controls=24),
            BASELINE,
            "too few questions about itself",
        ),
        (row(controls_before=replace(ABLE, auc=0.53)), BASELINE, "controls answered too uncertainly"),
        (row(status="failed"), BASELINE, None),  # it is called so
        (row(), BASELINE, None),
        (row(call="broken", cause="vanishing mass"), BASELINE, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_too_little_data_says_which_rule_decided(given, baseline, why):
    assert lacking(replace(given, verdict=verdict(given, baseline))) == why
    assert lacking(given) is None  # the baseline's row has no verdict


def test_numbers_that_no_verdict_rests_on_are_said_not_to_be_judged():
    """The reason comes first: a score with its p-value would be read as a finding."""
    _, reason = judged(row(controls_before=replace(ABLE, auc=0.53)))
    why, _, numbers = reason.partition("; not judged: ")
    assert why == "weak controls: no answer counts as a report or a denial"
    assert "+0.80 nats" in numbers and "p = 0.003" in numbers


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        (
            {"auc": 0.56},
            "in 56% over all questions, where 60% is asked for, and in 80% (70% to 90%) of pairs, which is"
            " enough; 50% is chance",
        ),
        (
            {"pairs": 0.57},
            "in 75% over all questions, which is enough, and in 57% (70% to 90%) of pairs, where 60% is asked"
            " for; 50% is chance",
        ),
        (
            {"d_prime_low": -0.1},
            "of pairs, which is enough; but their d', 1.20 (-0.10 to 1.60), may be 0; 50% and a d' of 0 are",
        ),
        ({"auc": 0.5996}, "in just under 60% over all questions, where 60% is asked for"),
        ({"pairs": None}, "no pairs of control questions were answered"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_weak_controls_say_which_number_falls_short_of_what(failing, said):
    assert said in answering(replace(ABLE, **failing))
    assert not tells(replace(ABLE, **failing))


@pytest.mark.parametrize(
    ("placebos", "said"),
    [
        (1, "; beyond the one placebo (p = 0.5 with one);"),
        (2, "; beyond both placebos (p = 0.33 among them);"),
        (19, "; beyond every placebo (p = 0.05 among them);"),
    ],
)
def test_placebos_are_counted_in_words(placebos, said):
    p, beyond = placebo_place(0.8, [0.01] * placebos)
    assert said in judged(row(p_placebo=p, beyond_placebo=beyond))[1]


def test_what_no_loss_can_explain_is_a_factor():
    assert "lose 150% more of their log-odds than controls" in scaling(SCORE)
    assert "lose 42 times their log-odds more than controls" in scaling(
        replace(SCORE, flattening_to_explain=42.3)
    )


@pytest.mark.parametrize(
    ("times", "said"), [(2.345, "2.35"), (9.83, "9.83"), (115.87, "116"), (5231.4, "5,231")]
)
def test_a_large_factor_has_no_decimals(times, said):
    grown = replace(SCORE, flattening_to_explain=None, sharpening_to_explain=times)
    assert f"would have to grow {said} times as much as controls'" in scaling(grown)


def test_a_model_that_answers_at_chance_reports_nothing():
    """In pairs, over all questions, and by d' beyond chance; a leaning to Yes or No does not come into it."""
    assert judged(row(control_accuracy_before=0.5))[0] == "reports it"
    at_the_border = replace(ABLE, pairs=MIN_ACCURACY, auc=MIN_ACCURACY, d_prime_low=0.01)
    assert judged(row(controls_before=at_the_border))[0] == "reports it"
    for failing in ({"pairs": 0.59}, {"auc": 0.59}, {"d_prime_low": 0.0}, {"pairs": None}):
        weak = replace(at_the_border, **failing)
        for call in ({}, DENIED):
            word, reason = judged(row(controls_before=weak, **call))
            assert word == "too little data" and "0.80 nats" in reason and "no answer counts" in reason
    weak = replace(ABLE, auc=0.53)
    for drift in ({}, {"value": 0.5, "low": 0.2, "p_adjusted": 0.01}):
        word, reason = judged(row(drift, controls_before=weak, call="does not report it"))
        assert word == ("answers drift towards Yes" if drift else "does not report it")
        assert reason.endswith("; weak controls: no answer counts as a report or a denial")
    assert judged(row(controls_before=weak, call="broken", cause="vanishing mass"))[0] == "broken"


def test_the_word_names_the_answers_that_it_is_about():
    """The published question alone may move the other way than the mean over all."""
    drifting = row({"value": 0.32, "low": 0.19, "p_adjusted": 0.008}, call="does not report it")
    probe = PublishedProbe(0.313, 0.344, -0.79, 1.0, True, shift=-0.19)
    word, reason = judged(replace(drifting, published_probe=probe))
    assert word == "answers drift towards Yes" and "the published question alone moves -0.19" in reason
    assert "alone" not in judged(replace(drifting, published_probe=replace(probe, shift=0.2)))[1]


def test_what_did_change_stands_beside_silence():
    def turns(stops):
        return Chat(*[TurnTaking(20, stops, 0.0, 0.0)] * 2)

    silent = row(call="does not report it", p_adjusted=0.5)
    before = replace(BASELINE, capability=Capability(25, 70, 0.2, 0.5), chat=turns(0.9))
    after = replace(
        silent,
        capability=Capability(11, 70, 0.1, 0.3, -0.2, -0.3, -0.1, 0.001, 0.01),
        perplexity=Perplexity(25.0, 3.2, 600, Change(0.2, 0.1, 0.3)),
        chat=turns(0.2),
    )
    word, reason = judged(after, baseline=before)
    assert word == "does not report it"
    assert "what did change: capability 25 to 11 of 70, perplexity 20 to 25" in reason
    assert "chat replies that end, 90% to 20%" in reason
    still = replace(
        after,
        capability=Capability(24, 70, 0.2, 0.5, -0.01, -0.1, 0.1, 0.8, 1.0),
        perplexity=Perplexity(20.1, 3.0, 600, Change(0.005, -0.1, 0.1)),
        chat=turns(0.85),
    )
    assert "nothing else that was measured changed" in judged(still, baseline=before)[1]
    assert "changed" not in judged(silent)[1]  # where nothing else was measured


def test_a_placebo_has_no_change_to_report():
    word, reason = judged(row(control="placebo", call="does not report it", p_adjusted=None, p_value=0.4))
    assert word == "no change to report" and "what did change" not in reason


@pytest.mark.parametrize("first", ["baseline", "row"])
def test_the_unmodified_models_own_recipe_is_no_change_to_report(first):
    """Whichever of the two comes first, and whatever was measured of it."""
    given, baseline = row(score=2.0, low=1.5, high=2.5), BASELINE
    if first == "baseline":
        given = replace(given, same_as=baseline.name)
    else:
        baseline = replace(baseline, same_as=given.name)
    assert judged(given, baseline=baseline)[0] == "no change to report"
    assert judged(replace(given, status="failed"), baseline=baseline)[0] == "too little data"
    assert judged(replace(given, same_as="another"))[0] == "reports it"


def test_what_is_not_judged():
    assert verdict(BASELINE, BASELINE) is None and verdict(row(control="injection"), BASELINE) is None
    word, reason = judged(row(control="placebo", p_adjusted=None, beyond_placebo=True))
    assert word == "reports it" and "p = 0.0001;" in reason  # a false positive, by its own p-value
