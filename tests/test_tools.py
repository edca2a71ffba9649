"""What users take elsewhere, from one run on the real 135M weights: table, logs, hub, harness, checkpoint."""

import json
import os

import huggingface_hub
import pytest
import small_battery
from cli_runs import latest, read
from harness_tasks import alone, write_tasks
from hub_server import hub_stand_in

import report
import run_all
from runner import commands

NAME, LIMIT = "swap_distant_10_55", 4
MODEL = ["--pair", "smollm2-135m", "--device-map", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def made(smollm2, tmp_path_factory):
    """(the run's folder, its tasks, the stand-in of the hub that was sent everything)."""
    folder = tmp_path_factory.mktemp("tools")
    tasks = write_tasks(tmp_path_factory.mktemp("tasks"))
    with pytest.MonkeyPatch.context() as patch, hub_stand_in() as hub:
        small_battery.use(patch)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("HF_TOKEN", hub.token)
        words = [*MODEL, "--output", str(folder), "--experiments", NAME, "--suites", "binary,perplexity"]
        words += ["--lm-eval", "mill_choice,mill_words", "--include-path", str(tasks), "--limit", str(LIMIT)]
        words += ["--inspect-log", "--log", "tensorboard", "--push", "me/runs"]
        assert run_all.main(words) == 0
    return latest(folder), tasks, hub


PACKAGES = ("lm_eval", "inspect_ai", "tensorboard", "pyarrow")
pytestmark = [pytest.mark.real, pytest.mark.timeout(600), *(pytest.mark.extra(name) for name in PACKAGES)]


def test_lm_eval_gives_what_it_gives_alone_of_the_exported_checkpoint(made, tmp_path):
    run, tasks, _ = made
    words = ["export", NAME, str(tmp_path / "out"), *MODEL]
    assert commands.main(words) == 0
    theirs = alone(tasks, tmp_path / "out", LIMIT)
    ours = read(run)[NAME]["measurements"]["lm_eval"]["results"]
    assert set(ours) == {"mill_choice", "mill_words"}
    for task, metrics in ours.items():
        for name, value in metrics.items():
            assert value == pytest.approx(theirs[task][f"{name},none"], rel=1e-4), (task, name)
    baseline = read(run)["baseline_instruct"]["measurements"]["lm_eval"]["results"]
    assert baseline["mill_words"] != ours["mill_words"]


def test_the_table_has_every_reading(made, tmp_path):
    import pyarrow.parquet

    run, results = made[0], read(made[0])
    assert report.main([str(run), "--table", str(tmp_path / "run.parquet")]) == 0
    rows = pyarrow.parquet.read_table(tmp_path / "run.parquet").to_pylist()
    for name, result in results.items():
        probes = {p["id"]: p["log_odds"] for p in result["measurements"]["binary"]["probes"]}
        mine = [row for row in rows if row["experiment"] == name and row["suite"] == "binary"]
        assert probes and {row["probe"]: row["log_odds"] for row in mine} == probes
    experiments = pyarrow.parquet.read_table(tmp_path / "run.experiments.parquet").to_pylist()
    for row in experiments:
        measured = results[row["name"]]["measurements"]
        assert row["perplexity.perplexity"] == measured["perplexity"]["perplexity"]
        assert row["lm_eval.mill_choice.acc"] == measured["lm_eval"]["results"]["mill_choice"]["acc"]


def test_inspect_reads_every_answer(made):
    from inspect_ai.log import read_eval_log

    run = made[0]
    for name, result in read(run).items():
        log = read_eval_log(str(run / "inspect" / f"{name}.eval"))
        assert log.status == "success" and log.samples
        asked = {sample.id for sample in log.samples}
        assert all(any(p["id"] in str(i) for i in asked) for p in result["measurements"]["binary"]["probes"])


def test_tensorboard_has_each_experiments_numbers(made):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(made[0] / "tensorboard"))
    events.Reload()
    expected = [result["measurements"]["perplexity"]["perplexity"] for result in in_order(made[0])]
    assert [point.value for point in events.Scalars("perplexity")] == pytest.approx(expected)
    assert len(events.Scalars("lm_eval/mill_choice/acc")) == len(expected)


def test_the_hub_has_every_file_as_it_is_here(made):
    run, _, hub = made
    here = {f"{run.name}/{path.relative_to(run)}": path for path in run.rglob("*") if path.is_file()}
    sent = {name: path.read_bytes() for name, path in here.items() if name in hub.files}
    assert sent == hub.files and f"{run.name}/experiments/{NAME}.json" in sent
    lacking = {os.path.basename(name) for name in set(here) - set(sent)}
    assert all(name.startswith(".") or "tfevents" in name for name in lacking), lacking


def in_order(run) -> list[dict]:
    """Results in the order in which they were measured."""
    names = json.loads((run / "manifest.json").read_text())["experiments"]
    return [read(run)[name] for name in names]
