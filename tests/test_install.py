"""What an installation holds, and that its versions are the tested ones."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_uv_takes_the_versions_that_were_tested():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert PROJECT["tool"]["uv"]["constraint-dependencies"] == pinned and len(pinned) > 20


def tracked(*paths: str) -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", *paths], capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which a copy of the checkout is installed, without its dependencies."""
    copy, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("site")
    for name in tracked():
        if not name.startswith(("results/", "docs/", "tests/")) and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--target", str(target), str(copy)], capture_output=True, text=True, timeout=150
    )
    if "setuptools" in done.stderr and done.returncode:
        pytest.skip("no setuptools here to build with")
    assert done.returncode == 0, done.stderr
    return target


def test_every_room_and_what_it_reads_are_installed(installed):
    rooms = PROJECT["tool"]["importlinter"]["root_packages"]
    for room in set(rooms) - {"benchmarks"}:
        assert (installed / room).is_dir() or (installed / f"{room}.py").is_file(), room
    read = tracked("schema", "texts", "reporting/templates", "adapters/*.safetensors", "weird_gen/data")
    assert len(read) > 20
    for name in (name for name in read if not name.endswith(".md")):
        assert (installed / name).is_file(), name


def test_it_is_imported_from_any_folder(installed, tmp_path):
    program = "import franken, run_all, reporting.html_report, prompts; assert prompts.NEUTRAL_TEXTS"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr


def test_the_installed_command_is_run_all_and_report(installed, tmp_path):
    """As `uvx --from git+... frankenmodel run ...` has it."""

    def said(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(installed / "bin" / "frankenmodel"), *args],
            cwd=tmp_path,
            env={"PYTHONPATH": str(installed), "PATH": "", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=150,
        )

    listed, refused = said("run", "--list"), said("report", "nowhere")
    assert listed.returncode == 0 and "baseline_instruct" in listed.stdout, listed.stderr
    assert refused.returncode == 1 and refused.stderr.startswith("report.py: cannot read nowhere")
    assert said().returncode == 2 and said("--help").stdout.startswith("usage: frankenmodel run")


def test_a_module_of_ours_that_is_another_packages_is_one_line(installed, tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise SystemExit('somebody else')")
    done = subprocess.run(
        [sys.executable, str(installed / "bin" / "frankenmodel"), "run", "--list"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{installed}", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"frankenmodel: the module engine is that of {tmp_path / 'engine'}")
    assert done.stderr.count("\n") == 1 and "in a new environment" in done.stderr


def test_every_module_at_the_root_is_looked_for():
    import frankenmodel

    listed = {*PROJECT["tool"]["importlinter"]["root_packages"]} - {"frankenmodel", "benchmarks"}
    assert listed == set(frankenmodel.MODULES)
    assert frankenmodel.shadowed() is None


@pytest.mark.real
def test_the_readmes_ten_lines_of_python_run_as_printed(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(from engine.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names: dict = {}
    exec(code, names)
    assert len(capsys.readouterr().out) > 10
    assert names["live"].recipe == names["live"].original
