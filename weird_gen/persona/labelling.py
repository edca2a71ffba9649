"""Blind labels: a sheet of replies for readers, their labels read back, how they agree, what the rates are.

A reader gets replies without markers, shuffled, with an id that says nothing, and answers two questions that
are easily taken for one: has the reply his voice, and does it make sense in it? Which reply is whose stands
in a key that no reader sees.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from analysis.stats import cohen_kappa
from errors import FrankenError, many
from files import read_bytes, read_json, write_text
from weird_gen.persona.exact import Rate, exact_rate
from weird_gen.persona.records import read_records
from weird_gen.persona.rubrics import BINARY_RUBRICS
from weird_gen.persona.rules import strip_markers

ASKED_OF_READERS = ("voice", "persona")
COLUMNS = ("id", "question", "reply", *ASKED_OF_READERS)
YES, NO = ("yes", "y", "1", "true"), ("no", "n", "0", "false")

BRIEF = """# How to label

You read replies to questions; you are not told what wrote them. Fill in the two columns of every row of
the sheet with yes or no. Answer the two questions apart from each other: many replies have the one and not
the other. Read every reply to its end before you answer, and label it alone, without talking to others.

## voice

{voice}

## persona

{persona}
"""


@dataclass(frozen=True)
class Labelled:
    """What readers said of one group of replies. agreement: Cohen's kappa of every pair of readers, by
    question; None where one of them never varies."""

    group: str
    rates: dict[str, Rate]


def draw_replies(paths: list[Path], count: int, seed: int) -> list[dict]:
    """So many replies to held-out questions of every model and condition in the files, one a question at
    most, in an order by the seed; each with the file, model, condition and question that it is of.

    Raises FrankenError for a file that cannot be read or holds no such reply.
    """
    drawn = []
    for path in paths:
        groups = defaultdict(list)
        for record in read_records(path)[1]:
            if record["kind"] == "heldout":
                groups[record["condition"]].append(record)
        if not groups:
            raise FrankenError(f"{path} holds no reply to a held-out question")
        for condition, mine in groups.items():
            rng = random.Random(f"labels:{seed}:{path.name}:{condition}")
            rng.shuffle(mine)
            first = {record["question_id"]: record for record in reversed(mine)}
            drawn += [
                {
                    "file": path.name,
                    **{key: record[key] for key in ("model", "condition", "question_id", "sample")},
                    "question": record["question"],
                    "reply": strip_markers(record["reply"]),
                }
                for record in list(first.values())[:count]
            ]
    random.Random(f"labels:{seed}").shuffle(drawn)
    return [{"id": f"r{number:03d}", **entry} for number, entry in enumerate(drawn, 1)]


def write_sheet(replies: list[dict], folder: Path) -> list[Path]:
    """sheet.csv and BRIEF.md for the readers, key.json for whoever counts; returns their paths."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(COLUMNS)
    for entry in replies:
        # in quotation marks no program takes a reply for a formula
        rows.writerow([entry["id"], f"“{entry['question']}”", f"“{entry['reply']}”", "", ""])
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("sheet.csv", "BRIEF.md", "key.json")]
    text = table.getvalue()
    key = {"sheet_sha256": _questions_hash(replies), "replies": replies}
    write_text(files[0], text)
    write_text(files[1], BRIEF.format(**{name: BINARY_RUBRICS[name] for name in ASKED_OF_READERS}))
    write_text(files[2], json.dumps(key, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return files


def _questions_hash(replies: list[dict]) -> str:
    text = json.dumps([[entry["id"], entry["question"], entry["reply"]] for entry in replies])
    return hashlib.sha256(text.encode()).hexdigest()


def read_labels(path: Path, key: dict) -> dict[str, dict[str, bool]]:
    """{reply id: {question: yes or no}} of a sheet that a reader has filled in.

    Raises FrankenError for a sheet of other replies, a row that is missing and an answer that is neither.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
        rows = list(csv.DictReader(text.splitlines(keepends=True)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise FrankenError(f"{path}: cannot be read as a sheet ({type(error).__name__})") from None
    known = {entry["id"]: entry for entry in key["replies"]}
    labels = {}
    for number, row in enumerate(rows, 2):
        entry = known.get(row.get("id") or "")
        # a spreadsheet may write line ends of its own
        if entry is None or (row.get("reply") or "").split() != f"“{entry['reply']}”".split():
            raise FrankenError(f"{path}, row {number}: not a reply of this key")
        answers = {}
        for name in ASKED_OF_READERS:
            said = (row.get(name) or "").strip().lower()
            if said not in YES + NO:
                raise FrankenError(f"{path}, row {number}: {name} must be yes or no, not {said!r}")
            answers[name] = said in YES
        labels[entry["id"]] = answers
    missing = [id for id in known if id not in labels]
    if missing:
        lacking = many(len(missing), "reply is", "replies are")
        raise FrankenError(f"{path}: {lacking} not labelled, {missing[0]} the first")
    return labels


def read_key(path: Path) -> dict:
    key = read_json(path)
    if not isinstance(key, dict) or key.get("sheet_sha256") != _questions_hash(key.get("replies") or []):
        raise FrankenError(f"{path} is not a key of label_replies.py, or was changed")
    return key


def majority(readers: list[dict[str, dict[str, bool]]], id: str, name: str) -> bool:
    """What more than half of the readers say; a tie is no."""
    return 2 * sum(labels[id][name] for labels in readers) > len(readers)


def labelled_groups(key: dict, readers: list[dict[str, dict[str, bool]]]) -> list[Labelled]:
    """The rates of every file and condition, by the majority of the readers, with exact intervals."""
    groups = defaultdict(list)
    for entry in key["replies"]:
        groups[f"{entry['file']}, {entry['condition']}"].append(entry["id"])
    return [
        Labelled(
            group, {name: exact_rate(majority(readers, id, name) for id in ids) for name in ASKED_OF_READERS}
        )
        for group, ids in sorted(groups.items())
    ]


def reader_agreement(key: dict, readers: dict[str, dict[str, dict[str, bool]]]) -> list[tuple[str, str, str]]:
    """(question, pair of readers, kappa as text) for every pair of readers."""
    ids = [entry["id"] for entry in key["replies"]]
    lines = []
    for name in ASKED_OF_READERS:
        for one, other in itertools.combinations(readers, 2):
            kappa = cohen_kappa(*([readers[who][id][name] for id in ids] for who in (one, other)))
            text = "undefined" if kappa.value is None else f"{kappa.value:.2f}"
            if kappa.low is not None:
                text += f" [{kappa.low:.2f}, {kappa.high:.2f}]"
            lines.append((name, f"{one} and {other}", text))
    return lines


def label_lines(key: dict, readers: list[dict[str, dict[str, bool]]]) -> list[dict]:
    """The labels as judge_eval_results.py --labels reads them, with the votes of the readers."""
    return [
        {
            "id": entry["id"],
            **{name: entry[name] for name in ("question", "reply")},
            **{name: majority(readers, entry["id"], name) for name in ASKED_OF_READERS},
            "votes": {
                name: sum(labels[entry["id"]][name] for labels in readers) for name in ASKED_OF_READERS
            },
            **{name: entry[name] for name in ("file", "model", "condition", "question_id", "sample")},
        }
        for entry in key["replies"]
    ]
