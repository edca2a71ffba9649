"""What the figures share (style, verdict looks, saving) and the first of them: detection scores against the
placebos.

Deterministic, legible in grayscale: verdicts differ in color (Okabe and Ito 2008: told apart with any color
vision), in marker and in words. `rows` is always a Comparison's `experiments`.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from analysis.comparison import DetectionScore, FormatScore, PlaceboBand, PublishedProbe, Row
from analysis.rows import UNCALLED, by_verdict, controls, named, score, scored, sweeps, word
from errors import many
from reporting.marks import ABOVE, BELOW, SIGN, Marks, Words
from reporting.svg import Canvas

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

MUTED, FAINT, INK, BAND = "#5b6470", "#c9ced6", "#1d232b", "#dde2e8"
VERDICTS = {
    "reports it": ("#0072B2", "^"),
    "denies it": ("#2F7FA8", "v"),
    "answers drift towards Yes": ("#C65500", ">"),
    "answers drift towards No": ("#8A6500", "<"),
    "does not report it": (MUTED, "o"),
    "no change to report": (MUTED, "h"),
    "too little data": ("#9A6C9E", "d"),
    "broken": (INK, "X"),
}
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: dict[RcKeyType, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "grid.color": "#eceff3",
    "font.family": "DejaVu Sans",
    "pdf.fonttype": 42,
    "svg.hashsalt": "figure",
    "hatch.linewidth": 0.6,
}
WIDTH, ROW = 8.4, 0.23  # inches
MANY, DENSE_ROW = 40, 0.175  # where a figure has more lines than this, they stand closer
MOST = 121  # lines in a figure that can still be looked over
NARROW_WIDTH, NARROW_ROW = 4.1, 0.33  # of a figure for a phone, where names stand above their lines
DPI = 300  # of the PNG
# of the log axes; what lies beyond is a sign at the edge (marks.BELOW, marks.ABOVE)
P_FLOOR, PERPLEXITY_CEILING = (
    1e-12,
    1e8,
)


def save(figure: Figure, forms: Sequence[str] = ("svg",)) -> dict[str, bytes]:
    """{form: contents}: the same bytes for the same numbers."""
    out = {}
    with rc_context(STYLE):
        canvas = Canvas(figure)
        # laid out once and drawn once in each form: savefig draws twice, the first time to lay it out
        figure.set_dpi(72)
        if (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
            figure.set_layout_engine("none")
        if "svg" in forms:
            out["svg"] = canvas.svg()
        for form, dpi, metadata in (
            ("png", DPI, {"Software": None}),
            ("pdf", 72, {"CreationDate": None, "Creator": None, "Producer": None}),
        ):
            if form in forms:
                buffer = io.BytesIO()
                figure.set_dpi(dpi)
                getattr(_canvas(form)(figure), f"print_{form}")(buffer, metadata=metadata)
                out[form] = buffer.getvalue()
    return out


def _canvas(form: str) -> type[FigureCanvasBase]:
    """What draws a figure in a form that a page does without, read where it is asked for."""
    if form == "png":
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        return FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    return FigureCanvasPdf


def short(name: str) -> str:
    """A name as a figure has room for it, printable."""
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return shown if len(shown) <= 40 else shown[:39] + "…"


def label(name: str) -> str:
    """The same for matplotlib's own texts, which read what stands between dollars as mathematics."""
    return short(name).replace("$", r"\$")


def look(row: Row) -> tuple[str, str]:
    """(color, marker) of an experiment's verdict."""
    return VERDICTS.get(word(row) or "", (INK, "s"))


def drawn(rows: Iterable[Row]) -> list[Row]:
    """The finished experiments that have a line each: of more than MOST, the first, which is the unmodified
    model, and those with the lowest and the highest scores. Their order stays."""
    done = [row for row in named(rows) if row.status == "done"]
    if len(done) <= MOST:
        return done
    sure = sorted(
        (value, place)
        for place, row in enumerate(done)
        if word(row) not in UNCALLED and (value := score(row)) is not None
    )
    half = (MOST - 1) // 2
    kept = {0, *(place for _, place in [*sure[:half], *sure[-half:]])}
    rest = (place for place in range(len(done)) if place not in kept)
    kept |= set(itertools.islice(rest, MOST - len(kept)))
    return [done[place] for place in sorted(kept)]


def left_out(rows: Iterable[Row]) -> str:
    """In a sentence, which of a large run's experiments have a line in figures; nothing where all have."""
    total = sum(row.status == "done" for row in named(rows))
    if total <= MOST:
        return ""
    return (
        f"{MOST} of {total:,} experiments have a line of their own in figures: the first, and those with the"
        " lowest and the highest detection scores that can be called. The tables have all."
    )


def perplexity(row: Row) -> float | None:
    """Perplexity as drawn: what is infinite or undefined stands at the ceiling; None where it was not
    measured."""
    return (
        min(row.perplexity.perplexity or PERPLEXITY_CEILING, PERPLEXITY_CEILING) if row.perplexity else None
    )


def p_yes(row: Row) -> float | None:
    """P(Yes) on the published probe, as drawn."""
    p = row.published_probe.p_yes_normalized if row.published_probe else None
    return None if p is None else max(p, P_FLOOR)


def answers(rows: Iterable[Row]) -> list[tuple[Row, PublishedProbe, float]]:
    """The experiments with a P(Yes) on the published probe, in order: (row, its probe, P(Yes) as drawn)."""
    return [
        (row, probe, p) for row in rows if (probe := row.published_probe) and (p := p_yes(row)) is not None
    ]


def new_figure(height: float, width: float = WIDTH, narrow: bool = False) -> Figure:
    """An empty figure of this size in inches; narrow: as wide as a phone shows it legibly."""
    width = NARROW_WIDTH if narrow else width
    # names beside the axes come out a little wider than they are laid out
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12))


def lines(
    names: list[str],
    extra: float = 1.1,
    narrow: bool = False,
    width: float = WIDTH,
    ruled: bool = True,
) -> tuple[Figure, Axes]:
    """A figure with one line per name, the first on top; narrow: each name above its line."""
    wide_row = ROW if len(names) <= MANY else DENSE_ROW
    row = NARROW_ROW if narrow else wide_row
    figure = new_figure(row * len(names) + extra, NARROW_WIDTH if narrow else width)
    axes = figure.subplots()
    name_lines(axes, names, narrow, ruled)
    return figure, axes


def name_lines(axes: Axes, names: Sequence[str], narrow: bool = False, ruled: bool = True) -> None:
    """One horizontal line per name, the first on top; narrow: each name above its line. `ruled`: the lines
    are to be seen."""
    axes.set_yticks([])
    words = Words(axes)
    for line, name in enumerate(names):
        if narrow:
            words.say(short(name), (0, line), "line", (1, 5), "left", "bottom", 7.5, INK)
        else:
            words.say(short(name), (0, line), "line", (-3.5, 0), "right", "middle", 9, INK)
    axes.set_ylim(len(names) - 0.4, -0.8 if narrow else -0.6)
    if ruled:
        axes.add_collection(
            LineCollection(
                [[(0, line), (1, line)] for line in range(len(names))],
                colors=STYLE["grid.color"],
                linewidths=0.8,
                transform=axes.get_yaxis_transform(),
                zorder=0.5,
            ),
            autolim=False,
        )
    axes.set_axisbelow(True)


def beside(words: Words, line: float, text: str, color: str, narrow: bool = False) -> None:
    """A word to the right of a line; narrow: above its end, across from the name."""
    if narrow:
        words.say(text, (1, line), "line", (0, 5), "right", "bottom", 7, color)
    else:
        words.say(text, (1, line), "line", (8, 0), "left", "center", 8, color)


def reach(values: Sequence[float], least: float) -> float:
    return 1.15 * max([least, *map(abs, values)])


def limits(values: Sequence[float], least: float) -> tuple[float, float]:
    """Ends of an axis that holds the values, zero, and `least` on both sides of it."""
    low, high = min([-least, *values]), max([least, *values])
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def interval(
    marks: Marks,
    score: DetectionScore | FormatScore,
    line: float,
    ends: tuple[float, float],
    color: str,
    marker: str,
    faint: bool = False,
    size: float = 6,
    width: float = 1.6,
    words: Words | None = None,
) -> None:
    """One score with as much of its interval as the axis reaches. A score beyond the axis is a sign at its
    end, never faint, with its number beside it in `words`."""
    low, high = ends
    value = score.score
    assert value is not None, "only what has a score is drawn"
    reached = ends
    if score.low is not None and score.high is not None:
        reached = max(score.low, low), min(score.high, high)
        if reached[0] < reached[1]:
            marks.line(reached, (line, line), color, width, 0.4 if faint and low <= value <= high else 0.9)
    if low <= value <= high:
        marks.point(value, line, marker, color, size, alpha=0.5 if faint else 1, zorder=3)
        return
    beyond(marks, value, line, ends, color, size)
    if words is not None:
        seen = score.low is not None and reached[0] < reached[1]
        number_at_end(words, f"{value:+.2f}", value, line, ends, color, below=seen)


def beyond(
    marks: Marks, value: float, line: float, ends: tuple[float, float], color: str, size: float = 6
) -> None:
    """The sign of a value beyond the axis, at that end of it."""
    edge, sign = (ends[1], ABOVE) if value > ends[1] else (ends[0], BELOW)
    marks.point(edge, line, sign, color, SIGN * size, edge_width=0, zorder=4, clip=False)


def number_at_end(
    words: Words,
    text: str,
    value: float,
    line: float,
    ends: tuple[float, float],
    color: str,
    below: bool = False,
) -> None:
    """What is said of a value beyond the axis, inside it beside the sign; below the line where an interval is
    drawn there."""
    right = value > ends[1]
    offset = (-12 if right else 12, -8 if below else 0)
    words.say(
        text,
        (ends[right], line),
        "data",
        offset,
        "right" if right else "left",
        "bottom" if below else "center",
        7,
        color,
    )


def legend(figure: Figure, handles: Sequence[Artist], columns: int) -> None:
    """Above the figure, in at most so many columns: in one or two where the figure is narrow."""
    if figure.get_figwidth() <= NARROW_WIDTH:
        longest = max((len(str(h.get_label())) for h in handles), default=0)
        columns = min(columns, 2 if longest < 26 else 1)
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=columns,
        borderaxespad=0.3,
        handletextpad=0.5,
        columnspacing=1.4,
    )


def handle(text: str, marker: str, color: str, filled: bool = True) -> Line2D:
    return Line2D(
        [],
        [],
        linestyle="",
        marker=marker,
        color=color,
        markerfacecolor=color if filled else "white",
        label=text,
        markersize=6,
    )


def verdict_handles(rows: Iterable[Row]) -> list[Artist]:
    """Legend entries of the verdicts that occur."""
    words = {word(row) for row in rows}
    return [handle(w, marker, color) for w, (color, marker) in VERDICTS.items() if w in words]


def band_handle(placebo: PlaceboBand) -> Patch:
    """The legend entry of the placebos' scores."""
    return Patch(color=BAND, label="the one placebo" if placebo.n == 1 else "range of the placebos")


def log_axis(
    axis: XAxis | YAxis,
    values: Sequence[float],
    show: Callable[[float], str] = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}",
) -> None:
    """Make x or y of `axis` (an XAxis or YAxis) logarithmic, with ticks that say their number, not a power of
    ten alone. Around values that are all but one it reaches from half to twice."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    if values and max(values) < 1.1 * min(values):
        # matplotlib would leave a width of one rounding, under ticks that no layout has room for
        getattr(axis.axes, f"set_{axis.axis_name}lim")(min(values) / 2, 2 * max(values))
    decades = math.log10(max(values) / min(values)) if values else 1
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,), numticks=9))
    axis.set_major_formatter(
        FuncFormatter(lambda x, _: show(x) if 1e-4 <= x < 1e5 else f"$10^{{{math.log10(x):.0f}}}$")
    )
    if decades < 2.2:
        axis.set_minor_formatter(NullFormatter())
    else:  # eight ticks a decade, each as much work as a name
        axis.set_minor_locator(NullLocator())


def name_ends(
    words: Words, line: int, dots: Sequence[tuple[Row, DetectionScore, float]], ends: tuple[float, float]
) -> None:
    """Name the lowest and the highest dot of a sweep's strip, above the strip."""
    if len(dots) < 2 or not dots[0][0].sweep:
        return
    by_score = sorted(dots, key=lambda dot: dot[2])
    lowest, highest = (
        (short(row.name), max(ends[0], min(ends[1], value))) for row, _, value in (by_score[0], by_score[-1])
    )
    words.say(lowest[0], (lowest[1], line), "data", (8, 3), "right", "bottom", 6, MUTED)
    words.say(highest[0], (highest[1], line), "data", (-8, 3), "left", "bottom", 6, MUTED)


def strip_ends(
    marks: Marks,
    words: Words,
    line: int,
    dots: Sequence[tuple[Row, DetectionScore, float]],
    ends: tuple[float, float],
) -> None:
    """What of a strip's dots lies beyond the axis: at either end a sign in the color of the farthest, and
    its score, after how many there are."""
    for of, farthest in (
        ([dot for dot in dots if dot[2] < ends[0]], min),
        ([dot for dot in dots if dot[2] > ends[1]], max),
    ):
        if of:
            row, _, value = farthest(of, key=lambda dot: dot[2])
            beyond(marks, value, line, ends, look(row)[0])
            number = f"{value:+.2f}" if len(of) == 1 else f"{len(of)}, to {value:+.2f}"
            number_at_end(words, number, value, line, ends, look(row)[0])


def scores(rows: Iterable[Row], placebo: PlaceboBand | None, narrow: bool = False) -> Figure | None:
    """Detection score of each experiment with its 95% interval (nats), against the placebos.

    Gray band: from the placebos' smallest score to their largest. Hollow: noise of the same perplexity. One
    strip of dots for the placebos and for each sweep. Without a score there is no line. What is broken or of
    too little data does not stretch the axis: a score beyond it is a sign at its end, with its number. None
    if nothing has a score.
    """
    shown = scored(by_verdict(drawn(rows)))
    groups = {f"{name} ({len(of)})": of for name, of in sweeps(rows).items()}
    groups[many(len(controls(rows, "placebo")), "placebo")] = controls(rows, "placebo")
    strips = {name: known for name, of in groups.items() if (known := scored(of))}
    dots = [dot for of in strips.values() for dot in of]
    if not shown and not dots:
        return None
    # of a run in which nothing could be called, all of them
    sure = {id(row) for row, *_ in [*shown, *dots] if word(row) not in UNCALLED}
    sure = sure or {id(row) for row, *_ in [*shown, *dots]}
    values = [
        x
        for row, d, _ in shown
        for x in (d.low, d.high, d.matched_noise_score)
        if id(row) in sure and x is not None
    ] + [value for row, _, value in dots if id(row) in sure]
    low, high = limits(values, 0.2)
    with rc_context(STYLE):
        figure, axes = lines(
            [row.name for row, *_ in shown] + list(strips), 1.6 if narrow else 1.1, narrow, 7.0
        )
        if placebo:
            axes.axvspan(placebo.low, placebo.high, color=BAND, zorder=0, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        marks, words = Marks(axes), Words(axes)
        for line, (row, d, _) in enumerate(shown):
            interval(marks, d, line, (low, high), *look(row), faint=word(row) in UNCALLED, words=words)
            if (twin := d.matched_noise_score) is not None and low <= twin <= high:
                marks.point(twin, line, "D", MUTED, 4.5, face="white", zorder=4)
        for line, dots_of in enumerate(strips.values(), len(shown)):
            for row, _, value in dots_of:
                color, marker = look(row)
                if low <= value <= high:
                    marks.point(value, line, marker, color, 3.5, edge_width=0, alpha=0.55, clip=False)
            strip_ends(marks, words, line, dots_of, (low, high))
            if not narrow:  # where the names of the lines stand in that place
                name_ends(words, line, dots_of, (low, high))
        marks.draw()
        axes.set_xlim(low, high)
        axes.set_xlabel("detection score (nats): shift toward noticing,\nbeyond what the controls predict")
        handles = verdict_handles(row for row, *_ in [*shown, *dots])
        if any(d.matched_noise_score is not None for _, d, _ in shown):
            handles.append(handle("noise of equal perplexity", "D", MUTED, False))
        if placebo:
            handles.append(band_handle(placebo))
        legend(figure, handles, 2 if narrow else 4)
    return figure
