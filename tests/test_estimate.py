"""The dry run: what it says against counts made by hand, and that it neither loads nor downloads anything."""

import json

import pytest
import tiny
import torch

import evaluate
import prompts
import run_all
from errors import FrankenError
from experiments import EXPERIMENTS, select
from files import ROOT
from runner import estimate, machines, pairs
from runner.choosing import chosen_suites, make_plans, settle_short
from suites.base import Protocol

SIDES = {"instruct", "base"}


def moved(name: str, layers: int = 64) -> tuple[int, int, int]:
    return estimate.movements(select([name], EXPERIMENTS)[0].plan(layers).recipe, layers)


@pytest.mark.parametrize(
    "name, read, copied, computed",
    [
        ("baseline_instruct", 0, 0, 0),
        ("baseline_base", 64, 0, 0),
        ("franken_instruct_first_48", 16, 0, 0),
        ("swap_distant_10_55", 0, 2, 0),
        ("swap_chunk_25_35_with_45_55", 0, 20, 0),
        ("shuffle_all", 0, 64, 0),
        ("perturb_late_5pct", 0, 0, 16),
        ("blend_linear", 63, 0, 62),  # position 0 is all instruct, position 63 all base
        ("delete_30_34", 0, 0, 0),  # layers are left out, none is moved
        ("repeat_24_40", 0, 0, 0),
    ],
)
def test_what_moves(name, read, copied, computed):
    assert moved(name) == (read, copied, computed)


@pytest.fixture
def nothing_loaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a dry run loads and downloads nothing")

    for target in ("locate", "from_wheels", "LiveModel"):
        monkeypatch.setattr(pairs, target, refuse)
    monkeypatch.setattr(estimate, "machine_rates", lambda dtype: (1e12, 1e10))


def test_the_plan_is_printed_without_loading(nothing_loaded, capsys):
    assert (
        run_all.main(
            [
                "--pair",
                "smollm2-135m",
                "--experiments",
                "swap_distant_10_55",
                "--device-map",
                "cpu",
                "--dry-run",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "2 experiments on 30 layers" in out  # the baseline is added
    assert "[4] <- instruct[25]; [25] <- instruct[4]" in out and "2 layers copied in place" in out


def test_the_default_pair_can_be_planned_anywhere(nothing_loaded, monkeypatch, capsys):
    monkeypatch.setattr(pairs, "cpu_has_bf16", lambda: True)
    assert run_all.main(["--priority-limit", "6", "--dry-run"]) == 0
    assert "61.0 GiB for weights" in capsys.readouterr().out or torch.cuda.is_available()


def seconds(out: str) -> dict[str, float]:
    """The estimate printed for each experiment, by name; a noise twin by the name of its experiment and a
    plus."""
    found, name = {}, None
    for line in out.splitlines():
        if line.startswith("  ") and line[2] != " ":
            name = line.split()[0]
        if line.startswith("    and __matched_noise"):
            found[name + "+"] = float(line.split()[-2])
        elif "at most about" in line and line.startswith("  "):
            found[name] = float(line.split()[-2])
    return found


def test_each_experiment_is_counted_with_its_own_suites_and_its_noise_twin(nothing_loaded, capsys):
    argv = [
        "--pair",
        "smollm2-135m",
        "--device-map",
        "cpu",
        "--experiments",
        "shuffle_all",
        "placebo_mlp_1",
        "--dry-run",
    ]
    assert run_all.main(argv) == 0
    out = capsys.readouterr().out
    alone = seconds(out)
    assert (
        set(alone) == {"baseline_instruct", "shuffle_all", "placebo_mlp_1"}
        and alone["placebo_mlp_1"] < alone["shuffle_all"] == alone["baseline_instruct"]
    )
    assert (
        out.count("work per experiment with ") == 3 - 1
        and "work per experiment with binary, perplexity: " in out
    )
    assert run_all.main([*argv, "--matched-noise"]) == 0
    out = capsys.readouterr().out
    both = seconds(out)
    assert {k: v for k, v in both.items() if k != "shuffle_all+"} == alone and set(both) - set(alone) == {
        "shuffle_all+"
    }
    perplexity = (
        estimate.workload(Protocol(suites=("perplexity",)))[0]
        / estimate.workload(Protocol(suites=("binary", "perplexity")))[0]
    )
    assert both["shuffle_all+"] == pytest.approx(alone["placebo_mlp_1"] * (1 + 12 * perplexity), rel=0.1)
    assert "at most 12 measurements of perplexity" in out


@pytest.mark.parametrize(
    "kind, first, count",
    [("window", "window_base_0_4", 7), ("delete", "delete_0", 30), ("noise", "noise_0.005", 7)],
)
def test_sweeps_are_planned_at_the_pairs_depth(nothing_loaded, capsys, kind, first, count):
    assert run_all.main(["--pair", "smollm2-135m", "--sweep", kind, "--device-map", "cpu", "--dry-run"]) == 0
    planned = seconds(capsys.readouterr().out)
    assert list(planned)[:2] == ["baseline_instruct", first] and len(planned) == 1 + count


def test_fewer_suites_mean_less_work():
    everything, quick = (
        estimate.workload(Protocol()),
        estimate.workload(Protocol(suites=("binary", "perplexity"))),
    )
    assert quick[1:] == (0, 0) and 0 < quick[0] < everything[0]
    injected = estimate.workload(Protocol(suites=("injection",)))
    # 28 first turns a framing, 41 questions on each
    assert injected[1:] == (0, 0) and injected[0] > 25 * 1.5 * 2 * (1 + 3 * 9) * 41
    binary, formats = (
        estimate.workload(Protocol(suites=suites))[0] for suites in (("binary",), ("binary", "formats"))
    )
    assert formats - binary == pytest.approx(
        1.5 * sum(len(p.text.split()) + 25 for p in prompts.FORMAT_PROBES), abs=1
    )
    assert estimate.workload(Protocol(samples=2))[1] - everything[1] == 16 * Protocol().max_new_tokens


def test_a_hub_id_is_not_fetched(nothing_loaded, capsys):
    assert run_all.main(["--base", "owner/base", "--instruct", "owner/instruct", "--dry-run"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(FrankenError, match="downloads nothing"):
        estimate.model_shape(
            run_all.parse_arguments(["--base", "owner/base", "--instruct", "owner/instruct"])
        )


@pytest.mark.parametrize(
    "name, quick, whole", [("h100-80gb", 0.88, 3.81), ("h200-141gb", 0.87, 3.19)], ids=lambda x: x
)
def test_a_measured_machine_is_planned_for_with_what_was_measured_there(
    nothing_loaded, capsys, name, quick, whole
):
    """One experiment of the 32B shape with all suites, and one layer of a sweep."""
    dry = ["--dry-run", "--for", name]
    assert run_all.main([*dry, "--experiments", "baseline_instruct"]) == 0
    assert seconds(capsys.readouterr().out)["baseline_instruct"] == round(whole)
    assert run_all.main([*dry, "--sweep", "replace", "--suites", "quick"]) == 0
    assert seconds(capsys.readouterr().out)["replace_9"] == pytest.approx(quick, abs=0.51)


def test_the_evening_on_another_machine_is_planned_from_this_one(nothing_loaded, monkeypatch, capsys):
    monkeypatch.setattr(pairs, "available_memory", lambda device: [4 * 2**30])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_all.main(["--dry-run", "--for", "h100-80gb", "--all"]) == 0
    out = capsys.readouterr().out
    assert "on h100-80gb: it fits" in out and "131.1 GB of checkpoints" in out
    assert "here: refused before anything is downloaded: qwen2.5-coder-32b needs 69 GiB" in out
    assert "formats, capability" in out  # a GPU is asked everything, whatever is here
    assert run_all.main(["--dry-run", "--for", "a100-40gb"]) == 0
    out = capsys.readouterr().out
    assert "on a100-40gb: refused, for want of GPU memory" in out and "NOT measured" in out


def test_two_cards_hold_what_one_does_not(nothing_loaded, capsys):
    assert run_all.main(["--dry-run", "--for", "2x40gb"]) == 0
    out = capsys.readouterr().out
    assert "2x40gb has 39.4, 39.4 GiB of GPU memory in all\non 2x40gb: it fits" in out
    assert "memory needed: 61.0 GiB for weights and about 8.0 GiB beside them" in out


def test_an_unknown_machine_is_named_with_those_there_are(nothing_loaded, capsys):
    assert run_all.main(["--dry-run", "--for", "toaster"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(name in err for name in machines.MACHINES)
    with pytest.raises(SystemExit):
        run_all.parse_arguments(["--for", "h100-80gb"])


def test_a_first_run_on_a_cpu_is_asked_the_short_form(nothing_loaded, monkeypatch, capsys):
    """By priority alone; what is named is asked everything, and so is whatever --no-short says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def asked(*argv):
        args = run_all.parse_arguments(["--pair", "smollm2-135m", *argv])
        settle_short(args, gpu=False)
        plans, _ = make_plans(args, 30, SIDES, chosen_suites(args))
        return {plan.experiment.name: plan.experiment.suites for plan in plans}

    first = asked("--priority-limit", "6")
    assert list(first) == [e.name for e in EXPERIMENTS[:6]] and asked() == first
    assert first["franken_instruct_first_32"] == ("informed", "binary", "perplexity")
    assert first["baseline_instruct"] == ("informed", "binary", "perplexity")
    assert first["placebo_both_1"] == ("binary", "perplexity")
    assert first["concept_injection_short"] == ("injection_short",)
    for more in (["--no-short"], ["--all"], ["--experiments", "franken_instruct_first_32"]):
        assert asked(*more)["franken_instruct_first_32"] == prompts.GROUPS["all"]
    assert asked("--all", "--short")["swap_distant_10_55"] == prompts.GROUPS["short"]
    assert run_all.main(["--dry-run", "--short", "--suites", "quick"]) == 1
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pair", "fits", "lacks"),
    [
        ("qwen2.5-coder-14b", "a100-40gb", "a10-24gb"),  # 27.5 GiB on 39.4 GiB
        ("qwen2.5-coder-32b", "2x40gb", "a100-40gb"),
        ("qwen2.5-coder-7b", "a10-24gb", None),
    ],
)
def test_a_plan_says_which_cards_hold_the_model(capsys, pair, fits, lacks):
    assert run_all.main(["--pair", pair, "--priority-limit", "1", "--dry-run"]) == 0
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("by GPU memory it fits")
    ]
    holding, _, lacking = line.partition("; not ")
    assert fits in holding and (lacks is None or lacks in lacking)


def test_a_quantized_checkpoint_is_planned_with_the_memory_that_it_takes(tmp_path, capsys):
    """Dequantized: 4 bits on the disk are 16 in memory."""
    path = tiny.write_checkpoint(tmp_path / "model", "qwen2", layers=2)
    config = json.loads((path / "config.json").read_text())
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    argv = ["--instruct", str(path), "--priority-limit", "1", "--dry-run", "--device-map", "cpu"]
    assert run_all.main(argv) == 0
    assert "quantized by bitsandbytes: they are dequantized on reading" in capsys.readouterr().out


MINE = """
from experiments import Experiment
from franken import swap

EXPERIMENTS = [Experiment("mine", "own", lambda m: swap(m.recipe, 1, 2), "Does my own swap show?")]
"""


def counted(suites) -> tuple[int, int]:
    """(replies, tokens in them at most) of one experiment, from the questions themselves."""
    protocol = Protocol(suites)
    budgets = [b for name in suites for b in evaluate.SUITES[name]().work(protocol).budgets]
    return len(budgets), sum(budgets)


def test_a_long_run_on_a_cpu_says_what_the_short_form_would_save(
    nothing_loaded, monkeypatch, capsys, tmp_path
):
    """Where nobody said which form: not once it was said, suites were chosen, nothing would be saved, or a
    GPU does the work."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "mine.py").write_text(MINE)
    mine = ["--pair", "smollm2-135m", "--dry-run", "--experiments-file", str(tmp_path / "mine.py")]

    def told(*argv):
        assert run_all.main([*mine, *argv]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "--short" in line]

    # the baseline is asked as well
    (whole, most), (fewer, at_most) = counted(prompts.GROUPS["all"]), counted(prompts.GROUPS["short"])
    assert told() == [
        f"on a CPU the long form takes its time: {2 * whole:,} replies, at most {2 * most:,} tokens; --short"
        f" asks for {2 * fewer:,}, at most {2 * at_most:,} tokens"
    ]
    for said in (["--no-short"], ["--short"], ["--suites", "all"], ["--for", "h100-80gb"]):
        assert not told(*said), said
    mine = ["--pair", "smollm2-135m", "--dry-run", "--sweep", "delete"]
    assert not told()  # a sweep is asked for no reply


@pytest.mark.parametrize(
    ("machine", "benchmark"),
    [
        ("h100-80gb", "gpu_benchmark"),
        ("h200-141gb", "gpu_benchmark-h200"),
        ("a100-80gb", None),
        (None, None),
    ],
)
def test_a_plan_says_whether_the_start_is_in_its_time(nothing_loaded, capsys, machine, benchmark):
    """Where it is, it is that of the published benchmark."""
    start = None
    if benchmark:
        rows = json.loads((ROOT / "results" / "reference" / f"{benchmark}.json").read_text())["rows"]
        (row,) = [row for row in rows if row["what"].startswith("start to first experiment")]
        start = float(row["measured"].split()[0])
    argv = ["--dry-run", "--experiments", "baseline_base"]
    argv += ["--for", machine] if machine else ["--pair", "smollm2-135m", "--device-map", "cpu"]
    assert run_all.main(argv) == 0
    out = capsys.readouterr().out
    assert "64 layers streamed from another source" in out or machine is None
    (line,) = [line for line in out.splitlines() if line.startswith("time: ")]
    assert "Not in it: " + ("the start (imports" if start is None else "compiling kernels") in line
    if start is not None:
        assert f"{start:.0f} s of it for the start" in line
        minutes = float(line.split()[4])
        assert minutes == pytest.approx((start + sum(seconds(out).values())) / 60, abs=0.07)


def test_a_larger_model_than_was_measured_has_no_known_start():
    there = estimate.rates_for("h100-80gb")
    assert there.start is not None
    said = f": at most about 1.4 min, {there.start:.0f} s of it for the start"
    assert said in estimate.how_long(there, 60.0, 3, 65.5e9)
    assert "Not in it: the start" in estimate.how_long(there, 60.0, 3, 140e9)
