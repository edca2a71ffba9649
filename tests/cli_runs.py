"""Fixtures and helpers for tests of whole runs on a tiny pair (a plugin of pytest's; see conftest.py)."""

import json
import shutil
from pathlib import Path

import pytest
import small_battery

import run_all
from runner.results import Run, sealed

QUICK = ["binary", "perplexity"]
FOUR = ["--experiments", "swap_adjacent_30_35", "perturb_all_5pct", "blend_linear"]  # with the baseline


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A folder with the checkpoints instruct and base. Not to be written to."""
    folder = tmp_path_factory.mktemp("pair")
    for k, name in enumerate(("instruct", "base")):
        small_battery.checkpoint(folder / name, 100 + k, family="qwen2", layers=6)
    return folder


@pytest.fixture
def go(pair, tmp_path, capfd):
    """go(...) -> (exit status, stdout, stderr) of run_all.py on the pair, with results in tmp_path /
    "out"."""

    def run(*more, out="out"):
        capfd.readouterr()
        code = run_all.main(small_battery.arguments(pair, tmp_path / out, *more))
        return code, *capfd.readouterr()

    return run


def latest(out: Path) -> Path:
    return max(out.glob("run_*"), key=lambda path: path.stat().st_mtime)


def read(run: Path) -> dict[str, dict]:
    return {file.stem: Run(run).load(file.stem) for file in (run / "experiments").glob("*.json")}


def timeless(run: Path) -> dict[str, dict]:
    """Every experiment's JSON without what the clock and the machine decide."""
    return {
        name: {k: v for k, v in result.items() if k != "performance"} for name, result in read(run).items()
    }


@pytest.fixture(scope="session")
def four(pair, tmp_path_factory):
    """An uninterrupted run of FOUR."""
    out = tmp_path_factory.mktemp("four")
    with pytest.MonkeyPatch.context() as m:
        small_battery.use(m)
        assert run_all.main(small_battery.arguments(pair, out, *FOUR)) == 0
    return latest(out)


@pytest.fixture
def finished(four, tmp_path):
    """A copy of the run of FOUR that may be written to."""
    shutil.copytree(four, tmp_path / "copy")
    return tmp_path / "copy"


def resealed(text: str) -> str:
    """A result's file with the hash of what it now says."""
    return sealed({k: v for k, v in json.loads(text).items() if k != "sha256"})


def stamps(run: Path) -> dict:
    return {
        file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (run / "experiments").iterdir()
    }


def refused(result, words: str) -> None:
    """Exactly one line on stderr, which holds the words; nothing on stdout; a status that is not zero."""
    code, out, err = result
    assert code not in (0, None), err
    assert out == "", err
    assert "Traceback" not in err, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("run_all.py: "), err
    assert words in err, err


def resumed(run, capfd, *more):
    capfd.readouterr()
    code = run_all.main(["--resume", str(run), *more])
    return code, *capfd.readouterr()
