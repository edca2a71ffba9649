"""The import contracts of pyproject.toml, checked by import-linter: `python tests/import_contracts.py`.

import-linter reads packages, and some rooms of this repository are single files at its root. So the sources
are laid out once more in a temporary folder, where each such file NAME.py is NAME/__init__.py, which every
import reads the same way.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lay_out(root: Path, folder: Path) -> list[str]:
    """Copy the Python sources of all rooms under `root` into `folder` as packages; returns the rooms' names.

    Raises ValueError for a room that is not there, and for a root module or package that is in no room.
    """
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]
    rooms = settings["root_packages"]
    for room in rooms:
        target = folder / room
        if (root / f"{room}.py").is_file():
            target.mkdir()
            shutil.copyfile(root / f"{room}.py", target / "__init__.py")
        elif (root / room).is_dir():
            for source in (root / room).rglob("*.py"):
                copy = target / source.relative_to(root / room)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)
            (target / "__init__.py").touch()
        else:
            raise ValueError(f"pyproject.toml names the room {room}, which is not there")
    there = {p.stem for p in root.glob("*.py")} | {p.parent.name for p in root.glob("*/__init__.py")}
    if homeless := sorted(there - set(rooms)):
        raise ValueError(f"in no room of pyproject.toml: {', '.join(homeless)}")
    shutil.copyfile(root / "pyproject.toml", folder / "pyproject.toml")
    return rooms


def check(root: Path = ROOT) -> int:
    """import-linter's exit status for the sources under `root`: 0 if all contracts are kept."""
    with tempfile.TemporaryDirectory() as name:
        try:
            lay_out(root, Path(name))
        except ValueError as e:
            print(f"error: {e}", file=sys.stderr)
            return 1
        os.chdir(name)  # where import-linter looks for packages and for its settings
        # the other folders on the path hold modules of the same names
        sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (root, Path(__file__).parent)]
        from importlinter.cli import lint_imports

        try:
            return lint_imports(no_cache=True)
        finally:
            os.chdir(root)


if __name__ == "__main__":
    sys.exit(check(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT))
