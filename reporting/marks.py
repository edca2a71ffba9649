"""The points, intervals, bars and words of a figure, each kind drawn at once.

matplotlib makes, lays out and draws every Line2D, Text, tick and patch by itself, at a millisecond or more; a
run has some hundred of each in a figure. So points that look alike are one Line2D here, intervals one
LineCollection, bars one PolyCollection, and words one artist.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.transforms import Bbox, Transform

if TYPE_CHECKING:
    from matplotlib.typing import ColorType as Color


def _chevrons(way: int) -> Path:
    """Two filled chevrons, one before the other, that point to the right (1) or to the left (-1), with the
    foremost tip in the place of the marker."""
    one = [(0.0, 1.0), (0.4, 1.0), (1.0, 0.0), (0.4, -1.0), (0.0, -1.0), (0.6, 0.0)]
    corners = [[(way * (x + back), y) for x, y in [*one, one[0]]] for back in (-1.0, -1.9)]
    codes = [Path.MOVETO, *[Path.LINETO] * (len(one) - 1), Path.CLOSEPOLY]
    return Path(corners[0] + corners[1], codes * 2)


# The signs of what lies beyond an axis, at its lower and its upper end: no verdict and no series has them.
BELOW, ABOVE = _chevrons(-1), _chevrons(1)
SIGN = 2.2  # size of such a sign that is as tall as a marker of size 1


class _Look(NamedTuple):
    """What points share that are drawn at once."""

    marker: str | Path
    size: float
    color: Color
    face: Color
    edge: Color
    edge_width: float
    alpha: float | None
    zorder: float
    clip: bool


class Marks:
    """What stands in one axes, gathered by its methods and drawn by `draw`.

    x and y are in the axes' units; sizes and widths in points, `alpha` from 0 to 1.
    """

    def __init__(self, axes: Axes):
        self.axes = axes
        self._points: dict[_Look, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        self._lines: list[tuple[Sequence[float], Sequence[float], tuple, float]] = []
        self._bars: dict[tuple, list[tuple[list[tuple[float, float]], Color]]] = defaultdict(list)

    def point(
        self,
        x: float,
        y: float,
        marker: str | Path,
        color: Color,
        size: float = 6,
        *,
        face: Color | None = None,
        edge: Color | None = None,
        edge_width: float = 1,
        alpha: float | None = None,
        zorder: float = 2,
        clip: bool = True,
    ) -> None:
        """A marker; `clip`: whether its part beyond the axes is cut off."""
        look = _Look(marker, size, color, face or color, edge or color, edge_width, alpha, zorder, clip)
        for known, value in zip(self._points[look], (x, y), strict=True):
            known.append(value)

    def line(
        self, xs: Sequence[float], ys: Sequence[float], color: Color, width: float, alpha: float = 1
    ) -> None:
        """A line from one place to another, as of an interval."""
        self._lines.append((xs, ys, to_rgba(color, alpha), width))

    def bar(self, left: float, line: float, width: float, height: float, color: Color) -> None:
        """A bar around a line, without an edge."""
        self._bars[()].append((_corners(left, line, width, height), color))

    def hatched(self, left: float, line: float, width: float, height: float, hatch: str, color: str) -> None:
        """Hatches of this color in place of a bar, or over one."""
        self._bars[hatch, color].append((_corners(left, line, width, height), "none"))

    def draw(self) -> None:
        """Put all of it into the axes, whose limits then reach around it where they are not set."""
        for hatching, bars in self._bars.items():
            corners, colors = zip(*bars, strict=True)
            hatch, edge = hatching or (None, "none")
            self.axes.add_collection(
                PolyCollection(corners, facecolors=list(colors), edgecolors=edge, linewidths=0, hatch=hatch)
            )
        if self._lines:
            xs, ys, colors, widths = zip(*self._lines, strict=True)
            segments = [list(zip(x, y, strict=True)) for x, y in zip(xs, ys, strict=True)]
            self.axes.add_collection(
                LineCollection(segments, colors=list(colors), linewidths=list(widths), capstyle="butt")
            )
        for look, (xs, ys) in self._points.items():
            self.axes.plot(
                xs,
                ys,
                linestyle="",
                marker=look.marker,
                color=look.color,
                markersize=look.size,
                markerfacecolor=look.face,
                markeredgecolor=look.edge,
                alpha=look.alpha,
                zorder=look.zorder,
                clip_on=look.clip,
                markeredgewidth=look.edge_width,
            )
        self.axes.autoscale_view()


def _corners(left: float, line: float, width: float, height: float) -> list[tuple[float, float]]:
    low, high = line - height / 2, line + height / 2
    return [(left, low), (left + width, low), (left + width, high), (left, high)]


class Word(NamedTuple):
    """A text of one line and where it stands, which is not read as mathematics."""

    text: str
    place: tuple[float, float]
    """In the units of `within`."""
    within: Literal["data", "line", "axes"]
    """"line": the share of the axes' width, and a line's number."""
    offset: tuple[float, float]
    """Points from there."""
    across: Literal["left", "center", "right"]
    """Which part of the text stands there."""
    up: Literal["bottom", "center", "middle"]
    """"middle": of the letters without what hangs below the line."""
    size: float
    """Points."""
    color: str


class Words(Artist):
    """Many words in one artist. They may stand outside the axes; the figure's layout makes room for them."""

    def __init__(self, axes: Axes, zorder: float = 3):
        super().__init__()
        self.words: list[Word] = []
        self.set_zorder(zorder)
        axes.add_artist(self)
        self.set_clip_on(False)

    def say(
        self,
        text: str,
        place: tuple[float, float],
        within: Literal["data", "line", "axes"] = "data",
        offset: tuple[float, float] = (0, 0),
        across: Literal["left", "center", "right"] = "left",
        up: Literal["bottom", "center", "middle"] = "center",
        size: float = 8,
        color: str = "black",
    ) -> None:
        """Add a word; see Word."""
        if text:
            self.words.append(Word(text, place, within, offset, across, up, size, color))

    def _placed(self, renderer) -> list[tuple[Word, FontProperties, float, float, float, float, float]]:
        """(word, its font, left end, base line, width, height, what hangs below the line), in pixels. The
        heights are those of "lp", so that like words stand alike."""
        axes = self.axes
        assert axes is not None, "words stand in axes"
        transforms: dict[str, Transform] = {
            "data": axes.transData,
            "line": axes.get_yaxis_transform(),
            "axes": axes.transAxes,
        }
        fonts = {word.size: FontProperties(size=word.size) for word in self.words}
        heights = {
            size: renderer.get_text_width_height_descent("lp", font, False)[1:]
            for size, font in fonts.items()
        }
        # all of a kind at once
        ends = {
            within: iter(transform.transform([w.place for w in self.words if w.within == within]).tolist())
            for within, transform in transforms.items()
            if any(w.within == within for w in self.words)
        }
        pixels, out = renderer.points_to_pixels(1), []
        for word in self.words:
            font = fonts[word.size]
            width, *_ = renderer.get_text_width_height_descent(word.text, font, False)
            height, below = heights[word.size]
            x, y = next(ends[word.within])
            x += pixels * word.offset[0] - {"left": 0, "center": width / 2, "right": width}[word.across]
            y += pixels * word.offset[1]
            y += {"bottom": below, "center": below - height / 2, "middle": (below - height) / 2}[word.up]
            out.append((word, font, x, y, width, height, below))
        return out

    def get_window_extent(self, renderer=None) -> Bbox:
        if not self.words:
            return Bbox.null()
        if renderer is None:
            renderer = self.get_figure(root=True)._get_renderer()  # pyright: ignore
        places = self._placed(renderer)
        return Bbox.from_extents(
            min(x for _, _, x, *_ in places),
            min(y - below for *_, y, _, _, below in places),
            max(x + width for _, _, x, _, width, _, _ in places),
            max(y - below + height for *_, y, _, height, below in places),
        )

    def draw(self, renderer) -> None:
        if not self.get_visible():
            return
        canvas_height = renderer.get_canvas_width_height()[1]
        gc = renderer.new_gc()
        draw_word = getattr(renderer, "draw_word", None)  # reporting/svg.py has it
        for word, font, x, y, *_ in self._placed(renderer):
            gc.set_foreground(word.color)
            down = canvas_height - y if renderer.flipy() else y
            if draw_word is not None:
                draw_word(gc, x, down, word.text, font)
            else:
                renderer.draw_text(gc, x, down, word.text, font, 0)
        gc.restore()
        self.stale = False
