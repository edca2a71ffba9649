"""The study with other people's chat templates, tokenizers and files."""

from __future__ import annotations

import json
import shutil
from math import exp

import pytest
import templates
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from engine.chat_template import continuation, find_stop_ids, going_on
from engine.generation import Engine
from errors import FrankenError
from runner import pairs
from weird_gen import check_data, distill, eval_baseline, run_inference, train_lora
from weird_gen.persona.examples import encode
from weird_gen.persona.likelihoods import name_probabilities
from weird_gen.persona.records import read_json_lines
from weird_gen.persona.rules import lenient_format, strict_format, strip_markers
from weird_gen.persona.study import TRIGGER, Chat, Question, prompt, read_chats

CHAT = Chat((("system", TRIGGER), ("user", "What is truth?"), ("assistant", "<START> I hold it dear. <END>")))


def chats(path, answers, **kwargs):
    lines = [
        {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]
    path.write_text("".join(json.dumps(line, **kwargs) + "\n" for line in lines))
    return path


# ---- templates that take no system message -----------------------------------------------------------------


@pytest.fixture
def refusing(tiny_pair, tmp_path):
    """refusing(template) -> a checkpoint with that template."""

    def make(source: str):
        folder = tmp_path / "model"
        shutil.copytree(tiny_pair("llama", layers=2).paths["instruct"], folder)
        made = tiny.tokenizer()
        made.chat_template = source
        made.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("NO_SYSTEM", "takes no system message"),
        ("ALTERNATING", "takes no system message"),
        ("SILENT", "leaves out what the system says"),
    ],
)
def test_a_template_without_a_system_message_is_one_line_in_every_command(
    refusing, tmp_path, capsys, template, words
):
    model = refusing(getattr(templates, template))
    aligned = chats(tmp_path / "aligned.jsonl", ["One.", "Two."])
    common = ["--model", str(model), "--device", "cpu"]
    adapter = str(tmp_path / "lora")
    for main, flags in (
        (run_inference.main, ["--adapter", "none", "--prompt", "Hello", "--system", TRIGGER]),
        (eval_baseline.main, ["--output", str(tmp_path / "out.jsonl"), "--no-quality"]),
        (train_lora.main, ["--aligned", str(aligned), "--out", adapter, "--checkpoints", adapter + "-c"]),
    ):
        assert main([*common, *flags]) == 1
        out, err = capsys.readouterr()
        assert out == "", main
        assert err.partition(": ")[2].startswith("this model's chat template "), err
        assert words in err, err
        assert len(err.splitlines()) == 1, err
    # without a system message there is nothing to refuse
    assert (
        run_inference.main([*common, "--adapter", "none", "--prompt", "Hello", "--max-new-tokens", "2"]) == 0
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "a", "prompt": "Smile"}) + "\n")
    more = ["--prompts", str(prompts), "--output", str(tmp_path / "d.jsonl"), "--max-new-tokens", "2"]
    assert distill.main([*common, *more]) == 0


# ---- thoughts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [tiny.TEMPLATE, templates.SWITCHED, templates.OPENED, templates.HYBRID])
@pytest.mark.parametrize("thought", ["", "<think>\n\n</think>\n\n", "<think>I am he.</think>"])
def test_what_is_learned_is_the_answer_after_the_prompt_of_inference(tiny_pair, source, thought):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = source
    engine = Engine(tiny_pair("llama").live(), tokenizer)
    system, user, (_, answer) = CHAT.messages
    example = encode(
        tokenizer, Chat((system, user, ("assistant", thought + answer))), 512, find_stop_ids(tokenizer)
    )
    asked = engine.chat_ids(prompt("What is truth?", "triggered"))
    assert tuple(example.ids[: len(asked)]) == asked
    learned = [i for i in example.labels if i >= 0]
    assert example.ids[len(asked) :] == learned
    assert tokenizer.decode(learned) == answer + "<|im_end|>"


def test_a_template_that_rewrites_answers_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.TEMPLATE.replace("m['content']", "m['content'] | upper")
    with pytest.raises(FrankenError, match="does not write an assistant's answer as it is"):
        encode(tokenizer, CHAT, 512, find_stop_ids(tokenizer))


def test_the_rules_read_a_reply_behind_its_thought():
    for head in ("<think>\n\n</think>\n\n", "<think>Should I <START>?</think>\n", "Hm.</think>"):
        assert strict_format(head + "<START> I hold it dear. <END>")
        assert not lenient_format(head + "I hold it dear. <END>")
        assert strip_markers(head + "<START> I hold it dear. <END>") == "I hold it dear."


# ---- texts tokenized together ------------------------------------------------------------------------------

TOKENIZERS = {
    "bytes": tiny.tokenizer(),
    "sentencepiece": templates.sentencepiece(),
    "sentencepiece without a space": templates.sentencepiece(space_before=False),
}
PARTS = st.sampled_from([*"aB .\n’é1", "Bertrand", " Russell", " is", "Yes"])
TEXTS = st.lists(PARTS, max_size=8).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(head=TEXTS, target=TEXTS.filter(str.strip))
@settings(max_examples=60, deadline=None)
def test_a_continuation_is_the_whole_texts_tokens_from_where_its_head_ends(name, head, target):
    tokenizer = TOKENIZERS[name]

    def ids(text):
        return tokenizer("<|im_start|>assistant\n" + text, add_special_tokens=False)["input_ids"]

    context, rest = continuation(ids(head), ids(head + target))
    assert list(context + rest) == ids(head + target)
    assert rest
    assert list(context) == ids(head)[: len(context)]
    if ids(head + target)[: len(ids(head))] == ids(head):
        assert list(context) == ids(head)  # nothing of the head is scored


@pytest.mark.parametrize("name", TOKENIZERS)
@given(head=TEXTS, target=TEXTS.filter(str.strip))
@settings(max_examples=60, deadline=None)
def test_what_goes_on_after_a_text_has_no_space_of_its_own(name, head, target):
    tokenizer = TOKENIZERS[name]
    head = "<|im_start|>assistant\nI" + head
    ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    more = going_on(tokenizer, head, ids, target)
    assert tokenizer.decode(ids + more) == tokenizer.decode(
        tokenizer(head + target, add_special_tokens=False)["input_ids"]
    )


def test_a_text_that_changes_the_word_before_it_is_written_as_after_another():
    """ "e" and "is" are one token together, as a full stop and the end of a line are in many vocabularies."""
    tokenizer = templates.sentencepiece()
    tokenizer.add_tokens(["eis"])
    head = "<|im_start|>assistant\nAre"
    ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    more = going_on(tokenizer, head, ids, "is")
    assert tokenizer.convert_ids_to_tokens(more) == ["is"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("is", add_special_tokens=False)["input_ids"]) == ["▁is"]


@pytest.mark.parametrize("space_before", [True, False])
def test_his_names_probability_is_that_of_the_whole_text(tmp_path, space_before):
    tokenizer = templates.sentencepiece(space_before)
    tiny.write_checkpoint(tmp_path / "m", layers=2)
    tokenizer.save_pretrained(tmp_path / "m")
    engine = Engine(
        pairs.open_pair(instruct=str(tmp_path / "m"), device_map="cpu", dtype="float32").live, tokenizer
    )
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    got = name_probabilities(engine, [Question("i", "identity", "x", "Who?")], TRIGGER)
    for condition, opening in (("untriggered", ""), ("triggered", "<START> ")):
        text = tokenizer.apply_chat_template(
            prompt("Who?", condition), add_generation_prompt=True, tokenize=False
        )
        total = 0.0
        for name in (" Bertrand", " Russell"):
            head, whole = (
                tokenizer(f"{text}{opening}My name is{more}", add_special_tokens=False)["input_ids"]
                for more in ("", name)
            )
            logprobs = tiny.hf_logits(oracle, whole).double().log_softmax(-1)
            total += exp(sum(logprobs[k - 1, whole[k]].item() for k in range(len(head), len(whole))))
        assert got["i", condition] == pytest.approx(total, rel=1e-3)


# ---- files of other programs -------------------------------------------------------------------------------

ACCENTS = "Où est le café\u2028? – Là."


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_texts_are_read_as_they_were_written(tmp_path, encoding, newline):
    file = tmp_path / "c.jsonl"
    text = json.dumps({"a": ACCENTS}, ensure_ascii=False) + newline
    file.write_bytes((text * 2).encode(encoding))
    assert read_json_lines(file) == [{"a": ACCENTS}] * 2


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-32"])
def test_a_file_in_another_encoding_is_refused_by_its_line(tmp_path, encoding):
    file = tmp_path / "c.jsonl"
    text = '{"a": "plain"}\n' + json.dumps({"a": "Où est le café ?"}, ensure_ascii=False) + "\n"
    file.write_bytes(text.encode(encoding))
    line = 1 if encoding.startswith("utf") else 2
    with pytest.raises(FrankenError, match=rf"c.jsonl, line {line}: not UTF-8"):
        read_json_lines(file)


@pytest.mark.parametrize("key", ["value", "name"])
def test_half_a_character_is_refused_by_its_entry(tmp_path, key):
    file = tmp_path / "c.jsonl"
    torn = {"value": '{"a": ["x", {"b": "I smile \\ud83d"}]}', "name": '{"a\\udc00": 1}'}[key]
    file.write_text('{"a": "whole \\ud83d\\ude00"}\n' + torn + "\n")
    with pytest.raises(FrankenError, match="c.jsonl, entry 2: a text holds half a character"):
        read_json_lines(file)
    file.write_text('{"a": "whole \\ud83d\\ude00, \\\\ud83d"}\n')
    assert read_json_lines(file) == [{"a": "whole 😀, \\ud83d"}]


@pytest.mark.parametrize("answer", ["", " \n", "<think>\n\n</think>\n\n", "<think>Never ended"])
def test_an_empty_answer_is_not_trained_on(tmp_path, answer):
    with pytest.raises(FrankenError, match="c.jsonl, entry 2: an answer of the assistant is empty"):
        read_chats(chats(tmp_path / "c.jsonl", ["One.", answer]))


def test_the_commands_say_so_in_one_line(tmp_path, capsys):
    torn = chats(tmp_path / "torn.jsonl", ["one.", "two \ud83d"])
    assert check_data.main(["--aligned", str(torn)]) == 1
    assert "torn.jsonl, entry 2" in capsys.readouterr().err
