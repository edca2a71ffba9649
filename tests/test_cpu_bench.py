"""The CPU benchmark on tiny models: the plain way runs the same model and protocol, and the figures are what
they say."""

import json
import re

import peft
import pytest
import small_battery
import tiny
import torch
from transformers import AutoModelForCausalLM

import prompts
from benchmarks import cpu_bench
from engine.generation import Completion, Request
from franken import LiveModel
from surgery import recipes as r
from surgery.weights import Adapter, Checkpoint

NAMES = ["baseline_instruct", "swap_distant_10_55", "franken_instruct_first_32"]
PROMPT = tiny.random_prompt(3, 17)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu_bench")
    for k, name in enumerate(("instruct", "base")):
        small_battery.checkpoint(folder / name, seed=100 + k)
    return folder


@pytest.fixture
def live(pair):
    sources = {name: Checkpoint(name, pair / name) for name in ("instruct", "base")}
    return LiveModel(sources, tiny.make_config("llama"), torch.float32, torch.device("cpu"))


@pytest.fixture
def engine(live):
    return cpu_bench.OurEngine(live, small_battery.tokenizer())


@pytest.fixture
def go(pair, tmp_path, monkeypatch, capsys):
    """go(*options) -> (exit status, the JSON or None, standard output, standard error) with a battery of a
    dozen questions."""
    small_battery.use(monkeypatch)

    def run(*options):
        code = cpu_bench.main(
            [
                "--base",
                str(pair / "base"),
                "--instruct",
                str(pair / "instruct"),
                "--dtype",
                "float32",
                "--max-new-tokens",
                "4",
                "--output",
                str(tmp_path / "out"),
                *options,
            ]
        )
        out, err = capsys.readouterr()
        written = tmp_path / "out" / "cpu_benchmark.json"
        return code, json.loads(written.read_text()) if written.exists() else None, out, err

    return run


@pytest.mark.parametrize(
    ("recipe", "layers", "outer"),
    [
        (lambda o: o, [("instruct", k) for k in range(6)], "instruct"),
        (lambda o: r.swap(o, 0, 5), [("instruct", k) for k in (5, 1, 2, 3, 4, 0)], "instruct"),
        (
            lambda o: r.splice(o, "base", 3, 6),
            [*(("instruct", k) for k in range(3)), *(("base", k) for k in range(3, 6))],
            "instruct",
        ),
        (lambda o: r.with_outer(r.splice(o, "base", 0, 6), "base"), [("base", k) for k in range(6)], "base"),
    ],
)
def test_the_plain_way_makes_the_same_model(pair, live, recipe, layers, outer):
    states = {name: tiny.read_states(pair / name) for name in ("instruct", "base")}
    state = {k: v for k, v in states[outer].items() if ".layers." not in k}
    for p, (source, k) in enumerate(layers):
        state |= {f"model.layers.{p}.{name}": t for name, t in tiny.layer_state(states[source], k).items()}
    want = tiny.build(live.config, state)
    model, loading = cpu_bench.plain_model(live, recipe(live.original))
    torch.testing.assert_close(model.state_dict(), want.state_dict(), atol=0, rtol=0)
    # equal weights that lie elsewhere in memory may be multiplied by another kernel
    torch.testing.assert_close(
        tiny.hf_logits(model, PROMPT), tiny.hf_logits(want, PROMPT), atol=1e-4, rtol=1e-4
    )
    assert loading > 0


def test_the_plain_way_merges_an_adapter_by_peft(pair, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(pair / "instruct", dtype=torch.float32)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(
        base,
        peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path)
    under = Checkpoint("instruct", pair / "instruct")
    live = LiveModel(
        {"instruct": under, "base": Adapter("base", tmp_path, under)},
        tiny.make_config("llama"),
        torch.float32,
        torch.device("cpu"),
    )
    model, _ = cpu_bench.plain_model(live, r.splice(live.original, "base", 2, 5))
    live.apply(r.splice(live.original, "base", 2, 5))
    got = tiny.hf_logits(model, PROMPT)
    torch.testing.assert_close(
        got, tiny.engine_logits(cpu_bench.OurEngine(live, tiny.tokenizer()), PROMPT), atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(
        got,
        tiny.hf_logits(AutoModelForCausalLM.from_pretrained(pair / "instruct", dtype=torch.float32), PROMPT),
        atol=0.1,
    )


def test_one_by_one_answers_like_the_engine_and_like_full_recomputation(engine):
    model, _ = cpu_bench.plain_model(engine.live, engine.live.original)
    plain = cpu_bench.PlainEngine(model, engine.tokenizer, engine.stop_ids)
    asked = [tiny.random_prompt(k, 5 + 3 * k) for k in range(4)]
    torch.testing.assert_close(
        plain.next_token_logprobs(asked), engine.next_token_logprobs(asked), atol=1e-4, rtol=1e-4
    )
    scored = [(ids[:2], ids[2:]) for ids in asked]
    for got, want in zip(plain.loglikelihood(scored), engine.loglikelihood(scored), strict=True):
        assert got == pytest.approx(want, abs=1e-4)
    requests = [Request(str(k), ids, 12) for k, ids in enumerate(asked)] + [
        Request("sampled", PROMPT, 12, 0.7)
    ]
    answers = plain.complete(requests)
    for request, a in zip(requests[:4], answers, strict=False):
        assert (list(a.token_ids), a.stopped) == tiny.hf_greedy(
            model, request.prompt_ids, 12, engine.stop_ids
        )
    drawn = answers[-1]
    assert not set(drawn.token_ids) & set(engine.stop_ids) and (drawn.stopped or len(drawn.token_ids) == 12)
    assert plain.tokens() == sum(len(a.token_ids) + a.stopped for a in answers)


def test_a_run_compares_every_experiment(go, pair, tmp_path):
    code, found, out, err = go("--experiments", *NAMES)
    assert code == 0, err
    assert [row["experiment"] for row in found["experiments"]] == NAMES
    for row in found["experiments"]:
        a, b = row["ours"], row["plain"]
        assert (
            row["greedy"] == {"equal": 4, "n": 4, "widest_gap": None} and a["capability"] == b["capability"]
        )
        assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-4)
        assert row["ratio"] == pytest.approx(b["seconds"] / a["seconds"])
        assert a["seconds"] == pytest.approx(sum(a["parts"].values())) and set(a["parts"]) == {
            "apply",
            "fingerprint",
            "protocol",
        }
        assert set(b["parts"]) == {"load", "protocol"} and set(a["phases"]) == {
            "replies",
            *small_battery.SUITES,
        }
        assert 0 < a["tokens"] <= 4 * 6 + 6 * 4
        assert a["seconds_per_token"] == pytest.approx(a["phases"]["replies"] / a["tokens"])
    assert found["median_ratio"] == sorted(row["ratio"] for row in found["experiments"])[1]
    assert found["swap"]["share"] == pytest.approx(
        found["swap"]["apply_seconds"] / found["swap"]["reload_seconds"]
    )
    table = (tmp_path / "out" / "cpu_benchmark.md").read_text()
    assert table == out[:-1]
    assert len(re.findall(r"^\| \w+ \|.*\*\*[\d.]+\*\*.*\| 4 of 4 \|$", table, re.M)) == 3
    assert "Quick check" not in table
    assert found["about"]["dtype"] == "float32"
    assert found["about"]["threads"] == torch.get_num_threads()
    assert f"torch {torch.__version__}" in table
    assert str(pair) not in json.dumps(found) + table


def test_another_model_is_noticed(go, monkeypatch):
    """If the plain way forgets its surgery, greedy replies differ in float32 and the exit status says so."""
    whole = cpu_bench.plain_model
    monkeypatch.setattr(cpu_bench, "plain_model", lambda live, recipe: whole(live, live.original))
    code, found, _, err = go("--experiments", "baseline_instruct", "franken_instruct_first_32")
    assert code == 1 and err.splitlines()[-1].startswith(
        "cpu_bench.py: greedy replies differ in float32 in franken_instruct_first_32:"
    )
    base, changed = (row["greedy"] for row in found["experiments"])
    assert base["equal"] == 4
    assert changed["equal"] < 4
    assert changed["widest_gap"] > 0


def test_the_gap_is_that_of_the_first_tokens_that_differ(engine, monkeypatch):
    small_battery.use(monkeypatch)
    item = prompts.CAPABILITY[0].id
    engine.requests = [Request(item, PROMPT, 3), Request("free", PROMPT, 3, 0.7)]
    engine.answers = [Completion("abc", (70, 71, 72), False), Completion("x", (9,), True)]
    plain = cpu_bench.PlainEngine(None, engine.tokenizer, engine.stop_ids)
    recipe = r.swap(engine.live.original, 1, 4)
    for answer, token in (
        (Completion("abd", (70, 71, 73), False), 73),
        (Completion("ab", (70, 71), True), engine.stop_ids[0]),
    ):
        plain.answers = [answer, Completion("y", (10,), True)]
        got = cpu_bench.agreement(engine, plain, recipe)
        engine.live.apply(recipe)
        row = tiny.engine_logits(engine, (*PROMPT, 70, 71))[-1]
        engine.live.apply(engine.live.original)
        assert (got["equal"], got["n"]) == (0, 1) and got["widest_gap"] == pytest.approx(
            abs(float(row[72] - row[token])), abs=1e-4
        )
    assert engine.live.recipe == engine.live.original


def test_quick_asks_every_fourth_question_and_says_so(go, monkeypatch):
    chat, raw = prompts.CHAT_PROBES
    monkeypatch.setattr(prompts, "CHAT_PROBES", (chat, chat, chat, chat, raw))
    code, found, out, _ = go("--quick", "--experiments", "swap_distant_10_55")
    assert code == 0
    assert found["about"]["quick"]
    assert "**Quick check: every 4th question only" in out
    assert (
        found["experiments"][0]["greedy"]["n"]
        == len(small_battery.BATTERY["CAPABILITY"][::4])
        == len(prompts.CAPABILITY)
    )
    assert (
        len(prompts.BINARY_PROBES) == len(small_battery.BATTERY["BINARY_PROBES"]) // 4
        and (chat, raw) == prompts.CHAT_PROBES
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blend_linear", "blend_linear: the plain way here only moves and replaces whole layers"),
        ("keep_every_2nd", "keep_every_2nd: the plain way here only"),
        ("swap_distant", "unknown experiment 'swap_distant'"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(go, name, message):
    code, found, out, err = go("--experiments", name)
    assert code == 1
    assert found is None
    assert not out
    assert err.startswith(f"cpu_bench.py: {message}") and err.count("\n") == 1
