"""Who is told of every experiment as soon as it is on disk: a tracker, a hub, a folder of Inspect logs.

None of them may cost a run anything: what one of them raises is said in a line, and the run goes on. Packages
are imported when one is asked for, and a missing one is told before anything is loaded.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from errors import FrankenError, first_line, printable
from runner.addresses import checked_address, without_secrets

TRACKERS = ("trackio", "wandb", "tensorboard")


def need(module: str, package: str, option: str) -> None:
    """Raises FrankenError naming what to install if a module is not there; it is not imported."""
    try:
        there = importlib.util.find_spec(module) is not None
    except ValueError:  # sys.modules says that it is not there
        there = False
    if not there:
        raise FrankenError(f"{option} needs {package}: pip install {package}")


class Follower(ABC):
    """Told of a run's experiments one by one. `name` stands in what is said of it."""

    name: str

    @abstractmethod
    def begin(self, run, manifest: dict) -> None:
        """The run's folder is there."""

    @abstractmethod
    def experiment(self, result: dict) -> None:
        """An experiment has been written; `result` as in its JSON, tables written out."""

    @abstractmethod
    def end(self, comparison: dict | None) -> None:
        """The run is over; comparison.json where there is one."""


class Followers:
    """All followers of a run. Raises FrankenError for one that cannot follow, when it is made."""

    def __init__(self, followers: list[Follower], say: Callable[[str], object] | None = None):
        self.followers = followers
        self.say = say or (lambda line: print(line, file=sys.stderr))
        self.failed: dict[str, str] = {}  # by name, of the last time that it was told something

    def tell(self, what: Callable[[Follower], None]) -> None:
        for follower in self.followers:
            try:
                what(follower)
                self.failed.pop(follower.name, None)
            except Exception as e:  # other people's code and a network: anything
                self.failed[follower.name] = reason = safe(first_line(e))
                self.say(printable(f"{follower.name}: {reason}; the run goes on"))


def safe(text: str) -> str:
    """What a library says of a failure, without any token in it, and no more of it than a line takes."""
    return without_secrets(text)[:300]


# ---- numbers -----------------------------------------------------------------------------------------------


def numbers(result: dict) -> dict[str, float]:
    """What of an experiment is worth a curve; what is undefined is left out."""
    measured, cost = result["measurements"], result["performance"]
    found: dict[str, Any] = {
        "perplexity": measured.get("perplexity", {}).get("perplexity"),
        "capability": measured.get("capability", {}).get("score"),
        "seconds": cost["seconds"],
        "decode_tokens_per_second": cost.get("decode_tokens_per_second"),
        "peak_memory_bytes": cost.get("peak_memory_bytes"),
    }
    own = [p for p in measured.get("binary", {}).get("probes", ()) if p["kind"] == "introspective"]
    for key in ("log_odds", "mass", "p_yes"):
        values = [p[key] for p in own if p.get(key) is not None]
        found[f"introspective_{key}"] = sum(values) / len(values) if values else None
    for task, metrics in measured.get("lm_eval", {}).get("results", {}).items():
        found |= {f"lm_eval/{task}/{metric}": value for metric, value in metrics.items()}
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


def verdicts(comparison: dict | None) -> list[dict]:
    """(experiment, verdict, detection score, p after Holm) of a finished run, for a table."""
    rows = []
    for row in (comparison or {}).get("experiments", ()):
        detection = row.get("detection") or {}
        verdict = row.get("verdict") or {}
        rows.append(
            {
                "experiment": row["name"],
                "verdict": verdict.get("word"),
                "detection": detection.get("score"),
                "p_adjusted": detection.get("p_adjusted"),
            }
        )
    return rows


class Tracker(Follower):
    """trackio, wandb or tensorboard: one step an experiment, the verdicts at the end."""

    def __init__(self, kind: str):
        if kind not in TRACKERS:
            raise FrankenError(f"--log {kind}: expected one of {', '.join(TRACKERS)}")
        need(kind, kind, f"--log {kind}")
        self.kind = self.name = kind
        self.step = 0
        self.client: Any = None

    def begin(self, run, manifest: dict) -> None:
        self.run = run
        # a run that goes on counts on
        self.step = sum(run.file(name).exists() for name in manifest["experiments"])
        if self.kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.client = SummaryWriter(str(run.path / "tensorboard"))
            return
        self.client = importlib.import_module(self.kind)
        kept = ("pair", "layers", "dtype", "devices", "original_fingerprint", "settings")
        self.client.init(
            project="frankenmodel",
            name=run.path.name,
            config={key: manifest.get(key) for key in kept},
            **({"embed": False} if self.kind == "trackio" else {"dir": str(run.path)}),
        )

    def experiment(self, result: dict) -> None:
        name, step = result["experiment"]["name"], self.step
        self.step += 1
        if self.kind != "tensorboard":
            return self.client.log({"experiment": name, "status": result["status"], **numbers(result)})
        for key, value in numbers(result).items():
            self.client.add_scalar(key, value, step)
        self.client.add_text("experiment", f"{step}: {printable(name)} ({result['status']})", step)
        return self.client.flush()

    def end(self, comparison: dict | None) -> None:
        for row in verdicts(comparison):
            known = {f"final/{key}": value for key, value in row.items() if value is not None}
            if self.kind != "tensorboard":
                self.client.log(known)
            else:
                self.client.add_text("verdict", ", ".join(f"{k}: {v}" for k, v in known.items()))
        (self.client.close if self.kind == "tensorboard" else self.client.finish)()


class Hub(Follower):
    """The run's folder in a dataset repository, sent again after every experiment: only what changed travels.

    The repository is made private where it is new. HF_TOKEN and HF_ENDPOINT are huggingface_hub's own.
    Raises FrankenError if the repository can be neither found nor made, and for an HF_ENDPOINT to which the
    token would go in clear text.
    """

    name = "push"

    def __init__(self, repository: str):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
            raise FrankenError(f"--push {repository}: expected a repository of the form USER/NAME")
        from huggingface_hub import HfApi, get_token

        if not get_token():
            raise FrankenError("--push needs a token that may write: set HF_TOKEN")
        self.repository = repository
        if endpoint := os.environ.get("HF_ENDPOINT"):
            checked_address(endpoint, get_token(), "HF_ENDPOINT")
        self.api = HfApi(endpoint=endpoint or None)
        try:
            self.api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
        except Exception as e:
            raise FrankenError(f"--push {repository}: {safe(first_line(e))}") from None

    def begin(self, run, manifest: dict) -> None:
        self.path = run.path
        self._send("the manifest")

    def experiment(self, result: dict) -> None:
        self._send(result["experiment"]["name"])

    def end(self, comparison: dict | None) -> None:
        self._send("the report")

    def _send(self, what: str) -> None:
        self.api.upload_folder(
            repo_id=self.repository,
            repo_type="dataset",
            folder_path=str(self.path),
            path_in_repo=self.path.name,
            commit_message=f"{self.path.name}: {what}",
            ignore_patterns=[".*", "*/.*", "wandb/*"],
        )


def log_folder(run) -> Path:
    """Where a run's Inspect logs are."""
    return run.path / "inspect"
