"""What lm-evaluation-harness measured, for summary.md and report.html: a line an experiment, a column
for each metric of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reporting.pages import number
from reporting.vocabulary import markdown_cell


@dataclass(frozen=True)
class HarnessResults:
    """`asked`: the harness's version and each task's documents, as a sentence. `columns`: (task, metric).
    `values`: by experiment, in the order of the columns; None where a metric is undefined."""

    asked: str
    columns: list[tuple[str, str]]
    values: dict[str, list[float | None]]


def harness_results(measured: Mapping[str, dict]) -> HarnessResults | None:
    """None where no experiment was asked; `measured` has the suite lm_eval's by experiment."""
    if not measured:
        return None
    first = next(iter(measured.values()))
    columns = dict.fromkeys(
        (task, metric) for one in measured.values() for task, of in one["results"].items() for metric in of
    )
    documents = ", ".join(f"{task} ({n})" for task, n in first["n"].items())
    return HarnessResults(
        f"Version {first['version']}; documents of each task: {documents}.",
        list(columns),
        {
            name: [one["results"].get(task, {}).get(metric) for task, metric in columns]
            for name, one in measured.items()
        },
    )


def harness_section(measured: Mapping[str, dict]) -> list[str]:
    """The lines of summary.md, none where no experiment was asked."""
    results = harness_results(measured)
    if results is None:
        return []
    names = [markdown_cell(f"{task}: {metric}") for task, metric in results.columns]
    lines = [
        "",
        "## lm-evaluation-harness",
        "",
        markdown_cell(results.asked),
        "",
        "| experiment | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for name, values in results.values.items():
        shown = " | ".join(number(value, ".4f") for value in values)
        lines.append(f"| {markdown_cell(name)} | {shown} |")
    return lines
