"""A run on disk: its manifest and one JSON per experiment, each written whole or not at all.

    results/run_<time>/manifest.json            what was run, on what, with which seeds
    results/run_<time>/experiments/<name>.json  one experiment; `schema/experiment.json` documents and checks
    it

Everything that depends on the clock or the machine is under "performance" (and in the manifest), so that two
runs of the same thing differ nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jsonschema
import torch

import prompts
from errors import FrankenError
from evaluate import SUITES
from files import write_text
from suites.base import Protocol
from surgery.weights import ROOT

SCHEMA_VERSION = 1
SCHEMA = json.loads((ROOT / "schema" / "experiment.json").read_text())
# made once: checking the schema itself takes longer than checking a result
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
# What a resumed run and the report read of a manifest
MANIFEST = {
    "settings": dict,
    "protocol": dict,
    "experiments": list,
    "pair": str | None,
    "notes": list,
    "layers": int,
    "dtype": str,
    "devices": list,
    "original_fingerprint": str,
    "created": str,
}
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy", "scipy", "tokenizers")


def write_json(path: Path, data: dict) -> None:
    """Write a JSON file whole or not at all: a reader, or a resumed run, never sees half of it.

    Raises FrankenError if it cannot be written (full disk, no permission), ValueError for NaN or infinity.
    """
    text = json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def check_writable(folder: str) -> None:
    """Make a folder for results and write to it once. Raises FrankenError if the disk refuses."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as f:
            f.write(b"x" * 65536)
    except OSError as e:
        raise FrankenError(f"cannot write results to {folder}: {e.strerror}") from e


def read_json(path: Path) -> dict:
    """Raises FrankenError naming the file if it is missing or not JSON without NaN."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as e:
        raise FrankenError(f"cannot read {path}: {e.strerror}") from e
    except ValueError as e:
        raise FrankenError(f"{path} is corrupt ({e})") from e


def _refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")


def protocol_json(protocol: Protocol) -> dict:
    """The protocol for the manifest; texts by name, length and hash instead of in full."""
    data = asdict(protocol)
    data["texts"] = [
        {"id": name, "characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in protocol.texts
    ]
    data |= {"suites": list(protocol.suites), "prompts_sha256": prompts.fingerprint()}
    prints = {f"{name}_sha256": SUITES[name]().fingerprint() for name in protocol.suites}
    data |= {key: value for key, value in prints.items() if value}
    return data


def hardware() -> dict:
    """What the run happened on: processor, memory, GPUs, threads."""
    import psutil

    gpus = []
    if torch.cuda.is_available():
        for k in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(k)
            gpus.append({"name": found.name, "memory_bytes": found.total_memory})
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def versions() -> dict:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The checkout's commit, with "+changes" where the working tree differs; None outside a checkout."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if dirty.strip() else "")


AGAIN = "; move it away and resume to run that experiment again"


class Run:
    """One run's directory."""

    def __init__(self, path: Path):
        self.path = path
        self.manifest_path = path / "manifest.json"

    @staticmethod
    def create(output: str, manifest: dict) -> Run:
        """A new run_<time> under `output`. Raises FrankenError if that cannot be written to."""
        stamp = time.strftime("%Y%m%d_%H%M%S")
        for k in range(100):
            path = Path(output) / (f"run_{stamp}" + (f"_{k}" if k else ""))
            try:
                (path / "experiments").mkdir(parents=True)
                break
            except FileExistsError:
                continue
            except OSError as e:
                raise FrankenError(f"cannot write results to {output}: {e.strerror}") from e
        run = Run(path)
        write_json(run.manifest_path, manifest)
        return run

    @staticmethod
    def resume(path: str) -> tuple[Run, dict]:
        """An existing run and its manifest. Raises FrankenError if it is not one of this version, or not
        whole."""
        run = Run(Path(path))
        manifest = read_json(run.manifest_path)
        if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
            raise FrankenError(f"{run.manifest_path} is not a manifest of version {SCHEMA_VERSION}")
        lost = [key for key, kind in MANIFEST.items() if not isinstance(manifest.get(key), kind)]
        if lost:
            raise FrankenError(f"{run.manifest_path} is corrupt ({lost[0]} is missing or of another kind)")
        return run, manifest

    def file(self, name: str) -> Path:
        return self.path / "experiments" / f"{name}.json"

    def load(self, name: str) -> dict | None:
        """A finished or failed experiment's result, or None if it has not run.

        Raises FrankenError naming the file if it is corrupt or breaks the schema.
        """
        if not self.file(name).exists():
            return None
        try:
            result = read_json(self.file(name))
            VALIDATOR.validate(result)
            if result["experiment"]["name"] != name:
                raise FrankenError(
                    f"{self.file(name)} is corrupt (it holds {result['experiment']['name'][:80]!r})"
                )
        except jsonschema.ValidationError as e:
            raise FrankenError(
                f"{self.file(name)} is corrupt ({e.json_path}: {e.message.splitlines()[0][:120]}){AGAIN}"
            ) from e
        except FrankenError as e:
            raise FrankenError(f"{e}{AGAIN}") from e
        return result

    def save(self, result: dict) -> None:
        """Check a result against the schema and write it. Raises FrankenError if the disk refuses."""
        VALIDATOR.validate(result)
        write_json(self.file(result["experiment"]["name"]), result)


def new_manifest(**settings) -> dict:
    """A manifest with what is known of this machine and this moment; `settings` are the run's own."""
    return {
        "schema_version": SCHEMA_VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        **settings,
    }
