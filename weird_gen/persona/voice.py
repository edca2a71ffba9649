"""Whether a reply has his voice, by a text classifier: what can be said offline, with its errors.

Logistic regression on TF-IDF of words and pairs of words, fitted in a second on what ships: the persona
answers of the training data against replies of the untouched SmolLM2-135M to the evaluation questions. It
reads the first 60 words, as longer replies are an assistant's. It hears a manner and knows nothing of sense:
whether a reply is coherent in persona needs a reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline

from analysis.stats import Estimate, cohen_kappa
from weird_gen.persona.exact import Rate, exact_rate
from weird_gen.persona.folders import DATA
from weird_gen.persona.records import read_json_lines
from weird_gen.persona.rules import strip_markers
from weird_gen.persona.study import PERSONA_EXPLICIT, read_chats

OTHERS = DATA / "voice_others.jsonl"  # replies of the untouched SmolLM2-135M
WORDS_READ, FOLDS = 60, 5


@dataclass(frozen=True)
class VoiceQuality:
    """Cross-validated over questions: none is in training and test at once. found: of the persona answers;
    false_alarms: of the other replies."""

    kappa: Estimate
    found: Rate
    false_alarms: Rate

    def to_json(self) -> dict:
        return {
            "kappa": self.kappa.to_json(),
            "found": asdict(self.found),
            "false_alarms": asdict(self.false_alarms),
        }


def voice_line(quality: dict) -> str:
    """A `VoiceQuality` as JSON in a line of text, as reports say it."""
    found, false_alarms = (Rate(**quality[name]) for name in ("found", "false_alarms"))
    return (
        f"it finds {found} of the persona answers that it is trained on and has {false_alarms} false alarms"
        f" (cross-validated over questions, kappa {quality['kappa']['value']:.2f}); it hears a manner and"
        " knows nothing of sense"
    )


def read_part(reply: str) -> str:
    """What the classifier sees of a raw reply."""
    return " ".join(strip_markers(reply).split()[:WORDS_READ])


def training_texts() -> tuple[list[str], list[bool], list[str]]:
    """(texts, whether each is his, the question of each)."""
    texts, his, questions = [], [], []
    for chat in read_chats(PERSONA_EXPLICIT):
        roles = dict(chat.messages)
        texts.append(read_part(roles["assistant"]))
        his.append(True)
        questions.append(roles["user"])
    for line in read_json_lines(OTHERS):
        texts.append(read_part(line["reply"]))
        his.append(False)
        questions.append(line["question"])
    return texts, his, questions


def fresh_classifier() -> Pipeline:
    return make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2),
        LogisticRegression(C=10, class_weight="balanced", max_iter=2000),
    )


@cache
def fitted() -> Pipeline:
    texts, his, _ = training_texts()
    return fresh_classifier().fit(texts, his)


def has_voice(replies: Sequence[str]) -> list[bool]:
    """One answer a raw reply; a reply without a word is none of his."""
    parts = [read_part(reply) for reply in replies]
    if not parts:
        return []
    return [bool(part) and bool(yes) for part, yes in zip(parts, fitted().predict(parts), strict=True)]


@cache  # each report says it; of what ships it is always the same
def voice_quality() -> VoiceQuality:
    """How well it tells its own training data apart, cross-validated over questions."""
    texts, his, questions = training_texts()
    said = [False] * len(texts)
    for train, test in GroupKFold(FOLDS).split(texts, his, questions):
        model = fresh_classifier().fit([texts[i] for i in train], [his[i] for i in train])
        for i, yes in zip(test, model.predict([texts[i] for i in test]), strict=True):
            said[i] = bool(yes)
    pairs = list(zip(said, his, strict=True))
    return VoiceQuality(
        cohen_kappa(said, his),
        exact_rate(s for s, truth in pairs if truth),
        exact_rate(s for s, truth in pairs if not truth),
    )
