"""matplotlib's SVG files, byte for byte, in half the time: a word is laid out once for all figures.

A run's figures say the same hundred names, in several sizes and colors. matplotlib lays a word out anew
wherever it stands, and writes each of its letters by some thirty calls.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from matplotlib.backend_bases import GraphicsContextBase
from matplotlib.backends.backend_mixed import MixedModeRenderer
from matplotlib.backends.backend_svg import FigureCanvasSVG, RendererSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

# what matplotlib writes of a word: its comment, its group, outlines that are new to the file, its letters
_WRITTEN = re.compile(
    r"( *)<!--.*?-->\n\1<g[^>]*>\n(?: *<defs>\n.*</defs>\n)?((?:\1 <use[^>]*/>\n)+)\1</g>\n", re.S
)
_OUTLINE = re.compile('xlink:href="#([^"]*)"')
LARGE = 100  # points in which the outlines of letters stand in a file


class _Letters(NamedTuple):
    """A word's letters as they stand in a file, and which outlines they are."""

    written: str
    outlines: frozenset[str]


_letters: dict[tuple[str, ...], _Letters] = {}  # by word and family of its font
_extents: dict[tuple, tuple[float, float, float]] = {}  # by text, font and whether it is mathematics


class _Pieces(list[str]):
    """What is written, as a file that nobody reads yet."""

    write = list.append


class Renderer(RendererSVG):
    """matplotlib's, for one figure, that knows again what words look like and how wide texts are."""

    def __init__(self, figure: Figure):
        self.pieces = _Pieces()
        self._outlines: set[str] = set()  # that are in this file, as far as words have brought them
        width, height = figure.get_size_inches() * 72
        super().__init__(width, height, self.pieces, metadata={"Date": None})

    def get_text_width_height_descent(self, s, prop, ismath):
        if (known := _extents.get((s, prop, ismath))) is None:
            known = super().get_text_width_height_descent(s, prop, ismath)
            _extents[s, prop.copy(), ismath] = known  # a text's own may be given another size later
        return known

    def draw_word(self, gc: GraphicsContextBase, x: float, y: float, word: str, font: FontProperties) -> None:
        """As draw_text does it with a word in an opaque color that is neither clipped nor mathematics."""
        start, name = len(self.pieces), (word, *font.get_family())
        known = _letters.get(name)
        # 1) as matplotlib does it, which writes no place of (0, 0); what it has written is kept
        if known is None or not known.outlines <= self._outlines or not (x or y):
            self.draw_text(gc, x, y, word, font, 0)
            if match := _WRITTEN.search("".join(self.pieces[start:])):
                indent, letters = match.groups()
                known = _Letters(letters.replace(f"{indent} <", "<"), frozenset(_OUTLINE.findall(letters)))
                _letters[name] = known
                self._outlines |= known.outlines
            return
        # 2) the same from what was kept
        self.writer.comment(word)
        indent = "".join(self.pieces[start:]).rpartition("<!--")[0].rpartition("\n")[2]
        color, scale = to_hex(gc.get_rgb()), _short(font.get_size_in_points() / LARGE)
        style = "" if color == "#000000" else f' style="fill: {color}"'
        place = f"translate({_short(x)} {_short(y)}) scale({scale} -{scale})"
        self.pieces.write(f'{indent}<g{style} transform="{place}">\n')
        self.pieces.write(known.written.replace("<", f"{indent} <"))
        self.pieces.write(f"{indent}</g>\n")


def _short(number: float) -> str:
    return f"{number:f}".rstrip("0").rstrip(".")


class Canvas(FigureCanvasSVG):
    """matplotlib's, which lays a figure out by our Renderer."""

    def get_renderer(self) -> Renderer:
        return Renderer(self.figure)

    def svg(self) -> bytes:
        """The figure as an SVG file, as print_svg writes it."""
        ours, (width, height) = self.get_renderer(), self.figure.get_size_inches()
        # which draws as pixels what asks for it: the colors of a colorbar
        renderer = MixedModeRenderer(self.figure, width, height, 72, ours)
        self.figure.draw(renderer)  # pyright: ignore[reportArgumentType]  it passes for one
        renderer.finalize()
        return "".join(ours.pieces).encode()
