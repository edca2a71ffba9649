"""Talking to a modified model: streamed as it would be generated whole, changed and undone in between."""

import io

import pytest
import tiny

from engine.generation import Request
from errors import FrankenError
from runner import commands
from runner.chat import HELP, Chat, talk
from runner.export import Chosen
from surgery.recipes import identity, repeat, swap

RECIPES = {"plain": identity(6), "swapped": swap(identity(6), 1, 4), "longer": repeat(identity(6), 1, 3)}


def find(name: str) -> Chosen:
    if name not in RECIPES:
        raise FrankenError(f"unknown experiment {name!r}")
    return Chosen(name, RECIPES[name])


@pytest.fixture
def chat(tiny_pair):
    made = Chat(tiny_pair("qwen2").engine(), find, budget=12, temperature=0.0)
    made.apply("plain")
    return made


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("name", RECIPES)
def test_streamed_tokens_are_those_of_the_whole_reply(tiny_pair, name, temperature):
    engine = tiny_pair("qwen2").engine()
    engine.live.apply(RECIPES[name])
    for k in range(3):
        request = Request(f"{k}", tiny.random_prompt(k, 9), 20, temperature, 0.9)
        (whole,) = engine.complete([request])
        assert tuple(engine.stream(request)) == whole.token_ids


def test_pieces_of_a_reply_are_its_text_and_join_the_conversation(chat):
    pieces = list(chat.reply("Is something wrong with you?"))
    assert chat.messages[0] == {"role": "user", "content": "Is something wrong with you?"}
    assert "".join(pieces) == chat.messages[1]["content"]
    first = chat.engine.chat_ids(chat.messages[:1])
    assert "".join(pieces) == chat.engine.complete([Request("any", first, 12)])[0].text
    before = chat.engine.chat_ids([*chat.messages, {"role": "user", "content": "And now?"}])
    answer = "".join(chat.reply("And now?"))
    assert answer == chat.engine.complete([Request("any", before, 12)])[0].text


def test_a_character_of_several_bytes_is_shown_once_it_is_whole(chat, monkeypatch):
    tokens = chat.engine.tokenizer("naïve 語!")["input_ids"]
    monkeypatch.setattr(chat.engine, "stream", lambda request: iter(tokens))
    pieces = list(chat.reply("Say it."))
    assert "".join(pieces) == "naïve 語!" and not any("\ufffd" in piece for piece in pieces)
    assert "語" in pieces


def test_undo_is_exact(chat):
    live = chat.engine.live
    before = live.fingerprint()
    assert "swapped" in chat.command("/apply swapped")
    changed = live.fingerprint()
    chat.command("/apply longer")
    assert chat.command("/undo") == "back to swapped" and live.fingerprint() == changed != before
    assert chat.command("/undo") == "back to plain" and live.fingerprint() == before
    with pytest.raises(FrankenError, match="nothing to undo"):
        chat.command("/undo")


def test_a_reply_that_is_broken_off_is_kept_as_far_as_it_came(chat, monkeypatch):
    def interrupted(request):
        yield from chat.engine.tokenizer("The ri")["input_ids"]
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.engine, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(chat.reply("What carries the river?"))
    assert chat.messages[-1] == {"role": "assistant", "content": "The ri"}


def test_a_conversation_beyond_the_models_length_is_refused_and_unchanged(chat):
    with pytest.raises(FrankenError, match="/reset"):
        list(chat.reply("x" * 600))
    assert chat.messages == []


def test_the_terminal_goes_on_after_an_error_and_shows_no_control_sequence(chat, monkeypatch, capsys):
    tokens = chat.engine.tokenizer("a\x1b[2Jb\x07")["input_ids"]
    monkeypatch.setattr(chat.engine, "stream", lambda request: iter(tokens))
    lines = "hello\n/apply nonsense\n\n/apply swapped\n/recipe\n/help\n/undo\n/reset\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert talk(chat) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\x07" not in out and "a␛[2Jb␇" in out
    assert "franken.py: unknown experiment 'nonsense'" in err and "never" not in out
    assert HELP in out and "back to plain" in out and chat.messages == []


def test_a_chat_from_the_command_line(pair, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n/apply swap_adjacent_31_32\nAnd now?\n/undo\n"))
    model = ["--base", str(pair / "base"), "--instruct", str(pair / "instruct"), "--device-map", "cpu"]
    words = ["chat", "baseline_instruct", *model, "--max-new-tokens", "5", "--temperature", "0"]
    assert commands.main(words) == 0
    out = capsys.readouterr().out
    assert "swap_adjacent_31_32: [2] <- instruct[3]" in out and "back to baseline_instruct" in out
    monkeypatch.setattr("sys.stdin", io.StringIO("/undo\n/undo\n"))
    assert commands.main(["chat", "swap_adjacent_31_32", *words[2:]]) == 0
    shown = capsys.readouterr()
    assert "back to baseline_instruct" in shown.out and "nothing to undo" in shown.err


def test_an_unknown_experiment_is_told_before_a_model_is_loaded(pair, monkeypatch, capsys):
    monkeypatch.setattr("runner.pairs.open_pair", lambda *a: pytest.fail("a model was loaded"))
    assert commands.main(["chat", "nonsense", "--instruct", str(pair / "instruct")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.real
def test_a_real_model_answers(smollm2, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n"))
    words = ["chat", "baseline_instruct", "--instruct", str(smollm2), "--device-map", "cpu"]
    assert commands.main([*words, "--temperature", "0", "--max-new-tokens", "20"]) == 0
    assert "Paris" in capsys.readouterr().out
