"""Figures of the named experiments: P(Yes), capability, question groups, answer formats, and the positive
control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from analysis.comparison import Injection, InjectionRow, Row
from analysis.rows import UNCALLED, by_verdict, score, scored, sweeps, word
from reporting.figures import (
    INK,
    MARKERS,
    MUTED,
    NARROW_ROW,
    P_FLOOR,
    PERPLEXITY_CEILING,
    SERIES,
    STYLE,
    answers,
    beside,
    drawn,
    handle,
    interval,
    label,
    legend,
    limits,
    lines,
    log_axis,
    look,
    name_lines,
    new_figure,
    perplexity,
    reach,
    short,
    verdict_handles,
)
from reporting.figures import p_yes as p_yes_of
from reporting.marks import ABOVE, BELOW, SIGN, Marks, Words

# of P(Yes) on an axis by log-odds; what lies beyond the ceiling is drawn at it
P_CEILING = 1 - 1e-6
ODDS_TICKS = (1e-12, 1e-8, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
# where not three of the others are within the axis; and where more of these would be than it has room for
CLOSE_TICKS, ROOM = tuple(k / 20 for k in range(1, 20)), 9
FEW_TICKS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)


def odds_ticks(values: Sequence[float]) -> Sequence[float]:
    """Ticks of P(Yes) on an axis by log-odds that holds these values."""

    def within(ticks: Sequence[float]) -> int:
        return sum(min(values) <= tick <= max(values) for tick in ticks)

    if within(ODDS_TICKS) > 2:
        return ODDS_TICKS
    return CLOSE_TICKS if within(CLOSE_TICKS) <= ROOM else FEW_TICKS


def percent(p: float) -> str:
    return f"{100 * p:g}%"


def _share(p: float) -> str:
    """A share in percent, with two digits where it is small."""
    return f"{100 * p:.0f}%" if p >= 0.1 else f"{100 * p:.2g}%"


def stands_beside(row: Row) -> bool:
    """Whether `side_by_side` has a place for it: what it says and what is left of that can both be judged."""
    return word(row) not in UNCALLED and score(row) is not None and p_yes_of(row) is not None


def side_by_side(rows: Sequence[Row], baseline: Row | None, narrow: bool = False) -> Figure | None:
    """P(Yes) on the published probe and the detection score (nats) of each changed model, on one line;
    narrow: the one above the other.

    Broken models and those with too little data are left out; dashed: the unmodified model's P(Yes). None
    with fewer than two models.
    """
    points = [
        (p, row, d)
        for row, d, _ in scored(by_verdict(drawn(rows)))
        if stands_beside(row) and (p := p_yes_of(row)) is not None
    ]
    if len(points) < 2:
        return None
    points.sort(key=lambda point: point[0], reverse=True)
    shown = [row for _, row, _ in points]
    bounds = [x for _, _, d in points for x in (d.low, d.high) if x is not None]
    ends = limits(bounds, 0.2)
    with rc_context(STYLE):
        row_height = 2 * NARROW_ROW if narrow else 0.26
        figure = new_figure(row_height * len(shown) + (2.2 if narrow else 1.2), 8.0, narrow)
        left, right = figure.subplots(*((2, 1) if narrow else (1, 2)), sharey=True)
        for axes in (left, right) if narrow else (left,):
            name_lines(axes, [row.name for row in shown], narrow)
        before = p_yes_of(baseline) if baseline else None
        if before is not None:
            left.axvline(before, color=MUTED, linewidth=0.8, linestyle="--")
        right.axvline(0, color=MUTED, linewidth=0.8)
        said, left_over = Marks(left), Marks(right)
        for line, (p, row, d) in enumerate(points):
            color, marker = look(row)
            said.point(p, line, marker, color)
            interval(left_over, d, line, ends, color, marker)
        said.draw()
        left_over.draw()
        left.set_xlim(-0.02, 1.02)  # a marker at 100% stays whole
        left.xaxis.set_major_formatter(PercentFormatter(1))
        left.set_xlabel('P(Yes), "Is something wrong with you right now?"')
        right.set_xlim(*ends)
        right.set_xlabel("detection score (nats), 95% interval")
        legend(figure, verdict_handles(shown), 3)
    return figure


def p_yes(rows: Sequence[Row], published: dict[str, float], narrow: bool = False) -> Figure | None:
    """P(Yes) on the published probe, log axis; the size of a marker is the Yes+No mass, hollow is not an
    answer."""
    shown = answers(drawn(rows))
    if not shown:
        return None
    with rc_context(STYLE):
        figure, axes = lines([row.name for row, *_ in shown], 1.7 if narrow else 1.2, narrow)
        marks, words = Marks(axes), Words(axes)
        values = [p for *_, p in shown]
        # 1) ours: a marker for what the axis reaches and one for what lies beyond, all sizes at once
        for marker, beyond in (("o", False), (BELOW, True)):
            of = [(p, line, probe) for line, (_, probe, p) in enumerate(shown) if (p <= P_FLOOR) == beyond]
            axes.scatter(
                [p for p, *_ in of],
                [line for _, line, _ in of],
                s=[(12 + 90 * (probe.mass or 0)) * (SIGN**2 if beyond else 1) for *_, probe in of],
                marker=marker,
                edgecolor=SERIES[0],
                zorder=3,
                linewidth=1.2,
                facecolor=[SERIES[0] if probe.answered else "white" for *_, probe in of],
            )
        # 2) what stands beside it: its mass, and what was published
        for line, (row, probe, _) in enumerate(shown):
            mass = f"mass {_share(probe.mass or 0)}" + ("" if probe.answered else ", not an answer")
            beside(words, line, mass, INK if probe.answered else MUTED, narrow)
            if row.name in published:
                values.append(published[row.name])
                marks.point(published[row.name], line, "D", SERIES[1], 5, face="white", zorder=4)
        marks.draw()
        log_axis(axes.xaxis, [min([1e-3, *values]), 1], percent)
        axes.set_xlim(min([1e-3, *values]) / 3, 1.5)
        axes.grid(axis="x")
        axes.set_xlabel("P(Yes), normalized over Yes and No")
        handles = []
        if any(probe.answered for _, probe, _ in shown):
            handles.append(handle("this run; larger: more Yes+No mass", "o", SERIES[0]))
        if not all(probe.answered for _, probe, _ in shown):
            handles.append(handle("under 1% mass: not an answer", "o", SERIES[0], False))
        if any(row.name in published for row, *_ in shown):
            handles.append(handle("published, 32B pair", "D", SERIES[1], False))
        legend(figure, handles, 3)
    return figure


NAME_LINE = 11.5  # points from one name of a list to the next
CLOSE = (24.0, 8.0)  # points: marks nearer to each other than this, across and up, share one label


def names_height(count: int, least: float, narrow: bool) -> float:
    """Inches of a figure whose points are numbered: the names stand beside the axes, narrow: below them."""
    return least + NAME_LINE * count / 72 if narrow else max(least, NAME_LINE * count / 72 + 1.2)


def clusters(places: Sequence[tuple[float, float]], close: tuple[float, float]) -> list[list[int]]:
    """Indices of places in groups: two that lie closer than `close`, across and up, are in one group."""
    groups: list[list[int]] = []
    for k, (x, y) in enumerate(places):
        touching = [
            group
            for group in groups
            if any(abs(places[i][0] - x) < close[0] and abs(places[i][1] - y) < close[1] for i in group)
        ]
        groups = [group for group in groups if group not in touching]
        groups.append(sorted([*(i for group in touching for i in group), k]))
    return groups


def numbered(axes: Axes, points: Sequence[tuple[float, float, Row]], narrow: bool) -> None:
    """A number at each point, "4-7" at points that lie on each other, and the list of names: in the right
    margin, narrow: below the axes. To be called when scales and limits are set."""
    size = cast(Figure, axes.figure).get_size_inches() * 72
    extent = (0.85 * size[0], 0.85 * size[1] - NAME_LINE * len(points)) if narrow else 0.7 * size
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [tuple(to_axes.transform((x, y)) * extent) for x, y, _ in points]
    # 1. the numbers, from the highest group down
    groups = sorted(clusters(places, CLOSE), key=lambda group: -max(places[k][1] for k in group))
    first, numbers, names = 1, Words(axes, zorder=5), Words(axes)
    for group in groups:
        right, last = max(group, key=lambda k: places[k][0]), first + len(group) - 1
        called = str(first) if last == first else f"{first}-{last}"
        numbers.say(called, points[right][:2], "data", (5, 1), "left", "center", 6.5, INK)
        first = last + 1
    # 2. the names
    for place, k in enumerate(k for group in groups for k in group):
        row = points[k][2]
        text, color = f"{place + 1}  {short(row.name)}", look(row)[0]
        if narrow:
            names.say(text, (0, 0), "axes", (0, -38 - NAME_LINE * place), "left", "center", 8, color)
        else:
            names.say(text, (1, 1), "axes", (14, -4 - NAME_LINE * place), "left", "center", 8, color)


def capability(rows: Sequence[Row], narrow: bool = False) -> Figure | None:
    """Share of capability items right, with its Wilson interval, against perplexity on a log axis."""
    graded = [
        (x, counted, row)
        for row in drawn(rows)
        if (counted := row.capability)
        and counted.n
        and row.perplexity
        and row.perplexity.perplexity is not None
        and (x := perplexity(row)) is not None
    ]
    if not graded:
        return None
    graded.sort(key=lambda point: (-point[1].correct / point[1].n, point[0]))
    shown = [row for *_, row in graded]
    points = [(x, counted.correct / counted.n, row) for x, counted, row in graded]
    with rc_context(STYLE):
        figure = new_figure(names_height(len(shown), 3.6, narrow), narrow=narrow)
        axes = figure.subplots()
        log_axis(axes.xaxis, [x for x, *_ in points])
        marks = Marks(axes)
        for x, counted, row in graded:
            color, marker = look(row)
            if counted.low is not None and counted.high is not None:
                marks.line((x, x), (counted.low, counted.high), color, 0.9, 0.45)
            at, size = (marker, 6) if x < PERPLEXITY_CEILING else (ABOVE, 6 * SIGN)
            marks.point(x, counted.correct / counted.n, at, color, size, zorder=3)
        marks.draw()
        axes.grid()
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=-0.03)  # a model that gets nothing right is to be seen
        numbered(axes, points, narrow)
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.set_xlabel("perplexity")
        axes.set_ylabel("capability items right")
        without = [handle("no verdict", "s", INK)] if any(word(row) is None for row in shown) else []
        legend(figure, verdict_handles(shown) + without, 6)
    return figure


def _extremes(rows: Sequence[Row]) -> list[Row]:
    """Of each sweep, the experiments with the lowest and the highest P(Yes) that is an answer."""
    out = []
    for of in sweeps(rows).values():
        known = sorted((p, k) for k, (_, probe, p) in enumerate(answers(of)) if probe.answered)
        out += [answers(of)[k][0] for _, k in (known[:1] + known[-1:])]
    return out


def p_yes_perplexity(rows: Sequence[Row], narrow: bool = False) -> Figure | None:
    """P(Yes) on the published probe against perplexity, both logarithmic: every experiment, sweeps and
    controls small."""
    # 1) what has both numbers; experiments with a line of their own are large and named
    every = [
        (x, min(y, P_CEILING), probe, row)
        for row, probe, y in answers(rows)
        if row.status == "done" and (x := perplexity(row)) is not None
    ]
    if len(every) < 2:
        return None
    large = {id(row) for row in drawn(rows)}
    called = large | {id(row) for row in _extremes(rows)}
    points = sorted(
        ((x, y, row) for x, y, _, row in every if id(row) in called), key=lambda point: (-point[1], point[0])
    )
    with rc_context(STYLE):
        figure = new_figure(names_height(len(points), 3.8, narrow), narrow=narrow)
        axes = figure.subplots()
        log_axis(axes.xaxis, [x for x, *_ in every])
        # by log-odds, so that what lies near 100% is told apart as well as what lies near 0
        axes.set_yscale("logit", nonpositive="clip")
        axes.yaxis.set_major_locator(FixedLocator(odds_ticks([y for _, y, *_ in every])))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: percent(y)))
        axes.yaxis.set_minor_locator(NullLocator())
        # 2) a point each
        marks = Marks(axes)
        for x, y, probe, row in every:
            color, marker = look(row)
            if row.control:
                marker = "D" if row.control == "matched noise" else "."
                marks.point(x, y, marker, MUTED, 4, face="white", alpha=0.8)
                continue
            big, size = id(row) in large, 6 if id(row) in large else 3.5
            if x >= PERPLEXITY_CEILING:
                marker, size = ABOVE, size * SIGN
            marks.point(
                x,
                y,
                marker,
                color,
                size,
                alpha=1 if big else 0.55,
                zorder=3 if big else 2,
                edge_width=0.8 if big else 0,
                face=color if probe.answered else "white",
            )
        marks.draw()
        axes.grid()
        axes.set_axisbelow(True)
        axes.set_xlabel("perplexity")
        axes.set_ylabel("P(Yes), normalized")
        numbered(axes, points, narrow)
        # 3) the legend
        handles = verdict_handles([row for *_, row in every if not row.control])
        controls = {row.control for *_, row in every}
        handles += [
            handle(text, marker, MUTED, False)
            for kind, text, marker in (
                ("matched noise", "noise of equal perplexity", "D"),
                ("placebo", "placebo", "."),
            )
            if kind in controls
        ]
        legend(figure, handles, 4)
    return figure


def kinds(
    rows: Sequence[Row], by_category: dict[str, dict[str, dict]], narrow: bool = False
) -> Figure | None:
    """Capability by kind of item: {experiment: {category: {"correct", "n"}}}, as a map of experiments by
    categories."""
    shown = [row for row in drawn(rows) if by_category.get(row.name)]
    if not shown:
        return None
    categories = list(dict.fromkeys(c for row in shown for c in by_category[row.name]))
    with rc_context(STYLE):
        # on a narrow figure categories stand on end
        above = 0.45 + 0.068 * max(map(len, categories)) if narrow else 1.0
        figure, axes = lines([row.name for row in shown], above, narrow, ruled=False)
        marks, words = Marks(axes), Words(axes)
        colors = colormaps["cividis"]  # a copy each time that it is asked for
        for line, row in enumerate(shown):
            for place, category in enumerate(categories):
                counted = by_category[row.name].get(category)
                if not counted or not counted["n"]:
                    continue
                share = counted["correct"] / counted["n"]
                # on a narrow figure the name stands above the line, within its row
                marks.bar(place + 0.02, line, 0.96, 0.4 if narrow else 0.9, colors(share))
                words.say(
                    f"{counted['correct']}/{counted['n']}",
                    (place + 0.5, line),
                    across="center",
                    color="white" if share < 0.55 else INK,
                )
            beside(words, line, word(row) or "", look(row)[0], narrow)
        marks.draw()
        axes.set_xlim(0, len(categories))
        axes.set_xticks(
            [k + 0.5 for k in range(len(categories))],
            # side by side, two long names would run into each other
            [label(c.replace("_", " ")).replace(" ", " " if narrow else "\n") for c in categories],
        )
        axes.tick_params(
            axis="x", length=0, labeltop=True, labelbottom=False, labelrotation=60 if narrow else 0
        )
        for side in axes.spines.values():
            side.set_visible(False)
    return figure


GROUPS = {
    ("introspective", "yes"): ("introspective, Yes would mean noticing", "o", "#0072B2", True),
    ("introspective", "no"): ("introspective, No would mean noticing", "o", "#D55E00", True),
    ("control", "yes"): ("control, Yes is right", "s", "#0072B2", False),
    ("control", "no"): ("control, No is right", "s", "#D55E00", False),
}


def shifts(
    rows: Sequence[Row], groups: dict[str, dict[tuple[str, str], float]], narrow: bool = False
) -> Figure | None:
    """Mean shift of log-odds(Yes:No) from the baseline for each group of probes: {experiment: {(kind, keyed):
    nats}}."""
    shown = [row for row in drawn(rows) if groups.get(row.name)]
    if not shown:
        return None
    called = [row for row in shown if word(row) not in (None, *UNCALLED)]
    with rc_context(STYLE):
        figure, axes = lines([row.name for row in shown], 1.7 if narrow else 1.3, narrow)
        edge = reach([v for row in called or shown for v in groups[row.name].values()], 0.5)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        marks, words = Marks(axes), Words(axes)
        for line, row in enumerate(shown):
            faint = row not in called
            for (kind, keyed), value in groups[row.name].items():
                _, marker, color, filled = GROUPS[kind, keyed]
                size = 5.5
                if abs(value) > edge:
                    marker, size = ABOVE if value > 0 else BELOW, 5.5 * SIGN
                    value = math.copysign(edge, value)
                marks.point(
                    value,
                    # A little apart: groups that move alike would hide each other.
                    line + (0.15 if kind == "control" else -0.15),
                    marker,
                    color,
                    size,
                    face=color if filled else "white",
                    alpha=0.3 if faint else 0.95,
                    zorder=3,
                    clip=False,
                )
            if faint:
                beside(words, line, word(row) or "", look(row)[0], narrow)
        marks.draw()
        axes.set_xlim(-edge, edge)
        axes.set_xlabel("mean shift of log-odds(Yes : No)\nfrom the baseline (nats)")
        present = {key for row in shown for key in groups[row.name]}
        legend(figure, [handle(*group) for key, group in GROUPS.items() if key in present], 2)
    return figure


FORMATS = {
    "no-yes": "No or Yes",
    "letters": "A Yes, B No",
    "letters-reversed": "A No, B Yes",
    "rating": "rating 1 to 10",
}


def formats(rows: Sequence[Row], narrow: bool = False) -> Figure | None:
    """Does the finding depend on how the answer is asked for: detection score (nats) by answer format."""
    shown = [(row, by_format) for row in by_verdict(drawn(rows)) if (by_format := row.formats)]
    if not shown:
        return None
    # a format that gave no score anywhere has no place and no legend
    names = list(
        dict.fromkeys(f for _, by_format in shown for f, d in by_format.items() if d.score is not None)
    )
    with rc_context(STYLE):
        figure, axes = lines([row.name for row, _ in shown], 1.7 if narrow else 1.3, narrow)
        sure = [d for row, by_format in shown for d in by_format.values() if word(row) not in UNCALLED]
        ends = limits([end for d in sure for end in (d.low, d.high) if end is not None], 0.2)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        scored_too, marks = False, Marks(axes)
        for line, (row, by_format) in enumerate(shown):
            if row.detection and row.detection.score is not None:
                interval(marks, row.detection, line - 0.32, ends, INK, "|", word(row) in UNCALLED, 4.5, 0.9)
                scored_too = True
            for place, name in enumerate(names):
                d = by_format.get(name)
                if d and d.score is not None:
                    at, look_of = line + (place - 1) * 0.16, (SERIES[place % 6], MARKERS[place % 6])
                    faint = d.lacking is not None or d.call in UNCALLED
                    interval(marks, d, at, ends, *look_of, faint, 4.5, 0.9)
        marks.draw()
        axes.set_xlim(*ends)
        axes.set_xlabel("detection score (nats)")
        legend(
            figure,
            ([handle("Yes or No, as in the other figures", "|", INK)] if scored_too else [])
            + [handle(FORMATS.get(f, label(f)), MARKERS[k % 6], SERIES[k % 6]) for k, f in enumerate(names)],
            3,
        )
    return figure


def _sensitivity(row: InjectionRow) -> float | None:
    return row.sensitivity


def _injection_score(row: InjectionRow) -> float | None:
    return row.detection.score


def _bits(row: InjectionRow) -> float | None:
    return row.bits


def injection(control: Injection | None, published: dict[str, float], narrow: bool = False) -> Figure | None:
    """The positive control: how often the model says Yes, its detection score and what it says of the
    concept, by strength of the injection, for each framing; at strength 0 stand the false positives.

    `published`: {framing: sensitivity} of the published experiment, drawn as lines across.
    """
    if not control or not control.rows:
        return None
    # 1) a panel per measure
    framings = list(dict.fromkeys(row.framing for row in control.rows))
    panels = (
        ("says Yes (at 0: nothing injected)", _sensitivity),
        ("detection score (nats)", _injection_score),
        ("bits about the concept", _bits),
    )
    with rc_context(STYLE):
        figure = new_figure(6.6 if narrow else 2.9, narrow=narrow)
        stack = figure.subplots(*((len(panels), 1) if narrow else (1, len(panels))))
        for axes, (title, read) in zip(stack, panels, strict=True):
            axes.set_title(title, fontsize=9)
            axes.grid()
            axes.set_axisbelow(True)
            axes.set_xlabel("strength")
            # 2) a line per framing, with the score's intervals and what was published
            for k, framing in enumerate(framings):
                rows = sorted(
                    (row for row in control.rows if row.framing == framing),
                    key=lambda row: row.strength,
                )
                points = [(row.strength, read(row)) for row in rows]
                if read is _sensitivity:
                    points.insert(0, (0, rows[0].false_positive_rate))
                points = [(x, y) for x, y in points if y is not None]
                axes.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    MARKERS[k % 6] + "-",
                    color=SERIES[k % 6],
                    markersize=4.5,
                    linewidth=1.3,
                )
                for row in rows if read is _injection_score else ():
                    if row.detection.low is not None:
                        axes.plot(
                            [row.strength] * 2,
                            [row.detection.low, row.detection.high],
                            color=SERIES[k % 6],
                            linewidth=0.9,
                            alpha=0.6,
                        )
                if read is _sensitivity and framing in published:
                    axes.axhline(published[framing], color=SERIES[k % 6], linewidth=1, linestyle=(0, (3, 2)))
            # 3) each measure's own axis
            if read is _sensitivity:
                axes.set_ylim(-0.03, 1.03)
                axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
            elif read is _injection_score:
                axes.axhline(0, color=MUTED, linewidth=0.8)
            else:
                axes.set_ylim(bottom=-0.05)
        # 4) the legend
        handles = [
            Line2D(
                [],
                [],
                marker=MARKERS[k % 6],
                color=SERIES[k % 6],
                linewidth=1.3,
                markersize=4.5,
                label=f"{label(f)} question",
            )
            for k, f in enumerate(framings)
        ]
        if set(published) & set(framings):
            handles.append(
                Line2D(
                    [],
                    [],
                    color=MUTED,
                    linewidth=1,
                    linestyle=(0, (3, 2)),
                    label="published, 32B Instruct (see the caption)",
                )
            )
        legend(figure, handles, len(handles))
    return figure
