"""lm-evaluation-harness on the live modified model, against the harness alone on the exported checkpoint."""

import json
import sys

import pytest
import small_battery
import tiny
import torch
from cli_runs import latest, read, refused
from exports import exporter
from harness_tasks import TASKS, alone, write_tasks

from runner.export import Chosen
from suites.base import Harness, Protocol
from suites.lm_harness import LmEval, check_tasks, score, task_manager
from surgery.recipes import attenuate, identity, repeat, swap


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of three tasks, made once: looking through it takes seconds."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


SURGERIES = {"swap": (swap(identity(6), 1, 4), None), "repeat": (repeat(identity(6), 2, 4), 4)}


@pytest.mark.extra("lm_eval")
@pytest.mark.parametrize(("recipe", "limit"), SURGERIES.values(), ids=SURGERIES)
def test_the_live_model_scores_as_its_exported_checkpoint(tiny_pair, tasks, tmp_path, recipe, limit):
    pair = tiny_pair("qwen2")
    live = pair.live()
    live.apply(recipe)
    exporter(pair).write(Chosen("mine", recipe), tmp_path / "out")
    protocol = Protocol(("lm_eval",), harness=Harness(tuple(TASKS), str(tasks), limit))
    ours = LmEval().measure(pair.engine(live), protocol, [])
    theirs = alone(tasks, tmp_path / "out", limit)
    assert set(ours["results"]) == set(TASKS) and ours["n"]["mill_choice"] == (limit or 9)
    for task, metrics in ours["results"].items():
        assert metrics
        for name, value in metrics.items():
            assert value == pytest.approx(theirs[task][f"{name},none"], rel=1e-4), (task, name)


def test_scores_are_log_probabilities_and_greediness(tiny_pair):
    pair = tiny_pair("qwen2")
    pairs = [(tiny.random_prompt(k, 5 + k), tiny.random_prompt(50 + k, 1 + k % 3)) for k in range(6)]
    model = pair.rebuilt([("instruct", i) for i in range(6)])
    pairs.append((pairs[0][0], (int(tiny.hf_logits(model, pairs[0][0])[-1].argmax()),)))
    for (context, target), (value, greedy) in zip(pairs, score(pair.engine(), pairs), strict=True):
        logits = tiny.hf_logits(model, [*context, *target])[len(context) - 1 : -1].log_softmax(-1)
        want = logits.gather(1, torch.tensor(target)[:, None]).sum()
        assert value == pytest.approx(float(want), abs=1e-3)
        assert greedy == (logits.argmax(-1).tolist() == list(target))
    assert score(pair.engine(), pairs[-1:])[0][1] is True


def test_a_long_context_loses_its_beginning(tiny_pair):
    engine = tiny_pair("qwen2").engine()
    long, target = tiny.random_prompt(1, 700), tiny.random_prompt(2, 3)
    assert score(engine, [(long, target)]) == score(engine, [(long[-510:], target)])


@pytest.mark.extra("lm_eval")
def test_what_no_checkpoint_can_be_is_asked_too(tiny_pair, tasks):
    pair = tiny_pair("qwen2")
    live = pair.live()
    live.apply(attenuate(identity(6), 0.5, 2, 4))
    protocol = Protocol(("lm_eval",), harness=Harness(("mill_choice",), str(tasks), 3))
    assert LmEval().measure(pair.engine(live), protocol, [])["results"]["mill_choice"]["acc"] is not None


@pytest.mark.extra("lm_eval")
def test_results_stand_in_the_experiments_and_in_the_report(go, tasks, tmp_path, monkeypatch):
    small_battery.use(monkeypatch)
    more = ["--lm-eval", "mill_choice", "--include-path", tasks, "--limit", "3", "--suites", "quick"]
    code, _, err = go("--experiments", "swap_adjacent_30_35", *more)
    assert code == 0, err
    run = latest(tmp_path / "out")
    results = read(run)
    assert set(results) == {"baseline_instruct", "swap_adjacent_30_35"}
    for result in results.values():
        assert result["measurements"]["lm_eval"]["n"] == {"mill_choice": 3}
        assert 0 <= result["measurements"]["lm_eval"]["results"]["mill_choice"]["acc"] <= 1
    summary = (run / "summary.md").read_text()
    assert "mill_choice: acc" in summary  # report.html: tests/test_html_report.py
    assert json.loads((run / "manifest.json").read_text())["protocol"]["harness"]["tasks"] == ["mill_choice"]
    capture = go("--resume", run)
    refused(capture, "resume with --include-path")


@pytest.mark.extra("lm_eval")
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("mill_choise", "no task 'mill_choise'; the nearest is 'mill_choice'"),
        ("{}/mill_choice.yaml", "no task"),
    ],
)
def test_a_task_that_is_not_there_is_named_before_anything_is_loaded(go, tasks, monkeypatch, asked, words):
    """A file's path is no task: what may run code is named by --include-path, and again to resume."""
    monkeypatch.setattr("runner.replica.open_pair", lambda *a: pytest.fail("a model was loaded"))
    refused(go("--lm-eval", asked.format(tasks), "--include-path", tasks), words)


@pytest.mark.extra("lm_eval")
def test_the_harnesss_thousands_of_files_are_not_read_for_a_folders_own_tasks(tasks):
    assert len(task_manager(["mill_choice"], str(tasks)).all_tasks) == len(TASKS)
    check_tasks(["mill_choice", "arc_easy", "mmlu_*"], str(tasks))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--limit", "3"], "go with --lm-eval"),
        (["--lm-eval", ","], "names no task"),
        (["--lm-eval", "x", "--include-path", "nowhere"], "no such folder"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_loading(go, monkeypatch, words, said):
    monkeypatch.setattr("runner.replica.open_pair", lambda *a: pytest.fail("a model was loaded"))
    refused(go(*words), said)


def test_without_the_package_it_says_what_to_install(go, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(go("--lm-eval", "x"), "pip install lm-eval")
