"""Whole runs: what is chosen, what comes out, interrupted and resumed ones."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import peft
import pytest
import small_battery
import tiny
import torch
from cli_runs import FOUR, QUICK, latest, read, stamps, timeless
from transformers import AutoModelForCausalLM

import evaluate
import experiments
import prompts
import run_all
from runner import replica, results
from runner.choosing import choose, chosen_suites

HERE = Path(run_all.__file__).parent
# of six layers one lies between 24 and 40 of 64, and one between 36 and 52
COLLAPSED = {"reverse_24_40", "reverse_27_37", "reverse_36_52", "parallel_28_36", "parallel_24_40"}
ALL_PROBES = len(prompts.BINARY_PROBES)  # before the small battery takes its place


@pytest.fixture(autouse=True)
def battery(monkeypatch):
    small_battery.use(monkeypatch)


def ask_fewer(monkeypatch) -> None:
    """Of the small battery one question in each form of answer, and half of the tasks: what is enough for all
    experiments."""
    small_battery.use(monkeypatch)
    one_of_each = {probe.format: probe for probe in reversed(prompts.FORMAT_PROBES)}
    monkeypatch.setattr(prompts, "FORMAT_PROBES", tuple(one_of_each.values()))
    monkeypatch.setattr(prompts, "CAPABILITY", prompts.CAPABILITY[:2])


@pytest.fixture(scope="module")
def everything(pair, tmp_path_factory):
    """A run of all experiments with all suites, two samples a probe: (folder, exit status)."""
    out = tmp_path_factory.mktemp("everything")
    with pytest.MonkeyPatch.context() as m:
        ask_fewer(m)
        code = run_all.main(small_battery.arguments(pair, out, "--all", "--samples", "2"))
    return latest(out), code


# ---- whole runs --------------------------------------------------------------------------------------------


def test_a_whole_run_leaves_everything_behind(everything):
    run, code = everything
    found, schema = read(run), jsonschema.Draft202012Validator(results.SCHEMA)  # checked once, not each time
    assert code == 0 and set(found) == {e.name for e in experiments.EXPERIMENTS}
    assert sorted(p.name for p in run.iterdir()) == [
        "comparison.json",
        "experiments",
        "injection.json",
        "manifest.json",
        "summary.md",
        "texts.json",
    ]
    manifest, comparison = (
        json.loads((run / name).read_text()) for name in ("manifest.json", "comparison.json")
    )
    for name, result in found.items():
        schema.validate(result)
        assert result["status"] == "done" and result["weights"]["exact"], name
        assert (
            result["weights"]["original"] == result["weights"]["restored"] == manifest["original_fingerprint"]
        )
        asked = result["experiment"]["suites"]
        own = {"concept_injection": "injection", "concept_injection_short": "injection_short"}
        expected = {
            "placebo": QUICK,
            "injection": [own.get(name, name)],
            None: small_battery.SUITES,
        }[result["experiment"]["control"]]
        # the short form's results stand where the whole's do
        kept = ["injection"] if name in own else asked
        assert list(result["measurements"]) == kept and set(asked) == set(expected), name
        injected = [e.name for e in experiments.EXPERIMENTS if e.control == "injection"]
        untouched = ("baseline_instruct", *injected, *COLLAPSED)
        assert (result["weights"]["modified"] == result["weights"]["original"]) == (name in untouched), name
        assert result["experiment"]["collapsed"] == (name in COLLAPSED), name
        assert all(
            len(p["samples"]) == 2
            for suite in ("informed", "blind")
            if suite in asked
            for p in result["measurements"][suite]["probes"]
        )
    assert (
        [row["name"] for row in comparison["experiments"]]
        == manifest["experiments"]
        == [e.name for e in experiments.EXPERIMENTS]
    )
    assert comparison["missing"] == [] and comparison["baseline"] == "baseline_instruct"
    summary = (run / "summary.md").read_text().replace("\\", "")
    assert (
        all(f"| {e.name} " in summary for e in experiments.EXPERIMENTS if not e.control)
        and f"{len(found)} of {len(found)} experiments the original weights were restored" in summary
    )


def test_other_weights_give_other_numbers(everything):
    """Perplexities all differ, but for recipes that are equal on six layers and the permutation that keeps
    the function."""
    found = read(everything[0])
    numbers = {
        name: r["measurements"]["perplexity"]["nll"]
        for name, r in found.items()
        if "perplexity" in r["measurements"]
    }
    recipes = {name: json.dumps(r["experiment"]["recipe"]) for name, r in found.items()}
    recipes |= {name: recipes["baseline_instruct"] for name in recipes if name.startswith("placebo_")}
    for a in numbers:
        for b in numbers:
            assert (abs(numbers[a] - numbers[b]) < 1e-5) == (recipes[a] == recipes[b]), (a, b)
    assert len(set(recipes.values())) > 20


def test_an_experiment_is_the_same_alone_and_after_others(everything, go, tmp_path, monkeypatch):
    ask_fewer(monkeypatch)
    assert go("--experiments", "perturb_late_5pct", "--no-baseline", "--samples", "2")[0] == 0
    alone, (whole, _) = timeless(latest(tmp_path / "out")), everything
    assert (
        set(alone) == {"perturb_late_5pct"}
        and alone["perturb_late_5pct"] == timeless(whole)["perturb_late_5pct"]
    )


def test_results_do_not_depend_on_the_batch_size(four, go, tmp_path):
    assert go(*FOUR, "--batch-size", "2")[0] == 0
    small_battery.assert_close(timeless(latest(tmp_path / "out")), timeless(four))


def test_the_table_and_what_the_terminal_is_told(go, tmp_path):
    code, out, err = go(
        "--experiments", "shuffle_all", "swap_adjacent_30_35", "--suites", "binary,perplexity"
    )
    names = [line.split()[0] for line in out.splitlines()[2:5]]
    # as asked for, the baseline first
    assert code == 0 and names == [
        "baseline_instruct",
        "shuffle_all",
        "swap_adjacent_30_35",
    ]
    assert out.split("\n")[0].split("  ")[0] == "experiment" and "perplexity" in out.split("\n")[0]
    found = read(latest(tmp_path / "out"))["shuffle_all"]["measurements"]
    assert (
        list(found) == ["binary", "perplexity"]
        and f"{found['perplexity']['perplexity']:.2f}" in out.splitlines()[3]
    )
    assert "3 experiments on torch.float32 cpu" in err
    assert str(latest(tmp_path / "out")) in err
    assert "Traceback" not in err
    assert "shuffle_all: perplexity" in err  # the bar says which experiment and which suite


def test_a_long_run_on_a_cpu_hints_at_the_short_form(go, tmp_path):
    """Before the first experiment, and not among the notes that the results keep."""
    for said, hinted in ((), True), (("--no-short",), False):
        code, _, err = go("--experiments", "swap_adjacent_30_35", "--no-baseline", *said)
        hints = [line for line in err.splitlines() if "--short" in line]
        assert code == 0 and len(hints) == hinted, err
        if hinted:
            assert hints[0].startswith("note: on a CPU the long form takes its time: ")
            assert err.index(hints[0]) < err.index("swap_adjacent_30_35: informed")
        kept = json.loads((latest(tmp_path / "out") / "manifest.json").read_text())["notes"]
        assert not any("--short" in note for note in kept)


def test_seeds_change_samples_shuffles_and_noise_and_nothing_else(go, tmp_path):
    found = []
    for seed in (0, 0, 1):
        assert (
            go(
                "--experiments",
                "shuffle_all",
                "perturb_all_1pct",
                "--suites",
                "blind,chat",
                "--seed",
                seed,
                out=f"{len(found)}",
            )[0]
            == 0
        )
        found.append(timeless(latest(tmp_path / f"{len(found)}")))
    assert found[0] == found[1]
    first, other = found[0], found[2]
    for name in ("shuffle_all", "perturb_all_1pct"):
        assert first[name]["experiment"]["recipe"] != other[name]["experiment"]["recipe"]
    one, two = (run["baseline_instruct"]["measurements"] for run in (first, other))
    assert one["blind"] != two["blind"] and one["chat"] == two["chat"]  # chat is answered greedily


def chosen(*argv, layers=6):
    args = run_all.parse_arguments([*map(str, argv)])
    return [e.name for e in choose(args, layers, chosen_suites(args))]


def test_what_is_chosen(tmp_path):
    everything = [e.name for e in experiments.EXPERIMENTS]
    assert chosen("--all") == everything and chosen() == everything[:6] == chosen("--priority-limit", 6)
    assert (
        chosen("--priority-limit", 1) == ["baseline_instruct"]
        and chosen("--priority-limit", 999) == everything
    )
    assert chosen("--experiments", "blend_linear") == ["baseline_instruct", "blend_linear"]
    assert chosen("--experiments", "blend_linear", "baseline_instruct", "blend_linear") == [
        "blend_linear",
        "baseline_instruct",
    ]
    assert chosen("--experiments", "blend_linear", "--no-baseline") == ["blend_linear"]
    windows = [f"window_base_{k}_{k + 1}" for k in range(6)]
    one = ["--sweep", "window", "--size", "1"]
    assert chosen(*one) == ["baseline_instruct", *windows] and chosen("--sweep", "window") == [
        "baseline_instruct",
        "window_base_0_4",
    ]
    assert chosen("--sweep", "window", "--size", "2", "--step", "4", "--no-baseline") == [
        "window_base_0_2",
        "window_base_4_6",
    ]
    # by first layer
    assert chosen("--sweep", "window", "--size", "4,1,1", "--step", "2") == [
        "baseline_instruct",
        "window_base_0_4",
        "window_base_0_1",
        "window_base_2_6",
        "window_base_2_3",
        "window_base_4_5",
    ]
    # windows of 4 by 2 and of 3 by 3 left out, a scan over blocks run once more, blocks side by side
    assert chosen("--sweep", "delete", "--size", "4,3", "--no-baseline", "--step", "2", layers=8) == [
        *("delete_window_0_3", "delete_window_0_4", "delete_window_2_5", "delete_window_2_6"),
        *("delete_window_4_7", "delete_window_4_8"),
    ]
    assert chosen("--sweep", "repeat", "--no-baseline", layers=12) == [
        f"repeat_window_{a}_{b}" for a, b in ((0, 4), (0, 8), (4, 8), (0, 12), (4, 12), (8, 12))
    ]
    assert chosen("--sweep", "repeat", "--step", "2", "--size", "4", "--no-baseline") == [
        "repeat_window_0_4",
        "repeat_window_2_6",
    ]
    assert chosen("--sweep", "parallel", "--no-baseline") == ["parallel_window_0_4"]
    assert chosen("--sweep", "parallel", "--sweep", "double", "--size", "2", "--no-baseline") == [
        f"{kind}_window_{a}_{a + 2}" for kind in ("parallel", "double") for a in (0, 2, 4)
    ]
    assert chosen(*one, "--priority-limit", 2) == ["baseline_instruct", "baseline_base", *windows]
    assert chosen(*one, "--experiments", "window_base_3_4") == ["baseline_instruct", "window_base_3_4"]
    ladders = [f"{kind}_{k}" for kind in ("delete", "replace") for k in range(6)]
    assert chosen("--sweep", "delete", "--sweep", "replace", "--sweep", "delete") == [
        "baseline_instruct",
        *ladders,
    ]
    assert chosen("--source", "rune=x") == [
        "baseline_instruct",
        *(e.name for e in experiments.for_source("rune")),
    ]
    (tmp_path / "mine.py").write_text(
        "from experiments import *\nEXPERIMENTS = [Experiment('mine', 'g', lambda m: m.model),"
        " *EXPERIMENTS[:2]]\n"
    )
    assert chosen("--experiments-file", tmp_path / "mine.py") == [
        "mine",
        "baseline_instruct",
        "baseline_base",
    ]


def test_list_names_every_experiment(capsys):
    assert run_all.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    known = [*experiments.EXPERIMENTS, *experiments.GRIDS]  # also those that run only by name
    assert [line.split()[1] for line in lines] == [e.name for e in known]
    assert [line.split()[2] for line in lines] == [e.group for e in known]
    assert [line.split()[3] for line in lines] == [e.control or "-" for e in known]
    assert run_all.main(["--list", "--pair", "smollm2-135m", "--sweep", "double"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[len(lines) :]] == [
        f"double_{k}" for k in range(30)
    ]


def test_users_experiments_sweeps_and_adapters_run_together(go, pair, tmp_path):
    """A file of one line, a sweep and an adapter that peft made; the adapter's numbers are those of peft's
    merged model."""
    (tmp_path / "mine.py").write_text(
        "from experiments import Experiment, swap\nEXPERIMENTS = [Experiment('mine', 'g', lambda m:"
        " swap(m.model, 0, 5))]\n"
    )
    model = AutoModelForCausalLM.from_pretrained(pair / "instruct", dtype=torch.float32)
    tuned = peft.get_peft_model(
        model,
        peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    code, _, err = go(
        "--experiments-file",
        tmp_path / "mine.py",
        "--sweep",
        "window",
        "--size",
        "3",
        "--source",
        f"rune={tmp_path / 'adapter'}",
        "--suites",
        "perplexity",
    )
    run = latest(tmp_path / "out")
    found = read(run)
    assert code == 0, err
    assert set(found) == {
        "baseline_instruct",
        "mine",
        "window_base_0_3",
        "window_base_3_6",
        *(e.name for e in experiments.for_source("rune")),
    }
    assert json.loads((run / "manifest.json").read_text())["sources"]["rune"]["kind"] == "LoRA adapter"
    ids = small_battery.tokenizer()(small_battery.BATTERY["NEUTRAL_TEXTS"]["long"])["input_ids"]
    merged = tuned.merge_and_unload().eval()
    loss = (
        -tiny.hf_logits(merged, ids)[:-1]
        .log_softmax(-1)
        .gather(1, torch.tensor(ids[1:])[:, None])
        .mean()
        .item()
    )
    assert found["rune_whole"]["measurements"]["perplexity"]["texts"][0]["nll"] == pytest.approx(
        loss, rel=1e-4
    )
    nlls = {round(r["measurements"]["perplexity"]["nll"], 6) for name, r in found.items()}
    assert len(nlls) == len(found)


def test_a_token_of_the_hub_is_written_nowhere(go, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    assert go("--experiments", "baseline_instruct", "--suites", "binary")[0] == 0
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert {p.name for p in files} == {
        "baseline_instruct.json",
        "comparison.json",
        "manifest.json",
        "summary.md",
        "texts.json",
    }
    assert not any(b"secretsecret" in p.read_bytes() for p in files)


def test_the_command_as_a_program(pair, tmp_path):
    """A real process with the real battery: on stdout the table alone, on stderr the bars and one line, no
    warnings."""
    command = [
        sys.executable,
        "run_all.py",
        *small_battery.arguments(
            pair, tmp_path / "out", "--suites", "binary", "--experiments", "swap_adjacent_30_35"
        ),
    ]
    done = subprocess.run(
        command, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("experiment "), done.stderr
    assert "\nswap_adjacent_30_35 " in done.stdout, done.stderr
    assert (
        len(read(latest(tmp_path / "out"))["baseline_instruct"]["measurements"]["binary"]["probes"])
        == ALL_PROBES
    )
    assert (latest(tmp_path / "out") / "report.html").exists()
    bars = ("%|", " done [")  # of the experiments, and of the suites of one
    said = [
        line
        for line in done.stderr.splitlines()
        if line.strip("\x1b[A ") and not any(bar in line for bar in bars)
    ]
    assert len(said) == 1 and said[0].startswith("2 experiments on torch.float32 cpu; loaded in "), said


# ---- interrupted and resumed -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["perturb_all_5pct", "perturb_all_5pct.json"])
def test_killed_in_the_middle_and_resumed_gives_the_files_of_an_uninterrupted_run(
    pair, four, tmp_path, capfd, where
):
    """kill -9 while the third of four experiments is measured, or half written."""
    log = tmp_path / "log"
    child = small_battery.in_child(small_battery.arguments(pair, tmp_path / "out", *FOUR), log, stop_at=where)
    small_battery.wait_for(log.with_suffix(".reached"), child)
    os.kill(child.pid, signal.SIGKILL)
    child.join(90)
    run = latest(tmp_path / "out")
    assert child.exitcode == -signal.SIGKILL and set(read(run)) == {
        "baseline_instruct",
        "swap_adjacent_30_35",
    }
    before = {
        file: (file.stat().st_mtime_ns, file.read_bytes()) for file in (run / "experiments").glob("*.json")
    }
    assert run_all.main(["--resume", str(run)]) == 0
    assert timeless(run) == timeless(four)
    # never run twice
    assert all((file.stat().st_mtime_ns, file.read_bytes()) == what for file, what in before.items())
    for rows in (json.loads((path / "comparison.json").read_text())["experiments"] for path in (run, four)):
        assert [row["name"] for row in rows] == ["baseline_instruct", *FOUR[1:]]
    assert "swap_adjacent_30_35" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_runs_finish_cleanly(pair, four, tmp_path, capfd, number):
    log = tmp_path / "log"
    child = small_battery.in_child(
        small_battery.arguments(pair, tmp_path / "out with space", *FOUR), log, stop_at="perturb_all_5pct"
    )
    small_battery.wait_for(log.with_suffix(".reached"), child)
    os.kill(child.pid, number)
    child.join(90)
    run = latest(tmp_path / "out with space")
    said = log.read_text()
    assert child.exitcode == 130 and "Traceback" not in said, said
    assert f"\n  python run_all.py --resume '{run}'\nMaking the pages of these" in said
    assert "Interrupted. 2 of 4 experiments are finished and kept; go on with:" in said
    assert set(read(run)) == {"baseline_instruct", "swap_adjacent_30_35"}
    comparison = json.loads((run / "comparison.json").read_text())
    assert [row["name"] for row in comparison["experiments"]] == ["baseline_instruct", "swap_adjacent_30_35"]
    assert (
        comparison["missing"] == ["perturb_all_5pct", "blend_linear"]
        and "Not run yet: perturb_all_5pct, blend_linear" in (run / "summary.md").read_text()
    )
    if number == signal.SIGINT:
        assert run_all.main(["--resume", str(run)]) == 0 and timeless(run) == timeless(four)


def test_ctrl_c_while_loading(go, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(replica, "open_pair", interrupted)
    code, out, err = go(*FOUR)
    assert (code, out, err) == (
        130,
        "",
        "run_all.py: interrupted before any experiment began\n",
    ) and not list((tmp_path / "out").glob("run_*"))


def test_a_finished_run_is_not_run_again(finished, capsys, monkeypatch):
    before, comparison = stamps(finished), json.loads((finished / "comparison.json").read_text())
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: pytest.fail("measured again"))
    assert run_all.main(["--resume", str(finished)]) == 0
    assert stamps(finished) == before and "blend_linear" in capsys.readouterr().out
    assert json.loads((finished / "comparison.json").read_text()) == comparison | {"run": "copy"}


def test_a_run_that_another_process_works_on_is_told_before_a_model_is_loaded(finished, capsys, monkeypatch):
    """A second 32B model beside the first would end one of the two for want of memory."""
    monkeypatch.setattr(replica, "open_pair", lambda *args, **kwargs: pytest.fail("loaded"))
    with results.Run(finished).alone():
        assert run_all.main(["--resume", str(finished)]) == 1
    assert "another process is at work on" in capsys.readouterr().err


def test_resuming_takes_its_settings_from_the_manifest(finished, four):
    for name in ("blend_linear", "baseline_instruct"):
        (finished / "experiments" / f"{name}.json").unlink()
    assert (
        run_all.main(
            [
                "--resume",
                str(finished),
                "--seed",
                "5",
                "--suites",
                "binary",
                "--samples",
                "3",
                "--all",
                "--max-new-tokens",
                "9",
            ]
        )
        == 0
    )
    assert timeless(finished) == timeless(four)


# ---- the real model ----------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_laptop_size_pair_from_end_to_end(smollm2, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real battery and the real report
    assert (
        run_all.main(
            [
                "--pair",
                "smollm2-135m",
                "--experiments",
                "swap_adjacent_30_35",
                "--suites",
                "quick",
                "--output",
                str(tmp_path),
            ]
        )
        == 0
    )
    run = latest(tmp_path)
    found = read(run)
    assert set(found) == {"baseline_instruct", "swap_adjacent_30_35"} and all(
        r["weights"]["exact"] for r in found.values()
    )
    before, after = (
        found[name]["measurements"]["perplexity"] for name in ("baseline_instruct", "swap_adjacent_30_35")
    )
    assert before["tokens"] > 2000
    assert 8 < before["perplexity"] < 60
    assert 1.02 < after["perplexity"] / before["perplexity"] < 20
    (published,) = [
        p for p in found["baseline_instruct"]["measurements"]["binary"]["probes"] if p["published"]
    ]
    assert published["mass"] > 0.05 and published["answered"]
    assert (run / "report.html").stat().st_size > 10_000


def test_a_batch_keeps_no_replies_of_what_is_on_disk(four):
    """What is left is what a noise twin is matched by, and what is compared on resume."""
    from runner.batch import outline

    for result in read(four).values():
        kept = outline(result)
        assert len(json.dumps(kept)) < 40_000 and "reply" not in json.dumps(kept)
        assert kept["status"] == result["status"]
        assert kept["experiment"]["recipe"] == result["experiment"]["recipe"]
