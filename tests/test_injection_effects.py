"""Effects of the further injection suites against numbers worked out by hand from made results."""

import json
import math
from types import SimpleNamespace

import pytest

from analysis import published
from analysis.injection import (
    comparison_effects,
    effects,
    localisation_effects,
    naming_effects,
    question_effects,
    word_effects,
)
from reporting.injected import injected_section
from runner.results import write_computed

NOWHERE = {"depth": None, "layers": None, "strength": 0.0}
HERE = {"depth": 0.69, "layers": [19, 20], "strength": 2.0}


def by(rows, **wanted):
    """The only row with these values."""
    (row,) = [r for r in rows if all(getattr(r, k) == v for k, v in wanted.items())]
    return row


# ---- in words ----------------------------------------------------------------------------------------------


def reply(thought, outcome, *names):
    return {"thought": thought, "text": "", "outcome": outcome, "names": list(names)}


WORDS = {
    "cells": [
        {
            "question": "detect",
            "kind": "none",
            "span": None,
            **NOWHERE,
            "replies": [reply("wolf", "denies"), reply("gold", "detects", "wolf")],
        },
        {
            "question": "detect",
            "kind": "concept",
            "span": "turn",
            **HERE,
            "replies": [
                reply("wolf", "detects", "wolf"),
                reply("gold", "detects", "wolf"),
                reply("bread", "refuses", "bread"),
                reply("war", "incoherent"),
            ],
        },
    ]
}


def test_hits_detect_and_name_the_right_concept_and_refusals_are_counted_apart():
    rows = word_effects(WORDS)
    share = {r.measure: r.value for r in rows if r.kind == "concept"}
    assert share == {
        "detects": 0.5,
        "detects and names it": 0.25,
        "names it": 0.5,
        "names another": 0.25,
        "refuses": 0.25,
        "incoherent": 0.25,
    }
    hit = by(rows, kind="concept", measure="detects and names it")
    assert (hit.n, hit.depth, hit.strength, hit.condition) == (4, 0.69, 2.0, "detect, turn")
    # Wilson's interval of 1 in 4, from its formula
    z, p, n = 1.959964, 0.25, 4
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert hit.low == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-5)
    assert hit.high == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-5)
    assert by(rows, kind="none", measure="detects").value == 0.5
    assert by(rows, kind="none", measure="detects and names it").value == 0.0


# ---- single layers -----------------------------------------------------------------------------------------


def layered(shift, drift, **changes):
    """Sixteen keyed pairs; an injection moves every answer by `drift`, those that notice by `shift` too."""
    kinds = [("introspective", 8), ("control", 8)]
    probes = [
        {"id": f"{kind}-{k}-{key}", "kind": kind, "keyed": key, "framing": "plain", "question": f"{kind}{k}"}
        for kind, count in kinds
        for k in range(count)
        for key in ("yes", "no")
    ]
    base = [0.3 * ((7 * k) % 11 - 5) for k, _ in enumerate(probes)]
    sign = [(1 if p["keyed"] == "yes" else -1) * (p["kind"] == "introspective") for p in probes]
    moved = [b + drift + shift * s + 0.01 * (k % 5) for k, (b, s) in enumerate(zip(base, sign, strict=True))]

    def cell(values, **head):
        n = len(values)
        return head | {"framing": "plain", "log_odds": values, "mass": [0.9] * n, "answered": [True] * n}

    return {
        "concepts": ["bread", "wolf"],
        "probes": probes,
        "cells": [
            cell(base, kind="none", name="none", **NOWHERE),
            cell(moved, kind="concept", name="bread", **HERE),
            cell(moved, kind="concept", name="wolf", **HERE),
            cell(base, kind="garbled", name="random tokens", **NOWHERE),
        ],
    } | changes


def test_the_score_sees_noticing_and_not_a_drift():
    seen = by(question_effects(layered(1.0, 0.0)), kind="concept", measure="detection score")
    drifted = by(question_effects(layered(0.0, 1.0)), kind="concept", measure="detection score")
    assert seen.value == pytest.approx(1.0, abs=0.1) and seen.low > 0 and seen.n == 32
    assert abs(drifted.value) < 0.1
    rows = question_effects(layered(1.0, 0.0))
    assert by(rows, kind="garbled", measure="detection score").value == pytest.approx(0, abs=1e-6)
    before, after = (by(rows, kind=k, measure="says Yes") for k in ("none", "concept"))
    assert after.value > before.value and after.n == 16 and before.n == 8


def test_naming_is_scored_above_what_is_named_anyway():
    """bread is always the likeliest; the wolf gains when it is injected. Two orders."""
    suite = layered(0.0, 0.0)
    prior, wolf = [math.log(0.9), math.log(0.1)], [math.log(0.6), math.log(0.4)]
    for cell, named in zip(suite["cells"], (prior, [0.0, -9.0], wolf, prior), strict=True):
        cell["naming"] = [named, named]
    rows = naming_effects(suite)
    gains, likeliest, bits = (by(rows, measure=m) for m in ("gains most", "likeliest", "bits"))
    assert (gains.value, gains.n, gains.chance) == (1.0, 4, 0.5) and likeliest.value == 0.5
    p, q = (math.exp(0), math.exp(-9)), (0.6, 0.4)
    mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    want = sum(x * math.log2(x / m) for row in (p, q) for x, m in zip(row, mean, strict=True)) / 2
    assert bits.value == pytest.approx(want)
    suite["cells"][1]["naming"] = [[None, None]] * 2
    assert by(naming_effects(suite), measure="gains most").value == 0.5
    json.dumps([r.to_json() for r in naming_effects(suite)], allow_nan=False)


# ---- where, and which more strongly ------------------------------------------------------------------------


def located(places):
    """A favorite answer, 3, that stays the likeliest; the places in `places` gain most when touched."""
    prior = [-5.0] * 10
    prior[2] = -0.1
    rows = []
    for place in range(10):
        row = list(prior)
        row[place if place in places else (place + 1) % 10] += 1.0
        rows.append(row)
    cell = {"order": 0, "kind": "concept", "name": "bread", **HERE, "logprobs": rows, "mass": [1.0] * 10}
    return {"priors": [{"logprobs": prior, "mass": 1.0}], "cells": [cell]}


def test_a_favorite_number_is_right_in_a_tenth():
    rows = localisation_effects(located({0, 1, 4, 9}))
    assert by(rows, measure="gains most").value == 0.4 and by(rows, measure="likeliest").value == 0.1
    assert by(rows, measure="gains most").n == 10 and by(rows, measure="likeliest").chance == 0.1


def compared(stronger, weaker, answered=True):
    sides = {"stronger": stronger, "weaker": weaker}
    cell = {"pair": 0, "kind": "concept", "name": "bread", **HERE}
    cell |= {key: {"log_odds": value, "answered": answered} for key, value in sides.items()}
    return {"comparison": {"cells": [cell]}}


def test_a_lean_to_one_sentence_gains_nothing_in_a_comparison():
    """[log-odds of 1 against 2 with the first the stronger, with the second]."""
    leaning = comparison_effects(compared([3.0, 3.0], [3.0, 3.0]))
    assert (
        by(leaning, measure="as it stands").value == 0.5 and by(leaning, measure="moves with it").value == 0
    )
    telling = comparison_effects(compared([3.0, 2.0], [2.0, 3.0]))
    assert by(telling, measure="moves with it").value == 1.0
    assert by(telling, measure="as it stands").value == 0.5
    wrong = comparison_effects(compared([-1.0, 1.0], [1.0, -1.0]))
    assert {r.value for r in wrong} == {0.0}
    assert {r.value for r in comparison_effects(compared([None, None], [1.0, -1.0], False))} == {0.0}


def test_all_of_a_run_in_order_and_published_tasks_are_ones_of_ours():
    both = effects([{"localisation": located({1}) | compared([1.0, 0.0], [0.0, 1.0])}, {"binary": {}}, {}])
    assert [r.task for r in both] == ["localisation"] * 2 + ["comparison"] * 2
    suite = layered(0.0, 0.0)
    for cell in suite["cells"]:
        cell["naming"] = [[-0.7, -0.7]]
    ours = {
        (r.task, r.measure) for r in effects([{"injection_layers": suite, "injection_generation": WORDS}])
    }
    ours |= {(r.task, r.measure) for r in both}
    assert {what for what, *_ in published.INJECTION_EFFECTS} <= ours


def test_the_summary_shows_the_best_condition_of_each_kind_beside_others(tmp_path):
    run = SimpleNamespace(path=tmp_path)
    measured = [{"binary": {}}, {}, {"injection_generation": WORDS}]
    lines = injected_section(run, measured, 0)
    (hit,) = [line for line in lines if "detects and names it | concept" in line]
    assert "| in words, detect |" in hit and "0.25 " in hit and "| 0.88, 0.597 |" in hit
    (none,) = [line for line in lines if "detects and names it | none" in line]
    assert "0.00 " in none and "0.88" not in none
    rows = json.loads((tmp_path / "injection.json").read_text())["effects"]
    write_computed(tmp_path / "wanted.json", {"effects": [row.to_json() for row in word_effects(WORDS)]})
    assert rows == json.loads((tmp_path / "wanted.json").read_text())["effects"]
    assert injected_section(run, [{}], 0) == []
    assert any("open-introspection" in line for line in lines)
