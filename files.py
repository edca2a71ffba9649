"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from errors import FrankenError


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: a reader, or a resumed run, never sees half of it.

    Raises FrankenError if it cannot be written (no such folder, full disk, no permission).
    """
    # model output may hold lone surrogates
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Like write_text, for bytes."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise FrankenError(f"cannot write {path}: {e.strerror}") from e
