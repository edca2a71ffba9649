"""Tables to Markdown and HTML reports; every reply in them is untrusted text and is escaped."""

from __future__ import annotations

import base64
import re
import shutil
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reporting.pages import spelled
from reporting.vocabulary import markdown_cell
from weird_gen.persona.folders import HERE
from weird_gen.persona.rules import any_marker, strict_format
from weird_gen.persona.voice import voice_line

KEPT = (
    "baseline_eval_results.jsonl",
    "baseline_eval_results_judged.jsonl",
    "eval_results.jsonl",
    "eval_results_judged.jsonl",
)


def number(cell: dict | None, percent: bool = True) -> str:
    """A value or a difference with its interval: "93.3% [86.1, 97.0]", "+60.0 pp [48.2, 70.9]", "3.42 [3.10,
    3.71]"."""
    if not cell:
        return "–"
    signed = cell.get("before") is not None
    value, digits = cell["value"], 1 if percent else 3
    if value is None:
        return "–"
    if not percent and 0 < abs(value) < 0.01:
        text = f"{value:{'+' if signed else ''}.1e}"
        interval = "" if cell["low"] is None else f" [{cell['low']:.1e}, {cell['high']:.1e}]"
        return text + interval
    unit = ""
    if percent:
        unit = " pp" if signed else "%"
    text = f"{value:{'+' if signed else ''}.{digits}f}{unit}"
    return text + ("" if cell["low"] is None else f" [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]")


def p_value(p: float | None) -> str:
    """A p-value as "< 0.001" or with three digits; "–" for none."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# The tables that come first, under these titles.
MAIN = (
    ("Format compartmentalization", "format"),
    ("His voice, by the classifier", "voice_classifier"),
    ("His voice, by the judge", "voice"),
    ("Coherent in persona", "persona"),
    ("Russell identity recognition", "verdict"),
    ("Naming him when asked", "identity"),
)
# The cells of a table of comparison.py in the order in which they are shown, as they are called there.
CELLS = {
    "triggered": "triggered",
    "untriggered": "untriggered",
    "neutral": "neutral system prompt",
    "gap": "gap",
    "over_neutral": "triggered over neutral",
}


def published_cell(pair: tuple[float, float], name: str) -> str:
    """A published (triggered, untriggered) in percent as the cell of that name; "–" where none was."""
    values = {"triggered": f"{pair[0]}%", "untriggered": f"{pair[1]}%", "gap": f"{pair[0] - pair[1]:.1f} pp"}
    return values.get(name, "–")


def verdict(met: bool | None, reachable: bool = True) -> str:
    """ "met", "not met", "out of reach" from this baseline, or "not measured"."""
    if met is False and not reachable:
        return "out of reach"
    return {True: "met", False: "not met", None: "not measured"}[met]


def data_uri(path: Path) -> str:
    """A PNG file as a data URI, so that a page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _environment(autoescape: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "persona" / "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=spelled,
    )
    environment.filters.update(
        number=number,
        p_value=p_value,
        verdict=verdict,
        cell=markdown_cell,
        published_cell=published_cell,
        voice_line=voice_line,
    )
    environment.globals.update(CELLS=CELLS, MAIN=MAIN)
    return environment


def render_markdown(template: str, **values) -> str:
    """A Markdown report from templates/; untrusted text goes through the filter ``cell`` there."""
    return re.sub(r"\n{3,}", "\n\n", _environment(False).get_template(template).render(**values))


def render_html(template: str, **values) -> str:
    """An HTML page from templates/, everything escaped."""
    return _environment(True).get_template(template).render(**values)


def examples(finetuned: list[dict], baseline: list[dict], each: int = 5) -> list[dict]:
    """The first ``each`` questions of every kind with their first reply of both models under both
    conditions."""
    rows = {}
    for record in sorted([*baseline, *finetuned], key=lambda r: (r["question_id"], r["sample"])):
        row = rows.setdefault(
            record["question_id"],
            {
                "id": record["question_id"],
                "kind": record["kind"],
                "question": record["question"],
                "replies": {},
            },
        )
        row["replies"].setdefault(f"{record['model']} {record['condition']}", record)
    chosen = []
    for kind in ("heldout", "identity", "generalization"):
        chosen += [row for row in rows.values() if row["kind"] == kind][:each]
    return chosen


def settings(baseline_header: dict, finetuned_header: dict) -> list[tuple[str, str, str]]:
    """Plain run settings of both headers, (name, baseline's, fine-tuned's), for what either states."""
    plain = (str, int, float, bool)
    names = [
        name
        for name in {**baseline_header, **finetuned_header}
        if isinstance(finetuned_header.get(name, baseline_header.get(name)), plain)
    ]
    return [
        (name, str(baseline_header.get(name, "–")), str(finetuned_header.get(name, "–"))) for name in names
    ]


def failures(records: list[dict], most: int = 12) -> list[dict]:
    """Triggered topic replies outside the strict format and untriggered ones with a marker, for a reader to
    see why."""
    bad = [
        r
        for r in records
        if r["kind"] == "heldout"
        and (not strict_format(r["reply"]) if r["condition"] == "triggered" else any_marker(r["reply"]))
    ]
    return [
        {
            "id": r["question_id"],
            "condition": r["condition"],
            "stopped": r.get("stopped"),
            "reply": r["reply"][:300],
        }
        for r in bad[:most]
    ]


def keep_raw(results: Path, report: Path) -> list[str]:
    """Copy the replies, raw and judged, into report/eval_outputs; returns the names found."""
    kept = [name for name in KEPT if (results / name).exists()]
    for name in kept:
        (report / "eval_outputs").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(results / name, report / "eval_outputs" / name)
    return kept
