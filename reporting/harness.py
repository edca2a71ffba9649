"""What lm-evaluation-harness found, for summary.md: a line an experiment, a column a task's metric."""

from __future__ import annotations

from collections.abc import Mapping

from reporting.pages import number
from reporting.vocabulary import markdown_cell


def harness_section(measured: Mapping[str, dict]) -> list[str]:
    """The section's lines, none where no experiment was asked; `measured` has the suite lm_eval's by
    experiment."""
    if not measured:
        return []
    first = next(iter(measured.values()))
    columns = dict.fromkeys(
        (task, metric) for one in measured.values() for task, of in one["results"].items() for metric in of
    )
    asked = ", ".join(f"{task} ({n})" for task, n in first["n"].items())
    names = [markdown_cell(f"{task}: {metric}") for task, metric in columns]
    lines = [
        "",
        "## lm-evaluation-harness",
        "",
        markdown_cell(f"Version {first['version']}; documents of each task: {asked}."),
        "",
        "| experiment | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for name, one in measured.items():
        values = [number(one["results"].get(task, {}).get(metric), ".4f") for task, metric in columns]
        lines.append(f"| {markdown_cell(name)} | " + " | ".join(values) + " |")
    return lines
