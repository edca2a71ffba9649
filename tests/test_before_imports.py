"""What is wrong on a command line is told before torch and transformers, which take seconds, are imported."""

import subprocess
import sys

import pytest

from files import ROOT

PAIR = ["--pair", "smollm2-135m"]
RUN = {
    "an experiment": ([*PAIR, "--experiments", "swap_adjcent_30_35"], "unknown experiment"),
    "a pair": (["--pair", "smolm2-135m"], "smollm2-135m-hub; the nearest is 'smollm2-135m'"),
    "a pair that is like none": (["--pair", "nonsense"], "unknown pair 'nonsense'; there are"),
    "suites": (
        ["--suites", "binary,perplexty"],
        "short, all; the nearest is 'perplexity'",
    ),
    "further suites": (["--also", "nonsense"], "unknown suite"),
    "a sweep": (["--sweep", "windows"], "noise, blend; the nearest is 'window'"),
    "an experiments file": (["--experiments-file", "/no/such.py"], "/no/such.py"),
    "a text": (["--perplexity-file", "/no/such.txt"], "/no/such.txt"),
    "a run": (["--resume", "/no/such/run"], "/no/such/run"),
    "a model": (["--instruct", "nonsense"], "no such directory"),
    "a model in wheels": (
        ["--instruct", "wheel:smollm2"],
        "no such model; there are wheel:qwen2.5-coder-1.5b",
    ),
    "a pair beside a path": (["--instruct", "x", *PAIR], "--pair stands for both sides"),
    "a path beside a pair": ([*PAIR, "--base", "x"], "--pair stands for both sides"),
    "a pair as a model": (["--instruct", "smolm2-135m"], "owner/name; the nearest pair is 'smollm2-135m'"),
    "a source": ([*PAIR, "--source", "x=/no/such"], "no such directory"),
    "a folder of tasks": (["--lm-eval", "x", "--include-path", "/no/such"], "no such folder"),
    "a place for results": ([*PAIR, "--output", "/proc/none"], "cannot write results"),
    "a plan's pair": (["--dry-run", "--pair", "nonsense"], "unknown pair"),
    "a plan's machine": (
        ["--dry-run", "--for", "h100-80g"],
        "--for h100-80g: expected one of h200-141gb, h100-80gb, a100-80gb, a100-40gb, a10-24gb, 2x40gb,"
        " 2xh100-80gb, 2xa100-80gb; the nearest is 'h100-80gb'",
    ),
    "a list's sweep": (["--list", "--sweep", "nonsense"], "--sweep nonsense"),
}
FRANKEN = {
    "an experiment to export": (["export", "swap_adjcent_30_35", "DIR", *PAIR], "unknown experiment"),
    "a pair to talk to": (["chat", "swap_adjacent_30_35", "--pair", "nonsense"], "unknown pair"),
    "a model to talk to": (["chat", "shuffle_all", "--instruct", "nonsense"], "no such directory"),
    "what is no checkpoint": (["export", "injection_layers", "DIR", *PAIR], "cannot be a checkpoint"),
    "mergekit's experiment": (["mergekit", "nonsense", *PAIR], "unknown experiment"),
}
WRONG = [("run_all.py", what, *case) for what, case in RUN.items()]
WRONG += [("franken.py", what, *case) for what, case in FRANKEN.items()]
MINE = "from experiments import Experiment\nfrom franken import swap\n"
FILES = {
    "a missing bracket": ("EXPERIMENTS = [\n", "SyntaxError: '[' was never closed (mine.py, line 1)"),
    "an operation to import": (
        "from franken import swop\n",
        "ImportError: cannot import name 'swop' from 'franken'",
    ),
    "an operation": (
        MINE + "EXPERIMENTS = [Experiment('x', 'mine', swaps)]\n",
        "NameError: name 'swaps' is not defined (mine.py, line 3); the nearest is 'swap'",
    ),
    "what a model has": (
        MINE + "EXPERIMENTS = [Experiment('x', 'mine', lambda m: swap(m.recip, 1, 2))]\n",
        "'Model' object has no attribute 'recip' (mine.py, line 3); the nearest is 'recipe'",
    ),
    "nothing": (MINE + "EXPERIMENTS = []\n", "mine.py: EXPERIMENTS is empty"),
    "an end of the program": ("import sys\nsys.exit(0)\n", "SystemExit: 0 (mine.py, line 2)"),
    "an end of the program, later": (
        MINE + "EXPERIMENTS = [Experiment('x', 'mine', lambda m: exit(0))]\n",
        "experiment x: SystemExit: 0 (mine.py, line 3)",
    ),
    "a layer": (
        MINE + "EXPERIMENTS = [Experiment('x', 'mine', lambda m: swap(m.recipe, 1, 99))]\n",
        "experiment x: layer 99 is out of range: the model has layers 0 to 29",
    ),
}
OPTIONS = {
    "run_all.py": (["--experimnts", "shuffle_all"], "--experiments"),
    "franken.py": (["chat", "shuffle_all", "--temprature", "0.5"], "--temperature"),
    "report.py": (["results/run_x", "--tabel=x.csv"], "--table"),
}
RIGHT = {
    "run_all.py --help": ["run_all.py", "--help"],
    "run_all.py --list": ["run_all.py", "--list", "--sweep", "window", *PAIR],
    "franken.py --help": ["franken.py", "chat", "--help"],
    "report.py --help": ["report.py", "--help"],
}


def ran(argv: list[str], folder) -> tuple[int, str, set[str]]:
    """(exit status, the last word on stderr, the modules imported) of a command."""
    argv = [word.replace("DIR", str(folder)) for word in argv]
    command = [sys.executable, "-X", "importtime", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    return done.returncode, said[-1] if said else "", imported


def assert_light(imported: set[str]) -> None:
    assert "errors" in imported  # the command did begin
    assert not imported & {"torch", "transformers", "accelerate", "scipy", "matplotlib"}


@pytest.mark.parametrize(
    ("program", "argv", "words"), [(p, *case) for p, _, *case in WRONG], ids=[what for _, what, *_ in WRONG]
)
def test_what_cannot_be_is_refused_before_torch_is_imported(tmp_path, program, argv, words):
    code, said, imported = ran([program, *argv], tmp_path)
    assert code == 1 and said.startswith(f"{program}: ") and words in said
    assert_light(imported)


@pytest.mark.parametrize("what", FILES)
def test_a_mistake_in_an_experiments_file_is_told_before_torch_is_imported(tmp_path, what):
    text, words = FILES[what]
    (tmp_path / "mine.py").write_text(text)
    code, said, imported = ran(["run_all.py", *PAIR, "--experiments-file", "DIR/mine.py"], tmp_path)
    assert code == 1 and said.startswith("run_all.py: ") and words in said
    assert_light(imported)


def test_an_experiments_file_has_all_of_franken_and_torch_only_for_what_needs_it(tmp_path):
    (tmp_path / "light.py").write_text(MINE + "EXPERIMENTS = [Experiment('x', 'mine', lambda m: m.recipe)]\n")
    (tmp_path / "whole.py").write_text(
        "from franken import *\nimport franken\nfrom franken import find_layers\n"
        "assert LiveModel is franken.LiveModel and torch and swap\n"
        "from experiments import Experiment\n"
        "EXPERIMENTS = [Experiment('x', 'mine', lambda m: m.recipe)]\n"
    )
    code, said, imported = ran(["run_all.py", "--list", "--experiments-file", "DIR/light.py"], tmp_path)
    assert code == 0, said
    assert_light(imported)
    code, said, imported = ran(["run_all.py", "--list", "--experiments-file", "DIR/whole.py"], tmp_path)
    assert code == 0 and "torch" in imported, said


@pytest.mark.parametrize("program", OPTIONS)
def test_a_mistyped_option_is_answered_with_the_nearest(tmp_path, program):
    argv, meant = OPTIONS[program]
    code, said, _ = ran([program, *argv], tmp_path)
    assert code == 2 and said.endswith(f"; the nearest is '{meant}'")


@pytest.mark.parametrize("what", RIGHT)
def test_what_only_tells_imports_no_torch(tmp_path, what):
    code, _, imported = ran(RIGHT[what], tmp_path)
    assert code == 0
    if "report" not in what:  # pages need numbers
        assert_light(imported)
    assert "torch" not in imported
