"""GGUF files as checkpoints: the same as transformers makes of them, or refused in one line."""

import contextlib
import io

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from errors import FrankenError
from runner.cache import sha256_of
from runner.gguf import from_gguf
from runner.pairs import load_tokenizer, locate, open_pair, stop_ids

# the name of the file, what says that it was quantized, and what only a saved config has
FROM_MODEL_CLASS = {"_name_or_path", "transformers_version", "architectures", "quantization_config"}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FRANKENMODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same_as_transformers(gguf, made):
    """Compare a conversion with `from_pretrained(gguf_file=)`: tensors, config, tokenizer, template."""
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    want, have = loaded.state_dict(), load_file(made / "model.safetensors")
    if loaded.config.tie_word_embeddings:
        want.pop("lm_head.weight")
    assert set(have) == set(want)
    assert all(have[name].dtype == torch.bfloat16 and torch.equal(have[name], want[name]) for name in want)
    have_config, want_config = AutoConfig.from_pretrained(made).to_dict(), loaded.config.to_dict()
    differing = {k for k in {*have_config, *want_config} if have_config.get(k) != want_config.get(k)}
    assert differing <= FROM_MODEL_CLASS
    ours, theirs = AutoTokenizer.from_pretrained(made), AutoTokenizer.from_pretrained(**where)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_converted_file_is_what_transformers_makes_of_it(tiny_gguf, architecture, tied):
    gguf = tiny_gguf(architecture, tied=tied)
    same_as_transformers(gguf, locate(str(gguf), None)[0])


@pytest.mark.real
@pytest.mark.timeout(900)  # transformers parses the vocabulary four times
def test_the_real_half_billion_is_what_transformers_makes_of_it(qwen_gguf):
    made, revision = locate(str(qwen_gguf), None)
    assert (made.name, revision[:12]) == ("qwen2.5-coder-0.5b-instruct", "gguf sha256 ")
    same_as_transformers(qwen_gguf, made)
    assert stop_ids(made) == [151645, 151643]  # <|im_end|>, <|endoftext|>
    chat = [{"role": "user", "content": "Hi"}]
    text = load_tokenizer(made).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_all_tokens_that_end_a_reply_are_named(tiny_gguf):
    made, _ = locate(str(tiny_gguf("qwen2")), None)
    names = load_tokenizer(made).convert_ids_to_tokens(stop_ids(made))
    assert names == ["<|im_end|>", "<|endoftext|>"]


def test_a_file_stands_where_a_checkpoint_can(tiny_gguf, cache):
    gguf = str(tiny_gguf("qwen2"))
    opened = open_pair(instruct=gguf, base=gguf, extra={"third": gguf}, device_map="cpu")
    assert set(opened.live.sources) == {"instruct", "base", "third"}
    assert opened.sources["base"]["revision"] == f"gguf sha256 {sha256_of(tiny_gguf('qwen2'))}"
    assert len(list(cache.glob("gguf-*"))) == 1  # converted once for all three


def refused(path, words):
    """The file is refused in one line, and nothing says before that it is being converted."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(FrankenError, match=words) as caught:
        locate(str(path), None)
    assert "\n" not in str(caught.value)
    assert "Converting" not in stderr.getvalue()


@pytest.mark.parametrize(
    "architecture, fields, words",
    [
        ("mamba", {}, "architecture mamba cannot be read, only llama, qwen2, qwen3"),
        ("qwen2", {"split__count": 3}, "one part of a split model"),
        ("qwen2", {"qwen2__rope__scaling__type": "yarn"}, "scaled rotary positions"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_before_anything_is_made(
    tmp_path, cache, architecture, fields, words
):
    refused(tiny.write_gguf(tmp_path / "odd.gguf", architecture, **fields), words)
    assert not list(cache.rglob("*.safetensors"))


def test_a_file_cut_short_or_of_another_kind_is_refused(tiny_gguf, tmp_path, cache):
    data = tiny_gguf("qwen2").read_bytes()
    for content in (data[:100], data[:-1000], b"no GGUF at all", b""):
        (tmp_path / "cut.gguf").write_bytes(content)
        refused(tmp_path / "cut.gguf", "cut.gguf: not a complete GGUF file")
    refused(tmp_path / "nowhere.gguf", "no such directory or .gguf file")
    assert not list(cache.rglob("*.safetensors"))


def test_tensors_that_the_model_has_no_place_for_are_refused(tmp_path, cache):
    rope = tiny.write_gguf(tmp_path / "rope.gguf", "llama", also={"rope_freqs.weight": 8})
    refused(rope, "rope_freqs.weight has no place in a llama model")
    lost = tiny.write_gguf(tmp_path / "lost.gguf", "llama", also={"blk.1.ffn_up.weight": None})
    refused(lost, "there is no model.layers.1.mlp.up_proj.weight in it")
    assert not list(cache.rglob("*.safetensors"))


def test_a_conversion_that_fails_leaves_nothing(tiny_gguf, cache, monkeypatch):
    monkeypatch.setattr("runner.gguf.dequantized", lambda *args: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(FrankenError, match="cannot keep the converted model there .*full"):
        from_gguf(tiny_gguf("qwen2"), "some")
    assert list(cache.iterdir()) == []
