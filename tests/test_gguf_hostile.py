"""GGUF files that are damaged, contradict themselves or ask for what is not carried over: one line each, at
once, and nothing is made. Sound ones give the values of the library's own dequantization, to the bit."""

import contextlib
import io
import random
import struct

import gguf
import pytest
import tiny
import torch
from gguf.gguf_writer import GGUFValue
from safetensors.torch import load_file

from errors import FrankenError
from runner import gguf as ours
from runner.cache import sha256_of
from runner.pairs import locate

KIND = gguf.GGUFValueType
UP = b"blk.1.ffn_up.weight"  # 64 to 96, in Q8_0


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FRANKENMODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(path, words, cache):
    """In one line, before anything is made, and before anybody is told that something will be."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(FrankenError, match=words) as caught:
        locate(str(path), None)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert "Converting" not in stderr.getvalue()
    assert not list(cache.rglob("*.safetensors"))


# ---- bytes -------------------------------------------------------------------------------------------------


def put(data: bytes, at: int, form: str, *values) -> bytes:
    packed = struct.pack("<" + form, *values)
    return data[:at] + packed + data[at + len(packed) :]


def after(data: bytes, name: bytes, further: int = 0) -> int:
    return data.index(name) + len(name) + further


TYPES = b"tokenizer.ggml.token_type"
DAMAGE = {
    "a count of tensors beyond all": (lambda d: put(d, 8, "Q", 1 << 63), "beyond the end"),
    "a count of metadata beyond all": (lambda d: put(d, 16, "Q", (1 << 64) - 1), "beyond the end"),
    "a key longer than the file": (lambda d: put(d, 24, "Q", 1 << 63), "beyond the end"),
    "a string longer than the file": (
        lambda d: put(d, after(d, b"general.architecture", 4), "Q", 1 << 62),
        "beyond the end",
    ),
    "a list of numbers that never ends": (
        lambda d: put(d, after(d, TYPES, 8), "Q", 1 << 62),
        "more than 4000000 entries",
    ),
    "a list of numbers beyond the file": (lambda d: put(d, after(d, TYPES, 8), "Q", 3_999_000), "beyond"),
    "a list of strings that never ends": (
        lambda d: put(d, after(d, b"tokenizer.ggml.tokens", 8), "Q", 1 << 63),
        "more than 4000000 entries",
    ),
    "a list of lists": (lambda d: put(d, after(d, TYPES, 4), "I", 9), "list of values of type 9"),
    "a value of no known type": (lambda d: put(d, after(d, TYPES), "I", 99), "unknown type 99"),
    "a tensor of no known type": (lambda d: put(d, after(d, UP, 20), "I", 999), "unknown type 999"),
    "a tensor of a type taken out of the format": (lambda d: put(d, after(d, UP, 20), "I", 5), "type 5"),
    "two billion dimensions": (lambda d: put(d, after(d, UP), "I", 1 << 31), "dimensions"),
    "no dimension": (lambda d: put(d, after(d, UP), "I", 0), "0 dimensions"),
    "a shape whose product overflows": (
        lambda d: put(d, after(d, UP, 4), "QQ", 1 << 40, 1 << 40),
        "beyond the end of the file",
    ),
    "a shape whose product is 2^64": (lambda d: put(d, after(d, UP, 4), "QQ", 1 << 32, 1 << 32), "beyond"),
    "a shape of nothing": (lambda d: put(d, after(d, UP, 4), "QQ", 0, 96), "not made of blocks"),
    "a shape that is no whole block": (lambda d: put(d, after(d, UP, 4), "QQ", 33, 96), "blocks of 32"),
    "an offset beyond the file": (lambda d: put(d, after(d, UP, 24), "Q", 1 << 40), "beyond the end"),
    "an offset that comes round": (lambda d: put(d, after(d, UP, 24), "Q", (1 << 64) - 1024), "beyond"),
    "an offset between two places": (lambda d: put(d, after(d, UP, 24), "Q", 33), "no multiple of 32"),
    "two tensors in one place": (
        lambda d: put(
            d, after(d, UP, 24), "Q", *struct.unpack_from("<Q", d, after(d, UP[:4] + b"0" + UP[5:], 24))
        ),
        "lie over each other",
    ),
    "two tensors of one name": (lambda d: d.replace(UP, UP[:4] + b"0" + UP[5:]), "duplicated tensor"),
    "a key twice": (lambda d: d.replace(b"qwen2.context_length", b"tokenizer.ggml.model"), "Duplicate"),
    "the other order of bytes": (lambda d: put(d, 4, "I", 3 << 24), "big-endian"),
    "a version of tomorrow": (lambda d: put(d, 4, "I", 4), "version 4"),
    "a key that is no text": (lambda d: d.replace(b"general.name", b"general.nam\xff"), "utf-8"),
    "an architecture that is no text": (
        lambda d: put(d, after(d, b"general.architecture", 12), "B", 0xFF),
        "utf-8|cannot be read",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_header_is_refused_at_once(tiny_gguf, tmp_path, cache, damage, words):
    (tmp_path / "hit.gguf").write_bytes(damage(tiny_gguf("qwen2").read_bytes()))
    refused(tmp_path / "hit.gguf", words, cache)


@pytest.mark.timeout(300)
def test_a_header_cut_anywhere_is_refused_and_one_hit_anywhere_ends_in_no_traceback(tiny_gguf, tmp_path):
    """Accepted is only what still reads as the same tensors; no other kind of error, no hang."""
    data, draw = tiny_gguf("qwen2").read_bytes(), random.Random(0)
    header = gguf.GGUFReader(tiny_gguf("qwen2")).data_offset
    path = tmp_path / "hit.gguf"
    for cut in sorted(draw.randrange(len(data)) for _ in range(40)):
        path.write_bytes(data[:cut])
        with pytest.raises(FrankenError, match="not a complete GGUF file"):
            ours.open_gguf(path)
    outcomes = {True: 0, False: 0}
    for _ in range(150):
        at = draw.randrange(header)
        path.write_bytes(data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :])
        try:
            ours.open_gguf(path)
            outcomes[True] += 1
        except FrankenError as e:
            assert "\n" not in str(e)
            outcomes[False] += 1
    assert min(outcomes.values()) > 10, outcomes


# ---- metadata ----------------------------------------------------------------------------------------------


def number(value, kind=KIND.UINT32):
    return GGUFValue(value, kind)


def listed(values, kind=KIND.STRING):
    return GGUFValue(values, KIND.ARRAY, kind)


CONTRADICTIONS = {
    "an architecture that is a number": (
        {"general.architecture": number(7)},
        "architecture 7 cannot be read",
    ),
    "an adapter": ({"general.type": GGUFValue("adapter", KIND.STRING)}, "of type adapter"),
    "a count of parts that is a text": ({"split.count": GGUFValue("3", KIND.STRING)}, "part of a split"),
    "two billion layers": ({"qwen2.block_count": number((1 << 31) - 1)}, "block_count is 2147483647"),
    "a layer more than there are": ({"qwen2.block_count": number(4)}, "4 layers, and has tensors of 3"),
    "a layer less than there are": ({"qwen2.block_count": number(2)}, "2 layers, and has tensors of 3"),
    "layers as a text": ({"qwen2.block_count": GGUFValue("3", KIND.STRING)}, "block_count is '3'"),
    "no heads": ({"qwen2.attention.head_count": number(0)}, "head_count is 0"),
    "heads layer by layer": ({"qwen2.attention.head_count": listed([4, 4, 4], KIND.UINT32)}, "head_count is"),
    "heads that do not divide the width": ({"qwen2.attention.head_count": number(5)}, "expected|metadata"),
    "a width of 2^32": ({"qwen2.embedding_length": number((1 << 32) - 1)}, "embedding_length is 4294967295"),
    "a context of nothing": ({"qwen2.context_length": number(0)}, "context_length is 0"),
    "no epsilon": ({"qwen2.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is None"),
    "an epsilon that is no number": (
        {"qwen2.attention.layer_norm_rms_epsilon": number(float("nan"), KIND.FLOAT32)},
        "layer_norm_rms_epsilon is nan",
    ),
    "a base of rotation of infinity": (
        {"qwen2.rope.freq_base": number(float("inf"), KIND.FLOAT32)},
        "freq_base is inf",
    ),
    # llama.cpp scales linearly where a factor stands without a type, under its newer and its older name
    "a factor of scaling without a type": (
        {"qwen2.rope.scaling.factor": number(4.0, KIND.FLOAT32)},
        "scaled rotary positions",
    ),
    "the older name of the factor": (
        {"qwen2.rope.scale_linear": number(4.0, KIND.FLOAT32)},
        "scaled rotary positions",
    ),
    "half of a head rotated": ({"qwen2.rope.dimension_count": number(8)}, "in 8 of 16 dimensions"),
    "a sliding window": ({"qwen2.attention.sliding_window": number(128)}, "sliding_window is 128"),
    "a setting of tomorrow": ({"qwen2.logit_scale": number(0.5, KIND.FLOAT32)}, "logit_scale is 0.5"),
    "attention to both sides": ({"qwen2.attention.causal": number(False, KIND.BOOL)}, "causal is False"),
    "no vocabulary": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is not there"),
    "no kinds of tokens": ({"tokenizer.ggml.token_type": None}, "token_type is not there"),
    "kinds as texts": ({"tokenizer.ggml.token_type": listed(["1"] * 261)}, "not a list of what it should be"),
    "fewer kinds than tokens": (
        {"tokenizer.ggml.token_type": listed([1] * 260, KIND.INT32)},
        "261 tokens and 260 in tokenizer.ggml.token_type",
    ),
    "more scores than tokens": (
        {"tokenizer.ggml.scores": listed([0.5] * 300, KIND.FLOAT32)},
        "261 tokens and 300 in tokenizer.ggml.scores",
    ),
    "more tokens than embeddings": (
        {
            "tokenizer.ggml.tokens": listed([f"t{k}" for k in range(300)]),
            "tokenizer.ggml.token_type": listed([1] * 300, KIND.INT32),
        },
        "300 tokens, and embeddings of 261",
    ),
    "an end of reply that is no token": ({"tokenizer.ggml.eos_token_id": number(261)}, "eos_token_id is 261"),
    "an end of reply below zero": (
        {"tokenizer.ggml.eos_token_id": number(-1, KIND.INT32)},
        "eos_token_id is -1",
    ),
    "text split as Llama 3 does": (
        {"tokenizer.ggml.pre": GGUFValue("llama-bpe", KIND.STRING)},
        "split as by 'gpt2' and 'llama-bpe'",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("changes, words", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_metadata_that_are_not_carried_over_are_refused_at_once(tmp_path, cache, changes, words):
    def edit(metadata):
        for key, value in changes.items():
            metadata.pop(key) if value is None else metadata.__setitem__(key, value)

    refused(tiny.write_gguf(tmp_path / "odd.gguf", "qwen2", edit=edit), words, cache)


def test_a_llama_that_transformers_takes_for_another_family_by_its_name_is_refused(tmp_path, cache):
    """Of that name it makes a Mistral, whose attention then has a window that the file does not speak of."""

    def edit(metadata):
        metadata["general.name"] = GGUFValue("mistral", KIND.STRING)

    refused(tiny.write_gguf(tmp_path / "m.gguf", "llama", edit=edit), "mistral", cache)


def test_settings_that_change_nothing_are_no_hindrance(tmp_path):
    def edit(metadata):
        metadata["qwen2.rope.scaling.type"] = GGUFValue("none", KIND.STRING)
        metadata["qwen2.rope.scaling.factor"] = number(1.0, KIND.FLOAT32)
        metadata["qwen2.rope.dimension_count"] = number(16)
        metadata["qwen2.expert_count"] = number(0)

    locate(str(tiny.write_gguf(tmp_path / "fine.gguf", "qwen2", edit=edit)), None)


def test_a_conversion_of_before_it_was_refused_is_not_taken_from_the_cache(tiny_gguf, tmp_path, cache):
    def edit(metadata):
        metadata["qwen2.rope.scale_linear"] = number(4.0, KIND.FLOAT32)

    odd = tiny.write_gguf(tmp_path / "odd.gguf", "qwen2", edit=edit)
    made, _ = locate(str(tiny_gguf("qwen2")), None)
    made.rename(cache / f"gguf-{sha256_of(odd)[:32]}")  # as it was called then
    with pytest.raises(FrankenError, match="scaled rotary positions"):
        locate(str(odd), None)


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_value_is_the_librarys_own_to_the_bit(tmp_path, kind):
    """Against gguf.dequantize of whole tensors; a Qwen2 file's rows stand as the checkpoint's do."""
    file = tiny.write_gguf(tmp_path / "all.gguf", "qwen2", kind=kind, tied=False)
    made = load_file(locate(str(file), None)[0] / "model.safetensors")
    names = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}
    names["output_norm.weight"] = "model.norm.weight"
    parts = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    parts |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"attn_output": "self_attn.o_proj"}
    parts |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    for tensor in gguf.GGUFReader(file).tensors:
        name = names.get(tensor.name)
        if name is None:
            _, block, part, end = tensor.name.split(".")
            name = f"model.layers.{block}.{parts[part]}.{end}"
        want = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).to(torch.bfloat16)
        assert torch.equal(made.pop(name), want), name
    assert not made
