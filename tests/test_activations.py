"""Hidden states at the answer position against transformers' own, and the file that they are kept in."""

import hashlib
import json

import cli_runs
import jsonschema
import numpy as np
import pytest
import small_battery
import tiny
import torch

import prompts
from engine.generation import Engine
from errors import FrankenError
from runner import results
from runner.arrays import load_arrays, save_arrays
from suites import activations
from suites.base import Protocol
from surgery import recipes as r


@torch.no_grad()
def slow_states(model, ids) -> np.ndarray:
    """[layers, hidden] at the last token: the output of every decoder layer, by hooks."""
    outputs = []
    hooks = [
        layer.register_forward_hook(
            lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in model.model.layers
    ]
    model(torch.tensor([list(ids)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([out[0, -1] for out in outputs]).numpy()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_states_are_those_after_every_running_layer(tmp_path, family):
    pair = tiny.Tiny(tmp_path, family)
    engine = pair.engine()
    engine.live.apply(r.repeat(r.swap(engine.live.original, 0, 1), 1, 3, 2))
    model = pair.rebuilt([("instruct", k) for k in (1, 0, 2, 0, 2, 3, 4, 5)])
    common = tiny.random_prompt(1, 90)  # long enough to be computed once
    asked = [common + tiny.random_prompt(k, 3 + k) for k in range(2, 5)] + [tiny.random_prompt(9, 12)]
    found = activations.answer_states(engine, asked)
    want = np.stack([slow_states(model, ids) for ids in asked], axis=1)
    assert found.shape == (8, 4, 32)
    np.testing.assert_allclose(found, want, atol=2e-4, rtol=2e-4)


def test_packing_keeps_any_size_and_what_is_not_finite():
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(4, 50)) * np.array([[1e-6], [1.0], [1e6], [0.0]])).astype(np.float32)
    packed, scale = activations.packed(values)
    assert packed.dtype == np.float16 and scale.dtype == np.float32
    largest = np.abs(values).max(1, keepdims=True)
    assert (np.abs(activations.unpacked(packed, scale) - values) <= largest * 2**-11).all()
    values[1, 3], values[2, 4] = np.nan, np.inf
    again = activations.unpacked(*activations.packed(values))
    assert not np.isfinite(again[1]).all() and not np.isfinite(again[2]).all() and np.isfinite(again[0]).all()


def test_a_file_of_the_studys_size_stays_under_200_kb(tmp_path, monkeypatch):
    """28 layers of width 1536, as incompressible as numbers can be."""
    states = np.random.default_rng(0).normal(size=(28, len(prompts.BINARY_PROBES), 1536)).astype(np.float32)
    monkeypatch.setattr(activations, "answer_states", lambda engine, asked: states)

    class Spoken:
        def chat_ids(self, messages):
            return (1,)

    measured = activations.Activations().measure(Spoken(), Protocol(), [])
    result = {"experiment": {"name": "x"}, "measurements": {"activations": measured}}
    save_arrays(tmp_path, result)
    assert (tmp_path / "x.npz").stat().st_size < 200_000
    held = load_arrays(tmp_path, "activations", measured)
    np.testing.assert_allclose(
        activations.unpacked(held["mean"], held["mean_scale"]), states.mean(1), atol=1e-3
    )
    layers = measured["single_layers"]
    assert layers == [6, 13, 20, 27] and len(measured["single_probes"]) == 8
    single = activations.unpacked(held["single"].reshape(32, -1), held["single_scale"].reshape(-1))
    np.testing.assert_allclose(
        single, states[layers][:, activations.single_probes(160)].reshape(32, -1), atol=2e-3
    )


def test_a_run_keeps_a_file_beside_each_experiment(go, tmp_path, monkeypatch):
    small_battery.use(monkeypatch)
    code, _, err = go("--experiments", "delete_30_34", "--suites", "perplexity", "--also", "activations")
    assert code == 0, err
    run = cli_runs.latest(tmp_path / "out")
    for name, result in cli_runs.read(run).items():
        jsonschema.validate(result, results.SCHEMA)
        measured = result["measurements"]["activations"]
        assert measured["layers"] == (5 if name == "delete_30_34" else 6) and measured["finite"]
        data = (run / "experiments" / measured["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == measured["sha256"]
        held = load_arrays(run / "experiments", "activations", measured)
        assert held["mean"].shape == (measured["layers"], 32) and held["mean"].dtype == np.float16
    kept = run / "experiments" / "delete_30_34.npz"
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    measured = cli_runs.read(run)["delete_30_34"]["measurements"]["activations"]
    with pytest.raises(FrankenError, match="is not the file that its experiment wrote"):
        load_arrays(run / "experiments", "activations", measured)
    kept.unlink()
    assert load_arrays(run / "experiments", "activations", measured) is None


def test_a_broken_model_is_a_result(tmp_path, monkeypatch):
    small_battery.use(monkeypatch)
    engine = Engine(tiny.Tiny(tmp_path, "llama").live(), small_battery.tokenizer())
    engine.live.layers[2].tensors["mlp.down_proj.weight"].fill_(float("nan"))
    measured = activations.Activations().measure(engine, Protocol(), [])
    arrays = measured.pop("arrays")
    json.dumps(measured, allow_nan=False)
    assert (
        not measured["finite"]
        and np.isfinite(arrays["mean"][:2]).all()
        and np.isnan(arrays["mean"][2:]).all()
    )
