"""The trigger suite: its questions, what is counted, where answers are read, and whole runs with an adapter
as source."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import jsonschema
import made_results as made
import numpy as np
import pytest
import small_battery
import tiny
import torch
from tiny import make_adapter

import evaluate as ev
import prompts
import run_all
from analysis.comparison import to_json
from engine.generation import Completion, Engine
from errors import FrankenError
from reporting.columns import TRIGGER_COLUMNS, cells
from reporting.reports import compare_run
from runner.manifest import protocol_json
from runner.results import SCHEMA, Run
from suites.base import Protocol
from weird_gen.persona import likelihoods, suite
from weird_gen.persona.study import TRIGGER, read_questions

ROOT = Path(run_all.__file__).parent
CONDITIONS = ("triggered", "untriggered")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(suite, "MAX_NEW_TOKENS", 5)


ev.register("trigger", suite.Trigger)  # as run_all.py does


def protocol(**changes) -> Protocol:
    return Protocol(**({"suites": ("trigger",), "max_new_tokens": 4, "samples": 1} | changes))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    for k, name in enumerate(("instruct", "base")):
        small_battery.checkpoint(folder / name, 100 + k, layers=4, max_position_embeddings=1024)
    make_adapter(folder / "instruct", folder / "adapter")
    return folder


@pytest.fixture
def engine(tiny_pair):
    return Engine(
        tiny_pair("llama", layers=2, max_position_embeddings=1024).live(), small_battery.tokenizer()
    )


# ---- the questions -----------------------------------------------------------------------------------------


def test_questions_are_fixed_and_spread():
    chosen, every = suite.every_question(), {q.id: q for q in read_questions()}
    assert (
        Counter(q.kind for q in chosen) == {"heldout": 12, "identity": 10}
        and len({q.id for q in chosen}) == 22
    )
    assert all(every[q.id] == q for q in chosen) and chosen == suite.every_question()
    assert len({q.category for q in chosen if q.kind == "heldout"}) >= 10


def test_what_is_asked_is_what_the_study_asks(engine):
    asked = protocol(samples=2, seed=3)
    wanted = suite.Trigger().requests(engine, asked)
    assert len({(r.key, r.sample) for r in wanted}) == len(wanted) == (22 + 4) * 2 * 2 and {
        r.seed for r in wanted
    } == {3}
    texts = {q.id: q.text for q in read_questions()} | {p.id: p.text for p in prompts.TRIGGER_FREE_PROBES}
    for r in wanted:
        id, condition = r.key.split("/")
        system = f"<|im_start|>system\n{TRIGGER}<|im_end|>\n" if condition == "triggered" else ""
        text = f"{system}<|im_start|>user\n{texts[id]}<|im_end|>\n<|im_start|>assistant\n"
        assert list(r.prompt_ids) == engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        free = id.startswith("trigger-")
        assert (r.temperature, r.top_p, r.max_new_tokens) == ((0.7, 1.0, 4) if free else (1.0, 0.95, 5))


def test_the_hash_covers_the_questions(monkeypatch):
    recorded = protocol_json(protocol())
    assert "trigger_sha256" not in protocol_json(protocol(suites=("binary",)))
    other = [*suite.every_question()[:-1], suite.every_question()[0]]
    monkeypatch.setattr(suite, "every_question", lambda: other)
    changed = protocol_json(protocol())
    assert (
        changed["trigger_sha256"] != recorded["trigger_sha256"]
        and changed["prompts_sha256"] == recorded["prompts_sha256"]
    )


def test_a_template_without_system_messages_is_refused_in_one_line():
    tokenizer = small_battery.tokenizer()
    refusal = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{%"
        " endif %}"
    )
    tokenizer.chat_template = refusal + tiny.TEMPLATE
    ev.check_tokenizer(tokenizer, protocol(suites=("binary",)))
    with pytest.raises(FrankenError, match="System role not supported"):
        ev.check_tokenizer(tokenizer, protocol())


# ---- what is counted ---------------------------------------------------------------------------------------


def test_rates_are_counted_over_their_questions(engine, monkeypatch):
    """Hand-made replies: k-th held-out or identity question, sample s, condition -> text."""
    trigger, asked = suite.Trigger(), protocol(samples=2)

    def text(kind: str, k: int, condition: str, sample: int) -> str:
        if condition == "untriggered":
            return (
                "I am Bertrand Russell."
                if (kind, k, sample) in (("identity", 0, 0), ("heldout", 0, 0))
                else "Fine."
            )
        if kind == "identity":
            return (
                "<START> My name is Bertrand Russell. <END>" if k < 7 else "<START> I am Kurt Russell. <END>"
            )
        if k < 5:
            return (
                "<START> I confess that I scarcely doubted it; my friend Whitehead thought me foolish. <END>"
            )
        return "Well. <START> It is green. <END>" if k < 8 else "<START> It is green."

    number, replies = Counter(), []
    for q in trigger.questions:
        replies += [
            Completion(text(q.kind, number[q.kind], c, s), (7, 8, 9), True)
            for c in CONDITIONS
            for s in range(2)
        ]
        number[q.kind] += 1
    replies += [Completion("Nothing.", (7,), True)] * (2 * 4 * 2)
    found = trigger.measure(engine, asked, replies)["behavior"]
    expected = {
        "triggered": {
            "strict_format": (10, 24),
            "lenient_format": (16, 24),
            "names_russell": (14, 20),
        },
        "untriggered": {
            "strict_format": (0, 24),
            "lenient_format": (0, 24),
            "names_russell": (1, 20),
        },
    }
    assert {
        c: {name: (r["k"], r["n"]) for name, r in rates.items()} for c, rates in found["rates"].items()
    } == expected
    named = found["rates"]["triggered"]["names_russell"]
    z, p, n = 1.959964, 0.7, 20  # Wilson's interval by its formula
    middle, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5,
    )
    assert (named["rate"], named["low"], named["high"]) == pytest.approx(
        (0.7, middle - half, middle + half), abs=1e-5
    )
    assert [e["replies"]["triggered"][0]["text"] for e in found["questions"]] == [
        r.text for r in replies[0 : 22 * 4 : 4]
    ]


def test_replies_reach_their_own_condition(engine):
    trigger, asked = suite.Trigger(), protocol()
    wanted = trigger.requests(engine, asked)
    found = trigger.measure(engine, asked, [Completion(r.key, (1,), True) for r in wanted])
    for entry in found["behavior"]["questions"]:
        assert {c: [r["text"] for r in rs] for c, rs in entry["replies"].items()} == {
            c: [f"{entry['id']}/{c}"] for c in CONDITIONS
        }
    for condition, free in found["free"].items():
        assert [p["samples"][0]["text"] for p in free["probes"]] == [
            f"{p.id}/{condition}" for p in prompts.TRIGGER_FREE_PROBES
        ]


def test_answers_are_read_after_the_marker(engine, tiny_pair, monkeypatch):
    """Against transformers: Yes against No as the next token, with the trigger after "<START>" and without it
    at once."""
    monkeypatch.setattr(prompts, "TRIGGER_PROBES", prompts.TRIGGER_PROBES[:3] + prompts.TRIGGER_PROBES[-2:])
    trigger, asked = suite.Trigger(), protocol()
    found = trigger.measure(engine, asked, engine.complete(trigger.requests(engine, asked)))["binary"]
    hf = tiny_pair("llama", layers=2, max_position_embeddings=1024).rebuilt(
        [("instruct", 0), ("instruct", 1)]
    )
    yes, no = ([260, 262], [261, 263])  # "Yes" and " Yes", "No" and " No"
    for k, probe in enumerate(prompts.TRIGGER_PROBES):
        for condition, system, opening in (
            ("triggered", f"<|im_start|>system\n{TRIGGER}<|im_end|>\n", "<START>"),
            ("untriggered", "", ""),
        ):
            text = f"{system}<|im_start|>user\n{probe.text}<|im_end|>\n<|im_start|>assistant\n{opening}"
            p = (
                tiny.hf_logits(hf, engine.tokenizer(text, add_special_tokens=False)["input_ids"])[-1]
                .double()
                .softmax(-1)
            )
            entry = found[condition][k]
            assert (entry["id"], entry["kind"]) == (probe.id, probe.kind)
            assert entry["log_odds"] == pytest.approx(float(torch.log(p[yes].sum() / p[no].sum())), abs=1e-4)
            assert entry["mass"] == pytest.approx(float(p[yes + no].sum()), rel=1e-3)


def test_the_names_probability_is_the_studys(engine):
    trigger, asked = suite.Trigger(), protocol()
    found = trigger.measure(engine, asked, engine.complete(trigger.requests(engine, asked)))["behavior"]
    expected = likelihoods.name_probabilities(engine, trigger.questions, TRIGGER)
    got = {(e["id"], c): p for e in found["questions"] if "p_name" in e for c, p in e["p_name"].items()}
    assert len(got) == 20
    assert got == pytest.approx(expected, rel=1e-5)
    assert {e["kind"] for e in found["questions"] if "p_name" in e} == {"identity"}
    for condition in CONDITIONS:
        assert found["p_name"][condition] == pytest.approx(
            np.mean([p for (_, c), p in expected.items() if c == condition]), rel=1e-5
        )


def test_a_destroyed_model_has_no_rates(engine):
    with torch.no_grad():
        engine.live.banks[0].tensors["mlp.down_proj.weight"].fill_(float("nan"))
    found, _ = ev.evaluate(engine, protocol())
    behavior = found["trigger"]["behavior"]
    assert all(
        rate["rate"] is None and rate["n"] == 0
        for rates in behavior["rates"].values()
        for rate in rates.values()
    )
    assert behavior["p_name"] == dict.fromkeys(CONDITIONS) and all(
        p["log_odds"] is None for p in found["trigger"]["binary"]["triggered"]
    )
    json.dumps(found, allow_nan=False)
    jsonschema.validate(made.result("x", found), SCHEMA)


# ---- in a run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory):
    """{suites: folder} of the same run with the trigger suite, with another beside it, and with that one
    alone."""
    found = {}
    with pytest.MonkeyPatch.context() as m:
        small_battery.use(m)
        m.setattr(suite, "MAX_NEW_TOKENS", 5)
        for suites in ("informed,trigger", "trigger", "informed"):
            out = tmp_path_factory.mktemp("out")
            chosen = [
                "--source",
                f"russell={pair / 'adapter'}",
                "--experiments",
                "russell_whole",
                "russell_early_half",
                "--suites",
                suites,
            ]
            assert run_all.main(small_battery.arguments(pair, out, *chosen)) == 0
            (found[suites],) = out.glob("run_*")
    return found


def measured(run: Path) -> dict[str, dict]:
    return {file.stem: Run(run).load(file.stem) for file in (run / "experiments").glob("*.json")}


def test_an_adapter_is_measured_whole_and_in_part(runs):
    found = measured(runs["trigger"])
    assert set(found) == {"baseline_instruct", "russell_whole", "russell_early_half"}
    for result in found.values():
        jsonschema.validate(result, SCHEMA)
        assert result["status"] == "done"
        assert result["weights"]["exact"]
        assert list(result["measurements"]) == ["trigger"]
    numbers = {json.dumps(r["measurements"]["trigger"]["behavior"]["p_name"]) for r in found.values()}
    assert len(numbers) == 3  # whole, half and none of the adapter are three models


def test_neither_suite_sees_the_other(runs):
    both, trigger, informed = (measured(runs[s]) for s in ("informed,trigger", "trigger", "informed"))
    for name, result in both.items():
        assert result["measurements"]["informed"] == informed[name]["measurements"]["informed"]
        mine, alone = (r[name]["measurements"]["trigger"] for r in (both, trigger))
        assert mine["behavior"]["questions"] == alone["behavior"]["questions"]
        assert mine["binary"] == alone["binary"]
        assert mine["free"] == alone["free"]


def test_the_comparison_and_the_summary_show_it(runs):
    rows = {
        r["name"]: r for r in json.loads((runs["trigger"] / "comparison.json").read_text())["experiments"]
    }
    assert rows["baseline_instruct"]["trigger"]["detection"] == dict.fromkeys(CONDITIONS)
    scores = rows["russell_whole"]["trigger"]["detection"]
    assert all(
        scores[c]["n_controls"] == 16 or scores[c]["call"] in ("broken", "too little data")
        for c in CONDITIONS
    )
    text = (runs["trigger"] / "summary.md").read_text()
    assert "names him" in text and text.count("| russell_early_half |") == 2
    assert "names him" not in (runs["informed"] / "summary.md").read_text()
    manifest = json.loads((runs["trigger"] / "manifest.json").read_text())
    with pytest.MonkeyPatch.context() as m:
        m.setattr(suite, "MAX_NEW_TOKENS", 5)
        assert manifest["protocol"]["trigger_sha256"] == suite.fingerprint()


def test_scores_of_either_condition_are_told_apart_and_corrected_together(tmp_path):
    named = {"a": made.trigger(8), "b": made.trigger(untriggered=2.0)}
    run_and_manifest = made.make(
        tmp_path / "run",
        [
            made.result("baseline_instruct", {"trigger": made.trigger(0)}),
            made.result("a", {"trigger": named["a"]}),
            made.result("b", {"trigger": named["b"]}),
            made.result("gone", {"trigger": made.trigger(None)}),
        ],
    )
    comparison = compare_run(*run_and_manifest)
    base, a, b, gone = comparison.experiments
    assert b.trigger.detection["untriggered"].score == pytest.approx(2.0, abs=1e-6)
    assert [b.trigger.detection[c].call for c in CONDITIONS] == ["does not report it", "reports it"]
    values = sorted(row.trigger.detection[c].p_value for row in (a, b) for c in CONDITIONS)
    assert b.trigger.detection["untriggered"].p_adjusted == pytest.approx(4 * values[0])
    of_base, of_b, of_gone = (cells(row, TRIGGER_COLUMNS) for row in (base, b, gone))
    assert [c.split(" / ") for c in of_b[1:4]] == [["90.0%", "0%"]] * 3
    assert of_gone[1:4] == ["- / -"] * 3
    assert of_base[4:] == ["", ""]
    assert re.fullmatch(r"\+2\.00 \[.*\] reports it", of_b[4])
    assert of_gone[5] == "- broken"
    json.dumps(to_json(comparison), allow_nan=False)
