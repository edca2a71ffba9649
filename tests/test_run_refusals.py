"""What a user gets wrong: one clear line, before anything is loaded where that can be known."""

import os
from pathlib import Path

import pytest
import small_battery
import tiny
import torch
from cli_runs import latest, read, refused

import run_all


@pytest.fixture(autouse=True)
def battery(monkeypatch):
    small_battery.use(monkeypatch)


def own(body: str) -> str:
    return f"from experiments import *\nEXPERIMENTS = [Experiment('mine', 'g', lambda m: {body})]\n"


WRONG = {
    "unknown experiment": (
        ["--experiments", "swap_adjcent_30_35"],
        "unknown experiment 'swap_adjcent_30_35'; the nearest is 'swap_adjacent_30_35'",
    ),
    "unknown in a sweep": (
        ["--sweep", "window", "--size", "1", "--experiments", "window_base_6_7"],
        "unknown experiment 'window_base_6_7'; the nearest is 'window_base_",
    ),
    "unknown suite": (
        ["--suites", "binary,perplexty"],
        "unknown suite 'perplexty'; there are informed, blind, binary",
    ),
    "no suite": (["--suites", ","], "no suite is named"),
    "nothing would be left": (
        ["--sweep", "delete", "--size", "6"],
        "--sweep delete: a block of 6 does not fit, of 6 it takes 1 to 5",
    ),
    "alone side by side": (
        ["--sweep", "parallel", "--size", "1"],
        "--sweep parallel: a block of 1 does not fit, of 6 it takes 2 to 6",
    ),
    "off the grid": (
        ["--sweep", "repeat", "--size", "3", "--step", "2"],
        "--sweep repeat: no such block of 6 layers lies on a grid of 2",
    ),
    "wide sweep": (["--sweep", "window", "--size", "1,7"], "a window of 7 layers does not fit a model of 6"),
    "window of nothing": (
        ["--sweep", "window", "--size", "0"],
        "--size 0: expected whole layers, as in 1,4,8",
    ),
    "window in words": (["--sweep", "window", "--size", "1,two"], "--size 1,two: expected whole layers"),
    "size of 5000 digits": (["--sweep", "window", "--size", "9" * 5000], "expected whole layers"),
    "step of 5000 digits": (["--sweep", "window", "--step", "9" * 5000], "expected a whole number of layers"),
    "a source's own long name": (["--source", "x" * 250 + "=y"], "a name has at most 100 bytes"),
    "empty size": (["--sweep", "window", "--size", ""], "--size : expected whole layers"),
    "step of nothing": (["--sweep", "window", "--step", "0"], "--step 0: expected a whole number of layers"),
    "step of a half": (
        ["--sweep", "window", "--step", "0.5"],
        "--step 0.5: expected a whole number of layers",
    ),
    "old sweep": (
        ["--sweep", "4"],
        "--sweep 4: expected one of window, replace, delete, double, repeat, parallel, noise, blend",
    ),
    "size without windows": (
        ["--sweep", "replace", "--size", "4"],
        "--size is about windows: it goes with --sweep window, delete, double, repeat, parallel",
    ),
    "step without a sweep": (["--step", "4"], "--step is about windows: it goes with --sweep window"),
    "source without a path": (["--source", "rune="], "--source rune=: expected NAME=PATH"),
    "source without a name": (["--source", "adapter"], "--source adapter: expected NAME=PATH"),
    "source of a taken name": (
        ["--source", "base=x"],
        "--source base=x: expected NAME=PATH with a plain name other than instruct and base",
    ),
    "two sources of a name": (
        ["--source", "rune=x", "--source", "rune=y"],
        "there are two sources called rune",
    ),
    "source that is not there": (["--source", "rune=/no/such/place"], "/no/such/place: no such directory"),
    "resume of nothing": (
        ["--resume", "/no/such/run"],
        "cannot read /no/such/run/manifest.json: No such file or directory",
    ),
    "text that is not there": (
        ["--perplexity-file", "/no/such.txt"],
        "cannot read /no/such.txt: No such file or directory",
    ),
    "an empty adapter": (["--instruct-adapter", ""], "--instruct-adapter has an empty value"),
    "an empty base": (["--base", ""], "--base has an empty value"),
    "an empty text": (["--perplexity-file", ""], "--perplexity-file has an empty value"),
    "an empty run": (["--resume", ""], "--resume has an empty value"),
    "a list of nothing": (["--suites=--"], "--suites has an empty value"),
    "sources of nothing": (["--source=--"], "--source has an empty value"),
    "a source's long name": (["--source", "x=" + "y" * 300], "File name too long"),
    "a long name": (["--experiments-file", "y" * 300], "File name too long"),
    "file that is not there": (["--experiments-file", "/no/such.py"], "No such file or directory"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_line(go, tmp_path, name):
    argv, words = WRONG[name]
    refused(go(*argv), words)
    assert not list((tmp_path / "out").glob("run_*"))


FILES = {
    "layer out of range": (
        own("swap(m.model, 2, 6)"),
        "experiment mine: layer 6 is out of range: the model has layers 0 to 5",
    ),
    "overlapping chunks": (
        own("swap_chunks(m.model, (0, 3), (2, 5))"),
        "experiment mine: chunks [0:3] and [2:5] overlap",
    ),
    "syntax error": ("EXPERIMENTS = [\n", "mine.py: cannot be used as an experiments file: SyntaxError"),
    "an exception": (own("m.no_such_thing"), "experiment mine: AttributeError"),
    "the line of an exception": ("\n" + own("m.no_such_thing"), " (mine.py, line 3)"),
    "a name that is not there": (
        "import math\n" + own("m.model") + "swop(1)\n",
        "NameError: name 'swop' is not defined (mine.py, line 4)",
    ),
    "a taken name": (
        own("m.model").replace("mine", "shuffle_all"),
        "there are two experiments called 'shuffle_all'",
    ),
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
    assert (
        go(
            "--perplexity-file",
            tmp_path / "text.txt",
            "--suites",
            "perplexity",
            "--experiments",
            "baseline_instruct",
        )[0]
        == 0
    )
    (entry,) = read(latest(tmp_path / "out"))["baseline_instruct"]["measurements"]["perplexity"]["texts"]
    assert (entry["id"], entry["tokens"]) == ("text.txt", len("Grün ist die Wiese.".encode()) - 1)


def damaged(tmp_path, what) -> tuple[Path, str]:
    """A checkpoint with something wrong, and what must be said."""
    path = tmp_path / what
    changes = {
        "other width": {"intermediate_size": 64},
        "other depth": {"layers": 5},
        "other heads": {"num_key_value_heads": 4},
    }
    small_battery.checkpoint(
        path,
        3,
        chat=what != "no template",
        family="llama" if what == "other family" else "qwen2",
        shards=2 if "shard" in what else 1,
        **({"layers": 6} | changes.get(what, {})),
    )
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
        "other width": "do not match: intermediate_size is 48 in one and 64 in the other",
        "other depth": "num_hidden_layers is 6 in one and 5",
        "other heads": "num_key_value_heads is 2 in one and 4",
        "other family": "model_type is qwen2 in one and llama",
        "missing shard": f"{shard}: the shard is missing",
        "truncated shard": f"{shard}: truncated",
        "no weights": "no .safetensors weights there",
        "broken config": "config.json is corrupt",
    }.get(what, "")


@pytest.mark.parametrize(
    "what",
    [
        "other width",
        "other depth",
        "other heads",
        "other family",
        "missing shard",
        "truncated shard",
        "broken config",
        "no weights",
    ],
)
def test_bases_that_do_not_serve_are_one_line(go, tmp_path, what):
    path, words = damaged(tmp_path, what)
    refused(go("--base", path), words)
    assert not list((tmp_path / "out").glob("run_*"))


def test_tokenizers_that_do_not_serve_are_one_line(go, pair, tmp_path):
    refused(
        go("--instruct", damaged(tmp_path, "no template")[0]),
        "no template: the tokenizer has no chat template",
    )
    mute = tiny.write_checkpoint(tmp_path / "mute", "qwen2", layers=6)
    refused(
        go("--instruct", mute), "these questions cannot be asked: the tokenizer has no single token for Yes"
    )
    refused(go("--instruct", tmp_path / "none"), "no such directory")


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/none", "/dev/full"])
def test_unwritable_output_is_seen_before_anything_is_loaded(pair, tmp_path, capfd, monkeypatch, where):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("runner.replica.open_pair", lambda *args: pytest.fail("loaded"))
    code = run_all.main(small_battery.arguments(pair, tmp_path / where))
    refused((code, *capfd.readouterr()), f"cannot write results to {tmp_path / where}: ")


def test_the_large_pair_without_a_gpu_stops_before_any_download(capfd, tmp_path, monkeypatch):
    import huggingface_hub

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, lambda *args, **kwargs: pytest.fail("a download"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = run_all.main(["--output", str(tmp_path / "out")])
    out, err = capfd.readouterr()
    refused(
        (code, out, err),
        "qwen2.5-coder-32b needs 69 GiB of GPU memory (61 GiB of weights) and this machine has no GPU and ",
    )
    assert err.rstrip().endswith("GiB of free memory; --pair smollm2-135m runs on any laptop")
    refused(
        (run_all.main(["--pair", "smollm3", "--output", str(tmp_path / "out")]), *capfd.readouterr()),
        "unknown pair 'smollm3'; there are qwen2.5-coder-32b, ",
    )
    refused(
        (run_all.main(["--base", "x", "--output", str(tmp_path / "out")]), *capfd.readouterr()),
        "--base and --instruct go together",
    )


@pytest.mark.parametrize("flag", ["--samples", "--max-new-tokens", "--priority-limit", "--batch-size"])
def test_counts_below_one_are_refused(capsys, flag):
    with pytest.raises(SystemExit) as caught:
        run_all.main([flag, "0"])
    assert caught.value.code == 2 and f"{flag} must be at least 1" in capsys.readouterr().err.splitlines()[-1]
