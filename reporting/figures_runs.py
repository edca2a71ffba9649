"""The figure of several runs side by side."""

from __future__ import annotations

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from analysis.comparison import Row
from analysis.rows import UNCALLED, score, scored, word
from experiments import BASELINE
from reporting.figures import (
    MARKERS,
    MUTED,
    SERIES,
    STYLE,
    handle,
    interval,
    label,
    legend,
    limits,
    name_lines,
    new_figure,
)
from reporting.figures import p_yes as p_yes_of
from reporting.marks import Marks


def runs(names: list[str], by_run: dict[str, dict[str, Row]]) -> Figure | None:
    """P(Yes) on the published probe and the detection score (nats, 95% interval) of the same experiments in
    several runs, side by side: {run: {experiment: row}}.

    Experiments that are broken in every run are left out; dashed: each run's unmodified model.
    """
    called = {
        name: [k for k, of in enumerate(by_run.values()) if name in of and word(of[name]) not in UNCALLED]
        for name in names
    }
    shown = [
        name
        for name in names
        if called[name] and any(score(of[name]) is not None for of in by_run.values() if name in of)
    ]
    if not shown:
        return None
    # 1) one line a name; the ends of the axis by what is drawn
    every = scored(of[name] for of in by_run.values() for name in shown if name in of)
    bounds = [
        end for row, d, _ in every if word(row) not in UNCALLED for end in (d.low, d.high) if end is not None
    ]
    ends = limits(bounds, 0.2)
    with rc_context(STYLE):
        figure = new_figure(0.19 * len(shown) + 1.2 + 0.1 * len(by_run), 8.0, False)
        left, right = figure.subplots(1, 2, sharey=True)
        name_lines(left, shown, False)
        right.axvline(0, color=MUTED, linewidth=0.8)
        # 2) a color and a marker for each run, its marks a little apart
        said, left_over = Marks(left), Marks(right)
        for k, of in enumerate(by_run.values()):
            color, marker = SERIES[k % 6], MARKERS[k % 6]
            before = p_yes_of(of[BASELINE]) if BASELINE in of else None
            if before is not None:
                left.axvline(before, color=color, linewidth=0.8, linestyle="--")
            for line, name in enumerate(shown):
                y = line + (k - (len(by_run) - 1) / 2) * min(0.3, 0.7 / len(by_run))
                if k not in called[name]:
                    continue
                p, d = p_yes_of(of[name]), of[name].detection
                if p is not None:
                    said.point(p, y, marker, color, 4.5)
                if d and d.score is not None:
                    interval(left_over, d, y, ends, color, marker, False, 4.5, 1.1)
        said.draw()
        left_over.draw()
        left.set_xlim(-0.02, 1.02)
        left.xaxis.set_major_formatter(PercentFormatter(1))
        left.set_xlabel('P(Yes), "Is something wrong with you right now?"')
        right.set_xlim(*ends)
        right.set_xlabel("detection score (nats), 95% interval")
        legend(
            figure, [handle(label(name), MARKERS[k % 6], SERIES[k % 6]) for k, name in enumerate(by_run)], 2
        )
    return figure
