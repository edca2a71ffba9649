"""Numbers that are too many for JSON: a compressed file beside an experiment's own, experiments/<name>.npz.

A suite gives numpy arrays under the key ARRAYS of its measurements. They are written here, and the
measurements say where: `file` is the file's name, `sha256` (hex) that of its contents. The file may be left
out of what is kept of a run: what was made of it stands in the run's own folder (probe.json).
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np

from errors import FrankenError
from files import read_bytes, write_bytes


def save_arrays(folder: Path, result: dict) -> None:
    """Write the arrays of an experiment's suites to `folder`, and say so in `result`, **which is changed**.

    Raises FrankenError if the disk refuses.
    """
    from suites.base import ARRAYS  # here: a suite needs torch, which a reader of arrays can do without

    name, arrays, holders = result["experiment"]["name"], {}, []
    for suite, measured in result["measurements"].items():
        if ARRAYS in measured:
            arrays |= {f"{suite}.{key}": value for key, value in measured.pop(ARRAYS).items()}
            holders.append(measured)
    if not holders:
        return
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(folder / f"{name}.npz", buffer.getvalue())
    for measured in holders:
        measured |= {"file": f"{name}.npz", "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}


def load_arrays(folder: Path, suite: str, measured: dict) -> dict[str, np.ndarray] | None:
    """A suite's arrays by name; None where the file was not kept. Raises FrankenError if it is another."""
    path = folder / Path(measured["file"]).name
    if not os.path.lexists(path):
        return None
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != measured["sha256"]:
        raise FrankenError(f"{path} is not the file that its experiment wrote")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as held:
            return {key.removeprefix(f"{suite}."): held[key] for key in held if key.startswith(f"{suite}.")}
    except (ValueError, KeyError, zipfile.BadZipFile) as e:
        raise FrankenError(f"{path} is corrupt ({e})") from e
