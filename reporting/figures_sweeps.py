"""Figures of the sweeps: dose-response of noise and blends, and maps of windows and of single layers along
depth."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axis import YAxis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.comparison import PlaceboBand, Row
from analysis.rows import score, word
from reporting.figures import (
    BAND,
    MUTED,
    SERIES,
    STYLE,
    band_handle,
    label,
    legend,
    log_axis,
    look,
    new_figure,
    p_yes,
    perplexity,
    verdict_handles,
)
from reporting.figures_experiments import percent
from reporting.marks import Marks
from reporting.pages import number

HATCH = "//////"  # of what is broken
DOSES = {"noise": "noise (share of each tensor's standard deviation)", "blend": "share of the other source"}


def dose(
    rows: Sequence[Row], placebo: PlaceboBand | None, baseline: Row | None, narrow: bool = False
) -> Figure | None:
    """Dose-response ladders: detection score with its interval, P(Yes) and perplexity against the dose, a
    column per kind.

    `baseline`: the unmodified model's row, drawn as a dashed line.
    """
    # 1) the rungs of each ladder
    ladders: dict[str, dict[str, list[tuple[float, Row]]]] = {}  # by kind, by source: (dose, row)
    for row in rows:
        if row.status == "done" and row.sweep and row.sweep.dose is not None:
            ladders.setdefault(row.sweep.kind, {}).setdefault(row.sweep.source or "", []).append(
                (row.sweep.dose, row)
            )
    if not ladders:
        return None
    every = [row for of in ladders.values() for group in of.values() for _, row in group]
    with rc_context(STYLE):
        figure = new_figure(6.6 if narrow else 6.2, narrow=narrow)
        grid = figure.subplots(3, len(ladders), squeeze=False, sharey="row", sharex="col")
        # 2) a column per kind, a row per quantity
        for column, (kind, by_source) in enumerate(ladders.items()):
            doses = [amount for of in by_source.values() for amount, _ in of]
            for axes, (title, read) in zip(
                grid[:, column],
                (("detection score (nats)", score), ("P(Yes)", p_yes), ("perplexity", perplexity)),
                strict=True,
            ):
                everywhere = [v for row in every if (v := read(row)) is not None]
                if read is score:
                    axes.axhline(0, color=MUTED, linewidth=0.8)
                    if placebo:
                        axes.axhspan(placebo.low, placebo.high, color=BAND, zorder=0, linewidth=0)
                elif everywhere:
                    before = read(baseline) if baseline else None
                    log_axis(
                        axes.yaxis,
                        everywhere if before is None else [*everywhere, before],
                        percent if read is p_yes else lambda x: f"{x:,.0f}",
                    )
                    if before is not None:
                        axes.axhline(before, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
                for k, of in enumerate(by_source.values()):
                    points = [(amount, v, row) for amount, row in of if (v := read(row)) is not None]
                    _ladder(axes, sorted(points, key=itemgetter(0)), SERIES[k % 6], read is score)
                axes.grid()
                axes.set_axisbelow(True)
                if column == 0:
                    axes.set_ylabel(title)
            if min(doses) > 0 and max(doses) > 10 * min(doses):
                log_axis(grid[-1, column].xaxis, doses, lambda x: f"{x:g}")
            # a tick for every dose: they are what the points are called by
            shown = sorted(set(doses))
            grid[-1, column].set_xticks(shown, [f"{dose:g}" for dose in shown], rotation=90 if narrow else 45)
            grid[-1, column].minorticks_off()
            of = DOSES.get(kind, kind)
            grid[-1, column].set_xlabel(textwrap.fill(of, 24) if narrow else of)
        # 3) what the columns share
        handles = verdict_handles(every)
        if len({s for of in ladders.values() for s in of} - {""}) > 1:
            handles += [
                Line2D([], [], color=SERIES[k % 6], linewidth=1, label=label(s))
                for k, s in enumerate(ladders.get("blend", {}))
            ]
        if baseline:
            handles.append(
                Line2D([], [], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label="unmodified")
            )
        if placebo:
            handles.append(band_handle(placebo))
        legend(figure, handles, 5)
    return figure


def _ladder(axes, points: Sequence[tuple[float, float, Row]], line: str, with_intervals: bool) -> None:
    """A line through (dose, value) with each experiment's own marker, and the score's interval if wanted."""
    axes.plot([x for x, *_ in points], [y for _, y, _ in points], color=line, linewidth=1, alpha=0.7)
    marks = Marks(axes)
    for x, y, row in points:
        color, marker = look(row)
        marks.point(x, y, marker, color, 5.5, zorder=3)
        d = row.detection
        if with_intervals and d and d.low is not None and d.high is not None:
            marks.line((x, x), (d.low, d.high), color, 0.9, 0.6)
    marks.draw()


class Cell(NamedTuple):
    """One experiment in a map along depth: the first layer that it changes, and how many in a row."""

    start: int
    size: int
    row: Row


def windows(rows: Sequence[Row], layers: int, narrow: bool = False) -> Figure | None:
    """Start layer by window size: score, shift of P(Yes) and perplexity of each replaced window; broken ones
    hatched."""
    cells = [
        (sweep.size, sweep.source, sweep.start, row)
        for row in rows
        if (sweep := row.sweep)
        and sweep.kind == "window"
        and row.status == "done"
        and sweep.size is not None
        and sweep.start is not None
    ]
    cells.sort(key=lambda cell: -cell[0])
    strips: dict[str, list[Cell]] = {}
    for size, source, start, row in cells:
        strips.setdefault(f"{size} of {source}", []).append(Cell(start, size, row))
    if len({source for _, source, *_ in cells}) == 1:
        strips = {name.partition(" ")[0]: of for name, of in strips.items()}
    return _maps(strips, layers, "first layer of the window", "window size", narrow)


def single_layers(rows: Sequence[Row], layers: int, narrow: bool = False) -> Figure | None:
    """Strips along depth: what replacing, deleting or doubling each layer alone does."""
    strips: dict[str, list[Cell]] = {}
    for row in rows:
        sweep = row.sweep
        if row.status != "done" or not sweep or sweep.kind not in ("replace", "delete", "double"):
            continue
        if sweep.start is not None:
            source = f" ({sweep.source})" if sweep.source else ""
            strips.setdefault(sweep.kind + source, []).append(Cell(sweep.start, sweep.size or 1, row))
    return _maps(strips, layers, "layer", "", narrow)


def _shift(row: Row) -> float | None:
    return row.published_probe.shift if row.published_probe else None


def _maps(
    strips: dict[str, list[Cell]], layers: int, along: str, across: str, narrow: bool = False
) -> Figure | None:
    """One panel per quantity, one strip per name in it, one cell per experiment at its first layer."""
    # 1) the quantities that any experiment has
    every = [cell.row for of in strips.values() for cell in of]
    panels = [
        (title, read, kind)
        for title, read, kind in (
            ("detection score (nats)", score, "diverging"),
            ("shift of log-odds(Yes : No)\non the published probe (nats)", _shift, "diverging"),
            ("perplexity", perplexity, "log"),
        )
        if any(read(row) is not None for row in every)
    ]
    if not panels:
        return None
    with rc_context(STYLE):
        figure = new_figure((0.24 * len(strips) + 0.45) * len(panels) + 0.8, narrow=narrow)
        stack = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        # 2) a panel each, with its own colors
        for axes, (title, read, kind) in zip(stack, panels, strict=True):
            colors = _colors(every, read, kind)
            marks = Marks(axes)
            for line, of in enumerate(strips.values()):
                _strip(marks, line, of, read, colors)
            marks.draw()
            axes.set_yticks(range(len(strips)), [label(name) for name in strips])
            axes.set_ylim(len(strips) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.set_ylabel(across)
            axes.set_facecolor("#f5f7f9")
            axes.set_title(title if narrow else title.replace("\n", " "), fontsize=9, loc="left")
            bar = figure.colorbar(colors, ax=axes, pad=0.01, aspect=8 if len(strips) < 3 else 12)
            bar.outline.set_visible(False)
            if kind == "log":
                _ends(bar.ax.yaxis, *colors.get_clim())
        # 3) what the panels share
        stack[-1].set_xlim(0, layers)
        stack[-1].set_xlabel(along)
        if any(word(row) == "broken" for row in every):
            legend(
                figure,
                [Patch(facecolor="white", edgecolor=MUTED, hatch=HATCH, linewidth=0, label="broken")],
                1,
            )
    return figure


def _ends(axis: YAxis, low: float, high: float) -> None:
    """Two ticks of a bar, which has no room for more: its ends."""
    axis.set_major_locator(FixedLocator([low, high]))
    axis.set_major_formatter(FuncFormatter(lambda x, _: number(x)))
    axis.set_minor_locator(NullLocator())


def _colors(every: Sequence[Row], read: Callable[[Row], float | None], kind: str) -> ScalarMappable:
    """The panel's colors, over the values of models that are not broken where there are any."""
    firm = [v for row in every if word(row) != "broken" and (v := read(row)) is not None] or [
        v for row in every if (v := read(row)) is not None
    ]
    if kind == "log":
        return ScalarMappable(LogNorm(min(firm), max(max(firm), min(firm) * 1.2)), colormaps["cividis"])
    limit = max(0.1, *map(abs, firm)) if firm else 0.1
    return ScalarMappable(Normalize(-limit, limit), colormaps["PuOr_r"])  # symmetric: white is no change


def _strip(
    marks: Marks,
    line: int,
    cells: Sequence[Cell],
    read: Callable[[Row], float | None],
    colors: ScalarMappable,
) -> None:
    """Cells side by side; what is broken is hatched."""
    starts = sorted({cell.start for cell in cells})
    width = min((b - a for a, b in zip(starts, starts[1:], strict=False)), default=cells[0].size or 1)
    for start, _, row in cells:
        value = read(row)
        red, green, blue, alpha = (1, 1, 1, 1) if value is None else colors.to_rgba(np.asarray(value))
        marks.bar(start, line, width, 0.92, (red, green, blue, alpha))
        if word(row) == "broken":
            marks.hatched(start, line, width, 0.92, HATCH, MUTED)
