"""The runner: whole runs, interrupted and resumed ones, experiments that fail, and everything that a user gets wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import peft
import pytest
import small_run
import tiny
import torch
from transformers import AutoModelForCausalLM

import evaluate
import experiments
import franken
import pairs
import prompts
import results
import run_all

HERE = Path(run_all.__file__).parent
# The issue's list, written out
ISSUE = [
    "baseline_instruct", "baseline_base", "swap_adjacent_30_35", "swap_adjacent_31_32", "swap_distant_10_55", "swap_distant_5_60",
    "swap_chunk_25_35_with_45_55", "swap_chunk_16_32_with_32_48", "shuffle_all", "franken_base_first_16", "franken_base_first_32",
    "franken_base_first_48", "franken_instruct_first_16", "franken_instruct_first_32", "franken_instruct_first_48", "blend_linear",
    "blend_early_base", "blend_late_base", "perturb_late_1pct", "perturb_late_5pct", "perturb_late_10pct", "perturb_all_1pct", "perturb_all_5pct",
]  # fmt: skip
ALL_PROBES = len(prompts.BINARY_PROBES)  # before the small battery takes its place
QUICK = ["binary", "perplexity"]
FOUR = ["--experiments", "swap_adjacent_30_35", "perturb_all_5pct", "blend_linear"]  # with the baseline


@pytest.fixture(autouse=True)
def battery(monkeypatch):
    small_run.use(monkeypatch)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with the checkpoints instruct and base. Not to be written to."""
    folder = tmp_path_factory.mktemp("pair")
    for k, name in enumerate(("instruct", "base")):
        small_run.checkpoint(folder / name, 100 + k, family="qwen2", layers=6)
    return folder


@pytest.fixture
def go(pair, tmp_path, capfd):
    """go(...) -> (exit status, stdout, stderr) of run_all.py on the pair, with results in tmp_path / "out"."""

    def run(*more, out="out"):
        capfd.readouterr()
        code = run_all.main(small_run.arguments(pair, tmp_path / out, *more))
        return code, *capfd.readouterr()

    return run


def latest(out: Path) -> Path:
    return max(out.glob("run_*"), key=lambda path: path.stat().st_mtime)


def read(run: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in (run / "experiments").glob("*.json")}


def timeless(run: Path) -> dict[str, dict]:
    """Every experiment's JSON without what the clock and the machine decide."""
    return {name: {k: v for k, v in result.items() if k != "performance"} for name, result in read(run).items()}


@pytest.fixture(scope="module")
def everything(pair, tmp_path_factory):
    """A run of all experiments with all suites, two samples a probe: (folder, exit status)."""
    out = tmp_path_factory.mktemp("everything")
    with pytest.MonkeyPatch.context() as m:
        small_run.use(m)
        code = run_all.main(small_run.arguments(pair, out, "--all", "--samples", "2"))
    return latest(out), code


@pytest.fixture(scope="module")
def four(pair, tmp_path_factory):
    """An uninterrupted run of FOUR."""
    out = tmp_path_factory.mktemp("four")
    with pytest.MonkeyPatch.context() as m:
        small_run.use(m)
        assert run_all.main(small_run.arguments(pair, out, *FOUR)) == 0
    return latest(out)


# ---- whole runs ----------------------------------------------------------------------------------------------------


def test_a_whole_run_leaves_everything_behind(everything):
    run, code = everything
    assert code == 0 and set(read(run)) == {e.name for e in experiments.EXPERIMENTS} >= set(ISSUE)
    assert sorted(p.name for p in run.iterdir()) == ["comparison.json", "experiments", "manifest.json", "summary.md"]
    manifest, comparison = (json.loads((run / name).read_text()) for name in ("manifest.json", "comparison.json"))
    for name, result in read(run).items():
        jsonschema.validate(result, results.SCHEMA)
        assert result["status"] == "done" and result["weights"]["exact"], name
        assert result["weights"]["original"] == result["weights"]["restored"] == manifest["original_fingerprint"]
        asked = result["experiment"]["suites"]
        assert list(result["measurements"]) == asked and set(asked) == set(QUICK if result["experiment"]["control"] else small_run.SUITES), name
        untouched = ("baseline_instruct", "reverse_24_40")  # of six layers only one lies between 24 and 40 of 64
        assert (result["weights"]["modified"] == result["weights"]["original"]) == (name in untouched), name
        assert result["experiment"]["collapsed"] == (name == "reverse_24_40"), name
        assert all(len(p["samples"]) == 2 for suite in ("informed", "blind") if suite in asked for p in result["measurements"][suite]["probes"])
    assert [row["name"] for row in comparison["experiments"]] == manifest["experiments"] == [e.name for e in experiments.EXPERIMENTS]
    assert comparison["missing"] == [] and comparison["baseline"] == "baseline_instruct"
    summary = (run / "summary.md").read_text().replace("\\", "")
    assert all(f"| {name} " in summary for name in ISSUE) and f"{len(read(run))} of {len(read(run))} experiments the original weights were restored" in summary


def test_other_weights_give_other_numbers(everything):
    """Perplexities all differ, but for recipes that are equal on six layers and the permutation that keeps the function."""
    numbers = {name: r["measurements"]["perplexity"]["nll"] for name, r in read(everything[0]).items()}
    recipes = {name: json.dumps(r["experiment"]["recipe"]) for name, r in read(everything[0]).items()}
    recipes |= {name: recipes["baseline_instruct"] for name in recipes if name.startswith("placebo_")}
    for a in numbers:
        for b in numbers:
            assert (abs(numbers[a] - numbers[b]) < 1e-5) == (recipes[a] == recipes[b]), (a, b)
    assert len(set(recipes.values())) > 20


def test_an_experiment_is_the_same_alone_and_after_others(everything, go, tmp_path):
    assert go("--experiments", "perturb_late_5pct", "--no-baseline", "--samples", "2")[0] == 0
    alone, (whole, _) = timeless(latest(tmp_path / "out")), everything
    assert set(alone) == {"perturb_late_5pct"} and alone["perturb_late_5pct"] == timeless(whole)["perturb_late_5pct"]


def test_results_do_not_depend_on_the_batch_size(four, go, tmp_path):
    from test_evaluate import close

    assert go(*FOUR, "--batch-size", "2")[0] == 0
    close(timeless(latest(tmp_path / "out")), timeless(four))


def test_the_table_and_what_the_terminal_is_told(go, tmp_path):
    code, out, err = go("--experiments", "shuffle_all", "swap_adjacent_30_35", "--suites", "binary,perplexity")
    names = [line.split()[0] for line in out.splitlines()[2:5]]
    assert code == 0 and names == ["baseline_instruct", "shuffle_all", "swap_adjacent_30_35"]  # as asked for, the baseline first
    assert out.split("\n")[0].split("  ")[0] == "experiment" and "perplexity" in out.split("\n")[0]
    found = read(latest(tmp_path / "out"))["shuffle_all"]["measurements"]
    assert list(found) == ["binary", "perplexity"] and f"{found['perplexity']['perplexity']:.2f}" in out.splitlines()[3]
    assert "3 experiments on torch.float32 cpu" in err and str(latest(tmp_path / "out")) in err and "Traceback" not in err
    assert "shuffle_all: perplexity" in err  # the bar says which experiment and which suite


def test_seeds_change_samples_shuffles_and_noise_and_nothing_else(go, tmp_path):
    found = []
    for seed in (0, 0, 1):
        assert go("--experiments", "shuffle_all", "perturb_all_1pct", "--suites", "blind,chat", "--seed", seed, out=f"{len(found)}")[0] == 0
        found.append(timeless(latest(tmp_path / f"{len(found)}")))
    assert found[0] == found[1]
    first, other = found[0], found[2]
    for name in ("shuffle_all", "perturb_all_1pct"):
        assert first[name]["experiment"]["recipe"] != other[name]["experiment"]["recipe"]
    one, two = (run["baseline_instruct"]["measurements"] for run in (first, other))
    assert one["blind"] != two["blind"] and one["chat"] == two["chat"]  # chat is answered greedily


def chosen(*argv, layers=6):
    return [e.name for e in run_all.choose(run_all.parse_arguments([*map(str, argv)]), layers)]


def test_what_is_chosen(tmp_path):
    everything = [e.name for e in experiments.EXPERIMENTS]
    assert chosen("--all") == everything and chosen() == everything[:6] == chosen("--priority-limit", 6)
    assert chosen("--priority-limit", 1) == ["baseline_instruct"] and chosen("--priority-limit", 999) == everything
    assert chosen("--experiments", "blend_linear") == ["baseline_instruct", "blend_linear"]
    assert chosen("--experiments", "blend_linear", "baseline_instruct", "blend_linear") == ["blend_linear", "baseline_instruct"]
    assert chosen("--experiments", "blend_linear", "--no-baseline") == ["blend_linear"]
    windows = [f"window_base_{k}_{k + 1}" for k in range(6)]
    one = ["--sweep", "window", "--size", "1"]
    assert chosen(*one) == ["baseline_instruct", *windows] and chosen("--sweep", "window") == ["baseline_instruct", "window_base_0_4"]
    assert chosen("--sweep", "window", "--size", "2", "--step", "4", "--no-baseline") == ["window_base_0_2", "window_base_4_6"]
    assert chosen("--sweep", "window", "--size", "4,1,1", "--step", "2") == ["baseline_instruct", "window_base_0_4", "window_base_2_6", *windows[::2]]
    assert chosen(*one, "--priority-limit", 2) == ["baseline_instruct", "baseline_base", *windows]
    assert chosen(*one, "--experiments", "window_base_3_4") == ["baseline_instruct", "window_base_3_4"]
    ladders = [f"{kind}_{k}" for kind in ("delete", "replace") for k in range(6)]
    assert chosen("--sweep", "delete", "--sweep", "replace", "--sweep", "delete") == ["baseline_instruct", *ladders]
    assert chosen("--source", "rune=x") == ["baseline_instruct", *(e.name for e in experiments.for_source("rune"))]
    (tmp_path / "mine.py").write_text("from experiments import *\nEXPERIMENTS = [Experiment('mine', 'g', lambda m: m.model), *EXPERIMENTS[:2]]\n")
    assert chosen("--experiments-file", tmp_path / "mine.py") == ["mine", "baseline_instruct", "baseline_base"]


def test_list_names_every_experiment(capsys):
    assert run_all.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [e.name for e in experiments.EXPERIMENTS]
    assert [line.split()[2] for line in lines] == [e.group for e in experiments.EXPERIMENTS]
    assert [line.split()[3] for line in lines] == [e.control or "-" for e in experiments.EXPERIMENTS]
    assert run_all.main(["--list", "--pair", "smollm2-135m", "--sweep", "double"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[len(lines) :]] == [f"double_{k}" for k in range(30)]


def test_users_experiments_sweeps_and_adapters_run_together(go, pair, tmp_path):
    """A file of one line, a sweep and an adapter that peft made; the adapter's numbers are those of peft's merged model."""
    (tmp_path / "mine.py").write_text("from experiments import Experiment, swap\nEXPERIMENTS = [Experiment('mine', 'g', lambda m: swap(m.model, 0, 5))]\n")
    model = AutoModelForCausalLM.from_pretrained(pair / "instruct", dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    code, _, err = go("--experiments-file", tmp_path / "mine.py", "--sweep", "window", "--size", "3", "--source", f"rune={tmp_path / 'adapter'}", "--suites", "perplexity")
    run = latest(tmp_path / "out")
    found = read(run)
    assert code == 0, err
    assert set(found) == {"baseline_instruct", "mine", "window_base_0_3", "window_base_3_6", *(e.name for e in experiments.for_source("rune"))}
    assert json.loads((run / "manifest.json").read_text())["sources"]["rune"]["kind"] == "LoRA adapter"
    ids = small_run.tokenizer()(small_run.BATTERY["NEUTRAL_TEXTS"]["long"])["input_ids"]
    merged = tuned.merge_and_unload().eval()
    loss = -tiny.hf_logits(merged, ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
    assert found["rune_whole"]["measurements"]["perplexity"]["texts"][0]["nll"] == pytest.approx(loss, rel=1e-4)
    nlls = {round(r["measurements"]["perplexity"]["nll"], 6) for name, r in found.items()}
    assert len(nlls) == len(found)


def test_a_token_of_the_hub_is_written_nowhere(go, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    assert go("--experiments", "baseline_instruct", "--suites", "binary")[0] == 0
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) == 4 and not any(b"secretsecret" in p.read_bytes() for p in files)


def test_the_command_as_a_program(pair, tmp_path):
    """A real process with the real battery: on stdout the table alone, on stderr the bars and one line, no warnings."""
    command = [sys.executable, "run_all.py", *small_run.arguments(pair, tmp_path / "out", "--suites", "binary", "--experiments", "swap_adjacent_30_35")]
    done = subprocess.run(command, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("experiment ") and "\nswap_adjacent_30_35 " in done.stdout, done.stderr
    assert len(read(latest(tmp_path / "out"))["baseline_instruct"]["measurements"]["binary"]["probes"]) == ALL_PROBES
    assert (latest(tmp_path / "out") / "report.html").exists()
    said = [line for line in done.stderr.splitlines() if line.strip("\x1b[A ") and "%|" not in line]
    assert len(said) == 1 and said[0].startswith("2 experiments on torch.float32 cpu; loaded in "), said


# ---- interrupted and resumed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["perturb_all_5pct", "perturb_all_5pct.json"])
def test_killed_in_the_middle_and_resumed_gives_the_files_of_an_uninterrupted_run(pair, four, tmp_path, capfd, where):
    """kill -9 while the third of four experiments is measured, or half written."""
    log = tmp_path / "log"
    child = small_run.in_child(small_run.arguments(pair, tmp_path / "out", *FOUR), log, stop_at=where)
    small_run.wait_for(log.with_suffix(".reached"), child)
    os.kill(child.pid, signal.SIGKILL)
    child.join(90)
    run = latest(tmp_path / "out")
    assert child.exitcode == -signal.SIGKILL and set(read(run)) == {"baseline_instruct", "swap_adjacent_30_35"}
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in (run / "experiments").glob("*.json")}
    assert run_all.main(["--resume", str(run)]) == 0
    assert timeless(run) == timeless(four)
    assert all((file.stat().st_mtime_ns, file.read_bytes()) == what for file, what in before.items())  # never run twice
    for rows in (json.loads((path / "comparison.json").read_text())["experiments"] for path in (run, four)):
        assert [row["name"] for row in rows] == ["baseline_instruct", *FOUR[1:]]
    assert "swap_adjacent_30_35" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_finish_cleanly(pair, four, tmp_path, capfd, number):
    log = tmp_path / "log"
    child = small_run.in_child(small_run.arguments(pair, tmp_path / "out with space", *FOUR), log, stop_at="perturb_all_5pct")
    small_run.wait_for(log.with_suffix(".reached"), child)
    os.kill(child.pid, number)
    child.join(90)
    run = latest(tmp_path / "out with space")
    said = log.read_text()
    assert child.exitcode == 130 and "Traceback" not in said, said
    assert said.rstrip().endswith(f"python run_all.py --resume '{run}'")
    assert set(read(run)) == {"baseline_instruct", "swap_adjacent_30_35"}
    comparison = json.loads((run / "comparison.json").read_text())
    assert [row["name"] for row in comparison["experiments"]] == ["baseline_instruct", "swap_adjacent_30_35"]
    assert comparison["missing"] == ["perturb_all_5pct", "blend_linear"] and "Not run yet: perturb_all_5pct, blend_linear" in (run / "summary.md").read_text()
    if number == signal.SIGINT:
        assert run_all.main(["--resume", str(run)]) == 0 and timeless(run) == timeless(four)


def test_ctrl_c_while_loading(go, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pairs, "open_pair", interrupted)
    code, out, err = go(*FOUR)
    assert (code, out, err) == (130, "", "run_all.py: interrupted before any experiment began\n") and not list((tmp_path / "out").glob("run_*"))


@pytest.fixture
def finished(four, tmp_path):
    """A copy of the run of FOUR that may be written to."""
    shutil.copytree(four, tmp_path / "copy")
    return tmp_path / "copy"


def stamps(run: Path) -> dict:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (run / "experiments").iterdir()}


def test_a_finished_run_is_not_run_again(finished, capsys, monkeypatch):
    before, comparison = stamps(finished), json.loads((finished / "comparison.json").read_text())
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: pytest.fail("measured again"))
    assert run_all.main(["--resume", str(finished)]) == 0
    assert stamps(finished) == before and "blend_linear" in capsys.readouterr().out
    assert json.loads((finished / "comparison.json").read_text()) == comparison | {"run": "copy"}


def test_resuming_takes_its_settings_from_the_manifest(finished, four):
    for name in ("blend_linear", "baseline_instruct"):
        (finished / "experiments" / f"{name}.json").unlink()
    assert run_all.main(["--resume", str(finished), "--seed", "5", "--suites", "binary", "--samples", "3", "--all", "--max-new-tokens", "9"]) == 0
    assert timeless(finished) == timeless(four)


# ---- experiments that fail -----------------------------------------------------------------------------------------


MINE = """
from experiments import Experiment, perturb, splice, swap
EXPERIMENTS = [Experiment("nowhere", "mine", lambda m: splice(swap(m.model, 0, 1), "no_such_source", 2, 4)),
               Experiment("nan", "mine", lambda m: perturb(m.model, 1e30, m.seed))]
"""


def test_a_recipe_that_cannot_be_applied_is_recorded_and_the_batch_goes_on(go, tmp_path, four):
    (tmp_path / "mine.py").write_text(MINE)
    code, out, err = go("--experiments-file", tmp_path / "mine.py", "--experiments", "nowhere", "swap_adjacent_30_35")
    found = read(latest(tmp_path / "out"))
    failed = found.pop("nowhere")
    assert code == 1 and "Traceback" not in err and err.splitlines()[-1].startswith("1 of 3 experiments failed; their errors are in ")
    assert "nowhere failed: FrankenError: the recipe takes layers from 'no_such_source'; the sources here are instruct, base\n" in err
    assert failed["status"] == "failed" and failed["measurements"] == {} and failed["weights"]["exact"] and failed["error"]["type"] == "FrankenError"
    assert {k: v | {"performance": 0} for k, v in found.items()} == {k: v | {"performance": 0} for k, v in read(four).items() if k in found}
    assert "nowhere" in out and "failed:" in out


@pytest.mark.parametrize("error", [ValueError("first line\nsecond line"), MemoryError(), torch.OutOfMemoryError("no memory"), AssertionError("")], ids=repr)
def test_a_measurement_that_raises_is_recorded(go, tmp_path, four, monkeypatch, error):
    real, calls = evaluate.evaluate, []

    def sometimes(engine, *args):
        calls.append(engine)
        if len(calls) == 2:
            raise error
        return real(engine, *args)

    monkeypatch.setattr(evaluate, "evaluate", sometimes)
    code, _, err = go(*FOUR)
    run = latest(tmp_path / "out")
    found, expected = timeless(run), timeless(four)
    failed = found.pop("swap_adjacent_30_35")
    assert code == 1 and failed["error"]["type"] == type(error).__name__ and failed["error"]["message"] == str(error)
    assert failed["weights"] == expected.pop("swap_adjacent_30_35")["weights"] and failed["weights"]["exact"]
    assert found == expected and "Traceback" not in err and "second line" not in err
    comparison = json.loads((run / "comparison.json").read_text())["experiments"]
    assert [row["status"] for row in comparison] == ["done", "failed", "done", "done"]
    assert run_all.main(["--resume", str(run)]) == 1 and len(calls) == 4  # still failed, and not tried again


def test_reading_that_fails_halfway_is_recorded_and_repaired(go, tmp_path, four, monkeypatch):
    """The disk fails in the middle of the blend's reads; what was torn is read again from what is left."""
    real, broken = franken.LiveModel._add_delta, []

    def torn(self, ref, into):
        if ref.source == "base" and not broken:
            broken.append(ref)
            next(iter(into.values())).fill_(7)
            raise OSError(errno.EIO, "Input/output error")
        return real(self, ref, into)

    monkeypatch.setattr(franken.LiveModel, "_add_delta", torn)
    code, _, err = go("--experiments", "blend_linear", "swap_adjacent_30_35")
    found = timeless(latest(tmp_path / "out"))
    assert code == 1 and found["blend_linear"]["error"]["type"] == "OSError" and found["blend_linear"]["weights"]["exact"]
    assert found["swap_adjacent_30_35"] == timeless(four)["swap_adjacent_30_35"]


def test_nan_is_a_result(go, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    code, out, _ = go("--experiments-file", tmp_path / "mine.py", "--experiments", "nan")
    run = latest(tmp_path / "out")
    for file in run.rglob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    found = read(run)["nan"]
    assert code == 0 and found["status"] == "done" and found["weights"]["exact"] and found["measurements"]["perplexity"]["perplexity"] is None
    assert found["weights"]["modified"] != found["weights"]["original"] and "nan " in out


def test_weights_that_do_not_come_back_stop_the_run(go, tmp_path, four, monkeypatch):
    """One bit of a weight that no recipe touches is flipped while the second experiment is measured."""
    real, calls = evaluate.evaluate, []

    def corrupting(engine, *args):
        calls.append(1)
        if len(calls) == 2:
            engine.live.banks[5].tensors["mlp.up_proj.weight"].view(torch.int32)[3, 4] ^= 1
        return real(engine, *args)

    monkeypatch.setattr(evaluate, "evaluate", corrupting)
    code, out, err = go("--experiments", "swap_distant_5_60", "blend_linear")
    run = latest(tmp_path / "out")
    last = err.splitlines()[-1]
    assert code == 1 and out == "" and "Traceback" not in err
    assert last.startswith("run_all.py: after swap_distant_5_60 the weights are not back to the original (fingerprint ")
    assert last.endswith(f"; finished experiments are kept; once mended: python run_all.py --resume {run}")
    found = read(run)
    assert set(found) == {"baseline_instruct", "swap_distant_5_60"} and not found["swap_distant_5_60"]["weights"]["exact"]
    assert timeless(run)["baseline_instruct"] == timeless(four)["baseline_instruct"]
    assert "DID NOT COME BACK EXACTLY" in (run / "summary.md").read_text()
    assert run_all.main(["--resume", str(run)]) == 0 and timeless(run)["blend_linear"] == timeless(four)["blend_linear"]


def test_going_back_that_fails_stops_the_run(go, tmp_path, monkeypatch):
    real, calls = franken.LiveModel.apply, []

    def apply(self, recipe):
        calls.append(recipe)
        if len(calls) == 5:  # the load, baseline twice, the swap, and back
            raise RuntimeError("the bus is gone")
        return real(self, recipe)

    monkeypatch.setattr(franken.LiveModel, "apply", apply)
    code, _, err = go(*FOUR)
    found = read(latest(tmp_path / "out"))
    assert code == 1 and "after swap_adjacent_30_35 the weights are not back" in err.splitlines()[-1]
    assert set(found) == {"baseline_instruct", "swap_adjacent_30_35"} and found["swap_adjacent_30_35"]["weights"]["restored"] is None


# ---- what a user gets wrong ----------------------------------------------------------------------------------------


def refused(result, words: str) -> None:
    """Exactly one line on stderr, which holds the words; nothing on stdout; a status that is not zero."""
    code, out, err = result
    assert code not in (0, None) and out == "" and "Traceback" not in err, err
    assert len(err.splitlines()) == 1 and err.startswith("run_all.py: ") and words in err, err


def own(body: str) -> str:
    return f"from experiments import *\nEXPERIMENTS = [Experiment('mine', 'g', lambda m: {body})]\n"


WRONG = {
    "unknown experiment": (["--experiments", "swap_adjcent_30_35"], "unknown experiment 'swap_adjcent_30_35'; the nearest is 'swap_adjacent_30_35'"),
    "unknown in a sweep": (["--sweep", "window", "--size", "1", "--experiments", "window_base_6_7"], "unknown experiment 'window_base_6_7'; the nearest is 'window_base_"),
    "unknown suite": (["--suites", "binary,perplexty"], "unknown suite 'perplexty'; there are informed, blind, binary"),
    "no suite": (["--suites", ","], "no suite is named"),
    "wide sweep": (["--sweep", "window", "--size", "1,7"], "a window of 7 layers does not fit a model of 6"),
    "window of nothing": (["--sweep", "window", "--size", "0"], "--size 0: expected whole layers, as in 1,4,8"),
    "window in words": (["--sweep", "window", "--size", "1,two"], "--size 1,two: expected whole layers"),
    "empty size": (["--sweep", "window", "--size", ""], "--size : expected whole layers"),
    "step of nothing": (["--sweep", "window", "--step", "0"], "--step 0: expected a whole number of layers"),
    "step of a half": (["--sweep", "window", "--step", "0.5"], "--step 0.5: expected a whole number of layers"),
    "old sweep": (["--sweep", "4"], "--sweep 4: expected one of window, replace, delete, double, noise, blend"),
    "size without windows": (["--sweep", "delete", "--size", "4"], "--size is about windows: it goes with --sweep window"),
    "step without a sweep": (["--step", "4"], "--step is about windows: it goes with --sweep window"),
    "source without a path": (["--source", "rune="], "--source rune=: expected NAME=PATH"),
    "source without a name": (["--source", "adapter"], "--source adapter: expected NAME=PATH"),
    "source of a taken name": (["--source", "base=x"], "--source base=x: expected NAME=PATH with a plain name other than instruct and base"),
    "two sources of a name": (["--source", "rune=x", "--source", "rune=y"], "there are two sources called rune"),
    "source that is not there": (["--source", "rune=/no/such/place"], "/no/such/place: no such directory"),
    "resume of nothing": (["--resume", "/no/such/run"], "cannot read /no/such/run/manifest.json: No such file or directory"),
    "text that is not there": (["--perplexity-file", "/no/such.txt"], "/no/such.txt: cannot be read as UTF-8 text"),
    "file that is not there": (["--experiments-file", "/no/such.py"], "No such file or directory"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_line(go, tmp_path, name):
    argv, words = WRONG[name]
    refused(go(*argv), words)
    assert not list((tmp_path / "out").glob("run_*"))


FILES = {
    "layer out of range": (own("swap(m.model, 2, 6)"), "experiment mine: layer 6 is out of range: the model has layers 0 to 5"),
    "overlapping chunks": (own("swap_chunks(m.model, (0, 3), (2, 5))"), "experiment mine: chunks [0:3] and [2:5] overlap"),
    "syntax error": ("EXPERIMENTS = [\n", "mine.py: cannot be used as an experiments file: SyntaxError"),
    "an exception": (own("m.no_such_thing"), "experiment mine: AttributeError"),
    "a taken name": (own("m.model").replace("mine", "shuffle_all"), "there are two experiments called 'shuffle_all'"),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_experiments_files_are_one_line(go, tmp_path, name):
    text, words = FILES[name]
    (tmp_path / "mine.py").write_text(text)
    refused(go("--experiments-file", tmp_path / "mine.py"), words)
    assert not list((tmp_path / "out").glob("run_*"))


@pytest.mark.parametrize("content", [b"", b" \n\t", b"\xff\xfe wide"])
def test_wrong_texts_are_one_line(go, tmp_path, content):
    (tmp_path / "text.txt").write_bytes(content)
    refused(go("--perplexity-file", tmp_path / "text.txt"), "text.txt: ")


def test_a_users_text_is_what_is_measured(go, tmp_path):
    (tmp_path / "text.txt").write_text("Grün ist die Wiese.", encoding="utf-8")
    assert go("--perplexity-file", tmp_path / "text.txt", "--suites", "perplexity", "--experiments", "baseline_instruct")[0] == 0
    (entry,) = read(latest(tmp_path / "out"))["baseline_instruct"]["measurements"]["perplexity"]["texts"]
    assert (entry["id"], entry["tokens"]) == ("text.txt", len("Grün ist die Wiese.".encode()) - 1)


def damaged(tmp_path, what) -> tuple[Path, str]:
    """A checkpoint with something wrong, and what must be said."""
    path = tmp_path / what
    changes = {"other width": {"intermediate_size": 64}, "other depth": {"layers": 5}, "other heads": {"num_key_value_heads": 4}}
    small_run.checkpoint(path, 3, chat=what != "no template", family="llama" if what == "other family" else "qwen2",
                         shards=2 if "shard" in what else 1, **({"layers": 6} | changes.get(what, {})))
    shard = path / "model-00002-of-00002.safetensors"
    if what == "missing shard":
        shard.unlink()
    elif what == "truncated shard":
        os.truncate(shard, shard.stat().st_size - 100)
    elif what == "broken config":
        (path / "config.json").write_text("{")
    elif what == "no weights":
        (path / "model.safetensors").unlink()
    return path, {
        "other width": "do not match: intermediate_size is 48 in one and 64 in the other", "other depth": "num_hidden_layers is 6 in one and 5",
        "other heads": "num_key_value_heads is 2 in one and 4", "other family": "model_type is qwen2 in one and llama",
        "missing shard": f"{shard}: the shard is missing", "truncated shard": f"{shard}: truncated", "no weights": "no .safetensors weights there",
        "broken config": "cannot read config.json"}.get(what, "")


@pytest.mark.parametrize("what", ["other width", "other depth", "other heads", "other family", "missing shard", "truncated shard", "broken config", "no weights"])
def test_bases_that_do_not_serve_are_one_line(go, tmp_path, what):
    path, words = damaged(tmp_path, what)
    refused(go("--base", path), words)
    assert not list((tmp_path / "out").glob("run_*"))


def test_tokenizers_that_do_not_serve_are_one_line(go, pair, tmp_path):
    refused(go("--instruct", damaged(tmp_path, "no template")[0]), "no template: the tokenizer has no chat template")
    mute = tiny.write_checkpoint(tmp_path / "mute", "qwen2", layers=6)
    refused(go("--instruct", mute), "these questions cannot be asked: the tokenizer has no single token for Yes")
    refused(go("--instruct", tmp_path / "none"), "no such directory")


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/none", "/dev/full"])
def test_unwritable_output_is_seen_before_anything_is_loaded(pair, tmp_path, capfd, monkeypatch, where):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(pairs, "open_pair", lambda *args: pytest.fail("loaded"))
    code = run_all.main(small_run.arguments(pair, tmp_path / where))
    refused((code, *capfd.readouterr()), f"cannot write results to {tmp_path / where}: ")


@pytest.mark.parametrize("after", [1, 3])
def test_a_disk_that_fills_up_keeps_what_is_finished(go, tmp_path, four, monkeypatch, after):
    """The manifest is the first file that is written, then one per experiment."""
    real, calls = os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd)

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", fsync)
        code, out, err = go(*FOUR)
    run = latest(tmp_path / "out")
    last = err.splitlines()[-1]
    assert (code, out) == (1, "") and "Traceback" not in err
    assert last.startswith(f"run_all.py: cannot write {run / 'experiments'}/") and "No space left on device; finished experiments are kept" in last
    assert set(read(run)) == (set() if after == 1 else {"baseline_instruct", "swap_adjacent_30_35"})
    assert not list(run.rglob(".*partial")) and last.endswith(f"python run_all.py --resume {run}")
    assert run_all.main(["--resume", str(run)]) == 0 and timeless(run) == timeless(four)


def test_a_disk_that_is_full_when_the_run_begins(go, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = go(*FOUR)
    refused((code, out, err), "manifest.json: No space left on device")


def resumed(run, capfd, *more):
    capfd.readouterr()
    code = run_all.main(["--resume", str(run), *more])
    return code, *capfd.readouterr()


@pytest.mark.parametrize("how", ["truncated", "schema", "another recipe"])
def test_a_corrupt_result_stops_the_resumed_run_before_anything_is_lost(finished, four, capfd, how):
    file = finished / "experiments" / "swap_adjacent_30_35.json"
    (finished / "experiments" / "blend_linear.json").unlink()
    text = file.read_text()
    broken = {"truncated": text[:-300], "schema": text.replace('"exact": true', '"exact": "true"'), "another recipe": text.replace('"head": "instruct"', '"head": "base"')}[how]
    assert broken != text
    file.write_text(broken)
    before = stamps(finished)
    code, out, err = resumed(finished, capfd)
    last = err.splitlines()[-1]
    assert (code, out) == (1, "") and "Traceback" not in err and last.startswith(f"run_all.py: {file} "), err
    assert ("was made with another recipe" if how == "another recipe" else "is corrupt (") in last and stamps(finished) == before
    file.rename(finished / "aside.json")  # what the message says
    assert resumed(finished, capfd)[0] == 0 and timeless(finished) == timeless(four)


def test_corrupt_and_foreign_manifests_are_one_line(finished, capfd):
    manifest = finished / "manifest.json"
    whole = json.loads(manifest.read_text())
    for broken, words in ((whole | {"schema_version": 9}, "not a manifest of version 1"), ({}, "not a manifest of version 1"),
                          (whole | {"settings": {}}, "manifest.json is corrupt (the setting all is missing)"),
                          ({k: v for k, v in whole.items() if k != "layers"}, "manifest.json is corrupt (layers is missing")):
        manifest.write_text(json.dumps(broken))
        refused(resumed(finished, capfd), words)
    manifest.write_text(json.dumps(whole)[:-1])
    refused(resumed(finished, capfd), "manifest.json is corrupt (Expecting")


def test_a_run_is_not_resumed_with_other_weights_questions_or_experiments(finished, capfd, monkeypatch):
    manifest = finished / "manifest.json"
    whole = json.loads(manifest.read_text())
    for changed, what in (({"original_fingerprint": "0" * 32}, "weights"), ({"protocol": whole["protocol"] | {"prompts_sha256": "0"}}, "protocol"),
                          ({"experiments": ["baseline_instruct"]}, "experiments")):
        manifest.write_text(json.dumps(whole | changed))
        refused(resumed(finished, capfd), f"{finished} was made with other {what}; start a new run")


def test_the_large_pair_without_a_gpu_stops_before_any_download(capfd, tmp_path, monkeypatch):
    import huggingface_hub

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, lambda *args, **kwargs: pytest.fail("a download"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = run_all.main(["--output", str(tmp_path / "out")])
    out, err = capfd.readouterr()
    refused((code, out, err), "qwen2.5-coder-32b needs 69 GiB of GPU memory (61 GiB of weights) and this machine has no GPU and ")
    assert err.rstrip().endswith("GiB of free memory; --pair smollm2-135m runs on any laptop")
    refused((run_all.main(["--pair", "smollm3", "--output", str(tmp_path / "out")]), *capfd.readouterr()), "unknown pair 'smollm3'; there are qwen2.5-coder-32b, ")
    refused((run_all.main(["--base", "x", "--output", str(tmp_path / "out")]), *capfd.readouterr()), "--base and --instruct go together")


@pytest.mark.parametrize("flag", ["--samples", "--max-new-tokens", "--priority-limit", "--batch-size"])
def test_counts_below_one_are_refused(capsys, flag):
    with pytest.raises(SystemExit) as caught:
        run_all.main([flag, "0"])
    assert caught.value.code == 2 and f"{flag} must be at least 1" in capsys.readouterr().err.splitlines()[-1]


# ---- the real model ------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_laptop_size_pair_from_end_to_end(smollm2, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real battery and the real report
    assert run_all.main(["--pair", "smollm2-135m", "--experiments", "swap_adjacent_30_35", "--suites", "quick", "--output", str(tmp_path)]) == 0
    run = latest(tmp_path)
    found = read(run)
    assert set(found) == {"baseline_instruct", "swap_adjacent_30_35"} and all(r["weights"]["exact"] for r in found.values())
    before, after = (found[name]["measurements"]["perplexity"] for name in ("baseline_instruct", "swap_adjacent_30_35"))
    assert before["tokens"] > 2000 and 8 < before["perplexity"] < 60 and 1.02 < after["perplexity"] / before["perplexity"] < 20
    (published,) = [p for p in found["baseline_instruct"]["measurements"]["binary"]["probes"] if p["published"]]
    assert published["mass"] > 0.05 and published["answered"]
    assert (run / "report.html").stat().st_size > 10_000
