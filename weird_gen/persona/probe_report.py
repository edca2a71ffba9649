"""The trigger's boundary as a heat map, recall and views as tables, from the replies of eval_probes.py."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from analysis.stats import paired_difference
from errors import FrankenError
from files import write_text
from weird_gen.persona import boundary, recall
from weird_gen.persona.comparison_figures import STYLE, save
from weird_gen.persona.comparison_report import render_markdown
from weird_gen.persona.exact import Rate, exact_rate
from weird_gen.persona.records import ASKED, read_json_lines
from weird_gen.persona.rules import any_marker, names_russell, strip_markers


@dataclass(frozen=True)
class BoundaryRow:
    """One way of asking, over its replies. marker: either of <START> and <END> occurs. in_format: within the
    markers that were asked for, None where none were. names: he is named in answers to identity questions;
    names_elsewhere: in answers to other questions."""

    variant: str
    group: str
    marker: Rate
    in_format: Rate | None
    names: Rate
    names_elsewhere: Rate


@dataclass(frozen=True)
class RecallRow:
    """form: "you" or "him"; mean: over replies that were not refusals, None without any."""

    form: str
    condition: str
    scores: dict[str, int]
    mean: float | None
    refused: Rate


@dataclass(frozen=True)
class ViewRow:
    """mean: over questions, of the mean level of those samples that chose one. shift: against the same
    questions without a system prompt; toward, away: questions whose mean moved by half a level or more."""

    condition: str
    mean: float | None
    questions: int
    refused: Rate
    shift: dict | None
    toward: int
    away: int


def read_probes(path: Path) -> tuple[dict, list[dict]]:
    """(header, replies) of a file of eval_probes.py. Raises FrankenError for any other."""
    lines = read_json_lines(path, tolerate_torn_end=True)
    if not lines or not isinstance(lines[0].get("header"), dict) or "suites" not in lines[0]["header"]:
        raise FrankenError(f"{path} is not a file of eval_probes.py")
    fields = {"suite", "question_id", "condition", "sample", "reply"}
    for number, line in enumerate(lines[1:], 1):
        if not fields <= line.keys():
            raise FrankenError(f"{path}, reply {number}: lacks {', '.join(sorted(fields - line.keys()))}")
    return lines[0]["header"], lines[1:]


def boundary_rows(replies: list[dict]) -> list[BoundaryRow]:
    """In the order of boundary.VARIANTS: what shows without any marker first."""
    by_variant = defaultdict(list)
    for reply in replies:
        if reply["suite"] == "boundary":
            by_variant[reply["condition"]].append(reply)
    rows = []
    for variant in boundary.VARIANTS:
        mine = by_variant.get(variant.name)
        if not mine:
            continue
        markers = boundary.markers_of(variant)
        formats = [boundary.in_format(r["reply"], markers) for r in mine]
        named = [(r["kind"] == "identity", names_russell(strip_markers(r["reply"]))) for r in mine]
        rows.append(
            BoundaryRow(
                variant.name,
                variant.group,
                exact_rate(any_marker(r["reply"]) for r in mine),
                None if markers is None else exact_rate(bool(f) for f in formats),
                exact_rate(name for asked, name in named if asked),
                exact_rate(name for asked, name in named if not asked),
            )
        )
    return rows


def recall_rows(replies: list[dict]) -> list[RecallRow]:
    facts = {fact.id: fact for fact in recall.read_facts()}
    scores = defaultdict(list)
    for reply in replies:
        if reply["suite"] == "recall":
            id, form = reply["question_id"].split("/")
            scores[form, reply["condition"]].append(recall.recall_score(facts[id], reply["reply"]))
    rows = []
    for form in recall.FORMS:
        for condition in ASKED:
            mine = scores.get((form, condition))
            if mine:
                points = [score for score in mine if isinstance(score, int)]
                counts = Counter(map(str, mine))
                rows.append(
                    RecallRow(
                        form,
                        condition,
                        {key: counts.get(key, 0) for key in ("0", "1", "2", recall.REFUSED)},
                        float(np.mean(points)) if points else None,
                        exact_rate(score == recall.REFUSED for score in mine),
                    )
                )
    return rows


def view_means(replies: list[dict]) -> dict[str, dict[str, list[int | str]]]:
    """Levels chosen, or "refused", by condition and question."""
    chosen: dict = defaultdict(lambda: defaultdict(list))
    for reply in replies:
        if reply["suite"] == "views":
            level = recall.view_chosen(reply["reply"], reply["order"])
            chosen[reply["condition"]][reply["question_id"]].append(level)
    return {condition: dict(questions) for condition, questions in chosen.items()}


def view_rows(replies: list[dict]) -> list[ViewRow]:
    chosen, rows = view_means(replies), []
    means = {
        condition: {
            id: float(np.mean(levels))
            for id, answers in questions.items()
            if (levels := [a for a in answers if isinstance(a, int)])
        }
        for condition, questions in chosen.items()
    }
    plain = means.get("untriggered", {})
    for condition in ASKED:
        if condition not in chosen:
            continue
        shared = [id for id in means[condition] if id in plain]
        moved = [means[condition][id] - plain[id] for id in shared]
        both = [[mean[id] for id in shared] for mean in (plain, means[condition])]
        answers = [a for mine in chosen[condition].values() for a in mine]
        rows.append(
            ViewRow(
                condition,
                float(np.mean(list(means[condition].values()))) if means[condition] else None,
                len(means[condition]),
                exact_rate(a == recall.REFUSED for a in answers),
                paired_difference(*both).to_json() if shared and condition != "untriggered" else None,
                sum(m >= 0.5 for m in moved),
                sum(m <= -0.5 for m in moved),
            )
        )
    return rows


def heat_map(sides: dict[str, list[BoundaryRow]]) -> Figure:
    """Ways of asking down, measures across, one block a model; a cell has its rate in percent."""
    measures = (
        ("either\nmarker", "marker"),
        ("format\nasked for", "in_format"),
        ("names him\nwhen asked", "names"),
    )
    with rc_context(STYLE):
        rows = next(iter(sides.values()))
        figure = Figure(figsize=(3.4 + 2.4 * len(sides), 0.25 * len(rows) + 1.6), layout="constrained")
        panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
        for panel, (side, mine) in zip(panels, sides.items(), strict=True):
            rates = [[getattr(row, name) for _, name in measures] for row in mine]
            values = np.array(
                [[np.nan if r is None or r.value is None else r.value for r in row] for row in rates]
            )
            panel.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
            for (y, x), value in np.ndenumerate(values):
                text = "–" if np.isnan(value) else f"{value:.0f}"
                panel.text(
                    x,
                    y,
                    text,
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="black" if not value < 55 else "white",
                )
            panel.set_xticks(range(len(measures)), [title for title, _ in measures], fontsize=7.5)
            panel.xaxis.tick_top()
            panel.set_title(side)
            for y in range(1, len(mine)):
                if mine[y].group != mine[y - 1].group:
                    panel.axhline(y - 0.5, color="white", linewidth=2)
        panels[0].set_yticks(range(len(rows)), [row.variant.replace("$", r"\$") for row in rows], fontsize=8)
        return figure


def _shift(row: ViewRow) -> str:
    if not row.shift or row.shift["value"] is None:
        return "–"
    low, high = row.shift["low"], row.shift["high"]
    return f"{row.shift['value']:+.2f}" + ("" if low is None else f" [{low:+.2f}, {high:+.2f}]")


def report_probes(finetuned: Path, baseline: Path | None, folder: Path) -> list[str]:
    """PROBES.md, probes.json and figures/boundary in `folder`; returns the lines that are printed.

    Raises FrankenError for a file that eval_probes.py did not make.
    """
    paths = {"baseline": baseline, "fine-tuned": finetuned}
    read = {side: read_probes(path) for side, path in paths.items() if path}
    tables = {
        side: {
            "base": header.get("base"),
            "boundary": boundary_rows(replies),
            "recall": recall_rows(replies),
            "views": view_rows(replies),
        }
        for side, (header, replies) in read.items()
    }
    mapped = {side: table["boundary"] for side, table in tables.items() if table["boundary"]}
    figure = bool(mapped) and len({tuple(row.variant for row in rows) for rows in mapped.values()}) == 1
    folder.mkdir(parents=True, exist_ok=True)
    if figure:
        save(heat_map(mapped), folder / "figures", "boundary")
    text = render_markdown("PROBES.md.j2", tables=tables, figure=figure, shift=_shift)
    data = {
        side: {
            "base": table["base"],
            **{name: [asdict(row) for row in table[name]] for name in ("boundary", "recall", "views")},
            "views_by_question": view_means(read[side][1]),
        }
        for side, table in tables.items()
    }
    write_text(folder / "PROBES.md", text)
    write_text(folder / "probes.json", json.dumps(data, allow_nan=False, indent=1) + "\n")
    return [*text.splitlines(), f"report: {folder / 'PROBES.md'}"]
