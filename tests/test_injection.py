"""Concept injection against transformers with hooks and its own cache; mutual information against hand-made
tables."""

import json
import math

import jsonschema
import made_results as made
import numpy as np
import pytest
import templates
import tiny
import torch
from small_battery import tokenizer
from transformers import AutoModelForCausalLM

from analysis.stats import MASS_FLOOR
from engine.generation import Engine
from evaluate import SUITES, evaluate, parse_suites
from prompts import answer_token_ids
from runner import results
from suites import injection
from suites.base import Protocol
from suites.injection import Names, find_directions, middle_third, mutual_information, questions, split_turns
from surgery import recipes as r

FEW = {
    "PAIRS": (("own", "Odd?", "Fine?"),),
    "CONTROLS": injection.CONTROLS[:1],
    "STRENGTHS": (0.0, 0.5, 4.0),
    "CONCEPTS": ("bread", "wolf", "war"),
    "ABOUT": ("On {}.", "Why {}?"),
    "NEUTRAL": ("it", "that"),
    "FRAMINGS": {"plain": "Hello.", "informed": "Look: a thought. Hello."},
    "REPLY": "Go on.",
    "NAMING": "Which?",
    "ASK": "",
}


@pytest.fixture
def few(monkeypatch):
    """Two introspective and two control questions about three concepts, and short texts: a token of these
    models is a byte."""
    for name, value in FEW.items():
        monkeypatch.setattr(injection, name, value)


def speller():
    """A tokenizer that can say Yes and No, one name in one token, and another in one token that begins a
    third."""
    made_ = tokenizer()
    made_.add_tokens(["bread", "Wo", "war"])
    return made_


def tiny_engine(folder, family):
    pair = tiny.Tiny(folder, family, vocab_size=272, max_position_embeddings=2048)
    return pair, Engine(pair.live(), speller())


def measure(engine) -> dict:
    return injection.Injection().measure(engine, None, [])


# ---- the oracle --------------------------------------------------------------------------------------------


def chat(made_, messages, ask=True) -> list[int]:
    return made_(
        made_.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False),
        add_special_tokens=False,
    )["input_ids"]


@torch.no_grad()
def slow_directions(model, made_, n, layers=None) -> dict:
    """{layer: {concept: what strength 1 adds}}, from one prompt at a time, layer outputs by hooks."""

    def last_states(word):
        rows = []
        for about in injection.ABOUT:
            outputs = {}
            hooks = [
                model.model.layers[p].register_forward_hook(
                    lambda m, a, out, p=p, outputs=outputs: outputs.__setitem__(p, out)
                )
                for p in range(n)
            ]
            model(
                torch.tensor([chat(made_, [{"role": "user", "content": about.format(word)}])]),
                use_cache=False,
            )
            for hook in hooks:
                hook.remove()
            rows.append({p: out[0, -1].double() for p, out in outputs.items()})
        return rows

    neutral = [row for word in injection.NEUTRAL for row in last_states(word)]
    found = {}
    for p in layers or range(n // 3, 2 * n // 3):
        center = sum(row[p] for row in neutral) / len(neutral)
        norm = sum(float(row[p].norm()) for row in neutral) / len(neutral)
        found[p] = {}
        for concept in injection.CONCEPTS:
            rows = last_states(concept)
            contrast = sum(row[p] for row in rows) / len(rows) - center
            found[p][concept] = (contrast / contrast.norm() * norm).float()
    return found


@torch.no_grad()
def slow_answers(
    model, made_, directions, concept, strength, framing, question, replies=((),)
) -> list[torch.Tensor]:
    """Log-probabilities at every step of each reply (and after it): the first turn with hooks, then the rest
    on its cache."""
    messages = [
        {"role": "user", "content": injection.FRAMINGS[framing]},
        {"role": "assistant", "content": injection.REPLY},
    ]
    first = chat(made_, messages, ask=False)
    ids = chat(made_, [*messages, {"role": "user", "content": question}])
    assert ids[: len(first)] == first
    found = []
    for reply in replies:
        hooks = [
            model.model.layers[p].register_forward_hook(lambda m, a, out, of=of: out + strength * of[concept])
            for p, of in directions.items()
            if concept is not None
        ]
        cache = model(torch.tensor([first]), use_cache=True).past_key_values
        for hook in hooks:
            hook.remove()
        rest = ids[len(first) :]
        logits = model(torch.tensor([[*rest, *reply]]), past_key_values=cache, use_cache=True).logits[
            0, len(rest) - 1 :
        ]
        found.append(logits.float().log_softmax(-1).double())
    return found


def close(a, b):
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_injection_equals_hooks_and_a_second_forward(tmp_path, few, family):
    """gemma3 has sliding windows, shorter than the first turn."""
    pair, engine = tiny_engine(tmp_path, family)
    model, made_ = pair.rebuilt([("instruct", k) for k in range(6)]), engine.tokenizer
    found = measure(engine)
    directions = slow_directions(model, made_, 6)
    (yes, no), seen = answer_token_ids(made_), set()
    assert found["layers"] == [2, 4] and sorted(directions) == [2, 3]
    for cell in found["cells"]:
        for probe, question in zip(cell["probes"], questions(cell["framing"]), strict=True):
            (logp,) = slow_answers(
                model, made_, directions, cell["concept"], cell["strength"], cell["framing"], question.text
            )
            close(probe["log_odds"], logp[0, list(yes)].logsumexp(0) - logp[0, list(no)].logsumexp(0))
            close(probe["mass"], logp[0, [*yes, *no]].exp().sum())
            assert (probe["id"], probe["kind"], probe["keyed"], probe["pair"]) == (
                question.id,
                question.kind,
                question.if_changed,
                question.pair,
            )
            seen.add(round(probe["log_odds"], 4))
        spelled = [s for name in injection.CONCEPTS for s in (name, name.capitalize())]
        replies = [made_(s, add_special_tokens=False)["input_ids"] for s in spelled]
        each = [
            sum(logp[k, t] for k, t in enumerate(reply))
            for reply, logp in zip(
                replies,
                slow_answers(
                    model,
                    made_,
                    directions,
                    cell["concept"],
                    cell["strength"],
                    cell["framing"],
                    injection.NAMING,
                    replies,
                ),
                strict=True,
            )
        ]
        total = torch.stack(each).view(3, 2).logsumexp(1)
        close(cell["naming"], total - total.logsumexp(0))
        seen.add(round(cell["naming"][0], 4))
    assert len(seen) == 2 * 7 * 5  # framings, cells, numbers: no two are equal
    for entry in found["bits"]:
        p = np.exp(
            [
                c["naming"]
                for c in found["cells"]
                if (c["framing"], c["strength"]) == (entry["framing"], entry["strength"])
            ]
        )
        want = sum(x * math.log2(x / m) for row in p for x, m in zip(row, p.mean(0), strict=True)) / len(p)
        assert entry["bits"] == pytest.approx(want, abs=1e-9)
    assert {e["strength"] for e in found["bits"] if e["bits"] > 1e-6} == {0.5, 4.0}


def test_a_modified_model_is_injected_as_it_runs(tmp_path, few):
    """Layers repeated and in another order: the middle third is that of the layers that run."""
    pair, engine = tiny_engine(tmp_path, "llama")
    engine.live.apply(r.repeat(r.swap(engine.live.original, 0, 1), 0, 3))
    before, fingerprint = engine.next_token_logprobs([tiny.random_prompt(1, 20)]), engine.live.fingerprint()
    found = measure(engine)
    model = pair.rebuilt([("instruct", k) for k in (1, 0, 2, 1, 0, 2, 3, 4, 5)])
    directions = slow_directions(model, engine.tokenizer, 9)
    assert found["layers"] == [3, 6]
    cell = next(
        c
        for c in found["cells"]
        if c["concept"] == "war" and c["strength"] == 4 and c["framing"] == "informed"
    )
    (logp,) = slow_answers(
        model, engine.tokenizer, directions, "war", 4, "informed", questions("informed")[1].text
    )
    yes, no = answer_token_ids(engine.tokenizer)
    close(cell["probes"][1]["log_odds"], logp[0, list(yes)].logsumexp(0) - logp[0, list(no)].logsumexp(0))
    assert engine.live.fingerprint() == fingerprint and torch.equal(
        engine.next_token_logprobs([tiny.random_prompt(1, 20)]), before
    )


# ---- batches, strength 0, broken models --------------------------------------------------------------------


def test_strength_zero_is_no_injection(tiny_pair, few):
    """To the bit where zero times a direction is added; and the same as the conversation asked as one
    prompt."""
    engine = tiny_pair("llama", max_position_embeddings=2048).engine()
    first, follows = split_turns(engine, injection.FRAMINGS["informed"], ["Is it?", "What is it called?"])
    change = find_directions(engine).change
    none = np.stack(injection.answers(engine, first, follows, 2))
    zero = np.stack(injection.answers(engine, first, follows, 2, lambda rows: change(rows, 0.0)))
    assert np.array_equal(none, zero)
    assert np.array_equal(none[0], none[1])
    assert none.shape == (2, 2, tiny.VOCAB)
    np.testing.assert_allclose(none[0], engine.next_token_logprobs([first + f for f in follows]), atol=2e-5)
    some = np.stack(injection.answers(engine, first, follows, 2, lambda rows: change(rows, 0.5)))
    assert np.abs(some - none).max() > 0.01 and np.abs(some[0] - some[1]).max() > 0.01
    one = np.concatenate(
        [injection.answers(engine, first, follows, 1, lambda rows, c=c: change([c], 0.5)) for c in (0, 1)]
    )
    np.testing.assert_allclose(one, some, atol=2e-5)


def test_batches_are_bounded_and_halved(tmp_path, few, monkeypatch):
    _, engine = tiny_engine(tmp_path, "qwen2")
    want = measure(engine)
    sizes, real = [], Engine.prefill

    def prefill(self, prompts, *args, **kwargs):
        if len(prompts) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(prompts))
        return real(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Engine, "prefill", prefill)
    got = measure(engine)
    assert max(sizes) <= 4 and engine.timing.out_of_memory
    for a, b in zip(got["cells"], want["cells"], strict=True):
        assert {k: a[k] for k in ("framing", "strength", "concept")} == {
            k: b[k] for k in ("framing", "strength", "concept")
        }
        close(a["naming"], b["naming"])
        close([p["log_odds"] for p in a["probes"]], [p["log_odds"] for p in b["probes"]])
    monkeypatch.setattr(Engine, "prefill", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(engine)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in engine.live.model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_broken_model_is_a_result(tmp_path, few, value):
    """Zero: the layers and the stream are all nothing, so no direction exists and every answer is equally
    likely."""
    _, engine = tiny_engine(tmp_path, "llama")
    if value:
        engine.live.layers[1].tensors["mlp.down_proj.weight"].fill_(value)
    else:
        engine.live.model.get_input_embeddings().weight.zero_()
    found = measure(engine)
    json.dumps(found, allow_nan=False)
    for cell in found["cells"]:
        for probe in cell["probes"]:
            assert probe["log_odds"] == (None if value else pytest.approx(0, abs=1e-5)) and probe[
                "answered"
            ] == (not value)
        assert (cell["naming"] == [None] * 3) == bool(value)
    assert all(e["bits"] is None if value else e["bits"] == pytest.approx(0) for e in found["bits"])


# ---- the texts ---------------------------------------------------------------------------------------------


def test_questions_are_keyed_pairs_and_balanced_controls():
    for framing in injection.FRAMINGS:
        asked = questions(framing)
        by_id = {p.id: p for p in asked}
        assert len(by_id) == len(asked) and len({p.text for p in asked}) == len(asked)
        for p in asked:
            twin = by_id[p.pair]
            assert twin.pair == p.id
            assert twin.if_changed != p.if_changed
            assert twin.kind == p.kind
            assert p.framing == framing
            assert p.text.endswith("Answer Yes or No.") and p.question == twin.question
        controls = [p for p in asked if p.kind == "control"]
        assert len(asked) - len(controls) >= 12
        assert len(controls) >= 12
        assert {p.difficulty for p in controls} == {"easy", "medium", "hard"}
    # what differs is the first turn
    assert [p.text for p in questions("plain")] == [p.text for p in questions("informed")]
    assert len(injection.CONCEPTS) == 9 == len(set(injection.CONCEPTS)) and not set(injection.CONCEPTS) & set(
        injection.NEUTRAL
    )
    said = " ".join(
        [*injection.FRAMINGS.values(), injection.REPLY, *(p.text for p in questions("plain"))]
    ).lower()
    assert not [c for c in injection.CONCEPTS if c in said.split()]


def test_the_first_turn_ends_where_the_template_says(tiny_pair):
    engine = tiny_pair("llama").engine()
    first, follows = split_turns(engine, "Hi", ["A?", "AB"])
    assert (
        engine.tokenizer.decode(first)
        == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{injection.REPLY}<|im_end|>\n"
    )
    assert [engine.tokenizer.decode(f) for f in follows] == [
        f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in ("A?", "AB")
    ]
    # a template that writes a thought before the last reply alone, as Qwen3's does
    engine.tokenizer.chat_template = tiny.TEMPLATE.replace(
        "+ m['content']", "+ ('THOUGHT ' if loop.last and m['role'] == 'assistant' else '') + m['content']"
    )
    first, follows = split_turns(engine, "Hi", ["A?"])
    assert engine.tokenizer.decode(first) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert first + follows[0] == engine.chat_ids(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": injection.REPLY},
            {"role": "user", "content": "A?"},
        ]
    )


def test_the_short_form_measures_its_part_of_the_whole(tmp_path, few, monkeypatch):
    engine = tiny_engine(tmp_path, "llama")[1]
    whole = measure(engine)
    monkeypatch.setitem(SUITES, "injection_short", lambda: injection.Injection((0.0, 0.5)))
    results_, seconds = evaluate(engine, Protocol(("injection_short",)))
    assert list(results_) == ["injection"] and set(seconds) == {"replies", "injection_short"}
    short = results_["injection"]
    assert short["strengths"] == [0.0, 0.5] and len(short["cells"]) == 8 < len(whole["cells"]) == 14
    assert short["cells"] == [cell for cell in whole["cells"] if cell["strength"] in (0.0, 0.5)]
    prints = {injection.Injection(s).fingerprint() for s in (None, (0.0, 0.5), (0.0, 4.0))}
    assert len(prints) == 3 and injection.Injection(FEW["STRENGTHS"]).fingerprint() in prints
    monkeypatch.setitem(SUITES, "injection_short", lambda: injection.Injection((0.0, 0.5), ("informed",)))
    shorter = evaluate(engine, Protocol(("injection_short",)))[0]["injection"]
    assert shorter["framings"] == ["informed"] and list(shorter["texts"]["first_turn"]) == ["informed"]
    assert shorter["cells"] == [cell for cell in short["cells"] if cell["framing"] == "informed"]
    asked = {injection.Injection((0.0, 0.5), framings).fingerprint() for framings in (None, ("informed",))}
    assert len(asked) == 2 and injection.Injection((0.0, 0.5)).fingerprint() in asked
    few_texts, all_texts = (len(injection.Injection(s).work(Protocol()).texts) for s in ((0.0, 0.5), None))
    assert few_texts < all_texts


def test_middle_thirds():
    assert [(t.start, t.stop) for t in map(middle_third, (1, 2, 3, 5, 30, 64))] == [
        (0, 1),
        (0, 1),
        (1, 2),
        (1, 3),
        (10, 20),
        (21, 42),
    ]


# ---- naming and its information ----------------------------------------------------------------------------


class Spelled:
    """An engine whose tokenizer writes the prompt as 8, 9 and has these tokens for answers."""

    def __init__(self, words: dict[str, tuple[int, ...]]):
        self.words = {"": (8, 9)} | words

    def chat_ids(self, messages, begun=""):
        return self.words[begun]


def test_names_of_several_tokens_take_their_whole_likelihood():
    # the last two are one sequence, which counts once
    words = {"ab": (8, 9, 1, 2), "Ab": (8, 9, 3), "b": (8, 9, 2), "B": (8, 9, 2)}
    names = Names(Spelled(words), [], ["ab", "b"])
    assert names.beginnings == [(), (1,)]
    assert names.rows((5, 8, 9)) == [(5, 8, 9), (5, 8, 9, 1)]
    p = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.2, 0.05]])
    likely = np.array([0.2 * 0.2 + 0.4, 0.3])
    np.testing.assert_allclose(np.exp(names.logprobs(np.log(p))), likely / likely.sum())


def test_a_prompts_end_that_a_name_changes_is_part_of_every_answer():
    words = {"ab": (8, 3), "Ab": (8, 9, 1), "b": (8, 9, 2), "B": (8, 9, 2)}
    names = Names(Spelled(words), [], ["ab", "b"])
    assert names.rows((5, 8, 9)) == [(5, 8), (5, 8, 9)]
    p = {(): np.full(10, 0.1), (9,): np.array([0, 0.75, 0.25, *[0] * 7])}
    likely = np.array([0.1 + 0.1 * 0.75, 0.1 * 0.25])
    with np.errstate(divide="ignore"):
        got = np.exp(names.logprobs(np.log(np.stack([p[()], p[9,]]))))
    np.testing.assert_allclose(got, likely / likely.sum())


@pytest.mark.parametrize("space_before", [True, False])
def test_a_names_likelihood_is_that_of_conversation_and_name_as_one_text(tmp_path, few, space_before):
    """SentencePiece writes a word that stands alone with a space before it."""
    made_ = templates.sentencepiece(space_before)
    pair = tiny.Tiny(tmp_path, "llama", max_position_embeddings=2048)
    engine = Engine(pair.live(), made_)
    listed = ("bread", "Bertrand", "is")
    model = pair.rebuilt([("instruct", k) for k in range(pair.n)])
    first, (follow,) = split_turns(engine, "Hello.", ["Which?"])
    names = Names(engine, injection.turns_with("Hello.", "Which?"), listed)
    got = names.logprobs(np.stack(injection.answers(engine, first, names.rows(follow), 1))[0])
    # The slow way: transformers, one whole text at a time.
    messages, total = injection.turns_with("Hello.", "Which?"), []
    head = chat(made_, messages)
    for name in listed:
        seen = {}
        for spelling in {name, name.capitalize()}:
            text = made_.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + spelling
            ids = made_(text, add_special_tokens=False)["input_ids"]
            assert ids[: len(head)] == head
            logprobs = tiny.hf_logits(model, ids).double().log_softmax(-1)
            seen[tuple(ids)] = sum(logprobs[k - 1, ids[k]].item() for k in range(len(head), len(ids)))
        total.append(sum(math.exp(value) for value in seen.values()))
    np.testing.assert_allclose(np.exp(got), np.array(total) / sum(total), rtol=1e-3)


def test_mutual_information_of_hand_made_tables():
    with np.errstate(divide="ignore"):
        assert mutual_information(np.log(np.full((9, 9), 1 / 9))) == pytest.approx(0)
        # a favorite tells nothing
        assert mutual_information(np.log(np.tile([0.7, 0.2, 0.1], (9, 1)))) == pytest.approx(0)
        assert mutual_information(np.log(np.eye(9))) == pytest.approx(math.log2(9))
        # told, by the wrong names
        assert mutual_information(np.log(np.roll(np.eye(9), 4, 0))) == pytest.approx(math.log2(9))
        assert mutual_information(np.log(np.kron(np.eye(2), np.full((2, 2), 0.5)))) == pytest.approx(1)
        assert mutual_information(np.log([[0.75, 0.25], [0.25, 0.75]])) == pytest.approx(
            1 + 0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)
        )
    assert math.isnan(mutual_information(np.array([[0.0, math.nan]])))


# ---- as a suite, and the real weights ----------------------------------------------------------------------


def test_the_suite_fits_the_schema(tmp_path, few):
    assert parse_suites("injection") == ("injection",) and "injection" not in parse_suites("all")
    found, seconds = evaluate(tiny_engine(tmp_path, "llama")[1], Protocol(("injection",)))
    assert "injection" in seconds and found["injection"]["framings"] == ["plain", "informed"]
    result = made.result("x", found)
    jsonschema.validate(result, results.SCHEMA)
    del result["measurements"]["injection"]["cells"][0]["naming"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(result, results.SCHEMA)
    assert [
        len([c for c in found["injection"]["cells"] if c["strength"] == s]) for s in FEW["STRENGTHS"]
    ] == [2, 6, 6]


@pytest.mark.real
@pytest.mark.timeout(300)
def test_real_injection_tells_of_the_concept_and_leaves_the_model_alone(monkeypatch, smollm2):
    from runner.pairs import open_pair

    for name, value in {
        "STRENGTHS": (0.0, 0.3),
        "PAIRS": injection.PAIRS[:1],
        "CONTROLS": injection.CONTROLS[:1],
    }.items():
        monkeypatch.setattr(injection, name, value)
    # one dtype on every machine: it decides which of the answers below drown
    opened = open_pair("smollm2-135m", dtype="float32")
    engine, before = Engine(opened.live, opened.tokenizer, opened.stop_ids), opened.live.fingerprint()
    found = measure(engine)
    bits = {(e["framing"], e["strength"]): e["bits"] for e in found["bits"]}
    assert all(
        bits[f, 0.0] == 0 and 0.05 < bits[f, 0.3] < math.log2(9) for f in injection.FRAMINGS
    ) and found["layers"] == [10, 20]
    for strength, most in ((0.0, 0), (0.3, 4)):
        probes = [p for c in found["cells"] if c["strength"] == strength for p in c["probes"]]
        assert sum(not p["answered"] for p in probes) <= most
    assert opened.live.fingerprint() == before
    # the strongest of the concepts, under which the controls' Yes and No drown, as transformers has it
    monkeypatch.setattr(injection, "CONCEPTS", ("war",))
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    directions, (yes, no) = (
        slow_directions(model, engine.tokenizer, 30),
        answer_token_ids(engine.tokenizer),
    )
    (cell,) = [c for c in found["cells"] if (c["framing"], c["concept"]) == ("informed", "war")]
    for probe, question in zip(cell["probes"], questions("informed"), strict=True):
        (logp,) = slow_answers(model, engine.tokenizer, directions, "war", 0.3, "informed", question.text)
        close(probe["log_odds"], logp[0, list(yes)].logsumexp(0) - logp[0, list(no)].logsumexp(0))
        close(probe["mass"], logp[0, [*yes, *no]].exp().sum())
        assert probe["answered"] == (logp[0, [*yes, *no]].exp().sum() >= MASS_FLOOR)
    assert [p["answered"] for p in cell["probes"]] == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NAMING", "?"),
        ("STRENGTHS", (0.0, 0.5)),
        ("PAIRS", injection.PAIRS[1:]),
        ("FRAMINGS", {"plain": "Hi"}),
    ],
)
def test_the_fingerprint_covers_what_is_asked(monkeypatch, name, value):
    before = injection.fingerprint()
    monkeypatch.setattr(injection, name, value)
    assert injection.fingerprint() != before
