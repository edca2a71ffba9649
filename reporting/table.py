"""A run as two tidy tables, one row a reading and one row an experiment: CSV, or Parquet by pyarrow.

A reading is one answer of one model to one question: a next-token distribution between Yes and No, a
generated reply, or a text's perplexity. READING has the columns, docs/results-format.md says what they are.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from analysis.compare import compare
from analysis.comparison import to_json
from errors import FrankenError, many, printable
from experiments import BASELINE
from files import check_target, write_bytes, write_text
from reporting.followers import need
from reporting.reports import load_results
from runner.results import Run, read_json

# Columns of the readings: (type, what it says). A reading has those that its suite measures.
READING: dict[str, tuple[type, str]] = {
    "run": (str, "the run's folder"),
    "experiment": (str, "the modified model that was asked"),
    "group": (str, "the experiment's group"),
    "control": (str, "which control it is: placebo, matched noise, injection; empty: none"),
    "suite": (str, "who asked: binary, formats, informed, capability, ..."),
    "question": (str, "the question; several probes may ask one"),
    "probe": (str, "the wording that was asked, by its id in the suite"),
    "text": (str, "what the model read, before the chat template"),
    "kind": (str, "introspective, or which kind of control"),
    "keyed": (str, "the answer that a model which notices its change would give: Yes or No"),
    "condition": (str, "framing, format, mode, trigger or occasion, where a suite has several"),
    "strength": (float, "of an injected concept"),
    "concept": (str, "the concept that was injected"),
    "depth": (float, "where in depth it was injected, from 0 to 1"),
    "sample": (int, "which of several replies, from 0"),
    "log_odds": (float, "log P(Yes) - log P(No), nats"),
    "p_yes": (float, "probability of Yes, over the whole vocabulary"),
    "p_no": (float, "probability of No"),
    "mass": (float, "P(Yes) + P(No); under 0.01 the model does not answer"),
    "entropy": (float, "of the next-token distribution, nats"),
    "answered": (bool, "whether the mass is enough for an answer"),
    "correct": (bool, "whether a question with a right answer was answered right"),
    "nll": (float, "mean negative log-likelihood of a text, nats a token"),
    "perplexity": (float, "exp(nll)"),
    "reply": (str, "what the model wrote; untrusted text"),
    "tokens": (int, "of the reply, or of the text"),
    "stopped": (bool, "whether the reply ended by itself"),
    "finite": (bool, "whether all numbers were finite; empty: they were"),
}
_YES_NO = ("kind", "keyed", "log_odds", "p_yes", "p_no", "mass", "entropy", "answered", "finite")


def _yes_no(probe: dict, **more) -> dict:
    row = {key: probe[key] for key in _YES_NO if key in probe}
    return row | {"question": probe.get("question"), "probe": probe["id"], "text": probe.get("text")} | more


def _reply(reply: dict, **more) -> dict:
    return {
        "reply": reply["text"],
        **{k: reply[k] for k in ("tokens", "stopped", "finite") if k in reply},
    } | more


def _probes(data: dict) -> Iterator[dict]:
    for probe in data["probes"]:
        yield _yes_no(probe, condition=probe.get("framing") or probe.get("format"))


def _free(data: dict) -> Iterator[dict]:
    for probe in data["probes"]:
        for k, sample in enumerate(probe["samples"]):
            yield _reply(sample, probe=probe["id"], question=probe["id"], text=probe["prompt"], sample=k)


def _capability(data: dict) -> Iterator[dict]:
    for item in data["items"]:
        yield _reply(
            item["reply"],
            probe=item["id"],
            question=item["id"],
            text=item["prompt"],
            condition=item["category"],
            correct=item["correct"],
        )


def _perplexity(data: dict) -> Iterator[dict]:
    for text in data["texts"]:
        yield {"probe": text["id"], "question": text["id"]} | {
            k: text[k] for k in ("tokens", "nll", "perplexity")
        }


def _chat(data: dict) -> Iterator[dict]:
    for probe in data["probes"]:
        names = {"probe": probe["id"], "question": probe["id"], "text": probe["prompt"]}
        yield _reply(probe["reply"], **names, condition=probe["mode"])


def _trigger(data: dict) -> Iterator[dict]:
    for condition in ("triggered", "untriggered"):
        for probe in data["binary"][condition]:
            yield _yes_no(probe, condition=condition)
        for row in _free(data["free"][condition]):
            yield row | {"condition": condition}
        for question in data["behavior"]["questions"]:
            for k, reply in enumerate(question["replies"][condition]):
                names = {"probe": question["id"], "question": question["id"], "text": question["prompt"]}
                yield _reply(reply, **names, condition=condition, kind=question["kind"], sample=k)


def _injection(data: dict) -> Iterator[dict]:
    for cell in data["cells"]:
        where = {"condition": cell["framing"], "strength": cell["strength"], "concept": cell["concept"]}
        for probe in cell["probes"]:
            yield _yes_no(probe, **where)


def _injection_layers(data: dict) -> Iterator[dict]:
    for cell in data["cells"]:
        where = {
            "condition": f"{cell['framing']}, {cell['kind']}",
            "strength": cell["strength"],
            "concept": cell["name"],
            "depth": cell["depth"],
        }
        for k, probe in enumerate(data["probes"]):
            read = {key: cell[key][k] for key in ("log_odds", "mass", "entropy", "answered")}
            yield _yes_no(probe | read, **where)


def _phases(data: dict) -> Iterator[dict]:
    for cell in data["cells"]:
        who = f"{cell['occasion']}: {cell['begins']} begins, {cell['answers']} answers"
        for k, question in enumerate(data["questions"]):
            names = {key: question[key] for key in ("id", "kind", "keyed")}
            read = {"log_odds": cell["log_odds"][k], "mass": cell["mass"][k]}
            yield _yes_no(names | read | {"question": question["topic"]}, condition=who, concept=None)
    for reply in data["replies"]:
        who = f"{reply['begins']} begins, {reply['continues']} continues"
        yield _reply(reply, probe=reply["conversation"], condition=who, sample=reply["sample"])


def _generation(data: dict) -> Iterator[dict]:
    for cell in data["cells"]:
        for k, reply in enumerate(cell["replies"]):
            yield {
                "probe": cell["question"],
                "question": cell["question"],
                "kind": cell["kind"],
                "condition": cell["span"],
                "strength": cell["strength"],
                "depth": cell["depth"],
                "sample": k,
                "reply": reply["text"],
                "finite": reply.get("finite"),
            }


# By suite. Activations and localisation have arrays, and no reading of one question.
READERS: dict[str, Callable[[dict], Iterator[dict]]] = {
    "binary": _probes,
    "formats": _probes,
    "informed": _free,
    "blind": _free,
    "capability": _capability,
    "perplexity": _perplexity,
    "chat": _chat,
    "trigger": _trigger,
    "injection": _injection,
    "injection_layers": _injection_layers,
    "injection_generation": _generation,
    "phases": _phases,
}


def readings(results: dict[str, dict], run: str) -> Iterator[dict]:
    """One row a reading, of all suites, in the order of the run."""
    for name, result in results.items():
        of = {"run": run, "experiment": name} | {k: result["experiment"].get(k) for k in ("group", "control")}
        for suite, data in result["measurements"].items():
            if suite in READERS:
                for row in READERS[suite](data):
                    yield of | {"suite": suite} | row


def experiments(results: dict[str, dict], manifest: dict, run: str) -> Iterator[dict]:
    """One row an experiment: what comparison.json has of it, nested names joined by a dot, then its cost."""
    rows = to_json(compare(results, manifest, run, BASELINE))["experiments"]
    for row in rows:
        cost = results[row["name"]]["performance"]
        costs = {f"performance.{k}": v for k, v in cost.items() if isinstance(v, int | float | None)}
        lm_eval = results[row["name"]]["measurements"].get("lm_eval", {})
        scores = {
            f"lm_eval.{task}.{metric}": value
            for task, metrics in lm_eval.get("results", {}).items()
            for metric, value in metrics.items()
        }
        yield {"run": run, **dict(_flat(row)), **scores, **costs}


def _flat(value: dict, stem: str = "") -> Iterator[tuple[str, Any]]:
    for key, part in value.items():
        if isinstance(part, dict):
            yield from _flat(part, f"{stem}{key}.")
        elif isinstance(part, list):
            yield f"{stem}{key}", json.dumps(part, ensure_ascii=False)
        else:
            yield f"{stem}{key}", part


# ---- writing -----------------------------------------------------------------------------------------------


def check_table(path: Path) -> None:
    """Raises FrankenError for a file that cannot become a table or be written, before anything is read."""
    if path.suffix not in (".parquet", ".csv"):
        raise FrankenError(f"--table {path}: expected a name that ends in .parquet or .csv")
    if path.suffix == ".parquet":
        need("pyarrow", "pyarrow", "a table in Parquet (.csv needs nothing)")
    check_target(path)


def write_tables(runs: list[Run], path: Path) -> str:
    """Both tables of one or several runs: the readings as `path`, the experiments beside them with
    ".experiments" in the name. Returns what was written in a line.

    Raises FrankenError if a result is corrupt or the disk refuses.
    """
    check_table(path)
    tidy, rows = [], []
    for run in runs:
        manifest = read_json(run.manifest_path)
        results = load_results(run, manifest)
        tidy += readings(results, run.path.name)
        rows += experiments(results, manifest, run.path.name)
    kinds: dict[str, type] = {}
    for row in rows:
        for key, value in row.items():
            known = kinds.get(key)
            if value is not None and (known is None or (known is int and isinstance(value, float))):
                kinds[key] = type(value)
    columns = dict.fromkeys(key for row in rows for key in row)
    kinds = {key: kinds.get(key, str) for key in columns}  # what is undefined everywhere is empty text
    beside = path.with_name(f"{path.stem}.experiments{path.suffix}")
    _write(tidy, {key: kind for key, (kind, _) in READING.items()}, path)
    _write(rows, kinds, beside)
    return f"{len(tidy):,} readings in {path}, {many(len(rows), 'experiment')} in {beside}"


def _write(rows: list[dict], kinds: dict[str, type], path: Path) -> None:
    if path.suffix == ".csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(kinds)
        writer.writerows([_cell(row.get(key)) for key in kinds] for row in rows)
        return write_text(path, out.getvalue())
    pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(key, types[kind]) for key, kind in kinds.items()])
    columns = [pyarrow.array(_column(rows, key, kind), schema.field(key).type) for key, kind in kinds.items()]
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns, schema=schema), sink)
    return write_bytes(path, sink.getvalue().to_pybytes())


def _column(rows: Iterable[dict], key: str, kind: type) -> list:
    # text may hold lone surrogates, which Parquet has not
    turn = (lambda v: str(v).encode("utf-8", "backslashreplace").decode()) if kind is str else kind
    return [None if (value := row.get(key)) is None else turn(value) for row in rows]


def _cell(value: Any) -> Any:
    """A CSV cell. A spreadsheet takes text that begins so for a formula: such text has an apostrophe before
    it."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") and len(text) > 1 else text
