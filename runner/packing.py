"""A finished run's experiments in one compressed file, experiments.tar.xz, and back: experiments/*.json, and
texts.json with the questions that they share.

The archive lies in the run's folder and its members are named as the files were, so that `tar xf
experiments.tar.xz` there gives them back too. Order, times and owners are fixed: equal files make an equal
archive, as long as the liblzma that compresses is the same. Where a file and a member of the same name stand
side by side, which is what a kill in the middle leaves, they have to be equal; all else is refused.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import tarfile
from pathlib import Path

from errors import FrankenError
from files import read_bytes, write_bytes

ARCHIVE = "experiments.tar.xz"
TEXTS = "texts.json"
MEMBER = re.compile(r"experiments/([^/.][^/]*)\.json")
# The dictionary holds a run of 250 experiments; more of it would only take memory, also where it is unpacked
FILTERS = ({"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 16 << 20},)
LARGEST = 1 << 30  # bytes that an archive may hold: a few hundred KB can be made to hold far more


def member(name: str) -> str:
    """What an experiment's file is called in the archive, and in the run's folder."""
    return f"experiments/{name}.json"


def archive_bytes(files: dict[str, bytes]) -> bytes:
    """The archive of these files; their names are those of `member`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            entry = tarfile.TarInfo(name)  # dated 1970, of user 0, mode 644
            entry.size = len(files[name])
            tar.addfile(entry, io.BytesIO(files[name]))
    return lzma.compress(buffer.getvalue(), filters=[dict(f) for f in FILTERS])


def read_archive(path: Path) -> dict[str, bytes]:
    """What an archive holds, by the names of `member`. Raises FrankenError naming it if it is not whole."""
    data = read_bytes(path)
    try:
        return _files(data)
    except (lzma.LZMAError, tarfile.TarError, ValueError, EOFError) as e:
        raise FrankenError(f"{path} is corrupt ({e})") from e


def _files(data: bytes) -> dict[str, bytes]:
    decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_XZ)
    whole = decompressor.decompress(data, max_length=LARGEST)
    if not decompressor.eof:
        raise ValueError("it holds over 1 GiB" if len(whole) == LARGEST else "it is cut short")
    if decompressor.unused_data:
        raise ValueError("something stands behind its end")
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(whole), mode="r:") as tar:
        for entry in tar:
            known = entry.isreg() and (entry.name == TEXTS or MEMBER.fullmatch(entry.name))
            content = tar.extractfile(entry) if known else None
            if content is None or entry.name in files:
                raise ValueError(f"{entry.name[:80]!r} is no experiment, or stands in it twice")
            files[entry.name] = content.read()
        end = whole[tar.offset :]
    if len(end) < 2 * tarfile.BLOCKSIZE or any(end):  # tarfile takes a broken header for the end
        raise ValueError("its tar file has no end")
    return files


def pack(folder: Path) -> tuple[int, int, int]:
    """Put a run's experiments/*.json and texts.json into its archive; (how many experiments, bytes of all
    files, the archive's).

    The files go only when the archive has been read back from disk and holds each of them byte for byte. What
    is packed already stays so. Nobody may write to the run meanwhile (Run.alone). Raises FrankenError, and
    changes nothing, if there is nothing to pack, a file is not what the archive has of that name, or the disk
    refuses.
    """
    archive = folder / ARCHIVE
    held = read_archive(archive) if archive.exists() else {}
    loose = _loose(folder)
    _refuse_others(archive, held, loose)
    files = held | loose
    if not files.keys() - {TEXTS}:
        raise FrankenError(f"{folder} holds no experiments to pack")
    # 1) the archive, under another name until it is known to be good
    if files.keys() != held.keys():
        partial = folder / f".{ARCHIVE}.{os.getpid()}.partial"
        try:
            write_bytes(partial, archive_bytes(files))
            if read_archive(partial) != files:
                raise FrankenError(f"{archive} was not written as it should be; nothing is removed")
            os.replace(partial, archive)
            _settle(folder)
        except OSError as e:
            raise FrankenError(f"cannot write {archive}: {e.strerror}") from e
        finally:
            partial.unlink(missing_ok=True)
    # 2) the files, each looked at once more
    for name, content in loose.items():
        if read_bytes(folder / name) != content:
            raise FrankenError(f"{folder / name} was written to while it was packed; it is kept")
        _remove(folder / name)
    if (folder / "experiments").is_dir() and not any((folder / "experiments").iterdir()):
        (folder / "experiments").rmdir()
    return len(files.keys() - {TEXTS}), sum(map(len, files.values())), archive.stat().st_size


def unpack(folder: Path) -> int:
    """Give a packed run its experiments/*.json and texts.json back and remove the archive; how many
    experiments there are.

    The archive goes only when every file is there and equal. Raises FrankenError, and removes nothing, if the
    run is not packed, the archive is corrupt, a file is not what the archive has of that name, or the disk
    refuses.
    """
    archive = folder / ARCHIVE
    if not archive.exists():
        raise FrankenError(f"{folder} is not packed: it has no {ARCHIVE}")
    held, loose = read_archive(archive), _loose(folder)
    _refuse_others(archive, held, loose)
    try:
        (folder / "experiments").mkdir(exist_ok=True)
        for name in held.keys() - loose.keys():
            write_bytes(folder / name, held[name])
        _settle(folder / "experiments")
    except OSError as e:
        raise FrankenError(f"cannot write to {folder}: {e.strerror}") from e
    lost = [name for name, content in held.items() if read_bytes(folder / name) != content]
    if lost:
        raise FrankenError(f"{folder / lost[0]} was not written as it should be; {ARCHIVE} is kept")
    _remove(archive)
    return len(held.keys() - {TEXTS})


def _loose(folder: Path) -> dict[str, bytes]:
    """The experiments that are files of their own, and the texts; others' half-written files have a dot in
    front."""
    paths = (folder / "experiments").glob("*.json")
    named = {f"experiments/{path.name}": path for path in paths}
    named = {name: path for name, path in named.items() if MEMBER.fullmatch(name)}
    if (folder / TEXTS).exists():
        named[TEXTS] = folder / TEXTS
    return {name: read_bytes(path) for name, path in named.items()}


def _refuse_others(archive: Path, held: dict[str, bytes], loose: dict[str, bytes]) -> None:
    others = [name for name in loose.keys() & held.keys() if loose[name] != held[name]]
    if others:
        raise FrankenError(
            f"{archive.parent / min(others)} is not what {ARCHIVE} has of that name; move one of them away"
        )


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as e:
        raise FrankenError(f"cannot remove {path}: {e.strerror}") from e


def _settle(folder: Path) -> None:
    """The names in a folder on disk before others are removed: a power cut keeps one of the two."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
