"""The figures of a run's report, as matplotlib figures: numbers of comparison.json in, nothing measured or written here.

Every figure takes the rows of `compare.compare` and returns None where there is nothing to draw. Verdicts differ in color
(Okabe and Ito 2008: told apart with any color vision), in marker and in words.
"""

from __future__ import annotations

import io
import math
import re

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation, PercentFormatter

MUTED, FAINT, INK = "#5b6470", "#c9ced6", "#1d232b"
VERDICTS = {"detects": ("#0072B2", "^"), "denies": ("#D55E00", "v"), "no evidence": (MUTED, "o"), "not measurable": ("#7d8693", "x")}
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED, "axes.labelcolor": INK,
         "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.frameon": False,
         "legend.fontsize": 8, "grid.color": "#eceff3", "font.family": "DejaVu Sans", "pdf.fonttype": 42, "svg.hashsalt": "figure"}
WIDTH, ROW = 8.4, 0.25  # inches
P_FLOOR, PERPLEXITY_CEILING = 1e-12, 1e8  # of the log axes; what lies beyond is drawn at the edge, as an arrow


def save(figure: Figure) -> dict[str, bytes]:
    """{"png", "pdf", "svg": contents}: the same bytes for the same numbers."""
    out = {}
    with rc_context(STYLE):
        FigureCanvasAgg(figure)
        for form, metadata in (("svg", {"Date": None}), ("png", {"Software": None}), ("pdf", {"CreationDate": None, "Creator": None, "Producer": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, dpi=150, metadata=metadata)
            if form == "svg":
                figure.set_layout_engine("none")  # laid out once; the other formats take it as it is
            out[form] = buffer.getvalue()
    return out


def label(name: str) -> str:
    """A name as matplotlib may draw it: short, printable, and not read as mathematics."""
    shown = "".join(c if c.isprintable() else "?" for c in name).replace("$", r"\$")
    return shown if len(shown) <= 40 else shown[:39] + "…"


def window(row: dict) -> tuple[str, int, int] | None:
    """(source, first layer, layer after the last) of a sweep's experiment, else None."""
    found = re.fullmatch(r"window_(\w+)_(\d+)_(\d+)", row["name"])
    return (found[1], int(found[2]), int(found[3])) if found else None


def _rows(rows: list[dict]) -> list[dict]:
    """The experiments of the figures with a line each: sweeps have a figure of their own."""
    return [row for row in rows if row["status"] == "done" and not window(row)]


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)  # names beside the axes come out a little wider than they are laid out
    return figure


def _lines(names: list[str], extra: float = 1.1) -> tuple[Figure, object]:
    """A figure with one line per name, the first on top."""
    figure = _figure(ROW * len(names) + extra)
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), [label(n) for n in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    return figure, axes


def _beside(axes, line: int, text: str, color: str) -> None:
    axes.annotate(text, (1, line), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8,
                  color=color, annotation_clip=False)


def _reach(values: list[float], least: float) -> float:
    return 1.15 * max([least, *map(abs, values)])


def _legend(axes, handles: list, columns: int) -> None:
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.3, handletextpad=0.5, columnspacing=1.4)


def _handle(text: str, marker: str, color: str, filled: bool = True) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, color=color, markerfacecolor=color if filled else "white", label=text, markersize=6)


def detection(rows: list[dict]) -> Figure | None:
    """Forest plot: detection score with its 95% interval, nats."""
    shown = [row for row in _rows(rows) if row["detection"]]
    if not shown:
        return None
    called = [row["detection"] for row in shown if row["detection"]["call"] != "not measurable"]
    with rc_context(STYLE):
        figure, axes = _lines([row["name"] for row in shown])
        reach = _reach([edge for d in called for edge in (d["low"], d["high"])], 0.5)
        axes.axvspan(-0.1, 0.1, color="#f3f5f8", zorder=0)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for line, row in enumerate(shown):
            d = row["detection"]
            color, marker = VERDICTS[d["call"]]
            if d["score"] is not None and abs(d["score"]) <= reach:
                axes.plot([max(d["low"], -reach), min(d["high"], reach)], [line, line], color=color, linewidth=1.6, solid_capstyle="butt")
                axes.plot(d["score"], line, marker, color=color, markersize=6)
            elif d["score"] is not None:
                axes.plot(math.copysign(reach, d["score"]), line, ">" if d["score"] > 0 else "<", color=color, clip_on=False)
            after = f", keyed after {d['keyed_after']:+.2f}" if d["call"] == "detects" else ""
            _beside(axes, line, d["call"] + after, color)
        axes.set_xlim(-reach, reach)
        axes.set_xlabel("detection score (nats): shift toward noticing, beyond what the controls predict")
    return figure


def p_yes(rows: list[dict], published: dict[str, float]) -> Figure | None:
    """P(Yes) on the published probe, log axis; the size of a marker is the Yes+No mass, hollow is not an answer."""
    shown = [row for row in _rows(rows) if row["published_probe"] and row["published_probe"]["p_yes_normalized"] is not None]
    if not shown:
        return None
    with rc_context(STYLE):
        figure, axes = _lines([row["name"] for row in shown], 1.4)
        values = []
        for line, row in enumerate(shown):
            probe = row["published_probe"]
            p, mass = max(probe["p_yes_normalized"], P_FLOOR), probe["mass"] or 0
            values.append(p)
            axes.scatter(p, line, s=12 + 100 * mass, marker="o" if p > P_FLOOR else "<", edgecolor=SERIES[0], zorder=3, linewidth=1.2,
                         facecolor=SERIES[0] if probe["answered"] else "white")
            _beside(axes, line, f"mass {100 * mass:.2g}%" + ("" if probe["answered"] else ", not an answer"), INK if probe["answered"] else MUTED)
            if row["name"] in published:
                values.append(published[row["name"]])
                axes.plot(published[row["name"]], line, "D", markerfacecolor="white", markeredgecolor=SERIES[1], markersize=5, zorder=4)
        axes.set_xscale("log")
        axes.set_xlim(min([1e-3, *values]) / 3, 1.5)
        axes.grid(axis="x")
        axes.set_xlabel("P(Yes), normalized over Yes and No")
        handles = [_handle("this run; larger: more Yes+No mass", "o", SERIES[0]), _handle("under 1% mass: not an answer", "o", SERIES[0], False)]
        if any(row["name"] in published for row in shown):
            handles.append(_handle("published, 32B pair", "D", SERIES[1], False))
        _legend(axes, handles, 3)
    return figure


def capability(rows: list[dict]) -> Figure | None:
    """Share of capability items right, with its Wilson interval, against perplexity on a log axis."""
    shown = [row for row in _rows(rows) if row["capability"] and row["perplexity"] and row["perplexity"]["perplexity"] is not None and row["capability"]["n"]]
    if not shown:
        return None
    shown.sort(key=lambda row: (-row["capability"]["correct"] / row["capability"]["n"], row["perplexity"]["perplexity"]))
    with rc_context(STYLE):
        figure = _figure(max(3.6, 0.19 * len(shown) + 1))
        axes = figure.subplots()
        axes.set_xscale("log")
        for place, row in enumerate(shown):
            c, x = row["capability"], min(row["perplexity"]["perplexity"], PERPLEXITY_CEILING)
            y = c["correct"] / c["n"]
            color, marker = VERDICTS[row["detection"]["call"]] if row["detection"] else (INK, "s")
            axes.plot([x, x], [c["low"], c["high"]], color=color, linewidth=0.9, alpha=0.45)
            axes.plot(x, y, marker if x < PERPLEXITY_CEILING else ">", color=color, markersize=6, zorder=3)
            # Names stand in the right margin in the order of the points: they cannot overlap, however close the points.
            height = 0.5 if len(shown) == 1 else 1 - place / (len(shown) - 1)
            axes.annotate(label(row["name"]), (x, y), xytext=(1.06, height), textcoords="axes fraction", va="center", fontsize=8, color=color,
                          arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 2, "shrinkB": 4, "relpos": (0, 0.5)},
                          annotation_clip=False)
        axes.grid()
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=-0.03)  # a model that gets nothing right is to be seen
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.set_xlabel("perplexity")
        axes.set_ylabel("capability items right")
        found = {row["detection"]["call"] for row in shown if row["detection"]}
        _legend(axes, [_handle(v, m, c) for v, (c, m) in VERDICTS.items() if v in found] + [_handle("no verdict", "s", INK)], 5)
    return figure


GROUPS = {("introspective", "yes"): ("introspective, Yes would mean noticing", "o", "#0072B2", True),
          ("introspective", "no"): ("introspective, No would mean noticing", "o", "#D55E00", True),
          ("control", "yes"): ("control, Yes is right", "s", "#0072B2", False),
          ("control", "no"): ("control, No is right", "s", "#D55E00", False)}


def shifts(rows: list[dict], groups: dict[str, dict[tuple[str, str], float]]) -> Figure | None:
    """Mean shift of log-odds(Yes:No) from the baseline for each group of probes: {experiment: {(kind, keyed): nats}}."""
    shown = [row for row in _rows(rows) if groups.get(row["name"])]
    if not shown:
        return None
    called = [row for row in shown if row["detection"] and row["detection"]["call"] != "not measurable"]
    with rc_context(STYLE):
        figure, axes = _lines([row["name"] for row in shown], 1.5)
        reach = _reach([v for row in called or shown for v in groups[row["name"]].values()], 0.5)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for line, row in enumerate(shown):
            faint = row not in called
            for (kind, keyed), value in groups[row["name"]].items():
                _, marker, color, filled = GROUPS[kind, keyed]
                if abs(value) > reach:
                    value, marker = math.copysign(reach, value), ">" if value > 0 else "<"
                # A little apart: groups that move alike would hide each other.
                axes.plot(value, line + (0.13 if kind == "control" else -0.13), marker, color=color, markersize=5.5, clip_on=False,
                          markerfacecolor=color if filled else "white", alpha=0.3 if faint else 0.95, zorder=3)
            if faint:
                _beside(axes, line, "not measurable", VERDICTS["not measurable"][0])
        axes.set_xlim(-reach, reach)
        axes.set_xlabel("mean shift of log-odds(Yes : No) from the baseline (nats)")
        _legend(axes, [_handle(*look) for look in GROUPS.values()], 2)
    return figure


def depth(rows: list[dict], layers: int, published: dict[str, float]) -> Figure | None:
    """Sweeps: detection score, P(Yes) and perplexity of each replaced window along depth."""
    swept = [(window(row), row) for row in rows if row["status"] == "done" and window(row)]
    baseline = next((row for row in rows if row["name"] == "baseline_instruct" and row["status"] == "done"), {})

    def perplexity(row):
        return min(row["perplexity"]["perplexity"] or PERPLEXITY_CEILING, PERPLEXITY_CEILING) if row.get("perplexity") else None

    def probe(row):
        p = (row.get("published_probe") or {}).get("p_yes_normalized")
        return None if p is None else max(p, P_FLOOR)

    panels = [("detection score (nats)", lambda row: (row.get("detection") or {}).get("score"), False), ("P(Yes)", probe, True),
              ("perplexity", perplexity, True)]
    panels = [panel for panel in panels if any(panel[1](row) is not None for _, row in swept)]
    if not panels:
        return None
    kinds = list(dict.fromkeys((source, stop - start) for (source, start, stop), _ in swept))
    with rc_context(STYLE):
        figure = _figure(1.9 * len(panels) + 0.6)
        stack = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, read, log) in zip(stack, panels, strict=True):
            if log:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(LogFormatterSciNotation())
            axes.grid()
            axes.set_axisbelow(True)
            axes.set_ylabel(title)
            for (source, start, stop), row in swept:
                value = read(row)
                if value is None:
                    continue
                color = SERIES[kinds.index((source, stop - start)) % len(SERIES)]
                weak = (row["detection"] or {}).get("call") == "not measurable" if title.startswith("detection") else (
                    title == "P(Yes)" and not row["published_probe"]["answered"])
                axes.plot([start + 0.08, stop - 0.08], [value, value], color=color, linewidth=2.2, alpha=0.3 if weak else 1, solid_capstyle="butt")
                if title.startswith("detection"):
                    d = row["detection"]
                    axes.plot([(start + stop) / 2] * 2, [d["low"], d["high"]], color=color, linewidth=0.8, alpha=0.3 if weak else 0.8)
                if title == "P(Yes)" and row["name"] in published:
                    axes.plot((start + stop) / 2, published[row["name"]], "D", markerfacecolor="white", markeredgecolor=INK, markersize=5)
            level = 0.0 if title.startswith("detection") else read(baseline)
            if level is not None:
                axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        stack[-1].set_xlim(0, layers)
        stack[-1].set_xlabel("layer")
        handles = [Line2D([], [], color=SERIES[k % len(SERIES)], linewidth=2.2, label=f"{width} layer{'s' * (width > 1)} of {label(source)}")
                   for k, (source, width) in enumerate(kinds)]
        handles.append(Line2D([], [], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label="baseline"))
        if any(row["name"] in published for _, row in swept):
            handles.append(_handle("published, 32B pair", "D", INK, False))
        _legend(stack[0], handles, 4)
    return figure
