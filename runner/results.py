"""A run on disk: its manifest and one JSON per experiment, each written whole or not at all.

    results/run_<time>/manifest.json            what was run, on what, with which seeds
    results/run_<time>/experiments/<name>.json  one experiment; `schema/experiment.json` documents and checks
                                                it, `runner/tables.py` makes it small
    results/run_<time>/texts.json               the questions that are the same in every experiment
    results/run_<time>/experiments.tar.xz       all of experiments/*.json, once the run is packed by
                                                `runner/packing.py`

Everything that depends on the clock or the machine is under "performance" (and in the manifest), so that two
runs of the same thing differ nowhere else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonschema
import jsonschema_rs
import orjson

from errors import FrankenError, nearest
from files import ROOT, parse_json, read_bytes, read_json, write_text
from runner import packing, tables

SCHEMA_VERSION = 2
DIGITS = 10  # significant ones of what is computed from results
READABLE = (1, 2)  # version 1 has the questions in every file, and no tables
SCHEMA = json.loads((ROOT / "schema" / "experiment.json").read_text())
# made once: checking the schema itself takes longer than checking a result
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
# the same in a hundredth of the time (1 ms a result), but without the words in which an error is told
QUICK = jsonschema_rs.validator_for(SCHEMA)
MANIFEST = jsonschema.Draft202012Validator(json.loads((ROOT / "schema" / "manifest.json").read_text()))
MOST_SHOWN = 5  # runs, where another folder is named than one of a run
LONGEST_NAME = 200  # bytes; file systems take 255, and something is put around it
NAME = re.compile(r"[\w+-][\w.+-]*")  # of an experiment, as it stands in file names, tables and pages


def write_json(path: Path, data: dict) -> None:
    """Write a JSON file whole or not at all: a reader, or a resumed run, never sees half of it.

    Raises FrankenError if it cannot be written (full disk, no permission), ValueError for NaN or infinity.
    """
    write_text(path, tables.layout(data) + "\n")


def write_computed(path: Path, data: dict) -> None:
    """Like write_json, for what is computed from results: floats keep DIGITS significant digits.

    The bits beyond turn on the processor's kernels, so without this a report that is made again elsewhere
    would differ from its own in thousands of last digits.
    """
    write_json(path, _rounded(data))


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def runs_in(folder: Path) -> list[Path]:
    """The runs that lie directly in a folder, the one last begun or resumed first."""
    with contextlib.suppress(OSError):
        known = [(file.stat().st_mtime, file.parent) for file in folder.glob("*/manifest.json")]
        return [run for _, run in sorted(known, reverse=True)]
    return []


def check_writable(folder: str | Path) -> None:
    """Make a folder for results and write to it once. Raises FrankenError if the disk refuses."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as f:
            f.write(b"x" * 65536)
    except OSError as e:
        raise FrankenError(f"cannot write results to {folder}: {e.strerror}") from e


BACK = "put it back from a copy of this run, or from another run of the same questions; no result is lost"
AGAIN = "; move it away and resume to run that experiment again"
AGAIN_PACKED = "; unpack the run, move that file away and resume to run the experiment again"


class Run:
    """One run's directory."""

    def __init__(self, path: Path):
        self.path = path
        self.manifest_path = path / "manifest.json"
        self.texts_path = path / packing.TEXTS
        self._texts: dict | None = None
        self._checked: dict[str, tuple] = {}  # by experiment: the file that the schema has been held against
        self._archive: tuple[tuple, dict[str, bytes]] | None = None  # its stamp and what it holds

    @staticmethod
    def create(output: str, manifest: dict) -> Run:
        """A new run_<time> under `output`. Raises FrankenError if that cannot be written to."""
        path = _new_folder(Path(output) / time.strftime("run_%Y%m%d_%H%M%S"))
        run = Run(path)
        write_json(run.manifest_path, manifest)
        return run

    @staticmethod
    def resume(path: str) -> tuple[Run, dict]:
        """An existing run and its manifest. Raises FrankenError if it is not one of this version, or not
        whole."""
        run = Run(Path(path))
        run.refuse_no_run()
        manifest = read_json(run.manifest_path)
        if not isinstance(manifest, dict) or manifest.get("schema_version") not in READABLE:
            raise FrankenError(f"{run.manifest_path} is not a manifest of version 1 to {SCHEMA_VERSION}")
        wrong = next(MANIFEST.iter_errors(manifest), None)
        if wrong:
            lost = (
                [k for k in wrong.schema["required"] if k not in wrong.instance]
                if wrong.validator == "required"
                else []
            )
            place = ".".join(map(str, [*wrong.absolute_path, *lost[:1]]))[:80]
            raise FrankenError(f"{run.manifest_path} is corrupt ({place} is missing or of another kind)")
        for name in manifest["experiments"]:
            if not isinstance(name, str) or not NAME.fullmatch(name) or len(name.encode()) > LONGEST_NAME:
                raise FrankenError(f"{run.manifest_path} is corrupt ({str(name)[:80]!r} names no experiment)")
        run.refuse_ways_out()
        return run, manifest

    def refuse_no_run(self) -> None:
        """Raises FrankenError for a folder of runs, and for a run's folder that is not there where another's
        name is near: with the runs that are meant."""
        if self.manifest_path.exists():
            return
        if runs := runs_in(self.path):
            more = f" and {len(runs) - MOST_SHOWN:,} more" if len(runs) > MOST_SHOWN else ""
            raise FrankenError(
                f"{self.path} is no run, but a folder of runs; newest first:"
                f" {', '.join(map(str, runs[:MOST_SHOWN]))}{more}"
            )
        if not self.path.exists() and (near := nearest(str(self.path), map(str, runs_in(self.path.parent)))):
            raise FrankenError(f"cannot read {self.manifest_path}: there is no such folder{near}")

    def refuse_ways_out(self) -> None:
        """Raises FrankenError for a link that leads out of the run's folder, which may come from anywhere:
        what it leads to would be read as a result, or removed when the run is packed."""
        home = self.path.resolve()
        for path in (*self.path.glob("*"), *(self.path / "experiments").glob("*")):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise FrankenError(f"{path} is a link that leads out of the run's folder; it is not followed")

    @contextlib.contextmanager
    def alone(self):
        """Nobody else writes to this run inside; what dead processes left half-written is removed first.

        The lock is the kernel's, on the folder: it ends with its process however that ends, so that none is
        ever stale. Raises FrankenError if another process holds it.
        """
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise FrankenError(
                    f"another process is at work on {self.path}; wait for it, or end it"
                ) from e
            except OSError:
                pass  # a file system without locks
            for partial in self.path.rglob(".*.partial"):
                owner = partial.name.split(".")[-2]
                if owner.isdecimal() and not is_alive(int(owner)):
                    partial.unlink(missing_ok=True)
            yield
        finally:
            os.close(folder)

    def file(self, name: str) -> Path:
        return self.path / packing.member(name)

    @property
    def archive(self) -> Path:
        """Where the experiments are if the run is packed."""
        return self.path / packing.ARCHIVE

    def refuse_packed(self) -> None:
        """Raises FrankenError if the run is packed: nothing is added to an archive."""
        if self.archive.exists():
            raise FrankenError(
                f"{self.path} is packed; `python report.py --unpack {shlex.quote(str(self.path))}` first"
            )

    def pack(self) -> tuple[int, int, int]:
        """packing.pack, with nobody else at work on the run."""
        with self.alone():
            return packing.pack(self.path)

    def unpack(self) -> int:
        """packing.unpack, with nobody else at work on the run."""
        with self.alone():
            return packing.unpack(self.path)

    def _packed(self) -> tuple[tuple, dict[str, bytes]]:
        """(stamp, experiments) of the archive, read again only where it has changed; of none, nothing.

        Raises FrankenError naming it if it is corrupt.
        """
        if not self.archive.exists():
            return (), {}
        stamp = _stamp(self.archive)
        if self._archive is None or self._archive[0] != stamp:
            self._archive = stamp, packing.read_archive(self.archive)
        return self._archive

    def _read(self, name: str) -> tuple[bytes, tuple, str, str] | None:
        """(content, stamp of the file it stands in, what to call that, the way on if it is corrupt) of an
        experiment, or None if it has not run. Raises FrankenError if it cannot be read."""
        file, (stamp, held) = self.file(name), self._packed()
        packed = held.get(packing.member(name))
        if not file.exists():
            if packed is None:
                return None
            return packed, stamp, f"{file.name} in {self.archive}", AGAIN_PACKED
        content, stamp = read_bytes(file), _stamp(file)
        if packed not in (None, content):  # equal after a kill while packing
            raise FrankenError(
                f"{file} is not what {self.archive.name} has of that name; move one of them away"
            )
        return content, stamp, str(file), AGAIN

    def texts(self) -> dict:
        """What texts.json holds, packed or not; nothing where no result has been written yet, or none of
        version 2.

        Raises FrankenError naming the file if it is corrupt or was changed, or is not what the archive has.
        """
        if self._texts is None:
            loose = read_bytes(self.texts_path) if self.texts_path.exists() else None
            packed = self._packed()[1].get(packing.TEXTS)
            if None not in (loose, packed) and loose != packed:
                raise FrankenError(
                    f"{self.texts_path} is not what {self.archive.name} has of that name; move one of them"
                    " away"
                )
            content = packed if loose is None else loose
            data = {"texts": {}} if content is None else parse_json(content, str(self.texts_path))
            shared = data.get("texts") if isinstance(data, dict) else None
            if not isinstance(shared, dict):
                raise FrankenError(f"{self.texts_path} is corrupt (it holds no texts)")
            changed = [key for key, value in shared.items() if tables.key_of(value) != key]
            if changed:
                raise FrankenError(
                    f"{self.texts_path} is corrupt ({changed[0][:40]!r} is not what was written)"
                )
            self._texts = shared
        return self._texts

    def _without_texts(self, place: str, key: str) -> str:
        """What to say where the run's texts have not got the questions of a result that is whole."""
        if self.texts():
            home = self.texts_path if self.texts_path.exists() else f"{packing.TEXTS} in {self.archive}"
            wrong = f"{home} lacks the questions {key!r} of {place}"
        elif self.archive.exists():
            wrong = f"{self.texts_path} is missing, and {self.archive.name} has no file of that name either"
        else:
            wrong = f"{self.texts_path} is missing"
        return f"{wrong}; {BACK}"

    def load(self, name: str) -> dict | None:
        """A finished or failed experiment's result, tables written out, or None if it has not run.

        A packed run's archive is read once for all its experiments. The schema is held against a file once,
        not again while it stays as it is. Raises FrankenError naming the file, or the archive, if it is
        corrupt or breaks the schema, and texts.json where it is missing or lacks the result's questions.
        """
        read = self._read(name)
        if read is None:
            return None
        content, stamp, place, again = read
        texts = self.texts()
        try:
            result = unsealed(content, place)
            if isinstance(result, dict) and result.get("schema_version") != 1 and "measurements" in result:
                result["measurements"] = tables.unpack(result["measurements"], texts)
            if self._checked.get(name) != stamp:
                check(result)
            if result["experiment"]["name"] != name:
                raise FrankenError(f"{place} is corrupt (it holds {result['experiment']['name'][:80]!r})")
        except jsonschema.ValidationError as e:
            reason = f"{e.json_path}: {e.message.splitlines()[0][:120]}"
            raise FrankenError(f"{place} is corrupt ({reason}){again}") from e
        except tables.Lacking as e:  # where the result has a seal, it held
            raise FrankenError(self._without_texts(place, str(e))) from e
        except tables.Corrupt as e:
            raise FrankenError(f"{place} is corrupt ({e}){again}") from e
        except FrankenError as e:
            raise FrankenError(f"{e}{again}") from e
        self._checked[name] = stamp
        return result

    def save(self, result: dict) -> None:
        """Check a result against the schema and write it, its questions first where they are new to the run.

        Raises FrankenError if the run is packed or the disk refuses.
        """
        self.refuse_packed()
        check(result)
        name, texts = result["experiment"]["name"], dict(self.texts())
        packed = result | {"measurements": tables.pack(result["measurements"], texts)}
        if texts.keys() != self.texts().keys():
            write_json(self.texts_path, {"schema_version": SCHEMA_VERSION, "texts": texts})
            self._texts = texts
        write_text(self.file(name), sealed(packed))
        self._checked[name] = _stamp(self.file(name))


def check(result: Any) -> None:
    """Raises jsonschema.ValidationError for what is no result by schema/experiment.json."""
    try:
        if QUICK.is_valid(result):
            return
    except (ValueError, TypeError, OverflowError):
        pass  # a lone surrogate, for instance, which JSON may hold and Rust's strings may not
    VALIDATOR.validate(result)


SEAL, UNSEALED = '"sha256": "', "0" * 64


def sealed(packed: dict) -> str:
    """The text of a result's file: with a hash of that text, by which damage is noticed."""
    text = tables.layout(packed | {"sha256": UNSEALED}) + "\n"
    before, _, after = text.rpartition(SEAL + UNSEALED)
    return before + SEAL + _sha256(text) + after


def unsealed(content: bytes, place: str) -> Any:
    """A result as it was before it was sealed; results of before there was a seal as they stand.

    Raises FrankenError naming the place if it is no JSON or not what was written.
    """
    before, seal, after = content.rpartition(SEAL.encode())
    if seal and after[:64] == _sha256(before + seal + UNSEALED.encode() + after[64:]).encode():
        try:
            return _without_seal(orjson.loads(content))  # in a sixth of the time
        except orjson.JSONDecodeError:
            # a lone surrogate, which Python's own JSON reads, or what neither does
            return _without_seal(parse_json(content, place))
    written = parse_json(content, place)
    if not isinstance(written, dict) or "sha256" not in written:
        return written
    rest = _without_seal(written)
    # older seals are of the data, however they are laid out
    if written["sha256"] != _sha256(json.dumps(rest, sort_keys=True)):
        raise FrankenError(f"{place} is corrupt (it is not what was written)")
    return rest


def _without_seal(written: dict) -> dict:
    return {key: value for key, value in written.items() if key != "sha256"}


def _sha256(text: str | bytes) -> str:
    data = text.encode(errors="backslashreplace") if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()


def is_alive(pid: int) -> bool:
    """Whether there is a process of that id."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _new_folder(path: Path) -> Path:
    """Make the folder, or that name with _1, _2, ... where it is taken: several runs begin in a second.

    Raises FrankenError if the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free, taken = path, 0
        while not _made(free):
            taken += 1
            free = path.with_name(f"{path.name}_{taken}")
        (free / "experiments").mkdir()
    except OSError as e:
        raise FrankenError(f"cannot write results to {path.parent}: {e.strerror}") from e
    return free


def _made(folder: Path) -> bool:
    """Make a folder; False where something of that name is there already."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _stamp(file: Path) -> tuple:
    """Equal for a file that nobody has written since."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
