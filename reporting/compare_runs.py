"""Several runs side by side: the same experiments with each run's verdict and numbers, as a page and as
Markdown.

Everything is read from the runs' manifest.json and comparison.json. What makes runs incomparable is said
first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from analysis.comparison import Comparison, Row
from analysis.rows import controls, named, span, sweeps
from errors import FrankenError
from reporting import figures_experiments, pages, vocabulary
from reporting.columns import EXPERIMENT_COLUMNS, Column, cells, pick
from reporting.html_report import save
from reporting.pages import number
from reporting.reports import read_comparison
from runner.results import Run, read_json, write_text

MEASURES = pick(EXPERIMENT_COLUMNS, "verdict", "detection", "p_yes", "perplexity")
# What a difference in each part of the protocol means for the numbers beside each other.
PROTOCOL = {
    "prompts_sha256": "other questions were asked: none of the numbers can be compared",
    "trigger_sha256": "the trigger's questions differ",
    "texts": "perplexity is over other texts",
    "max_new_tokens": "replies had other budgets",
    "samples": "other numbers of samples",
    "temperature": "replies were sampled at other temperatures",
    "seed": "other seeds: noise, permutations and samples differ",
    "execute_code": "code answers were graded in other ways",
}


@dataclass(frozen=True)
class Side:
    """One of the runs that stand side by side."""

    manifest: dict
    comparison: Comparison

    @property
    def rows(self) -> dict[str, Row]:
        """By experiment."""
        return {row.name: row for row in self.comparison.experiments}


def load(runs: list[Run]) -> dict[str, Side]:
    """The runs by label: folder names, or whole paths where those are alike."""
    names = [run.path.resolve().name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run.path) for run in runs]
    return {
        label: Side(read_json(run.manifest_path), read_comparison(run))
        for label, run in zip(labels, runs, strict=True)
    }


def differences(runs: dict[str, Side]) -> list[str]:
    """What keeps the runs' numbers from being compared, most serious first; empty if their protocols are the
    same."""
    (first, one), *others = runs.items()
    out = []
    for key, meaning in PROTOCOL.items():
        differ = [
            name
            for name, run in others
            if run.manifest["protocol"].get(key) != one.manifest["protocol"].get(key)
        ]
        if differ:
            out.append(f"{', '.join(differ)} against {first}: {meaning}")
    return out


def facts(run: Side) -> dict[str, str]:
    """What a reader must know of one run, for the table of the runs."""
    manifest, rows = run.manifest, run.comparison.experiments
    band = span(controls(rows, "placebo"))
    injection, auroc = run.comparison.injection, run.comparison.auroc
    control = "not run"
    if injection:
        control = "seen" if injection.seen else "not seen"
    return {
        "pair": manifest["pair"] or "two checkpoints",
        "layers": str(manifest["layers"]),
        "precision": manifest["dtype"],
        "made": manifest["created"],
        "commit": (manifest.get("commit") or "unknown")[:12],
        "prompts": manifest["protocol"]["prompts_sha256"][:12],
        "experiments": f"{len(named(rows))}, and {sum(map(len, sweeps(rows).values()))} in sweeps",
        "placebos": f"{len(controls(rows, 'placebo'))}, {band[0]:+.2f} to {band[1]:+.2f}" if band else "none",
        "AUROC": number(auroc.detection.value if auroc else None),
        "positive control": control,
        "answer": vocabulary.headline(run.comparison),
    }


def shared(runs: dict[str, Side]) -> tuple[list[str], list[str]]:
    """The experiments to put side by side, in the order of the runs: those with a line of their own in some
    run, and those of sweeps that more than one run has."""
    every = [run.comparison.experiments for run in runs.values()]
    swept = [row.name for of in map(sweeps, every) for rows in of.values() for row in rows]
    return list(dict.fromkeys(row.name for rows in every for row in named(rows))), [
        name for name in dict.fromkeys(swept) if swept.count(name) > 1
    ]


def cell(row: Row | None, column: Column[Row]) -> str:
    """One run's cell for one experiment; empty where the run has not got it."""
    return cells(row, [column])[0] if row else ""


def markdown(runs: dict[str, Side]) -> str:
    """comparison.md: the runs, what keeps them apart, and a table for each measure."""
    names, about = list(runs), {name: facts(run) for name, run in runs.items()}
    lines = [f"# {vocabulary.markdown_cell(' / '.join(names))}", ""]
    lines += [f"**The protocols differ.** {vocabulary.markdown_cell(d)}.\n" for d in differences(runs)]
    lines += vocabulary.markdown_table(
        ["", *map(vocabulary.markdown_cell, names)],
        [[what, *(about[name][what] for name in names)] for what in next(iter(about.values()))],
    )
    for column in MEASURES:
        rows = (
            [name, *(cell(run.rows.get(name), column) for run in runs.values())]
            for name in sum(shared(runs), [])
        )
        lines += [
            "",
            f"## {column.title}",
            "",
            *vocabulary.markdown_table(["experiment", *map(vocabulary.markdown_cell, names)], rows),
        ]
    return "\n".join([*lines, "", vocabulary.LEGEND, ""])


def write_comparison(runs: list[Run], folder: Path) -> str:
    """Write comparison.html, comparison.md and the figure to `folder`; returns what to say about it.

    The runs' own comparison.json must be there. Raises FrankenError if one cannot be read or the disk
    refuses.
    """
    loaded = load(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FrankenError(f"cannot write the comparison to {folder}: {e.strerror}") from e
    (names, swept), apart = shared(loaded), differences(loaded)
    figure = figures_experiments.runs(names, {name: run.rows for name, run in loaded.items()})
    every = [run.rows for run in loaded.values()]
    tables = [
        (
            column,
            [
                (name, [(cell(row, column), _key(row, column)) for row in (of.get(name) for of in every)])
                for name in names + swept
            ],
        )
        for column in MEASURES
    ]
    write_text(folder / "comparison.md", markdown(loaded))
    write_text(
        folder / "comparison.html",
        pages.render(
            "comparison.html.j2",
            runs={name: facts(run) for name, run in loaded.items()},
            differences=apart,
            tables=tables,
            legend=vocabulary.LEGEND,
            figure=save(folder / "figures", "runs", figure) if figure else None,
        ),
    )
    warnings = "".join(f"The protocols differ: {d}.\n" for d in apart)
    return f"{warnings}Comparison of {len(loaded)} runs: {folder / 'comparison.html'}"


def _key(row: Row | None, column: Column[Row]) -> float | None:
    """The number by which `cell` is sorted."""
    return column.key(row) if row and column.key else None
