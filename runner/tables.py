"""A result's measurements made small for the disk and whole again: lists of like objects become tables.

`pack` works on any suite's measurements, by their shape alone, and `unpack(pack(x))` gives x back except for
digits that no model's readings have: of the keys READINGS of a table six significant ones are kept, of
log-odds those down to a millionth of a nat. A list of objects with the same keys becomes

    {"from_texts": "0f3a...", "same": {"finite": true}, "columns": ["log_odds", "mass"], "rows": [[0.5, 0.9]]}

`columns` name the values of every row. An entry {"name": "reply", "object": [columns]} stands for an object
whose values are a list in the row, {"name": "top", "list": [columns]} for a list of such objects. `same`
holds what all rows have in common. `derived` names what is not written because it follows from log-odds and
mass: p_yes_normalized is the logistic function of the log-odds, p_yes and p_no are its and its complement's
share of the mass. What an object with an "id" says about the question alone (the keys
QUESTION) is the same in every result of a run: it stands once in the run's texts.json, in the same order,
under the first 16 hex digits of its SHA-256, which `from_texts` names. What stands under the key "texts" and
is made of strings alone goes there too, as {"from_texts": "..."}.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from typing import TypeGuard

# Keys of an object with an "id" that belong to the question, not to what a model made of it. A suite that
# uses these names has them written once per run; under other names they are written in every result.
QUESTION = (
    "id",
    "text",
    "prompt",
    "kind",
    "keyed",
    "framing",
    "pair",
    "published",
    "difficulty",
    "format",
    "question",
    "category",
    "mode",
)
# Readings off a next-token distribution, which is float32: its own sums differ in the seventh digit.
READINGS = {"p_yes", "p_no", "mass", "p_yes_normalized", "entropy", "rating_mean", "p", "naming"}
DIGITS = 6  # significant ones of a reading
LOG_ODDS = "log_odds"  # every statistic comes from them
# Of log-odds: a millionth of a nat. Reading prompts packed instead of padded changed them by up to 1e-4.
DECIMALS = 6
DERIVED = ("p_yes", "p_no", "p_yes_normalized")
PLAIN = {str, int, float, bool, type(None)}  # what JSON holds that holds nothing else
Named = tuple[str, Sequence]  # a column: the key, and its value in each object
PARTS = {"from_texts", "same", "columns", "rows", "derived"}


class Corrupt(ValueError):
    """What stands on disk is no table."""


class Lacking(Corrupt):
    """A table's questions are not among the run's texts: the texts are at fault, not the table."""


def recorded(name: str, number: float) -> float:
    """A number with the digits that are kept of the key `name`."""
    if name == LOG_ODDS:
        return round(number, DECIMALS)
    return float(f"{number:.{DIGITS}g}") if name in READINGS else number


def derive(log_odds: float, mass: float) -> dict:
    """What follows from an answer's log-odds and the mass of Yes and No: its DERIVED readings."""
    rest = math.exp(-abs(log_odds))
    more, less = 1 / (1 + rest), rest / (1 + rest)
    yes, no = (more, less) if log_odds >= 0 else (less, more)
    return {"p_yes": mass * yes, "p_no": mass * no, "p_yes_normalized": yes}


def pack(value, texts: dict):
    """`value` with its lists of like objects as tables; what belongs to the questions is added to `texts`.

    Raises ValueError for an object that could be mistaken for a table.
    """
    if isinstance(value, dict):
        if value.keys() & {"columns", "from_texts"} and value.keys() <= PARTS:
            raise ValueError(f"an object with the keys {', '.join(sorted(value))} reads as a table")
        return {
            key: {"from_texts": _share(texts, part)}
            if key == "texts" and isinstance(part, dict | list) and part and _is_text(part)
            else pack(part, texts)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return _table(value, texts) if len(value) > 1 and _alike(value) else [pack(v, texts) for v in value]
    return value


def unpack(value, texts: dict):
    """What `pack` was given. Raises Corrupt for what it cannot have written, with the reason, and Lacking
    for questions that `texts` has not got, with their key."""
    if isinstance(value, list):
        return [unpack(v, texts) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"from_texts"}:
        return _shared(texts, value["from_texts"])
    if "columns" not in value or not value.keys() <= PARTS:
        return {key: unpack(part, texts) for key, part in value.items()}
    made, same = _columns(value["columns"], value.get("rows"), texts), value.get("same", {})
    if not isinstance(same, dict):
        raise Corrupt("what all of a table's rows have in common is no object")
    # of a name that stands twice the last counts, in the place of the first, as where objects are joined
    count = len(value["rows"])
    made = [(name, [cell] * count) for name, cell in same.items()] + made
    if "from_texts" in value:
        made = _questions(_shared(texts, value["from_texts"]), count) + made
    if "derived" in value:
        made += _derived(dict(made), value["derived"])
    return _objects(made, count)


def _questions(asked, count: int) -> list[Named]:
    """What the run's texts hold of a table's `count` questions."""
    if not isinstance(asked, dict) or asked.keys() != {"columns", "rows"}:
        raise Corrupt("its questions are no table")
    named = _columns(asked["columns"], asked["rows"], {})
    if len(asked["rows"]) != count:
        raise Corrupt(f"a table of {count} rows for other questions")
    return named


def _derived(named: dict[str, Sequence], derived) -> list[Named]:
    """What a table leaves to be derived."""
    log_odds, mass = named.get(LOG_ODDS, ()), named.get("mass", ())
    if derived != list(DERIVED) or not (log_odds and mass and all(map(_is_number, (*log_odds, *mass)))):
        raise Corrupt("readings are to be derived, and what they follow from is not there")
    readings = [derive(*pair) for pair in zip(log_odds, mass, strict=True)]
    return [(name, [reading[name] for reading in readings]) for name in DERIVED]


def _is_number(value) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value) -> bool:
    if isinstance(value, dict):
        return all(map(_is_text, value.values()))
    return all(map(_is_text, value)) if isinstance(value, list) else isinstance(value, str)


def _alike(values: list) -> bool:
    """All are objects with the same keys, at least one."""
    return (
        bool(values)
        and all(isinstance(v, dict) for v in values)
        and all(v.keys() == values[0].keys() != set() for v in values)
    )


def key_of(value) -> str:
    """The name of something among a run's texts: 16 hex digits over it."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _share(texts: dict, value) -> str:
    key = key_of(value)
    texts[key] = value
    return key


def _shared(texts: dict, key):
    if not isinstance(key, str):
        raise Corrupt(f"{str(key)[:40]!r} names no questions")
    if key not in texts:
        raise Lacking(key[:40])
    return texts[key]


# ---- writing


def _table(values: list[dict], texts: dict) -> dict:
    """The table of objects with the same keys."""
    table, shared = {}, []
    if "id" in values[0]:
        shared = [
            k for k in values[0] if k in QUESTION and not any(isinstance(v[k], dict | list) for v in values)
        ]
        rows = [[v[k] for k in shared] for v in values]
        table["from_texts"] = _share(texts, {"columns": shared, "rows": rows})
    derived = list(DERIVED) if _follow(values) else []
    rest = [k for k in values[0] if k not in (*shared, *derived)]
    same = {k: values[0][k] for k in rest if _constant([v[k] for v in values])}
    if same:
        table["same"] = {k: _cell(k, v, texts) for k, v in same.items()}
    columns, rows = _rows([{k: v[k] for k in rest if k not in same} for v in values], texts)
    return table | ({"derived": derived} if derived else {}) | {"columns": columns, "rows": rows}


def _follow(values: list[dict]) -> bool:
    """Whether all objects' DERIVED readings follow from their log-odds and mass, to the digits kept."""
    if not values[0].keys() >= {LOG_ODDS, "mass", *DERIVED}:
        return False
    for value in values:
        given = [value[name] for name in (LOG_ODDS, "mass", *DERIVED)]
        if not all(isinstance(number, float) for number in given):
            return False
        log_odds, mass = (recorded(name, value[name]) for name in (LOG_ODDS, "mass"))
        # the mass is rounded to half of its last digit, which is at most 5e-6 of it
        follow = zip(derive(log_odds, mass).values(), given[2:], strict=True)
        if not all(math.isclose(number, read, rel_tol=10 / 10**DIGITS) for number, read in follow):
            return False
    return True


def _constant(cells: list) -> bool:
    first = cells[0]
    return not isinstance(first, dict | list) and all(repr(c) == repr(first) for c in cells)


def _rows(values: list[dict], texts: dict) -> tuple[list, list[list]]:
    """(columns, one list of cells per object) of objects with the same keys."""
    columns, cells = [], []
    for name in values[0] if values else ():
        column = [v[name] for v in values]
        flat = [item for cell in column if isinstance(cell, list) for item in cell]
        if _alike(column):
            inner, packed = _rows(column, texts)
            columns.append({"name": name, "object": inner})
        elif all(isinstance(cell, list) for cell in column) and _alike(flat) and "id" not in flat[0]:
            inner, one_by_one = _rows(flat, texts)
            left = iter(one_by_one)
            packed = [[next(left) for _ in cell] for cell in column]
            columns.append({"name": name, "list": inner})
        else:
            packed = [_cell(name, cell, texts) for cell in column]
            columns.append(name)
        cells.append(packed)
    return columns, [list(row) for row in zip(*cells, strict=True)] if cells else [[] for _ in values]


def _cell(name: str, value, texts: dict):
    """A cell that is neither an object like the others of its column nor a list of such."""
    if name not in READINGS and name != LOG_ODDS:
        return pack(value, texts)
    if isinstance(value, list):
        return [_cell(name, v, texts) for v in value]
    return recorded(name, value) if isinstance(value, float) else pack(value, texts)


# ---- reading


def _columns(columns, rows, texts: dict) -> list[Named]:
    """The columns of the cells in `rows`: most hold nothing but numbers and texts, as they stand, so
    that a whole column is looked at."""
    if not isinstance(columns, list) or not isinstance(rows, list):
        raise Corrupt("a table without columns and rows")
    if not ({list}.issuperset(map(type, rows)) and {len(columns)}.issuperset(map(len, rows))):
        raise Corrupt(f"a row that is not one value for each of {len(columns)} columns")
    cells = zip(*rows, strict=True) if rows else [()] * len(columns)
    return [_column(column, of, texts) for column, of in zip(columns, cells, strict=True)]


def _objects(named: list[Named], count: int) -> list[dict]:
    """The `count` objects whose values stand in columns."""
    if not named:
        return [{} for _ in range(count)]
    names, values = zip(*named, strict=True)
    return list(map(dict, map(zip, itertools.repeat(names), zip(*values, strict=True))))


def _column(column, cells: Sequence, texts: dict) -> Named:
    """(name, values) of a column's cells."""
    if isinstance(column, str):
        if PLAIN.issuperset(map(type, cells)):
            return column, cells
        return column, [unpack(cell, texts) for cell in cells]
    if not isinstance(column, dict) or not isinstance(column.get("name"), str):
        raise Corrupt("a column without a name")
    inner = column.get("object", column.get("list"))
    if not isinstance(inner, list) or not all(isinstance(cell, list) for cell in cells):
        raise Corrupt(f"the column {column['name'][:40]!r} or one of its cells is no list")
    if "object" in column:
        return column["name"], _objects(_columns(inner, list(cells), texts), len(cells))
    # of all lists at once, which are then parted again
    rows = [row for cell in cells for row in cell]
    every = iter(_objects(_columns(inner, rows, texts), len(rows)))
    return column["name"], [list(itertools.islice(every, len(cell))) for cell in cells]


# ---- text


def layout(value, indent: int = 0) -> str:
    """JSON in which an object's key, a list's item and a table's row have a line each, or share one if short.

    Raises ValueError for NaN and infinity.
    """
    line = _line(value)
    if len(line) + indent <= 100:
        return line
    pad, ends = "\n" + " " * (indent + 1), "\n" + " " * indent
    if isinstance(value, dict):
        parts = [f"{_line(key)}: {layout(part, indent + 1)}" for key, part in value.items()]
        return "{" + pad + f",{pad}".join(parts) + ends + "}"
    if isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        return "[" + pad + f",{pad}".join(_row(v) for v in value) + ends + "]"
    return line


def _line(value) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def _row(value) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
