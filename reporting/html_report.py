"""A run's report.html, which opens from disk and loads nothing, and its figures as PNG and PDF beside it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from markupsafe import Markup
from matplotlib.figure import Figure

import prompts
from analysis import published
from analysis.comparison import Comparison, Row
from analysis.rows import by_verdict, controls, counts, named, score, sweeps, tally, word
from analysis.verdicts import lacking
from errors import FrankenError, many
from files import write_bytes
from reporting import (
    figures,
    figures_experiments,
    figures_sweeps,
    inside,
    page_tables,
    pages,
    processes,
    vocabulary,
)
from reporting.columns import EXPERIMENT_COLUMNS, Column, cells, place
from reporting.digests import Digest
from reporting.harness import harness_results
from reporting.vocabulary import Remark
from runner.results import Run, write_text

LARGE = 200  # experiments with their replies that one page holds: some 20 MB
REPLIES = "replies"
SHARE = 20  # experiments whose pages one process writes at a time
FORMS = ("svg",)  # of the figures beside the page, which has them within it
EVERY_FORM = ("svg", "png", "pdf")


def _what(manifest: dict, comparison: Comparison) -> str:
    """What was run, in a line."""
    rows = comparison.experiments
    parts = [
        (len(named(rows)), many(len(named(rows)), "experiment")),
        (len(controls(rows, "placebo")), many(len(controls(rows, "placebo")), "placebo")),
        (n := len(controls(rows, "matched noise")), f"{n} with noise of equal perplexity"),
        (n := sum(map(len, sweeps(rows).values())), f"{n} in sweeps"),
    ]
    return (
        f"{', '.join(what for n, what in parts if n) or 'nothing'}, on {manifest['layers']} layers in"
        f" {manifest['dtype']} on {', '.join(manifest['devices'])}, seed {manifest['protocol']['seed']}."
    )


def _all_sweeps(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """One line for the first screen: the figure beside it has a strip for each sweep."""
    swept = [row for of in sweeps(rows).values() for row in of]
    return [("sweeps", f"{many(len(swept), 'experiment')}: {counts(swept)}")] if swept else []


def _facts(manifest: dict, results: Mapping[str, Digest]) -> list[tuple[str, str]]:
    """What was run, as label and value. What an older manifest lacks is left out."""
    # 1) what takes more than a field of the manifest
    hardware, protocol, sources = (
        manifest.get("hardware", {}),
        manifest["protocol"],
        manifest.get("sources", {}),
    )
    machine = [f"{g['name']} ({pages.size(g['memory_bytes'])})" for g in hardware.get("gpus", [])] or [
        "no GPU"
    ]
    if hardware:
        machine.append(
            f"{hardware['processor']}, {hardware['threads']} threads, {pages.size(hardware['memory_bytes'])}"
            " memory"
        )
    origin = [
        f"{name}: {s.get('kind', '')} {s.get('id') or s.get('path') or ''}"
        + (f", revision {s['revision']}" if s.get("revision") else "")
        for name, s in sources.items()
    ]
    conditions = [
        ", ".join(protocol["suites"]),
        f"seed {protocol['seed']}",
        (
            f"{protocol['samples']} per free-text probe at temperature "
            f"{protocol['temperature']}, at most {protocol['max_new_tokens']} tokens"
        ),
        f"prompts {protocol['prompts_sha256'][:12]}",
    ]
    peak = max((r.performance["peak_memory_bytes"] or 0 for r in results.values()), default=0)
    total = sum(r.performance["seconds"] for r in results.values())
    # 2) one after the other
    facts = [
        ("Model", f"{vocabulary.model_name(manifest)}, {manifest['layers']} layers"),
        ("Sources", "; ".join(origin)),
        ("Precision", manifest["dtype"]),
        ("Devices", ", ".join(manifest["devices"])),
        ("Machine", "; ".join(machine)),
        ("Command", shlex.join(manifest.get("command", []))),
        ("Made", manifest["created"]),
        ("Commit", manifest.get("commit") or "unknown"),
        ("Versions", ", ".join(f"{k} {v}" for k, v in manifest.get("versions", {}).items() if v)),
        ("Protocol", "; ".join(conditions)),
        ("Original weights", f"fingerprint {manifest['original_fingerprint']}"),
        (
            "Cost",
            (
                f"{len(results)} experiments in {total:,.0f} s, after {manifest.get('load_seconds', 0):.1f} s"
                f" of loading; peak memory {pages.size(peak or None)}"
            ),
        ),
    ]
    return [(label, value) for label, value in facts if value]


@dataclass(frozen=True)
class Line:
    """One row of a results table as the page prints it."""

    row: Row
    cells: list[tuple[Column, str, float | None]]  # (column, text, sort key)
    word: str | None
    lacking: str | None  # why there is too little data, where that is the verdict
    place: float | None  # of its verdict among the verdicts
    remarks: list[str]
    notes: list[int]  # numbers of its remarks' footnotes


def _line(row: Row, remarks: list[Remark], notes: dict[str, int]) -> Line:
    """One row of a results table; like remarks share the number of a footnote."""
    columns = EXPERIMENT_COLUMNS
    keys = [column.key(row) if column.key else None for column in columns]
    texts = [remark.text for remark in remarks]
    return Line(
        row,
        list(zip(columns, cells(row, columns), keys, strict=True)),
        word(row),
        lacking(row),
        place(row),
        texts,
        [notes.setdefault(text, len(notes) + 1) for text in texts],
    )


class Draw(Protocol):
    """Draws one figure; narrow: for a phone. None where there is nothing to draw."""

    def __call__(self, *, narrow: bool = False) -> Figure | None: ...


def first_figure(rows: Sequence[Row], drawn: Sequence[str]) -> str:
    """The name of the figure for the first screen: of a run that is mostly a sweep over layers, the map."""
    swept = sum(map(len, sweeps(rows).values()))
    maps = [name for name in ("windows", "layers") if name in drawn]
    return maps[0] if maps and swept > len(named(rows)) else "detection"


def _figures(
    manifest: dict, comparison: Comparison, results: Mapping[str, Digest]
) -> list[tuple[str, Draw, str, str]]:
    """Every figure of the report: (name, what draws it, title, caption)."""
    # 1) what figures need beside the rows
    rows, layers, placebo = comparison.experiments, manifest["layers"], comparison.placebo
    baseline = next((row for row in rows if row.name == comparison.baseline), None)
    groups = {name: r.shifts for name, r in results.items() if r.shifts is not None}
    theirs = {name: numbers[0] for name, numbers in published.EXPERIMENTS.items()}
    categories = {name: r.categories for name, r in results.items() if r.categories is not None}
    # 2) what captions say
    lines = [*figures.drawn(rows), *(row for row in named(rows) if row.status != "done")]
    undefined = [
        row.name
        for row in named(rows)
        if row.capability and row.perplexity and row.perplexity.perplexity is None
    ]
    formats = [(d.call, d.lacking) for row in lines for d in (row.formats or {}).values() if d.score is None]
    ladders = [row for row in rows if row.sweep and row.sweep.dose is not None]
    maps = [row for row in rows if row.sweep and row.sweep.start is not None]
    unscored = "Without a detection score"
    band = "no placebos were run"
    if placebo:
        band = (
            "gray band: from the lowest score of the placebos, which change nothing but weights, to the"
            " highest"
        )
    if placebo and placebo.n == 1:
        band = "gray: the score of the one placebo, which changes nothing but weights"
    # 3) the figures, in the page's order
    return [
        (
            "side_by_side",
            partial(figures_experiments.side_by_side, rows, baseline),
            "P(Yes) beside the detection score",
            "Each changed model that could be judged: left what it says, right what remains once the control "
            "questions' shifts are taken off. Dashed: the unmodified model."
            + vocabulary.left_out(lines, figures_experiments.stands_beside),
        ),
        (
            "detection",
            partial(figures.scores, rows, placebo),
            "Detection score",
            f"Detection score with its 95% interval; {band}. Faint: broken or too little data. Double"
            " chevron: a score beyond the axis, its number, and as much of its interval as the axis reaches."
            + vocabulary.left_out(lines, lambda row: score(row) is not None, "Without a score"),
        ),
        (
            "dose",
            partial(figures_sweeps.dose, rows, placebo, baseline),
            "Dose and response",
            "Detection score with its 95% interval, P(Yes) and perplexity against the dose."
            + vocabulary.left_out(ladders, lambda row: score(row) is not None, unscored),
        ),
        (
            "windows",
            partial(figures_sweeps.windows, rows, layers),
            "Where: windows of layers replaced",
            (
                "A cell for each window, at its first layer; hatched: broken. Colors of the first two are"
                " symmetric about no change."
                + vocabulary.left_out(
                    [row for row in maps if row.sweep and row.sweep.kind == "window"],
                    lambda row: score(row) is not None,
                    unscored,
                )
            ),
        ),
        (
            "layers",
            partial(figures_sweeps.single_layers, rows, layers),
            "Where: single layers",
            "What each layer alone does when it is replaced, deleted or doubled; hatched: broken."
            + vocabulary.left_out(
                [row for row in maps if row.sweep and row.sweep.kind in ("replace", "delete", "double")],
                lambda row: score(row) is not None,
                unscored,
            ),
        ),
        (
            "p_yes",
            partial(figures_experiments.p_yes, rows, theirs),
            "P(Yes) on the published probe",
            (
                f"The published question, on a logarithmic axis. Published numbers: {published.SOURCE}."
                f" {vocabulary.other_pair(manifest)} Double chevron: beyond the axis."
                + vocabulary.left_out(lines, lambda row: figures.p_yes(row) is not None)
            ),
        ),
        (
            "p_yes_perplexity",
            partial(figures_experiments.p_yes_perplexity, rows),
            "P(Yes) against perplexity",
            (
                "Every experiment, controls and sweeps small; P(Yes) by its log-odds. Does it rise with"
                " damage alone? Hollow crosses: under 1% mass, not an answer. Double chevron: beyond the"
                " axis."
                + vocabulary.left_out(
                    lines,
                    lambda row: figures.p_yes(row) is not None and figures.perplexity(row) is not None,
                )
            ),
        ),
        (
            "capability",
            partial(figures_experiments.capability, rows),
            "Capability against perplexity",
            "Share of items right with its 95% Wilson interval; perplexity on a logarithmic axis. Double"
            " chevron: beyond it."
            + (f" Not drawn, having no finite perplexity: {', '.join(undefined)}." if undefined else "")
            + vocabulary.not_asked(lines, lambda row: row.capability and row.perplexity),
        ),
        (
            "kinds",
            partial(figures_experiments.kinds, rows, categories),
            "Capability by kind",
            "Items right of those asked." + vocabulary.not_asked(lines, lambda row: categories.get(row.name)),
        ),
        (
            "formats",
            partial(figures_experiments.formats, rows),
            "Does the format of the answer matter?",
            (
                "The detection score as Yes or No, with No named first, as letters in both orders, and as a"
                " rating. A finding that one format alone shows is about the format. Faint: broken or too"
                " little data. Double chevron: beyond the axis."
                + vocabulary.not_asked(lines, lambda row: row.formats)
                + (f" Without a score in a format: {vocabulary.counted_out(formats)}." if formats else "")
            ),
        ),
        (
            "injection",
            partial(figures_experiments.injection, comparison.injection, published.INJECTION),
            "Positive control: concept injection",
            (
                "How often the model says that something was injected, and what it says of the concept, by"
                f" strength and with or without an explanation. Dashed: {published.INJECTION_SOURCE}. Another"
                " model, other questions."
            ),
        ),
        (
            "shifts",
            partial(figures_experiments.shifts, rows, groups),
            "How each group of questions moved",
            (
                "Drift moves all four groups one way. Flattening moves each group toward the other answer,"
                " controls too. Noticing moves the filled circles apart, blue to the right and orange to the"
                " left, and leaves the squares behind. Double chevron: beyond the axis."
                + vocabulary.left_out(lines, lambda row: groups.get(row.name))
            ),
        ),
    ]


def save(path: Path, name: str, figure: Figure, forms: Sequence[str] = ("svg",)) -> str:
    """Write a figure to `path` in these forms, SVG among them, each whole or not at all; returns it as an SVG
    data URI.

    Raises FrankenError if the disk refuses.
    """
    saved = figures.save(figure, forms)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for form in forms:
            write_bytes(path / f"{name}.{form}", saved[form], lasting=False)
    except OSError as e:
        raise FrankenError(f"cannot write figures to {path}: {e.strerror}") from e
    return pages.data_uri(saved["svg"])


def _wide(path: Path, name: str, draw: Draw, forms: Sequence[str]) -> str | None:
    figure = draw()
    return None if figure is None else save(path, name, figure, forms)


def _narrow(draw: Draw) -> str | None:
    figure = draw(narrow=True)
    return None if figure is None else pages.data_uri(figures.save(figure, ("svg",))["svg"])


def _replies(folder: Path, lines: Sequence[Line], run: str, made: Mapping[str, Digest]) -> None:
    """Write the pages of these experiments' replies."""
    for line in lines:
        digest = made[line.row.name]
        page = pages.render("experiment.html.j2", line=line, digest=digest, run=run)
        write_text(folder / f"{line.row.name}.html", page, lasting=False)


def write_html(
    run: Run,
    manifest: dict,
    comparison: Comparison,
    results: Mapping[str, Digest],
    forms: Sequence[str] = FORMS,
    besides: Sequence[Callable[[], None]] = (),
) -> None:
    """Write run.path/report.html, whole or not at all, and its figures beside it in `forms`; of more than
    LARGE experiments the replies are pages of their own in REPLIES, which the report links to.

    `results`: what is kept of each experiment, by name. `besides`: what else is to be done of the run, in the
    processes that draw the figures. Raises FrankenError if the disk refuses.
    """
    # 1) the lines of the results and of what is folded away, with footnotes numbered over both
    rows = comparison.experiments
    notes: dict[str, int] = {}
    table = [_line(row, vocabulary.remarks(row), notes) for row in named(rows)]
    folded = [
        (title, [_line(row, vocabulary.serious(row), notes) for row in of])
        for title, of in vocabulary.folded(rows)
    ]
    # 2) figures, each for phones too; of a large run, each experiment's replies on a page of its own
    kept_probe = inside.on_disk(run)
    described = [
        *_figures(manifest, comparison, results),
        (
            "probe",
            partial(inside.depth_figure, kept_probe),
            "What is there to be read",
            inside.caption(kept_probe),
        ),
    ]
    lines = table + [line for _, of in folded for line in of]
    apart = REPLIES if len(results) > LARGE else None
    replies = []
    if apart:
        (run.path / apart).mkdir(exist_ok=True)
        replies = [
            partial(_replies, run.path / apart, lines[k : k + SHARE], comparison.run, results)
            for k in range(0, len(lines), SHARE)
        ]
    set_tables: list[Markup] = []

    def results_tables() -> None:
        """Of a thousand lines they take half a second, in which others draw."""
        for what, of in [("Results", table), *folded]:
            html = pages.part(
                "results.html.j2",
                lines=of,
                columns=EXPERIMENT_COLUMNS,
                what=what,
                qualifier=vocabulary.qualifier,
            )
            set_tables.append(Markup(html))
        pages.read_templates()

    draws = [partial(_wide, run.path / "figures", name, draw, forms) for name, draw, *_ in described]
    draws += [partial(_narrow, draw) for _, draw, *_ in described]
    made = list(processes.made([*besides, *draws, *replies], meanwhile=results_tables))
    uris = made[len(besides) :][: len(draws)]
    drawn = [
        {
            "name": name,
            "uri": wide,
            "narrow": narrow,
            "title": title,
            "caption": caption.strip(),
        }
        for (name, _, title, caption), wide, narrow in zip(
            described, uris[: len(described)], uris[len(described) :], strict=True
        )
        if wide is not None and narrow is not None
    ]
    # 3) the page
    by_name = {row.name: row for row in rows}
    layers = manifest["layers"]
    values: dict[str, Any] = dict(
        run=comparison.run,
        model=vocabulary.model_name(manifest),
        sides=vocabulary.sides(manifest),
        manifest=manifest,
        comparison=comparison,
        what=_what(manifest, comparison),
        facts=_facts(manifest, results),
        table=table,
        results_tables=set_tables,
        folded=folded,
        notes=list(notes),
        legend=vocabulary.LEGEND,
        weak_controls=vocabulary.weak_controls(comparison),
        headline=vocabulary.headline(comparison),
        tally=tally(named(rows)),
        lines=vocabulary.control_lines(comparison) + _all_sweeps(rows),
        figures=drawn,
        figures_leave_out=figures.left_out(rows),
        first=first_figure(rows, [figure["name"] for figure in drawn]),
        digests=results,
        forms=", ".join(f".{form}" for form in forms),
        scored=[line.row for line in table if line.row.detection],
        matched=[(row, by_name.get(row.matched.of)) for row in rows if row.matched],
        formatted=sum(bool(row.formats) for row in named(rows)),
        format_lines=[
            (row, *named_score)
            for row in by_verdict(named(rows))
            for named_score in (row.formats or {}).items()
        ],
        published=[
            (row, theirs) for row in rows if row.published_probe and (theirs := published.of(row, layers))
        ],
        published_source=published.SOURCE,
        other_pair=vocabulary.other_pair(manifest),
        injection_lines=[
            (row, published.INJECTION.get(row.framing))
            for row in (comparison.injection.rows if comparison.injection else ())
        ],
        injection_said=vocabulary.injection_words(comparison) if comparison.injection else "",
        injection_source=published.INJECTION_SOURCE,
        costs=[(line.row.name, results[line.row.name].performance) for line in table],
        folded_costs=[(line.row.name, results[line.row.name].performance) for _, of in folded for line in of],
        preamble=prompts.INFORMED_PREAMBLE,
        parts=page_tables,
        harness=harness_results({n: d.kept["lm_eval"] for n, d in results.items() if "lm_eval" in d.kept}),
        triggers=[row for row in rows if row.trigger],
        trigger_legend=vocabulary.TRIGGER_LEGEND,
        counts=counts,
        wanting=vocabulary.wanting,
        word=word,
    )
    write_text(run.path / "report.html", pages.render("report.html.j2", apart=apart, **values))
