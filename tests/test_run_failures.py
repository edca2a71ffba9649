"""Experiments, disks and results that fail in the middle of a run: what is recorded, kept and said."""

import errno
import json
import os
import signal

import pytest
import small_battery
import torch
from cli_runs import FOUR, latest, read, refused, resealed, resumed, stamps, timeless

import evaluate
import franken
import report
import run_all
from command_line import held_back
from errors import FrankenError
from files import write_text
from reporting import reports
from runner import batch


@pytest.fixture(autouse=True)
def battery(monkeypatch):
    small_battery.use(monkeypatch)


# ---- experiments that fail ---------------------------------------------------------------------------------


MINE = """
from experiments import Experiment, perturb, splice, swap
EXPERIMENTS = [Experiment("nowhere", "mine", lambda m: splice(swap(m.model, 0, 1), "no_such_source", 2, 4)),
               Experiment("nan", "mine", lambda m: perturb(m.model, 1e30, m.seed))]
"""


def test_a_recipe_that_cannot_be_applied_is_recorded_and_the_batch_goes_on(go, tmp_path, four, monkeypatch):
    real, refused_ones = franken.LiveModel.apply, []

    def once(self, recipe):
        if recipe != self.original and not refused_ones:
            refused_ones.append(recipe)
            raise FrankenError("it cannot be applied")
        return real(self, recipe)

    monkeypatch.setattr(franken.LiveModel, "apply", once)
    code, out, err = go("--experiments", "swap_adjacent_30_35", "blend_linear")
    found = timeless(latest(tmp_path / "out"))
    failed = found.pop("swap_adjacent_30_35")
    assert code == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("1 of 3 experiments failed; their errors are in ")
    assert "swap_adjacent_30_35 failed: FrankenError: it cannot be applied\n" in err
    assert (failed["status"], failed["measurements"]) == ("failed", {})
    assert failed["error"]["type"] == "FrankenError"
    assert failed["weights"]["exact"]
    assert found == {k: v for k, v in timeless(four).items() if k in found}
    assert "failed:" in out


def test_a_users_file_is_run_once(go, tmp_path):
    """It may take minutes, or draw at random; it says each time that it is run."""
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nfrom experiments import Experiment, swap\n"
        "Path(__file__).with_name('runs').open('a').write('x')\n"
        "EXPERIMENTS = [Experiment('mine', 'mine', lambda m: swap(m.model, 0, 1))]\n"
    )
    assert go("--experiments-file", tmp_path / "mine.py", "--suites", "perplexity")[0] == 0
    assert (tmp_path / "runs").read_text() == "x"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("first line\nsecond line"),
        MemoryError(),
        torch.OutOfMemoryError("no memory"),
        AssertionError(""),
    ],
    ids=repr,
)
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
    assert code == 1
    assert failed["error"]["type"] == type(error).__name__
    assert failed["error"]["message"] == str(error)
    assert failed["weights"] == expected.pop("swap_adjacent_30_35")["weights"] and failed["weights"]["exact"]
    assert found == expected
    assert "Traceback" not in err
    assert "second line" not in err
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
    assert code == 1
    assert found["blend_linear"]["error"]["type"] == "OSError"
    assert found["blend_linear"]["weights"]["exact"]
    assert found["swap_adjacent_30_35"] == timeless(four)["swap_adjacent_30_35"]


def test_nan_is_a_result(go, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    code, out, _ = go("--experiments-file", tmp_path / "mine.py", "--experiments", "nan")
    run = latest(tmp_path / "out")
    for file in run.rglob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    found = read(run)["nan"]
    assert code == 0
    assert found["status"] == "done"
    assert found["weights"]["exact"]
    assert found["measurements"]["perplexity"]["perplexity"] is None
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
    assert code == 1
    assert out == ""
    assert "Traceback" not in err
    assert last.startswith(
        "run_all.py: after swap_distant_5_60 the weights are not back to the original (fingerprint "
    )
    assert last.endswith(f"; finished experiments are kept; once mended: python run_all.py --resume {run}")
    found = read(run)
    assert (
        set(found) == {"baseline_instruct", "swap_distant_5_60"}
        and not found["swap_distant_5_60"]["weights"]["exact"]
    )
    assert timeless(run)["baseline_instruct"] == timeless(four)["baseline_instruct"]
    assert "DID NOT COME BACK EXACTLY" in (run / "summary.md").read_text()
    assert (
        run_all.main(["--resume", str(run)]) == 0
        and timeless(run)["blend_linear"] == timeless(four)["blend_linear"]
    )


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
    assert (
        set(found) == {"baseline_instruct", "swap_adjacent_30_35"}
        and found["swap_adjacent_30_35"]["weights"]["restored"] is None
    )


# ---- disks and files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_disk_that_fills_up_keeps_what_is_finished(go, tmp_path, four, monkeypatch, after):
    """The manifest is the first file that is written, then the questions, then one per experiment."""
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
    assert (
        last.startswith(f"run_all.py: cannot write {run / ('texts.json' if after == 1 else 'experiments/')}")
        and "No space left on device; finished experiments are kept" in last
    )
    assert set(read(run)) == (set() if after < 3 else {"baseline_instruct", "swap_adjacent_30_35"})
    assert not list(run.rglob(".*partial")) and last.endswith(f"python run_all.py --resume {run}")
    assert run_all.main(["--resume", str(run)]) == 0 and timeless(run) == timeless(four)


def test_a_disk_that_is_full_when_the_run_begins(go, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = go(*FOUR)
    refused((code, out, err), "manifest.json: No space left on device")


@pytest.mark.parametrize("how", ["truncated", "schema", "another recipe"])
def test_a_corrupt_result_stops_the_resumed_run_before_anything_is_lost(finished, four, capfd, how):
    file = finished / "experiments" / "swap_adjacent_30_35.json"
    (finished / "experiments" / "blend_linear.json").unlink()
    text = file.read_text()
    broken = {
        "truncated": text[:-300],
        "schema": text.replace('"exact": true', '"exact": "true"'),
        "another recipe": text.replace('"head": "instruct"', '"head": "base"'),
    }[how]
    assert broken != text
    if how != "truncated":  # as if it had been written so
        broken = resealed(broken)
    file.write_text(broken)
    before = stamps(finished)
    code, out, err = resumed(finished, capfd)
    last = err.splitlines()[-1]
    assert (code, out) == (1, ""), err
    assert "Traceback" not in err, err
    assert last.startswith(f"run_all.py: {file} "), err
    assert ("was made with another recipe" if how == "another recipe" else "is corrupt (") in last and stamps(
        finished
    ) == before
    file.rename(finished / "aside.json")  # what the message says
    assert resumed(finished, capfd)[0] == 0 and timeless(finished) == timeless(four)


def test_corrupt_and_foreign_manifests_are_one_line(finished, capfd):
    manifest = finished / "manifest.json"
    whole = json.loads(manifest.read_text())
    for broken, words in (
        (whole | {"schema_version": 9}, "not a manifest of version 1 to 2"),
        ({}, "not a manifest of version 1 to 2"),
        (whole | {"settings": {}}, "manifest.json is corrupt (the setting all is missing)"),
        ({k: v for k, v in whole.items() if k != "layers"}, "manifest.json is corrupt (layers is missing"),
    ):
        manifest.write_text(json.dumps(broken))
        refused(resumed(finished, capfd), words)
    manifest.write_text(json.dumps(whole)[:-1])
    refused(resumed(finished, capfd), "manifest.json is corrupt (Expecting")


def test_a_run_is_not_resumed_with_other_weights_questions_or_experiments(finished, capfd, monkeypatch):
    manifest = finished / "manifest.json"
    whole = json.loads(manifest.read_text())
    for changed, what in (
        ({"original_fingerprint": "0" * 32}, "weights (000000000000 then, "),
        ({"protocol": whole["protocol"] | {"prompts_sha256": "0"}}, "protocol: questions (0 then, "),
        ({"experiments": ["baseline_instruct"]}, "experiments; start a new run"),
    ):
        manifest.write_text(json.dumps(whole | changed))
        refused(resumed(finished, capfd), f"{finished} was made with other {what}")


# ---- Ctrl-C where nothing is measured ----------------------------------------------------------------------


def interrupting(monkeypatch, times: int, then=None):
    """The first `times` calls of write_reports are interrupted; after that `then`, or what it really is."""
    real, calls = reports.write_reports, []

    def once(run, *options):
        calls.append(run)
        if len(calls) <= times:
            raise KeyboardInterrupt
        return (then or real)(run, *options)

    monkeypatch.setattr(reports, "write_reports", once)
    return calls


def test_ctrl_c_during_the_report_says_what_is_done_and_makes_it_again(go, tmp_path, monkeypatch):
    calls = interrupting(monkeypatch, 1)
    code, out, err = go(*FOUR)
    run = latest(tmp_path / "out")
    assert (code, out, len(calls)) == (130, "", 2) and "Traceback" not in err
    assert err.endswith(
        f"\nInterrupted. 4 of 4 experiments are finished and kept; go on with:\n"
        f"  python run_all.py --resume {run}\n"
        "Making the pages of these, which takes some seconds; Ctrl-C again leaves them out.\n"
    )
    assert (run / "summary.md").exists()


def test_ctrl_c_where_only_the_unmodified_model_is_measured_waits_for_no_pages(go, tmp_path, monkeypatch):
    """They would compare it with nothing, and take seconds."""
    measured = []

    def second(engine, plan, *rest):
        measured.append(plan.experiment.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(engine, plan, *rest)

    real = batch.run_experiment
    monkeypatch.setattr(batch, "run_experiment", second)
    code, out, err = go(*FOUR)
    run = latest(tmp_path / "out")
    assert (code, out) == (130, "") and "Interrupted. 1 of 4 experiments are finished" in err
    assert "pages" not in err and not (run / "summary.md").exists()
    monkeypatch.setattr(batch, "run_experiment", real)
    assert run_all.main(["--resume", str(run)]) == 0 and (run / "summary.md").exists()


def test_ctrl_c_twice_says_how_the_pages_are_made(go, tmp_path, monkeypatch):
    interrupting(monkeypatch, 2)
    code, out, err = go(*FOUR)
    run = latest(tmp_path / "out")
    assert (code, out) == (130, "") and "Traceback" not in err
    last = f"Interrupted again: the run's pages are not finished; `python report.py {run}` makes them."
    assert err.splitlines()[-1] == last
    assert report.main([str(run)]) == 0 and (run / "summary.md").exists()


def test_a_library_that_an_interrupt_left_in_parts_is_one_line(go, monkeypatch):
    """fontTools, once: interrupted while it was imported, its second import failed an assertion."""

    def torn(run, *rest):
        raise AssertionError

    calls = interrupting(monkeypatch, 1, torn)
    code, out, err = go(*FOUR)
    assert (code, out, len(calls)) == (130, "", 2) and "Traceback" not in err
    assert "The run's pages could not be made (AssertionError); `python report.py" in err.splitlines()[-1]


def test_a_signal_during_the_imports_for_the_pages_waits_for_their_end():
    done = []
    # ignored where the tests were started in the background
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), held_back():
            os.kill(os.getpid(), signal.SIGINT)
            done += [sum(range(1000))]
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == [499_500]


def test_a_disk_that_is_full_when_an_interrupted_run_makes_its_pages(go, tmp_path, monkeypatch):
    def full(run):
        raise FrankenError("cannot write summary.md: No space left on device")

    interrupting(monkeypatch, 1, full)
    code, out, err = go(*FOUR)
    run = latest(tmp_path / "out")
    assert (code, out) == (130, "") and "Traceback" not in err
    assert f"python run_all.py --resume {run}" in err
    assert err.splitlines()[-1] == (
        "The run's pages could not be made (cannot write summary.md: No space left on device);"
        f" `python report.py {run}` makes them."
    )


def test_a_disk_that_is_full_when_the_pages_are_made_is_one_line(go, tmp_path, monkeypatch):
    def full(*args):
        raise FrankenError("cannot write summary.md: No space left on device")

    with monkeypatch.context() as m:
        m.setattr(reports, "write_text", full)
        code, out, err = go(*FOUR)
    run = latest(tmp_path / "out")
    assert (code, out) == (1, "") and "Traceback" not in err
    assert err.splitlines()[-1] == (
        "run_all.py: cannot write summary.md: No space left on device; finished experiments are kept; once"
        f" mended: python run_all.py --resume {run}"
    )
    assert len(read(run)) == 4


def test_ctrl_c_while_report_py_works_is_one_line(finished, capfd, monkeypatch):
    interrupting(monkeypatch, 9)
    monkeypatch.setattr(report, "write_reports", reports.write_reports)
    assert report.main([str(finished)]) == 130
    assert capfd.readouterr() == ("", "report.py: interrupted; the same command makes the pages again\n")


def test_ctrl_c_leaves_no_half_written_file(tmp_path, monkeypatch):
    def interrupted(fd):
        raise KeyboardInterrupt

    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]
