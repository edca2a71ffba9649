"""Trackers, the hub and Inspect logs: told of every experiment, and never at a run's cost."""

import json
import sys
import time
from types import ModuleType, SimpleNamespace

import huggingface_hub
import made_results as made
import pytest
import small_battery
from cli_runs import FOUR, latest, refused
from hub_server import hub_stand_in

import report
from reporting import followers
from reporting.followers import Followers, Hub, Tracker, numbers
from runner.results import Run

EXPERIMENTS = [*FOUR[:2], "--suites", "quick"]  # the baseline and one more


@pytest.fixture
def run(tmp_path):
    results = [made.result("baseline_instruct", made.everything()), made.result("odd", made.everything())]
    return made.make(tmp_path / "run_x", [*results, made.result("broken")])


@pytest.fixture
def hub(monkeypatch):
    """A local stand-in for the hub, which huggingface_hub is pointed to, and does not wait between tries."""
    no_waiting = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", no_waiting)
    with hub_stand_in() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


# ---- the hub -----------------------------------------------------------------------------------------------


def test_a_runs_folder_is_on_the_hub_after_every_experiment(go, hub, tmp_path, monkeypatch):
    small_battery.use(monkeypatch)
    code, _, err = go(*EXPERIMENTS, "--push", "me/runs")
    assert code == 0, err
    folder = latest(tmp_path / "out")
    titles = [title for title, _ in hub.commits]
    assert titles[0].endswith("the manifest") and titles[-1].endswith("the report")
    for name in ("baseline_instruct", "swap_adjacent_30_35"):
        (number,) = [k for k, title in enumerate(titles) if title == f"{folder.name}: {name}"]
        assert f"{folder.name}/experiments/{name}.json" in hub.commits[number][1]
    for path, content in hub.files.items():
        assert (folder.parent / path).read_bytes() == content
    assert {f"{folder.name}/manifest.json", f"{folder.name}/summary.md"} <= set(hub.files)
    assert hub.private is True and hub.token not in (folder / "manifest.json").read_text()


def test_a_hub_that_is_down_costs_nothing_and_is_told_without_the_token(run, hub, tmp_path):
    said: list[str] = []
    told = Followers([Hub("me/runs")], said.append)
    hub.down = True
    told.tell(lambda who: who.begin(*run))
    assert "the run goes on" in said[0] and hub.token not in said[0] and len(said[0].splitlines()) == 1
    assert told.failed
    hub.down = False
    told.tell(lambda who: who.experiment(run[0].load("odd")))
    assert not told.failed and "run_x/experiments/odd.json" in hub.files


def test_a_run_whose_last_push_failed_ends_with_a_line_and_a_status(go, hub, monkeypatch):
    small_battery.use(monkeypatch)
    hub.down = True
    code, _, err = go(*EXPERIMENTS, "--push", "me/runs")
    assert code == 1 and "push failed in the end" in err and hub.token not in err


@pytest.mark.parametrize(
    ("repository", "token", "words"),
    [
        ("runs", "hf_secret", "form USER/NAME"),
        ("me/runs", "", "set HF_TOKEN"),
        ("me/runs", "wrong", "--push me/runs"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_loading(go, hub, monkeypatch, repository, token, words):
    monkeypatch.setattr("runner.replica.open_pair", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token or None)
    result = go(*EXPERIMENTS, "--push", repository)
    refused(result, words)
    assert "wrong" not in result[2]


# ---- trackers ----------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """Stand-ins of trackio and wandb that note what they are told."""
    notes: list[tuple] = []
    for name in ("trackio", "wandb"):
        module = ModuleType(name)
        module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec(name, None)
        module.init = lambda **settings: notes.append(("init", settings))
        module.log = lambda values: notes.append(("log", values))
        module.finish = lambda: notes.append(("finish",))
        monkeypatch.setitem(sys.modules, name, module)
    return notes


@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_a_tracker_is_told_each_experiments_numbers_and_the_verdicts(run, recorded, kind):
    told = Followers([Tracker(kind)])
    told.tell(lambda who: who.begin(*run))
    for name in ("baseline_instruct", "odd", "broken"):
        told.tell(lambda who, name=name: who.experiment(run[0].load(name)))
    comparison = {"experiments": [{"name": "odd", "verdict": {"word": "reports it"}, "detection": None}]}
    told.tell(lambda who: who.end(comparison))
    assert not told.failed
    assert recorded[0][1]["project"] == "frankenmodel" and recorded[0][1]["name"] == "run_x"
    logged = [values for what, *rest in recorded if what == "log" for values in rest]
    assert [v.get("experiment") for v in logged] == ["baseline_instruct", "odd", "broken", None]
    measured = run[0].load("odd")["measurements"]
    assert logged[1]["perplexity"] == measured["perplexity"]["perplexity"]
    own = [p["log_odds"] for p in measured["binary"]["probes"] if p["kind"] == "introspective"]
    assert logged[1]["introspective_log_odds"] == pytest.approx(sum(own) / len(own))
    assert logged[2]["status"] == "failed" and "perplexity" not in logged[2]
    assert logged[3] == {"final/experiment": "odd", "final/verdict": "reports it"}
    assert recorded[-1] == ("finish",)


def test_numbers_are_finite(run):
    result = run[0].load("odd")
    result["measurements"]["perplexity"]["perplexity"] = float("inf")
    result["measurements"]["capability"]["score"] = None
    assert {"perplexity", "capability"}.isdisjoint(numbers(result))


def test_a_tracker_that_is_not_installed_is_named_before_loading(go, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    refused(go(*EXPERIMENTS, "--log", "trackio"), "pip install trackio")


@pytest.mark.extra("tensorboard")
def test_tensorboard_reads_back_what_was_written(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = Followers([Tracker("tensorboard")])
    told.tell(lambda who: who.begin(*run))
    told.tell(lambda who: who.experiment(run[0].load("odd")))
    told.tell(lambda who: who.end(None))
    assert not told.failed, told.failed
    events = EventAccumulator(str(run[0].path / "tensorboard"))
    events.Reload()
    (point,) = events.Scalars("perplexity")
    assert point.value == pytest.approx(run[0].load("odd")["measurements"]["perplexity"]["perplexity"])


@pytest.mark.extra("trackio")
def test_trackio_keeps_what_was_logged(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    told = Followers([Tracker("trackio")])
    told.tell(lambda who: who.begin(*run))
    told.tell(lambda who: who.experiment(run[0].load("odd")))
    told.tell(lambda who: who.end(None))
    assert not told.failed, told.failed


# ---- Inspect -----------------------------------------------------------------------------------------------


def test_without_inspect_it_says_what_to_install(go, run, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    refused(go(*EXPERIMENTS, "--inspect-log"), "pip install inspect-ai")
    assert report.main([str(run[0].path), "--inspect-log"]) == 1
    assert "pip install inspect-ai" in capfd.readouterr().err


@pytest.mark.extra("inspect_ai")
def test_every_question_reply_and_score_is_read_back_by_inspects_own_library(tmp_path):
    from inspect_ai.log import list_eval_logs, read_eval_log

    hostile = made.everything(capability=made.capability([True, False], "\x1b[31m\ud800<script>"))
    results = [made.result("baseline_instruct", made.everything()), made.result("odd", hostile)]
    run = made.make(tmp_path / "run_x", [*results, made.result("broken")])[0]
    assert report.main([str(run.path), "--inspect-log"]) == 0
    assert len(list_eval_logs(str(run.path / "inspect"))) == 3
    for name in ("baseline_instruct", "odd"):
        log, measured = (
            read_eval_log(str(run.path / "inspect" / f"{name}.eval")),
            run.load(name)["measurements"],
        )
        assert (log.status, log.eval.task) == ("success", name)
        assert log.eval.metadata["recipe"] == run.load(name)["experiment"]["recipe"]
        of = [s for s in log.samples if s.metadata["suite"] == "binary"]
        assert len(of) == len(measured["binary"]["probes"])
        for sample, probe in zip(of, measured["binary"]["probes"], strict=True):
            assert sample.input == probe["text"] and sample.target == (probe["keyed"] or "")
            assert sample.scores["log_odds"].value == probe["log_odds"]
            assert sample.scores["mass"].value == probe["mass"]
        graded = [s for s in log.samples if s.metadata["suite"] == "capability"]
        for sample, item in zip(graded, measured["capability"]["items"], strict=True):
            assert sample.input == item["prompt"]
            assert sample.output.completion == item["reply"]["text"].replace("\ud800", "\\ud800")
            assert sample.scores["correct"].value == ("C" if item["correct"] else "I")
        (score,) = log.results.scores
        assert score.metrics["perplexity"].value == measured["perplexity"]["perplexity"]
    broken = read_eval_log(str(run.path / "inspect" / "broken.eval"))
    assert broken.status == "error" and broken.error.message == "it broke"


@pytest.mark.extra("inspect_ai")
def test_a_run_writes_a_log_of_each_experiment(go, tmp_path, monkeypatch):
    small_battery.use(monkeypatch)
    assert go(*EXPERIMENTS, "--inspect-log")[0] == 0
    folder = latest(tmp_path / "out")
    logs = {file.stem for file in (folder / "inspect").glob("*.eval")}
    assert logs == set(json.loads((folder / "manifest.json").read_text())["experiments"])
    assert Run.resume(str(folder))[0].path == folder and followers.TRACKERS
