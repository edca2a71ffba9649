"""Files that are written whole or not at all, and read only where they are files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import stat
from pathlib import Path
from typing import Any

from errors import FrankenError

ROOT = Path(__file__).resolve().parent  # this checkout, or where it is installed
MOST_DIGITS = 300
LONGEST_JSON = 1 << 30  # bytes; the largest files that are read here hold some MB
SYSTEM, SHARED_MEMORY = ("/dev/", "/proc/", "/sys/"), "/dev/shm/"
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


LEAST_FILES = 64  # open at once: the interpreter, its libraries, and a handful of shards and pipes


def check_open_files(least: int = LEAST_FILES) -> None:
    """Let this process open as many files as the system lets it. Raises FrankenError if these are fewer than
    `least`, with which it would fail anywhere."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= 4096:
        return
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    if (got := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < least:
        raise FrankenError(
            f"only {got} files may be open at once, and {least} are needed; raise it with `ulimit -n 1024`"
        )


def write_text(path: Path, text: str, lasting: bool = True) -> None:
    """Write a text file whole or not at all: a reader, or a resumed run, never sees half of it.

    lasting: it is on the disk on return and survives a power cut, for which a disk takes some milliseconds.
    Raises FrankenError if it cannot be written (no such folder, full disk, no permission).
    """
    # model output may hold lone surrogates
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), lasting)


def write_bytes(path: Path, data: bytes, lasting: bool = True) -> None:
    """Like write_text, for bytes."""
    refuse_place(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as f:
            f.write(data)
            f.flush()
            if lasting:
                os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException as e:  # Ctrl-C too leaves nothing half-written
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise FrankenError(f"cannot write {path}: {e.strerror}") from e
        raise


def refuse_special(path: str | Path) -> None:
    """Raises FrankenError for what can be opened and is no file: reading a pipe or a terminal would wait for
    ever, and /dev/zero has no end. What is not there, or may not be looked at, its reader says."""
    try:
        mode = stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError):
        return
    if mode != stat.S_IFREG and mode != stat.S_IFDIR:
        raise FrankenError(f"{path} is {KINDS.get(mode, 'something else')}, not a file")


def refuse_place(path: str | Path) -> None:
    """Raises FrankenError where a file that is written would take the place of something that is none: a
    pipe, a device, or a name in /dev or /proc, such as /dev/stdout, which is a link to whatever is open."""
    refuse_special(path)
    whole = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
    if whole.startswith(SYSTEM) and not whole.startswith(SHARED_MEMORY):
        raise FrankenError(f"{path} is of the system's own, where no file is written")


def check_target(path: str | Path) -> None:
    """Look, before any work is done and changing nothing, whether a file can be written there, in a folder
    that may have to be made. Raises FrankenError if not."""
    refuse_place(path)
    if os.path.isdir(path):
        raise FrankenError(f"cannot write {path}: it is a folder")
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as e:
        raise FrankenError(f"cannot write {path}: {e.strerror}") from e
    above = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise FrankenError(f"cannot write {path}: {above} is not to be written to")


def refuse_special_in(folder: Path) -> None:
    """refuse_special for all that lies directly in a folder that a library reads, such as a checkpoint's."""
    with contextlib.suppress(OSError):
        for file in sorted(folder.iterdir()):
            refuse_special(file)


def read_bytes(path: str | Path, most: int = LONGEST_JSON) -> bytes:
    """A file's contents. Raises FrankenError if it cannot be read, is no file, or holds over `most` bytes."""
    refuse_special(path)
    try:
        with open(path, "rb") as f:
            large = os.fstat(f.fileno()).st_size > most
            data = b"" if large else f.read()
    except OSError as e:
        raise FrankenError(f"cannot read {path}: {e.strerror}") from e
    except ValueError as e:  # a name with a zero byte in it
        raise FrankenError(f"cannot read {path!r}: {e}") from e
    if large or len(data) > most:
        raise FrankenError(f"{path} holds over {most:,} bytes, more than is read of such a file")
    return data


def parse_json(data: bytes | str, place: str, nan: bool = False) -> Any:
    """JSON. Raises FrankenError naming the place it comes from if it is none, or is nested beyond what can be
    read; NaN and infinity, which JSON does not have, and numbers that are read as such, only where `nan`
    allows them."""
    numbers = {} if nan else {"parse_constant": _refuse, "parse_float": finite_number}
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(text, parse_int=whole_number, **numbers)
    except ValueError as e:
        raise FrankenError(f"{place} is corrupt ({e})") from e
    except RecursionError as e:
        raise FrankenError(f"{place} is corrupt (it is nested too deep)") from e


def read_json(path: Path, nan: bool = False) -> Any:
    """parse_json of a file."""
    return parse_json(read_bytes(path), str(path), nan)


def whole_number(digits: str) -> int:
    """A whole number of JSON. Raises ValueError for one that no float holds, with which no sum works."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def finite_number(digits: str) -> float:
    """A number of JSON. Raises ValueError for one beyond what a float holds, as 1e400, which would be read as
    infinity."""
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is beyond all numbers")
    return number


def _refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")
