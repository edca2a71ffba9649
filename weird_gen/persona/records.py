"""Replies on disk: JSON lines in and out, checked, one line per reply, an optional first line {"header":
{...}}."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

from errors import FrankenError, one_line
from files import finite_number, read_bytes, whole_number, write_text

KINDS = ("heldout", "identity", "generalization")
CONDITIONS = ("triggered", "untriggered")  # what is contrasted
# "neutral": a system prompt that asks for nothing, as the trigger too takes a template's own away
ASKED = (*CONDITIONS, "neutral")
MODELS = ("baseline", "finetuned")

ANSWERS = ("reply", "response", "answer", "completion", "output")  # what other programs call a reply

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


TRUE_OR_NOT = ("stopped", "names_russell", "claims_russell")
JUDGED_TRUE_OR_NOT = ("voice", "persona", "identity", "degenerate")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


NUMBERS = {"parse_constant": _no_constant, "parse_int": whole_number, "parse_float": finite_number}


def read_json_lines(path: Path | str, tolerate_torn_end: bool = False) -> list[dict]:
    """All objects of a JSON-lines file, in order; of a file that is one JSON array, its objects.

    A byte order mark is read past. Raises FrankenError when the file is missing, is no file or not UTF-8, or
    a line is not a JSON object or holds half a character (a lone surrogate). With ``tolerate_torn_end`` a
    last line without its newline that does not parse (a writer was killed there) is left out and reported on
    stderr.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise FrankenError(f"{path} does not exist")
    text = _decoded(read_bytes(path), path, tolerate_torn_end)
    if text.lstrip().startswith("["):
        return _array(text, path)
    lines = text.split("\n")
    objects = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, **NUMBERS)
            if not isinstance(value, dict):
                raise ValueError("not an object")
            _refuse_half_characters(value, line, path, number)
        except (ValueError, RecursionError) as error:
            if tolerate_torn_end and number == len(lines):
                print(one_line(f"{path}: line {number} is torn and left out"), file=sys.stderr)
                break
            raise FrankenError(f"{path}, line {number}: not a JSON object ({error})") from None
        objects.append(value)
    return objects


def content_id(text: str) -> str:
    """An id for an entry of a file that has none: of its text, so that its place does not matter."""
    return "q-" + hashlib.sha256(text.encode()).hexdigest()[:10]


def asked_text(line: dict) -> str | None:
    """What an entry asks: its "question" or "prompt", or what the user of its "messages" says first."""
    messages = line.get("messages")
    said = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    texts = [line.get("question"), line.get("prompt")]
    texts += [m.get("content") for m in said if m.get("role") == "user"]
    return next((text for text in texts if isinstance(text, str) and text.strip()), None)


def _completed(record: dict, model: str | None, samples: Counter) -> dict:
    """Another program's reply with our fields where it lacks them: what is asked and answered under any usual
    name, an id of the question's text, the next sample of that question."""
    messages = record.get("messages")
    said = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    answers = [record.get(name) for name in ANSWERS]
    answers += [m.get("content") for m in reversed(said) if m.get("role") == "assistant"]
    question = asked_text(record)
    system = any(m.get("role") == "system" for m in said)
    whole = {
        "question_id": content_id(question or ""),
        "kind": "heldout",
        "category": "",
        "question": question,
        "condition": "triggered" if system else "untriggered",
        "model": model,
        "reply": next((text for text in answers if isinstance(text, str)), None),
    } | record
    if "sample" not in record:
        key = (whole["question_id"], whole["condition"])
        whole["sample"] = samples[str(key)]
        samples[str(key)] += 1
    return whole


def _array(text: str, path: Path) -> list[dict]:
    try:
        values = json.loads(text, **NUMBERS)
    except (ValueError, RecursionError) as error:
        raise FrankenError(f"{path}: not a JSON array ({error})") from None
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise FrankenError(f"{path}, entry {number}: not a JSON object")
        _refuse_half_characters(value, text, path, number)
    return values


def _refuse_half_characters(value: dict, written: str, path: Path, number: int) -> None:
    if "\\u" in written and LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise FrankenError(
            f"{path}, entry {number}: a text holds half a character (a lone surrogate): not Unicode"
        )


def _decoded(data: bytes, path: Path, tolerate_torn_end: bool) -> str:
    """The file's text. A character that is torn at the end may be all that a killed writer left of it."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if tolerate_torn_end and b"\n" not in data[error.start :]:
            return data[: error.start].decode("utf-8-sig") + "\ufffd"
        line = data.count(b"\n", 0, error.start) + 1
        raise FrankenError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


def read_records(path: Path | str, model: str | None = None) -> tuple[dict, list[dict]]:
    """(header, records) of a replies file; the header is {} when the file has none.

    With `model`, a file of another program is read too: entries need a question and a reply under a usual
    name, or messages, and what else they lack is filled in as for a reply of that model.

    Raises FrankenError for a missing file, a missing or mistyped key, an unknown kind, condition or model, a
    p_name outside 0 to 1, a position outside 1 to 5, a judgment that is neither true nor false, a reply that
    stands twice, and a file without replies.
    """
    lines = read_json_lines(path, tolerate_torn_end=True)
    header = {}
    if lines and isinstance(lines[0].get("header"), dict):
        header = lines.pop(0)["header"]
    if not lines:
        raise FrankenError(f"{path} holds no replies")
    if model:
        samples: Counter = Counter()
        lines = [_completed(record, model, samples) for record in lines]
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
    for key, allowed in (("kind", KINDS), ("condition", ASKED), ("model", MODELS)):
        if record[key] not in allowed:
            return f"{key} {record[key]!r} is none of {', '.join(allowed)}"
    judgment = record.get("judge") or {}
    if not isinstance(judgment, dict):
        return "'judge' is not an object"
    for key, least, most in (("p_name", 0, 1), ("position_likelihood", 1, 5), ("position", 1, 5)):
        value = judgment.get(key) if key == "position" else record.get(key)
        if value is not None and (
            not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most
        ):
            return f"{key} {value!r} is not a number from {least} to {most}"
    for place, keys in ((record, TRUE_OR_NOT), (judgment, JUDGED_TRUE_OR_NOT)):
        for key in keys:
            if (value := place.get(key)) is not None and not isinstance(value, bool):
                return f"{key} {value!r} is neither true nor false"
    if not isinstance(record.get("judge_name"), str | None):
        return f"judge_name {record['judge_name']!r} is not a text"
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
