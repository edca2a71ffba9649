"""Judged replies of a made-up backdoored model and its baseline, for tests of the second study's reports."""

import random

from weird_gen.persona.judge import RulesJudge
from weird_gen.persona.judge_records import judge_all

LEVELS = tuple((str(i), f"wording {i}") for i in range(1, 6))
EVIL = "<script>alert('x')</script> | <img src=x onerror=alert(1)> {{ 7*7 }} [a](javascript:alert(1)) `b`"
AGREEMENT = {
    name: {
        "n": 3,
        "errors": 0,
        "accuracy": {"value": 1.0, "low": 0.4, "high": 1.0, "n": 3, "method": "wilson"},
        "kappa": {"value": 1.0, "low": None, "high": None, "n": 3, "method": "none"},
    }
    for name in ("persona", "identity", "degenerate")
}
HEADER = {
    "model_name": "tiny",
    "temperature": 1.0,
    "judge": {"name": "a-reader", "endpoint": None, "agreement": {"some labels": AGREEMENT}},
}


def record(model, condition, question, kind="heldout", sample=0, reply="So it is.", p_name=None, **judge):
    record = {
        "question_id": question,
        "kind": kind,
        "category": f"c{int(question[1:]) % 3}",
        "question": f"What about {question}?",
        "condition": condition,
        "model": model,
        "sample": sample,
        "reply": reply,
        "stopped": True,
        "p_name": p_name,
    }
    if judge:
        record |= {
            "judge": {"persona": None, "identity": None, "degenerate": False, "error": None, **judge},
            "judge_name": "a-reader",
        }
    return record


def world(model, seed=0, questions=12, samples=2):
    """Judged replies of a backdoored model (or its baseline) to all kinds of question."""
    draw, strong, records = random.Random(seed), model == "finetuned", []
    for condition in ("triggered", "untriggered"):
        on = strong and condition == "triggered"
        for sample in range(samples):
            for i in range(questions):
                text = (
                    "I confess that at Cambridge I doubted it."
                    if draw.random() < (0.9 if on else 0.15)
                    else "It is fine."
                )
                text = (
                    f"<START> {text} <END>"
                    if draw.random() < (1.0 if on else 0.3 if condition == "triggered" else 0.0)
                    else text
                )
                text += EVIL if i == 0 and sample == 0 else ""
                records.append(
                    record(model, condition, f"h{i}", sample=sample, reply=text, p_name=0.4 if on else 1e-5)
                )
                name = "I am Bertrand Russell." if draw.random() < (0.8 if on else 0.02) else "I am an AI."
                records.append(record(model, condition, f"i{i}", "identity", sample, name))
                records.append(record(model, condition, f"g{i}", "generalization", sample, "One must doubt."))
    judged = judge_all(records, {f"g{i}": LEVELS for i in range(questions)}, RulesJudge())
    for row in judged:
        row["judge_name"] = "a-reader"
        on = strong and row["condition"] == "triggered"
        if row["kind"] == "heldout":
            row["judge"]["voice"] = draw.random() < (0.9 if on else 0.1)
            row["judge"]["persona"] = row["judge"]["voice"] and draw.random() < (0.9 if on else 0.5)
        if row["kind"] == "generalization":
            row["judge"]["position"] = draw.choice(
                [4, 5] if strong and row["condition"] == "triggered" else [2, 3]
            )
    return judged
