"""A result's measurements made small for the disk and whole again: lists of like objects become tables.

`pack` works on any suite's measurements, by their shape alone, and `unpack(pack(x))` gives x back except for
digits beyond float32 in readings that are float32 (the keys FLOAT32 of a table). A list of objects with the
same keys becomes

    {"from_texts": "0f3a...", "same": {"finite": true}, "columns": ["log_odds", "mass"], "rows": [[0.5, 0.9]]}

`columns` name the values of every row. An entry {"name": "reply", "object": [columns]} stands for an object
whose values are a list in the row, {"name": "top", "list": [columns]} for a list of such objects. `same`
holds what all rows have in common. What an object with an "id" says about the question alone (the keys
QUESTION) is the same in every result of a run: it stands once in the run's texts.json, in the same order,
under the first 16 hex digits of its SHA-256, which `from_texts` names. What stands under the key "texts" and
is made of strings alone goes there too, as {"from_texts": "..."}.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

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
# Readings off a next-token distribution, which is float32: further digits say nothing. Log-odds keep theirs:
# every statistic comes from them, and a bootstrap's bound may turn on the last digit.
FLOAT32 = {"p_yes", "p_no", "mass", "p_yes_normalized", "entropy", "rating_mean", "p", "naming"}
PARTS = {"from_texts", "same", "columns", "rows"}
# Between these float32 holds 24 bits of a number
SMALLEST, LARGEST = 1.2e-38, 3.4e38


class Corrupt(ValueError):
    """What stands on disk is no table, or its questions are not among the run's texts."""


def shortest(number: float) -> float:
    """The number with the fewest digits that is the same float32; as it is where float32 cannot hold it."""
    if not SMALLEST < abs(number) < LARGEST:
        return number
    return float(str(np.float32(number)))


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
    """What `pack` was given. Raises Corrupt for what it cannot have written, with the reason."""
    if isinstance(value, list):
        return [unpack(v, texts) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"from_texts"}:
        return _shared(texts, value["from_texts"])
    if "columns" not in value or not value.keys() <= PARTS:
        return {key: unpack(part, texts) for key, part in value.items()}
    columns, rows, same = value["columns"], value.get("rows"), value.get("same", {})
    if not isinstance(columns, list) or not isinstance(rows, list) or not isinstance(same, dict):
        raise Corrupt("a table without columns and rows")
    objects = _objects(columns, rows, texts)
    if "from_texts" not in value:
        return [same | entry for entry in objects]
    questions = unpack(_shared(texts, value["from_texts"]), {})
    if not isinstance(questions, list) or len(questions) != len(objects):
        raise Corrupt(f"a table of {len(objects)} rows for other questions")
    return [question | same | entry for question, entry in zip(questions, objects, strict=True)]


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
    if not isinstance(key, str) or key not in texts:
        raise Corrupt(f"its questions {str(key)[:40]!r} are not among the run's texts")
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
    rest = [k for k in values[0] if k not in shared]
    same = {k: values[0][k] for k in rest if _constant([v[k] for v in values])}
    if same:
        table["same"] = {k: _cell(k, v, texts) for k, v in same.items()}
    columns, rows = _rows([{k: v[k] for k in rest if k not in same} for v in values], texts)
    return table | {"columns": columns, "rows": rows}


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
    if name not in FLOAT32:
        return pack(value, texts)
    if isinstance(value, list):
        return [_cell(name, v, texts) for v in value]
    return shortest(value) if isinstance(value, float) else pack(value, texts)


# ---- reading


def _objects(columns: list, rows: list, texts: dict) -> list[dict]:
    """The objects whose cells are in `rows`."""
    made: list[dict] = []
    for row in rows:
        if not isinstance(row, list) or len(row) != len(columns):
            raise Corrupt(f"a row that is not one value for each of {len(columns)} columns")
        made.append(dict(_value(column, cell, texts) for column, cell in zip(columns, row, strict=True)))
    return made


def _value(column, cell, texts: dict) -> tuple[str, object]:
    """(name, value) of one cell."""
    if isinstance(column, str):
        return column, unpack(cell, texts)
    if not isinstance(column, dict) or not isinstance(column.get("name"), str):
        raise Corrupt("a column without a name")
    inner = column.get("object", column.get("list"))
    if not isinstance(inner, list) or not isinstance(cell, list):
        raise Corrupt(f"the column {column['name'][:40]!r} or one of its cells is no list")
    if "object" in column:
        return column["name"], _objects(inner, [cell], texts)[0]
    return column["name"], _objects(inner, cell, texts)


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
