"""Checkpoints on disk: headers, shards, adapters and hashing, against safetensors' own reader."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import FrankenError
from surgery.streaming import Stream
from surgery.tensors import read_tensor
from surgery.weights import Adapter, Checkpoint, content_hash


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copied(tiny_pair, tmp_path):
    """copied(shards=1) -> a private copy of a tiny checkpoint, for breaking."""

    def get(shards: int = 1, family: str = "llama"):
        return shutil.copytree(
            tiny_pair(family, shards=shards).paths["instruct"], tmp_path / f"{family}{shards}"
        )

    return get


# ---- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_every_tensor_is_found_and_read_to_the_bit(tiny_pair, family, shards):
    pair = tiny_pair(family, shards=shards)
    checkpoint = Checkpoint("instruct", pair.paths["instruct"])
    want = dict(pair.states["instruct"])
    assert len(checkpoint.layers) == pair.n
    for i, layer in enumerate(checkpoint.layers):
        for name, ref in layer.items():
            assert torch.equal(read_tensor(ref), want.pop(f"model.layers.{i}.{name}"))
    assert torch.equal(
        read_tensor(checkpoint.outer["embed"]["weight"]), want.pop("model.embed_tokens.weight")
    )
    assert torch.equal(read_tensor(checkpoint.outer["norm"]["weight"]), want.pop("model.norm.weight"))
    if family == "qwen2":
        assert torch.equal(read_tensor(checkpoint.outer["head"]["weight"]), want.pop("lm_head.weight"))
    assert not want


def test_a_file_that_shrinks_after_opening(copied):
    path = copied()
    checkpoint = Checkpoint("instruct", path)
    with open(path / "model.safetensors", "r+b") as f:
        f.truncate(3000)
    ref = checkpoint.layers[5]["mlp.up_proj.weight"]
    with pytest.raises(FrankenError, match="ends early") as caught:
        read_tensor(ref)
    one_line(caught)
    with pytest.raises(FrankenError, match="model.safetensors.*ends early"):
        Stream().read([(ref, torch.empty(ref.shape))])


# ---- what is wrong with a checkpoint -----------------------------------------------------------------------


def break_truncated(path):
    with open(path / "model.safetensors", "r+b") as f:
        f.truncate(f.seek(0, 2) - 5)


def break_header(path, change):
    data = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(json.loads(data[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_tensor(name, **fields):
    return lambda header: header | {name: header[name] | fields}


NORM = "model.norm.weight"


def rewrite(path, change):
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file)


BROKEN = {
    "cut by five bytes": (break_truncated, "model.safetensors: truncated: .* bytes, .* ends at byte"),
    "cut within the header": (
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:100]),
        "not a complete safetensors file",
    ),
    "empty": (lambda p: (p / "model.safetensors").write_bytes(b""), "not a complete safetensors file"),
    "header is not JSON": (lambda p: break_header(p, lambda h: b"{" * 40), "header is corrupt"),
    "header is a list": (lambda p: break_header(p, lambda h: [1, 2]), "header is corrupt"),
    "header entry without offsets": (
        lambda p: break_header(p, lambda h: h | {NORM: {"dtype": "F32", "shape": [32]}}),
        "header is corrupt",
    ),
    "quantized": (
        lambda p: break_header(p, edit_tensor(NORM, dtype="I8", shape=[128])),
        "norm.weight has dtype I8",
    ),
    "shape against size": (
        lambda p: break_header(p, edit_tensor(NORM, shape=[33])),
        r"do not make the shape \[33\]",
    ),
    "a layer is missing": (
        lambda p: rewrite(p, lambda s: {k: v for k, v in s.items() if ".layers.3." not in k}),
        "no single numbered stack",
    ),
    "no layers": (
        lambda p: rewrite(p, lambda s: {k: v for k, v in s.items() if ".layers." not in k}),
        "no single numbered stack",
    ),
    "gone": (lambda p: (p / "model.safetensors").unlink(), "no .safetensors weights there"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_files_are_named_in_one_line(copied, how):
    path = copied()
    breaker, words = BROKEN[how]
    breaker(path)
    with pytest.raises(FrankenError, match=words) as caught:
        Checkpoint("instruct", path)
    assert str(path) in one_line(caught)


@pytest.mark.parametrize(
    "breaker, words",
    [
        (
            lambda p: (p / "model-00002-of-00003.safetensors").unlink(),
            "model-00002-of-00003.safetensors: the shard is missing .3 shards",
        ),
        (
            lambda p: (p / "model-00002-of-00003.safetensors").write_bytes(b"x" * 50),
            "model-00002-of-00003.safetensors: not a complete",
        ),
        (lambda p: (p / "model.safetensors.index.json").write_text("{"), "not a readable shard index"),
        (lambda p: (p / "model.safetensors.index.json").write_text("[]"), "not a readable shard index"),
        (
            lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
            "not a readable shard index",
        ),
        (lambda p: _lose_a_tensor(p / "model-00001-of-00003.safetensors"), "no shard holds it"),
    ],
)
def test_broken_shards_are_named_in_one_line(copied, breaker, words):
    path = copied(shards=3)
    breaker(path)
    with pytest.raises(FrankenError, match=words) as caught:
        Checkpoint("instruct", path)
    one_line(caught)


def _lose_a_tensor(file):
    state = load_file(file)
    state.pop(sorted(state)[0])
    save_file(state, file)


def test_the_same_weights_under_other_names_are_left_alone(copied):
    path = copied()
    want = Checkpoint("instruct", path)
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, path / "consolidated.safetensors")
    assert Checkpoint("instruct", path).layers == want.layers


def test_description_names_the_content(copied):
    path = copied()
    entry = Checkpoint("instruct", path, "abc").describe()
    file = path / "model.safetensors"
    assert entry["files"]["model.safetensors"] == {
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert entry["revision"] == "abc" and json.dumps(entry)


def test_large_files_are_sampled_and_say_so(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(bytes(range(256)) * 2000)
    sampled = content_hash(file, whole_below=1000)
    assert set(sampled) == {"bytes", "sampled_sha256"}
    data = bytearray(file.read_bytes())
    for where in (0, len(data) - 1):
        changed = data[:]
        changed[where] ^= 1
        file.write_bytes(changed)
        assert content_hash(file, whole_below=1000) != sampled


def test_hub_cache_files_are_named_by_their_own_hash(copied):
    path = copied()
    digest = "0f" * 32
    blob = path.parent / digest
    (path / "model.safetensors").rename(blob)
    (path / "model.safetensors").symlink_to(blob)
    assert Checkpoint("instruct", path).describe()["files"] == {"model.safetensors": {"sha256": digest}}


# ---- the text model among other things ------------------------------------------------------------------


def wrapped_state(tiny_pair, prefix, head="lm_head."):
    """The tiny model's tensors under a wrapper's names."""
    names = {"model.": prefix, "lm_head.": head}
    return {
        next(new + k.removeprefix(old) for old, new in names.items() if k.startswith(old)): v.clone()
        for k, v in tiny_pair("qwen2").states["instruct"].items()
    }


@pytest.mark.parametrize(
    "prefix", ["model.", "language_model.model.", "model.language_model.", "model.text_model."]
)
@pytest.mark.parametrize("head", ["lm_head.", "language_model.lm_head."])
def test_towers_and_projectors_beside_the_text_model_are_left_alone(tiny_pair, tmp_path, prefix, head):
    if head != "lm_head." and not prefix.startswith("language_model."):
        head = "lm_head."
    others = {
        "audio_tower.layers.0.self_attn.q_proj.weight": torch.ones(32, 32),
        "audio_tower.layers.1.self_attn.q_proj.weight": torch.ones(32, 32),
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": torch.ones(3, 3),
        "vision_tower.embeddings.position_ids": torch.arange(4),
        "multi_modal_projector.norm.weight": torch.ones(32),
        "zz.norm.weight": torch.ones(32),
        "a.lm_head.weight": torch.ones(2, 2),
        "model_extra.path.0.weight": torch.ones(2),
    }
    save_file(wrapped_state(tiny_pair, prefix, head) | others, tmp_path / "model.safetensors")
    found, plain = Checkpoint("w", tmp_path), Checkpoint("p", tiny_pair("qwen2").paths["instruct"])
    assert (found.prefix, found.wrapped, plain.wrapped) == (prefix, True, False)
    for ours, theirs in [
        *zip(found.layers, plain.layers, strict=True),
        *((found.outer[part], plain.outer[part]) for part in found.outer),
    ]:
        assert set(ours) == set(theirs)
        assert all(torch.equal(read_tensor(ours[name]), read_tensor(theirs[name])) for name in ours)


def test_a_second_stack_with_an_embedding_is_refused(tiny_pair, tmp_path):
    state = wrapped_state(tiny_pair, "decoder.") | wrapped_state(tiny_pair, "encoder.")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(FrankenError, match="no single numbered stack .*decoder.*encoder"):
        Checkpoint("w", tmp_path)


def test_saved_rotary_tables_are_no_weights(tiny_pair, tmp_path):
    state = wrapped_state(tiny_pair, "model.")
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(6)}
    save_file(state, tmp_path / "model.safetensors")
    assert set(Checkpoint("old", tmp_path).layers[3]) == set(
        Checkpoint("p", tiny_pair("qwen2").paths["instruct"]).layers[3]
    )


@pytest.mark.parametrize(
    "disk, adapted",
    [
        ("language_model.model.", "model.language_model."),
        ("model.language_model.", "model.language_model."),
        ("language_model.model.", "model."),  # trained on the text model alone
    ],
)
def test_only_what_an_adapter_has_for_the_text_model_is_taken(adapter, tiny_pair, disk, adapted):
    _, folder, config, _ = adapter
    place = folder / "wrapped"
    place.mkdir()
    others = {"vision_tower.encoder.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)}
    save_file(wrapped_state(tiny_pair, disk) | others, place / "model.safetensors")
    under, pre = Checkpoint("instruct", place), "base_model.model."
    mine = f"{pre}{adapted}layers.2.self_attn.q_proj.lora_"
    other = f"{pre}model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_"
    state = {
        key + side: torch.ones(2, 32).T.contiguous() if side[0] == "B" else torch.ones(2, 32)
        for key in (mine, other)
        for side in ("A.weight", "B.weight")
    }
    state[f"{pre}model.multi_modal_projector.linear_1.lora_A.weight"] = torch.ones(2, 8)
    write_adapter(folder, config, state)
    made = Adapter("tuned", folder, under)
    assert set(made.low_rank) == {(2, "self_attn.q_proj.weight")} and made.left_out == 3
    write_adapter(folder, config, {k: v for k, v in state.items() if "vision" in k})
    with pytest.raises(FrankenError, match="no LoRA weights for the text model's layers"):
        Adapter("tuned", folder, under)
    for part in ("lm_head.lora_A.weight", f"{adapted}embed_tokens.lora_embedding_A"):
        write_adapter(folder, config, state | {pre + part: torch.ones(2, 32)})
        with pytest.raises(FrankenError, match=f"{part} is not LoRA on a decoder layer"):
            Adapter("tuned", folder, under)


# ---- adapters ----------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny_pair, tmp_path):
    """A well-formed LoRA adapter on layer 2; returns (directory, config, state) for breaking."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
    prefix = "base_model.model.model.layers.2.self_attn.q_proj."
    state = {prefix + "lora_A.weight": torch.randn(2, 32), prefix + "lora_B.weight": torch.randn(32, 2)}
    return Checkpoint("instruct", tiny_pair("llama").paths["instruct"]), tmp_path, config, state


def write_adapter(folder, config, state):
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(state, folder / "adapter_model.safetensors")


def test_adapter_delta(adapter):
    under, folder, config, state = adapter
    write_adapter(folder, config, state)
    made = Adapter("tuned", folder, under)
    a, b = (state[f"base_model.model.model.layers.2.self_attn.q_proj.lora_{s}.weight"] for s in "AB")
    torch.testing.assert_close(made.delta(2, "self_attn.q_proj.weight", torch.device("cpu")), 2 * b @ a)
    assert made.delta(1, "self_attn.q_proj.weight", torch.device("cpu")) is None
    assert made.delta(2, "self_attn.k_proj.weight", torch.device("cpu")) is None
    write_adapter(folder, config | {"use_rslora": True}, state)
    torch.testing.assert_close(
        Adapter("tuned", folder, under).delta(2, "self_attn.q_proj.weight", torch.device("cpu")),
        4 / 2**0.5 * b @ a,
    )


WRONG_ADAPTERS = {
    "DoRA": ({"use_dora": True}, {}, "only plain LoRA"),
    "another method": ({"peft_type": "IA3"}, {}, "only plain LoRA"),
    "trained bias": ({"bias": "all"}, {}, "only plain LoRA"),
    "rank pattern": ({"rank_pattern": {"q_proj": 4}}, {}, "rank_pattern"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": 4}}, {}, "alpha_pattern"),
    "a whole module": (
        {},
        {"base_model.model.lm_head.weight": torch.ones(3, 3)},
        "lm_head.weight is not LoRA",
    ),
    "an embedding": (
        {},
        {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 3)},
        "is not LoRA",
    ),
    "a magnitude": (
        {},
        {"base_model.model.model.layers.2.self_attn.q_proj.lora_magnitude_vector": torch.ones(3)},
        "is not LoRA",
    ),
    "a layer too deep": (
        {},
        {"base_model.model.model.layers.6.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)},
        "layers.6",
    ),
    "half a pair": (
        {},
        {"base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)},
        "layer 1 self_attn.q_proj",
    ),
    "another width": (
        {},
        {"base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)},
        "does not fit",
    ),
    "an unknown module": (
        {},
        {
            "base_model.model.model.layers.2.moe.lora_A.weight": torch.ones(2, 32),
            "base_model.model.model.layers.2.moe.lora_B.weight": torch.ones(32, 2),
        },
        "does not fit",
    ),
    "a beginning taken out of the base": (
        {"init_lora_weights": "pissa_niter_4"},
        {},
        "began as 'pissa_niter_4'",
    ),
    "a beginning that is not known": ({"init_lora_weights": "brand_new"}, {}, "began as 'brand_new'"),
    "layers repeated": ({"layer_replication": [[0, 2], [1, 3]]}, {}, "adapters with layer_replication"),
    "trained tokens": ({"trainable_token_indices": [5]}, {}, "adapters with trainable_token_indices"),
    "a bias of its own": ({"lora_bias": True}, {}, "adapters with lora_bias"),
    "a field that nobody knows": ({"use_something_new": True}, {}, "adapters with use_something_new"),
    "another rank than it says": ({"r": 8}, {}, "the tensors have rank 2, .* says r = 8"),
    "an empty tensor": (
        {},
        {"base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight": torch.zeros(0)},
        "lora_B.weight is empty, as training under DeepSpeed ZeRO-3",
    ),
    "no rank": ({"r": None}, {}, "adapter_config.json"),
    "rank 0": ({"r": 0}, {}, "adapter_config.json"),
}


@pytest.mark.parametrize("how", WRONG_ADAPTERS)
def test_adapters_that_cannot_be_a_source(adapter, how):
    under, folder, config, state = adapter
    fields, tensors, words = WRONG_ADAPTERS[how]
    write_adapter(folder, config | fields, state | tensors)
    with pytest.raises(FrankenError, match=words) as caught:
        Adapter("tuned", folder, under)
    assert str(folder) in one_line(caught)


def test_an_adapter_without_tensors_is_no_source(adapter):
    under, folder, config, _ = adapter
    write_adapter(folder, config, {})
    with pytest.raises(FrankenError, match="no LoRA weights for the text model's layers in it"):
        Adapter("tuned", folder, under)


def test_every_field_of_the_library_is_known_or_asks_nothing(adapter):
    """A config as peft itself writes it, with each field at its default."""
    from peft import LoraConfig

    under, folder, config, state = adapter
    LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert len(written) > 30
    write_adapter(folder, written | {"base_model_name_or_path": "owner/model"}, state)
    made = Adapter("tuned", folder, under)
    assert made.trained_on == made.describe()["trained_on"] == "owner/model" and made.left_out == 0


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_beginnings_that_leave_the_base_as_it_is(adapter, start):
    under, folder, config, state = adapter
    write_adapter(folder, config | {"init_lora_weights": start}, state)
    assert (
        Adapter("tuned", folder, under).delta(2, "self_attn.q_proj.weight", torch.device("cpu")) is not None
    )


def test_adapters_with_missing_files(adapter):
    under, folder, config, state = adapter
    with pytest.raises(FrankenError, match="adapter_config.json"):
        Adapter("tuned", folder, under)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FrankenError, match="adapter_model.safetensors"):
        Adapter("tuned", folder, under)


# ---- the real weights --------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_checkpoint_is_read_to_the_bit(smollm2):
    checkpoint = Checkpoint("instruct", smollm2)
    state = load_file(smollm2 / "model.safetensors")
    assert len(checkpoint.layers) == 30
    for i in (0, 17, 29):
        for name, ref in checkpoint.layers[i].items():
            assert torch.equal(read_tensor(ref), state[f"model.layers.{i}.{name}"])
