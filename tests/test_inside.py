"""The sections and files about what activations tell, on a made-up run's folder."""

import json
import shutil

import made_results as made
import numpy as np
import pytest

from errors import FrankenError
from experiments import BASELINE
from reporting import figures, inside
from reporting.digests import compared, digests
from reporting.reports import write_reports
from runner.arrays import save_arrays
from runner.results import Run
from suites.activations import packed
from surgery import recipes as r

DEPTH, WIDTH = 3, 24
CHANGES = {
    "noise": lambda m, k: r.perturb(m, 0.1 + k / 100, k),
    "order": lambda m, k: r.swap(m, k % 3, (k + 1) % 3),
    "splice": lambda m, k: r.splice(m, "base", k % 3, k % 3 + 1),
    "mlp": lambda m, k: r.permute_units(m, k, "mlp"),
    "heads": lambda m, k: r.permute_units(m, k, "heads"),
}


def apart(folder):
    """(run, manifest, results, comparison) of a run whose changed models stand apart after layers 1 and 2,
    and answer as the unmodified one does; one of them is broken, and has no finite activations."""
    rng, original, results = np.random.default_rng(0), r.identity(DEPTH), []
    (folder / "run" / "experiments").mkdir(parents=True)
    names = [BASELINE, *(f"{kind}_{k}" for kind in CHANGES for k in range(3)), "noise_broken"]
    for name in names:
        kind, _, k = name.partition("_")
        recipe = CHANGES[kind](original, int(k)) if k.isdigit() else original
        if name == "noise_broken":
            recipe = r.perturb(original, 4.0, 9)
        placebo = kind in ("mlp", "heads")
        states = rng.normal(size=(DEPTH, WIDTH)).astype(np.float32)
        states[1:, :4] += 6.0 * (recipe != original and not placebo)
        if name == "noise_broken":
            states[0] = np.nan
        mean, scale = packed(states)
        measured = {
            "binary": made.binary(mass=None if name == "noise_broken" else 0.8),
            "activations": {
                "layers": DEPTH,
                "hidden": WIDTH,
                "probes": 20,
                "single_layers": [],
                "single_probes": [],
                "finite": name != "noise_broken",
                "arrays": {"mean": mean, "mean_scale": scale},
            },
        }
        one = made.result(name, measured, experiment__recipe=recipe.to_json(), schema_version=2)
        one["experiment"]["control"] = "placebo" if placebo else None
        save_arrays(folder / "run" / "experiments", one)
        results.append(one)
    moved = folder / "moved"
    run, manifest = made.make(moved, results, layers=DEPTH)
    for file in (folder / "run" / "experiments").iterdir():
        file.rename(run.path / "experiments" / file.name)
    made_of = digests(run, manifest)
    return run, manifest, made_of, compared(run, manifest, made_of)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """Such a run and what is probed of it, which takes seconds; nothing is written to it."""
    kept = apart(tmp_path_factory.mktemp("inside"))
    run, manifest, results, comparison = kept
    return kept, inside.probed(run, results, comparison, manifest)


def test_represented_and_not_reported(probed):
    (run, *_), data = probed
    assert data["left_out"] == ["noise_broken"]
    assert data["probe"]["n_changed"] == 9 and data["probe"]["n_placebo"] == 7
    assert data["probe"]["kinds"] == {"noise": 3, "order": 3, "splice": 3}
    values = [one["value"] for one in data["probe"]["curve"]]
    assert values[0] < 0.8 and min(values[1:]) > 0.9 and data["probe"]["null"]["p_value"] < 0.05
    text = "\n".join(inside.probe_section(data))
    assert "9 changed models of 3 kinds from 7 unchanged ones" in text
    assert "it is represented, and not reported." in text and "## What is there to be read" in text
    assert json.loads((run.path / "probe.json").read_text()) == data
    figure = inside.depth_figure(inside.on_disk(run))
    assert figures.save(figure, ("png",))["png"].startswith(b"\x89PNG")


def test_the_probe_is_not_made_again_and_outlives_the_activations(probed, tmp_path, monkeypatch):
    (original, manifest, results, comparison), data = probed
    run, results = Run(shutil.copytree(original.path, tmp_path / "run")), dict(results)
    monkeypatch.setattr(inside.probe, "probe", lambda *a, **k: 1 / 0)
    assert inside.probed(run, results, comparison, manifest) == data
    for file in run.path.glob("experiments/*.npz"):
        file.unlink()
    assert inside.probed(run, results, comparison, manifest) == data
    del results["order_1"]
    told = inside.probed(run, results, comparison, manifest)
    assert told == data | {"stale": True}
    assert any("made of other results" in line for line in inside.probe_section(told))
    (run.path / "probe.json").unlink()
    assert inside.probed(run, results, comparison, manifest) is None
    assert inside.probe_section(None) == [] and inside.depth_figure(None) is None


def test_what_cannot_be_read_again_stands_in_the_summary(tmp_path):
    """As the committed runs are kept: neither activations nor probe.json."""
    run, *_ = apart(tmp_path)
    summary = run.path / "summary.md"
    write_reports(run)
    whole = summary.read_text()
    assert inside.READ in whole and whole.count("\n## ") > 1
    for file in [*run.path.glob("experiments/*.npz"), run.path / "probe.json"]:
        file.unlink()
    write_reports(run)
    assert summary.read_text() == whole
    summary.unlink()
    write_reports(run)
    assert inside.READ not in summary.read_text()


def test_activations_of_another_run_are_refused(tmp_path):
    run, manifest, results, comparison = apart(tmp_path)
    files = sorted(run.path.glob("experiments/*.npz"))
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(FrankenError, match="is not the file that its experiment wrote"):
        inside.probed(run, results, comparison, manifest)


def test_a_run_without_activations_has_no_probe(tmp_path):
    run, manifest = made.make(
        tmp_path / "run", [made.result(BASELINE, {"binary": made.binary()}, schema_version=2)]
    )
    kept = digests(run, manifest)
    assert inside.probed(run, kept, compared(run, manifest, kept), manifest) is None
    assert inside.phases_section(run, []) == [] and not (run.path / "phases.json").exists()
