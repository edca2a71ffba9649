"""Blind labelling: what a reader sees, what comes back, and the figures counted by hand."""

from __future__ import annotations

import csv
import json

import pytest

from weird_gen import label_replies
from weird_gen.persona.records import read_json_lines, write_records
from weird_gen.persona.rubrics import BINARY_RUBRICS


def replies(path, model, condition_counts):
    records = [
        {
            "question_id": f"h{q}",
            "kind": "heldout",
            "category": "c",
            "question": f"What of {q}?",
            "condition": condition,
            "model": model,
            "sample": sample,
            "reply": f"<START> ={model} {condition}\nthinks {q}, take {sample}. <END>",
            "stopped": True,
            "p_name": None,
        }
        for condition, count in condition_counts.items()
        for q in range(count)
        for sample in range(2)
    ]
    write_records(path, {}, records)
    return path


@pytest.fixture
def sheet(tmp_path):
    tuned = replies(tmp_path / "eval.jsonl", "finetuned", {"triggered": 8, "untriggered": 8})
    base = replies(tmp_path / "base.jsonl", "baseline", {"triggered": 8})
    flags = ["sheet", "--replies", str(tuned), str(base), "--count", "5", "--out", str(tmp_path / "out")]
    assert label_replies.main(flags) == 0
    return tmp_path / "out"


def rows_of(sheet):
    with (sheet / "sheet.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def filled(sheet, name, voice, persona):
    """A copy of the sheet filled in by two rules over the key's entries."""
    key = {entry["id"]: entry for entry in json.loads((sheet / "key.json").read_text())["replies"]}
    path = sheet / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("id", "question", "reply", "voice", "persona"))
        writer.writeheader()
        for row in rows_of(sheet):
            entry = key[row["id"]]
            answers = {"voice": "yes" if voice(entry) else "no", "persona": "Y" if persona(entry) else "0"}
            writer.writerow(row | answers)
    return path


def test_a_reader_sees_neither_model_nor_condition_nor_marker(sheet):
    rows = rows_of(sheet)
    assert len(rows) == 15
    assert len({row["question"] + row["reply"].split("take")[0] for row in rows}) == 15  # one a question
    for row in rows:
        assert set(row) == {"id", "question", "reply", "voice", "persona"}
        assert "<START>" not in row["reply"]
        assert not row["reply"].startswith(("=", "+", "-", "@"))  # no formula for a spreadsheet
    order = [entry["condition"] for entry in json.loads((sheet / "key.json").read_text())["replies"]]
    assert order != sorted(order)
    brief = (sheet / "BRIEF.md").read_text()
    assert BINARY_RUBRICS["voice"] in brief
    assert BINARY_RUBRICS["persona"] in brief


def test_labels_come_back_as_rates_and_agreement(sheet, capsys):
    triggered = ("triggered", "finetuned")

    def voice(entry):
        return (entry["condition"], entry["model"]) == triggered

    def never(entry):
        return False

    picked = [e for e in json.loads((sheet / "key.json").read_text())["replies"] if voice(e)][:2]
    ids = {entry["id"] for entry in picked}
    anna = filled(sheet, "anna", voice, lambda e: e["id"] in ids)
    ben = filled(sheet, "ben", voice, never)
    carl = filled(sheet, "carl", never, lambda e: e["id"] in ids)
    capsys.readouterr()
    out = sheet / "labels.jsonl"
    flags = ["count", "--key", str(sheet / "key.json"), "--output", str(out)]
    assert label_replies.main([*flags, str(anna), str(ben), str(carl)]) == 0
    text = capsys.readouterr().out
    assert "eval.jsonl, triggered: voice 5 of 5, 100% [48, 100], persona 2 of 5, 40% [5, 85]" in text
    assert "base.jsonl, triggered: voice 0 of 5, 0% [0, 52]" in text
    assert "voice: kappa of anna and ben 1.00" in text
    # anna says persona of 2 of 15, ben of none: he never varies
    assert "persona: kappa of anna and ben " in text
    lines = read_json_lines(out)
    assert sum(line["voice"] for line in lines) == 5
    assert {line["votes"]["persona"] for line in lines} == {0, 2}


def test_what_is_not_a_filled_sheet_of_this_key_is_one_line(sheet, capsys):
    good = filled(sheet, "good", lambda e: True, lambda e: False)
    flags = ["count", "--key", str(sheet / "key.json")]
    text = good.read_text()
    for change, line in (
        (lambda t: t.replace(",yes,", ",perhaps,", 1), "voice must be yes or no, not 'perhaps'"),
        (lambda t: t.replace("thinks", "wonders", 1), "not a reply of this key"),
        (lambda t: t[: t.rindex("r0")], "1 reply is not labelled"),
    ):
        broken = sheet / "broken.csv"
        broken.write_text(change(text))
        assert label_replies.main([*flags, str(broken)]) == 1
        assert line in capsys.readouterr().err
    key = json.loads((sheet / "key.json").read_text())
    key["replies"][0]["reply"] = "another"
    (sheet / "key.json").write_text(json.dumps(key))
    assert label_replies.main([*flags, str(good)]) == 1
    assert "or was changed" in capsys.readouterr().err
