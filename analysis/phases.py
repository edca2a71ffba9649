"""Detection scores where one model began a conversation and another answered it (suites/phases.py).

For every combination of who began and who answered, on either occasion, and for each topic of the questions:
the shift of the keyed answers toward the topic being true, beyond what the controls predict, against the
intact model that read and answered the same tokens. A model that can tell shifts where the topic is true, and
nowhere else. Scores are those of `analysis.detection`, and a call counts by the rule of every score that
stands by itself (`verdicts.lacking_for`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from analysis.detection import DENIES, REPORTS, DetectionScore, Probe, correct_calls, detection_score
from analysis.stats import Json
from analysis.verdicts import lacking_for, tells

TOPICS = {
    "reading": "the first message was read by a changed model",
    "now": "the model that answers is changed",
    "exchange": "the two are not the same model",
}
RESAMPLES = 999  # of each of up to 18 scores an experiment


@dataclass(frozen=True)
class PhaseScore(Json):
    """One topic in one combination. `true`: whether the topic is true of it. `score` is as in
    comparison.json, adjusted over the experiments that are no controls, within topic and combination."""

    experiment: str
    control: str | None
    occasion: str
    begins: str
    answers: str
    topic: str
    true: bool
    score: DetectionScore


def is_true(topic: str, begins: str, answers: str) -> bool:
    """Whether a topic is true where `begins` and `answers` ("intact" or "changed") began and answered."""
    return {
        "reading": begins == "changed",
        "now": answers == "changed",
        "exchange": begins != answers,
    }[topic]


def paired(measured: dict, cells: Iterable[dict], topic: str) -> list[Probe]:
    """The questions of a topic and the controls in all conversations of a combination; both wordings of a
    question, in all conversations, are one cluster."""
    return [
        Probe(
            id=f"{question['id']}-{cell['conversation']}",
            kind=question["kind"],
            keyed=question["keyed"],
            baseline=cell["intact_log_odds"][k],
            modified=cell["log_odds"][k],
            framing=cell["conversation"],
            pair=question["id"].rsplit("-", 1)[0],
            baseline_mass=cell["intact_mass"][k],
            modified_mass=cell["mass"][k],
        )
        for cell in cells
        for k, question in enumerate(measured["questions"])
        if question["topic"] in (None, topic)
    ]


def phase_scores(results: Mapping[str, dict], seed: int = 0) -> list[PhaseScore]:
    """All scores of a run's experiments that were asked the suite `phases`, in order."""
    return adjusted([score for result in results.values() for score in scores_of(result, seed)])


def scores_of(result: dict, seed: int = 0) -> list[PhaseScore]:
    """One experiment's scores, by themselves; none where it was not asked."""
    measured, experiment = result["measurements"].get("phases"), result["experiment"]
    combinations: dict[tuple[str, str, str], list[dict]] = {}
    for cell in measured["cells"] if measured else ():
        combinations.setdefault((cell["occasion"], cell["begins"], cell["answers"]), []).append(cell)
    scores = []
    for (occasion, begins, answers), cells in combinations.items():
        for topic in TOPICS:
            score = detection_score(paired(measured, cells, topic), resamples=RESAMPLES, seed=seed)
            control, true = experiment.get("control"), is_true(topic, begins, answers)
            scores.append(
                PhaseScore(experiment["name"], control, occasion, begins, answers, topic, true, score)
            )
    return scores


def adjusted(scores: list[PhaseScore]) -> list[PhaseScore]:
    """The scores with Holm's correction within topic and combination, over experiments that are no
    controls."""
    families: dict[tuple, list[int]] = {}
    for k, one in enumerate(scores):
        if one.control is None:
            families.setdefault((one.occasion, one.begins, one.answers, one.topic), []).append(k)
    out = list(scores)
    for members in families.values():
        for k, score in zip(members, correct_calls([scores[k].score for k in members]), strict=True):
            out[k] = replace(scores[k], score=score)
    return out


@dataclass(frozen=True)
class PhaseSummary(Json):
    """One topic in one combination over a run's changed models: their number, median score (nats), of how
    many a report or a denial would count (the intact model tells what the controls ask: `verdicts.tells`),
    how many report or deny it so that it counts; and the placebos' lowest and highest score."""

    occasion: str
    begins: str
    answers: str
    topic: str
    true: bool
    n: int
    median: float | None
    judged: int
    reports: int
    denies: int
    placebo_low: float | None
    placebo_high: float | None


def summarized(scores: Iterable[PhaseScore]) -> list[PhaseSummary]:
    """A line for each topic and combination; experiments without a score do not count."""
    groups: dict[tuple, list[PhaseScore]] = {}
    for one in scores:
        groups.setdefault((one.occasion, one.begins, one.answers, one.topic, one.true), []).append(one)
    out = []
    for (occasion, begins, answers, topic, true), members in groups.items():
        scores_of = {
            side: [one.score.score for one in members if one.control == side and one.score.score is not None]
            for side in (None, "placebo")
        }
        changed, placebos = scores_of[None], scores_of["placebo"]
        own = [one.score for one in members if one.control is None]
        calls = [score.call for score in own if lacking_for(score) is None]
        out.append(
            PhaseSummary(
                occasion=occasion,
                begins=begins,
                answers=answers,
                topic=topic,
                true=true,
                n=len(changed),
                median=float(np.median(changed)) if changed else None,
                judged=sum(score.score is not None and tells(score.controls_before) for score in own),
                reports=calls.count(REPORTS),
                denies=calls.count(DENIES),
                placebo_low=min(placebos, default=None),
                placebo_high=max(placebos, default=None),
            )
        )
    return out
