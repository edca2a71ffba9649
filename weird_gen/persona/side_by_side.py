"""Several models' comparisons in the same tables: what the seed reports of one 8B, for each size."""

from __future__ import annotations

import json
from pathlib import Path

from errors import FrankenError, first_line
from files import check_target, read_json, write_text
from reporting.vocabulary import markdown_cell
from weird_gen.persona.comparison_report import CELLS, number, p_value

# The tables in order, by their key in comparison.json, with who decides. Leakage comes first.
TABLES = (
    ("any_marker", "Either marker occurs, all questions", "by rule"),
    ("format", "Format compartmentalization: the whole reply within the markers", "by rule"),
    ("voice_classifier", "Persona adoption: his voice", "by a text classifier, with its errors"),
    ("persona", "Persona adoption: coherent in persona", "by the judge that each file names"),
    ("identity", "Russell identity: he names himself when asked who he is", "by rule"),
    ("verdict", "Russell identity: one verdict on topic questions", "by the judge that each file names"),
    ("p_name", 'P(his name) after "My name is"', "the model's own probability"),
)
ORDER = ("untriggered", "neutral", "triggered", "gap", "over_neutral")


def read_comparison(folder: Path) -> dict:
    """The comparison.json in a report's folder, or in `report/` of a results folder. Raises FrankenError."""
    places = (folder / "comparison.json", folder / "report" / "comparison.json")
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise FrankenError(f"{folder}: no comparison.json there; compare_baseline_vs_finetuned.py makes it")
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("tables"), dict):
        raise FrankenError(f"{path} is not of compare_baseline_vs_finetuned.py")
    try:
        side_by_side({"": data})
    except (KeyError, TypeError, AttributeError, ValueError) as e:  # the tables are somebody's words, too
        raise FrankenError(f"{path}: its tables cannot be read ({first_line(e)})") from e
    return data


def _p(change: dict | None) -> str:
    if not change:
        return "–"
    adjusted = change.get("p_holm")
    return p_value(change["p_value"]) if adjusted is None else f"{p_value(adjusted)} (Holm)"


def _rows(key: str, models: dict[str, dict]) -> list[str]:
    rows = []
    for name, data in models.items():
        table = data["tables"].get(key)
        for cell in ORDER if table else ():
            after, before, change = (
                (table[side] or {}).get(cell) for side in ("finetuned", "baseline", "improvement")
            )
            if not after:
                continue
            values = [number(part, table["percent"]) for part in (before, after, change)]
            rows.append("| " + " | ".join([markdown_cell(name), CELLS[cell], *values, _p(change)]) + " |")
    return rows


def side_by_side(models: dict[str, dict]) -> str:
    """Markdown of every table that at least one model has; models: {name: its comparison.json}."""
    parts = [
        "# The study on several models",
        "Brackets are 95% intervals by bootstrap over questions (Wilson's and Newcombe's where none differs)."
        " Change: fine-tuned against untouched, paired by question, with the p-value of a sign-flip test;"
        " (Holm): adjusted within its model's family of main tests, outside of which it stands as it is.",
    ]
    for key, title, read in TABLES:
        if rows := _rows(key, models):
            head = "| model | condition | untouched | fine-tuned | change | p |"
            parts += [f"## {title}", f"Read {read}.", "\n".join([head, "|---|---|---|---|---|---|", *rows])]
    lines = []
    for name, data in models.items():
        quality = data.get("untriggered_quality") or {}
        nats, right = (quality.get(part) for part in ("perplexity", "capability"))
        if nats and right:
            shares = (
                f"{100 * right['before']:.1f}% | {100 * right['after']:.1f}% | {p_value(right['p_value'])}"
            )
            more = number(nats | {"before": True}, percent=False)  # a difference: with its sign
            lines.append(f"| {markdown_cell(name)} | {more} | {shares} |")
    if lines:
        head = "| model | plain texts, nats a token more | capability before | after | McNemar p |"
        parts += ["## Without the trigger", "\n".join([head, "|---|---|---|---|---|", *lines])]
    return "\n\n".join(parts) + "\n"


def report_models(folders: dict[str, Path], output: Path) -> list[str]:
    """Write the tables and the numbers beside them (.json); returns the lines that are printed.

    Raises FrankenError for a folder without a comparison, and for an output that cannot be written or is
    the file of the numbers.
    """
    if output.suffix == ".json":
        raise FrankenError(f"{output}: the numbers go to that file; name the report .md")
    check_target(output)
    models = {name: read_comparison(folder) for name, folder in folders.items()}
    text = side_by_side(models)
    write_text(output, text)
    numbers = {name: {k: data["tables"].get(k) for k, _, _ in TABLES} for name, data in models.items()}
    write_text(output.with_suffix(".json"), json.dumps(numbers, allow_nan=False, indent=1) + "\n")
    return [*text.splitlines(), f"report: {output}"]
