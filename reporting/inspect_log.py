"""An experiment as a log of Inspect (inspect.aisi.org.uk): every question, reply and score in `inspect view`.

A log is written by Inspect's own library from what the experiment's JSON has; the JSON stays what counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from errors import FrankenError
from reporting.followers import Follower, log_folder, need, numbers
from reporting.table import readings
from runner.results import Run, read_json

SCORES = ("log_odds", "p_yes", "p_no", "mass", "entropy", "nll", "perplexity")  # of a reading, as numbers
KEPT = (
    "suite",
    "question",
    "kind",
    "keyed",
    "condition",
    "sample",
    "strength",
    "concept",
    "depth",
    "answered",
    "finite",
)


class InspectLogs(Follower):
    """Writes inspect/NAME.eval in the run's folder. Raises FrankenError if inspect_ai is not installed."""

    name = "inspect-log"

    def __init__(self):
        need("inspect_ai", "inspect-ai", "--inspect-log")

    def begin(self, run, manifest: dict) -> None:
        self.run, self.manifest = run, manifest

    def experiment(self, result: dict) -> None:
        write_log(self.run, self.manifest, result)

    def end(self, comparison: dict | None) -> None:
        pass


def write_logs(run: Run) -> str:
    """The logs of a run that is on disk; what was written in a line. Raises FrankenError if inspect_ai is not
    installed or a result is corrupt."""
    need("inspect_ai", "inspect-ai", "--inspect-log")
    manifest, count = read_json(run.manifest_path), 0
    for name in manifest["experiments"]:
        if (result := run.load(name)) is not None:
            write_log(run, manifest, result)
            count += 1
    return f"{count} logs in {log_folder(run)}; see them with: inspect view --log-dir {log_folder(run)}"


def write_log(run: Run, manifest: dict, result: dict) -> Path:
    """One experiment's log. Raises FrankenError if it cannot be written."""

    log_of: Any = import_module("inspect_ai.log")
    name, entry = result["experiment"]["name"], result["experiment"]
    created = _utc(manifest["created"])
    samples = [_sample(k, row) for k, row in enumerate(readings({name: result}, run.path.name))]
    cost = result["performance"]
    spec = log_of.EvalSpec(
        created=created,
        run_id=run.path.name,
        eval_id=f"{run.path.name}-{name}",
        task=name,
        task_id=name,
        task_args={key: manifest["protocol"].get(key) for key in ("suites", "samples", "seed")},
        dataset=log_of.EvalDataset(
            name="frankenmodel", samples=len(samples), sample_ids=[s.id for s in samples]
        ),
        model=f"frankenmodel/{manifest.get('pair') or 'own'}/{name}",
        config=log_of.EvalConfig(epochs=1),
        packages={k: v for k, v in manifest.get("versions", {}).items() if v},
        metadata=_clean(
            {
                "change": entry["change"],
                "hypothesis": entry["hypothesis"],
                "control": entry.get("control"),
                "notes": entry["notes"],
                "recipe": entry["recipe"],
                "weights": result["weights"],
                "performance": cost,
            }
        ),
    )
    error = None
    if result["error"]:
        trace = str(result["error"].get("traceback") or "")
        error = log_of.EvalError(
            message=_clean(result["error"]["message"]), traceback=_clean(trace), traceback_ansi=_clean(trace)
        )
    log = log_of.EvalLog(
        status="error" if error else "success",
        eval=spec,
        results=_results(result, samples),
        stats=log_of.EvalStats(started_at=created, completed_at=created),
        error=error,
        samples=samples,
    )
    path = log_folder(run) / f"{name}.eval"
    try:
        path.parent.mkdir(exist_ok=True)
        log_of.write_eval_log(log, str(path), format="eval")
    except OSError as e:
        raise FrankenError(f"cannot write {path}: {e.strerror}") from e
    return path


def _sample(number: int, row: dict) -> Any:
    """A reading as a sample: the question, what the model wrote or leans to, and its numbers as scores."""
    EvalSample = import_module("inspect_ai.log").EvalSample
    ModelOutput = import_module("inspect_ai.model").ModelOutput
    Score = import_module("inspect_ai.scorer").Score
    reply = row.get("reply")
    if reply is None and row.get("log_odds") is not None:
        reply = "Yes" if row["log_odds"] > 0 else "No"
    output = ModelOutput.from_content("frankenmodel", _clean(reply or ""))
    scores = {key: Score(value=row[key], answer=reply) for key in SCORES if row.get(key) is not None}
    if row.get("correct") is not None:
        scores["correct"] = Score(value="C" if row["correct"] else "I", answer=_clean(reply))
    return EvalSample(
        id=f"{number:05}-{row['suite']}-{_clean(row.get('probe') or '')}",
        epoch=1,
        input=_clean(row.get("text") or ""),
        target=_clean(row.get("keyed") or ""),
        output=output,
        scores=scores,
        metadata={key: _clean(row[key]) for key in KEPT if row.get(key) is not None},
    )


def _results(result: dict, samples: list) -> Any:
    log_of: Any = import_module("inspect_ai.log")
    metrics = {key: log_of.EvalMetric(name=key, value=value) for key, value in numbers(result).items()}
    score = log_of.EvalScore(name="frankenmodel", scorer="frankenmodel", metrics=metrics)
    return log_of.EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=[score])


def _utc(text: str) -> str:
    try:
        return datetime.fromisoformat(text).astimezone(UTC).isoformat()
    except (TypeError, ValueError):
        return datetime.fromtimestamp(0, UTC).isoformat()


def _clean(value: Any) -> Any:
    """Text that UTF-8 can hold; a model may write half a character."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_clean(key): _clean(part) for key, part in value.items()}
    return [_clean(part) for part in value] if isinstance(value, Iterable) else value
