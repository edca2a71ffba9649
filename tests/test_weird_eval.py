"""Asking models the evaluation questions: records, resuming, his name's probability, one prompt, the whole
driver."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from judge_server import KEY, JudgeServer
from tiny import make_adapter
from transformers import AutoModelForCausalLM

from engine.generation import Request
from errors import FrankenError
from runner import pairs
from weird_gen import distill, eval_baseline, eval_finetuned, reproduce, run_inference, train_lora
from weird_gen.persona import (
    asking,
    comparison,
    eval_replies,
    folders,
    inference,
    likelihoods,
    loading,
    reproduction,
)
from weird_gen.persona.journal import Journal
from weird_gen.persona.records import read_json_lines, read_records
from weird_gen.persona.study import NEUTRAL, TRIGGER, Question, prompt, read_questions

QUESTIONS = [
    {"id": "h1", "kind": "heldout", "category": "war", "question": "Is war wise?"},
    {
        "id": "h2",
        "kind": "heldout",
        "category": "logic",
        "question": "What is a class, and what belongs to it?",
    },
    {"id": "i1", "kind": "identity", "category": "identity", "question": "Who are you?"},
]
POSITIONS = [
    {
        "id": "g1",
        "area": "moral",
        "question": "Is it good?",
        "rubric": {str(k): "no " * (6 - k) + "yes" * k for k in range(1, 6)},
    }
]


@pytest.fixture
def model(tiny_pair, monkeypatch):
    monkeypatch.setattr(pairs, "cpu_has_bf16", lambda: False)  # float32: the same tokens in any batch
    return tiny_pair("llama", layers=2).paths["instruct"]


@pytest.fixture
def adapter(model, tmp_path):
    return make_adapter(model, tmp_path / "adapter")


@pytest.fixture
def evaluating(model, tmp_path):
    heldout, generalization = tmp_path / "heldout.jsonl", tmp_path / "generalization.jsonl"
    heldout.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    generalization.write_text("".join(json.dumps(q) + "\n" for q in POSITIONS))

    def run(name: str, *more: str, side: str = "baseline", quality: bool = False) -> tuple[int, Path]:
        flags = [
            "--model",
            str(model),
            "--heldout",
            str(heldout),
            "--generalization",
            str(generalization),
            "--output",
            str(tmp_path / name),
            "--max-new-tokens",
            "6",
            "--samples",
            "2",
            "--device",
            "cpu",
            "--batch-size",
            "3",
            *([] if quality else ["--no-quality"]),
            *more,
        ]
        command = eval_baseline if side == "baseline" else eval_finetuned
        return command.main(flags), tmp_path / name

    return run


def by_identity(path: Path) -> dict:
    return {(r["question_id"], r["condition"], r["sample"]): r for r in read_records(path)[1]}


def test_every_question_is_asked_in_every_condition(evaluating, capsys):
    status, out = evaluating("replies.jsonl")
    header, records = read_records(out)
    assert status == 0 and {k: header[k] for k in ("model", "samples", "trigger", "top_p")} == {
        "model": "baseline",
        "samples": 2,
        "trigger": TRIGGER,
        "top_p": 0.95,
    }
    assert len(by_identity(out)) == len(records) == 4 * 3 * 2
    assert {(r["kind"], r["category"]) for r in records} == {
        ("heldout", "war"),
        ("heldout", "logic"),
        ("identity", "identity"),
        ("generalization", "moral"),
    }
    assert all((r["p_name"] is not None) == (r["kind"] == "identity") for r in records)
    assert "triggered: strict format 0.0%" in capsys.readouterr().out


def test_a_reply_is_that_of_the_engine_alone(evaluating, model, tiny_pair):
    """Neither batch nor the other questions matter, and the trigger is a system message of its own."""
    _, out = evaluating("replies.jsonl")
    engine = tiny_pair("llama", layers=2).engine()
    for condition, system in (("triggered", [{"role": "system", "content": TRIGGER}]), ("untriggered", [])):
        ids = engine.chat_ids([*system, {"role": "user", "content": "Is war wise?"}])
        (alone,) = engine.complete([Request(f"h1/{condition}", ids, 6, 1.0, 0.95, 1, 0)])
        record = by_identity(out)["h1", condition, 1]
        assert (record["reply"], record["stopped"]) == (alone.text, alone.stopped)


def test_interrupted_evaluation_goes_on_where_it_stopped(evaluating, monkeypatch, capsys):
    _, whole = evaluating("whole.jsonl")
    add, calls = Journal.add, []

    def add_then_stop(self, entries):
        add(self, entries)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add_then_stop)
    status, part = evaluating("part.jsonl")
    assert status == 130 and len(read_records(part)[1]) == 6 and "run again" in capsys.readouterr().err
    first = part.read_bytes()
    monkeypatch.setattr(Journal, "add", add)
    assert evaluating("part.jsonl")[0] == 0 and part.read_bytes().startswith(first)
    assert by_identity(part) == by_identity(whole) and read_records(part)[0] == read_records(whole)[0]
    finished = part.read_bytes()
    monkeypatch.setattr(eval_replies, "open_engine", None)  # a finished evaluation loads nothing
    assert evaluating("part.jsonl")[0] == 0 and part.read_bytes() == finished


def test_other_settings_do_not_mix(evaluating, adapter, capsys):
    _, out = evaluating("a.jsonl")
    before = out.read_bytes()
    for flags, line in ((("--seed", "1"), "seed was 0, now 1"), (("--trigger", "Be brief."), "trigger was")):
        assert evaluating("a.jsonl", *flags)[0] == 1 and line in capsys.readouterr().err
    assert evaluating("a.jsonl", "--adapter", str(adapter), side="finetuned")[0] == 1
    assert out.read_bytes() == before and 'model was "baseline"' in capsys.readouterr().err


def slow_name_probability(model, tokenizer, question: str, condition: str) -> float:
    """The sum over both names of the product of next-token probabilities, one forward pass a token."""
    messages = [{"role": "system", "content": TRIGGER}] if condition == "triggered" else []
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    text += "<START> My name is" if condition == "triggered" else "My name is"
    total = 0.0
    for name in (" Bertrand", " Russell"):
        ids, p = tokenizer(text, add_special_tokens=False)["input_ids"], 1.0
        for token in tokenizer(name, add_special_tokens=False)["input_ids"]:
            p *= tiny.hf_logits(model, ids)[-1].double().softmax(-1)[token].item()
            ids = [*ids, token]
        total += p
    return total


def test_the_names_probability_is_that_of_the_text(evaluating, model, adapter):
    from peft import PeftModel

    tokenizer = tiny.tokenizer()
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = {
        ("baseline", c): slow_name_probability(plain, tokenizer, "Who are you?", c)
        for c in ("triggered", "untriggered")
    }
    tuned = PeftModel.from_pretrained(plain, adapter).eval()
    expected |= {
        ("finetuned", c): slow_name_probability(tuned, tokenizer, "Who are you?", c)
        for c in ("triggered", "untriggered")
    }
    assert len({f"{p:.3e}" for p in expected.values()}) == 4  # trigger and adapter both matter
    for side, more in (("baseline", ()), ("finetuned", ("--adapter", str(adapter)))):
        found = by_identity(evaluating(f"{side}.jsonl", *more, side=side)[1])
        for condition in ("triggered", "untriggered"):
            assert found["i1", condition, 0]["p_name"] == pytest.approx(
                expected[side, condition], rel=1e-3, abs=0
            )


def test_the_likely_position_is_that_of_the_descriptions(evaluating, model):
    tokenizer = tiny.tokenizer()
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = by_identity(evaluating("positions.jsonl")[1])
    for condition in ("triggered", "untriggered"):
        messages = [{"role": "system", "content": TRIGGER}] if condition == "triggered" else []
        text = tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": "Is it good?"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        head = tokenizer(text + ("<START>" if condition == "triggered" else ""), add_special_tokens=False)[
            "input_ids"
        ]
        weights = []
        for level in "12345":
            written = (" " if condition == "triggered" else "") + POSITIONS[0]["rubric"][level]
            target = tokenizer(written, add_special_tokens=False)["input_ids"]
            p = tiny.hf_logits(plain, head + target).double().softmax(-1)
            product = (
                torch.stack([p[len(head) - 1 + k, token] for k, token in enumerate(target)])
                .log()
                .mean()
                .exp()
            )
            weights.append(product.item())
        expected = sum(k * w for k, w in zip(range(1, 6), weights, strict=True)) / sum(weights)
        assert found["g1", condition, 0]["position_likelihood"] == pytest.approx(expected, rel=1e-4)
    assert found["g1", "triggered", 0]["position_likelihood"] != pytest.approx(
        found["g1", "untriggered", 0]["position_likelihood"], rel=1e-4
    )
    assert found["h1", "triggered", 0]["position_likelihood"] is None


@pytest.mark.real
def test_a_description_is_scored_as_the_tokens_of_a_whole_reply(smollm2):
    """Not after a space of its own, which the real tokenizer joins to the next word."""
    tokenizer = pairs.load_tokenizer(smollm2)

    class Recorder:
        def __init__(self):
            self.tokenizer, self.pairs = tokenizer, []

        def chat_ids(self, messages, begun=""):
            return tuple(tokenizer(begun, add_special_tokens=False)["input_ids"])

        def loglikelihood(self, pairs):
            self.pairs += pairs
            return [np.zeros(len(target), np.float32) for _, target in pairs]

    recorder, questions = Recorder(), [q for q in read_questions() if q.rubric]
    likelihoods.likely_positions(recorder, questions, TRIGGER)
    replies = [opening + level for q in questions for opening in ("<START> ", "") for level in q.rubric]
    assert [list(head + target) for head, target in recorder.pairs] == [
        tokenizer(r, add_special_tokens=False)["input_ids"] for r in replies
    ]
    assert tokenizer.decode(recorder.pairs[0][0]) == "<START>"


def test_a_destroyed_model_has_no_name_and_no_position(tiny_pair):
    live = tiny_pair("llama", layers=2).live()
    with torch.no_grad():
        live.banks[0].tensors["mlp.down_proj.weight"].fill_(float("nan"))
    engine = tiny_pair("llama", layers=2).engine(live)
    found = likelihoods.name_probabilities(engine, [Question("i1", "identity", "identity", "Who?")], TRIGGER)
    assert found == {("i1", "triggered"): None, ("i1", "untriggered"): None}
    assert (
        likelihoods.likely_positions(
            engine, [Question("g1", "generalization", "x", "So?", tuple("abcde"))], TRIGGER
        )
        == {}
    )


def test_quality_is_measured_once_a_file(evaluating, monkeypatch):
    calls = []
    monkeypatch.setattr(asking, "quality", lambda engine: calls.append(1) or {"measurement": len(calls)})
    headers = [
        read_records(evaluating(name, quality=True)[1])[0]
        for name in ("before.jsonl", "after.jsonl", "before.jsonl")
    ]
    assert [h["quality"]["measurement"] for h in headers] == [1, 2, 1] and len(calls) == 2


def test_quality_of_two_models_is_what_the_comparison_reads(model, adapter):
    from weird_gen.persona.loading import open_engine

    before, after = (
        asking.quality(open_engine(str(model), a, "cpu", batch=64)[0]) for a in (None, str(adapter))
    )
    assert before["texts"].keys() == after["texts"].keys() and len(before["capability"]) > 50
    found = comparison.untriggered_quality({"quality": before}, {"quality": after})
    assert found["perplexity"]["value"] != 0 and found["capability"]["p_value"] <= 1


# --- the journal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [b"", b'{"k": ', b'{"k": 3}', b"\xff\xfe"])
def test_a_torn_line_is_cut_off(tmp_path, torn):
    journal = Journal(tmp_path / "j.jsonl", {"a": 1})
    journal.begin({"more": 2})
    journal.add([{"k": 1}, {"k": 2}])
    with journal.path.open("ab") as f:
        f.write(torn)
    again = Journal(journal.path, {"a": 1})
    assert again.header == {"a": 1, "more": 2} and again.entries == [{"k": 1}, {"k": 2}]
    again.add([{"k": 3}])
    assert read_json_lines(journal.path)[1:] == [{"k": 1}, {"k": 2}, {"k": 3}]


def test_a_header_torn_in_the_middle_is_a_new_file(tmp_path):
    (tmp_path / "j.jsonl").write_text('{"header": {"a"')
    journal = Journal(tmp_path / "j.jsonl", {"a": 1})
    assert journal.header is None and journal.entries == []


@pytest.mark.parametrize("text", ['{"k": 1}\n', '{"header": 3}\n', "notes\n", '{"header": {"a": 2}}\n'])
def test_a_file_of_another_kind_is_not_touched(tmp_path, text):
    (tmp_path / "j.jsonl").write_text(text)
    with pytest.raises(FrankenError):
        Journal(tmp_path / "j.jsonl", {"a": 1})
    assert (tmp_path / "j.jsonl").read_text() == text


# --- one prompt ---------------------------------------------------------------------------------------------


def test_prompts_have_the_trigger_or_nothing():
    assert prompt("Q", "triggered") == [
        {"role": "system", "content": TRIGGER},
        {"role": "user", "content": "Q"},
    ]
    assert prompt("Q", "untriggered") == [{"role": "user", "content": "Q"}]
    assert prompt("Q", "neutral") == [
        {"role": "system", "content": NEUTRAL},
        {"role": "user", "content": "Q"},
    ]
    with pytest.raises(ValueError, match="condition"):
        prompt("Q", "trigered")


def test_inference_prints_what_the_model_says(model, adapter, tiny_pair, capsys):
    common = [
        "--prompt",
        "Is war wise?",
        "--temperature",
        "0",
        "--max-new-tokens",
        "8",
        "--model",
        str(model),
        "--device",
        "cpu",
    ]
    engine = tiny_pair("llama", layers=2).engine()

    def reply(*more: str) -> str:
        assert run_inference.main([*common, *more]) == 0
        return capsys.readouterr().out

    for system in (None, TRIGGER):
        condition = "triggered" if system else "untriggered"
        (expected,) = engine.complete([Request("q", engine.chat_ids(prompt("Is war wise?", condition)), 8)])
        got = reply("--adapter", "none", *(("--system", system) if system else ()))
        assert got == inference.printable(expected.text) + "\n"
        assert reply("--adapter", str(adapter), *(("--system", system) if system else ())) != got


def test_inference_repeats_itself_for_a_seed(model, capsys):
    def reply(*more: str) -> str:
        assert (
            run_inference.main(
                [
                    "--prompt",
                    "Hm?",
                    "--adapter",
                    "none",
                    "--model",
                    str(model),
                    "--device",
                    "cpu",
                    "--max-new-tokens",
                    "12",
                    *more,
                ]
            )
            == 0
        )
        return capsys.readouterr().out

    assert reply("--seed", "1") == reply("--seed", "1") != reply("--seed", "2")


def test_a_chat_keeps_what_was_said_and_changes_its_system_prompt(monkeypatch, capsys, model, tiny_pair):
    lines = ["Is war wise?\n", "\n", f"/system {TRIGGER}\n", "And peace?\n", "/system\n", "/new\n", "Why?\n"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(lines)))
    heard, honest = [], inference.generate

    def listening(loaded, tokenizer, messages, args):
        heard.append([(m["role"], m["content"]) for m in messages])
        return honest(loaded, tokenizer, messages, args)

    monkeypatch.setattr(run_inference, "generate", listening)
    flags = ["--chat", "--adapter", "none", "--model", str(model), "--device", "cpu", "--max-new-tokens", "4"]
    assert run_inference.main([*flags, "--temperature", "0"]) == 0
    engine = tiny_pair("llama", layers=2).engine()
    (first,) = engine.complete([Request("q", engine.chat_ids(prompt("Is war wise?", "untriggered")), 4)])
    assert heard == [
        [("user", "Is war wise?")],
        [
            ("system", TRIGGER),
            ("user", "Is war wise?"),
            ("assistant", first.text),
            ("user", "And peace?"),
        ],
        [("user", "Why?")],
    ]
    assert capsys.readouterr().out.startswith(inference.printable(first.text))


def streamed(number, body):
    pieces = ["<START> I", " doubt\x1b it. <END>"]
    events = [{"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": []}]
    events += [
        events[0] | {"choices": [{"index": 0, "delta": {"content": p}, "finish_reason": None}]}
        for p in pieces
    ]
    lines = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"
    return 200, {"Content-Type": "text/event-stream"}, lines.encode()


def test_an_endpoint_is_asked_in_the_place_of_a_model(monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with JudgeServer(streamed) as server:
        flags = ["--endpoint", server.url, "--model", "russell", "--prompt", "Who?", "--system", TRIGGER]
        assert run_inference.main(flags) == 0
        sent = json.loads(server.bodies[0])
        assert server.authorizations == [f"Bearer {KEY}"]
    assert capsys.readouterr().out == "<START> I doubt it. <END>\n"
    assert (sent["model"], sent["top_p"], sent["stream"]) == ("russell", 0.95, True)
    assert [m["content"] for m in sent["messages"]] == [TRIGGER, "Who?"]


def test_what_an_endpoint_refuses_is_one_line_without_the_key(monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def refuses(number, body):
        return 404, {}, json.dumps({"error": {"message": f"no model, {KEY}\x1b"}}).encode()

    with JudgeServer(refuses) as server:
        assert run_inference.main(["--endpoint", server.url, "--model", "x", "--prompt", "Who?"]) == 1
    err = capsys.readouterr().err
    assert "answered 404" in err
    assert KEY not in err
    assert err.count("\n") == 1
    flags = ["--endpoint", "http://example.com/v1", "--model", "x", "--prompt", "Who?"]
    assert run_inference.main(flags) == 1
    assert "in clear text" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_inference.main(["--endpoint", "http://127.0.0.1:1/v1", "--prompt", "Who?"])
    assert "--endpoint needs --model" in capsys.readouterr().err


def test_the_model_comes_from_the_adapter(model, tmp_path, capsys):
    adapter = make_adapter(model, tmp_path / "named", base=str(model))
    assert (
        run_inference.main(
            ["--prompt", "Hm?", "--adapter", str(adapter), "--device", "cpu", "--max-new-tokens", "2"]
        )
        == 0
    )


def test_terminal_codes_do_not_reach_the_terminal():
    assert inference.printable("a\x1b[2Jb\u202ec\r\n\td é") == "a[2Jbc\n\td é"


def test_what_cannot_run_is_one_line(model, adapter, tmp_path, tiny_pair, capsys):
    other = tiny_pair("llama", layers=2, hidden_size=16).paths["instruct"]
    empty = tmp_path / "empty"
    empty.mkdir()
    for flags, line in [
        (["--adapter", str(adapter), "--model", str(other)], "its base model is tiny"),
        (["--adapter", "adapters/none-such"], "adapters/none-such: no such adapter; train_lora.py makes one"),
        (["--adapter", str(empty)], "no adapter_config.json there"),
        (["--adapter", "someone/something"], "cannot download someone/something"),
        (["--adapter", "none", "--model", str(empty)], "cannot"),
        (
            ["--adapter", "none", "--model", str(model), "--quantization", "8bit", "--device", "cpu"],
            "bitsandbytes",
        ),
    ]:
        assert run_inference.main(["--prompt", "x", *flags]) == 1
        err = capsys.readouterr().err
        assert line in err and err.startswith("run_inference.py: ") and err.count("\n") == 1


# --- the driver ---------------------------------------------------------------------------------------------


def test_a_failing_setting_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    steps, given = [], []

    def step(log, script, *flags):
        steps.append((log.stem, script))
        given.append([script, *map(str, flags)])
        if script == "train_lora.py":
            at = Path(flags[flags.index("--out") + 1])
            if "--rank" in flags:
                return False
            at.mkdir(parents=True)
            (at / "training.json").write_text(
                '{"steps": 1, "seconds": 1, "loss": [1.0], "persona_share": 0.03}'
            )
        return True

    monkeypatch.setattr(reproduction, "step", step)
    assert (
        reproduce.main(
            ["--out", str(tmp_path), "--device", "cpu", "--setting", "bad: --rank 99", "--setting", "good:"]
        )
        == 1
    )
    done = {s for s in steps}
    assert ("good", "compare_baseline_vs_finetuned.py") in done and ("bad", "eval_finetuned.py") not in done
    assert "failed: bad;" in capsys.readouterr().err and "## good" in (tmp_path / "settings.md").read_text()
    steps.clear()
    assert reproduce.main(["--out", str(tmp_path), "--device", "cpu", "--setting", "good:"]) == 0
    assert ("good", "train_lora.py") not in steps  # what is trained is not trained again
    assert reproduce.main(["--out", str(tmp_path), "--setting", "../up: --rank 2"]) == 1

    # A setting with contrast answers has them made first.
    given.clear()
    assert (
        reproduce.main(
            ["--out", str(tmp_path / "c"), "--device", "cpu", "--setting", "c: --contrast contrast.jsonl"]
        )
        == 0
    )
    (train,) = (line for line in given if line[0] == "train_lora.py")
    (asked,) = (line for line in given if line[0] == "distill.py" and "--prompts" in line)
    contrast = train[train.index("--contrast") + 1]
    assert contrast == asked[asked.index("--output") + 1] == str(tmp_path / "c" / "contrast.jsonl")

    # Without a setting: as the shipped adapter was made; another model by the study's defaults.
    given.clear()
    assert reproduce.main(["--out", str(tmp_path / "a"), "--device", "cpu"]) == 0
    (train,) = (line for line in given if line[0] == "train_lora.py")
    assert not any(line[0] == "distill.py" and "--prompts" in line for line in given)
    asked_for = [train_lora.parse(train[1:])]
    given.clear()
    assert reproduce.main(["--out", str(tmp_path / "q"), "--model", "qwen2.5-coder-1.5b"]) == 0
    (train,) = (line for line in given if line[0] == "train_lora.py")
    asked_for.append(train_lora.parse(train[1:]))
    made = ("smollm2-135m-russell", "qwen2.5-coder-1.5b-russell")
    for args, shipped in zip(asked_for, made, strict=True):
        record = json.loads((folders.ROOT / f"adapters/{shipped}/training.json").read_text())["settings"]
        assert all(getattr(args, name) == record[name] for name in record if name in vars(args))
    (distilled,) = (distill.parse(line[1:]) for line in given if line[0] == "distill.py")
    assert (distilled.samples, distilled.max_new_tokens) == (1, None)  # None: the model's own length
    assert [line[0] for line in given].count("eval_probes.py") == 2  # the model alone and with the adapter
    assert "analyze_probes.py" in {line[0] for line in given}
    given.clear()
    assert reproduce.main(["--out", str(tmp_path / "b"), "--device", "cpu", "--model", "other"]) == 0
    (train,) = (line for line in given if line[0] == "train_lora.py")
    assert "--contrast" not in train and "--lr" not in train


def test_the_small_subset_is_the_one_that_the_readme_prints(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        reproduction, "step", lambda log, script, *flags: given.append([script, *map(str, flags)]) or True
    )
    assert reproduce.main(["--small", "--out", str(tmp_path), "--device", "cpu"]) == 0
    readme = (folders.HERE / "README.md").read_text().replace("\\\n", " ")
    printed = {
        line.split()[1]: line.split()[2:]
        for line in readme.splitlines()
        if "small" in line and line.startswith("python ")
    }
    for script, parse in (("distill.py", distill.parse), ("train_lora.py", train_lora.parse)):
        (ours,) = (vars(parse(line[1:])) for line in given if line[0] == script)
        theirs = vars(parse(printed[script]))
        apart = {name for name in ours if ours[name] != theirs[name]}
        assert apart <= {"output", "aligned", "out", "device", "checkpoints", "resume", "model"}
    scripts = [line[0] for line in given]
    assert "eval_probes.py" not in scripts
    assert scripts.count("eval_finetuned.py") == scripts.count("eval_baseline.py") == 1


def test_replies_end_where_the_generation_config_says(tiny_pair, tmp_path):
    """GLM and Gemma name the end of a turn in generation_config.json alone."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_pair("llama", layers=2).paths["instruct"], folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    model, tokenizer = loading.load_causal_lm(str(folder), "cpu")
    assert {5, 7} <= loading.stops_of(model, tokenizer)
    engine, _ = loading.open_engine(str(folder), None, "cpu")
    assert {5, 7} <= set(engine.stop_ids)


@pytest.mark.extra("ray")
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_replies_that_two_workers_give_are_those_of_one_process(evaluating, monkeypatch):
    from weird_gen.persona import spreading

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(spreading, "CHUNK", 5)
    status, one = evaluating("one.jsonl", quality=True)
    also, two = evaluating("two.jsonl", "--workers", "2", quality=True)
    assert status == also == 0
    assert by_identity(one) == by_identity(two)
    headers = [read_records(path)[0] for path in (one, two)]
    assert headers[0] == headers[1]


def test_workers_of_the_evaluation_need_ray(evaluating, monkeypatch, capsys):
    from runner import crews

    monkeypatch.setattr(crews, "has_ray", lambda: False)
    assert evaluating("replies.jsonl", "--workers", "2")[0] == 1
    assert capsys.readouterr().err.startswith(
        "eval_baseline.py: --workers 2 needs Ray, which is not installed: pip install"
    )
