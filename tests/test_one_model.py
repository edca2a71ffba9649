"""Runs without a base, and an adapter merged into the instruct side."""

import json

import pytest
import small_battery
import torch
from cli_runs import latest, read
from safetensors.torch import save_file

import run_all
from engine.generation import Engine
from errors import FrankenError
from franken import identity
from runner.cache import cache_dir
from runner.choosing import chosen_suites, make_plans
from runner.pairs import open_pair
from surgery.recipes import splice


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FRANKENMODEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def adapter(tmp_path):
    """A folder with LoRA weights on two layers of the tiny pair."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    rng, tensors = torch.Generator().manual_seed(1), {}
    for layer in (1, 4):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_"
        tensors[name + "A.weight"] = torch.randn(2, 48, generator=rng)
        tensors[name + "B.weight"] = torch.randn(32, 2, generator=rng)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def alone(pair, out, *more):
    """The arguments of a small run with the instruct side alone."""
    arguments = small_battery.arguments(pair, out, *more)
    at = arguments.index("--base")
    return arguments[:at] + arguments[at + 2 :]


def test_without_a_base_everything_runs_that_needs_none(pair, tmp_path, capfd, monkeypatch):
    small_battery.use(monkeypatch)
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from experiments import Experiment\n"
        "from franken import perturb, splice\n"
        "EXPERIMENTS = [Experiment('mine_alone', 'mine', lambda m: perturb(m.model, 0.1, m.seed)),\n"
        "               Experiment('mine_with_base', 'mine', lambda m: splice(m.model, 'base', 0, 2))]\n"
    )
    out = tmp_path / "out"
    assert run_all.main(alone(pair, out, "--experiments-file", str(mine), "--suites", "binary")) == 0
    assert "left out, for want of a source base: mine_with_base" in capfd.readouterr().err
    assert set(read(latest(out))) == {"baseline_instruct", "mine_alone"}
    assert any(
        "mine_with_base" in n for n in json.loads((latest(out) / "manifest.json").read_text())["notes"]
    )


def test_a_source_that_nobody_gave_is_no_base_that_is_left_out(pair, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("runner.replica.open_pair", lambda *args: pytest.fail("loaded"))
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from experiments import Experiment, splice\n"
        "EXPERIMENTS = [Experiment('mine', 'mine', lambda m: splice(m.recipe, 'instrct', 0, 2))]\n"
    )
    assert run_all.main(alone(pair, tmp_path / "out", "--experiments-file", str(mine))) == 1
    assert capfd.readouterr().err == (
        "run_all.py: mine takes layers from instrct, which is not there; see --source; the nearest is"
        " 'instruct'\n"
    )


@pytest.mark.parametrize("name", ["baseline_base", "blend_linear"])
def test_what_needs_a_base_is_refused_by_name_before_anything_is_loaded(
    pair, tmp_path, capfd, monkeypatch, name
):
    monkeypatch.setattr("runner.replica.open_pair", lambda *args: pytest.fail("loaded"))
    assert run_all.main(alone(pair, tmp_path / "out", "--experiments", name)) == 1
    err = capfd.readouterr().err
    assert err == f"run_all.py: {name} takes layers from base, which is not there; see --base\n"


def test_a_sweep_of_base_layers_leaves_nothing_to_run(pair, tmp_path, capfd):
    arguments = alone(pair, tmp_path / "out", "--sweep", "replace", "--no-baseline")
    assert run_all.main(arguments) == 1
    assert "nothing is left to run: replace_0 takes layers from base" in capfd.readouterr().err


def planned(argv, sources):
    args = run_all.parse_arguments(argv)
    return make_plans(args, 24, sources, chosen_suites(args))


def test_which_experiments_need_a_base_is_read_off_their_recipes():
    plans, notes = planned(["--all"], {"instruct"})
    every, _ = planned(["--all"], {"instruct", "base"})
    assert all(plan.recipe.sources == {"instruct"} for plan in plans)
    left = {p.experiment.name for p in every} - {p.experiment.name for p in plans}
    assert {"baseline_base", "blend_linear", "franken_base_first_16"} <= left
    assert all(name in notes[0] for name in left)
    with pytest.raises(FrankenError, match="no_such"):
        planned(["--experiments", "no_such"], {"instruct"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_merged_in_is_the_adapter_as_a_source(pair, adapter, dtype):
    """The checkpoint is float32: in a bfloat16 model either way rounds the sum once."""
    places = {"base": str(pair / "base"), "instruct": str(pair / "instruct"), "device_map": "cpu"}
    places["dtype"] = dtype
    merged = open_pair(**places, instruct_adapter=str(adapter))
    beside = open_pair(**places, extra={"tuned": str(adapter)})
    plain = beside.live.fingerprint()
    whole = identity(6)
    beside.live.apply(splice(whole, "tuned", 0, 6))
    assert merged.live.fingerprint() == beside.live.fingerprint() != plain
    merged.live.apply(splice(whole, "base", 0, 6))
    beside.live.apply(splice(whole, "base", 0, 6))
    assert merged.live.fingerprint() == beside.live.fingerprint()  # the base is as it was
    Engine(merged.live, merged.tokenizer)
    assert merged.sources["instruct_adapter"]["kind"] == "LoRA adapter"
    assert merged.sources["instruct_unmerged"]["path"].endswith("instruct")
    made = list(cache_dir().glob("merged-*"))
    open_pair(**places, instruct_adapter=str(adapter))
    assert len(made) == 1 and list(cache_dir().glob("merged-*")) == made


def test_an_adapter_that_names_another_base_is_said_and_recorded(pair, adapter):
    places = {"instruct": str(pair / "instruct"), "dtype": "float32", "device_map": "cpu"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    for named, said in (("owner/Instruct", 0), ("/home/else/instruct", 0), (None, 0), ("owner/other", 1)):
        changed = config | {"base_model_name_or_path": named}
        (adapter / "adapter_config.json").write_text(json.dumps(changed))
        opened = open_pair(**places, extra={"tuned": str(adapter)})
        assert [n for n in opened.notes if f"says it was trained on {named}" in n] == opened.notes
        assert len(opened.notes) == said and opened.sources["tuned"]["trained_on"] == named
    assert any(
        "trained on owner/other" in n for n in open_pair(**places, instruct_adapter=str(adapter)).notes
    )


def test_an_adapter_that_does_not_fit_is_refused(pair, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(FrankenError, match="only plain LoRA adapters"):
        open_pair(instruct=str(pair / "instruct"), instruct_adapter=str(adapter), device_map="cpu")


def test_a_source_that_no_experiment_uses_is_named_with_its_own_experiments():
    given = ["--source", "russell=x", "--experiments", "placebo_mlp_1"]
    notes = planned(given, {"instruct", "base", "russell"})[1]
    assert len(notes) == 1 and "no" in notes[0] and "russell_whole, russell_early_half" in notes[0]
    _, none = planned([*given, "russell_whole"], {"instruct", "base", "russell"})
    assert none == []
