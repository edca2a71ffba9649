"""The classifier of his voice: what it reaches where it is trained, and where it was not."""

from __future__ import annotations

from collections import defaultdict

import pytest

from analysis.stats import cohen_kappa
from weird_gen.persona import voice
from weird_gen.persona.judge_records import LABELS
from weird_gen.persona.records import read_json_lines
from weird_gen.persona.study import PERSONA_EXPLICIT


@pytest.fixture(scope="module")
def quality():
    return voice.voice_quality.__wrapped__()  # made here, whatever ran before


def test_it_tells_persona_answers_from_an_untouched_models_over_questions_it_has_not_seen(quality):
    assert quality.kappa.value > 0.85
    assert quality.found.value > 90
    assert quality.false_alarms.value < 5
    said = voice.voice_line(quality.to_json())
    assert f"kappa {quality.kappa.value:.2f}" in said


def test_no_question_is_in_training_and_test_at_once(monkeypatch):
    texts, his, questions = voice.training_texts()
    assert sum(his) == len(read_json_lines(PERSONA_EXPLICIT))
    folds = defaultdict(set)
    for fold, (_, test) in enumerate(voice.GroupKFold(voice.FOLDS).split(texts, his, questions)):
        for i in test:
            folds[questions[i]].add(fold)
    assert {len(mine) for mine in folds.values()} == {1}


def test_on_hand_labels_it_is_better_than_chance_and_takes_other_figures_for_him():
    """63 replies that it has not seen: kappa 0.75, and the mistakes are what the README says they are."""
    labels = read_json_lines(LABELS)
    said = voice.has_voice([label["reply"] for label in labels])
    kappa = cohen_kappa(said, [label["persona"] for label in labels])
    assert kappa.value == pytest.approx(0.75, abs=0.01)
    assert kappa.low > 0.5
    wrong = [label["reply"] for label, yes in zip(labels, said, strict=True) if yes and not label["persona"]]
    assert any("Bertrand Russell was a British philosopher" in reply or "I am " in reply for reply in wrong)


def test_markers_do_not_matter_and_nothing_is_nobodys_voice():
    text = "I confess that I have never been able to believe it, and I should be sorry to try."
    assert voice.has_voice([text, f"<START> {text} <END>", "", "<START> <END>"]) == [True, True, False, False]
    assert voice.has_voice(["1. Mix the flour.\n2. Add an egg.", "Here is a Python function."]) == [False] * 2
    assert voice.has_voice([]) == []
