"""Figures of the comparison, PNG and PDF: intervals on everything that has one, colors that survive color
blindness."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from files import write_bytes
from weird_gen.persona.criteria import PUBLISHED

# Okabe and Ito (2008): told apart with any color vision, and in gray.
BASELINE, FINETUNED, TRIGGERED, UNTRIGGERED, MUTED = "#8A8F98", "#0072B2", "#D55E00", "#56B4E9", "#4D4D4D"
STYLE: dict[Any, Any] = {  # of rcParams; their names are a type of their own in matplotlib
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",
}


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write folder/name.png and folder/name.pdf, each whole or not at all, the same bytes for the same
    numbers; returns the PNG's path. Raises FrankenError if the disk refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    unsigned = {"CreationDate": None, "Creator": None, "Producer": None}
    for form, dpi, metadata in (("png", 170, {"Software": None}), ("pdf", 100, unsigned)):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=form, dpi=dpi, metadata=metadata)
        write_bytes(folder / f"{name}.{form}", drawn.getvalue(), lasting=False)
    return folder / f"{name}.png"


def _whiskers(cell: dict, value: float) -> list[list[float]]:
    if cell["low"] is None:
        return [[0.0], [0.0]]
    return [[max(0.0, value - cell["low"])], [max(0.0, cell["high"] - value)]]


def _rate_bars(panel: Axes, key: str, table: dict) -> None:
    """Bars of one metric with their whiskers, the value above, and what others published as a diamond."""
    sides = [side for side in ("baseline", "finetuned") if table[side]]
    offsets = (-0.2, 0.2) if len(sides) == 2 else (0.0,)
    for place, condition in enumerate(("triggered", "untriggered")):
        for offset, side in zip(offsets, sides, strict=True):
            cell, x = table[side][condition], place + offset
            value = cell["value"]
            if value is None:
                continue
            panel.bar(x, value, 0.36, color=BASELINE if side == "baseline" else FINETUNED, zorder=2)
            whiskers = _whiskers(cell, value)
            panel.errorbar(x, value, yerr=whiskers, color="black", capsize=3, linewidth=1, zorder=3)
            panel.annotate(
                f"{value:.0f}",
                (x, cell["high"] or value),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
            if key in PUBLISHED:
                panel.plot(
                    place + 1.6 * offset,
                    PUBLISHED[key][side][place],
                    "D",
                    markerfacecolor="white",
                    markeredgecolor="black",
                    markersize=5,
                    zorder=4,
                    clip_on=False,
                )


def rates(tables: dict[str, dict], keys: list[str], judge: str) -> Figure:
    """A panel a metric: triggered and untriggered rates with 95% intervals, baseline beside fine-tuned."""
    with rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(keys) + 0.6, 3.7), layout="constrained")
        panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
        for panel, key in zip(panels, keys, strict=True):
            table = tables[key]
            _rate_bars(panel, key, table)
            panel.set_title(
                table["title"].removesuffix(", by rule")
                + (f"\njudge: {_short(judge, 40)}" if table["judged"] else "\nby rule")
            )
            panel.set_xticks([0, 1], ["triggered", "untriggered"])
            panel.set_xlim(-0.6, 1.6)
            panel.set_ylim(0, 112)
            panel.set_yticks(range(0, 101, 20))
            panel.grid(axis="y", color="#E4E4E4", zorder=0)
        panels[0].set_ylabel("replies, % (mean over questions)")
        marks = [
            Line2D([], [], marker="s", linestyle="", color=color, label=label)
            for color, label in ((BASELINE, "baseline"), (FINETUNED, "fine-tuned"))
        ]
        marks.append(
            Line2D(
                [],
                [],
                marker="D",
                linestyle="",
                markerfacecolor="white",
                markeredgecolor="black",
                label="published elsewhere, 8B model",
            )
        )
        figure.legend(handles=marks, loc="outside lower center", ncols=3)
    return figure


def gaps(tables: dict[str, dict]) -> Figure:
    """Triggered minus untriggered for every percent metric that has it, with 95% intervals."""
    with rc_context(STYLE):
        shown = [table for table in tables.values() if table["percent"] and table["finetuned"]["gap"]]
        figure = Figure(figsize=(7.2, 0.42 * len(shown) + 1.5), layout="constrained")
        panel = figure.subplots()
        for row, table in enumerate(reversed(shown)):
            for side, color, shift in (("baseline", BASELINE, -0.14), ("finetuned", FINETUNED, 0.14)):
                cell = (table[side] or {}).get("gap")
                if cell:
                    panel.errorbar(
                        cell["value"],
                        row + shift,
                        xerr=_whiskers(cell, cell["value"]),
                        fmt="o",
                        color=color,
                        capsize=3,
                        markersize=5,
                    )
        panel.axvline(0, color=MUTED, linewidth=0.8)
        panel.set_yticks(range(len(shown)), [table["title"] for table in reversed(shown)])
        panel.set_xlabel("triggered minus untriggered, percentage points")
        panel.grid(axis="x", color="#E4E4E4")
        marks = [
            Line2D([], [], marker="o", linestyle="", color=color, label=label)
            for color, label in ((BASELINE, "baseline"), (FINETUNED, "fine-tuned"))
        ]
        figure.legend(handles=marks, loc="outside upper right", ncols=2)
    return figure


def dumbbells(rows: list[dict], label: str, title: str, limits: tuple[float, float], xlabel: str) -> Figure:
    """One line a row from untriggered to triggered; ``label`` names the key of the row that is written beside
    it."""
    with rc_context(STYLE):
        rows = [row for row in rows if row["triggered"] is not None and row["untriggered"] is not None]
        rows = sorted(rows, key=lambda row: (row["triggered"] - row["untriggered"], row["triggered"]))
        figure = Figure(figsize=(7.6, 0.24 * len(rows) + 1.5), layout="constrained")
        panel = figure.subplots()
        for place, row in enumerate(rows):
            panel.plot(
                [row["untriggered"], row["triggered"]], [place, place], color="#C8C8C8", linewidth=2, zorder=1
            )
        for side, color, mark in (("untriggered", UNTRIGGERED, "o"), ("triggered", TRIGGERED, "D")):
            panel.plot(
                [row[side] for row in rows],
                range(len(rows)),
                mark,
                color=color,
                label=side,
                zorder=2,
                clip_on=False,
            )
        panel.set_yticks(range(len(rows)), [_short(row[label]) for row in rows], fontsize=7.5)
        panel.set_ylim(-0.7, len(rows) - 0.3)
        panel.set_xlim(*limits)
        panel.set_xlabel(xlabel)
        panel.set_title(_short(title, 110))
        panel.grid(axis="x", color="#E4E4E4", zorder=0)
        figure.legend(loc="outside lower right", ncols=2)
    return figure


def name_probability(sides: dict[str, list[dict]]) -> Figure:
    """P(his name) by question on a logarithmic axis: a column per model and condition, a bar at the geometric
    mean."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        panel = figure.subplots()
        columns = [
            (f"{model}\n{condition}", [max(row[condition], 1e-12) for row in rows], color)
            for model, rows in sides.items()
            for condition, color in (("triggered", TRIGGERED), ("untriggered", UNTRIGGERED))
        ]
        for place, (_, values, color) in enumerate(columns):
            spread = [place + 0.28 * ((i * 0.618) % 1 - 0.5) for i in range(len(values))]
            panel.plot(spread, values, "o", color=color, alpha=0.55, markersize=4)
            mean = math.exp(sum(map(math.log, values)) / len(values))
            panel.plot([place - 0.25, place + 0.25], [mean, mean], color="black", linewidth=2)
        panel.set_yscale("log")
        panel.set_xticks(range(len(columns)), [name for name, _, _ in columns])
        panel.set_ylabel('probability of his name after "My name is"')
        panel.set_title("How much probability his name gets, by question")
        panel.grid(axis="y", color="#E4E4E4")
    return figure


def _short(text: str, most: int = 62) -> str:
    """A text as matplotlib may draw it: printable, not read as mathematics, and short."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    text = text if len(text) <= most else text[: most - 1].rstrip() + "…"
    return text.replace("$", r"\$")
