"""The cache of converted checkpoints: what is kept there is whole or not there at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from errors import FrankenError, first_line
from surgery.tensors import DTYPES, OTHER_DTYPES, as_bytes


def cache_dir() -> Path:
    """FRANKENMODEL_CACHE, else the user's cache directory."""
    base = (
        os.environ.get("FRANKENMODEL_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "frankenmodel"
    )
    return Path(base).expanduser()


@contextlib.contextmanager
def workspace(parent: Path) -> Iterator[Path]:
    """A folder in `parent` for work that is not finished, gone when the block ends, also on SIGTERM and
    SIGHUP.

    What a process left that was killed outright goes when the next one begins, or finds in the cache what it
    looks for: each holds a lock on its folder for as long as it lives. Raises OSError if the folder cannot be
    made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent):  # nobody may sweep between a folder's making and its lock
        _sweep(parent)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=parent))
        lock = _locked(work)
        lock.__enter__()
    try:
        with _signals_raise():
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.__exit__(None, None, None)


def _sweep(parent: Path) -> None:
    for left in parent.glob(".making-*"):
        with contextlib.suppress(OSError), _locked(left, wait=False):
            shutil.rmtree(left)


def is_kept(final: Path) -> bool:
    """Whether the cache has this converted checkpoint; what killed processes left beside it goes then."""
    if not (final / "model.safetensors").exists():
        return False
    with contextlib.suppress(OSError), _locked(final.parent, wait=False):
        _sweep(final.parent)
    return True


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum, frame):
        raise KeyboardInterrupt

    ends = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, stop) for number in ends}  # nohup ignores SIGHUP
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def keep(work: Path, final: Path) -> None:
    """Move finished work to where it is looked for: whole or not at all. Raises OSError."""
    try:
        work.rename(final)
    except OSError:
        if not (final / "model.safetensors").exists():  # unless another process was first
            raise


def sha256_of(path: Path) -> str:
    """Raises FrankenError if the file cannot be read."""
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise FrankenError(f"{path}: {e.strerror}") from e


def write_safetensors(
    path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], make: Callable[[str], torch.Tensor]
) -> None:
    """One safetensors file, a tensor at a time: the format's own writer wants all of them in memory.

    Args:
        tensors: dtype and shape of each, by name.
        make: gives the tensor of that name.
    Raises OSError. Bytes and order are those of `safetensors.torch.save_file` where all have one dtype.
    """
    kinds = {dtype: name for name, dtype in (DTYPES | OTHER_DTYPES).items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        dtype, shape = tensors[name]
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in tqdm(sorted(tensors), unit="tensor", leave=False, dynamic_ncols=True):
            f.write(as_bytes(make(name).contiguous()).data)


def cannot_keep(folder: Path, why: OSError) -> FrankenError:
    """The one line for a cache that cannot be written."""
    return FrankenError(
        f"{folder}: cannot keep the converted model there ({first_line(why)}); set FRANKENMODEL_CACHE"
    )
