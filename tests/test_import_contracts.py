"""The import contracts hold, and an import that breaks one is seen."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter is in requirements-dev.txt")

ROOT = Path(__file__).resolve().parents[1]


def run_contracts(root: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(Path(__file__).parent / "import_contracts.py"), str(root)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def sources(tmp_path):
    """A copy of all Python sources that a test may change."""
    for path in [ROOT / "pyproject.toml", *ROOT.glob("*.py"), *ROOT.glob("*/**/*.py")]:
        part = path.relative_to(ROOT)
        if part.parts[0] not in ("tests", "results") and not part.parts[0].startswith("."):
            (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, tmp_path / part)
    return tmp_path


def append(path: Path, line: str) -> None:
    path.write_text(f"{path.read_text()}\n{line}\n")


def test_the_sources_keep_the_contracts():
    done = run_contracts(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_import_up_the_list_is_seen_inside_a_function_too(sources):
    append(sources / "errors.py", "def late():\n    import run_all")
    done = run_contracts(sources)
    assert done.returncode == 1
    assert "errors is not allowed to import run_all" in done.stdout


def test_a_circle_inside_a_room_is_seen(sources):
    append(sources / "surgery" / "weights.py", "import surgery.recipes")
    append(sources / "surgery" / "recipes.py", "import surgery.weights")
    done = run_contracts(sources)
    assert done.returncode == 1
    assert "No cycles are allowed in surgery" in done.stdout


def test_a_new_module_needs_a_room(sources):
    (sources / "stray.py").write_text("")
    done = run_contracts(sources)
    assert done.returncode == 1
    assert "in no room of pyproject.toml: stray" in done.stderr
