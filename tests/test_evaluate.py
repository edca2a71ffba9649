"""Every suite against the slow obvious way: transformers' own forward pass on a rebuilt model, and sums by
hand."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import small_battery
import tiny
import torch

import evaluate as ev
import prompts
from analysis import stats
from engine.generation import Completion, Engine, Request
from errors import FrankenError
from franken import LiveModel
from questions.grading import Exact, Grade
from runner.pairs import load_tokenizer
from suites import formats, perplexity
from suites.base import Protocol
from suites.chat import Chat
from suites.free_text import FreeText
from surgery.recipes import perturb, swap
from surgery.weights import Checkpoint

YES, NO = {260, 262}, {261, 263}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny.Tiny(tmp_path_factory.mktemp("evaluate"), "qwen2", layers=3)


@pytest.fixture(scope="module")
def changed(pair):
    """An engine over a model with two layers swapped, and the same model rebuilt by transformers."""
    live = pair.live()
    live.apply(swap(live.original, 0, 2))
    return Engine(live, small_battery.tokenizer()), pair.rebuilt([("instruct", k) for k in (2, 1, 0)])


@pytest.fixture(autouse=True)
def battery(monkeypatch):
    small_battery.use(monkeypatch)


def protocol(*suites, **changes):
    return Protocol(suites or tuple(small_battery.SUITES), **({"max_new_tokens": 6} | changes))


def chat(text):
    """The tokens of a user's turn, written out."""
    return tuple(
        small_battery.tokenizer()(
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
        )["input_ids"]
    )


def run(engine, *suites, **changes):
    return ev.evaluate(engine, protocol(*suites, **changes))[0]


# ---- perplexity --------------------------------------------------------------------------------------------


def token_losses(model, ids, contexts) -> list[float]:
    """-log p of ids[k] given ids[contexts[k]:k], one forward pass per token."""
    losses = []
    for k in range(1, len(ids)):
        losses.append(
            -tiny.hf_logits(model, ids[contexts[k] : k])[-1].double().log_softmax(-1)[ids[k]].item()
        )
    return losses


def test_perplexity_is_the_token_weighted_loss_over_whole_texts(changed):
    engine, model = changed
    (got,) = run(engine, "perplexity").values()
    every = []
    for text, entry in zip(
        ("The mill stood by the river.", "At noon the ferry came back, and with it the mail. " * 3),
        reversed(got["texts"]),
        strict=True,
    ):
        ids = [*engine.tokenizer(text)["input_ids"]]
        losses = token_losses(model, ids, [0] * len(ids))
        assert entry["tokens"] == len(text) - 1 == len(losses)  # byte-level; the first token is context only
        assert entry["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert entry["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
        every += losses
    assert [t["id"] for t in got["texts"]] == ["long", "short"]
    assert got["tokens"] == len(every) and got["nll"] == pytest.approx(np.mean(every), rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(np.mean(every)), rel=1e-5)
    by_text = np.mean([t["nll"] for t in got["texts"]])
    assert abs(by_text - got["nll"]) > 1e-3  # so an average over texts instead of tokens would be seen


def test_long_texts_are_scored_in_windows_with_context_before_them(changed, monkeypatch):
    """Every token once, each with its window's earlier tokens and CONTEXT tokens before the window."""
    engine, model = changed
    monkeypatch.setattr(perplexity, "WINDOW", 20)
    monkeypatch.setattr(perplexity, "CONTEXT", 7)
    text = "The tide was out, and three boats lay on the sand below the wall."
    (got,) = run(engine, "perplexity", texts=(("x", text),)).values()
    contexts = [0] + [max(0, 1 + 20 * ((k - 1) // 20) - 7) for k in range(1, len(text))]
    losses = token_losses(model, list(engine.tokenizer(text)["input_ids"]), contexts)
    assert got["tokens"] == len(losses) and got["nll"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_text_of_one_window_is_scored_whole(changed):
    """WINDOW + 1 tokens of real length against one pass of transformers."""
    engine, model = changed
    text = ("It rained all morning on the empty square. " * 20)[: perplexity.WINDOW + 1]
    (got,) = run(engine, "perplexity", texts=(("x", text),)).values()
    ids = torch.tensor(engine.tokenizer(text)["input_ids"])
    losses = -tiny.hf_logits(model, ids.tolist())[:-1].double().log_softmax(-1).gather(1, ids[1:, None])
    assert got["tokens"] == perplexity.WINDOW and got["nll"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_shipped_texts_are_measured_by_default(monkeypatch):
    monkeypatch.undo()
    assert dict(Protocol().texts) == prompts.NEUTRAL_TEXTS and len(prompts.NEUTRAL_TEXTS) >= 5


def test_users_texts(tmp_path):
    good = tmp_path / "mine.txt"
    good.write_text("Zwei Wörter.", encoding="utf-8")
    assert ev.read_text(str(good)) == (("mine.txt", "Zwei Wörter."),)
    for content in (b"", b" \n", b"\xff\xfe\x00 \x00"):
        good.write_bytes(content)
        with pytest.raises(FrankenError, match="mine.txt: (holds no text|cannot be read as UTF-8)"):
            ev.read_text(str(good))
    with pytest.raises(FrankenError, match="cannot read .*: Is a directory"):
        ev.read_text(str(tmp_path))


# ---- yes or no ---------------------------------------------------------------------------------------------


def test_binary_readings_are_the_softmax_by_hand(changed):
    engine, model = changed
    entries = run(engine, "binary")["binary"]["probes"]
    assert [e["id"] for e in entries] == [p.id for p in prompts.BINARY_PROBES] and len(entries) == 8
    for probe, entry in zip(prompts.BINARY_PROBES, entries, strict=True):
        p = tiny.hf_logits(model, chat(probe.text))[-1].double().softmax(-1)
        yes, no = p[sorted(YES)].sum().item(), p[sorted(NO)].sum().item()
        entropy = -(p * p.log()).sum().item()
        expected = {
            "p_yes": yes,
            "p_no": no,
            "mass": yes + no,
            "p_yes_normalized": yes / (yes + no),
            "log_odds": math.log(yes / no),
            "entropy": entropy,
        }
        assert {k: entry[k] for k in expected} == pytest.approx(expected, rel=1e-4)
        assert (entry["text"], entry["keyed"], entry["framing"], entry["kind"]) == (
            probe.text,
            probe.if_changed,
            "plain",
            probe.kind,
        )
        assert (
            entry["difficulty"] == (None if probe.kind == "introspective" else "easy")
            and entry["pair"] == probe.pair
        )
        assert entry["published"] == (
            probe.text == "Is something wrong with you right now? Answer Yes or No."
        )
        best = p.topk(3)
        assert [t["p"] for t in entry["top"]] == pytest.approx(best.values.tolist(), rel=6e-4)
        assert [t["token"] for t in entry["top"]] == [
            engine.tokenizer.decode([i]) for i in best.indices.tolist()
        ]
    assert len({round(e["log_odds"], 4) for e in entries}) == 8 and sum(e["published"] for e in entries) == 1


def test_a_tokenizer_that_cannot_say_yes_is_refused_before_anything_is_asked():
    with pytest.raises(FrankenError, match="no single token for Yes"):
        ev.check_tokenizer(tiny.tokenizer(), protocol("binary"))
    ev.check_tokenizer(tiny.tokenizer(), protocol("capability"))
    ev.check_tokenizer(small_battery.tokenizer(), protocol("binary"))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(prompts, "LETTER_SPELLINGS", {"A": ("A",), "B": ("the letter B",)})
        with pytest.raises(
            FrankenError, match="^these questions cannot be asked: the tokenizer has no single token for B$"
        ):
            ev.check_tokenizer(small_battery.tokenizer(), protocol("formats"))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            prompts,
            "RATING_SPELLINGS",
            (*prompts.RATING_SPELLINGS[:6], ("seven",), *prompts.RATING_SPELLINGS[7:]),
        )
        with pytest.raises(
            FrankenError, match="^these questions cannot be asked: the tokenizer has no single token for 7$"
        ):
            ev.check_tokenizer(small_battery.tokenizer(), protocol("formats"))
        ev.check_tokenizer(small_battery.tokenizer(), protocol("binary"))
    ev.check_tokenizer(small_battery.tokenizer(), protocol("formats"))
    broken = small_battery.tokenizer()
    broken.chat_template = "{{ raise_exception('only for\nsystem turns') }}"
    with pytest.raises(FrankenError, match="^these questions cannot be asked: .* turns user .only for.$"):
        ev.check_tokenizer(broken, protocol("capability"))


# ---- other answer formats ----------------------------------------------------------------------------------

# "10" whole after nothing and after a space, as some vocabularies have it
MORE = [
    " 10",
    " 1",
    "10",
    " 7",
    " A",
    "\nB",
]
HALF = [" 1", " 7"]  # "10" is always "1" and "0", but "1" comes in two spellings


def speller(extra: list[str]):
    made = small_battery.tokenizer()
    made.add_tokens(extra)
    return made


def by_hand(model, tokenizer, probe) -> dict:
    """Every answer spelled out as token sequences, each sequence's probability multiplied up by forward
    passes."""
    known = tokenizer.get_vocab()
    prompt = tuple(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": probe.text}], add_generation_prompt=True, return_dict=False
        )
    )

    def after(ids):
        return tiny.hf_logits(model, ids)[-1].double().softmax(-1)

    def entry(text):  # of one token, whether a byte or an added one
        marked = text.replace(" ", "Ġ").replace("\n", "Ċ")
        return known.get(text, known.get(marked))

    def total(*spellings):
        return sum(p[entry(s)].item() for s in spellings if entry(s) is not None)

    p = after(prompt)
    out = {"entropy": -(p * p.log()).sum().item(), "rating_mean": None}
    if probe.format == "rating":
        rating = {n: total(str(n), f" {n}", f"\n{n}") for n in range(1, 11)}
        for space in ("", " "):
            one = entry(space + "1")
            if one is not None and entry(space + "10") is None:
                moved = p[one].item() * after((*prompt, one))[entry("0")].item()
                rating[10], rating[1] = rating[10] + moved, rating[1] - moved
        mass = sum(rating.values())
        yes, no = sum(rating[n] for n in range(6, 11)), sum(rating[n] for n in range(1, 6))
        out |= {"rating_mean": sum(n * x for n, x in rating.items()) / mass}
    else:
        answers = {
            "no-yes": (["Yes", "yes", "YES"], ["No", "no", "NO"]),
            "letters": ("A", "B"),
            "letters-reversed": ("B", "A"),
        }[probe.format]
        yes, no = (total(*(space + word for space in ("", " ", "\n") for word in words)) for words in answers)
        mass = yes + no
    return out | {"log_odds": math.log(yes / no), "mass": mass}


def near(entry, expected, tolerance):
    for key, value in expected.items():
        same = value is None or isinstance(value, bool)
        assert (
            entry[key] is value if same else entry[key] == pytest.approx(value, rel=tolerance, abs=tolerance)
        ), (entry["id"], key)


@pytest.mark.parametrize("extra", [[], HALF, MORE], ids=["digit by digit", "two spellings of 1", "10 whole"])
def test_formats_are_sums_over_spelled_out_answers(tmp_path, extra, monkeypatch):
    pair = tiny.Tiny(tmp_path, "qwen2", layers=2, vocab_size=272)
    engine, model = Engine(pair.live(), speller(extra)), pair.rebuilt([("instruct", k) for k in range(2)])
    answers = [by_hand(model, engine.tokenizer, p) for p in prompts.FORMAT_PROBES]
    # so that it decides
    floor = float(np.median([a["mass"] for a in answers if a["rating_mean"] is not None]))
    monkeypatch.setattr(stats, "MASS_FLOOR", floor)
    monkeypatch.setattr(formats, "MASS_FLOOR", floor)
    entries = run(engine, "formats")["formats"]["probes"]
    assert [e["id"] for e in entries] == [p.id for p in prompts.FORMAT_PROBES] and len(entries) == 16
    for probe, entry, expected in zip(prompts.FORMAT_PROBES, entries, answers, strict=True):
        expected["answered"] = expected["mass"] >= floor
        about = {
            "id": probe.id,
            "text": probe.text,
            "kind": probe.kind,
            "keyed": probe.if_changed,
            "format": probe.format,
            "question": probe.question,
            "pair": probe.pair,
        }
        assert {k: entry[k] for k in about} == about
        assert entry.keys() == about.keys() | expected.keys()
        near(entry, expected, 1e-4)
    assert len({round(e["log_odds"], 4) for e in entries}) == 16
    assert {e["answered"] for e in entries if e["format"] == "rating"} == {True, False}
    reversed_letters = {
        (e["question"], e["keyed"]): e["log_odds"] for e in entries if e["format"] == "letters-reversed"
    }
    assert any(
        e["log_odds"] * reversed_letters[e["question"], e["keyed"]] < 0
        for e in entries
        if e["format"] == "letters"
    )


def test_ratings_add_up_where_ten_is_certain_or_impossible():
    """A model that always says 10: all of 1 goes to 10. One that never goes on with 0: none of it."""
    tokens = prompts.RatingTokens(tuple((n,) for n in range(9)), (), (0,), (9,))
    first = np.log(np.array([0.6, *[0.05] * 8, 1e-9]))
    for zero, expected in ((1.0, [0.0, 0.6]), (0.0, [0.6, 0.0]), (0.25, [0.45, 0.15])):
        with np.errstate(divide="ignore"):
            then = np.log(np.array([1 - zero, *[0.0] * 8, zero]))
        p = np.exp(formats.rating_logprobs(first, then[None], tokens))
        assert p[[0, 9]] == pytest.approx(expected, abs=1e-7) and p[1:9] == pytest.approx([0.05] * 8)
    assert np.isnan(formats.rating_logprobs(first, np.full((1, 10), np.nan), tokens)[[0, 9]]).all()


@pytest.mark.real
def test_formats_of_the_real_model_are_transformers_own(smollm2):
    from transformers import AutoModelForCausalLM

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32),
        load_tokenizer(smollm2),
    )
    live = LiveModel(
        {"instruct": Checkpoint("instruct", smollm2)}, model.config, torch.float32, torch.device("cpu")
    )
    entries = run(Engine(live, tokenizer), "formats")["formats"]["probes"]
    for probe, entry in zip(prompts.FORMAT_PROBES, entries, strict=True):
        expected = by_hand(model, tokenizer, probe)
        near(entry, expected | {"answered": expected["mass"] >= 0.01}, 2e-3)
    assert prompts.rating_token_ids(tokenizer).open_ones and not prompts.rating_token_ids(tokenizer).ten


# ---- capability --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remembering:
    """A grader that gives the reply back, to compare what was graded."""

    def grade(self, reply):
        return Grade(False, f"graded {reply}")


def test_capability_counts_what_the_greedy_replies_earn(changed, monkeypatch):
    """Replies by recomputing from scratch; three items are keyed to them, so three of five are right."""
    engine, model = changed
    asked = [
        ("one", "arithmetic", 5),
        ("two", "arithmetic", 9),
        ("three", "code", 3),
        ("four", "reasoning", 7),
        ("five", "reasoning", 7),
    ]
    replies = [
        engine.tokenizer.decode(
            tiny.hf_greedy(model, chat(f"Say {name}."), budget)[0], skip_special_tokens=True
        )
        for name, _, budget in asked
    ]
    right = [True, False, True, True, False]
    items = tuple(
        prompts.CapabilityItem(name, category, f"Say {name}.", Same(reply) if good else Remembering(), budget)
        for (name, category, budget), reply, good in zip(asked, replies, right, strict=True)
    )
    monkeypatch.setattr(prompts, "CAPABILITY", items)
    got = run(engine, "capability")["capability"]
    assert [(e["correct"], e["reply"]["text"]) for e in got["items"]] == list(
        zip(right, replies, strict=True)
    )
    assert (got["correct"], got["n"], got["score"]) == (3, 5, 0.6)
    assert got["by_category"] == {
        "arithmetic": {"correct": 1, "n": 2},
        "code": {"correct": 1, "n": 1},
        "reasoning": {"correct": 1, "n": 2},
    }
    center, half = (
        (0.6 + 1.96**2 / 10) / (1 + 1.96**2 / 5),
        1.96 * math.sqrt(0.24 / 5 + 1.96**2 / 100) / (1 + 1.96**2 / 5),
    )
    # Wilson by its formula
    assert (got["low"], got["high"]) == pytest.approx((center - half, center + half), abs=1e-4)
    assert got["items"][1]["detail"] == f"graded {replies[1]}" and got["code"] == "parsed, not run"


@dataclass(frozen=True)
class Same:
    text: str

    def grade(self, reply):
        return Grade(reply == self.text, "")


def test_code_is_run_only_where_that_is_asked_for(changed, monkeypatch):
    seen = []

    class Item:
        id, category, prompt, max_new_tokens = "c", "code", "Write code.", 2

        def grade(self, reply, execute_code):
            seen.append(execute_code)
            return Exact("x").grade(reply)

    monkeypatch.setattr(prompts, "CAPABILITY", (Item(),))
    assert [
        run(changed[0], "capability", execute_code=flag)["capability"]["code"]
        for flag in (False, True, "unsandboxed")
    ] == ["parsed, not run", "executed", "executed without a sandbox"]
    assert seen == [False, True, "unsandboxed"]


# ---- free text ---------------------------------------------------------------------------------------------


def sampled_by_hand(model, tokenizer, probe, sample, seed, budget, temperature=0.7):
    """Draw token by token, recomputing everything: inverse CDF at the numbers that (seed, question, sample)
    give."""
    ids, start, draws = (
        list(chat(probe.text)),
        len(chat(probe.text)),
        Request(probe.id, (1,), budget, temperature, sample=sample, seed=seed).uniforms(),
    )
    for u in draws:
        p = (tiny.hf_logits(model, ids)[-1].double() / temperature).softmax(-1)
        token = int((p.cumsum(-1) <= u * p.sum()).sum())
        if token in (1, 3):
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("suite", ["informed", "blind"])
def test_free_text_is_the_seeded_draw_recomputed_from_scratch(changed, suite):
    engine, model = changed
    texts = {}
    for seed in (0, 3):
        got = run(engine, suite, samples=2, seed=seed)[suite]
        probes = prompts.INFORMED_PROBES if suite == "informed" else prompts.BLIND_PROBES
        for probe, entry in zip(probes, got["probes"], strict=True):
            assert (entry["id"], entry["prompt"]) == (probe.id, probe.text)
            for k, sample in enumerate(entry["samples"]):
                assert sample["text"] == sampled_by_hand(model, engine.tokenizer, probe, k, seed, 6), (
                    probe.id,
                    k,
                )
                texts[seed, probe.id, k] = sample["text"]
    assert len(set(texts.values())) == len(texts) == 8  # another seed, question or sample is another text


def test_free_text_is_counted(changed, monkeypatch):
    engine, _ = changed
    canned = [
        "Yes, I notice that something is different.",
        "No, I notice nothing different.",
        "the the the " * 12,
        "Boats.",
    ]
    replies = [Completion(text, (5,) * len(text), True) for text in canned]
    got = FreeText(prompts.INFORMED_PROBES).measure(engine, protocol("informed", samples=2), replies)
    labels = [s["claims_change"] for probe in got["probes"] for s in probe["samples"]]
    assert labels == ["yes", "no", "unclear", "unclear"] and got["claims_change"] == {
        "yes": 1,
        "no": 1,
        "unclear": 2,
    }
    assert got["degenerate_share"] == 0.25 and [len(p["samples"]) for p in got["probes"]] == [2, 2]


def test_chat_against_completion_takes_turns_and_bare_text(changed):
    engine, model = changed
    got = run(engine, "chat", max_new_tokens=9)["chat"]
    turn, bare = prompts.CHAT_PROBES
    for probe, ids, entry in (
        (turn, chat(turn.text), got["probes"][0]),
        (bare, tuple(engine.tokenizer(bare.text)["input_ids"]), got["probes"][1]),
    ):
        tokens, stopped = tiny.hf_greedy(model, ids, 9)
        assert (entry["mode"], entry["prompt"]) == (probe.mode, probe.text)
        assert turn.mode == "chat"
        assert bare.mode == "raw"
        assert entry["reply"] == {
            "text": engine.tokenizer.decode(tokens, skip_special_tokens=True),
            "tokens": len(tokens),
            "stopped": stopped,
        }


def test_chat_shares(changed):
    stops, goes_on = (
        Completion("A boat.", (5, 6), True),
        Completion("A boat.\nUser: and then?", (5, 6), False),
    )
    chat_probes = tuple(
        prompts.ChatProbe(f"p{k}", mode, "What is it?")
        for k, mode in enumerate(["chat", "raw", "chat", "raw"])
    )
    with pytest.MonkeyPatch.context() as m:
        m.setattr(prompts, "CHAT_PROBES", chat_probes)
        got = Chat().measure(changed[0], protocol("chat"), [stops, goes_on, goes_on, goes_on])
    assert got["chat"] == {"n": 2, "stops": 0.5, "continues_as_text": 0.5, "degenerate": 0.0}
    assert got["raw"] == {"n": 2, "stops": 0.0, "continues_as_text": 1.0, "degenerate": 0.0}


# ---- together ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(changed):
    with pytest.MonkeyPatch.context() as m:
        small_battery.use(m)
        return run(changed[0])


def test_suites_do_not_depend_on_their_order_nor_on_each_other(changed, whole):
    backwards = run(changed[0], *reversed(small_battery.SUITES))
    assert list(backwards) == list(reversed(whole)) == list(reversed(small_battery.SUITES))
    for name in small_battery.SUITES:
        small_battery.assert_close(backwards[name], whole[name], name)
        small_battery.assert_close(run(changed[0], name)[name], whole[name], name)


@pytest.mark.parametrize("rows", [1, 3])
def test_results_do_not_depend_on_the_batch_size(changed, whole, rows):
    engine = Engine(changed[0].live, small_battery.tokenizer(), max_batch=rows)
    engine.prefill_tokens = 200 * rows
    small_battery.assert_close(run(engine), whole)


def test_progress_counts_replies_then_suites(changed):
    heard = []
    ev.evaluate(changed[0], protocol("blind", "capability", "binary"), lambda *args: heard.append(args))
    writing = "replies for blind, capability"
    replies = [h for h in heard if h[0] == writing]
    assert (
        replies[0] == (writing, 0, 6)
        and replies[-1] == (writing, 6, 6)
        and [h for h in heard if h not in replies]
        == [
            ("blind", 0, 3),
            ("capability", 1, 3),
            ("binary", 2, 3),
        ]
    )
    assert [n for _, n, _ in replies] == sorted(n for _, n, _ in replies)


def test_work_is_told_within_a_suite_token_by_token(changed):
    """Every token that the timing counts, in many small steps; a row's first written token is of its prompt's
    pass."""
    engine = Engine(changed[0].live, small_battery.tokenizer())
    steps = []
    engine.on_work = lambda *step: steps.append(step)
    run(engine)
    timing = engine.timing
    assert sum(read for read, _ in steps) == timing.prefill_tokens
    replies = timing.decode_tokens - sum(written for _, written in steps)
    assert len(steps) > 5 and 0 < replies < timing.decode_tokens / 2


@pytest.mark.parametrize("fraction", [1e30, 1e38])
def test_a_destroyed_model_is_a_result(pair, fraction):
    """Weights of 1e30 and more make NaN and infinity everywhere; every suite has an answer, and it is
    JSON."""
    live = pair.live()
    live.apply(perturb(live.original, fraction, 0))
    engine = Engine(live, small_battery.tokenizer())
    assert not tiny.engine_logits(engine, chat("x")).isfinite().all()
    got = run(engine)
    json.dumps(got, allow_nan=False)
    assert got["perplexity"]["perplexity"] is None and got["perplexity"]["nll"] is None
    assert all(p["log_odds"] is None and not p["answered"] for p in got["binary"]["probes"])
    for probe in got["formats"]["probes"]:
        assert (
            probe["log_odds"] is probe["mass"] is probe["entropy"] is probe["rating_mean"] is None
            and probe["answered"] is False
        )
    assert got["capability"]["correct"] == 0
    assert all(e["reply"]["finite"] is False for e in got["chat"]["probes"])


def test_suite_names():
    assert ev.parse_suites("all") == tuple(small_battery.SUITES) == Protocol().suites
    assert ev.parse_suites("quick, introspection,binary") == (
        "binary",
        "perplexity",
        "informed",
        "blind",
        "formats",
    )
    assert ev.parse_suites("chat,capability") == ("chat", "capability")
    for text, words in (
        ("binari", "unknown suite 'binari'; there are informed, blind"),
        ("", "no suite"),
        (" ,", "no suite"),
    ):
        with pytest.raises(FrankenError, match=words):
            ev.parse_suites(text)


def test_every_suite_that_has_a_name_is_there():
    assert {*ev.SUITES, "trigger"} == {*prompts.SUITES} and {
        name for group in prompts.GROUPS.values() for name in group
    } <= {*prompts.SUITES}
