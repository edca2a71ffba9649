"""Damage-matched noise: the bisection on curves that are known, and noise twins in whole, interrupted and
failing runs."""

import json
import math
import os
import shutil
import signal

import pytest
import small_battery
from cli_runs import latest, read, refused, stamps, timeless

import evaluate
import experiments
import prompts
import run_all
from runner import matched_noise as mn
from suites.perplexity import Perplexity
from surgery.recipes import Recipe, identity, perturb

# with the baseline
SWAPS = [
    "--experiments",
    "swap_distant_10_55",
    "swap_adjacent_31_32",
    "placebo_mlp_1",
    "--matched-noise",
    "--suites",
    "quick",
]
TWINS = ["swap_distant_10_55__matched_noise", "swap_adjacent_31_32__matched_noise"]


# ---- the bisection -----------------------------------------------------------------------------------------


def power(scale: float, exponent: float):
    """A made-up model whose perplexity under noise is 20 + scale * fraction ** exponent."""
    return lambda fraction: 20 + scale * fraction**exponent


@pytest.mark.parametrize("scale, exponent", [(1000, 2), (30, 1), (1e6, 3)])
@pytest.mark.parametrize("target", [20.21, 20.5, 21, 34.2, 46.6])
def test_the_fraction_is_the_one_that_the_curves_inverse_says(scale, exponent, target):
    curve = power(scale, exponent)
    tried = mn.bisect(target, 20.0, curve)
    fraction, reached = mn.nearest(tried, target)
    assert reached == curve(fraction)

    def fits(perplexity):
        rise = math.log(perplexity / 20) / math.log(target / 20)
        return abs(perplexity / target - 1) <= 0.02 and 0.9 <= rise <= 1.1

    assert fits(reached) and len(tried) <= 12
    # it ends at the first
    assert (fraction, reached) == tried[-1] and not any(fits(p) for _, p in tried[:-1])
    exact = ((target - 20) / scale) ** (1 / exponent)
    low, high = (
        ((target * f - 20) / scale) ** (1 / exponent) if target * f > 20 else 0 for f in (0.98, 1.02)
    )
    assert low <= fraction <= high and low < exact < high


def test_the_grid_is_fixed_and_depends_on_the_answers_alone():
    """The first try is always the same, the second one of two: what one search measured serves the others."""
    targets = (20.1, 21, 25, 60, 300, 1e9)
    paths = [[f for f, _ in mn.bisect(target, 20.0, power(1000, 2))] for target in targets]
    assert paths[0][0] == pytest.approx(math.sqrt(mn.LOWEST * mn.HIGHEST), rel=1e-5)
    assert len({p[0] for p in paths}) == 1 and len({p[1] for p in paths if len(p) > 1}) == 2
    every = {f for p in paths for f in p}
    assert sum(map(len, paths)) > 1.2 * len(every)
    for path in paths:
        steps = [abs(math.log(b / a)) for a, b in zip(path, path[1:], strict=False)]
        assert steps == pytest.approx(
            [math.log(mn.HIGHEST / mn.LOWEST) / 2 ** (k + 2) for k in range(len(steps))], rel=1e-3
        )


WILD = {
    "falls": lambda f: 1e4 / (1 + f),
    "flat below": lambda f: 20.0,
    "flat above": lambda f: 1e9,
    "saw": lambda f: 20 + 1e4 * abs(math.sin(1e3 * f)),
    "a jump over the target": lambda f: 20.0 if f < 0.1 else 1e5,
    "undefined beyond": lambda f: 20 + f if f < 0.05 else None,
    "undefined below": lambda f: None if f < 0.05 else 20 + f,
    "never defined": lambda f: None,
}


@pytest.mark.parametrize("name", WILD)
@pytest.mark.parametrize("target", [21.0, 500.0, 1e6, None])
def test_no_curve_makes_it_loop_or_fail(name, target):
    tried = mn.bisect(target, 20.0, WILD[name])
    assert 1 <= len(tried) <= 12
    assert len({f for f, _ in tried}) == len(tried)
    assert all(mn.LOWEST <= f <= mn.HIGHEST for f, _ in tried)
    fraction, reached = mn.nearest(tried, target)
    assert (fraction, reached) in tried
    known = [p for _, p in tried if p is not None]
    if target is not None and known:
        assert max(reached / target, target / reached) == min(max(p / target, target / p) for p in known)


# ---- in a run ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def battery(monkeypatch):
    small_battery.use(monkeypatch)


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """An uninterrupted run of SWAPS. Not to be written to."""
    out = tmp_path_factory.mktemp("matched")
    with pytest.MonkeyPatch.context() as m:
        small_battery.use(m)
        assert run_all.main(small_battery.arguments(pair, out, *SWAPS)) == 0
    return latest(out)


def ppl(result: dict) -> float | None:
    return result["measurements"]["perplexity"]["perplexity"]


def test_twins_have_the_perplexity_of_their_experiments(whole):
    found, manifest = read(whole), json.loads((whole / "manifest.json").read_text())
    names = [
        "baseline_instruct",
        "swap_distant_10_55",
        TWINS[0],
        "swap_adjacent_31_32",
        TWINS[1],
        "placebo_mlp_1",
    ]
    assert manifest["experiments"] == names and set(found) == set(names)  # no twin of baseline and placebo
    assert [
        row["name"] for row in json.loads((whole / "comparison.json").read_text())["experiments"]
    ] == names
    for name in TWINS:
        twin, of = found[name], found[name.removesuffix("__matched_noise")]
        matched = twin["experiment"]["matched"]
        assert of["experiment"]["matched"] is None
        assert matched["of"] == of["experiment"]["name"]
        assert matched["ok"]
        assert matched["target_perplexity"] == ppl(of) > 1.01 * ppl(found["baseline_instruct"])
        # the noise of the search is the noise that was measured
        assert matched["reached_perplexity"] == ppl(twin)
        assert matched["within"] == abs(ppl(twin) / ppl(of) - 1) <= 0.02 and twin["experiment"]["notes"] == []
        assert (
            matched["evaluations"][-1] == [matched["fraction"], ppl(twin)]
            and len(matched["evaluations"]) <= 12
        )
        assert Recipe.from_json(twin["experiment"]["recipe"]) == perturb(identity(6), matched["fraction"], 0)
        assert (twin["experiment"]["group"], twin["experiment"]["control"]) == ("control", "matched noise")
        assert (
            list(twin["measurements"]) == twin["experiment"]["suites"] == ["binary", "perplexity"]
            and twin["weights"]["exact"]
        )
        assert twin["weights"]["modified"] != twin["weights"]["original"]
    assert (
        found[TWINS[0]]["experiment"]["matched"]["fraction"]
        != found[TWINS[1]]["experiment"]["matched"]["fraction"]
    )


def test_a_twin_does_not_depend_on_what_ran_before(whole, go, tmp_path):
    """Alone, without the baseline and with nothing remembered from another search, it is the same to the last
    digit."""
    assert (
        go("--experiments", "swap_adjacent_31_32", "--no-baseline", "--matched-noise", "--suites", "quick")[0]
        == 0
    )
    alone = timeless(latest(tmp_path / "out"))
    assert set(alone) == {"swap_adjacent_31_32", TWINS[1]} and alone[TWINS[1]] == timeless(whole)[TWINS[1]]
    other = read(whole)[TWINS[0]]["experiment"]["matched"]["evaluations"]
    # which was measured once for both
    assert alone[TWINS[1]]["experiment"]["matched"]["evaluations"][0] == other[0]


def test_another_seed_is_other_noise(whole, go, tmp_path):
    assert (
        go("--experiments", "swap_adjacent_31_32", "--matched-noise", "--seed", "3", "--suites", "quick")[0]
        == 0
    )
    found = read(latest(tmp_path / "out"))[TWINS[1]]["experiment"]
    assert {edit["seed"] for slot in found["recipe"]["slots"] for edit in slot["edits"]} == {3}
    assert found["matched"]["evaluations"] != read(whole)[TWINS[1]]["experiment"]["matched"]["evaluations"]


MINE = """
from experiments import Experiment, perturb, swap
EXPERIMENTS = [Experiment("gentle", "mine", lambda m: perturb(m.model, 1e-5, m.seed)),
               Experiment("nan", "mine", lambda m: perturb(m.model, 1e30, m.seed)),
               Experiment("unmeasured", "mine", lambda m: swap(m.model, 0, 5), suites=("binary",)),
               Experiment("nowhere", "mine", lambda m: swap(m.model, 0, 50 // 10), suites=("perplexity",))]
"""


def test_experiments_without_a_twin_and_twins_without_a_match_say_why(go, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setattr(mn, "TOLERANCE", 1e-9)  # which no noise reaches
    assert go("--experiments-file", tmp_path / "mine.py", "--matched-noise")[0] == 0
    found = {name: r["experiment"] for name, r in read(latest(tmp_path / "out")).items()}
    twins = {name for name in found if name.endswith("__matched_noise")}
    assert twins == {"nan__matched_noise", "nowhere__matched_noise"}
    (note,) = found["gentle"]["notes"]
    assert note.startswith("no matched noise: its perplexity, ") and note.endswith("by more than 1%")
    assert found["unmeasured"]["notes"] == ["no matched noise: its perplexity was not measured"]
    assert found["nan"]["notes"] == found["nowhere"]["notes"] == found["baseline_instruct"]["notes"] == []
    destroyed, missed = found["nan__matched_noise"], found["nowhere__matched_noise"]
    assert (
        not destroyed["matched"]["ok"]
        and destroyed["matched"]["target_perplexity"] is destroyed["matched"]["within"] is None
    )
    assert destroyed["matched"]["fraction"] == mn.HIGHEST and len(destroyed["matched"]["evaluations"]) == 1
    assert destroyed["notes"] == [
        "nan has no finite perplexity, which no noise can be matched to: this is the strongest that is tried"
    ]
    assert not missed["matched"]["ok"] and len(missed["matched"]["evaluations"]) == 12
    (note,) = missed["notes"]
    assert (
        note.startswith("no noise was found that raises perplexity to ")
        and "the nearest of 12 tries reached " in note
    )
    assert missed["matched"]["within"] == min(
        abs(p / missed["matched"]["target_perplexity"] - 1) for _, p in missed["matched"]["evaluations"]
    )
    assert found["baseline_instruct"]["suites"] == [
        name for name in evaluate.SUITES if name in prompts.GROUPS["all"]
    ]


def test_noise_that_cannot_reach_it_says_so(go, tmp_path, monkeypatch):
    monkeypatch.setattr(mn, "HIGHEST", 0.002)
    assert go("--experiments", "swap_distant_10_55", "--matched-noise", "--suites", "quick")[0] == 0
    found = read(latest(tmp_path / "out"))[TWINS[0]]["experiment"]
    assert not found["matched"]["ok"]
    assert found["matched"]["within"] > 0.02
    assert len(found["notes"]) == 1
    assert found["matched"]["fraction"] in [f for f, _ in found["matched"]["evaluations"]]


@pytest.mark.parametrize("stop_at", [TWINS[0], TWINS[0] + ".json", "swap_adjacent_31_32"])
def test_killed_around_a_twin_and_resumed_gives_the_files_of_an_uninterrupted_run(
    pair, whole, tmp_path, capfd, stop_at
):
    """kill -9 in the middle of the first bisection, of writing the twin, and of the experiment after it."""
    log = tmp_path / "log"
    child = small_battery.in_child(
        small_battery.arguments(pair, tmp_path / "out", *SWAPS), log, stop_at=stop_at
    )
    small_battery.wait_for(log.with_suffix(".reached"), child)
    os.kill(child.pid, signal.SIGKILL)
    child.join(90)
    run = latest(tmp_path / "out")
    assert set(read(run)) == {
        "baseline_instruct",
        "swap_distant_10_55",
        *([TWINS[0]] if stop_at == "swap_adjacent_31_32" else []),
    }
    # so that reports miss it
    assert TWINS[0] in json.loads((run / "manifest.json").read_text())["experiments"]
    before = stamps(run)
    assert run_all.main(["--resume", str(run)]) == 0
    assert timeless(run) == timeless(whole) and {
        k: v for k, v in stamps(run).items() if k in before and "partial" not in k
    } == {k: v for k, v in before.items() if "partial" not in k}
    manifests = [json.loads((path / "manifest.json").read_text())["experiments"] for path in (run, whole)]
    assert manifests[0] == manifests[1]


def test_between_an_experiment_and_its_twin(whole, tmp_path, monkeypatch):
    """The experiment is saved and the twin not yet announced; a finished run is then not measured again."""
    run = tmp_path / "copy"
    shutil.copytree(whole, run)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["experiments"].remove(TWINS[1])
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "experiments" / f"{TWINS[1]}.json").unlink()
    assert run_all.main(["--resume", str(run)]) == 0 and timeless(run) == timeless(whole)
    before = stamps(run)
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: pytest.fail("measured again"))
    assert run_all.main(["--resume", str(run)]) == 0 and stamps(run) == before


def test_a_bisection_that_fails_is_a_failed_experiment(go, whole, tmp_path, monkeypatch):
    real, calls = Perplexity.measure, []

    def sometimes(self, *args):
        calls.append(1)
        if len(calls) == 3:  # baseline, swap, then the first try
            raise RuntimeError("the bus is gone")
        return real(self, *args)

    monkeypatch.setattr(Perplexity, "measure", sometimes)
    code, _, err = go(*SWAPS)
    found, expected = timeless(latest(tmp_path / "out")), timeless(whole)
    failed = found.pop(TWINS[0])
    assert code == 1
    assert f"{TWINS[0]} failed: RuntimeError: the bus is gone" in err
    assert err.splitlines()[-1].startswith("1 of 6 experiments failed")
    assert failed["status"] == "failed"
    assert failed["weights"]["exact"]
    assert failed["experiment"]["matched"]["fraction"] is None
    assert expected.pop(TWINS[0]) and found == expected


def test_an_unmodified_model_that_cannot_be_measured_stops_before_the_experiment(go, tmp_path, monkeypatch):
    def broken(self, *args):
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(Perplexity, "measure", broken)
    code, out, err = go("--experiments", "swap_adjacent_31_32", "--no-baseline", "--matched-noise")
    assert code == 1
    assert out == ""
    assert (
        "run_all.py: the unmodified model's perplexity cannot be measured: RuntimeError: no; finished"
        in err.splitlines()[-1]
    )
    assert read(latest(tmp_path / "out")) == {}


def test_the_bar_names_the_bisection_and_the_command_what_is_missing(go):
    assert (
        "swap_adjacent_31_32__matched_noise: bisection of the noise"
        in go("--experiments", "swap_adjacent_31_32", "--matched-noise", "--suites", "quick")[2]
    )
    refused(
        go("--matched-noise", "--suites", "binary"),
        "--matched-noise matches perplexity, which is not among the suites given",
    )


def test_names_of_twins_are_taken(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from experiments import *\nEXPERIMENTS = [Experiment('a__matched_noise', 'g', lambda m: m.model)]\n"
    )
    with pytest.raises(experiments.FrankenError, match="a__matched_noise.*plain name"):
        experiments.load_file(str(tmp_path / "mine.py"))


# ---- the real model ----------------------------------------------------------------------------------------


@pytest.mark.real
def test_a_swap_of_the_real_model_is_matched(smollm2, tmp_path, monkeypatch):
    monkeypatch.undo()
    argv = [
        "--pair",
        "smollm2-135m",
        "--experiments",
        "swap_adjacent_30_35",
        "--matched-noise",
        "--suites",
        "quick",
        "--output",
        str(tmp_path),
    ]
    assert run_all.main(argv) == 0
    found = read(latest(tmp_path))
    matched = found["swap_adjacent_30_35__matched_noise"]["experiment"]["matched"]
    assert matched["ok"]
    assert 0.02 < matched["fraction"] < 0.5
    assert matched["target_perplexity"] == ppl(found["swap_adjacent_30_35"])
    points = sorted(map(tuple, matched["evaluations"]))
    assert [p for _, p in points] == sorted(p for _, p in points)  # perplexity rises with noise
