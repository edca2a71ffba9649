"""Quantized checkpoints, against what their own libraries compute from the same files.

Those of bitsandbytes are left out where it is not installed (0.50.2 was tried).
"""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config

from errors import FrankenError
from franken import LiveModel, swap
from runner.pairs import open_pair, read_config
from surgery.streaming import Stream
from surgery.tensors import read_tensor
from surgery.weights import Checkpoint, parameters_of

WIDE = dict(hidden_size=256, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2)


def quantize(path, **told):
    """Say in a checkpoint's config.json how it is quantized."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": told}))


def to_fp8(path, block):
    """Turn the decoder's matrices into FP8 with a scale for each block, in place."""
    state, out = load_file(path / "model.safetensors"), {}
    for key, tensor in state.items():
        if ".layers." not in key or tensor.ndim != 2:
            out[key] = tensor
            continue
        rows, columns = tensor.shape
        high, wide = block or (rows, columns)
        scale = torch.zeros(-(-rows // high), -(-columns // wide))
        stored = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
                scale[i, j] = tensor[part].abs().max() / 448
                stored[part] = (tensor[part] / scale[i, j]).to(torch.float8_e4m3fn)
        out[key] = stored
        out[f"{key.removesuffix('.weight')}.weight_scale_inv"] = scale
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
    return state


@pytest.fixture
def plain(tmp_path):
    return tiny.write_checkpoint(tmp_path / "plain", "qwen2", layers=3, **WIDE)


@pytest.fixture
def fp8(plain, tmp_path):
    path = shutil.copytree(plain, tmp_path / "fp8")
    to_fp8(path, (128, 128))
    quantize(path, quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")
    return path


def opened(path):
    config = read_config(path)
    source = Checkpoint("instruct", path)
    return LiveModel({"instruct": source}, config, torch.float32, torch.device("cpu"))


def weights(live):
    """All of a live model's decoder weights by the names in a state dict."""
    return {f"model.layers.{i}.{k}": t for i, bank in enumerate(live.banks) for k, t in bank.tensors.items()}


# ---- FP8 ---------------------------------------------------------------------------------------------------


def test_fp8_is_what_transformers_dequantizes(fp8):
    theirs = AutoModelForCausalLM.from_pretrained(
        fp8, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    expected = theirs.state_dict()
    ours = weights(opened(fp8))
    assert any(not torch.equal(t, t.to(torch.bfloat16).float()) for t in ours.values())
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("block", [(128, 128), (64, 96), (1, 256), None])
def test_fp8_scales_of_blocks_rows_and_tensors_are_multiplied_where_they_belong(plain, tmp_path, block):
    path = shutil.copytree(plain, tmp_path / "fp8")
    before = to_fp8(path, block)
    quantize(path, quant_method="fp8", weight_block_size=block and list(block))
    found = Checkpoint("instruct", path).tensors["model.layers.1.self_attn.q_proj.weight"]
    raw = load_file(path / "model.safetensors")
    data, scale = (raw[f"model.layers.1.self_attn.q_proj.{n}"] for n in ("weight", "weight_scale_inv"))
    high, wide = block or data.shape
    slow = [
        [float(data[i, j].float() * scale[i // high, j // wide]) for j in range(data.shape[1])]
        for i in range(data.shape[0])
    ]
    assert torch.equal(read_tensor(found), torch.tensor(slow))
    near = before["model.layers.1.self_attn.q_proj.weight"]
    assert (read_tensor(found) - near).abs().max() < 0.07 * near.abs().max()


def test_scales_that_do_not_fit_are_refused(fp8):
    state = load_file(fp8 / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(2, 3)
    save_file(state, fp8 / "model.safetensors")
    with pytest.raises(FrankenError, match="its scales are .2, 3., which is not one for each block of 128"):
        Checkpoint("instruct", fp8)
    del state["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(state, fp8 / "model.safetensors")
    with pytest.raises(FrankenError, match="mlp.up_proj.weight is in FP8 and has no scale beside it"):
        Checkpoint("instruct", fp8)


# ---- bitsandbytes ------------------------------------------------------------------------------------------


BITS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.extra("bitsandbytes")
@pytest.mark.parametrize("kind", BITS)
def test_bitsandbytes_is_what_the_library_dequantizes(plain, tmp_path, kind):
    path = tmp_path / kind
    made = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, quantization_config=BITS[kind], device_map={"": "cpu"}
    )
    made.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    found, ours = Checkpoint("instruct", path), weights(opened(path))
    assert found.quantized == "bitsandbytes"
    expected = by_the_library(made)
    assert len(expected) == 3 * 7
    for name, tensor in expected.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-6, atol=1e-7), name
    rest = load_file(plain / "model.safetensors")
    for name in set(ours) - set(expected):
        assert torch.equal(ours[name], rest[name]), name


def by_the_library(model):
    import bitsandbytes as bnb

    out = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            out[f"{name}.weight"] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scale = weight.SCB if weight.SCB is not None else module.state.SCB
            out[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(weight.data, scale)
    return out


def test_pieces_of_a_stream_are_the_whole(fp8, monkeypatch):
    whole = read_tensor(Checkpoint("instruct", fp8).tensors["model.layers.2.mlp.down_proj.weight"])
    monkeypatch.setattr(Stream, "CHUNK", 4096)
    ref = Checkpoint("instruct", fp8).tensors["model.layers.2.mlp.down_proj.weight"]
    into = torch.empty(ref.shape, dtype=torch.bfloat16)
    Stream(2).read([(ref, into)])
    assert torch.equal(into, whole.to(torch.bfloat16))  # rounded once


# ---- what is refused, and what works as ever ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors .pack-quant",
        ),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({}, "an unnamed format"),
    ],
)
def test_other_formats_are_refused_by_name_before_anything_is_read(plain, told, name):
    quantize(plain, **told)
    (plain / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(FrankenError, match=f"quantized by {name}.*, which is not read"):
        Checkpoint("instruct", plain)


def test_surgery_on_a_quantized_model_goes_back_to_the_bit(fp8):
    live = opened(fp8)
    before, first = live.fingerprint(), live.banks[0].tensors["mlp.up_proj.weight"].clone()
    live.apply(swap(live.original, 0, 2))
    assert torch.equal(live.banks[2].tensors["mlp.up_proj.weight"], first)
    live.apply(live.original)
    assert live.fingerprint() == before


def test_a_quantized_pair_is_opened_and_takes_the_memory_of_a_plain_one(fp8, plain):
    made = open_pair(instruct=str(fp8), device_map="cpu", dtype="float32")
    assert made.live.dtype == torch.float32
    assert any("quantized by fp8" in note for note in made.notes)
    assert parameters_of(Checkpoint("a", fp8)) == parameters_of(Checkpoint("a", plain))


@pytest.mark.extra("bitsandbytes")
@pytest.mark.real
def test_real_weights_in_four_bits_are_what_the_library_dequantizes(smollm2, tmp_path):
    made = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float32, quantization_config=BITS["nf4-double"], device_map={"": "cpu"}
    )
    made.save_pretrained(tmp_path / "nf4")
    source, expected = Checkpoint("instruct", tmp_path / "nf4"), by_the_library(made)
    assert len(expected) == 30 * 7
    for name, tensor in expected.items():
        assert torch.allclose(read_tensor(source.tensors[name]), tensor, rtol=1e-6, atol=1e-7), name
