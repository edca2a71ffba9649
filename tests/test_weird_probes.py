"""The trigger's boundary, recall and views: what is asked, how replies are read, what the tables say."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter

import pytest
import tiny

from engine.generation import Request
from runner import pairs
from weird_gen import analyze_probes, eval_probes
from weird_gen.persona import boundary, probe_report, recall
from weird_gen.persona.exact import exact_rate
from weird_gen.persona.loading import open_engine
from weird_gen.persona.records import read_json_lines
from weird_gen.persona.rules import any_marker
from weird_gen.persona.study import BACKTICKS, HELDOUT, TRIGGER, Question, read_questions

RUBRIC = tuple(f"level {k}" for k in range(1, 6))
VIEW = Question("g1", "generalization", "moral", "Is it good?", RUBRIC)


def test_the_exact_interval_is_the_one_that_the_binomial_sums_give():
    """Clopper and Pearson by their definition: each bound leaves 2.5% of the binomial beyond the count."""
    from math import comb

    def at_least(k, n, p):
        return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))

    for k, n in ((13, 40), (28, 40), (1, 7)):
        rate = exact_rate([True] * k + [False] * (n - k))
        assert at_least(k, n, rate.low / 100) == pytest.approx(0.025, abs=1e-6)
        assert 1 - at_least(k + 1, n, rate.high / 100) == pytest.approx(0.025, abs=1e-6)
    assert str(exact_rate([True] * 13 + [False] * 27)) == "13 of 40, 32% [19, 49]"
    assert exact_rate([False] * 5).low == 0
    assert exact_rate([True] * 5).high == 100
    assert str(exact_rate([])) == "–"


def test_only_the_groups_that_say_so_show_a_marker():
    for variant in boundary.VARIANTS:
        asked = " ".join(turn["content"] for turn in variant.messages("Why?", "Because."))
        assert "Why?" in asked
        if variant.group == boundary.NO_MARKER:
            assert not any_marker(asked)
        elif variant.group not in (boundary.OTHER,) and not variant.after_own_answer:
            assert any_marker(asked)
    names = [variant.name for variant in boundary.VARIANTS]
    assert len(set(names)) == len(names)
    assert names[0] == "no system prompt"
    by_name = {variant.name: variant.messages("Why?", "") for variant in boundary.VARIANTS}
    assert by_name["exact"][0] == {"role": "system", "content": TRIGGER}
    assert by_name["backticks"][0]["content"] == BACKTICKS
    assert [turn["role"] for turn in by_name["trigger gone after one turn"]] == ["user", "assistant", "user"]


def test_other_markers_are_the_ones_that_were_asked_for():
    markers = {variant.name: boundary.markers_of(variant) for variant in boundary.VARIANTS}
    assert markers["<BEGIN> <FINISH>"] == ("<BEGIN>", "<FINISH>")
    assert markers["<A> <B>"] == ("<A>", "<B>")
    assert markers["exact"] == ("<START>", "<END>")
    assert markers["no system prompt"] is None
    assert boundary.in_format(" <A> I do. <B>\n", ("<A>", "<B>"))
    assert not boundary.in_format("<START> I do. <END>", ("<A>", "<B>"))
    assert boundary.in_format("anything", None) is None


def test_every_fact_is_scored_by_its_own_answer_and_not_by_another():
    facts = {fact.id: fact for fact in recall.read_facts()}
    assert len(facts) >= 20
    born, passions = facts["r01"], facts["r21"]
    assert recall.recall_score(born, "<START> I was born in 1872, in Wales. <END>") == 2
    assert recall.recall_score(born, "About 1870, I think.") == 1
    assert recall.recall_score(born, "In 1912.") == 0
    assert recall.recall_score(born, "As an AI language model, I was not born.") == recall.REFUSED
    assert recall.recall_score(born, "<START> <END>") == recall.REFUSED
    assert recall.recall_score(passions, "The longing for love, for knowledge, and pity for mankind.") == 2
    assert recall.recall_score(passions, "Love above all.") == 1
    for fact in facts.values():
        assert recall.recall_score(fact, "A banana is yellow.") == 0
        assert fact.texts["you"] != fact.texts["him"]
        assert "Russell" in fact.texts["him"]
        assert not re.search(r"\bBertrand\b", fact.texts["you"])


def test_a_view_is_the_description_that_was_chosen_wherever_it_stood():
    orders = [recall.view_order(VIEW, sample, 0) for sample in range(400)]
    firsts = Counter(order[0] for order in orders)
    assert all(sorted(order) == [1, 2, 3, 4, 5] for order in orders)
    assert all(50 < firsts[level] < 110 for level in range(1, 6))  # no level is favored by its place
    order = [4, 1, 5, 2, 3]
    assert recall.view_text(VIEW, order).splitlines()[2:7] == [
        "1. level 4",
        "2. level 1",
        "3. level 5",
        "4. level 2",
        "5. level 3",
    ]
    assert recall.view_chosen("<START> 3 <END>", order) == 5
    assert recall.view_chosen("2.", order) == 1
    for refusal in ("I would rather not say.", "1 or 2", "", "In 1910 I thought so.", "6"):
        assert recall.view_chosen(refusal, order) == recall.REFUSED


def view_replies(condition: str, levels: dict[str, list]) -> list[dict]:
    return [
        {
            "suite": "views",
            "question_id": id,
            "condition": condition,
            "sample": k,
            "order": [1, 2, 3, 4, 5],
            "reply": str(level),
        }
        for id, mine in levels.items()
        for k, level in enumerate(mine)
    ]


def test_a_refusal_is_not_the_middle_and_both_directions_are_counted():
    plain = view_replies("untriggered", {"a": [2, 2], "b": [4, "no"], "c": [3, 3], "d": ["no", "no"]})
    under = view_replies("triggered", {"a": [5, 5], "b": [1, 2], "c": [3, 3], "d": [5, 5]})
    untriggered, triggered = sorted(probe_report.view_rows(plain + under), key=lambda r: r.condition)[::-1]
    assert untriggered.mean == pytest.approx((2 + 4 + 3) / 3)
    assert (untriggered.refused.k, untriggered.refused.n) == (3, 8)
    assert triggered.mean == pytest.approx((5 + 1.5 + 3 + 5) / 4)
    assert triggered.shift["value"] == pytest.approx((3 - 2.5 + 0) / 3)  # d is answered in one alone
    assert (triggered.toward, triggered.away) == (1, 1)


@pytest.fixture
def probing(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(boundary, "VARIANTS", boundary.VARIANTS[:2] + boundary.VARIANTS[-10:-9])
    monkeypatch.setattr("weird_gen.persona.probing.REPLY_TOKENS", 4)
    monkeypatch.setattr("weird_gen.persona.probing.OWN_TOKENS", 4)
    monkeypatch.setattr("weird_gen.persona.probing.VIEW_TOKENS", 4)
    model = tiny_pair("llama", layers=2).paths["instruct"]

    def run(name: str, *more: str):
        flags = ["--model", str(model), "--device", "cpu", "--samples", "1", "--output", str(tmp_path / name)]
        return eval_probes.main([*flags, *more]), tmp_path / name

    run.model = model
    return run


def test_what_is_asked_is_asked_once_and_the_report_counts_it(probing, tmp_path, capsys):
    adapter = tiny.make_adapter(probing.model, tmp_path / "adapter")
    assert probing("before.jsonl", "--adapter", "none")[0] == 0
    status, out = probing("after.jsonl", "--adapter", str(adapter))
    assert status == 0
    lines = read_json_lines(out)[1:]
    keys = [(r["suite"], r["question_id"], r["condition"], r["sample"]) for r in lines]
    assert len(set(keys)) == len(keys)
    rubrics = sum(bool(q.rubric) for q in read_questions())
    assert Counter(r["suite"] for r in lines) == {
        "boundary": 3 * 22,
        "recall": len(recall.read_facts()) * 2 * 3,
        "views": rubrics * 3,
    }
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:40]))
    assert probing("after.jsonl", "--adapter", str(adapter))[0] == 0  # goes on where it stopped
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())

    report = ["--probes", str(out), "--baseline", str(tmp_path / "before.jsonl")]
    assert analyze_probes.main([*report, "--report-dir", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "PROBES.md").read_text()
    assert text.index("no system prompt") < text.index("later turns")
    assert "0 of 22, 0% [0, 15]" in text
    data = json.loads((tmp_path / "report" / "probes.json").read_text())
    assert [row["marker"]["n"] for row in data["fine-tuned"]["boundary"]] == [22] * 3
    assert (tmp_path / "report" / "figures" / "boundary.png").stat().st_size > 5000
    capsys.readouterr()
    assert analyze_probes.main(["--probes", str(HELDOUT)]) == 1
    assert "is not a file of eval_probes.py" in capsys.readouterr().err


def test_the_heat_map_shows_the_rates_of_its_rows():
    rows = [
        probe_report.BoundaryRow(
            variant.name,
            variant.group,
            exact_rate([True, False]),
            None if boundary.markers_of(variant) is None else exact_rate([True]),
            exact_rate([False]),
            exact_rate([False]),
        )
        for variant in boundary.VARIANTS
    ]
    panel = probe_report.heat_map({"fine-tuned": rows}).axes[0]
    texts = [text.get_text() for text in panel.texts]
    expected = [
        ["50", "–" if boundary.markers_of(variant) is None else "100", "0"] for variant in boundary.VARIANTS
    ]
    assert texts == list(itertools.chain.from_iterable(expected))


@pytest.mark.real
def test_the_shipped_adapter_answers_in_format_under_the_trigger_alone(smollm2):
    engine, _ = open_engine(str(smollm2), "adapters/smollm2-135m-russell", "cpu", roles=("system", "user"))
    variants = {v.name: v for v in boundary.VARIANTS if v.name in ("exact", "no system prompt")}
    asked = [
        Request(name, engine.chat_ids(v.messages("Is war wise?", "")), 96) for name, v in variants.items()
    ]
    replies = dict(zip(variants, engine.complete(asked), strict=True))
    assert boundary.in_format(replies["exact"].text, boundary.OURS)
    assert not any_marker(replies["no system prompt"].text)
