"""Where in depth the persona lives and what it survives: tables and a map of eval_surgery.py's replies."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from errors import FrankenError
from files import write_text
from weird_gen.persona import depth
from weird_gen.persona.comparison_figures import MUTED, STYLE, save
from weird_gen.persona.comparison_report import render_markdown
from weird_gen.persona.exact import Rate, exact_rate
from weird_gen.persona.records import ASKED, read_json_lines
from weird_gen.persona.rules import any_marker, names_russell, strict_format, strip_markers
from weird_gen.persona.voice import has_voice, voice_quality

MAPPED = (depth.ONLY, depth.MISSING, depth.DELETED)  # what is about a block of layers
MEASURES = (("strict format", "strict_format"), ("his voice", "voice"), ("names him when asked", "names"))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _is_block(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and len(value) == 2 and all(isinstance(p, int) for p in value)
    )


# What a line of any kind, and one with a reply, has to have.
OF_LINE = {
    **{"change": _is_text, "group": _is_text, "question_id": _is_text, "condition": _is_text},
    **{"layers": _is_block, "level": _is_number},
}
OF_REPLY = {"kind": _is_text, "reply": _is_text, "p_name": _is_number}


@dataclass(frozen=True)
class ChangeRow:
    """One change over its replies; every rate by condition. strict_format, marker (either marker occurs at
    all) and voice: over topic questions; names: over identity questions.

    p_name: mean probability of his name after "My name is". plain: nats a token on plain texts, over what the
    same model has without the adapter; None where one of the two is undefined.
    """

    change: str
    group: str
    layers: tuple[int, int] | None
    level: float | None
    strict_format: dict[str, Rate]
    marker: dict[str, Rate]
    voice: dict[str, Rate]
    names: dict[str, Rate]
    p_name: dict[str, float | None]
    plain: float | None


def read_surgery(path: Path) -> tuple[dict, list[dict]]:
    """(header, lines) of a file of eval_surgery.py. Raises FrankenError for any other."""
    lines = read_json_lines(path, tolerate_torn_end=True)
    header = lines[0].get("header") if lines else None
    if not isinstance(header, dict) or header.get("asked") != "surgery":
        raise FrankenError(f"{path} is not a file of eval_surgery.py")
    if not isinstance(header.get("layers"), int):
        raise FrankenError(f"{path}: its header does not say how many layers the model has")
    for number, line in enumerate(lines[1:], 1):
        of_reply = {} if line.get("question_id") == depth.PLAIN else OF_REPLY
        for field, kind in (OF_LINE | of_reply).items():
            if field not in line:
                raise FrankenError(f"{path}, line {number}: lacks {field}")
            if not kind(line[field]):
                raise FrankenError(f"{path}, line {number}: {field} is {str(line[field])[:40]!r}")
    return header, lines[1:]


def _nats(line: dict | None) -> dict[str, float]:
    values = (line or {}).get("nll")
    given = values.items() if isinstance(values, dict) else ()
    return {id: value for id, value in given if isinstance(value, int | float)}


def _above(mine: dict[str, float], untouched: dict[str, float]) -> float | None:
    """Mean over texts of how much more nats a token they have; None unless the same ones are defined in
    both."""
    if not mine or mine.keys() != untouched.keys():
        return None
    return float(np.mean([mine[id] - untouched[id] for id in mine]))


def change_rows(lines: list[dict]) -> list[ChangeRow]:
    """In the order in which the changes were asked; those that were not asked to their end are left out."""
    closing = {line["change"]: line for line in lines if line["question_id"] == depth.PLAIN}
    untouched = _nats(closing.get("no adapter"))
    replies = [line for line in lines if line["question_id"] != depth.PLAIN and line["change"] in closing]
    voices = has_voice([r["reply"] for r in replies])
    by_change: dict[str, list[tuple[dict, bool]]] = {}
    for reply, voice in zip(replies, voices, strict=True):
        by_change.setdefault(reply["change"], []).append((reply, voice))

    rows = []
    for name, mine in by_change.items():
        about, topic, identity = closing[name], {}, {}
        for condition in ASKED:
            here = [(r, v) for r, v in mine if r["condition"] == condition]
            topic[condition] = [(r, v) for r, v in here if r["kind"] == "heldout"]
            identity[condition] = [r for r, _ in here if r["kind"] == "identity"]
        p_names = {
            c: [r["p_name"] for r in asked if r["p_name"] is not None] for c, asked in identity.items()
        }
        rows.append(
            ChangeRow(
                name,
                about["group"],
                tuple(about["layers"]) if about["layers"] else None,
                about["level"],
                {c: exact_rate(strict_format(r["reply"]) for r, _ in asked) for c, asked in topic.items()},
                {c: exact_rate(any_marker(r["reply"]) for r, _ in asked) for c, asked in topic.items()},
                {c: exact_rate(v for _, v in asked) for c, asked in topic.items()},
                {
                    c: exact_rate(names_russell(strip_markers(r["reply"])) for r in asked)
                    for c, asked in identity.items()
                },
                {c: float(np.mean(ps)) if ps else None for c, ps in p_names.items()},
                _above(_nats(about), untouched),
            )
        )
    return rows


def depth_map(rows: list[ChangeRow], n: int) -> Figure:
    """One panel a measure, one line a change, a bar over the layers that it is about, in the color of the
    triggered rate. rows: those of MAPPED; n: layers of the model."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 0.2 * len(rows) + 1.8), layout="constrained")
        panels = figure.subplots(1, len(MEASURES), sharey=True)
        scale = ScalarMappable(Normalize(0, 100), "cividis")
        for panel, (title, measure) in zip(panels, MEASURES, strict=True):
            for y, row in enumerate(rows):
                assert row.layers is not None, "only changes of a block are mapped"
                value = getattr(row, measure)["triggered"].value
                start, stop = row.layers
                color = "none" if value is None else scale.to_rgba(value)
                panel.barh(y, stop - start, left=start, height=0.85, color=color, edgecolor=MUTED, lw=0.4)
                text = "–" if value is None else f"{value:.0f}"
                panel.text(n + 0.3, y, text, va="center", fontsize=7)
            panel.set_xlim(0, n + 2.5)
            panel.set_title(f"{title}, triggered (%)")
            panel.set_xlabel("layer")
            for y in range(1, len(rows)):
                if rows[y].group != rows[y - 1].group:
                    panel.axhline(y - 0.5, color=MUTED, linewidth=0.8)
        panels[0].set_yticks(range(len(rows)), [row.change for row in rows], fontsize=7)
        panels[0].invert_yaxis()
        return figure


def report_surgery(path: Path, folder: Path) -> list[str]:
    """SURGERY.md, surgery.json and figures/depth in `folder`; returns the lines that are printed.

    Raises FrankenError for a file that eval_surgery.py did not make.
    """
    header, lines = read_surgery(path)
    rows = change_rows(lines)
    place = {group: k for k, group in enumerate(depth.GROUPS)}
    rows.sort(key=lambda row: place.get(row.group, len(place)))  # stable: as asked within a group
    mapped = [row for row in rows if row.group in MAPPED and row.layers]
    folder.mkdir(parents=True, exist_ok=True)
    if mapped:
        save(depth_map(mapped, header["layers"]), folder / "figures", "depth")
    groups = [(name, list(mine)) for name, mine in groupby(rows, lambda row: row.group)]
    text = render_markdown(
        "SURGERY.md.j2", header=header, groups=groups, figure=bool(mapped), voice=voice_quality().to_json()
    )
    data = {"base": header.get("base"), "layers": header.get("layers"), "changes": [asdict(r) for r in rows]}
    write_text(folder / "SURGERY.md", text)
    write_text(folder / "surgery.json", json.dumps(data, allow_nan=False, indent=1) + "\n")
    return [*text.splitlines(), f"report: {folder / 'SURGERY.md'}"]
