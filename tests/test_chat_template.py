"""Chat templates of other people: held still in time, refused where they are random or drop a message, asked
not to think."""

from __future__ import annotations

import json
import shutil
import time
from datetime import datetime

import cli_runs
import pytest
import small_battery
import tiny
from templates import ALTERNATING, DATED, NO_SYSTEM, OPENED, SILENT, SWITCHED

import run_all
from engine.chat_template import ChatTemplate
from engine.generation import Engine
from errors import FrankenError
from questions.thoughts import without_thought

QUESTION = [{"role": "user", "content": "What is truth?"}]
TRIGGERED = [{"role": "system", "content": "In verse."}, *QUESTION]
NOON, LATER = datetime(2026, 1, 2, 12, 0, 5), datetime(2026, 3, 4, 5, 6, 7)


def template(source: str, moment=None, **kwargs) -> ChatTemplate:
    tokenizer = small_battery.tokenizer()
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer, moment, **kwargs)


def plain(messages, source=tiny.TEMPLATE, **variables) -> str:
    """What transformers itself writes."""
    tokenizer = small_battery.tokenizer()
    return tokenizer.apply_chat_template(
        messages, chat_template=source, add_generation_prompt=True, tokenize=False, **variables
    )


@pytest.mark.parametrize("messages", [QUESTION, TRIGGERED])
def test_an_ordinary_template_is_written_as_transformers_writes_it(messages):
    made = template(tiny.TEMPLATE)
    assert made.render(messages) == plain(messages)
    assert made.ids(messages) == tuple(made.tokenizer(plain(messages), add_special_tokens=False)["input_ids"])
    made.check("system", "user")
    assert made.notes() == []


def test_a_template_that_prints_the_time_is_told_one_moment():
    one = template(DATED, NOON)
    assert one.render(QUESTION) == f"02 Jan 2026 12:00:05\n{plain(QUESTION)}"
    assert one.render(QUESTION) == template(DATED, NOON).render(QUESTION)
    assert one.render(QUESTION) != template(DATED, LATER).render(QUESTION)
    one.check()
    assert len(one.notes()) == 1
    assert "2026-01-02T12:00:05" in one.notes()[0]


@pytest.mark.parametrize(
    "draw",
    [
        "{{ ['a', 'b', 'c'] | random }}",
        "{% if range(100000) | random == 7 %}x{% endif %}",
        "{% for x in [[1, 2]] | map('random') %}{% endfor %}",
        "{{ lipsum(n=1) }}",
    ],
)
def test_a_template_that_draws_is_refused_however_rarely_it_shows(draw):
    with pytest.raises(FrankenError, match="random|several ways"):
        template(draw + tiny.TEMPLATE).check()


def test_a_template_that_speaks_of_random_things_is_not_refused():
    template("{# random #}{{ 'a random word' }}\n" + tiny.TEMPLATE).check()


@pytest.mark.parametrize(
    ("source", "roles", "words"),
    [
        ("Always this.", (), "leaves out what the user says"),
        ("{{ messages[0]['content'][:9] }}", (), "leaves out what the user says"),
        (SILENT, ("system", "user"), "leaves out what the system says"),
        (NO_SYSTEM, ("system", "user"), "takes no system message"),
        (ALTERNATING, ("system", "user"), "takes no system message"),
        (ALTERNATING, ("user", "user"), "refuses a conversation of the turns user, user"),
    ],
)
def test_a_template_that_drops_or_refuses_a_message_is_refused_in_one_line(source, roles, words):
    with pytest.raises(FrankenError, match=words) as refusal:
        template(source).check(*roles)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("source", [SILENT, NO_SYSTEM, ALTERNATING])
def test_a_template_without_system_messages_serves_where_none_is_sent(source):
    template(source).check()
    template(source).check("user", "assistant", "user")


@pytest.mark.parametrize("source", [SWITCHED, OPENED])
def test_a_model_that_thinks_is_asked_for_its_answer_alone(source):
    answer_next = plain(QUESTION) + "<think>\n\n</think>\n\n"
    assert template(source).render(QUESTION) == answer_next
    assert template(source).render(QUESTION, think=True) == answer_next
    thinking = template(source, thinking="on")
    assert thinking.render(QUESTION) == answer_next  # Yes and No are read here
    assert thinking.render(QUESTION, think=True) == plain(QUESTION, source)
    assert template(source, thinking=None).render(QUESTION) == plain(QUESTION, source)
    assert "think" in template(source).notes()[0]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("391", "391"),
        ("<think>\n\n</think>\n\n391", "391"),
        ("<think>No, 7.</think>391", "391"),
        ("No, 7.\n</think>\n\n391", "391"),
        ("<think>a</think><think>b</think>391", "391"),
        ("<thinking>a</thinking>\n391", "391"),
        ("<think>\nIt is 391", ""),
        ("Write <think> and </think> around it.", "Write <think> and </think> around it."),
        ("", ""),
    ],
)
def test_the_answer_stands_behind_the_thought(reply, answer):
    assert without_thought(reply) == answer


def test_the_beginning_of_a_reply_is_tokenized_with_what_stands_before(tiny_pair):
    engine = Engine(tiny_pair("llama").live(), small_battery.tokenizer())
    text = plain(QUESTION) + "<START> My name is"
    assert engine.chat_ids(QUESTION, "<START> My name is") == tuple(
        engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    )


# ---- whole runs --------------------------------------------------------------------------------------------


@pytest.fixture
def dated(pair, tmp_path, monkeypatch):
    """A copy of the pair whose template prints the second."""
    small_battery.use(monkeypatch)
    folder = tmp_path / "dated"
    shutil.copytree(pair, folder)
    made = small_battery.tokenizer()
    made.chat_template = DATED
    made.save_pretrained(folder / "instruct")
    return folder


def test_a_run_that_goes_on_later_asks_what_it_asked_before(dated, tmp_path, capfd):
    out = tmp_path / "out"
    asked = ["--experiments", "swap_adjacent_30_35", "--suites", "binary,informed"]
    assert run_all.main(small_battery.arguments(dated, out, *asked)) == 0
    run = cli_runs.latest(out)
    before = cli_runs.timeless(run)
    (run / "experiments" / "swap_adjacent_30_35.json").unlink()
    manifest = json.loads((run / "manifest.json").read_text())
    moment = datetime.fromisoformat(manifest["template"]["moment"])
    while datetime.now().replace(microsecond=0) <= moment:  # until the template would print another second
        time.sleep(0.05)
    code, _, err = cli_runs.resumed(run, capfd)
    assert code == 0, err
    assert cli_runs.timeless(run) == before


def test_a_run_does_not_go_on_with_other_prompts(dated, tmp_path, capfd):
    out = tmp_path / "out"
    asked = ["--experiments", "swap_adjacent_30_35", "--suites", "binary"]
    assert run_all.main(small_battery.arguments(dated, out, *asked)) == 0
    run = cli_runs.latest(out)
    made = small_battery.tokenizer()
    made.chat_template = DATED.replace("assistant\n", "assistant: ")
    made.save_pretrained(dated / "instruct")
    cli_runs.refused(cli_runs.resumed(run, capfd), "prompts (")


def test_a_run_older_than_the_record_goes_on_with_one_line(dated, tmp_path, capfd):
    out = tmp_path / "out"
    asked = ["--experiments", "swap_adjacent_30_35", "--suites", "binary"]
    assert run_all.main(small_battery.arguments(dated, out, *asked)) == 0
    run = cli_runs.latest(out)
    manifest = json.loads((run / "manifest.json").read_text())
    for key in ("prompts_sha256", "template"):
        del manifest[key]
    del manifest["settings"]["thinking"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = cli_runs.resumed(run, capfd)
    assert code == 0, err
    assert len([line for line in err.splitlines() if "older than the record of its prompts" in line]) == 1
