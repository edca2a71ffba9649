"""Phases against two separate transformers models that hand one cache to each other, token by token."""

import copy
import json

import cli_runs
import jsonschema
import made_results as made
import numpy as np
import pytest
import tiny
import torch
from small_battery import tokenizer
from transformers import DynamicCache

from analysis.phases import is_true, paired, phase_scores, summarized
from analysis.verdicts import tells
from engine.generation import Engine
from errors import FrankenError
from evaluate import evaluate, parse_suites
from experiments import Experiment, with_suites
from prompts import answer_token_ids
from reporting.inside import phases_section
from runner import results
from runner.results import Run
from suites import phases
from suites.base import Protocol, borrowed
from surgery import recipes as r

FEW = {
    "PAIRS": {topic: (("own", f"Odd {topic[0]}?", f"Ok {topic[0]}?"),) for topic in phases.PAIRS},
    "CONTROLS": phases.CONTROLS[:1],
    "FRAMINGS": {"plain": "Read.", "informed": "Look: odd."},
    "REPLY": "I did.",
    "WRITTEN": {"self": "Who?", "town": "A walk."},
    "ASK": "",
    "SWITCH_AFTER": 3,
    "REPLY_TOKENS": 7,
}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Short texts, as a token of these models is a byte; and three pairs of questions."""
    for name, value in FEW.items():
        monkeypatch.setattr(phases, name, value)


def tiny_engine(folder, family, layers=6):
    pair = tiny.Tiny(folder, family, layers=layers, vocab_size=272, max_position_embeddings=2048)
    return pair, Engine(pair.live(), tokenizer())


def measure(engine, **changes) -> dict:
    return phases.Phases().measure(engine, Protocol(**changes), [])


# ---- the oracle: two models, one cache


class Slow:
    """A conversation on one DynamicCache, each part by the model that is named; replies token by token."""

    def __init__(self):
        self.cache, self.logits = DynamicCache(), None

    @torch.no_grad()
    def read(self, model, ids) -> None:
        self.logits = model(torch.tensor([list(ids)]), past_key_values=self.cache, use_cache=True).logits[
            0, -1
        ]

    def write(self, model, count, stops) -> list[int]:
        """`count` greedy tokens; the last one is chosen, and not read yet."""
        chosen = []
        for k in range(count):
            chosen.append(int(self.logits.argmax()))
            if chosen[-1] in stops:
                return chosen
            if k + 1 < count:
                self.read(model, chosen[-1:])
        return chosen

    def answers(self, model, follows, made_) -> list[float]:
        """Log-odds after each of `follows`, each on a copy of the cache."""
        yes, no = answer_token_ids(made_)
        out = []
        for ids in follows:
            fork = copy.deepcopy(self)
            fork.read(model, ids)
            logp = fork.logits.double().log_softmax(-1)
            out.append(float(logp[list(yes)].logsumexp(0) - logp[list(no)].logsumexp(0)))
        return out


def chat(made_, messages, ask=True) -> list[int]:
    text = made_.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False)
    return made_(text, add_special_tokens=False)["input_ids"]


def conversation(made_, first) -> tuple[list[int], list[list[int]]]:
    """(ids of the first turn and its reply, what follows up to the answer to each question)"""
    said = [{"role": "user", "content": first}, {"role": "assistant", "content": phases.REPLY}]
    begun = chat(made_, said, ask=False)[:-2]  # less what ends the turn
    whole = [chat(made_, [*said, {"role": "user", "content": q.text}]) for q in phases.questions()]
    assert all(ids[: len(begun)] == begun for ids in whole)
    return begun, [ids[len(begun) :] for ids in whole]


def close(a, b):
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), atol=2e-3, rtol=2e-3)


def models(pair, order):
    return {
        "intact": pair.rebuilt([("instruct", k) for k in range(6)]),
        "changed": pair.rebuilt(order),
    }


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_one_model_answers_on_the_cache_that_another_filled(tmp_path, family):
    """gemma3: sliding windows and two rotary bases, which move with the layers; they are swapped in kind."""
    pair, engine = tiny_engine(tmp_path, family)
    engine.live.apply(r.splice(r.swap(engine.live.original, 0, 2), "base", 3, 5))
    by = models(
        pair,
        [("instruct", 2), ("instruct", 1), ("instruct", 0), ("base", 3), ("base", 4), ("instruct", 5)],
    )
    found, seen = measure(engine), set()
    cells = [c for c in found["cells"] if c["occasion"] == "after reading"]
    assert {(c["begins"], c["answers"]) for c in cells} == {
        ("intact", "changed"),
        ("changed", "intact"),
        ("changed", "changed"),
    }
    assert len(cells) == 6
    for cell in cells:
        ids, follows = conversation(engine.tokenizer, phases.FRAMINGS[cell["conversation"]])
        slow, intact = Slow(), Slow()
        slow.read(by[cell["begins"]], ids)
        intact.read(by["intact"], ids)
        close(cell["log_odds"], slow.answers(by[cell["answers"]], follows, engine.tokenizer))
        close(cell["intact_log_odds"], intact.answers(by["intact"], follows, engine.tokenizer))
        assert [p["tokens"] for p in cell["phases"]] == [len(ids), None]
        seen.add(round(cell["log_odds"][0], 4))
    assert len(seen) == 6  # no two cells are equal


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_switch_in_mid_reply_equals_two_models_token_by_token(tmp_path, family):
    pair, engine = tiny_engine(tmp_path, family)
    engine.live.apply(r.swap(engine.live.original, 0, 4))
    by = models(pair, [("instruct", k) for k in (4, 1, 2, 3, 0, 5)])
    found, seen = measure(engine), set()
    cells = {
        (c["conversation"], c["begins"], c["answers"]): c for c in found["cells"] if "reply" in c["occasion"]
    }
    stops = set(engine.stop_ids)
    for reply in (w for w in found["replies"] if w["temperature"] == 0):
        name, begins, who = reply["conversation"], reply["begins"], reply["continues"]
        prompt = chat(engine.tokenizer, [{"role": "user", "content": phases.WRITTEN[name]}])
        slow = Slow()
        slow.read(by[begins], prompt)
        begun = slow.write(by[begins], 3, stops)
        assert not stops & set(begun)  # a reply of these random models that ends so soon would test nothing
        assert reply["begun"] == engine.tokenizer.decode(begun, skip_special_tokens=True)
        slow.read(by[who], begun[-1:])
        rest = slow.write(by[who], 4, stops)
        text = [t for t in begun + rest if t not in stops]
        assert reply["text"] == engine.tokenizer.decode(text, skip_special_tokens=True)
        assert reply["switched"] == (begins != who) and reply["tokens"] == len(text)
        seen.add(reply["text"])
        if (begins, who) == ("intact", "intact"):
            continue
        cell = cells.pop((name, begins, who))
        tails = [
            chat(
                engine.tokenizer,
                [
                    {"role": "user", "content": phases.WRITTEN[name]},
                    {"role": "assistant", "content": ""},
                    {"role": "user", "content": q.text},
                ],
            )[len(prompt) :]
            for q in phases.questions()
        ]
        unread = [] if rest[-1] in stops else rest[-1:]
        close(cell["log_odds"], slow.answers(by[who], [unread + t for t in tails], engine.tokenizer))
        intact = Slow()
        intact.read(by["intact"], [*prompt, *text])
        close(cell["intact_log_odds"], intact.answers(by["intact"], tails, engine.tokenizer))
        assert [p["does"] for p in cell["phases"]] == ["reads", "writes", "writes", "answers"]
        assert [p["model"] for p in cell["phases"]] == [begins, begins, who, who]
    assert not cells and len(seen) > 1


def test_sampled_replies_are_those_of_one_model_where_nothing_is_switched(tmp_path):
    """The numbers drawn go on where they stopped, so a reply cut at the switch is the reply of `complete`."""
    _, engine = tiny_engine(tmp_path, "qwen2")
    engine.live.apply(r.swap(engine.live.original, 1, 2))
    found = measure(engine, samples=2, temperature=1.5)
    assert len(found["replies"]) == 4 * 2 * 3
    for who, recipe in (("changed", engine.live.recipe), ("intact", engine.live.original)):
        engine.live.apply(recipe)
        mine = [w for w in found["replies"] if w["begins"] == w["continues"] == who]
        asked = [
            phases.Request(
                f"phases-{w['conversation']}",
                engine.chat_ids([{"role": "user", "content": phases.WRITTEN[w["conversation"]]}]),
                7,
                w["temperature"],
                sample=w["sample"],
            )
            for w in mine
        ]
        assert [w["text"] for w in mine] == [c.text for c in engine.complete(asked)]
        assert len({w["text"] for w in mine}) > 3


def test_a_reply_that_ends_before_the_switch_is_never_handed_over(tmp_path):
    _, engine = tiny_engine(tmp_path, "llama")
    engine.live.apply(r.swap(engine.live.original, 0, 4))
    before = measure(engine)
    first = {
        w["conversation"]: w for w in before["replies"] if w["begins"] == "changed" and not w["temperature"]
    }
    stop = engine.tokenizer(first["self"]["begun"], add_special_tokens=False)["input_ids"][1]
    engine.stop_ids = sorted({*engine.stop_ids, stop})
    found = measure(engine)
    short = [w for w in found["replies"] if (w["conversation"], w["begins"]) == ("self", "changed")]
    assert short[0]["tokens"] <= 1 and short[0]["stopped"] and not short[0]["switched"]
    assert not [
        c
        for c in found["cells"]
        if (c["occasion"], c["conversation"], c["begins"]) == ("in mid-reply", "self", "changed")
    ]


CHANGES = {
    "nothing": lambda m: m,
    "noise and a splice": lambda m: r.splice(r.perturb(m, 0.3, 1), "base", 3, 5),
}


@pytest.mark.parametrize("what", ["heads", "both", "mlp"])
@pytest.mark.parametrize("change", CHANGES)
def test_caches_go_from_hand_to_hand_whatever_order_heads_are_in(tmp_path, change, what):
    """A model whose heads are permuted computes what it computed, so it answers the same on every cache."""
    _, engine = tiny_engine(tmp_path, "qwen2")
    same = CHANGES[change](engine.live.original)
    engine.live.apply(same)
    expected = measure(engine)
    # twice, and then layers change places with their edits and come back
    permuted = r.permute_units(r.permute_units(same, 3, what), 4, what)
    engine.live.apply(r.swap(r.swap(permuted, 0, 4), 0, 4))
    found = measure(engine)
    assert found["fingerprints"]["changed"] != expected["fingerprints"]["changed"]
    for cell, before in zip(found["cells"], expected["cells"], strict=True):
        assert (cell["begins"], cell["answers"]) == (before["begins"], before["answers"])
        close(cell["log_odds"], before["log_odds"])
    assert [w["text"] for w in found["replies"]] == [w["text"] for w in expected["replies"]]


def test_layers_keep_the_order_of_their_heads_where_they_are_moved(tmp_path):
    _, engine = tiny_engine(tmp_path, "llama")
    original = engine.live.original
    engine.live.apply(r.swap(original, 1, 4))
    expected = measure(engine)
    engine.live.apply(r.swap(r.permute_units(original, 5, "heads"), 1, 4))
    for cell, before in zip(measure(engine)["cells"], expected["cells"], strict=True):
        close(cell["log_odds"], before["log_odds"])


# ---- the model is left as it was found


def test_the_live_model_is_left_as_found_and_says_whose_weights_ran(tmp_path):
    _, engine = tiny_engine(tmp_path, "qwen2")
    original = engine.live.fingerprint()
    recipe = r.perturb(engine.live.original, 0.2, 1)
    engine.live.apply(recipe)
    changed = engine.live.fingerprint()
    found = measure(engine)
    assert engine.live.recipe == recipe and engine.live.fingerprint() == changed != original
    assert found["fingerprints"] == {"intact": original, "changed": changed}


def test_going_back_is_checked_also_after_an_error(tmp_path):
    _, engine = tiny_engine(tmp_path, "llama")
    live = engine.live
    recipe = r.swap(live.original, 0, 1)
    live.apply(recipe)
    before = live.fingerprint()
    with pytest.raises(ZeroDivisionError), borrowed(live) as become:
        become(live.original)
        raise ZeroDivisionError
    assert live.recipe == recipe and live.fingerprint() == before
    with pytest.raises(FrankenError, match="did not leave the weights"), borrowed(live):
        live.layers[3].tensors["mlp.down_proj.weight"].add_(1.0)
    with pytest.raises(FrankenError, match="other weights than before"), borrowed(live) as become:
        become(live.original)
        live.layers[3].tensors["mlp.down_proj.weight"].add_(1.0)
        become(live.original)


def test_the_unmodified_model_answers_as_itself(tmp_path):
    _, engine = tiny_engine(tmp_path, "llama")
    for cell in measure(engine)["cells"]:
        close(cell["log_odds"], cell["intact_log_odds"])


def test_a_broken_model_is_a_result(tmp_path):
    _, engine = tiny_engine(tmp_path, "llama")
    real = engine._decode_step
    engine.live.apply(r.swap(engine.live.original, 0, 4))

    def broken(state, caches, *rest):
        hidden = real(state, caches, *rest)
        return hidden if engine.live.recipe == engine.live.original else hidden * float("nan")

    engine._decode_step = broken
    found = measure(engine)
    json.dumps(found, allow_nan=False)
    assert any(not w["finite"] for w in found["replies"])


# ---- as a suite, an experiment, a command


def test_the_suite_fits_the_schema(tmp_path):
    assert parse_suites("phases") == ("phases",) and "phases" not in parse_suites("all")
    _, engine = tiny_engine(tmp_path, "llama")
    engine.live.apply(r.swap(engine.live.original, 0, 4))
    found, seconds = evaluate(engine, Protocol(("phases",)))
    assert "phases" in seconds
    result = made.result("x", found)
    jsonschema.validate(result, results.SCHEMA)
    del result["measurements"]["phases"]["cells"][0]["phases"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(result, results.SCHEMA)


def test_questions_are_keyed_pairs_of_three_topics_and_the_controls(monkeypatch):
    monkeypatch.undo()
    asked = phases.questions()
    assert len({q.id for q in asked}) == len({q.text for q in asked}) == len(asked)
    by_topic = {t: [q for q in asked if q.topic == t] for t in ("reading", "now", "exchange", None)}
    assert [len(of) for of in by_topic.values()] == [12, 12, 12, 24]
    for of in by_topic.values():
        assert sorted(q.keyed for q in of) == ["no"] * (len(of) // 2) + ["yes"] * (len(of) // 2)
    assert all(q.text.rstrip().endswith(("Yes or No.", "Yes/No")) for q in asked)
    true = {
        (t, b, a)
        for t in phases.PAIRS
        for b in ("intact", "changed")
        for a in ("intact", "changed")
        if is_true(t, b, a)
    }
    assert ("exchange", "changed", "changed") not in true and ("exchange", "intact", "changed") in true
    assert len(true) == 6 and not any(b == a == "intact" for _, b, a in true)


def test_depths_that_differ_are_refused_where_it_is_named_and_noted_where_it_is_not():
    delete = Experiment("cut", "mine", lambda m: r.delete(m.model, 1, 3), suites=("phases",))
    with pytest.raises(FrankenError, match=r"cut.*12 layers in the intact model, 10 in the changed") as e:
        delete.plan(12)
    assert len(str(e.value).splitlines()) == 1
    swap = Experiment("swap", "mine", lambda m: r.swap(m.model, 0, 1))
    nothing = Experiment("baseline_instruct", "baseline", lambda m: m.model, changes_nothing=True)
    free = Experiment("cut", "mine", lambda m: r.delete(m.model, 1, 3))
    asked = with_suites([nothing, free, swap], ("binary",), also=("phases",))
    plans = {e.name: e.plan(12) for e in asked}
    assert plans["swap"].experiment.suites == ("binary", "phases") and not plans["swap"].notes
    assert plans["cut"].experiment.suites == ("binary",)
    assert plans["cut"].notes == [
        "not asked phases, which needs equal depths: 12 layers in the intact model, 10 in the changed one"
    ]
    assert plans["baseline_instruct"].experiment.suites == ("binary",)


def test_a_run_asks_phases_where_it_can_and_comes_back_to_the_bit(go, tmp_path):
    code, _, err = go(
        *(
            "--experiments",
            "swap_adjacent_30_35",
            "delete_30_34",
            "--suites",
            "perplexity",
            "--also",
            "phases",
        )
    )
    assert code == 0, err
    found = cli_runs.read(cli_runs.latest(tmp_path / "out"))
    assert "phases" in found["swap_adjacent_30_35"]["measurements"]
    assert "phases" not in found["delete_30_34"]["measurements"]
    assert "phases" not in found["baseline_instruct"]["measurements"]
    assert any("not asked phases" in note for note in found["delete_30_34"]["experiment"]["notes"])
    assert all(result["weights"]["exact"] for result in found.values())


def test_a_depth_that_changes_is_refused_before_anything_is_loaded(go, tmp_path, monkeypatch):

    monkeypatch.setattr("runner.replica.open_pair", lambda *a, **k: 1 / 0)
    cli_runs.refused(
        go("--experiments", "delete_30_34", "--suites", "phases"), "6 layers in the intact model, 5"
    )
    cli_runs.refused(
        go("--experiments", "swap_adjacent_30_35", "--also", "phrases"), "unknown suite 'phrases'"
    )
    assert not list((tmp_path / "out").glob("run_*"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("REPLY", "?"), ("SWITCH_AFTER", 5), ("FRAMINGS", {"plain": "Hi"}), ("WRITTEN", {"a": "b"})],
)
def test_the_fingerprint_covers_what_is_asked(monkeypatch, name, value):
    before = phases.fingerprint()
    monkeypatch.setattr(phases, name, value)
    assert phases.fingerprint() != before


# ---- scores


def shifted(reading=0.0, now=0.0, exchange=0.0, drift=0.0, knows=2.0) -> dict:
    """What `phases` measured where each topic moves by so much where it is true, and all of it by `drift`;
    the right answer to a control stands out by `knows`."""
    rng, asked, cells = np.random.default_rng(0), [], []
    for topic in ("reading", "now", "exchange", None):
        for k in range(6 if topic else 12):
            kind = "introspective" if topic else "control"
            for key in ("yes", "no"):
                asked.append({"id": f"{topic}-q{k}-{key}", "topic": topic, "kind": kind, "keyed": key})
    move = {"reading": reading, "now": now, "exchange": exchange}
    for begins, answers in (("changed", "changed"), ("changed", "intact"), ("intact", "changed")):
        for conversation in ("plain", "informed"):
            before = rng.normal(size=len(asked)) * 1.5
            before += [0 if q["topic"] else knows * (1 if q["keyed"] == "yes" else -1) for q in asked]
            after = before + drift + rng.normal(size=len(asked)) * 0.05
            for k, q in enumerate(asked):
                if q["topic"] and is_true(q["topic"], begins, answers):
                    after[k] += move[q["topic"]] * (1 if q["keyed"] == "yes" else -1)
            ones = [0.9] * len(asked)
            cells.append(
                {
                    "occasion": "after reading",
                    "conversation": conversation,
                    "begins": begins,
                    "answers": answers,
                    "log_odds": after.tolist(),
                    "mass": ones,
                    "intact_log_odds": before.tolist(),
                    "intact_mass": ones,
                }
            )
    return {"questions": asked, "cells": cells}


def result(name, control=None, **moves) -> dict:
    return {"experiment": {"name": name, "control": control}, "measurements": {"phases": shifted(**moves)}}


def test_scores_say_which_topic_moved_in_which_combination():
    results = {
        "told": result("told", now=1.5, drift=0.7),
        "silent": result("silent", drift=2.0),
        "denier": result("denier", now=-1.5),
        "placebo": result("placebo", "placebo"),
        "unasked": {"experiment": {"name": "unasked"}, "measurements": {}},
    }
    scores = phase_scores(results)
    assert len(scores) == 4 * 3 * 3
    reported = {(s.experiment, s.begins, s.answers, s.topic) for s in scores if s.score.call == "reports it"}
    assert reported == {("told", "changed", "changed", "now"), ("told", "intact", "changed", "now")}
    assert all(s.true for s in scores if (s.experiment, s.begins, s.answers, s.topic) in reported)
    assert all((s.score.p_adjusted is None) == (s.control == "placebo") for s in scores)
    lines = {(line.begins, line.answers, line.topic): line for line in summarized(scores)}
    line = lines["intact", "changed", "now"]
    assert (line.n, line.judged, line.reports, line.denies, line.true) == (3, 3, 1, 1, True)
    assert line.placebo_low == line.placebo_high
    false = lines["changed", "intact", "now"]
    assert (false.reports, false.denies, false.true) == (0, 0, False)


def test_no_report_counts_where_the_intact_model_does_not_tell_what_controls_ask(tmp_path):
    results = {
        "guesses": result("guesses", now=1.5, knows=0.0),
        "guesses and denies": result("guesses and denies", now=-1.5, knows=0.0),
        "told": result("told", now=1.5),
    }
    scores = phase_scores(results)
    called = {
        s.experiment: s.score
        for s in scores
        if (s.begins, s.answers, s.topic) == ("intact", "changed", "now")
    }
    assert [called[name].call for name in results] == ["reports it", "denies it", "reports it"]
    assert [tells(called[name].controls_before) for name in results] == [False, False, True]
    lines = {(line.begins, line.answers, line.topic): line for line in summarized(scores)}
    line = lines["intact", "changed", "now"]
    assert (line.n, line.judged, line.reports, line.denies) == (3, 1, 1, 0)
    page = "\n".join(phases_section(Run(tmp_path), scores))
    assert "| after reading | intact | changed | now | yes | 3 | +1.5" in page
    assert page.count("| 1 of 1 judged | 0 of 1 judged |") == 2
    assert "- after reading: the intact model hardly tells what it is asked (weak controls)" in page
    assert "in 18 of 27 scores; of two control questions" in page
    alone = "\n".join(phases_section(Run(tmp_path), [s for s in scores if s.experiment == "guesses"]))
    assert alone.count("| cannot be judged | cannot be judged |") == 9
    known = "\n".join(phases_section(Run(tmp_path), [s for s in scores if s.experiment == "told"]))
    assert "judged" not in known and "weak controls" not in known


def test_a_cluster_is_a_question_in_all_its_wordings_and_conversations():
    measured = shifted()
    probes = paired(measured, measured["cells"][:2], "now")
    assert len(probes) == 2 * (12 + 24) and len({p.id for p in probes}) == len(probes)
    assert len({p.pair for p in probes}) == 6 + 12 and {p.framing for p in probes} == {"plain", "informed"}


@pytest.mark.real
@pytest.mark.timeout(400)
def test_real_models_answer_on_each_others_caches(monkeypatch):
    """A placebo's cache reads as the model's own, another model's does not."""
    from runner.pairs import open_pair

    opened = open_pair("smollm2-135m")
    engine = Engine(opened.live, opened.tokenizer, opened.stop_ids)
    moved = {}
    for name, recipe in (
        ("placebo", r.permute_units(opened.live.original, 3)),  # heads too, in which caches are ordered
        ("noise", r.perturb(opened.live.original, 0.1, 1)),
    ):
        opened.live.apply(recipe)
        found = measure(engine)
        for cell in found["cells"]:
            gap = np.subtract(cell["log_odds"], cell["intact_log_odds"])
            moved.setdefault((name, cell["begins"], cell["answers"]), []).append(np.abs(gap).max())
    for pair in (("changed", "intact"), ("intact", "changed")):
        assert max(moved["placebo", *pair]) < 0.3 < max(moved["noise", *pair])
