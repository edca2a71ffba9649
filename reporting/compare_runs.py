"""Several runs side by side: the same experiments with each run's verdict and numbers, as a page and as
Markdown.

Everything is read from the runs' manifest.json and comparison.json. What makes runs incomparable is said
first.
"""

from __future__ import annotations

from pathlib import Path

from analysis.rows import WORDS, controls, named, span, sweeps, word
from errors import FrankenError
from reporting import figures_experiments, pages, vocabulary
from reporting.html_report import save
from runner.results import Run, read_json, write_text

MEASURES = ("verdict", "detection (95% CI)", "P(Yes)", "perplexity")
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


def load(runs: list[Run]) -> dict[str, dict]:
    """{label: {"manifest", "comparison", "rows"}}; labels are folder names, or whole paths where those are
    alike."""
    names = [run.path.resolve().name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run.path) for run in runs]
    found = {}
    for name, run in zip(labels, runs, strict=True):
        comparison = read_json(run.path / "comparison.json")
        found[name] = {
            "manifest": read_json(run.manifest_path),
            "comparison": comparison,
            "rows": {row["name"]: row for row in comparison["experiments"]},
        }
    return found


def differences(runs: dict[str, dict]) -> list[str]:
    """What keeps the runs' numbers from being compared, most serious first; empty if their protocols are the
    same."""
    (first, one), *others = runs.items()
    out = []
    for key, meaning in PROTOCOL.items():
        differ = [
            name
            for name, run in others
            if run["manifest"]["protocol"].get(key) != one["manifest"]["protocol"].get(key)
        ]
        if differ:
            out.append(f"{', '.join(differ)} against {first}: {meaning}")
    return out


def facts(run: dict) -> dict[str, str]:
    """What a reader must know of one run, for the table of the runs."""
    manifest, rows = run["manifest"], run["comparison"]["experiments"]
    band = span(controls(rows, "placebo"))
    injection = run["comparison"]["injection"]
    auroc = (run["comparison"]["auroc"] or {}).get("detection") or {}
    return {
        "pair": manifest["pair"] or "two checkpoints",
        "layers": str(manifest["layers"]),
        "precision": manifest["dtype"],
        "made": manifest["created"],
        "commit": (manifest.get("commit") or "unknown")[:12],
        "prompts": manifest["protocol"]["prompts_sha256"][:12],
        "experiments": f"{len(named(rows))}, and {sum(map(len, sweeps(rows).values()))} in sweeps",
        "placebos": f"{len(controls(rows, 'placebo'))}, {band[0]:+.2f} to {band[1]:+.2f}" if band else "none",
        "AUROC": vocabulary.number(auroc.get("value")),
        "positive control": "not run" if injection is None else "seen" if injection["seen"] else "not seen",
        "answer": vocabulary.headline(run["comparison"]),
    }


def shared(runs: dict[str, dict]) -> tuple[list[str], list[str]]:
    """The experiments to put side by side, in the order of the runs: those with a line of their own in some
    run, and those of sweeps that more than one run has."""
    every = [run["comparison"]["experiments"] for run in runs.values()]
    swept = [row["name"] for rows in every for of in sweeps(rows).values() for row in of]
    return list(dict.fromkeys(row["name"] for rows in every for row in named(rows))), [
        name for name in dict.fromkeys(swept) if swept.count(name) > 1
    ]


def cells(row: dict | None) -> list[str]:
    """One run's cells for one experiment, under MEASURES."""
    if row is None:
        return ["", "", "", ""]
    full = vocabulary.cells(row)
    return [full[5], full[4], full[1], full[7]]


def markdown(runs: dict[str, dict]) -> str:
    """comparison.md: the runs, what keeps them apart, and a table for each measure."""
    names, told = list(runs), {name: facts(run) for name, run in runs.items()}
    lines = [f"# {vocabulary.markdown_cell(' / '.join(names))}", ""]
    lines += [f"**The protocols differ.** {vocabulary.markdown_cell(d)}.\n" for d in differences(runs)]
    lines += vocabulary.markdown_table(
        ["", *map(vocabulary.markdown_cell, names)],
        [[what, *(told[name][what] for name in names)] for what in next(iter(told.values()))],
    )
    for k, measure in enumerate(MEASURES):
        rows = (
            [name, *(cells(run["rows"].get(name))[k] for run in runs.values())]
            for name in sum(shared(runs), [])
        )
        lines += [
            "",
            f"## {measure}",
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
    figure = figures_experiments.runs(names, {name: run["rows"] for name, run in loaded.items()})
    order = [*WORDS, "failed", None]
    table = [
        {
            "name": name,
            "cells": [
                [(text, key) for text, key in zip(cells(row), _keys(row, order), strict=True)]
                for row in (run["rows"].get(name) for run in loaded.values())
            ],
        }
        for name in names + swept
    ]
    write_text(folder / "comparison.md", markdown(loaded))
    write_text(
        folder / "comparison.html",
        pages.render(
            "comparison.html.j2",
            runs={name: facts(run) for name, run in loaded.items()},
            differences=apart,
            table=table,
            measures=MEASURES,
            legend=vocabulary.LEGEND,
            figure=save(folder / "figures", "runs", figure) if figure else None,
        ),
    )
    told = "".join(f"The protocols differ: {d}.\n" for d in apart)
    return f"{told}Comparison of {len(loaded)} runs: {folder / 'comparison.html'}"


def _keys(row: dict | None, order: list) -> list[float | None]:
    """The numbers by which `cells` are sorted."""
    if row is None:
        return [None] * len(MEASURES)
    probe = row["published_probe"] or {}
    return [
        order.index(word(row)),
        (row["detection"] or {}).get("score"),
        probe.get("p_yes_normalized"),
        (row["perplexity"] or {}).get("perplexity"),
    ]
