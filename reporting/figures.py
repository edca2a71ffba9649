"""What the figures share (style, verdict looks, saving) and the first of them: detection scores against the
placebos.

Deterministic, legible in grayscale: verdicts differ in color (Okabe and Ito 2008: told apart with any color
vision), in marker and in words. `rows` is always a Comparison's `experiments`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.comparison import DetectionScore, FormatScore, PlaceboBand, Row
from analysis.rows import UNCALLED, by_verdict, controls, many, named, score, sweeps, word

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
STYLE = {
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
NARROW_WIDTH, NARROW_ROW = 4.1, 0.33  # of a figure for a phone, where names stand above their lines
DPI = 300  # of the PNG
# of the log axes; what lies beyond is drawn at the edge, as an arrow
P_FLOOR, PERPLEXITY_CEILING = (
    1e-12,
    1e8,
)


def save(figure: Figure) -> dict[str, bytes]:
    """{"png", "pdf", "svg": contents}: the same bytes for the same numbers."""
    out = {}
    with rc_context(STYLE):
        FigureCanvasAgg(figure)
        for form, metadata in (
            ("svg", {"Date": None}),
            ("png", {"Software": None}),
            ("pdf", {"CreationDate": None, "Creator": None, "Producer": None}),
        ):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, dpi=DPI, metadata=metadata)
            if form == "svg":
                figure.set_layout_engine("none")  # laid out once; the other formats take it as it is
            out[form] = buffer.getvalue()
    return out


def label(name: str) -> str:
    """A name as matplotlib may draw it: short, printable, and not read as mathematics."""
    shown = "".join(c if c.isprintable() else "?" for c in name).replace("$", r"\$")
    return shown if len(shown) <= 40 else shown[:39] + "…"


def look(row: Row) -> tuple[str, str]:
    """(color, marker) of an experiment's verdict."""
    return VERDICTS.get(word(row), (INK, "s"))


def drawn(rows: Iterable[Row]) -> list[Row]:
    """The finished experiments that have a line each."""
    return [row for row in named(rows) if row.status == "done"]


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


def new_figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    # names beside the axes come out a little wider than they are laid out
    figure.get_layout_engine().set(w_pad=0.12)
    return figure


def lines(
    names: list[str], extra: float = 1.1, narrow: bool = False, width: float = WIDTH
) -> tuple[Figure, object]:
    """A figure with one line per name, the first on top; narrow: each name above its line."""
    row = NARROW_ROW if narrow else ROW if len(names) <= MANY else DENSE_ROW
    figure = new_figure(row * len(names) + extra, NARROW_WIDTH if narrow else width)
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), [""] * len(names) if narrow else [label(n) for n in names])
    if narrow:
        for line, name in enumerate(names):
            axes.annotate(
                label(name),
                (0, line),
                xycoords=("axes fraction", "data"),
                xytext=(1, 5),
                textcoords="offset points",
                fontsize=7.5,
                va="bottom",
                color=INK,
            )
    axes.set_ylim(len(names) - 0.4, -0.8 if narrow else -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    return figure, axes


def beside(axes, line: float, text: str, color: str) -> None:
    axes.annotate(
        text,
        (1, line),
        xycoords=("axes fraction", "data"),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=color,
        annotation_clip=False,
    )


def reach(values: list[float], least: float) -> float:
    return 1.15 * max([least, *map(abs, values)])


def limits(values: list[float], least: float) -> tuple[float, float]:
    """Ends of an axis that holds the values, zero, and `least` on both sides of it."""
    low, high = min([-least, *values]), max([least, *values])
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def interval(
    axes,
    score: DetectionScore | FormatScore,
    line: float,
    ends: tuple[float, float],
    color: str,
    marker: str,
    faint: bool = False,
    size: float = 6,
    width: float = 1.6,
) -> None:
    """One score with its interval on a line; an arrow at the edge where the score lies beyond it."""
    low, high = ends
    if not low <= score.score <= high:
        axes.plot(
            high if score.score > high else low,
            line,
            ">" if score.score > high else "<",
            color=color,
            markersize=size,
            clip_on=False,
            alpha=0.5 if faint else 1,
        )
        return
    if score.low is not None:
        axes.plot(
            [max(score.low, low), min(score.high, high)],
            [line, line],
            color=color,
            linewidth=width,
            solid_capstyle="butt",
            alpha=0.4 if faint else 0.9,
        )
    axes.plot(score.score, line, marker, color=color, markersize=size, zorder=3, alpha=0.5 if faint else 1)


def legend(figure: Figure, handles: list, columns: int) -> None:
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


def verdict_handles(rows: Iterable[Row]) -> list[Line2D]:
    """Legend entries of the verdicts that occur."""
    found = {word(row) for row in rows}
    return [handle(w, marker, color) for w, (color, marker) in VERDICTS.items() if w in found]


def log_axis(
    axis, values: list[float], show: Callable[[float], str] = lambda x: f"{x:,.0f}" if x >= 1 else f"{x:g}"
) -> None:
    """Make x or y of `axis` (an XAxis or YAxis) logarithmic, with ticks that say their number, not a power of
    ten alone."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    decades = math.log10(max(values) / min(values)) if values else 1
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,), numticks=9))
    axis.set_major_formatter(
        FuncFormatter(lambda x, _: show(x) if 1e-4 <= x < 1e5 else f"$10^{{{math.log10(x):.0f}}}$")
    )
    axis.set_minor_formatter(NullFormatter())


def scores(rows: Iterable[Row], placebo: PlaceboBand | None, narrow: bool = False) -> Figure | None:
    """Detection score of each experiment with its 95% interval (nats), against the placebos.

    Gray band: from the placebos' smallest score to their largest. Hollow: noise of the same perplexity. One
    strip of dots for the placebos and for each sweep. Without a score there is no line. None if nothing has a
    score.
    """
    shown = by_verdict([row for row in drawn(rows) if score(row) is not None])
    strips = {f"{name} ({len(of)})": of for name, of in sweeps(rows).items()}
    strips[many(len(controls(rows, "placebo")), "placebo")] = controls(rows, "placebo")
    strips = {
        name: known for name, of in strips.items() if (known := [row for row in of if score(row) is not None])
    }
    dots = [row for of in strips.values() for row in of]
    if not shown and not dots:
        return None
    sure = [row.detection for row in shown if word(row) not in UNCALLED]
    values = [x for d in sure for x in (d.low, d.high, d.matched_noise_score) if x is not None] + [
        score(row) for row in dots if word(row) not in UNCALLED
    ]
    low, high = limits(values, 0.2)
    with rc_context(STYLE):
        figure, axes = lines([row.name for row in shown] + list(strips), 1.6 if narrow else 1.1, narrow, 7.0)
        if placebo:
            axes.axvspan(placebo.low, placebo.high, color=BAND, zorder=0, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for line, row in enumerate(shown):
            interval(axes, row.detection, line, (low, high), *look(row), faint=word(row) in UNCALLED)
            if (twin := row.detection.matched_noise_score) is not None and low <= twin <= high:
                axes.plot(
                    twin, line, "D", markerfacecolor="white", markeredgecolor=MUTED, markersize=4.5, zorder=4
                )
        for line, row in ((line, row) for line, of in enumerate(strips.values(), len(shown)) for row in of):
            color, marker = look(row)
            axes.plot(
                max(low, min(high, score(row))),
                line,
                marker,
                color=color,
                markersize=3.5,
                alpha=0.55,
                markeredgewidth=0,
                clip_on=False,
            )
        axes.set_xlim(low, high)
        axes.set_xlabel("detection score (nats): shift toward noticing,\nbeyond what the controls predict")
        handles = verdict_handles([*shown, *dots])
        if any(row.detection.matched_noise_score is not None for row in shown):
            handles.append(handle("noise of equal perplexity", "D", MUTED, False))
        if placebo:
            handles.append(Patch(color=BAND, label="range of the placebos"))
        legend(figure, handles, 2 if narrow else 4)
    return figure
