"""Figures draw the numbers they are given, at their places, and tell verdicts apart without color. Rows are
made up."""

import io
import itertools
import math
from dataclasses import replace

import made_rows as made
import made_study
import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import RendererSVG
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from analysis import published
from analysis.comparison import FormatScore, Injection
from reporting import figures, figures_experiments, figures_sweeps, svg
from reporting.marks import ABOVE, BELOW, Words

ROWS = made_study.study_rows()
PLACEBO = made.comparison(ROWS).placebo
BY_NAME = {row.name: row for row in ROWS}


def words(axes):
    """What stands in and beside the axes, but for what matplotlib itself writes."""
    return [word for artist in axes.artists if isinstance(artist, Words) for word in artist.words]


def labels(axes):
    """The names of the lines, from the top; of axes without any, what matplotlib writes at its ticks."""
    return [w.text for w in words(axes) if w.within == "line" and w.place[0] == 0] or [
        t.get_text() for t in axes.get_yticklabels()
    ]


def dots(axes):
    """(x, y, the line that they were drawn as) of every marker that stands by itself."""
    return [
        (float(x), float(y), line)
        for line in axes.lines
        if line.get_linestyle() == "None"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def points(axes, line, hollow=False):
    """(x, marker) of the single points on one line of a figure; hollow or filled ones."""
    return [
        (x, p.get_marker())
        for x, y, p in dots(axes)
        if y == line and (p.get_markerfacecolor() == "white") == hollow
    ]


def segments(axes):
    """((x, y), (x, y)) of every interval."""
    return [
        tuple(map(tuple, np.asarray(ends).tolist()))
        for c in axes.collections
        if isinstance(c, LineCollection)
        and c.get_transform().contains_branch(axes.transData)
        and c.get_capstyle() == "butt"
        for ends in c.get_segments()
    ]


def test_scores_stand_with_their_intervals_among_the_placebos():
    (axes,) = figures.scores(ROWS, PLACEBO).axes
    names = labels(axes)
    # by verdict, then by score
    assert names[:3] == [
        "franken_instruct_first_32",
        "blend_linear",
        "franken_base_first_32",
    ]
    # two broken ones have no score; nine sweeps
    assert names[-1] == "21 placebos" and len(names) == 10 + 9 + 1
    assert points(axes, 0) == [(0.62, "^")] and points(axes, 0, hollow=True) == [
        (BY_NAME["franken_instruct_first_32"].detection.matched_noise_score, "D")
    ]
    assert any(
        (a, b) == pytest.approx((0.5, 0.74)) and line == other == 0
        for (a, line), (b, other) in segments(axes)
    )
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (band.x0, band.x1) == pytest.approx((PLACEBO.low, PLACEBO.high))
    dots = [x for x, _ in points(axes, len(names) - 1)]
    assert sorted(dots) == pytest.approx(sorted(PLACEBO.scores.values()))
    assert len(points(axes, names.index("windows of 8 layers of base (12)"))) == 12
    beyond = points(axes, names.index("swap_chunk_25_35_with_45_55"))
    assert beyond == [(axes.get_xlim()[1], ABOVE)]  # broken: its score does not stretch the axis


def test_a_score_beyond_the_axis_is_told_with_its_number_and_what_there_is_of_its_interval():
    reaching, beyond = made.found_score(-1.4, 1.3, "too little data"), made.found_score(3.2)
    rows = [
        *ROWS,
        made.row("low", "too little data", -1.4, detection=reaching),
        made.row("high", "broken", 3.2, detection=beyond),
    ]
    (axes,) = figures.scores(rows, PLACEBO).axes
    low, high = axes.get_xlim()
    lines = {name: labels(axes).index(name) for name in ("low", "high")}
    # 1) a sign at the end that no verdict has, in the whole color of its own
    assert not {BELOW, ABOVE} & {marker for _, marker in figures.VERDICTS.values()}
    for name, at, sign in (("low", low, BELOW), ("high", high, ABOVE)):
        (drawn,) = [p for x, y, p in dots(axes) if y == lines[name]]
        assert points(axes, lines[name]) == [(at, sign)] and drawn.get_alpha() is None
        assert drawn.get_color() == figures.VERDICTS["broken" if name == "high" else "too little data"][0]
    # 2) its number, within the axis, below an interval that is drawn there
    said = {w.place[1]: w for w in words(axes) if w.within == "data" and w.place[1] in lines.values()}
    assert [said[lines[name]].text for name in lines] == ["-1.40", "+3.20"]
    assert [said[lines[name]].across for name in lines] == ["left", "right"]
    assert [said[lines[name]].offset[1] < 0 for name in lines] == [True, False]
    # 3) the part of the interval that the axis reaches
    seen = [(a, b) for (a, y), (b, _) in segments(axes) if y in lines.values()]
    assert seen == [pytest.approx((low, -0.1))]


def test_what_a_strip_has_beyond_the_axis_is_counted_at_its_end():
    swept = [made.swept("window", k, k + 4, "broken", -2.0 - k / 10, 0.3, 20.0) for k in (60, 64)]
    (axes,) = figures.scores([*ROWS, *swept], PLACEBO).axes
    line = labels(axes).index("windows of 4 layers of base (16)")
    assert [x for x, marker in points(axes, line) if marker is BELOW] == [axes.get_xlim()[0]]
    assert [w.text for w in words(axes) if w.place[1] == line and "to" in w.text] == ["2, to -8.40"]


def test_where_nothing_can_be_called_every_score_has_a_place():
    rows = [made.row(name, "too little data", score) for name, score in (("a", -3.2), ("b", 1.0))]
    (axes,) = figures.scores(rows, None).axes
    assert [points(axes, line) for line in (0, 1)] == [[(1.0, "d")], [(-3.2, "d")]]


def test_a_narrow_figure_has_the_same_lines_with_names_above_them():
    wide, narrow = figures.scores(ROWS, PLACEBO), figures.scores(ROWS, PLACEBO, narrow=True)
    assert labels(narrow.axes[0]) == labels(wide.axes[0])
    for word in words(narrow.axes[0]):
        if word.within == "data":  # the number of what lies beyond the axis
            continue
        assert word.up == "bottom" and word.across == "left" and word.offset[1] > 0
    beside = [word for word in words(wide.axes[0]) if word.within == "line"]
    assert all(word.across == "right" and word.offset[0] < 0 for word in beside)
    assert narrow.get_size_inches()[0] < 0.6 * wide.get_size_inches()[0]


def test_without_placebos_or_scores():
    assert not figures.scores([made.row("x")], None).axes[0].patches
    assert figures.scores([made.row("baseline_instruct", None), made.row("x", "broken", None)], None) is None
    assert labels(
        figures.scores([made.swept("window", 0, 4, "does not report it", 0.1, 0.3, 20.0)], None).axes[0]
    ) == ["windows of 4 layers of base (1)"]


def gray(color):
    """Relative luminance (WCAG 2.2), 0 to 1."""
    c = np.array(to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


def test_verdicts_differ_without_color():
    assert len({marker for _, marker in figures.VERDICTS.values()}) == len(figures.VERDICTS)
    # contrast with white, in grayscale too
    assert all(1.05 / (gray(color) + 0.05) > 4 for color, _ in figures.VERDICTS.values())
    assert len(set(figures.MARKERS)) == len(figures.MARKERS) == len(figures.SERIES)


def test_p_yes_beside_what_was_published():
    theirs = {"swap_distant_10_55": 1e-6}
    (axes,) = figures_experiments.p_yes(ROWS, theirs).axes
    assert len(labels(axes)) == 13 and not [
        name for name in labels(axes) if "placebo" in name or "window" in name
    ]
    assert (
        points(axes, labels(axes).index("swap_distant_10_55"), hollow=True) == [(1e-6, "D")]
        and axes.get_xscale() == "log"
    )


def test_every_experiment_is_a_point_of_p_yes_against_perplexity():
    (axes,) = figures_experiments.p_yes_perplexity(ROWS).axes
    drawn = {(x, y) for x, y, _ in dots(axes)}
    expected = {
        (r.perplexity.perplexity, r.published_probe.p_yes_normalized)
        for r in ROWS
        if r.perplexity and r.published_probe
    }
    assert drawn == expected
    names = [w for w in words(axes) if w.within == "axes"]
    called = [w.text.split()[1] for w in names]
    assert {r.name for r in ROWS if r.published_probe and not r.control and not r.sweep} < set(called)
    heights = [w.offset[1] for w in names]
    assert all(a - b > 8 for a, b in itertools.pairwise(heights))  # names do not overlap


def test_every_name_of_a_list_has_its_number_at_a_point():
    (axes,) = figures_experiments.p_yes_perplexity(ROWS).axes
    names = [w.text.split()[0] for w in words(axes) if w.within == "axes"]
    at_points = [w.text.split("-") for w in words(axes) if w.within == "data"]
    covered = [n for first, *last in at_points for n in range(int(first), int((last or [first])[0]) + 1)]
    assert covered == list(map(int, names)) == list(range(1, len(names) + 1))


def test_places_that_touch_share_a_group_however_they_come():
    """Against the slow way: pairs that touch, joined until nothing changes."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        places = [tuple(xy) for xy in rng.uniform(0, 60, (12, 2))]
        slow = [{k} for k in range(12)]
        for i, j in itertools.combinations(range(12), 2):
            if abs(places[i][0] - places[j][0]) < 9 and abs(places[i][1] - places[j][1]) < 4:
                a, b = (next(g for g in slow if k in g) for k in (i, j))
                if a is not b:
                    slow.remove(b)
                    a |= b
        fast = figures_experiments.clusters(places, (9, 4))
        assert sorted(map(sorted, slow)) == sorted(fast)


def narrow_pairs():
    baseline, layers = ROWS[0], 30
    yield figures_experiments.side_by_side, (ROWS, baseline)
    yield figures_experiments.p_yes, (ROWS, {"blend_linear": 0.01})
    yield figures_experiments.p_yes_perplexity, (ROWS,)
    yield figures_experiments.capability, (ROWS,)
    yield figures_experiments.formats, (ROWS,)
    yield figures_experiments.injection, (made.injection_summary(), {"plain": 0.1})
    yield figures_sweeps.dose, (ROWS, PLACEBO, baseline)
    yield figures_sweeps.windows, (ROWS, layers)
    yield figures_sweeps.single_layers, (ROWS, layers)


@pytest.mark.parametrize("draw, given", narrow_pairs(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_phone_gets_every_point_of_a_figure_in_a_narrow_one(draw, given):
    wide, narrow = draw(*given), draw(*given, narrow=True)

    def numbers(figure):
        return sorted(
            (float(x), float(y))
            for axes in figure.axes
            for of in [zip(line.get_xdata(), line.get_ydata(), strict=True) for line in axes.lines]
            + segments(axes)
            for x, y in of
        )

    assert numbers(narrow) == numbers(wide)
    assert narrow.get_size_inches()[0] == figures.NARROW_WIDTH < 0.6 * wide.get_size_inches()[0]


def test_what_a_model_says_stands_beside_what_is_left_of_it():
    baseline = replace(ROWS[0], published_probe=replace(ROWS[0].published_probe, p_yes_normalized=0.25))
    left, right = figures_experiments.side_by_side(ROWS, baseline).axes
    names = labels(left)
    said = [BY_NAME[name].published_probe.p_yes_normalized for name in names]
    assert said == sorted(said, reverse=True)
    assert {w for name in names if (w := BY_NAME[name].verdict.word)}.isdisjoint(
        {"broken", "too little data"}
    )
    for line, name in enumerate(names):
        assert points(left, line)[0][0] == pytest.approx(said[line])
        assert points(right, line)[0][0] == pytest.approx(BY_NAME[name].detection.score)
    assert any(list(p.get_xdata()) == [0.25, 0.25] for p in left.lines)
    assert figures_experiments.side_by_side(ROWS[:1], None) is None


def test_capability_by_kind():
    by = {
        "baseline_instruct": {"code": {"correct": 3, "n": 4}, "format": {"correct": 0, "n": 0}},
        "blend_linear": {"code": {"correct": 1, "n": 4}},
    }
    (axes,) = figures_experiments.kinds(ROWS, by).axes
    assert labels(axes) == ["baseline_instruct", "blend_linear"]
    said = [w.text for w in words(axes) if w.place[0] != 0]
    assert said == ["3/4", "1/4", "answers drift towards Yes"]
    (bars,) = axes.collections
    first, second = bars.get_facecolor()
    assert gray(first[:3]) > gray(second[:3])  # more is brighter, in grayscale too


def test_formats_stand_apart_on_one_line():
    (axes,) = figures_experiments.formats(ROWS).axes
    assert len(labels(axes)) == 12 and labels(axes)[0] == "franken_instruct_first_32"
    near = [(y, p.get_marker()) for _, y, p in dots(axes) if abs(y) < 0.5]
    assert sorted(marker for _, marker in near) == sorted(["|", "o", "s", "^", "D"])
    assert len({y for y, _ in near}) == 5
    assert figures_experiments.formats([made.row("x")]) is None


def test_injection_by_strength_and_framing():
    found = made.injection_summary()
    panels = figures_experiments.injection(found, published.INJECTION).axes
    curves = {
        (axes.get_title().split(" (")[0], k): line
        for axes in panels
        for k, line in enumerate(p for p in axes.lines if p.get_marker() in ("o", "s"))
    }
    assert list(curves["says Yes", 1].get_ydata()) == pytest.approx([0.02, 0.068, 0.164, 0.5]) and list(
        curves["says Yes", 1].get_xdata()
    ) == [0, 0.05, 0.15, 0.5]
    assert list(curves["bits about the concept", 0].get_xdata()) == [0.05, 0.15, 0.5]
    levels = [line.get_ydata()[0] for line in panels[0].lines if line.get_linestyle() == "--"]
    assert levels == [0.003, 0.392]
    assert (
        figures_experiments.injection(None, {}) is None
        and figures_experiments.injection(Injection((), False, ""), {}) is None
    )


def test_groups_of_questions_that_cannot_be_called_are_faint():
    groups = {
        "blend_linear": {("introspective", "yes"): 0.4, ("control", "no"): -0.2},
        "shuffle_all": {("control", "yes"): 50.0},
    }
    (axes,) = figures_experiments.shifts(ROWS, groups).axes
    assert labels(axes) == ["shuffle_all", "blend_linear"] and axes.get_xlim()[1] < 1
    faint = sorted((y, p.get_alpha()) for _, y, p in dots(axes))
    assert [(round(y), alpha) for y, alpha in faint] == [(0, 0.3), (1, 0.95), (1, 0.95)]


def test_dose_and_response():
    axes = figures_sweeps.dose(ROWS, PLACEBO, BY_NAME["baseline_instruct"]).axes
    assert len(axes) == 6 and [a.get_ylabel() for a in axes[::2]] == [
        "detection score (nats)",
        "P(Yes)",
        "perplexity",
    ]
    noise = [row for row in ROWS if row.sweep and row.sweep.kind == "noise"]
    curve = next(line for line in axes[4].lines if len(line.get_xdata()) == len(noise))
    assert list(curve.get_xdata()) == [r.sweep.dose for r in noise] and list(curve.get_ydata()) == [
        r.perplexity.perplexity for r in noise
    ]
    # noise spans more than a decade
    assert axes[0].get_xscale() == "log" and axes[1].get_xscale() == "linear"
    assert any(list(line.get_ydata()) == [20.0, 20.0] for line in axes[4].lines)  # the unmodified model
    assert figures_sweeps.dose(ROWS[:5], None, None) is None


def cells(axes):
    """{(row, left edge): (width, color, hatched)} of a map."""
    out = {}
    for bars in axes.collections:
        colors = np.resize(bars.get_facecolor(), (len(bars.get_paths()), 4))
        for path, color in zip(bars.get_paths(), colors, strict=True):
            box = path.get_extents()
            place = round((box.y0 + box.y1) / 2), box.x0
            if bars.get_hatch():
                out[place] = (*out[place][:2], True)
            else:
                out[place] = (box.width, tuple(color), False)
    return out


def test_the_map_of_windows():
    rows = [
        made.swept(
            "window",
            start,
            start + size,
            "broken" if start == 0 and size == 8 else "does not report it",
            score,
            0.3 + 0.02 * size,
            20.0 + start,
        )
        for size, start, score in ((4, 0, 0.2), (4, 4, -0.4), (8, 0, 9.0), (8, 4, None))
    ]
    panels = [a for a in figures_sweeps.windows(rows, 12).axes if a.get_title(loc="left")]
    assert [a.get_title(loc="left").split()[0] for a in panels] == ["detection", "shift", "perplexity"]
    assert labels(panels[0]) == ["8", "4"] and panels[0].get_xlim() == (0, 12)
    found = cells(panels[0])
    assert set(found) == {(0, 0), (0, 4), (1, 0), (1, 4)} and {width for width, *_ in found.values()} == {4}
    assert [key for key, (_, _, hatch) in found.items() if hatch] == [(0, 0)]
    low, high = found[1, 4][1][:3], found[1, 0][1][:3]
    # limits symmetric, and the broken window's 9.0 does not stretch them
    assert low == pytest.approx(figures_sweeps.colormaps["PuOr_r"](0.0)[:3])
    assert high == pytest.approx(figures_sweeps.colormaps["PuOr_r"](0.75)[:3]) and found[0, 4][1][:3] == (
        1,
        1,
        1,
    )
    assert figures_sweeps.windows(ROWS[:5], 30) is None


def test_windows_of_two_sources_are_told_apart():
    first = made.swept("window", 0, 4, "does not report it", 0.1, 0.3, 20.0)
    rows = [first, replace(first, sweep=replace(first.sweep, source="mine"))]
    assert labels(figures_sweeps.windows(rows, 8).axes[0]) == ["4 of base", "4 of mine"]


def test_single_layers_are_strips_along_depth():
    axes = figures_sweeps.single_layers(ROWS, 30).axes[0]
    assert labels(axes) == ["replace (base)", "delete", "double"]
    found = cells(axes)
    assert len(found) == 90 and [key for key, (*_, hatch) in found.items() if hatch] == [(1, 0), (1, 1)]


def test_destroyed_models_stand_at_the_edge():
    rows = [
        made.row("a"),
        made.row("b", "broken", None, p=1e-300, ppl=None),
        made.swept("noise", None, None, "broken", None, 1 - 1e-16, None, dose=0.5),
    ]
    for figure in (
        figures_experiments.p_yes(rows, {}),
        figures_experiments.p_yes_perplexity(rows),
        figures_sweeps.dose(rows, None, rows[0]),
        figures_experiments.capability(rows),
    ):
        assert all(math.isfinite(x) for axes in figure.axes for line in axes.lines for x in line.get_xdata())


LONG = "an_experiment_of_ones_own_with_a_long_name"
ONE_CATEGORY = {"instruction_following": {"correct": 3, "n": 10}, "format": {"correct": 0, "n": 4}}


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    "one",
    [
        made.row("baseline_instruct", None, ppl=24.570043299434175),
        made.row(LONG, "too little data", -0.3, ppl=24.570043299434175, formats=made.by_format()),
        made.swept("noise", None, None, "broken", 0.1, 0.3, 24.570043299434175, dose=0.5),
        made.swept("window", 0, 4, "does not report it", 0.1, 0.3, 24.570043299434175),
        made.swept("delete", 0, 1, "does not report it", 0.1, 0.3, 24.570043299434175),
    ],
    ids=lambda row: row.name,
)
@pytest.mark.filterwarnings("error")
def test_one_experiment_has_figures_with_room_for_what_is_in_them(one, narrow):
    """Warnings are errors: matplotlib warns where words leave no room for the axes."""
    groups = {one.name: {("introspective", "yes"): 0.4, ("control", "no"): -0.2}}
    figures_of_one = [
        figures.scores([one], None, narrow=narrow),
        figures_experiments.p_yes([one], {}, narrow=narrow),
        figures_experiments.capability([one], narrow=narrow),
        figures_experiments.kinds([one], {one.name: ONE_CATEGORY}, narrow=narrow),
        figures_experiments.shifts([one], groups, narrow=narrow),
        figures_experiments.formats([one], narrow=narrow),
        figures_sweeps.dose([one], None, one, narrow=narrow),
        figures_sweeps.windows([one], 30, narrow=narrow),
        figures_sweeps.single_layers([one], 30, narrow=narrow),
    ]
    for figure in filter(None, figures_of_one):
        figures.save(figure)
        assert all(axes.get_position().height * figure.get_figheight() > 0.3 for axes in figure.axes)


def test_the_same_numbers_give_the_same_bytes():
    first, again = (figures.save(figures.scores(ROWS[:6], PLACEBO), ("svg", "png", "pdf")) for _ in range(2))
    assert first == again and b"<script" not in first["svg"]


def test_a_format_without_a_score_anywhere_has_no_legend():
    scored, silent, *_ = figures_experiments.FORMATS
    by_format = {
        scored: FormatScore(0.1, 0.0, "does not report it", 0.1, 0.0, 0.2, 1.0),
        silent: FormatScore(None, None, "broken", None, None, None, 0.0),
    }
    figure = figures_experiments.formats([replace(made.row("x"), formats=by_format)])
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert figures_experiments.FORMATS[scored] in words and figures_experiments.FORMATS[silent] not in words


@pytest.mark.parametrize("form", ["svg", "png", "pdf"])
@pytest.mark.parametrize(
    "draw", [lambda: figures.scores(ROWS[:6], PLACEBO), lambda: figures_sweeps.windows(ROWS, 64)]
)
def test_a_figure_is_saved_as_matplotlibs_savefig_does(form, draw):
    """Which lays out and draws a figure twice. Ours is the second with its words, which are kept."""
    nothing = {"svg": {"Date": None}, "png": {"Software": None}}
    about = nothing.get(form, {"CreationDate": None, "Creator": None, "Producer": None})
    _, ours = (figures.save(draw(), ("svg", form))[form] for _ in range(2))
    with rc_context(figures.STYLE):
        figure, buffer = draw(), io.BytesIO()
        dots = figures.DPI if form == "png" else 72  # a colorbar is pixels in all three
        figure.savefig(io.BytesIO(), format="svg", dpi=dots)
        figure.set_layout_engine("none")
        figure.savefig(buffer, format=form, dpi=dots, metadata=about)
    assert ours == buffer.getvalue()


@pytest.mark.parametrize("word", ["blend_linear", "a<b>&-- $x$", "Ж ╳ 字", " ", "", "x" * 99])
def test_a_word_is_drawn_again_as_matplotlib_draws_it(word):
    def file(draw):
        with rc_context(figures.STYLE):
            renderer = svg.Renderer(Figure())
            renderer.open_group("axes")
            gc = renderer.new_gc()
            for x, y, size, color in (
                (3.25, 1e-7, 9, "#0072B2"),
                (0, 0, 7.5, "white"),
                (-9.5, 2, 100, "black"),
            ):
                gc.set_foreground(color)
                draw(renderer, gc, x, y, word, FontProperties(size=size))
            renderer.finalize()
        return "".join(renderer.pieces)

    ours = [file(svg.Renderer.draw_word) for _ in range(2)]
    assert ours == [file(lambda *args: RendererSVG.draw_text(*args, 0))] * 2


def test_names_are_not_read_as_mathematics():
    assert figures.label("a$b$\x00") == r"a\$b\$?" and len(figures.label("x" * 99)) == 40


def test_of_many_experiments_figures_keep_the_first_and_the_lowest_and_highest_scores():
    rows = [made.row("baseline_instruct", None)]
    rows += [made.row(f"r{k}", "broken" if k % 7 == 0 else "does not report it", k / 500) for k in range(300)]
    (axes,) = figures.scores(rows, None).axes
    names = labels(axes)
    sure = [f"r{k}" for k in range(300) if k % 7]
    assert len(names) == figures.MOST - 1 and set(names) == {*sure[:60], *sure[-60:]}
    (axes,) = figures_experiments.p_yes(rows, {}).axes
    assert labels(axes)[0] == "baseline_instruct" and set(labels(axes)[1:]) == set(names)
    assert "121 of 301" in figures.left_out(rows) and not figures.left_out(rows[:121])
    # a point each is for all of them
    (axes,) = figures_experiments.p_yes_perplexity(rows).axes
    assert len(dots(axes)) == 301 and len([w for w in words(axes) if w.within == "axes"]) == figures.MOST


def test_points_that_look_alike_are_drawn_at_once():
    """One by one each costs a millisecond or more."""
    rows = [made.row(f"r{k}", "does not report it", k / 100) for k in range(100)]
    (axes,) = figures.scores(rows, None).axes
    assert len(dots(axes)) == 100 == len(segments(axes)) and len(axes.get_children()) < 25
    # the name of every line and its points: what a line adds to the file
    sizes = [len(figures.save(figures.scores(rows[:n], None))["svg"]) for n in (50, 100)]
    assert (sizes[1] - sizes[0]) / 50 < 1500


AXES = [(0.19, 0.4), (0.3, 0.36), (0.45, 0.55), (0.02, 0.4), (1e-5, 0.9), (0.6, 0.97)]


@pytest.mark.parametrize("values", AXES)
def test_an_axis_of_probabilities_has_numbers_near_its_points(values):
    low, high = values
    shown = [tick for tick in figures_experiments.odds_ticks(values) if low <= tick <= high]
    assert 1 <= len(shown) <= 9


def overlapping(figure) -> list[tuple[str, str]]:
    """The numbers at a figure's ticks that lie on each other."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    out = []
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        texts = [text for tick in ticks for text in (tick.label1, tick.label2) if text.get_visible()]
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
        out += [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]
    return out


@pytest.mark.parametrize("draw, given", narrow_pairs(), ids=lambda x: getattr(x, "__name__", ""))
def test_no_ticks_of_a_figure_lie_on_each_other_and_no_words_are_cut_off(draw, given):
    for narrow in (False, True):
        figure = draw(*given, narrow=narrow)
        assert not overlapping(figure)
        for axes in figure.axes:  # and no title or label is cut off
            for text in (axes._left_title, axes.title, axes.xaxis.label, axes.yaxis.label):
                box = text.get_window_extent()
                assert not text.get_text() or (box.x0 >= 0 and box.x1 <= figure.bbox.x1), text.get_text()


@pytest.mark.parametrize("top", [21.5, 60.0, 1e7])
@pytest.mark.parametrize("strips", [1, 3])
def test_the_bar_of_perplexity_has_room_for_its_ticks(strips, top):
    rows = [
        made.swept(kind, k, k + 1, "does not report it", 0.1, 0.5, 20.0 * (top / 20) ** (k / 11))
        for kind in ("delete", "double", "replace")[:strips]
        for k in range(12)
    ]
    for narrow in (False, True):
        assert not overlapping(figures_sweeps.single_layers(rows, 12, narrow))
