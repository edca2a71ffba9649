"""HTML pages from templates: what a model wrote stays text, and nothing runs but the one script of our own.

The templates escape whatever they print, characters that hide or reorder text are spelled out, and the page's
own policy allows the script and the style by their hashes, images within the page, and no connection.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from analysis.verdicts import MAX_PERCENT
from errors import HIDDEN, many, printable  # noqa: F401  the pages' tests ask for HIDDEN here

TEMPLATES = Path(__file__).resolve().parent / "templates"
PLAIN = 1e5  # from there on numbers are written with a power of ten
LONGEST_REPLY, LONGEST_TOKEN = 4000, 30  # characters shown; the experiment's JSON has the rest


def spelled(value):
    """Text with what hides or reorders it spelled out; anything else, and what is markup already, as it is.

    Applied to whatever a template prints.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return printable(value)


def visible(text: object, most: int = LONGEST_REPLY) -> str:
    """Text as it may be shown: spelled out, and cut where that is shorter, which it says."""
    text = str(text)
    if len(text) <= most:
        return spelled(text)
    cut = f"… [{len(text) - most:,} more characters]"
    return spelled(text) if len(text) <= most + len(cut) else spelled(text[:most]) + cut


def shown(text: str, most: int = LONGEST_REPLY) -> str:
    """HTML of `visible` text, escaped."""
    return _shown(text, most) if len(text) < 500 else str(escape(visible(text, most)))


@functools.lru_cache(maxsize=4096)  # what all experiments are asked stands in a page of each
def _shown(text: str, most: int) -> str:
    return str(escape(visible(text, most)))


def token(text: str) -> str:
    """A token with its white space to be seen."""
    shown = (
        text[:LONGEST_TOKEN].replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") + text[LONGEST_TOKEN:]
    )
    return visible(shown, LONGEST_TOKEN) or "(empty)"


def breakable(text: str) -> Markup:
    """A name that may be parted after an underscore where its column is narrow."""
    return Markup("_<wbr>").join(str(text).split("_"))


def linked(text: str) -> Markup:
    """Text of our own in which every "arXiv 2602.20031" leads to that paper."""
    return Markup(
        re.sub(
            r"arXiv (\d{4}\.\d{5})",
            r'<a href="https://arxiv.org/abs/\1">\g<0></a>',
            str(escape(visible(text))),
        )
    )


def percent(p: float | None) -> str:
    """A share as a percentage with two significant digits, however small; over 1000% as a factor."""
    if p is None:
        return "-"
    if p == 0:
        return "0%"
    if p > MAX_PERCENT:
        return f"{p:.3g} ×"
    return f"{100 * p:.1f}%" if p >= 0.01 else f"{100 * p:.2g}%"


def number(x: float | None, form: str = ".2f") -> str:
    if x is None:
        return "-"
    return f"{x:{form}}" if abs(x) < PLAIN else f"{x:.1e}"


def size(count: float | None) -> str:
    """Bytes as people read them."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            break
        count, unit = count / 1000, "TB"
    return f"{count:.3g} {unit}"


def rate(amount: float | None, seconds: float | None, form=lambda x: f"{x:,.0f}") -> str:
    return form(amount / seconds) + "/s" if amount and seconds else "-"


def difference(new: float | None, old: float | None) -> str:
    return "-" if new is None or old is None else f"{new - old:+.2f}"


def slug(verdict: str) -> str:
    """A CSS class for a verdict or a call."""
    return verdict.partition(":")[0].lower().replace(" ", "-")


def verdict(text: str | None) -> Markup:
    """A verdict in its color, with its sign; nothing for none."""
    if not text:
        return Markup()
    return Markup('<span class="verdict {}">{}</span>').format(slug(text), visible(text, 80))


def sort_key(value: float | None) -> Markup:
    """The attribute by which a cell is sorted; what is undefined goes last, whichever way the column is
    sorted."""
    return Markup(sort_attribute(value))


def sort_attribute(value: float | None) -> str:
    """The same as a string."""
    return ' data-sort=""' if value is None else f' data-sort="{float(value):.10g}"'


def is_table(value: object) -> bool:
    """Whether a dictionary of dictionaries reads best as one table: plain values under shared keys."""
    rows = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        return False
    return bool(rows) and all(
        isinstance(r, dict)
        and r.keys() == rows[0].keys()
        and not any(isinstance(v, dict | list) for v in r.values())
        for r in rows
    )


def by_id(suite: dict | None, key: str) -> dict[str, dict]:
    """A suite's probes, items or texts by their id; empty where the suite was not measured."""
    return {entry["id"]: entry for entry in suite[key]} if suite else {}


def data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        finalize=spelled,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        auto_reload=False,  # no look at a template's file each time that it is used
        loader=jinja2.FileSystemLoader(TEMPLATES),
    )
    environment.filters |= {
        "visible": visible,
        "token": token,
        "size": size,
        "slug": slug,
        "verdict": verdict,
        "linked": linked,
        "breakable": breakable,
        "percent": percent,
        "number": number,
        "many": many,
    }
    environment.globals |= {
        "rate": rate,
        "difference": difference,
        "size": size,
        "by_id": by_id,
        "is_table": is_table,
        "sort_key": sort_key,
    }
    return environment


def read_templates() -> None:
    """Have all templates ready, which are compiled when they are first used."""
    for name in _environment().list_templates(extensions=["j2"]):
        _environment().get_template(name)


def part(template: str, **values) -> str:
    """A part of a page from templates/`template`, to be set into a page as it is."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _frame() -> dict[str, Markup]:
    """What every page has: its look, its script, and the policy that allows these two alone. Our own files,
    the only text that is not escaped."""
    parts = {name: (TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "page.js")}
    hashes = {
        name: "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for name, text in parts.items()
    }
    policy = (
        f"default-src 'none'; img-src data:; style-src {hashes['style.css']}; script-src {hashes['page.js']};"
        " connect-src 'none'; base-uri 'none'; form-action 'none'"
    )
    return {
        "policy": Markup(policy),
        "style": Markup(parts["style.css"]),
        "script": Markup(parts["page.js"]),
    }


def render(template: str, **values) -> str:
    """A page from templates/`template`."""
    return _environment().get_template(template).render(**_frame(), **values).lstrip()
