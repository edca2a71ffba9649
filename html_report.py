"""A run's report.html, which opens from disk and loads nothing, and its figures as PNG and PDF.

What a model wrote is untrusted text: the template escapes everything, characters that hide or reorder text are spelled
out, and the page's own policy forbids scripts and connections.
"""

from __future__ import annotations

import base64
import re
import shlex
from collections import defaultdict
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

import figures
import prompts
import report
from compare import paired_probes
from recipes import Recipe, RecipeError
from results import Run, read_json, write_text
from weights import FrankenError

# The seed project's results page: probability of Yes, capability of 6, perplexity.
PUBLISHED_SOURCE = "the seed project's own results page, 2026-02-04: Qwen2.5-Coder-32B pair, one A100 80GB, P(Yes) normalized over the tokens Yes and No"
PUBLISHED_PAIR = "qwen2.5-coder-32b"
PUBLISHED = {
    "baseline_instruct": (2e-8, 5, 3.51), "franken_instruct_first_32": (0.0757, 4, 3.53), "franken_base_first_32": (3e-7, 5, 3.33),
    "franken_instruct_first_16": (0.0474, 5, 3.63), "franken_instruct_first_48": (3e-5, 5, 3.64),
    "swap_chunk_25_35_with_45_55": (0.2695, 3, 11.96), "swap_chunk_16_32_with_32_48": (4e-6, 5, 3.5), "swap_distant_10_55": (1.6e-6, 5, 4.73),
    "swap_adjacent_30_35": (6e-9, 5, 3.51), "perturb_all_5pct": (2e-8, 5, 3.55), "perturb_late_5pct": (2e-8, 5, 3.56),
}  # fmt: skip
PUBLISHED_WINDOWS = {"window_base_42_46": 1.3e-5, "window_base_38_46": 3.8e-4, "window_base_36_52": 0.014, "window_base_32_64": 0.0694,
                     "window_base_16_48": 0.0028, "window_base_24_56": 0.0197}  # of 64 layers  # fmt: skip
LONGEST_REPLY, LONGEST_TOKEN = 4000, 30  # characters shown; the experiment's JSON has the rest
# Controls, directions and separators of text, zero-width characters, lone surrogates, tags, noncharacters.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb"
                    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e0fff]")  # fmt: skip


def spelled(value):
    """Text with what hides or reorders it spelled out; anything else, and what is markup already, as it is.

    Applied to whatever the template prints.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return HIDDEN.sub(lambda m: chr(0x2400 + ord(m[0])) if m[0] < " " else f"⟨U+{ord(m[0]):04X}⟩", value.replace("\r\n", "\n"))


def visible(text: object, most: int = LONGEST_REPLY) -> str:
    """Text as it may be shown: spelled out, and cut where it is too long, which it says."""
    text = str(text)
    return spelled(text[:most]) + (f"… [{len(text) - most:,} more characters]" if len(text) > most else "")


def token(text: str) -> str:
    """A token with its white space to be seen."""
    shown = text[:LONGEST_TOKEN].replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") + text[LONGEST_TOKEN:]
    return visible(shown, LONGEST_TOKEN) or "(empty)"


def size(count: float | None) -> str:
    """Bytes as people read them."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            break
        count, unit = count / 1000, "TB"
    return f"{count:.3g} {unit}"


def rate(amount: float | None, seconds: float | None, form=lambda x: f"{x:,.0f}") -> str:
    return form(amount / seconds) + "/s" if amount and seconds else "-"


def difference(new: float | None, old: float | None) -> str:
    return "-" if new is None or old is None else f"{new - old:+.2f}"


def slug(verdict: str) -> str:
    return verdict.partition(":")[0].replace(" ", "-")


def is_table(value: object) -> bool:
    """Whether a dictionary of dictionaries reads best as one table: plain values under shared keys."""
    rows = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return bool(rows) and all(isinstance(r, dict) and r.keys() == rows[0].keys() and not any(isinstance(v, dict | list) for v in r.values()) for r in rows)


def by_id(suite: dict | None, key: str) -> dict[str, dict]:
    """A suite's probes, items or texts by their id; empty where the suite was not measured."""
    return {entry["id"]: entry for entry in suite[key]} if suite else {}


def group_shifts(before: dict, after: dict) -> dict[tuple[str, str], float]:
    """Mean shift of log-odds(Yes:No), nats, of each group of probes: {(kind, keyed): shift}."""
    found = defaultdict(list)
    for probe in paired_probes(before, after):
        if probe.baseline is not None and probe.modified is not None:
            found[probe.kind, probe.keyed].append(probe.modified - probe.baseline)
    return {key: float(np.mean(values)) for key, values in found.items()}


def recipe_text(recipe: dict) -> str:
    try:
        return str(Recipe.from_json(recipe))
    except RecipeError:
        return str(recipe)


def _facts(manifest: dict, results: dict[str, dict]) -> list[tuple[str, str]]:
    """What was run, as label and value. What an older manifest lacks is left out."""
    hardware, protocol, sources = manifest.get("hardware", {}), manifest["protocol"], manifest.get("sources", {})
    machine = [f"{g['name']} ({size(g['memory_bytes'])})" for g in hardware.get("gpus", [])] or ["no GPU"]
    if hardware:
        machine.append(f"{hardware['processor']}, {hardware['threads']} threads, {size(hardware['memory_bytes'])} memory")
    origin = [f"{name}: {s.get('kind', '')} {s.get('id') or s.get('path') or ''}" + (f", revision {s['revision']}" if s.get("revision") else "")
              for name, s in sources.items()]
    asked = [", ".join(protocol["suites"]), f"seed {protocol['seed']}", f"{protocol['samples']} per free-text probe at temperature "
             f"{protocol['temperature']}, at most {protocol['max_new_tokens']} tokens", f"prompts {protocol['prompts_sha256'][:12]}"]
    peak = max((r["performance"]["peak_memory_bytes"] or 0 for r in results.values()), default=0)
    total = sum(r["performance"]["seconds"] for r in results.values())
    facts = [
        ("Pair", f"{manifest['pair'] or 'two checkpoints'}, {manifest['layers']} layers"), ("Sources", "; ".join(origin)),
        ("Precision", manifest["dtype"]), ("Devices", ", ".join(manifest["devices"])), ("Machine", "; ".join(machine)),
        ("Command", shlex.join(manifest.get("command", []))), ("Made", manifest["created"]), ("Commit", manifest.get("commit") or "unknown"),
        ("Versions", ", ".join(f"{k} {v}" for k, v in manifest.get("versions", {}).items() if v)), ("Protocol", "; ".join(asked)),
        ("Original weights", f"fingerprint {manifest['original_fingerprint']}"),
        ("Cost", f"{len(results)} experiments in {total:,.0f} s, after {manifest.get('load_seconds', 0):.1f} s of loading; peak memory {size(peak or None)}"),
    ]  # fmt: skip
    return [(label, value) for label, value in facts if value]


def _table(rows: list[dict]) -> tuple[list[dict], list[str]]:
    """The main table's rows with the numbers of their footnotes, and the footnotes; like remarks share a number."""
    notes: dict[str, int] = {}
    table = []
    for row in rows:
        remarks = report.remarks(row)
        table.append({"cells": report.cells(row), "row": row, "remarks": remarks, "notes": [notes.setdefault(r, len(notes) + 1) for r in remarks],
                      "unanswered": bool(row["published_probe"]) and not row["published_probe"]["answered"]})
    return table, list(notes)


def _drawn(run: Run, manifest: dict, comparison: dict, results: dict[str, dict]) -> list[dict]:
    """Draw and write the figures; [{"name", "uri", "title", "caption"}]. Raises FrankenError if the disk refuses."""
    rows, base = comparison["experiments"], results.get(comparison["baseline"], {}).get("measurements", {}).get("binary")
    groups = {name: group_shifts(base, r["measurements"]["binary"]) for name, r in results.items()
              if base and name != comparison["baseline"] and "binary" in r["measurements"]}
    published = {name: numbers[0] for name, numbers in PUBLISHED.items()}
    windows = PUBLISHED_WINDOWS if manifest["layers"] == 64 else {}
    undefined = [r["name"] for r in rows if r["capability"] and r["perplexity"] and r["perplexity"]["perplexity"] is None]
    here = _other_pair(manifest)
    found = (
        ("detection", figures.detection(rows), "Detection score",
         "With its 95% interval. Inside the gray band (under 0.1 nats) nothing is called. A cross, or no marker: not measurable."),
        ("p_yes", figures.p_yes(rows, published), "P(Yes) on the published probe",
         f"The published question, on a logarithmic axis. Published numbers: {PUBLISHED_SOURCE}. {here}"),
        ("capability", figures.capability(rows), "Capability against perplexity",
         "Share of items right with its 95% Wilson interval; perplexity on a logarithmic axis."
         + (f" Not drawn, having no finite perplexity: {', '.join(undefined)}." if undefined else "")),
        ("shifts", figures.shifts(rows, groups), "How each group of questions moved",
         "Drift moves all four groups one way. Flattening moves each group toward the other answer, controls too. Noticing moves "
         "the filled circles apart, blue to the right and orange to the left, and leaves the squares behind."),
        ("depth", figures.depth(rows, manifest["layers"], windows), "Replaced windows along depth",
         "Every bar is one experiment. Faint: not measurable, or not an answer." + (f" Diamonds: {PUBLISHED_SOURCE}. {here}" if windows else "")),
    )  # fmt: skip
    out, folder = [], run.path / "figures"
    for name, figure, title, caption in found:
        if figure is None:
            continue
        saved = figures.save(figure)
        try:
            folder.mkdir(exist_ok=True)
            for form in ("png", "pdf"):
                (folder / f"{name}.{form}").write_bytes(saved[form])
        except OSError as e:
            raise FrankenError(f"cannot write figures to {folder}: {e.strerror}") from e
        uri = "data:image/svg+xml;base64," + base64.b64encode(saved["svg"]).decode()
        out.append({"name": name, "uri": uri, "title": title, "caption": caption.strip()})
    return out


def _other_pair(manifest: dict) -> str:
    if manifest["pair"] == PUBLISHED_PAIR:
        return ""
    return f"This run used another pair ({manifest['pair'] or 'two checkpoints of its own'}, {manifest['layers']} layers), so the levels cannot be compared."


def _environment() -> jinja2.Environment:
    found = jinja2.Environment(autoescape=True, finalize=spelled, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
                               loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent / "templates"))
    found.filters |= {"visible": visible, "token": token, "size": size, "percent": report.percent, "number": report.number, "slug": slug,
                      "recipe_text": recipe_text}
    found.globals |= {"rate": rate, "difference": difference, "size": size, "by_id": by_id, "is_table": is_table, "qualifier": report.qualifier}
    return found


def write_html(run: Run, manifest: dict, comparison: dict) -> None:
    """Write run.path/report.html, whole or not at all, and figures/*.png and *.pdf beside it.

    Raises FrankenError if a result cannot be read or the disk refuses.
    """
    rows = comparison["experiments"]
    results = {row["name"]: read_json(run.file(row["name"])) for row in rows}
    table, notes = _table(rows)
    baseline = results.get(comparison["baseline"], {}).get("measurements", {})
    triggers = [report.trigger_cells(row) for row in rows if row["trigger"]]
    published = [(row, PUBLISHED[row["name"]]) for row in rows if row["name"] in PUBLISHED and row["published_probe"]]
    page = _environment().get_template("report.html.j2").render(
        run=comparison["run"], manifest=manifest, comparison=comparison, facts=_facts(manifest, results), columns=report.COLUMNS, table=table,
        notes=notes, legend=report.LEGEND, weak_controls=report.weak_controls(comparison), figures=_drawn(run, manifest, comparison, results),
        trigger_columns=report.TRIGGER_COLUMNS, triggers=triggers, trigger_legend=report.TRIGGER_LEGEND,
        results=results, baseline=baseline, published=published, published_source=PUBLISHED_SOURCE, other_pair=_other_pair(manifest),
        preamble=prompts.INFORMED_PREAMBLE)
    write_text(run.path / "report.html", page.lstrip())
