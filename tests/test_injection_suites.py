"""The further injection suites against transformers' forward() and generate() with hooks, on tiny models; the
real weights; what they refuse."""

import json
from dataclasses import replace

import jsonschema
import made_results as made
import numpy as np
import pytest
import tiny
import torch
from small_battery import tokenizer
from test_injection import FEW, chat, slow_directions

import evaluate
from engine.generation import Engine
from experiments import EXPERIMENTS, GRIDS
from prompts import answer_token_ids
from runner import estimate, results, tables
from suites import injected, injection, injection_generation, injection_layers, localisation
from suites.base import Protocol
from suites.injected import CONTRAST, STREAM, Site, Thought, Vectors, sites, thoughts
from suites.injection import questions, split_turns
from surgery import recipes as r

SUITES = {
    "injection_layers": (
        injection_layers.InjectionLayers,
        injection_layers.Grid((0.5, None), (0.5, 2.0), 2, 1, ("informed",)),
    ),
    "injection_generation": (
        injection_generation.InjectionGeneration,
        injection_generation.Grid((0.5,), (1.0, 8.0), 2, 1, ("generation", "turn"), 1, 6),
    ),
    "localisation": (localisation.Localisation, localisation.Grid((0.5,), (1.0,), 1, 1, 2, 1)),
}


@pytest.fixture
def few(monkeypatch):
    """Few and short texts: a token of these models is a byte."""
    for name, value in FEW.items():
        monkeypatch.setattr(injection, name, value)
    monkeypatch.setattr(injection, "OPENING", "Hello.")
    monkeypatch.setattr(injection_layers, "ORDERS", 2)
    monkeypatch.setattr(injection_generation, "EXPLAIN", "Look.")
    monkeypatch.setattr(injection_generation, "AGREED", "Yes.")


def engine_of(folder, family="qwen2"):
    pair = tiny.Tiny(folder, family, vocab_size=272, max_position_embeddings=4096)
    made_ = tokenizer()
    made_.add_tokens(["bread", "Wo", "war"])
    return pair, Engine(pair.live(), made_)


def measure(engine, name) -> dict:
    suite, grid = SUITES[name]
    return suite(grid).measure(engine, Protocol(temperature=0.0), [])


def hooks_on(model, vectors, rows):
    """Hooks that add [(layer, vector, start, stop)] at absolute token positions."""

    def hook(vector, start, stop):
        def add(module, args, kwargs, out):
            at = kwargs["position_ids"][0]
            here = ((at >= start) & (at < stop)).float()[None, :, None]
            return out + here * vector

        return add

    return [
        model.model.layers[p].register_forward_hook(hook(vector, start, stop), with_kwargs=True)
        for p, vector, start, stop in rows
    ]


@torch.no_grad()
def after_turns(model, first, follow, rows) -> torch.Tensor:
    """Log-probabilities after `follow` on the cache of `first`, which is read with the rows' hooks."""
    handles = hooks_on(model, None, rows)
    cache = model(torch.tensor([first]), use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    logits = model(torch.tensor([follow]), past_key_values=cache, use_cache=True).logits[0, -1]
    return logits.float().log_softmax(-1).double()


def close(a, b):
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), atol=2e-3, rtol=2e-3)


# ---- single layers -----------------------------------------------------------------------------------------


def test_a_single_layers_injection_equals_hooks(tmp_path, few):
    pair, engine = engine_of(tmp_path)
    found, made_ = measure(engine, "injection_layers"), engine.tokenizer
    model = pair.rebuilt([("instruct", k) for k in range(6)])
    directions, (yes, no) = slow_directions(model, made_, 6, range(6)), answer_token_ids(made_)
    assert [s["layers"] for s in found["sites"]] == [[3, 4], [2, 4]] and found["sites"][1]["depth"] is None
    kinds = [(c["kind"], c["name"]) for c in found["cells"]]
    assert len(kinds) == 1 + 2 * 2 * 3 + 2
    assert kinds[-2:] == [("garbled", name) for name in injection_layers.GARBLED]
    asked = questions("informed")
    first, follows = split_turns(engine, injection.FRAMINGS["informed"], [p.text for p in asked])
    seen = set()
    for cell in found["cells"]:
        if cell["kind"] not in ("none", "concept"):
            continue
        rows = [
            (p, cell["strength"] * directions[p][cell["name"]], 0, 10**6)
            for p in range(*(cell["layers"] or (0, 0)))
        ]
        for k, follow in enumerate(follows):
            logp = after_turns(model, first, follow, rows)
            close(cell["log_odds"][k], logp[list(yes)].logsumexp(0) - logp[list(no)].logsumexp(0))
            close(cell["mass"][k], logp[[*yes, *no]].exp().sum())
        seen.add(tuple(cell["log_odds"]))
        assert [len(order) for order in cell["naming"]] == [3, 3]
        close(np.exp(cell["naming"]).sum(1), [1, 1])
    assert len(seen) == 1 + 2 * 2 * 2  # no two cells are equal
    assert sorted(map(tuple, map(sorted, found["orders"]))) == [(0, 1, 2)] * 2


def test_random_directions_are_as_long_as_the_concepts_and_of_their_own(tmp_path, few):
    _, engine = engine_of(tmp_path)
    what, (site,) = thoughts(2, 2), sites((0.5,), 6)
    length, made_ = {}, {}
    for unit in (STREAM, CONTRAST):
        vectors = Vectors(engine, [site], what, unit)
        made_[unit] = [vectors.table[vectors.pushes(site, t, 1.0)[0].vector] for t in what]
        length[unit] = [float(row.norm()) for row in made_[unit]]
    assert length[STREAM] == pytest.approx([length[STREAM][0]] * 4, rel=1e-4)
    first, second, *drawn = length[CONTRAST]
    assert drawn == pytest.approx([vectors.contrast[3] * length[STREAM][0]] * 2, rel=1e-4)
    assert first != pytest.approx(second, rel=1e-3)
    for a, b in ((0, 2), (2, 3)):
        assert abs(torch.cosine_similarity(made_[STREAM][a], made_[STREAM][b], dim=0)) < 0.6
    assert torch.equal(Vectors(engine, [site], what).table, torch.stack(made_[STREAM]))


def test_garbled_turns_change_the_message_and_nothing_else(tmp_path, few, monkeypatch):
    monkeypatch.setattr(injection, "OPENING", "one two three four five")
    monkeypatch.setitem(injection.FRAMINGS, "informed", "Look. one two three four five")
    _, engine = engine_of(tmp_path)
    garbled = injection_layers.shuffled_words(injection.OPENING)
    assert garbled != injection.OPENING and sorted(garbled.split()) == sorted(injection.OPENING.split())
    first, _ = split_turns(engine, injection.FRAMINGS["informed"], ["Odd?"])
    text = engine.tokenizer.decode(first)
    drawn = injection_layers.InjectionLayers._random(engine, injection.FRAMINGS["informed"], first)
    a = len(engine.tokenizer(text[: text.index("one")], add_special_tokens=False)["input_ids"])
    b = a + len("one two three four five")
    assert drawn[:a] == first[:a] and drawn[b:] == first[b:] and len(drawn) == len(first)
    assert sum(x != y for x, y in zip(first[a:b], drawn[a:b], strict=True)) > 15
    assert not {*drawn[a:b]} & set(engine.tokenizer.all_special_ids)


# ---- while it writes ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_injection_while_writing_equals_generate_with_hooks(tmp_path, few):
    pair, engine = engine_of(tmp_path)
    found, made_ = measure(engine, "injection_generation"), engine.tokenizer
    model = pair.rebuilt([("instruct", k) for k in range(6)])
    vectors = Vectors(engine, [Site(0.5, (3,))], thoughts(2, 1), CONTRAST)
    texts = set()
    for cell in found["cells"]:
        question = dict(injection_generation.QUESTIONS)[cell["question"]]
        messages = injection_generation.InjectionGeneration._messages(question)
        ids = chat(made_, messages)
        length = len(chat(made_, messages[:2], ask=False)) + len(
            chat(made_, [dict(messages[2], content="")], False)
        )
        start = {"generation": len(ids) - 1, "turn": length - 2, None: 0}[cell["span"]]
        for reply in cell["replies"]:
            rows = []
            if cell["kind"] != "none":
                thought = Thought(cell["kind"], reply["thought"])
                push = vectors.pushes(Site(0.5, (3,)), thought, 1.0)[0]
                rows = [(3, cell["strength"] * vectors.table[push.vector], start, 10**6)]
            handles = hooks_on(model, None, rows)
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=[1, 3],
                pad_token_id=0,
            )
            for handle in handles:
                handle.remove()
            assert reply["text"] == made_.decode(out[0, len(ids) :], skip_special_tokens=True)
            texts.add((cell["question"], cell["kind"], cell["span"], cell["strength"], reply["text"]))
    assert len(found["cells"]) == 2 * (1 + 2 * 2 * 2) and len({t[-1] for t in texts}) > 8


def test_a_judge_reads_the_same_replies(tmp_path, few):
    found = measure(engine_of(tmp_path)[1], "injection_generation")
    replies = [reply["text"] for cell in found["cells"] for reply in cell["replies"]]

    def judge(asked):
        assert [text for _, text in asked] == replies and asked[0][0].startswith("Trial 1: Do you detect")
        return [{"outcome": "detects", "names": ["wolf"]} for _ in asked]

    judged = injection_generation.judge_replies(found, judge)
    assert all(x["judged"]["names"] == ["wolf"] for c in judged["cells"] for x in c["replies"])
    assert "judged" not in found["cells"][0]["replies"][0]
    for bad in ([], [{"outcome": "perhaps", "names": []} for _ in replies]):
        with pytest.raises(ValueError, match="has to give one of"):
            injection_generation.judge_replies(found, lambda _, bad=bad: bad)


# ---- where it was, and which was stronger ------------------------------------------------------------------


def test_localisation_touches_the_tokens_of_one_sentence(tmp_path, few):
    """Every place of one order, against hooks on the characters' positions: a token is a byte here."""
    pair, engine = engine_of(tmp_path)
    found = measure(engine, "localisation")
    model = pair.rebuilt([("instruct", k) for k in range(6)])
    vectors = Vectors(engine, [Site(0.5, (3,))], thoughts(1, 1))
    order = found["orders"][1]
    opening = localisation.TEN + localisation.numbered([localisation.SENTENCES[i] for i in order])
    first, (follow,) = split_turns(engine, opening, [localisation.WHICH])
    cell = next(c for c in found["cells"] if c["order"] == 1 and c["kind"] == "concept")
    text = engine.tokenizer.decode(first)
    digits = [engine.tokenizer(str(d), add_special_tokens=False)["input_ids"][0] for d in range(10)]
    for place in (0, 4, 9):
        sentence = localisation.SENTENCES[order[place]]
        before = engine.tokenizer(text[: text.index(sentence)], add_special_tokens=False)["input_ids"]
        span = len(before), len(before) + len(sentence)
        vector = vectors.table[vectors.pushes(Site(0.5, (3,)), Thought("concept", "bread"), 1.0)[0].vector]
        logp = after_turns(model, first, follow, [(3, vector, *span)])
        then = after_turns(model, first, (*follow, digits[1]), [(3, vector, *span)])
        p = logp[digits].exp()
        want = [p[1] * (1 - then[digits[0]].exp()), *p[2:], p[1] * then[digits[0]].exp()]
        close(np.exp(cell["logprobs"][place]), np.array(want) / sum(want))
        close(cell["mass"][place], p[1:].sum())
    assert len(found["cells"]) == 2 * 2 and len(found["priors"]) == 2
    assert sorted(order) == list(range(10)) and found["orders"][0] != order


def test_comparison_gives_the_stronger_to_either_sentence(tmp_path, few):
    pair, engine = engine_of(tmp_path)
    found = measure(engine, "localisation")["comparison"]
    model = pair.rebuilt([("instruct", k) for k in range(6)])
    site, thought = Site(0.5, (3,)), Thought("concept", "bread")
    vectors = Vectors(engine, [site], [thought])
    opening = localisation.TWO + localisation.numbered(localisation.SENTENCES[:2])
    first, follows = split_turns(engine, opening, [text for _, text in localisation.COMPARE])
    a, b = localisation.spans(engine, opening, localisation.SENTENCES[:2])
    one, two = (engine.tokenizer(d, add_special_tokens=False)["input_ids"][0] for d in "12")
    cell = next(c for c in found["cells"] if c["kind"] == "concept")
    for k, (key, _) in enumerate(localisation.COMPARE):
        for side, (x, y) in enumerate(((2.0, 1.0), (1.0, 2.0))):
            rows = [(3, x * vectors.table[0], *a), (3, y * vectors.table[0], *b)]
            logp = after_turns(model, first, follows[k], rows)
            close(cell[key]["log_odds"][side], logp[one] - logp[two])


# ---- as suites ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_leaves_the_model_alone_fits_the_schema_and_costs_what_it_says(tmp_path, few, name):
    _, engine = engine_of(tmp_path, "llama")
    engine.live.apply(r.swap(engine.live.original, 0, 4))
    before = engine.live.fingerprint()
    engine.timing = type(engine.timing)()
    found = measure(engine, name)
    assert engine.live.fingerprint() == before
    result = made.result("x", {name: found})
    jsonschema.validate(json.loads(json.dumps(result, allow_nan=False)), results.SCHEMA)
    broken = json.loads(json.dumps(result))
    del broken["measurements"][name]["cells"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, results.SCHEMA)
    texts = {}
    packed = tables.pack({name: found}, texts)
    assert tables.unpack(json.loads(json.dumps(packed)), texts) == json.loads(json.dumps({name: found}))
    suite, grid = SUITES[name]
    work = suite(grid).work(Protocol())
    read = sum(len(engine.chat_ids([{"role": "user", "content": t}])) for t in work.texts)
    assert engine.timing.prefill_tokens > 0.4 * read
    if name != "injection_layers":  # its names are several tokens long here: each has readings of its own
        assert engine.timing.prefill_tokens < 1.6 * read
    assert len(work.budgets) == sum(len(c.get("replies", ())) for c in found["cells"])


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_broken_model_is_a_result(tmp_path, few, name, value):
    _, engine = engine_of(tmp_path, "llama")
    if value:
        engine.live.layers[1].tensors["mlp.down_proj.weight"].fill_(value)
    else:
        engine.live.model.get_input_embeddings().weight.zero_()
    json.dumps(measure(engine, name), allow_nan=False)


@pytest.mark.parametrize("name", SUITES)
def test_named_experiments_ask_the_suites_of_the_intact_model(name):
    suite, _ = SUITES[name]
    for experiments, asked in ((EXPERIMENTS, name), (GRIDS, f"{name}_grid")):
        experiment = next(e for e in experiments if e.name == asked)
        assert experiment.suites == (asked,) and experiment.control == "injection"
        assert isinstance(evaluate.SUITES[asked](), suite)
    short, grid = evaluate.SUITES[name](), evaluate.SUITES[f"{name}_grid"]()
    assert short.fingerprint() != grid.fingerprint() == evaluate.SUITES[f"{name}_grid"]().fingerprint()
    many, little = (estimate.workload(Protocol(suites=(n,)))[0] for n in (f"{name}_grid", name))
    assert many > 10 * little


@pytest.mark.parametrize("name", SUITES)
def test_a_tokenizer_without_offsets_is_refused(name):
    made_ = tokenizer()
    type_ = type("Slow", (type(made_),), {"is_fast": property(lambda self: False)})
    made_.__class__ = type_
    with pytest.raises(evaluate.FrankenError, match="offsets"):
        evaluate.check_tokenizer(made_, Protocol((name,)))


@pytest.mark.real
@pytest.mark.timeout(170)
def test_real_injection_at_single_layers(smollm2):
    """On the real weights: a direction of strength 1 at one layer tells which concept it is, writes other
    words, and moves the answer to where it was."""
    from runner.pairs import open_pair

    opened = open_pair("smollm2-135m")
    engine, before = Engine(opened.live, opened.tokenizer, opened.stop_ids), opened.live.fingerprint()
    where, what = sites((0.5,), 30), thoughts(1, 0)
    assert injected.sites((0.5, 0.59), 30)[1].layers == (18,) and where[0].layers == (15,)
    writing = injection_generation.Grid((0.5,), (4.0,), 1, 0, ("generation",), 1, 8)
    found = injection_generation.InjectionGeneration(writing).measure(engine, Protocol(temperature=0), [])
    told = {(c["question"], c["kind"]): c["replies"][0]["text"] for c in found["cells"]}
    assert told["detect", "none"] != told["detect", "concept"] and len(what) == 1
    places = replace(localisation.SHORT, depths=(0.25,), concepts=1, randoms=0, pairs=1)
    found = localisation.Localisation(places).measure(engine, Protocol(), [])
    (cell,) = found["cells"]
    assert np.shape(cell["logprobs"]) == (10, 10) and min(cell["mass"]) > 0.01
    assert np.ptp(np.array(cell["logprobs"]) - found["priors"][0]["logprobs"]) > 0.05
    assert opened.live.fingerprint() == before
