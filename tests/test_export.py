"""A modified model as a checkpoint: the live model's weights and logits, whole or not at all."""

import json
import os
import shutil
from pathlib import Path

import exports
import pytest
import small_battery
import tiny
import torch
from exports import exporter
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from errors import FrankenError
from runner import commands, export
from runner.export import Chosen, Exporter
from runner.pairs import Located
from surgery.recipes import (
    attenuate,
    blend,
    delete,
    double,
    identity,
    linear,
    parallel,
    permute_units,
    perturb,
    repeat,
    reverse,
    shuffle,
    splice,
    swap,
    with_outer,
)
from surgery.weights import Adapter, Checkpoint

SAME_DEPTH = {
    "identity": lambda r: r,
    "swap": lambda r: swap(r, 0, 4),
    "shuffle": lambda r: shuffle(r, 1),
    "splice": lambda r: splice(r, "base", 1, 3),
    "whole base": lambda r: with_outer(splice(r, "base", 0, 6), "base"),
    "blend": lambda r: blend(r, "base", linear),
    "noise": lambda r: perturb(r, 0.1, 3),
    "permuted": lambda r: permute_units(r, 2),
    "swapped noise on a blend": lambda r: swap(perturb(blend(r, "base", [0.3] * 6), 0.1, 1, [2]), 2, 5),
}
OTHER_DEPTH = {
    "delete": lambda r: delete(r, 2, 3),
    "repeat": lambda r: repeat(r, 1, 4),
    "double": lambda r: double(r, 0, 6),
    "repeat of noise": lambda r: repeat(perturb(r, 0.1, 0, [3]), 2, 5, 3),
    "reverse": lambda r: reverse(delete(r, 5, 6), 0, 4),
}


def loaded(folder: Path):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def check_same_model(pair: tiny.Tiny, recipe, folder: Path) -> None:
    """The exported checkpoint, run by transformers, against the live model, run by the engine."""
    live = pair.live()
    live.apply(recipe)
    done = exporter(pair).write(Chosen("mine", recipe), folder)
    assert done.fingerprint == live.fingerprint()
    model, prompt = loaded(folder), tiny.random_prompt(5, 12)
    assert model.config.num_hidden_layers == len(recipe)
    torch.testing.assert_close(
        tiny.hf_logits(model, prompt), tiny.engine_logits(pair.engine(live), prompt), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", [*SAME_DEPTH, *OTHER_DEPTH])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_exported_model_is_the_live_one(tiny_pair, tmp_path, family, name):
    pair = tiny_pair(family)
    check_same_model(pair, {**SAME_DEPTH, **OTHER_DEPTH}[name](identity(pair.n)), tmp_path / "out")


@pytest.mark.parametrize("family", tiny.ALTERNATE)
@pytest.mark.parametrize("name", ["swap", "delete", "repeat", "reverse"])
def test_attention_kinds_follow_their_layers(tiny_pair, tmp_path, family, name):
    pair = tiny_pair(family)
    recipe = {**SAME_DEPTH, **OTHER_DEPTH, "swap": lambda r: swap(r, 0, 3)}[name](identity(pair.n))
    check_same_model(pair, recipe, tmp_path / "out")
    before, now = pair.config.layer_types, AutoConfig.from_pretrained(tmp_path / "out").layer_types
    assert now == [before[slot.mix[0][0].layer] for slot in recipe.slots] and now != before[: len(now)]


def test_every_tensor_of_a_repeat_is_its_layers(tiny_pair, tmp_path):
    pair = tiny_pair("qwen2")
    exporter(pair, None).write(Chosen("mine", repeat(identity(6), 1, 3)), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for position, layer in enumerate([0, 1, 2, 1, 2, 3, 4, 5]):
        for name, tensor in pair.layer("instruct", layer).items():
            assert torch.equal(written.pop(f"model.layers.{position}.{name}"), tensor)
    assert set(written) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_an_adapters_layers_are_written_out(tiny_pair, tmp_path):
    pair = tiny_pair("qwen2")
    under = Checkpoint("instruct", pair.paths["instruct"])
    made = Adapter("mine", tiny.make_adapter(pair.paths["instruct"], tmp_path / "adapter"), under)
    recipe = splice(identity(6), "mine", 2, 4)
    live = pair.live(mine=made)
    live.apply(recipe)
    done = exporter(pair, mine=made).write(Chosen("mine", recipe), tmp_path / "out")
    assert done.fingerprint == live.fingerprint()


def test_numbers_that_are_only_copied_keep_their_dtype(tmp_path):
    pair = tiny.Tiny(tmp_path, "qwen2", dtype=torch.bfloat16)
    copied = exporter(pair, None).write(Chosen("mine", swap(identity(6), 1, 2)), tmp_path / "copied")
    computed = exporter(pair, None).write(Chosen("mine", perturb(identity(6), 0.1, 0)), tmp_path / "computed")
    assert (copied.dtype, computed.dtype) == (torch.bfloat16, torch.float32)
    assert AutoConfig.from_pretrained(tmp_path / "copied").dtype == torch.bfloat16


def test_shards_hold_at_most_what_was_said_and_every_tensor_once(tiny_pair, tmp_path):
    pair, out = tiny_pair("qwen2"), tmp_path / "out"
    most = 60_000
    done = exporter(pair).write(Chosen("mine", identity(6)), out, shard_bytes=most)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert len(shards) == done.files > 2
    assert {n: f for f, tensors in shards.items() for n in tensors} == index["weight_map"]
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in shards.values()]
    assert max(sizes) <= most and sum(sizes) == index["metadata"]["total_size"]
    prompt = tiny.random_prompt(1, 8)
    assert torch.equal(
        tiny.hf_logits(loaded(out), prompt), tiny.hf_logits(loaded(pair.paths["instruct"]), prompt)
    )


def test_tokenizer_template_and_stops_come_along(tiny_pair, tmp_path):
    pair, out = tiny_pair("llama"), tmp_path / "out"
    exporter(pair).write(Chosen("mine", identity(6)), out)
    messages = [{"role": "user", "content": "Is something wrong with you?"}]
    before, after = (AutoTokenizer.from_pretrained(path) for path in (pair.paths["instruct"], out))
    assert before.apply_chat_template(messages) == after.apply_chat_template(messages)
    assert GenerationConfig.from_pretrained(out).eos_token_id in (3, [3])


def test_the_card_and_the_record_say_what_it_was_made_of(tiny_pair, tmp_path):
    pair, out = tiny_pair("llama"), tmp_path / "out"
    recipe = splice(identity(6), "base", 0, 2)
    what = Chosen("mine", recipe, "[0:2] <- base", "a \x1b[31mred\nherring <script>`")
    done = exporter(pair).write(what, out, provenance={"commit": "abc"})
    record, card = json.loads((out / "frankenmodel.json").read_text()), (out / "README.md").read_text()
    assert record["recipe"] == recipe.to_json() and record["fingerprint"] == done.fingerprint
    assert set(record["sources"]) == {"instruct", "base"} and record["commit"] == "abc"
    assert "sha256" in card and done.fingerprint in card and json.dumps(recipe.to_json()) in card
    assert "\x1b" not in card and "<script>" not in card


# ---- refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (repeat(identity(6), 1, 3, scale=0.5), "position 3 contributes 0.5"),
        (attenuate(identity(6), 0.5, 2, 4), "position 2 contributes 0.5"),
        (parallel(identity(6), 1, 3), "parallel layers"),
    ],
)
def test_what_weights_cannot_say_is_refused_by_name(recipe, words):
    with pytest.raises(FrankenError, match=f"mine cannot be a checkpoint.*{words}"):
        export.refuse_inexpressible("mine", recipe, None, None)


def test_two_models_in_one_conversation_are_no_checkpoint():
    with pytest.raises(FrankenError, match="mine.*phases"):
        export.refuse_inexpressible("mine", identity(6), ("binary", "phases"), None)


@pytest.fixture
def command(pair, tmp_path, capsys):
    """command(...) -> (exit status, stdout, stderr) of `franken.py` on the small pair."""

    def run(name, *words, to="out"):
        model = ["--base", pair / "base", "--instruct", pair / "instruct", "--device-map", "cpu"]
        capsys.readouterr()
        code = commands.main([*map(str, ["export", name, tmp_path / to, *model, *words])])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("parallel_16_48", "parallel layers"),
        ("double_24_40_half", "contributes 0.5"),
        ("concept_injection", "activations"),
        ("swap_distnat_10_55", "the nearest is 'swap_distant_10_55'"),
    ],
)
def test_a_refusal_is_one_line_before_anything_is_loaded(command, tmp_path, monkeypatch, name, words):
    monkeypatch.setattr("runner.pairs.open_sources", lambda *a: pytest.fail("something was opened"))
    code, out, err = command(name)
    assert code == 1 and out == "" and len(err.splitlines()) == 1 and words in err, err
    assert err.startswith("franken.py: ") and not (tmp_path / "out").exists()


def test_a_missing_base_is_named_before_anything_is_loaded(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("runner.pairs.open_sources", lambda *a: pytest.fail("something was opened"))
    words = ["export", "baseline_base", str(tmp_path / "out"), "--instruct", str(pair / "instruct")]
    assert commands.main(words) == 1
    assert "takes layers from base, which is not there" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_left_alone(command, tmp_path):
    (tmp_path / "out").mkdir()
    assert command("baseline_instruct")[0] == 0  # an empty one is taken
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    code, _, err = command("swap_adjacent_31_32")
    assert code == 1 and "--overwrite replaces an earlier export" in err
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    assert command("swap_adjacent_31_32", "--overwrite")[0] == 0
    assert (
        json.loads((tmp_path / "out" / "frankenmodel.json").read_text())["experiment"]
        == "swap_adjacent_31_32"
    )


def test_overwrite_takes_an_export_only(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    code, _, err = command("baseline_instruct", "--overwrite")
    assert code == 1 and "was not written by export" in err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_an_export_does_not_take_the_place_of_what_it_is_made_of(command, tmp_path, capsys):
    """Swapped twice in place would be the original, under the name of a swap, and nothing else left."""
    assert command("swap_adjacent_31_32")[0] == 0
    made = tmp_path / "out"
    (tmp_path / "link").symlink_to(made)
    before = {f.name: f.read_bytes() for f in made.iterdir()}
    for source in (made, tmp_path / "link"):
        words = ["export", "swap_adjacent_31_32", str(made), "--instruct", str(source), "--overwrite"]
        capsys.readouterr()
        assert commands.main([*words, "--device-map", "cpu"]) == 1
        assert "holds instruct, which is read; export to another folder" in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in made.iterdir()} == before


def test_a_measured_result_can_be_exported_by_its_file(command, finished, tmp_path):
    assert command(finished / "experiments" / "perturb_all_5pct.json", "--dtype", "float32")[0] == 0
    record = json.loads((tmp_path / "out" / "frankenmodel.json").read_text())
    result = json.loads((finished / "experiments" / "perturb_all_5pct.json").read_text())
    assert record["fingerprint"] == result["weights"]["modified"]


# ---- whole or not at all -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_leaves_nothing(command, tmp_path, monkeypatch, error):
    left = 20
    whole = export.tensor_hash

    def failing(tensor):
        nonlocal left
        left -= 1
        if not left:
            raise error
        return whole(tensor)

    monkeypatch.setattr(export, "tensor_hash", failing)
    before = set(tmp_path.iterdir())
    code, _, err = command("swap_adjacent_31_32")
    assert code == (1 if isinstance(error, OSError) else 130) and "Traceback" not in err
    assert set(tmp_path.iterdir()) == before


def test_a_disk_without_room_is_told_before_anything_is_written(command, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    code, _, err = command("swap_adjacent_31_32")
    assert code == 1 and "has 0.0 GiB free" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("where", "after"), [("tensor_hash", 30), ("model_card", 1), ("_put", 1)])
def test_what_a_killed_export_leaves_cannot_be_loaded_and_goes_next_time(
    command, pair, tmp_path, where, after
):
    model = ["--base", pair / "base", "--instruct", pair / "instruct", "--device-map", "cpu"]
    words = [*map(str, ["export", "swap_adjacent_31_32", tmp_path / "out", *model])]
    child = small_battery.forked(exports.killed_at, where, after, words)
    child.join(60)
    assert child.exitcode == -9
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.glob(".making-*")
    if where != "_put":  # by then it is whole, and only its name is missing
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(left / "checkpoint")
    assert command("swap_adjacent_31_32")[0] == 0
    assert not list(tmp_path.glob(".making-*"))


def test_memory_is_bounded_by_a_few_layers(tmp_path):
    wide = dict(family="qwen2", layers=24, hidden_size=256, intermediate_size=1024)
    for k, name in enumerate(("instruct", "base")):
        tiny.write_checkpoint(tmp_path / name, seed=k, **wide)
    child = small_battery.forked(exports.measured, tmp_path, 24)
    child.join(120)
    assert child.exitcode == 0
    whole = os.stat(tmp_path / "out" / "model.safetensors").st_size
    more = int((tmp_path / "grown").read_text()) << 10
    assert whole > 90e6 and more < whole / 4, (whole, more)


# ---- on real weights ---------------------------------------------------------------------------------------


@pytest.mark.real
def test_a_real_model_with_repeated_layers_gives_the_live_ones_logits(smollm2, tmp_path):
    from runner.pairs import open_pair

    opened = open_pair(instruct=str(smollm2), dtype="float32", device_map="cpu")
    recipe = repeat(swap(opened.live.original, 3, 20), 10, 14)
    opened.live.apply(recipe)
    here = Located(smollm2, opened.live.config, opened.live.sources, [], {})
    made = Exporter(here, torch.float32, torch.float32, torch.device("cpu"))
    done = made.write(Chosen("mine", recipe), tmp_path / "out", shard_bytes=200_000_000)
    assert done.fingerprint == opened.live.fingerprint() and done.files > 1
    ids = opened.tokenizer("The mill stood by the river, and the ferry")["input_ids"]
    from engine.generation import Engine

    engine = Engine(opened.live, opened.tokenizer, opened.stop_ids)
    torch.testing.assert_close(
        tiny.hf_logits(loaded(tmp_path / "out"), ids), tiny.engine_logits(engine, ids), rtol=1e-3, atol=2e-3
    )


def test_an_experiments_own_suites_decide_whether_it_is_one_model(tmp_path, pair, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from experiments import Experiment, swap\n"
        "EXPERIMENTS = [Experiment('mine', 'g', lambda m: swap(m.recipe, 1, 2), suites=('phases',))]\n"
    )
    words = ["export", "mine", tmp_path / "out", "--instruct", pair / "instruct", "--experiments-file", mine]
    assert commands.main([*map(str, words)]) == 1
    assert "phases" in capsys.readouterr().err
