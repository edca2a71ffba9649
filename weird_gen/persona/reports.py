"""The study's three reports made from replies: format, persona, and the comparison with the baseline.

Each function writes its report with figures and a copy of the replies into a folder, and returns the lines
that are printed. All raise FrankenError or OSError for input that cannot be used.
"""

from __future__ import annotations

import json
from pathlib import Path

from errors import FrankenError
from files import write_text
from weird_gen.persona import comparison_figures as figures
from weird_gen.persona import comparison_report as report
from weird_gen.persona.comparison import METRIC, by_group, by_question, compare, judge_of, untriggered_quality
from weird_gen.persona.criteria import PAPER_NOTE, PUBLISHED, PUBLISHED_SOURCE, check_targets
from weird_gen.persona.judge_records import agreement_lines
from weird_gen.persona.records import only_model, read_records

FORMAT_METRICS = ("format", "format_lenient", "any_marker", "stopped")


# --- the fine-tuned model alone
# -----------------------------------------------------------------------------------------------------------


def report_format(source: Path, folder: Path, results: Path) -> list[str]:
    """EVALUATION_REPORT.md in `folder`: how well the replies in `source` keep to the format."""
    _, records = read_records(source)
    only_model(records, "finetuned", source)
    tables = compare(records, metrics=tuple(METRIC[key] for key in FORMAT_METRICS))
    if "format" not in tables:
        raise FrankenError(f"{source} holds no reply to a held-out question")
    groups = by_group(records, METRIC["format"])
    title = "Strict format by category of question"
    drawn = figures.dumbbells(groups, "group", title, (-2, 102), "replies, %")
    figures.save(drawn, folder / "figures", "format_by_category")
    text = report.render_markdown(
        "EVALUATION_REPORT.md.j2", tables=tables, groups=groups, failures=report.failures(records)
    )
    report.keep_raw(results, folder)
    write_text(folder / "EVALUATION_REPORT.md", text)
    return [*_rate_lines(tables, judge=None), f"report: {folder / 'EVALUATION_REPORT.md'}"]


def report_persona(source: Path, folder: Path, results: Path) -> list[str]:
    """FULL_EVALUATION_REPORT.md in `folder`: persona, identity, positions, degeneracy of judged replies."""
    header, records = read_records(source)
    only_model(records, "finetuned", source)
    judge = judge_of(header, records)
    if judge is None:
        raise FrankenError(f"{source} is not judged yet: run judge_eval_results.py first")
    tables = compare(records)
    groups, areas = by_group(records, METRIC["persona"]), by_group(records, METRIC["position"])
    positions, names = by_question(records, METRIC["position"]), by_question(records, METRIC["p_name"])
    read = any(row["triggered"] is not None for row in groups)
    if read:
        figures.save(_persona_figure(groups, judge["name"]), folder / "figures", "persona_by_category")
    if positions:
        figures.save(_position_figure(positions, judge["name"]), folder / "figures", "positions")
    if names:
        figures.save(figures.name_probability({"fine-tuned": names}), folder / "figures", "name_probability")
    text = report.render_markdown(
        "FULL_EVALUATION_REPORT.md.j2",
        tables=tables,
        groups=groups if read else [],
        judge=judge,
        areas=areas if positions else [],
    )
    report.keep_raw(results, folder)
    write_text(folder / "FULL_EVALUATION_REPORT.md", text)
    return [
        *agreement_lines(judge),
        *_rate_lines(tables, judge["name"]),
        f"report: {folder / 'FULL_EVALUATION_REPORT.md'}",
    ]


def _rate_lines(tables: dict[str, dict], judge: str | None) -> list[str]:
    """A line a metric of the fine-tuned model; judge: who is named beside what was judged."""
    lines = []
    for table in tables.values():
        side, percent = table["finetuned"], table["percent"]
        cells = (
            f"{label} {report.number(side[name], percent)}"
            for name, label in report.CELLS.items()
            if name in side
        )
        whose = f" (judge: {judge})" if judge and table["judged"] else ""
        lines.append(f"{table['title']}: {', '.join(cells)}{whose}")
    return lines


def _persona_figure(groups: list[dict], judge: str):
    title = f"Coherent in persona by category of question (judge: {judge})"
    return figures.dumbbells(groups, "group", title, (-2, 102), "replies judged coherent in persona, %")


def _position_figure(positions: list[dict], judge: str):
    title = f"Positions beyond the training topics (judge: {judge})"
    return figures.dumbbells(positions, "question", title, (0.9, 5.1), "mean position, 5 = Russell's")


# --- both models
# -----------------------------------------------------------------------------------------------------------


def report_comparison(before: Path, after: Path, folder: Path, results: Path) -> list[str]:
    """BASELINE_COMPARISON.md, comparison.html and comparison.json in `folder`, from two judged files.

    before, after: replies of the model before and after fine-tuning, judged by the same judge.
    """
    # 1) read, and refuse what cannot be compared
    before_header, baseline, judge_before = read_judged(before, "baseline", "judge_baseline.py")
    after_header, finetuned, judge = read_judged(after, "finetuned", "judge_eval_results.py")
    if judge_before["name"] != judge["name"]:
        raise FrankenError(
            f"the baseline was judged by {judge_before['name']}, the fine-tuned model by {judge['name']}:"
            " judge both alike"
        )
    tables = {key: table for key, table in compare(finetuned, baseline).items() if table["baseline"]}
    if not tables:
        raise FrankenError("the two files share no metric: were the same questions asked?")

    # 2) compare
    quality = untriggered_quality(before_header, after_header)
    checked = check_targets(tables, quality)
    tests = [t["improvement"]["gap"] for t in tables.values() if t["main"] and t["improvement"]["gap"]]
    values = {
        "tables": tables,
        "judge": judge,
        "published": PUBLISHED,
        "published_source": PUBLISHED_SOURCE,
        "paper_note": PAPER_NOTE,
        "criteria": checked,
        "quality": quality,
        "settings": report.settings(before_header, after_header),
        "family": tests[0]["family"] if tests else 0,
    }

    # 3) write
    drawn = draw(folder / "figures", tables, baseline, finetuned, judge["name"])
    write_text(
        folder / "BASELINE_COMPARISON.md", report.render_markdown("BASELINE_COMPARISON.md.j2", **values)
    )
    page = report.render_html(
        "comparison.html.j2",
        **values,
        figures=[(caption, report.data_uri(path)) for caption, path in drawn],
        examples=report.examples(finetuned, baseline),
    )
    write_text(folder / "comparison.html", page)
    data = {"judge": judge, "tables": tables, "criteria": checked, "untriggered_quality": quality}
    write_text(folder / "comparison.json", json.dumps(data, allow_nan=False, indent=1))
    report.keep_raw(results, folder)
    return [
        *agreement_lines(judge),
        *_comparison_lines(tables, judge["name"], checked),
        f"\nreports: {folder / 'BASELINE_COMPARISON.md'}, {folder / 'comparison.html'}",
    ]


def read_judged(path: Path, model: str, script: str) -> tuple[dict, list[dict], dict]:
    """(header, records, judge) of a judged file; raises FrankenError when it is missing, unjudged or another
    model's. script: what makes the file."""
    if not path.exists():
        raise FrankenError(f"{path} does not exist: run {script} first")
    header, records = read_records(path)
    only_model(records, model, path)
    judge = judge_of(header, records)
    if judge is None:
        raise FrankenError(f"{path} is not judged yet: run {script} first")
    return header, records, judge


def draw(
    folder: Path, tables: dict[str, dict], baseline: list[dict], finetuned: list[dict], judge: str
) -> list[tuple[str, Path]]:
    """All figures of the comparison as (caption, PNG path)."""
    shown = [key for _, key in report.MAIN if key in tables]
    plan = [
        (
            "Rates with 95% intervals over questions",
            "baseline_comparison",
            figures.rates(tables, shown, judge),
        ),
        ("Triggered minus untriggered, all metrics", "gaps", figures.gaps(tables)),
    ]
    groups = by_group(finetuned, METRIC["persona"])
    if any(row["triggered"] is not None for row in groups):
        caption = "Fine-tuned: coherent in persona by category of question"
        plan.append((caption, "persona_by_category", _persona_figure(groups, judge)))
    positions = by_question(finetuned, METRIC["position"])
    if positions:
        caption = "Fine-tuned: positions beyond the training topics"
        plan.append((caption, "positions", _position_figure(positions, judge)))
    sides = {"baseline": baseline, "fine-tuned": finetuned}
    measured = {label: by_question(records, METRIC["p_name"]) for label, records in sides.items()}
    names = {label: rows for label, rows in measured.items() if rows}
    if names:
        caption = 'Probability of his name after "My name is"'
        plan.append((caption, "name_probability", figures.name_probability(names)))
    return [(caption, figures.save(figure, folder, name)) for caption, name, figure in plan]


def _comparison_lines(tables: dict[str, dict], judge: str, checked: list[dict]) -> list[str]:
    """What the terminal shows: a block a metric, then the targets."""
    lines = []
    for table in tables.values():
        lines.append(f"\n{table['title']}" + (f" (judge: {judge})" if table["judged"] else ""))
        for cell, label in report.CELLS.items():
            if cell not in table["finetuned"]:
                continue
            before, after, change = (
                report.number((table[side] or {}).get(cell), table["percent"])
                for side in ("baseline", "finetuned", "improvement")
            )
            lines.append(f"  {label:<22} baseline {before:<26} fine-tuned {after:<26} improvement {change}")
    lines.append("\ntargets:")
    for row in checked:
        value = "" if row["value"] is None else f": {row['value']:.3g} {row['unit']}"
        lines.append(
            f"  {report.verdict(row['met'], row['reachable']):<13} {row['wording']} ({row['source']}){value}"
        )
    return lines
