"""Replies on disk: JSON lines in and out, checked, one line per reply, an optional first line {"header":
{...}}."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from errors import FrankenError
from files import write_text

KINDS = ("heldout", "identity", "generalization")
CONDITIONS = ("triggered", "untriggered")
MODELS = ("baseline", "finetuned")

_TYPES = {
    "question_id": str,
    "kind": str,
    "category": str,
    "question": str,
    "condition": str,
    "model": str,
    "sample": int,
    "reply": str,
}


LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def read_json_lines(path: Path | str, tolerate_torn_end: bool = False) -> list[dict]:
    """All objects of a JSON-lines file, in order.

    A byte order mark is read past. Raises FrankenError when the file is missing, is not UTF-8, or a line is
    not a JSON object or holds half a character (a lone surrogate). With ``tolerate_torn_end`` a last line
    without its newline that does not parse (a writer was killed there) is left out and reported on stderr.
    """
    path = Path(path)
    try:
        text = _decoded(path.read_bytes(), path, tolerate_torn_end)
    except FileNotFoundError:
        raise FrankenError(f"{path} does not exist") from None
    except OSError as error:
        raise FrankenError(f"{path} cannot be read: {error.strerror}") from None
    lines = text.split("\n")
    objects = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_constant=_no_constant)
            if not isinstance(value, dict):
                raise ValueError("not an object")
            if "\\u" in line and LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
                raise FrankenError(
                    f"{path}, entry {number}: a text holds half a character (a lone surrogate): not Unicode"
                )
        except (ValueError, RecursionError) as error:
            if tolerate_torn_end and number == len(lines):
                print(f"{path}: line {number} is torn and left out", file=sys.stderr)
                break
            raise FrankenError(f"{path}, line {number}: not a JSON object ({error})") from None
        objects.append(value)
    return objects


def _decoded(data: bytes, path: Path, tolerate_torn_end: bool) -> str:
    """The file's text. A character that is torn at the end may be all that a killed writer left of it."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if tolerate_torn_end and b"\n" not in data[error.start :]:
            return data[: error.start].decode("utf-8-sig") + "\ufffd"
        line = data.count(b"\n", 0, error.start) + 1
        raise FrankenError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


def read_records(path: Path | str) -> tuple[dict, list[dict]]:
    """(header, records) of a replies file; the header is {} when the file has none.

    Raises FrankenError for a missing file, a missing or mistyped key, an unknown kind, condition or model, a
    p_name outside 0 to 1, a position_likelihood outside 1 to 5, a reply that stands twice, and a file without
    replies.
    """
    lines = read_json_lines(path, tolerate_torn_end=True)
    header = {}
    if lines and isinstance(lines[0].get("header"), dict):
        header = lines.pop(0)["header"]
    if not lines:
        raise FrankenError(f"{path} holds no replies")
    seen = set()
    for position, record in enumerate(lines, start=1):
        problem = _problem(record)
        identity = tuple(record.get(key) for key in ("model", "question_id", "condition", "sample"))
        if problem is None and identity in seen:
            problem = f"the reply {identity} stands twice"
        if problem:
            raise FrankenError(f"{path}, reply {position}: {problem}")
        seen.add(identity)
    return header, lines


def _problem(record: dict) -> str | None:
    for key, kind in _TYPES.items():
        if not isinstance(record.get(key), kind) or isinstance(record.get(key), bool):
            return f"{key!r} is missing or not of type {kind.__name__}"
    for key, allowed in (("kind", KINDS), ("condition", CONDITIONS), ("model", MODELS)):
        if record[key] not in allowed:
            return f"{key} {record[key]!r} is none of {', '.join(allowed)}"
    for key, least, most in (("p_name", 0, 1), ("position_likelihood", 1, 5)):
        value = record.get(key)
        if value is not None and (
            not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most
        ):
            return f"{key} {value!r} is not a number from {least} to {most}"
    judgment = record.get("judge")
    if judgment is not None and not isinstance(judgment, dict):
        return "'judge' is not an object"
    return None


def only_model(records: list[dict], model: str, path: Path | str) -> list[dict]:
    """The records, after a check that every one is from ``model`` (a swapped file would invert every
    table)."""
    others = {record["model"] for record in records} - {model}
    if others:
        raise FrankenError(f"{path} holds replies of {', '.join(sorted(others))}, not of {model} alone")
    return records


def write_records(path: Path | str, header: dict, records: list[dict]) -> None:
    """Write header and records as JSON lines, whole or not at all, in a folder that is made if need be.

    NaN and infinity raise ValueError, a disk that refuses FrankenError or OSError.
    """
    lines = [{"header": header}, *records]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), text)
