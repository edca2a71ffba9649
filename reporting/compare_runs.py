"""Several runs side by side: the same experiments with each run's verdict and numbers, as a page and as
Markdown.

Everything is read from the runs' manifest.json and comparison.json, and, where a source of theirs is not
known to have the same weights, the recipes from their results; nothing of theirs is written. What makes runs
incomparable is said first.
"""

from __future__ import annotations

import contextlib
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from markupsafe import Markup

from analysis.comparison import Comparison, Row
from analysis.rows import UNCALLED, controls, named, span, sweeps, word
from analysis.verdicts import lacking
from errors import FrankenError, one_line
from reporting import figures_runs, pages, vocabulary
from reporting.columns import EXPERIMENT_COLUMNS, Column, cells, pick
from reporting.html_report import EVERY_FORM, save
from reporting.page_tables import Table
from reporting.pages import number
from reporting.reports import compare_run, read_comparison
from runner.results import Run, read_json, write_text
from surgery.recipes import Recipe

MEASURES = pick(EXPERIMENT_COLUMNS, "verdict", "detection", "p_yes", "capability", "perplexity")
LETTERS = string.ascii_uppercase  # what stands for the runs, in their order, over the columns
DIFFERENCES = (
    "Differences are from run A: of detection scores in nats, of P(Yes) and of the share of tasks solved in"
    " percentage points; perplexity as a ratio. They are plain differences, without an interval of their own."
    " Where P(Yes) is no answer in one of the runs, other questions were asked, or a source of the changed"
    " model's weights is not known to be the same as in run A, there is none."
)
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
    used: dict[str, set[str]] = field(default_factory=dict)
    """By experiment, the sources of its recipe; what is not in it may use any."""

    @property
    def rows(self) -> dict[str, Row]:
        """By experiment."""
        return {row.name: row for row in self.comparison.experiments}


def load(runs: list[Run]) -> dict[str, Side]:
    """The runs by label: folder names, or whole paths where those are alike."""
    names = [run.path.resolve().name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run.path) for run in runs]
    sides = {}
    for label, run in zip(labels, runs, strict=True):
        manifest = read_json(run.manifest_path)
        try:
            comparison = read_comparison(run)
        except FrankenError:  # none yet, or one of another version: made from the results, and not written
            comparison = compare_run(run, manifest)
        sides[label] = Side(manifest, comparison)
    first, *others = sides.values()
    if not any(_sources_apart(first, side) for side in others):
        return sides
    return {
        label: replace(side, used=_sources_used(run, side.manifest))
        for (label, side), run in zip(sides.items(), runs, strict=True)
    }


def _sources_used(run: Run, manifest: dict) -> dict[str, set[str]]:
    """By experiment, the sources of its recipe, as far as the run's results can be read."""
    out = {}
    for name in manifest["experiments"]:
        with contextlib.suppress(FrankenError):
            if result := run.load(name):
                out[name] = Recipe.from_json(result["experiment"]["recipe"]).sources
    return out


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


def _apart(one: dict, name: str, other: dict, also: str, depth: int = 3) -> str:
    """Why source `name` of one manifest's sources is not known to be source `also` of another's; empty where
    it is the same: by the hashes of its files, and of those that an adapter lies over."""
    a, b = one.get(name), other.get(also)
    if a is None or b is None or not depth:
        return f"source {name} is not in both, so it is not known to have the same weights"
    if any(a.get(key) != b.get(key) for key in ("kind", "scale")):
        return f"source {name} is of another kind or scale"
    unknown = f"source {name} is not known to have the same weights: no hash of the same files is in both"
    files, theirs = a.get("files") or {}, b.get("files") or {}
    if not files or files.keys() != theirs.keys():
        return unknown
    for file, entry in files.items():
        key = next((k for k in ("sha256", "sampled_sha256") if entry.get(k) and theirs[file].get(k)), None)
        if key is None:
            return unknown
        if entry[key] != theirs[file][key]:
            hashes = f"{str(theirs[file][key])[:12]}, not {str(entry[key])[:12]}"
            return f"source {name} has other weights ({key.replace('_', ' ')} {hashes})"
    under = [str(side.get("over")) for side in (a, b)]
    if ("over" in a or "over" in b) and (why := _apart(one, under[0], other, under[1], depth - 1)):
        return f"source {name} is an adapter over what is not known to be the same: {why}"
    return ""


def _sources_apart(one: Side, other: Side) -> dict[str, str]:
    """The sources that are not known to be the same in both runs, and why; those of one run alone too."""
    a, b = (side.manifest.get("sources", {}) for side in (one, other))
    return {name: why for name in a | b if (why := _apart(a, name, b, name))}


def other_weights(runs: dict[str, Side]) -> list[str]:
    """Which sources of a name that both have are not known to be the first run's, and why."""
    (first, one), *others = runs.items()
    return [
        f"{label} against {first}: {why}"
        for label, run in others
        for name, why in _sources_apart(one, run).items()
        if all(name in side.manifest.get("sources", {}) for side in (one, run))
    ]


def facts(run: Side) -> dict[str, str]:
    """What a reader must know of one run, for the table of the runs."""
    manifest, rows = run.manifest, run.comparison.experiments
    band = span(controls(rows, "placebo"))
    injection, auroc = run.comparison.injection, run.comparison.auroc
    control = "not run"
    if injection:
        control = "seen" if injection.seen else "not seen"
    return {
        "model": vocabulary.model_name(manifest),
        "sources": vocabulary.sides(manifest),
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


@dataclass(frozen=True)
class Together:
    """One experiment in all runs, in their order; None in a run that has not got it. `apart`: the places of
    those in which its recipe uses a source that is not known to have the first run's weights."""

    name: str
    rows: list[Row | None]
    apart: frozenset[int] = frozenset()


def cell(row: Row | None, column: Column[Row]) -> str:
    """One run's cell for one experiment; empty where the run has not got it."""
    return cells(row, [column])[0] if row else ""


def figure_leaves_out(run: Side, names: Sequence[str]) -> str:
    """Which of these experiments have no marks of this run in the figure, and why, in words; empty where all
    have."""
    rows = [run.rows[name] for name in names if name in run.rows]
    return vocabulary.counted_out(
        (w, lacking(row)) for row in rows if (w := word(row)) in (*UNCALLED, "failed")
    )


def _of_run(column: Column[Row], k: int, letter: str) -> Column[Together]:
    """A measure of run k as a column of its own."""

    def key(line: Together) -> float | None:
        row = line.rows[k]
        return column.key(row) if row and column.key else None

    def marked(line: Together) -> Markup:
        return pages.verdict(cell(line.rows[k], column))

    return Column(
        f"{column.name}_{letter}",
        f"{column.title} {letter}",
        lambda line: cell(line.rows[k], column),
        key,
        align=column.align,
        css="nowrap" if column.align == "left" else "",
        markup=marked if column.name == "verdict" else None,
    )


def _answered(row: Row) -> bool:
    return row.published_probe is not None and row.published_probe.answered


# How the same measure of two runs is set against each other: (of what, title, number, its form). Where P(Yes)
# is no answer, there is nothing to compare.
AGAINST: dict[str, tuple[Callable[[Row], bool], str, Callable[[float, float], float | None], str]] = {
    "detection": (lambda row: True, "nats", lambda new, old: new - old, "+.2f"),
    "p_yes": (_answered, "points", lambda new, old: 100 * (new - old), "+.1f"),
    "capability": (lambda row: True, "points", lambda new, old: 100 * (new - old), "+.1f"),
    "perplexity": (lambda row: True, "ratio", lambda new, old: new / old if old else None, ".3f"),
}


def _difference(column: Column[Row], k: int, letter: str) -> Column[Together]:
    """A measure of run k against the first run's."""
    counts, unit, against, form = AGAINST[column.name]

    def read(line: Together) -> float | None:
        new, old = line.rows[k], line.rows[0]
        if new is None or old is None or not column.key or not (counts(new) and counts(old)):
            return None
        if k in line.apart:
            return None
        values = column.key(new), column.key(old)
        return None if values[0] is None or values[1] is None else against(values[0], values[1])

    sign = "/" if unit == "ratio" else "−"
    title = f"{column.title.partition(' (')[0]} {letter} {sign} {LETTERS[0]}" + (
        "" if unit == "ratio" else f", {unit}"
    )

    def text(line: Together) -> str:
        value = read(line)
        return "" if value is None else number(value, form)

    return Column(f"{column.name}_{letter}_against", title, text, read)


def columns(runs: dict[str, Side]) -> list[Column[Together]]:
    """A column for each measure of each run, the difference from the first run beside it; without differences
    where other questions were asked."""
    known = [run.manifest["protocol"].get("prompts_sha256") for run in runs.values()]
    out = [Column[Together]("experiment", "experiment", lambda line: line.name, align="left")]
    for column in MEASURES:
        letters = list(zip(range(len(runs)), LETTERS, strict=False))
        out += [_of_run(column, k, letter) for k, letter in letters]
        if column.name in AGAINST and len(set(known)) == 1:
            out += [_difference(column, k, letter) for k, letter in letters[1:]]
    return out


def together(runs: dict[str, Side]) -> list[Together]:
    """The experiments to put side by side."""
    every, (first, *_) = [run.rows for run in runs.values()], runs.values()
    apart = [_sources_apart(first, run).keys() for run in runs.values()]

    def other(name: str) -> frozenset[int]:
        """Where either side's recipe uses one of the sources apart, or is not known."""
        return frozenset(
            k
            for k, (run, names) in enumerate(zip(runs.values(), apart, strict=True))
            if any(names & side.used.get(name, names) for side in (first, run))
        )

    return [Together(name, [rows.get(name) for rows in every], other(name)) for name in sum(shared(runs), [])]


def markdown(runs: dict[str, Side]) -> str:
    """comparison.md: the runs, what keeps them apart, and one table of all measures."""
    names, about = list(runs), {name: facts(run) for name, run in runs.items()}
    lines = [f"# {vocabulary.markdown_cell(' / '.join(names))}", ""]
    lines += [f"**The protocols differ.** {vocabulary.markdown_cell(d)}.\n" for d in differences(runs)]
    lines += [f"**Other weights.** {vocabulary.markdown_cell(d)}.\n" for d in other_weights(runs)]
    lettered = [f"{letter}: {name}" for letter, name in zip(LETTERS, names, strict=False)]
    lines += vocabulary.markdown_table(
        ["", *map(vocabulary.markdown_cell, lettered)],
        [[what, *(about[name][what] for name in names)] for what in next(iter(about.values()))],
    )
    shown = columns(runs)
    lines += [
        "",
        "## Experiment by experiment",
        "",
        *vocabulary.markdown_table(
            [column.title for column in shown],
            [[column.text(line) for column in shown] for line in together(runs)],
            (column.align == "right" for column in shown),
        ),
    ]
    return "\n".join([*lines, "", DIFFERENCES, "", vocabulary.LEGEND, ""])


def write_comparison(runs: list[Run], folder: Path) -> str:
    """Write comparison.html, comparison.md and the figure to `folder`; returns what to say about it.

    The runs' own files are left alone. Raises FrankenError if a run cannot be read, if there are more than 26
    or if the disk refuses.
    """
    if len(runs) > len(LETTERS):
        raise FrankenError(f"{len(runs)} runs are too many to stand side by side: at most {len(LETTERS)}")
    loaded = load(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FrankenError(f"cannot write the comparison to {folder}: {e.strerror}") from e
    (names, _), apart, weights = shared(loaded), differences(loaded), other_weights(loaded)
    figure = figures_runs.runs(names, {name: run.rows for name, run in loaded.items()})
    write_text(folder / "comparison.md", markdown(loaded))
    write_text(
        folder / "comparison.html",
        pages.render(
            "comparison.html.j2",
            runs={name: facts(run) for name, run in loaded.items()},
            letters=LETTERS,
            differences=apart,
            other_weights=weights,
            table=Table(columns(loaded), css="main"),
            lines=together(loaded),
            against=DIFFERENCES,
            legend=vocabulary.LEGEND,
            left_out="; ".join(
                f"{letter} {out}"
                for letter, run in zip(LETTERS, loaded.values(), strict=False)
                if (out := figure_leaves_out(run, names))
            ),
            figure=save(folder / "figures", "runs", figure, EVERY_FORM) if figure else None,
        ),
    )
    warnings = "".join(f"The protocols differ: {d}.\n" for d in apart)
    warnings += "".join(f"Other weights: {one_line(d)}.\n" for d in weights)
    return f"{warnings}Comparison of {len(loaded)} runs: {folder / 'comparison.html'}"
