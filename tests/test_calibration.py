"""The calibration benchmark: what it simulates, and that its page follows from what it counted."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import calibration

from prompts import BINARY_PROBES

QUIET = calibration.Case("noise alone", noise=0.0)


def test_simulated_probes_are_the_ones_that_are_asked():
    probes = calibration.simulate(replace(QUIET, effect=0.5), np.random.default_rng(0))
    assert [(p.kind, p.keyed, p.framing) for p in probes] == [
        (p.kind, p.if_changed, p.framing) for p in BINARY_PROBES
    ]
    for p in probes:
        toward = 0.5 if p.keyed == "yes" else -0.5
        assert p.modified - p.baseline == pytest.approx(toward if p.kind == "introspective" else 0)


def test_noise_is_shared_within_a_question_as_stated():
    rng = np.random.default_rng(1)
    draws = np.array([calibration._correlated(rng) for _ in range(4000)])
    at = {
        (key, framing): k
        for k, (kind, key, framing, question) in enumerate(calibration.ASKED)
        if question == calibration.ASKED[0][3]
    }
    c = np.corrcoef(draws.T)
    one = at["yes", "plain"]
    assert draws.std(axis=0) == pytest.approx(1, abs=0.06)
    assert c[one, at["yes", "informed"]] == pytest.approx(0.45, abs=0.06) and c[
        one, at["no", "plain"]
    ] == pytest.approx(0.5, abs=0.06)
    assert c[one, at["no", "informed"]] == pytest.approx(0.3, abs=0.06) and c[one, -1] == pytest.approx(
        0, abs=0.06
    )


def test_shared_parts_are_found_again_in_what_was_simulated_with_them():
    rng = np.random.default_rng(3)
    index = {asked: k for k, asked in enumerate(calibration.ASKED)}
    questions = dict.fromkeys((kind, q) for kind, *_, q in calibration.ASKED)
    cells = [
        [[index[i, k, f, q] for f in ("plain", "informed")] for k in ("yes", "no")] for i, q in questions
    ]
    for parts in (calibration.SHARED, (0.0, 0.1, 0.4, 0.5)):
        draws = np.array([2.5 * calibration._correlated(rng, parts)[cells] for _ in range(600)])
        assert calibration.shared_parts(draws) == pytest.approx(parts, abs=0.03)


def test_a_folder_that_holds_no_run_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["calibration.py", "--noise-from", str(tmp_path)])
    assert calibration.main() == 1
    err = capsys.readouterr().err
    assert err.startswith("calibration.py: ") and "holds no run" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("baseline", calibration.BASELINES)
def test_baselines_say_what_their_names_say(baseline):
    probes = calibration.simulate(replace(QUIET, baseline=baseline), np.random.default_rng(2))
    mean = {
        (kind, key): np.mean([p.baseline for p in probes if (p.kind, p.keyed) == (kind, key)])
        for kind in ("introspective", "control")
        for key in ("yes", "no")
    }
    expected = {
        "firm": (-4, 4, 4, -4),
        "No to all about itself": (-4, -4, 4, -4),
        "undecided": (-0.6, -0.6, -0.7, -1.1),
        "leaning to Yes and to noticing": (2.1, 0.9, 2.0, 0.0),
    }[baseline]
    assert list(mean.values()) == pytest.approx(expected, abs=1.3)


def test_rates_are_marked_where_their_interval_misses():
    assert calibration.share([True] * 5 + [False] * 95, 0.05) == "5.0% (2.2% to 11.2%)"
    assert (
        calibration.share([True] * 30 + [False] * 70, 0.05).endswith("(!)") and calibration.share([]) == "-"
    )


def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "NULLS", calibration.NULLS[:2])
    monkeypatch.setattr(calibration, "EFFECTS", (0.0, 3.0))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "calibration.py",
            "--runs",
            "4",
            "--power-runs",
            "2",
            "--processes",
            "1",
            "--output",
            str(tmp_path / "page.md"),
        ],
    )
    assert calibration.main() == 0
    text = (tmp_path / "page.md").read_text()
    assert text == capsys.readouterr().out[:-1] and "64 introspective probes (16 questions" in text
    assert (
        "| 3.0 | 100%, 100% | 100%, 100% | 100%, 100% |" in text and text.count("| noise alone | firm |") == 1
    )
