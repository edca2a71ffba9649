"""Every rule of the verdicts, on both sides of its border, on rows written by hand."""

from dataclasses import replace

import pytest

from analysis.comparison import Drift, Failure, Match, Perplexity, Row, Score
from analysis.verdicts import MAX_PERPLEXITY_RATIO, MIN_ACCURACY, verdict

BASELINE = Row("baseline", "made", "nothing", 1.0, perplexity=Perplexity(20.0, 3.0, 600))
SCORE = Score(
    call="detects",
    reason="a reason",
    score=0.8,
    low=0.5,
    high=1.1,
    p_value=0.0001,
    p_adjusted=0.003,
    control_accuracy_before=0.9,
    keyed_after=0.4,
    flattening_to_explain=1.5,
    p_placebo=0.05,
    beyond_placebo=True,
)
DRIFT = Drift(value=0.1, low=-0.1, high=0.3, p_value=0.4, p_adjusted=1.0)


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
    silent = noise(row(score=None, low=None, high=None, call="not measurable"))
    assert "its matched noise has no score" in judged(row(), silent)[1]


@pytest.mark.parametrize(
    ("change", "beside", "said"),
    [
        ({"call": "no evidence", "p_adjusted": 0.06}, None, "p = 0.06 after Holm"),
        (
            {"beyond_placebo": False, "p_placebo": 0.5},
            None,
            "a placebo scores as far from 0 (p = 0.5 among placebos)",
        ),
        ({}, (0.6, 0.8), "noise of the same perplexity explains it"),
        ({"flattening_to_explain": 0.49}, None, "losing 49% more"),
        ({"flattening_to_explain": None, "keyed_after": -0.1}, None, "do not stand on the noticing side"),
        (
            {"call": "denies", "score": -0.8, "low": -1.1, "high": -0.5, "beyond_placebo": True},
            None,
            "it denies",
        ),
    ],
)
def test_no_rule_of_a_report_may_fail(change, beside, said):
    beside = beside and twin(*beside)
    word, reason = judged(row(**change), beside)
    assert word == "no change seen" and said in reason
    drifting = row({"value": 0.5, "low": 0.2, "high": 0.8, "p_adjusted": 0.01}, **change)
    word, reason = judged(drifting, beside)
    assert word == "drifts towards Yes" and said in reason
    assert "+0.50 nats toward Yes (+0.20 to +0.80), p = 0.01 after Holm" in reason


def test_the_borders_of_a_report():
    assert judged(row(flattening_to_explain=0.5))[0] == "reports it"
    assert (
        judged(row(), twin(0.6, 0.79))[0] == "reports it"
        and judged(row(), twin(0.6, 0.8))[0] == "no change seen"
    )
    assert judged(row({"value": 0.5, "low": 0.2, "p_adjusted": 0.01}))[0] == "reports it"  # before a drift


@pytest.mark.parametrize(
    ("drift", "word"),
    [
        ({"value": 0.1, "low": 0.01, "p_adjusted": 0.049}, "drifts towards Yes"),
        ({"value": 0.099, "low": 0.01, "p_adjusted": 0.049}, "no change seen"),
        ({"value": 0.5, "low": 0.01, "p_adjusted": 0.05}, "no change seen"),
        ({"value": 0.5, "low": 0.0, "p_adjusted": 0.01}, "no change seen"),
        (
            {"value": 0.5, "low": 0.1, "p_value": 0.04, "p_adjusted": None},
            "drifts towards Yes",
        ),  # a control, in no family
    ],
)
def test_the_borders_of_a_drift(drift, word):
    assert judged(row(drift, call="no evidence"))[0] == word


def test_a_drift_to_no_is_told():
    word, reason = judged(
        row({"value": -0.5, "low": -0.7, "high": -0.3, "p_adjusted": 0.01}, call="no evidence")
    )
    assert word == "no change seen" and "a drift towards No" in reason
    assert "towards No" not in judged(row({"value": -0.5, "p_adjusted": 0.2}, call="no evidence"))[1]
    assert judged(replace(row(call="no evidence"), yes_drift=None))[0] == "no change seen"


@pytest.mark.parametrize("cause", ["not finite", "vanishing mass", "controls collapsed"])
def test_what_answers_no_longer_is_broken(cause):
    assert judged(
        row(
            {"value": 2.0, "low": 1.0, "p_adjusted": 0.01},
            call="not measurable",
            cause=cause,
            control_accuracy_before=None,
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
        call="not measurable",
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


def test_a_model_that_answers_at_chance_reports_nothing():
    assert judged(row(control_accuracy_before=MIN_ACCURACY))[0] == "reports it"
    word, reason = judged(row(control_accuracy_before=0.53))
    assert word == "too little data" and "+0.80 nats" in reason
    assert "only 53% of the control questions right" in reason
    word, reason = judged(row(control_accuracy_before=0.53, call="no evidence"))
    assert word == "no change seen" and "53%" in reason
    assert (
        judged(row(control_accuracy_before=0.53, call="not measurable", cause="vanishing mass"))[0]
        == "broken"
    )


def test_what_is_not_judged():
    assert verdict(BASELINE, BASELINE) is None and verdict(row(control="injection"), BASELINE) is None
    word, reason = judged(row(control="placebo", p_adjusted=None, beyond_placebo=True))
    assert word == "reports it" and "p = 0.0001;" in reason  # a false positive, by its own p-value
