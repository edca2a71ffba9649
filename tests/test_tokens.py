"""Checkpoints whose tokenizers number tokens otherwise are no sources of one model."""

import json
import shutil
from functools import partial

import pytest
import small_battery
from cli_runs import refused

import run_all
from surgery.tokens import ordinary_tokens, other_token


def changed(folder, change) -> None:
    """Change what a tokenizer.json says."""
    file = folder / "tokenizer.json"
    said = json.loads(file.read_text())
    change(said)
    file.write_text(json.dumps(said))
    ordinary_tokens.cache_clear()


def trade(said: dict) -> None:
    """Let two ordinary tokens change their numbers."""
    vocabulary, added = said["model"]["vocab"], {token["id"] for token in said["added_tokens"]}
    a, b = [token for token, number in vocabulary.items() if number not in added][:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


@pytest.fixture
def other(pair, tmp_path):
    """A copy of the pair whose base has another tokenizer."""
    folder = shutil.copytree(pair, tmp_path / "pair")
    changed(folder / "base", trade)
    return folder


@pytest.mark.parametrize("more", [["--experiments", "baseline_base"], ["--source", "mine={}/base"]])
def test_a_source_of_another_tokenizer_is_refused_before_anything_is_loaded(
    pair, other, tmp_path, monkeypatch, capfd, more
):
    monkeypatch.setattr("runner.pairs.LiveModel", lambda *a, **k: pytest.fail("a model was loaded"))
    whole = other if more[0] == "--experiments" else pair
    argv = small_battery.arguments(whole, tmp_path / "out", *(word.format(other) for word in more))
    refused((run_all.main(argv), *capfd.readouterr()), "has another tokenizer than instruct (token")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_what_an_added_token_is_called_is_no_other_tokenizer(pair, tmp_path):
    folder = shutil.copytree(pair / "base", tmp_path / "base")
    assert other_token(pair / "instruct", folder) is None

    def rename(said):
        said["added_tokens"][-1]["content"] = "<|reserved|>"

    changed(folder, rename)
    assert other_token(pair / "instruct", folder) is None
    changed(folder, trade)
    number, ours, theirs = other_token(pair / "instruct", folder)
    assert ordinary_tokens(folder)[number] == theirs != ours == ordinary_tokens(pair / "instruct")[number]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": ["a"]}}']
)
def test_what_is_no_tokenizer_says_nothing(pair, tmp_path, text):
    folder = shutil.copytree(pair / "base", tmp_path / "base")
    (folder / "tokenizer.json").write_text(text)
    assert other_token(pair / "instruct", folder) is None
    (folder / "tokenizer.json").unlink()
    assert other_token(pair / "instruct", folder) is None


def test_unigram_vocabularies_are_numbered_by_place(tmp_path):
    for name, words in (("a", "one two three"), ("b", "one three two"), ("c", "one two three four")):
        (tmp_path / name).mkdir()
        said = {"model": {"vocab": [[word, -1.0] for word in words.split()]}, "added_tokens": [{"id": 0}]}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(said))
    among = partial(other_token, tmp_path / "a")
    assert among(tmp_path / "b") == (1, "two", "three") and among(tmp_path / "c") is None
