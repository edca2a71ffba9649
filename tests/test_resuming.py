"""What a resumed run is held against: everything its numbers depend on, code that a manifest names, and links
that lead out of its folder."""

import json
import os
import shutil
import tomllib

import pytest
import small_battery
import torch
from cli_runs import FOUR, latest, read, refused, resumed, stamps

import report
import run_all
from files import ROOT
from runner import pairs, resuming
from runner.results import Run
from runner.settings import SETTINGS, can_set, resume_settings


@pytest.fixture(autouse=True)
def battery(monkeypatch):
    small_battery.use(monkeypatch)


def edited(run, change) -> dict:
    """The run's manifest after `change(manifest)`, written back."""
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return manifest


@pytest.fixture
def own_pair(pair, tmp_path):
    """A copy of the pair that may be written to."""
    shutil.copytree(pair, tmp_path / "pair")
    return tmp_path / "pair"


@pytest.fixture
def begun(own_pair, tmp_path, capfd):
    """A run of that pair of which the last experiment is missing."""
    argv = small_battery.arguments(own_pair, tmp_path / "out", "--suites", "binary,perplexity", *FOUR)
    assert run_all.main(argv) == 0
    run = latest(tmp_path / "out")
    (run / "experiments" / "blend_linear.json").unlink()
    return run


# ---- what numbers depend on --------------------------------------------------------------------------------


def test_an_unchanged_run_goes_on_without_a_word_about_it(begun, capfd):
    code, _, err = resumed(begun, capfd)
    assert code == 0 and "not recorded" not in err
    assert "resumed_with" not in read(begun)["blend_linear"]


def other_weight(pair):
    file = pair / "base" / "model.safetensors"
    tiny_state = bytearray(file.read_bytes())
    tiny_state[-1] ^= 1
    file.write_bytes(tiny_state)


def other_template(pair):
    file = pair / "instruct" / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


def other_token(pair):
    file = pair / "instruct" / "tokenizer.json"
    whole = json.loads(file.read_text())
    for token in whole["added_tokens"]:
        if token["content"] == " No":
            token["content"] = "  No"
    file.write_text(json.dumps(whole))


def other_field(pair):
    file = pair / "instruct" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-4}))


def other_stop(pair):
    (pair / "instruct" / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))


FILES = {
    "sources: base": other_weight,
    "chat template": other_template,
    "tokenizer": other_token,
    "config: rms_norm_eps": other_field,
    "stop ids": other_stop,
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_changed_is_refused_by_name_or_accepted_and_recorded(begun, own_pair, capfd, what):
    before = stamps(begun)
    FILES[what](own_pair)
    refused(resumed(begun, capfd), f"{begun} was made with other ")
    code, out, err = resumed(begun, capfd)
    assert f"{what} (" in err and "--accept-changes" in err
    assert stamps(begun) == before
    code, _, err = resumed(begun, capfd, "--accept-changes")
    assert code == 0, err
    found = read(begun)
    assert [name for name, result in found.items() if "resumed_with" in result] == ["blend_linear"]
    assert what in [change["what"] for change in found["blend_linear"]["resumed_with"]]
    assert f"made after a resume with other {what}" in (begun / "summary.md").read_text().replace("\\", "")
    (entry,) = json.loads((begun / "manifest.json").read_text())["resumed"]
    assert entry["changes"] == found["blend_linear"]["resumed_with"]


def test_a_perplexity_file_that_changed_is_refused_before_anything_is_loaded(
    own_pair, tmp_path, capfd, monkeypatch
):
    text = tmp_path / "text.txt"
    text.write_text("The mill stood by the river.")
    argv = ["--suites", "perplexity", "--experiments", "baseline_instruct", "--perplexity-file", text]
    assert run_all.main(small_battery.arguments(own_pair, tmp_path / "out", *argv)) == 0
    run = latest(tmp_path / "out")
    text.write_text("The mill stood by the pond.")
    monkeypatch.setattr("runner.replica.open_pair", lambda *args: pytest.fail("loaded"))
    refused(resumed(run, capfd), f"{run} was made with other perplexity file (")


def test_code_libraries_and_dtype_that_changed_are_refused_by_name(begun, capfd, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(resuming, "code_sha256", lambda: "0" * 64)
        refused(resumed(begun, capfd), "was made with other code (")
    with monkeypatch.context() as m:
        m.setattr(resuming, "_version", lambda name: "9.9" if name == "torch" else None)
        refused(resumed(begun, capfd), "other libraries: torch (")
    with monkeypatch.context() as m:
        m.setattr(pairs, "pick_dtype", lambda asked, device: torch.bfloat16)
        refused(resumed(begun, capfd), "dtype (float32 then, bfloat16 now); weights (")
    assert resumed(begun, capfd)[0] == 0


def test_the_batch_size_is_kept_and_another_one_is_refused(own_pair, tmp_path, capfd):
    argv = small_battery.arguments(own_pair, tmp_path / "out", "--suites", "chat", "--batch-size", "3", *FOUR)
    assert run_all.main(argv) == 0
    run = latest(tmp_path / "out")
    (run / "experiments" / "blend_linear.json").unlink()
    refused(resumed(run, capfd, "--batch-size", "2"), "was made with other batch size (3 then, 2 now)")
    assert resumed(run, capfd)[0] == 0
    assert read(run)["blend_linear"]["performance"]["max_batch"] == 3


def test_the_hash_of_the_code_is_of_what_measures(tmp_path, monkeypatch):
    """Against a copy of the checkout in which one file at a time is another."""
    for place in resuming.CODE:
        copy = shutil.copytree if (ROOT / place).is_dir() else shutil.copy
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / place, tmp_path / place)
    whole = resuming.code_sha256()
    monkeypatch.setattr(resuming, "ROOT", tmp_path)
    assert resuming.code_sha256() == whole
    for changed in ("prompts.py", "engine/generation.py", "suites/binary.py", "runner/matched_noise.py"):
        text = (tmp_path / changed).read_text()
        (tmp_path / changed).write_text(text + "\n# another\n")
        assert resuming.code_sha256() != whole, changed
        (tmp_path / changed).write_text(text)
    (tmp_path / "report.py").write_text("another page")
    assert resuming.code_sha256() == whole


def test_no_room_that_measures_is_left_out_of_the_hash():
    rooms = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]
    pages = {
        "run_all",
        "report",
        "reporting",
        "benchmarks",
        "adapters",
        "analysis",
        "command_line",
        "frankenmodel",
    }
    hashed = {place.removesuffix(".py").split("/")[0] for place in resuming.CODE}
    assert hashed == set(rooms) - pages


def test_a_tokenizer_has_one_hash_however_it_was_used():
    made = small_battery.tokenizer()
    before = resuming.tokenizer_sha256(made)
    made(["a", "a long text"], padding=True, truncation=True, max_length=4)
    assert resuming.tokenizer_sha256(made) == before
    made.add_tokens(["another"])
    assert resuming.tokenizer_sha256(made) != before


def test_changes_are_named_to_the_part():
    then = {"a": 1, "config": {"x": 1, "y": [2]}, "gone": 1}
    now = {"a": 1.0, "config": {"x": 1, "y": [3], "z": None}, "new": 2}
    assert [(c.what, c.then, c.now) for c in resuming.changes(then, now)] == [("config: y", [2], [3])]
    assert resuming.not_recorded(then, now).endswith("not compared: new")
    assert resuming.not_recorded(then, {"a": 1}) is None


# ---- older runs --------------------------------------------------------------------------------------------


def test_runs_of_before_it_was_recorded_go_on_with_a_line_about_that(begun, own_pair, capfd):
    edited(begun, lambda m: (m.pop("depends_on"), m["settings"].pop("batch_size")))
    code, _, err = resumed(begun, capfd)
    assert code == 0
    (line,) = [line for line in err.splitlines() if "not recorded" in line]
    assert line == (
        "note: not recorded when the run began, and so not compared: experiments files, perplexity file,"
        " batch size, code, libraries, tokenizer, chat template, stop ids, config, devices, threads"
    )
    (begun / "experiments" / "blend_linear.json").unlink()
    other_weight(own_pair)
    refused(resumed(begun, capfd), "was made with other sources: base (")  # which they did record


@pytest.mark.parametrize(
    "name", sorted(p.parent.name for p in ROOT.glob("results/reference/*/manifest.json"))
)
def test_committed_runs_can_be_compared_in_what_they_recorded(name):
    run, manifest = Run.resume(str(ROOT / "results/reference" / name))
    known = resuming.recorded(manifest)
    assert known["sources"] and known["dtype"]
    if "depends_on" not in manifest:  # made before it was recorded
        assert set(known) == {"sources", "dtype"}
    assert resuming.changes(known, json.loads(json.dumps(known))) == []
    args = run_all.parse_arguments(["--resume", str(run.path)])
    resume_settings(args, str(run.path), manifest, run_all.make_parser()._actions)
    assert args.batch_size is None and args.pair == manifest["pair"]


# ---- code and paths that a received folder names -----------------------------------------------------------


MINE = """
from pathlib import Path
from experiments import Experiment, swap
Path(__file__).with_name("ran").touch()
EXPERIMENTS = [Experiment("mine", "g", lambda m: swap(m.model, 0, 1))]
"""


@pytest.fixture
def with_own_file(own_pair, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    argv = ["--suites", "perplexity", "--experiments-file", tmp_path / "mine.py"]
    assert run_all.main(small_battery.arguments(own_pair, tmp_path / "out", *argv)) == 0
    run = latest(tmp_path / "out")
    (run / "experiments" / "mine.json").unlink()
    (tmp_path / "ran").unlink()
    return run


def test_code_that_a_manifest_names_is_run_only_when_asked(with_own_file, tmp_path, capfd):
    mine, run = tmp_path / "mine.py", with_own_file
    refused(resumed(run, capfd), f"resume with --experiments-file {mine}")
    assert not (tmp_path / "ran").exists()
    text = mine.read_text()
    mine.write_text(text + "\n# changed\n")
    refused(resumed(run, capfd, "--experiments-file", str(mine)), "was made with other experiments files (")
    assert not (tmp_path / "ran").exists()
    mine.write_text(text)
    assert resumed(run, capfd, "--experiments-file", str(mine))[0] == 0
    assert (tmp_path / "ran").exists() and "mine" in read(run)


def test_answers_are_run_outside_the_sandbox_only_when_asked(begun, capfd):
    """A received manifest names the model that writes them, too."""
    manifest = json.loads((begun / "manifest.json").read_text())
    for part in ("settings", "protocol"):
        manifest[part]["execute_code"] = "unsandboxed"
    (begun / "manifest.json").write_text(json.dumps(manifest))
    words = "done only if you ask for it: resume with --execute-code-unsandboxed"
    refused(resumed(begun, capfd), words)
    refused(resumed(begun, capfd, "--execute-code"), words)
    code, _, err = resumed(begun, capfd, "--execute-code-unsandboxed")
    assert code == 0, err


WRONG_SETTINGS = {
    "seed": ["1", 1.5, None, True, 1e300],
    "samples": [0, -3, "2"],
    "batch_size": [0, "8", []],
    "experiments": ["all", [1], {}],
    "source": ["a=b", None, [["a"]]],
    "experiments_file": [None, "mine.py"],
    "dtype": ["int4", None, 3],
    "device_map": ["cpu:0", {}],
    "execute_code": [1, "yes", None, []],
    "short": ["no", 1],
    "instruct": [5, ["x"], {}],
    "thinking": [True, "maybe"],
    "suites": [["binary"], 7],
    "max_new_tokens": [10**30, 0],
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_a_setting_that_no_command_line_makes_is_one_line(begun, capfd, name):
    file = begun / "manifest.json"
    manifest = json.loads(file.read_text())
    for value in WRONG_SETTINGS[name]:
        changed = manifest | {"settings": manifest["settings"] | {name: value}}
        file.write_text(json.dumps(changed))
        refused(resumed(begun, capfd), f"is corrupt (the setting {name} cannot be ")


def test_every_setting_of_a_run_can_be_set(begun):
    """All options of the command line are looked at, and what a run writes passes."""
    settings = json.loads((begun / "manifest.json").read_text())["settings"]
    actions = [a for a in run_all.make_parser()._actions if a.dest in SETTINGS]
    assert {a.dest for a in actions} == set(SETTINGS) == set(settings)
    assert all(can_set(a, settings) for a in actions)


def test_a_run_without_code_of_its_own_takes_none_on(begun, tmp_path, capfd):
    (tmp_path / "mine.py").write_text(MINE)
    argv = ("--experiments-file", str(tmp_path / "mine.py"))
    refused(resumed(begun, capfd, *argv), "was made without --experiments-file")
    assert not (tmp_path / "ran").exists()


def test_bytecode_beside_a_users_file_is_not_run(tmp_path):
    """An unchecked .pyc stands for its source with any import; the hash is of the source."""
    import py_compile

    import experiments

    source, cached = tmp_path / "mine.py", tmp_path / "cached.py"
    cached.write_text("raise SystemExit('bytecode was run')")
    source.write_text(
        "from experiments import *\nEXPERIMENTS = [Experiment('x', 'mine', lambda m: m.recipe)]\n"
    )
    target = tmp_path / "__pycache__" / f"mine.{os.sys.implementation.cache_tag}.pyc"
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(cached), str(target), invalidation_mode=mode)
    assert [e.name for e in experiments.load_file(str(source))] == ["x"]


@pytest.mark.parametrize("name", ["../../outside", "a/b", "..", "a\x1b[31m", "", "a b", "x" * 201])
def test_a_manifest_that_names_no_experiment_is_corrupt(finished, capfd, name):
    edited(finished, lambda m: m["experiments"].append(name))
    assert report.main([str(finished)]) == 1
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "names no experiment)" in err and "\x1b" not in err


@pytest.mark.parametrize("place", ["experiments/blend_linear.json", "experiments", "texts.json", "figures"])
def test_report_follows_no_link_out_of_its_folder(finished, tmp_path, capfd, place):
    outside = tmp_path / "outside"
    if (finished / place).exists():
        shutil.move(finished / place, outside)
    else:
        outside.mkdir()
    (finished / place).symlink_to(outside)
    kept = sorted(outside.rglob("*"))
    for argv in ([str(finished)], ["--pack", str(finished)]):
        assert report.main(argv) == 1
        assert "is a link that leads out of the run's folder" in capfd.readouterr().err
    assert sorted(outside.rglob("*")) == kept and outside.exists()
    # a link within the folder harms nobody
    (finished / place).unlink()
    shutil.move(outside, finished / "elsewhere")
    (finished / place).symlink_to(finished / "elsewhere")
    assert report.main([str(finished)]) == 0
