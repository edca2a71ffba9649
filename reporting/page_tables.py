"""The tables that report.html alone has, over all experiments: their columns, and how their lines are set.

A table of the page is one `Table` here; templates/_tables.html.j2 turns any of them into HTML. What a cell
prints is escaped, has its hidden characters spelled out and is cut; a cell that is more than its text
(`Column.markup`) has that done by `Markup.format` and `visible`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic

from markupsafe import Markup, escape

from analysis.comparison import FormatScore, InjectionRow, Match, PublishedProbe, Row, Score
from analysis.detection import DENIES, REPORTS, TOO_LITTLE
from analysis.rows import word
from analysis.stats import as_damaged
from analysis.verdicts import MAX_PERCENT, called, factor, lacking
from reporting.columns import EXPERIMENT_COLUMNS, TRIGGER_COLUMNS, Column, Line, cells, pick, place
from reporting.pages import breakable, number, percent, rate, size, verdict, visible

Read = Callable[[Line], float | None]
Show = Callable[[float | None], str]
signed: Show = partial(number, form="+.2f")


@dataclass(frozen=True)
class Table(Generic[Line]):
    """`css`: classes of the table. `sortable`: whether its heads sort it. `line_css`: the class of a line."""

    columns: Sequence[Column[Line]]
    css: str = "small"
    sortable: bool = True
    line_css: Callable[[Line], str] = lambda line: ""

    def html(self, lines: Iterable[Line]) -> Markup:
        """The table of these lines. Made here and not by a template, and a column at a time: a page has
        100,000 cells, and each took a template 0.1 ms."""
        heads = "".join(
            f"{opening}{escape(column.title)}</th>"
            for column in self.columns
            for opening in ['<th class="n">' if column.align == "right" else "<th>"]
        )
        css = self.css + (" sortable" if self.sortable else "")
        out = [f'<table class="{css}">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n']
        lines = list(lines)
        for line, *row in zip(lines, *(column.html(lines) for column in self.columns), strict=True):
            line_css = self.line_css(line)
            out.append(f'<tr class="{line_css}">' if line_css else "<tr>")
            out += row
            out.append("</tr>\n")
        out.append("</tbody></table>")
        return Markup("".join(out))


def figure(name: str, title: str, read: Read[Line], show: Show = number) -> Column[Line]:
    """A column of numbers, sorted by what is read and printed as `show` says."""
    form = ".2f" if show is number else ""
    if isinstance(show, partial) and show.func is number:
        form = show.keywords["form"]
    return Column(name, title, lambda line: show(read(line)), read, show=show, form=form)


def words(name: str, title: str, text: Callable[[Line], str], **layout) -> Column[Line]:
    """A column of text."""
    return Column(name, title, text, align="left", **layout)


def _ends(low: float | None, high: float | None) -> str:
    return f"[{signed(low)}, {signed(high)}]"


# ---- over all experiments: behind the verdicts


def _score(row: Row) -> Score:
    assert row.detection is not None, "this table is of the rows that have a detection score"
    return row.detection


def _of_score(name: str, title: str, show: Show = signed) -> Column[Row]:
    return figure(name, title, lambda row: getattr(_score(row), name), show)


def _drift(row: Row) -> str:
    drift = row.yes_drift
    return f"{signed(drift.value)} {_ends(drift.low, drift.high)}" if drift else ""


def _reason(row: Row) -> str:
    return row.verdict.reason if row.verdict else _score(row).reason


def _call(row: Row) -> str:
    """What the score alone is called, where the verdict rests on it."""
    call = _score(row).call
    return "not judged" if call in (REPORTS, DENIES) and lacking(row) else call


def _set_back(row: Row) -> str:
    """What no verdict rests on is not to look like a finding."""
    return "dim" if lacking(row) else ""


BEHIND: Table[Row] = Table(
    [
        words(
            "experiment",
            "experiment",
            lambda row: row.name,
            markup=lambda row: breakable(visible(row.name, 80)),
        ),
        Column(
            "verdict",
            "verdict",
            lambda row: word(row) or "",
            place,
            "left",
            markup=lambda r: verdict(word(r)),
        ),
        words("reason", "because", _reason, css="wide", most=700),
        words("call", "by the score alone", _call, css="nowrap"),
        _of_score("score", "score"),
        _of_score("p_value", "p", partial(number, form=".2g")),
        _of_score("p_adjusted", "p (Holm)", partial(number, form=".2g")),
        _of_score("p_placebo", "p among placebos", partial(number, form=".2g")),
        _of_score("matched_noise_score", "noise of equal perplexity"),
        Column(
            "yes_drift",
            "drift towards Yes",
            _drift,
            lambda row: row.yes_drift.value if row.yes_drift else None,
        ),
        Column(
            "drift_p",
            "its p (Holm)",
            lambda row: number(row.yes_drift.p_adjusted, ".2g") if row.yes_drift else "",
            lambda row: row.yes_drift.p_adjusted if row.yes_drift else None,
        ),
    ],
    line_css=_set_back,
)

BEHIND_CONTROLS: Table[Row] = Table(
    [
        words("experiment", "experiment", lambda row: row.name),
        _of_score("keyed_before", "keyed before"),
        _of_score("keyed_after", "keyed after"),
        _of_score(
            "flattening_to_explain",
            "flattening to explain",
            lambda x: percent(x) if x is not None and x > MAX_PERCENT else number(x, ".0%"),
        ),
        _of_score(
            "sharpening_to_explain", "sharpening to explain", lambda x: "-" if x is None else f"{factor(x)} ×"
        ),
        _of_score("raw_contrast", "raw contrast"),
        _of_score("drift", "drift of controls"),
        _of_score("flattening", "flattening"),
        figure(
            "pairs_before",
            "control pairs right before",
            lambda row: _score(row).controls_before.pairs,
            percent,
        ),
        figure("pairs_after", "after", lambda row: _score(row).controls_after.pairs, percent),
        Column(
            "entropy",
            "entropy",
            lambda row: number(row.published_probe.entropy) if row.published_probe else "",
            lambda row: row.published_probe.entropy if row.published_probe else None,
        ),
    ],
    line_css=_set_back,
)


# ---- noise of equal perplexity: (the noise twin, its experiment's row or None)

Twin = tuple[Row, Row | None]


def _noise(twin: Twin) -> Match:
    assert twin[0].matched is not None, "this table is of the noise twins"
    return twin[0].matched


def _reached(twin: Twin) -> str:
    noise = _noise(twin)
    off = "" if noise.within is None else percent(noise.within)
    if noise.ok:
        return f"within {off}" + ("" if noise.share is None else f", {noise.share:.0%} of the damage")
    if noise.share is not None and not as_damaged(noise.share):
        return f"no, {noise.share:.0%} of the damage"
    return f"no, {off} off" if off else "no"


def _reached_markup(twin: Twin) -> Markup:
    return Markup("{}" if _noise(twin).ok else '<span class="wrong">{}</span>').format(_reached(twin))


def _score_of(row: Row | None) -> float | None:
    return row.detection.score if row and row.detection else None


MATCHED: Table[Twin] = Table(
    [
        words("experiment", "experiment", lambda twin: _noise(twin).of),
        figure("target", "its perplexity", lambda twin: _noise(twin).target_perplexity),
        figure("reached", "of the noise", lambda twin: _noise(twin).reached_perplexity),
        figure(
            "fraction",
            "noise, share of standard deviation",
            lambda twin: _noise(twin).fraction,
            partial(number, form=".3g"),
        ),
        figure("tries", "tries", lambda twin: len(_noise(twin).evaluations), partial(number, form="g")),
        words("ok", "reached", _reached, markup=_reached_markup),
        figure("score", "score of the change", lambda twin: _score_of(twin[1]), signed),
        figure("noise_score", "score of the noise", lambda twin: _score_of(twin[0]), signed),
        words(
            "verdict",
            "verdict on the noise",
            lambda twin: word(twin[0]) or "",
            markup=lambda twin: verdict(word(twin[0])),
        ),
    ],
    "small narrow",
)


# ---- the positive control: (a framing and strength, the published sensitivity of the framing)

Injected = tuple[InjectionRow, float | None]

INJECTION: Table[Injected] = Table(
    [
        words("framing", "question", lambda line: line[0].framing, most=40),
        figure("strength", "strength", lambda line: line[0].strength, partial(number, form="g")),
        figure("sensitivity", "sensitivity", lambda line: line[0].sensitivity, percent),
        figure("false_positives", "false positives", lambda line: line[0].false_positive_rate, percent),
        figure("p_yes", "P(Yes)", lambda line: line[0].p_yes, percent),
        figure("score", "detection score", lambda line: line[0].detection.score, signed),
        words("call", "call", lambda line: called(line[0].detection)),
        figure("bits", "bits about the concept", lambda line: line[0].bits),
        figure("published", "published sensitivity", lambda line: line[1], percent),
    ],
    "small narrow",
)


# ---- other formats of answer: (the row, the format's name, its score)

Formatted = tuple[Row, str, FormatScore]


def _call_in_format(line: Formatted) -> str:
    score = line[2]
    return f"{TOO_LITTLE}: {score.lacking}" if score.lacking else score.call


FORMATS: Table[Formatted] = Table(
    [
        words("experiment", "experiment", lambda line: line[0].name),
        words("format", "format", lambda line: line[1], most=40),
        figure("score", "score", lambda line: line[2].score, signed),
        words(
            "interval",
            "95% CI",
            lambda line: "" if line[2].low is None else _ends(line[2].low, line[2].high),
            css="nowrap",
        ),
        words("call", "call", _call_in_format),
        figure("keyed_shift", "shift of keyed", lambda line: line[2].keyed_shift, signed),
        figure("control_shift", "shift of controls", lambda line: line[2].control_shift, signed),
        figure("answered", "answered", lambda line: line[2].answered, percent),
    ]
)


# ---- beside the published numbers: (the row, published P(Yes), capability of 6, perplexity)

Published = tuple[Row, tuple[float, int | None, float | None]]


def _probe(line: Published) -> PublishedProbe:
    assert line[0].published_probe is not None, "this table is of the rows that answered the published probe"
    return line[0].published_probe


def _p_yes_markup(line: Published) -> Markup:
    p = Markup("{}").format(percent(_probe(line).p_yes_normalized))
    return p if _probe(line).answered else p + Markup("<br><small>not an answer</small>")


def _ours(name: str) -> Column[Published]:
    """A column of the results, of a line's own row."""
    (column,) = pick(EXPERIMENT_COLUMNS, name)
    key = column.key
    assert key is not None, "these columns hold numbers"
    return Column(name, column.title, lambda line: cells(line[0], [column])[0], lambda line: key(line[0]))


PUBLISHED: Table[Published] = Table(
    [
        words("experiment", "experiment", lambda line: line[0].name),
        Column(
            "p_yes",
            "P(Yes)",
            lambda line: percent(_probe(line).p_yes_normalized),
            lambda line: _probe(line).p_yes_normalized,
            markup=_p_yes_markup,
        ),
        figure("published_p_yes", "published", lambda line: line[1][0], percent),
        _ours("mass"),
        _ours("capability"),
        figure(
            "published_capability",
            "published",
            lambda line: line[1][1],
            lambda right: "-" if right is None else f"{right}/6",
        ),
        _ours("perplexity"),
        figure("published_perplexity", "published", lambda line: line[1][2]),
    ],
    "narrow",
)


# ---- what it cost: (the experiment's name, "performance" of its JSON)

Cost = tuple[str, dict]


def _of_cost(name: str, title: str, show: Show) -> Column[Cost]:
    return figure(name, title, lambda line: line[1][name], show)


def _per_second(
    name: str, title: str, amount: Callable[[dict], float], seconds: str, show=None
) -> Column[Cost]:
    return Column(
        name,
        title,
        lambda line: rate(amount(line[1]), line[1][seconds], *([show] if show else [])),
        lambda line: amount(line[1]) / line[1][seconds] if line[1][seconds] else None,
    )


COSTS: Table[Cost] = Table(
    [
        words("experiment", "experiment", lambda line: line[0]),
        _of_cost("seconds", "seconds", partial(number, form=".1f")),
        _of_cost("surgery_seconds", "surgery, s", partial(number, form=".3g")),
        _of_cost("restore_seconds", "going back, s", partial(number, form=".3g")),
        _of_cost("bytes_moved", "moved", size),
        _of_cost("bytes_streamed", "streamed", size),
        _of_cost("bytes_computed", "computed", size),
        _per_second(
            "surgery_rate",
            "surgery rate",
            lambda cost: cost["bytes_moved"] + cost["bytes_streamed"] + cost["bytes_computed"],
            "surgery_seconds",
            size,
        ),
        _of_cost("prefill_seconds", "prefill, s", partial(number, form=".1f")),
        _per_second(
            "prefill_rate", "prefill tokens/s", lambda cost: cost["prefill_tokens"], "prefill_seconds"
        ),
        _of_cost("decode_seconds", "decode, s", partial(number, form=".1f")),
        _of_cost("decode_tokens_per_second", "decode tokens/s", partial(number, form=".0f")),
        _of_cost("peak_memory_bytes", "peak memory", size),
        _of_cost("out_of_memory", "batches halved", partial(number, form="g")),
    ],
    "small",
)

TRIGGERS: Table[Row] = Table(TRIGGER_COLUMNS, sortable=False)

# ---- lm-evaluation-harness: (the experiment's name, its values in the order of the columns)

Evaluated = tuple[str, list[float | None]]


def harness_table(columns: Sequence[tuple[str, str]]) -> Table[Evaluated]:
    """A column for each (task, metric) that was asked."""

    def value(task: str, metric: str, k: int) -> Column[Evaluated]:
        title = f"{visible(task, 60)}: {visible(metric, 40)}"
        return figure(f"{task}.{metric}", title, lambda line: line[1][k], partial(number, form=".4f"))

    name: Column[Evaluated] = words(
        "experiment", "experiment", lambda line: line[0], markup=lambda line: breakable(visible(line[0], 80))
    )
    return Table([name, *(value(*column, k) for k, column in enumerate(columns))], "small narrow")
