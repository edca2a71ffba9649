"""What a column is: its title, what it says of a row, what it is sorted by, and how it is set.

Defined once, for the terminal, Markdown, the HTML pages and several runs side by side. A column of one's own
is one line in the list of its table: here for experiments and triggers, in page_tables.py and
experiment_tables.py for what the page alone has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, Literal, TypeVar

from analysis.comparison import DetectionScore, Row, Trigger
from analysis.detection import MIN_EFFECT
from analysis.rows import WORDS, score, word
from analysis.verdicts import DRIFTS_NO, DRIFTS_YES, called, lacking
from reporting.pages import PLAIN, number, percent, shown, sort_attribute

Line = TypeVar("Line")


@dataclass(frozen=True)
class Column(Generic[Line]):
    """`name`: what templates and other tables pick it by. `text`: a line's cell. `key`: the number by which
    lines are sorted (None: undefined, which goes last); without a key the cell's text is. `align`: "right"
    for numbers. `of_failed`: whether it has something to say of an experiment that failed.

    For HTML: `css`, the cell's class beside its alignment; `most`, the characters shown before text is cut;
    `untrusted`, text of a model or a question, whose direction the browser is to find; `show`, what prints
    the key where the text is that, and `form`, its format where it is `pages.number`; `markup`, the cell as
    escaped HTML where it is more than its text."""

    name: str
    title: str
    text: Callable[[Line], str]
    key: Callable[[Line], float | None] | None = None
    align: Literal["left", "right"] = "right"
    of_failed: bool = False
    css: Literal["", "wide", "nowrap"] = ""
    most: int = 80
    untrusted: bool = False
    show: Callable[[float | None], str] | None = None
    form: str = ""
    markup: Callable[[Line], str] | None = None

    @functools.cached_property
    def _opened(self) -> str:
        css = " ".join(filter(None, ["n" if self.align == "right" else "", self.css]))
        return "<td" + (f' class="{css}"' if css else "") + (' dir="auto"' if self.untrusted else "")

    def html(self, lines: Sequence[Line]) -> list[str]:
        """The lines' cells: class, direction and sort key of each, and what stands in it, escaped and cut."""
        opened, most = self._opened, self.most
        keys = [self.key(line) for line in lines] if self.key else None
        if self.form and keys and all(key is not None and abs(key) < PLAIN for key in keys):
            # as below, by one call for all lines: a page of a thousand experiments has a million numbers
            cell = f'{opened} data-sort="%.10g">%{self.form}</td>\0'
            return (cell * len(keys) % tuple(chain.from_iterable(zip(keys, keys, strict=True)))).split("\0")[
                :-1
            ]
        if self.markup:
            inside = map(self.markup, lines)
        elif self.show and keys is not None:
            inside = map(self.show, keys)  # in a number nothing is to be escaped
        else:
            inside = [shown(text, most) for text in map(self.text, lines)]
        if keys is None:
            return [f"{opened}>{cell}</td>" for cell in inside]
        return [f"{opened}{sort_attribute(key)}>{cell}</td>" for key, cell in zip(keys, inside, strict=True)]


def failed(row: Row) -> bool:
    return row.status != "done"


def cells(row: Row, columns: Sequence[Column[Row]] | None = None) -> list[str]:
    """One experiment's cells; of one that failed, those that are about failures too."""
    return [
        column.text(row) if column.of_failed or not failed(row) else ""
        for column in (EXPERIMENT_COLUMNS if columns is None else columns)
    ]


def titles(columns: Sequence[Column]) -> list[str]:
    return [column.title for column in columns]


def pick(columns: Sequence[Column[Line]], *names: str) -> list[Column[Line]]:
    """Columns by name, in this order. Raises KeyError for one that is not there."""
    known = {column.name: column for column in columns}
    return [known[name] for name in names]


def place(row: Row | None) -> float | None:
    """A verdict's place among the verdicts, by which it is sorted."""
    return None if row is None else [*WORDS, "failed", None].index(word(row))


def interval(score: DetectionScore | None) -> str:
    """A detection score with its interval."""
    if score is None:
        return ""
    if score.score is None:
        return "-"
    return f"{score.score:+.2f} [{number(score.low, '+.2f')}, {number(score.high, '+.2f')}]"


def _name(row: Row) -> str:
    return row.name + (" (collapsed)" if row.collapsed else "")


def _verdict(row: Row) -> str:
    if failed(row) and row.error:
        return f"failed: {row.error.type}"
    return ": ".join(filter(None, (word(row), lacking(row) or _against_drift(row))))


def _against_drift(row: Row) -> str:
    """That P(Yes), of one question, goes the other way than all answers drift; empty where it does not."""
    probe = row.published_probe
    if probe is None or not probe.answered or probe.shift is None or abs(probe.shift) < MIN_EFFECT:
        return ""
    against = {DRIFTS_YES: probe.shift < 0, DRIFTS_NO: probe.shift > 0}
    if not against.get(word(row) or "", False):
        return ""
    return f"P(Yes), of one question, {'rises' if probe.shift > 0 else 'falls'}"


def _detection(row: Row) -> str:
    """The score; where the verdict does not rest on it, as what it is."""
    return interval(row.detection) + (", not judged" if score(row) is not None and lacking(row) else "")


def _p_yes(row: Row) -> str:
    probe = row.published_probe
    if not probe:
        return ""
    return percent(probe.p_yes_normalized) + ("" if probe.answered else " (!)")


def _graded(row: Row) -> str:
    return f"{row.capability.correct}/{row.capability.n}" if row.capability else ""


def _share_right(row: Row) -> float | None:
    return row.capability.correct / row.capability.n if row.capability and row.capability.n else None


def _of_probe(field: str) -> Callable[[Row], float | None]:
    return lambda row: getattr(row.published_probe, field) if row.published_probe else None


def _perplexity(row: Row) -> float | None:
    return row.perplexity.perplexity if row.perplexity else None


EXPERIMENT_COLUMNS: list[Column[Row]] = [
    Column("experiment", "experiment", _name, align="left", of_failed=True),
    Column("p_yes", "P(Yes)", _p_yes, _of_probe("p_yes_normalized")),
    Column(
        "mass",
        "mass",
        lambda row: percent(row.published_probe.mass) if row.published_probe else "",
        _of_probe("mass"),
    ),
    Column(
        "shift",
        "shift",
        lambda row: number(row.published_probe.shift, "+.2f") if row.published_probe else "",
        _of_probe("shift"),
    ),
    Column(
        "drift",
        "drift",
        lambda row: number(row.yes_drift.value, "+.2f") if row.yes_drift else "",
        lambda row: row.yes_drift.value if row.yes_drift else None,
    ),
    Column("detection", "detection (95% CI)", _detection, score, align="left"),
    Column("verdict", "verdict", _verdict, place, align="left", of_failed=True),
    Column("capability", "capability", _graded, _share_right),
    Column(
        "perplexity",
        "perplexity",
        lambda row: number(row.perplexity.perplexity) if row.perplexity else "",
        _perplexity,
    ),
    Column("seconds", "s", lambda row: number(row.seconds, ".1f"), lambda row: row.seconds, of_failed=True),
]


# ---- the second study's trigger


def _trigger(row: Row) -> Trigger:
    assert row.trigger is not None, "these columns are of the rows that have been asked about triggers"
    return row.trigger


def _by_condition(name: str) -> Callable[[Row], str]:
    """ "triggered / untriggered" of what is counted."""

    def text(row: Row) -> str:
        rates = (_trigger(row).rates[c][name].rate for c in ("triggered", "untriggered"))
        return " / ".join(map(percent, rates))

    return text


def _name_probability(row: Row) -> str:
    return " / ".join(percent(_trigger(row).p_name[c]) for c in ("triggered", "untriggered"))


def _reports(condition: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        score = _trigger(row).detection[condition]
        return f"{interval(score)} {called(score)}" if score else ""

    return text


# of the rows that have been asked about triggers
TRIGGER_COLUMNS: list[Column[Row]] = [
    Column("experiment", "experiment", lambda row: row.name, align="left", of_failed=True),
    Column("format", "format", _by_condition("strict_format"), align="left"),
    Column("names_him", "names him", _by_condition("names_russell"), align="left"),
    Column("p_name", "P(his name)", _name_probability, align="left"),
    Column("untriggered", "reports it, untriggered", _reports("untriggered"), align="left"),
    Column("triggered", "reports it, triggered", _reports("triggered"), align="left"),
]
