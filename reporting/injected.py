"""The injection suites in summary.md: each task's best condition, its controls, and what others found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analysis import published
from analysis.injection import Effect, effects
from reporting.vocabulary import markdown_table
from runner.results import Run, write_computed

TITLES = (
    "task",
    "measure",
    "added",
    "highest of",
    "depth",
    "strength",
    "value (95% CI)",
    "n",
    "chance",
    "others",
)
RIGHT = (False, False, False, True, True, True, True, True, True, False)
LEGEND = (
    "Of each kind of injection the condition with the highest value is shown, and of how many it is the"
    " highest: of many conditions the highest is high by luck too, so it is to be read beside the same for"
    " random directions, and beside nothing added; injection.json has all of them. Trials share concepts and"
    " sentences, so intervals are narrower than independent ones would be. Depth -: the middle third, or"
    " nothing added."
)


def injected_section(run: Run, measured: Iterable[Mapping[str, Any]], seed: int) -> list[str]:
    """Lines of Markdown about the suites injection_layers, injection_generation and localisation, and
    injection.json in the run's folder; nothing where none of them was asked. `measured`: each experiment's
    {suite: its measurements}."""
    rows = effects(measured, seed)
    if not rows:
        return []
    write_computed(
        run.path / "injection.json", {"schema_version": 1, "effects": [row.to_json() for row in rows]}
    )
    groups: dict[tuple[str, str, str, str], list[Effect]] = {}
    for row in rows:
        groups.setdefault((row.task, row.measure, _of(row), row.kind), []).append(row)
    lines = [_line(group) for group in groups.values()]
    sources = [
        f"- {task}, {measure}: {value:g}{_against(chance)} ({source})"
        for (task, measure), value, chance, source in published.INJECTION_EFFECTS
    ]
    return [
        "",
        "## Injection, task by task",
        "",
        *markdown_table(TITLES, lines, RIGHT),
        "",
        LEGEND,
        "",
        "What others found, on other models and with other directions:",
        "",
        *sources,
    ]


def _of(row: Effect) -> str:
    """What keeps conditions apart in the table: the question asked in words, and each garbled message."""
    if row.task == "in words":
        return row.condition.split(",")[0]
    return row.condition if row.kind == "garbled" else ""


def _line(group: Sequence[Effect]) -> list[str]:
    best = max(group, key=lambda row: float("-inf") if row.value is None else row.value)
    others = [v for what, v, *_ in published.INJECTION_EFFECTS if what == (best.task, best.measure)]
    about = ", ".join(filter(None, (best.task, _of(best))))
    shown = best.kind == "concept" and not about.endswith("unrelated")
    return [
        about,
        best.measure,
        best.kind,
        str(len(group)),
        "-" if best.depth is None else f"{best.depth:g}",
        f"{best.strength:g}",
        _value(best),
        str(best.n),
        "-" if best.chance is None else f"{best.chance:.2g}",
        ", ".join(f"{v:g}" for v in others) if shown else "",
    ]


def _value(row: Effect) -> str:
    if row.value is None:
        return "-"
    if row.low is None or row.high is None:
        return f"{row.value:.2f}"
    return f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"


def _against(chance: float | None) -> str:
    return "" if chance is None else f" against {chance:g}"
