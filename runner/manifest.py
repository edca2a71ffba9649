"""What a run's manifest says of the run: the protocol, the machine, the versions, the commit.

Apart from `runner/results.py`, so that what only reads results imports neither torch nor the suites.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import prompts
from evaluate import SUITES
from files import ROOT
from runner.results import SCHEMA_VERSION
from suites.base import Protocol

PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy", "scipy", "tokenizers")


def new_manifest(**settings) -> dict:
    """A manifest with what is known of this program and this moment; `settings` are the run's own."""
    return {
        "schema_version": SCHEMA_VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "versions": versions(),
        **settings,
    }


def protocol_json(protocol: Protocol) -> dict:
    """The protocol for the manifest; texts by name, length and hash instead of in full."""
    data = asdict(protocol)
    data["texts"] = [
        {"id": name, "characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in protocol.texts
    ]
    data |= {"suites": list(protocol.suites), "prompts_sha256": prompts.fingerprint()}
    if protocol.harness is None:
        del data["harness"]
    else:
        data["harness"] |= {"tasks": list(protocol.harness.tasks)}
    prints = {f"{name}_sha256": SUITES[name]().fingerprint() for name in protocol.suites}
    data |= {key: value for key, value in prints.items() if value}
    return data


def hardware() -> dict:
    """What the run happened on: processor, memory, GPUs, threads."""
    import psutil

    gpus = []
    if torch.cuda.is_available():
        for k in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(k)
            gpus.append({"name": gpu.name, "memory_bytes": gpu.total_memory})
    return {
        "machine": platform.machine(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "system": platform.platform(),
    }


def processor() -> str:
    """The processor's name, as the kernel has it, or what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict:
    installed = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


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
