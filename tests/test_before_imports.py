"""What is wrong on a command line is told before torch and transformers, which take seconds, are imported."""

import subprocess
import sys

import pytest

from files import ROOT

PAIR = ["--pair", "smollm2-135m"]
WRONG = {
    "an experiment": ([*PAIR, "--experiments", "swap_adjcent_30_35"], "unknown experiment"),
    "a pair": (["--pair", "nonsense"], "unknown pair"),
    "suites": (["--suites", "nonsense"], "unknown suite"),
    "further suites": (["--also", "nonsense"], "unknown suite"),
    "a sweep": (["--sweep", "nonsense"], "--sweep nonsense"),
    "an experiments file": (["--experiments-file", "/no/such.py"], "/no/such.py"),
    "a text": (["--perplexity-file", "/no/such.txt"], "/no/such.txt"),
    "a run": (["--resume", "/no/such/run"], "/no/such/run"),
    "a model": (["--instruct", "nonsense"], "no such directory"),
    "a source": ([*PAIR, "--source", "x=/no/such"], "no such directory"),
    "a folder of tasks": (["--lm-eval", "x", "--include-path", "/no/such"], "no such folder"),
    "a place for results": ([*PAIR, "--output", "/proc/none"], "cannot write results"),
    "a plan's pair": (["--dry-run", "--pair", "nonsense"], "unknown pair"),
    "a plan's machine": (["--dry-run", "--for", "nonsense"], "--for nonsense"),
    "a list's sweep": (["--list", "--sweep", "nonsense"], "--sweep nonsense"),
}
FRANKEN = {
    "an experiment to export": (["export", "swap_adjcent_30_35", "DIR", *PAIR], "unknown experiment"),
    "a pair to talk to": (["chat", "swap_adjacent_30_35", "--pair", "nonsense"], "unknown pair"),
    "a model to talk to": (["chat", "shuffle_all", "--instruct", "nonsense"], "no such directory"),
    "what is no checkpoint": (["export", "injection_layers", "DIR", *PAIR], "cannot be a checkpoint"),
    "mergekit's experiment": (["mergekit", "nonsense", *PAIR], "unknown experiment"),
}
RIGHT = {
    "run_all.py --help": ["run_all.py", "--help"],
    "run_all.py --list": ["run_all.py", "--list", "--sweep", "window", *PAIR],
    "franken.py --help": ["franken.py", "chat", "--help"],
    "report.py --help": ["report.py", "--help"],
}


def ran(argv: list[str], folder) -> tuple[int, str, set[str]]:
    """(exit status, the last word on stderr, the modules imported) of a command."""
    argv = [str(folder / word) if word == "DIR" else word for word in argv]
    command = [sys.executable, "-X", "importtime", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    return done.returncode, said[-1] if said else "", imported


def assert_light(imported: set[str]) -> None:
    assert "errors" in imported  # the command did begin
    assert not imported & {"torch", "transformers", "accelerate", "scipy", "matplotlib"}


@pytest.mark.parametrize("what", WRONG)
def test_a_run_that_cannot_be_is_refused_before_torch_is_imported(tmp_path, what):
    argv, words = WRONG[what]
    code, said, imported = ran(["run_all.py", *argv], tmp_path)
    assert code == 1 and said.startswith("run_all.py: ") and words in said
    assert_light(imported)


@pytest.mark.parametrize("what", FRANKEN)
def test_a_model_that_cannot_be_is_refused_before_torch_is_imported(tmp_path, what):
    argv, words = FRANKEN[what]
    code, said, imported = ran(["franken.py", *argv], tmp_path)
    assert code == 1 and said.startswith("franken.py: ") and words in said
    assert_light(imported)


@pytest.mark.parametrize("what", RIGHT)
def test_what_only_tells_imports_no_torch(tmp_path, what):
    code, _, imported = ran(RIGHT[what], tmp_path)
    assert code == 0
    if "report" not in what:  # pages need numbers
        assert_light(imported)
    assert "torch" not in imported
