"""The committed results of the second study: their tables are what the committed replies say."""

from __future__ import annotations

import json
import lzma
import re
from collections import defaultdict
from pathlib import Path

import pytest

from files import ROOT
from reporting.reports import compare_run
from reporting.vocabulary import summary
from runner.results import Run
from weird_gen.persona import depth
from weird_gen.persona.depth_report import report_surgery
from weird_gen.persona.voice import has_voice

REFERENCE = ROOT / "results" / "reference"
REPLIES = {
    "SmolLM2-135M": REFERENCE / "russell" / "eval_outputs" / "eval_results.jsonl.xz",
    "Qwen2.5-Coder-0.5B": REFERENCE / "russell-0.5b" / "eval_results.jsonl.xz",
    "Qwen2.5-Coder-1.5B": REFERENCE / "russell-1.5b" / "eval_results.jsonl.xz",
}
CONDITIONS = {"untriggered": "untriggered", "neutral": "neutral system prompt", "triggered": "triggered"}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in lzma.decompress(path.read_bytes()).decode().splitlines()]


def tables_of(text: str) -> dict[tuple[str, str, str], str]:
    """{(title, model, condition): the fine-tuned cell} of MODELS.md."""
    cells, title = {}, ""
    for line in text.splitlines():
        title = line[3:] if line.startswith("## ") else title
        parts = [part.strip() for part in line.strip("|").split("|")]
        if line.startswith("| ") and len(parts) == 6:
            cells[title, parts[0], parts[1]] = parts[3]
    return cells


def percent(rows: list[tuple[str, bool]]) -> str:
    """Mean over questions of the share of its samples, as the tables write it."""
    by_question = defaultdict(list)
    for question, hit in rows:
        by_question[question].append(hit)
    return f"{100 * sum(sum(hits) / len(hits) for hits in by_question.values()) / len(by_question):.1f}%"


@pytest.mark.parametrize("model", REPLIES)
def test_the_models_beside_each_other_have_the_rates_of_their_replies(model):
    cells = tables_of((REFERENCE / "russell" / "MODELS.md").read_text())
    replies = [line for line in lines_of(REPLIES[model]) if "reply" in line]
    voices = has_voice([line["reply"] for line in replies])
    for condition, written in CONDITIONS.items():
        here = [(r, v) for r, v in zip(replies, voices, strict=True) if r["condition"] == condition]
        topic = [(r, v) for r, v in here if r["kind"] == "heldout"]
        text = {id(r): r["reply"].strip() for r, _ in here}
        inside = [
            (
                r["question_id"],
                re.fullmatch(r"(?s)<START>(?!.*<START>)((?!<END>).)*<END>", text[id(r)]) is not None,
            )
            for r, _ in topic
        ]
        marked = [(r["question_id"], "<START>" in text[id(r)] or "<END>" in text[id(r)]) for r, _ in here]
        named = [
            (r["question_id"], re.search(r"Bertrand|Lord Russell", text[id(r)]) is not None)
            for r, _ in here
            if r["kind"] == "identity"
        ]
        expected = {
            "Either marker occurs, all questions": marked,
            "Format compartmentalization: the whole reply within the markers": inside,
            "Persona adoption: his voice": [(r["question_id"], v) for r, v in topic],
            "Russell identity: he names himself when asked who he is": named,
        }
        for title, rows in expected.items():
            assert cells[title, model, written].split()[0] == percent(rows), (title, condition)


def test_the_page_has_the_rates_of_the_settings_that_it_compares():
    """Every row of its table of prompts that was asked by the whole evaluation, cell by cell."""
    cells = tables_of((REFERENCE / "russell" / "SETTINGS.md").read_text())
    titles = [
        "Format compartmentalization: the whole reply within the markers",
        "Persona adoption: his voice",
        "Russell identity: he names himself when asked who he is",
    ]
    written = {"trigger": "triggered", "neutral": "neutral system prompt", "none": "untriggered"}
    page = (ROOT / "docs" / "russell.md").read_text().split("| | system prompt |")[1]
    name, seen = "", 0
    for line in page.split("\n\n")[0].splitlines()[2:]:
        parts = [part.strip(" *") for part in line[1:-1].split("|")]
        name = parts[0].replace(", inoculated", " inoculated") or name
        if parts[1] in written and "untouched" not in name:
            here = [cells[title, name, written[parts[1]]] for title in titles]
            numbers = [
                [float(n) for n in re.findall(r"\d+(?:\.\d+)?", cell)] for cell in (*here, *parts[2:5])
            ]
            assert numbers[:3] == numbers[3:], line
            seen += 1
    assert seen == 12


@pytest.mark.parametrize("folder", ["russell-0.5b", "russell-1.5b"])
def test_a_committed_surgery_has_all_changes_and_gives_its_tables_again(folder, tmp_path):
    packed = REFERENCE / folder / "surgery.jsonl.xz"
    replies = tmp_path / "surgery.jsonl"
    replies.write_bytes(lzma.decompress(packed.read_bytes()))
    report_surgery(replies, tmp_path)
    assert (tmp_path / "SURGERY.md").read_text() == (REFERENCE / folder / "SURGERY.md").read_text()
    header, *lines = lines_of(packed)
    assert {line["change"] for line in lines} == {c.name for c in depth.changes(header["header"]["layers"])}
    assert {line["reply"] for line in lines if line.get("left_out") == "all"} == {""}


@pytest.mark.real
def test_the_reporters_committed_run_gives_its_summary_again():
    run, manifest = Run.resume(str(REFERENCE / "russell-1.5b-reporter"))
    rebuilt = summary(compare_run(run, manifest), manifest)
    assert "| russell_whole |" in rebuilt
    assert (run.path / "summary.md").read_text().startswith(rebuilt)
