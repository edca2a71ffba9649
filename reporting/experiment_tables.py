"""The tables and replies of one experiment's part of the page.

A line is an entry of the experiment's JSON with the baseline's of the same id, or None.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from prompts import INFORMED_PREAMBLE
from reporting.columns import Column
from reporting.page_tables import Show, Table, figure, signed, words
from reporting.pages import difference, number, percent, shown, token


def reply(answer: dict, judged: Mapping[str, Any] = MappingProxyType({})) -> Markup:
    """A reply after what is known of it, such as what `judged` says. Made here as tables are: a run has
    thousands."""
    claim = judged.get("claims_change")
    said = [
        f"{escape(answer['tokens'])} tokens",
        "ended by itself" if answer["stopped"] else "cut at the budget",
        "" if answer.get("finite", True) else "<b>NaN or infinity occurred</b>",
        "<b>looks degenerate</b>" if judged.get("looks_degenerate") else "",
        {"yes": "claims a change", "no": "denies a change"}.get(claim, "") if isinstance(claim, str) else "",
        "echoes the question" if judged.get("question_echo") else "",
        "continues as text" if judged.get("continues_as_text") else "",
    ]
    about = ", ".join(filter(None, said))
    return Markup(f'<div class="meta">{about}</div>\n<pre dir="auto">{shown(answer["text"])}</pre>\n')


Entry = tuple[dict, dict | None]


def beside(entries: Sequence[dict], baseline: dict[str, dict]) -> list[Entry]:
    """Entries of a suite with the baseline's, by id."""
    return [(entry, baseline.get(entry["id"])) for entry in entries]


def _field(name: str, title: str, show: Show) -> Column[Entry]:
    return figure(name, title, lambda line: line[0][name], show)


def _shift(line: Entry) -> float | None:
    probe, before = line
    if before is None or probe["log_odds"] is None or before["log_odds"] is None:
        return None
    return probe["log_odds"] - before["log_odds"]


def _probe_name(line: Entry) -> str:
    return shown(line[0]["id"], 80) + (" <b>published</b>" if line[0].get("published") else "")


def _question(line: Entry) -> str:
    return _asked(line[0]["text"])


@functools.lru_cache(maxsize=4096)  # all experiments are asked the same
def _asked(text: str) -> str:
    """The question; the preamble, which many share, is named instead of repeated."""
    if not text.startswith(INFORMED_PREAMBLE):
        return shown(text, 400)
    rest = shown(text[len(INFORMED_PREAMBLE) :], 400)
    return f'<span class="soft">[preamble]</span> {rest}'


def _mass(line: Entry) -> str:
    return percent(line[0]["mass"]) + ("" if line[0]["answered"] else "<br><small>not an answer</small>")


def _top_tokens(line: Entry) -> str:
    return ", ".join(f"{_token(top['token'])}&nbsp;{percent(top['p'])}" for top in line[0]["top"][:4])


@functools.lru_cache(maxsize=4096)  # a run's experiments answer with few different ones
def _token(text: str) -> str:
    return f'<bdi class="token">{escape(token(text))}</bdi>'


def _dim(line: Entry) -> str:
    return "" if line[0]["answered"] else "dim"


_KEYED: Column[Entry] = words("keyed", "keyed", lambda line: line[0]["keyed"])
_LOG_ODDS: list[Column[Entry]] = [
    _field("log_odds", "log-odds", signed),
    figure("shift", "shift", _shift, signed),
]

PROBES: Table[Entry] = Table(
    [
        words("probe", "probe", lambda line: line[0]["id"], markup=_probe_name),
        words(
            "question",
            "question",
            lambda line: line[0]["text"],
            css="wide",
            untrusted=True,
            markup=_question,
        ),
        _KEYED,
        *_LOG_ODDS,
        _field("p_yes_normalized", "P(Yes)", percent),
        Column(
            "mass",
            "mass",
            lambda line: percent(line[0]["mass"]),
            lambda line: line[0]["mass"],
            markup=_mass,
        ),
        _field("entropy", "entropy", number),
        words("top", "top tokens", lambda line: "", markup=_top_tokens),
    ],
    line_css=_dim,
)
# of experiments that are folded away
BRIEF_PROBES: Table[Entry] = Table(
    [column for column in PROBES.columns if column.name not in ("question", "top")], line_css=_dim
)

FORMAT_PROBES: Table[Entry] = Table(
    [
        words("format", "format", lambda line: line[0]["format"], most=40),
        words("question", "question", lambda line: line[0]["id"]),
        words("asked", "asked", lambda line: line[0]["text"], css="wide", untrusted=True, most=400),
        _KEYED,
        *_LOG_ODDS,
        _field("mass", "mass", percent),
        _field("rating_mean", "mean rating", partial(number, form=".1f")),
    ],
    line_css=_dim,
)


def injected(suite: dict) -> list[dict]:
    """A line per cell of the suite "injection": mean log-odds by group of questions, and the probability of
    the right name."""
    out = []
    for cell in suite["cells"]:
        groups = [
            [
                p["log_odds"]
                for p in cell["probes"]
                if p["kind"] == kind
                and (kind == "introspective" or p["keyed"] == keyed)
                and p["log_odds"] is not None
            ]
            for kind, keyed in (("introspective", None), ("control", "yes"), ("control", "no"))
        ]
        known = (
            cell["concept"] in suite["concepts"]
            and cell["naming"]
            and cell["naming"][suite["concepts"].index(cell["concept"])] is not None
        )
        out.append(
            {key: cell[key] for key in ("framing", "strength", "concept")}
            | {
                "means": [float(np.mean(g)) if g else None for g in groups],
                "named": (
                    math.exp(cell["naming"][suite["concepts"].index(cell["concept"])]) if known else None
                ),
            }
        )
    return out


# lines of `injected`
INJECTION_CELLS: Table[dict] = Table(
    [
        words("framing", "framing", lambda cell: cell["framing"], most=40),
        figure("strength", "strength", lambda cell: cell["strength"], partial(number, form="g")),
        words("concept", "concept", lambda cell: cell["concept"] or "-"),
        figure("introspective", "introspective", lambda cell: cell["means"][0], signed),
        figure("control_yes", "control, Yes is right", lambda cell: cell["means"][1], signed),
        figure("control_no", "control, No is right", lambda cell: cell["means"][2], signed),
        figure("named", "named", lambda cell: cell["named"], percent),
    ],
    "small narrow",
)


def _right(line: Entry) -> str:
    return "right" if line[0]["correct"] else "wrong"


def _right_markup(line: Entry) -> str:
    item, before = line
    cell = f'<span class="{_right(line)}">{_right(line)}</span>'
    if before is None or before["correct"] == item["correct"]:
        return cell
    return f"{cell}<br><small>{'gained' if item['correct'] else 'lost'}</small>"


CAPABILITY: Table[Entry] = Table(
    [
        words("right", "", _right, markup=_right_markup),
        words("item", "item", lambda line: line[0]["id"]),
        words("question", "question", lambda line: line[0]["prompt"], css="wide", untrusted=True, most=500),
        words(
            "reply",
            "reply",
            lambda line: line[0]["reply"]["text"],
            css="wide",
            markup=lambda line: f'<pre dir="auto">{shown(line[0]["reply"]["text"], 700)}</pre>',
        ),
        words("grade", "grade", lambda line: line[0]["detail"], untrusted=True, most=300),
    ],
    sortable=False,
)


def texts_beside(suite: dict, before: dict | None) -> list[Entry]:
    """The texts of the suite "perplexity" with the baseline's, and a last line over all of them."""
    entries = beside(suite["texts"], {text["id"]: text for text in before["texts"]} if before else {})
    return [*entries, (suite | {"id": "all, by tokens", "total": True}, before)]


def _of_baseline(line: Entry) -> str:
    return number(line[1]["perplexity"]) if line[1] else ""


TEXTS: Table[Entry] = Table(
    [
        words("text", "text", lambda line: line[0]["id"]),
        Column("tokens", "tokens", lambda line: str(line[0]["tokens"])),
        Column("perplexity", "perplexity", lambda line: number(line[0]["perplexity"])),
        Column("baseline", "baseline", _of_baseline),
        Column(
            "change",
            "change, nats per token",
            lambda line: difference(line[0]["nll"], line[1]["nll"]) if line[1] else "",
        ),
    ],
    "small narrow",
    sortable=False,
    line_css=lambda line: "total" if "total" in line[0] else "",
)
# of the baseline, or where there is none
TEXTS_ALONE: Table[Entry] = Table(TEXTS.columns[:3], TEXTS.css, False, TEXTS.line_css)
