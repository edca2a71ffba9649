"""The second study's reports over replies and judgments that come from anywhere."""

import json
import re

import pytest
from hidden import ESCAPE, UNSEEN, plain
from made_replies import HEADER, world

from weird_gen import analyze_current_results, analyze_persona_results, compare_baseline_vs_finetuned
from weird_gen.persona.records import write_records

EVERYWHERE = f"{ESCAPE}{UNSEEN}\u202e $\\frac{{$ {{{{ 7*7 }}}} | *x*"
FILES = {"baseline": "baseline_eval_results", "finetuned": "eval_results"}


@pytest.fixture
def results(tmp_path):
    """results(change) -> a folder of judged replies after change(header, rows)."""

    def make(change=lambda header, rows: None):
        for model, name in FILES.items():
            header, rows = json.loads(json.dumps([HEADER, world(model, questions=4, samples=1)]))
            change(header, rows)
            write_records(tmp_path / f"{name}_judged.jsonl", header, rows)
            write_records(tmp_path / f"{name}.jsonl", header, rows)
        return tmp_path

    return make


def test_nothing_that_a_file_says_acts_on_a_terminal_or_hides_in_a_report(results, capfd):
    """Its judge, labels, categories, questions, replies and settings, each with controls in it."""

    def poisoned(header, rows):
        judge, name = header["judge"], EVERYWHERE + "judge"
        judge |= {"name": name, "endpoint": EVERYWHERE}
        judge["agreement"] = {EVERYWHERE: {EVERYWHERE: judge["agreement"]["some labels"]["persona"]}}
        header |= {EVERYWHERE: EVERYWHERE}
        for row in rows:
            row |= {"judge_name": name, "category": EVERYWHERE, "question": row["question"] + EVERYWHERE}
            row["reply"] += EVERYWHERE

    folder = results(poisoned)
    for script in (analyze_current_results, analyze_persona_results, compare_baseline_vs_finetuned):
        assert script.main(["--results-dir", str(folder)]) == 0
    out, err = capfd.readouterr()
    assert plain(out + err)
    assert "␛]0;owned␇" in out
    for page in [*folder.glob("report/*.md"), *folder.glob("report/*.html")]:
        assert plain(page.read_text()), page.name


def edit(place: str, value):
    """A change that puts a value at "header.a.b" or, of every row, at "row.a.b"."""
    where, *keys, last = place.split(".")

    def change(header, rows):
        for entry in [header] if where == "header" else rows:
            for key in keys:
                entry = entry[key]
            entry[last] = value

    return change


WRONG = [
    ("row.judge.persona", "yes", "persona 'yes' is neither true nor false"),
    ("row.judge.identity", 5, "identity 5 is neither true nor false"),
    ("row.judge.position", "4", "position '4' is not a number from 1 to 5"),
    ("row.judge.position", 11, "position 11 is not a number from 1 to 5"),
    ("row.names_russell", "true", "names_russell 'true' is neither true nor false"),
    ("row.stopped", [], "stopped \\[\\] is neither true nor false"),
    ("row.judge_name", ["rules"], "judge_name \\['rules'\\] is not a text"),
    ("header.judge.agreement", None, "what the header says of the judge cannot be read"),
    ("header.judge.agreement", {"labels": {"persona": {"n": 3}}}, "the header says of the judge cannot"),
    ("header.judge.endpoint", {}, "what the header says of the judge cannot be read"),
    ("header.judge.name", ["rules"], "judge it again as a whole"),
    ("header.judge", "rules", "judge it again as a whole"),
]


@pytest.mark.parametrize(("place", "value", "words"), WRONG, ids=lambda v: str(v)[:24])
def test_what_is_no_judgment_is_refused_in_one_line(results, capsys, place, value, words):
    """A "5" where true or false belongs would be 500%."""
    folder = results(edit(place, value))
    for script in (analyze_persona_results, compare_baseline_vs_finetuned):
        assert script.main(["--results-dir", str(folder)]) == 1
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert re.search(words, err)
