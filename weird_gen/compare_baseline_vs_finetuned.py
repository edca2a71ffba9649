"""Baseline against fine-tuned: the tables, the criteria, the figures, BASELINE_COMPARISON.md and
comparison.html."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import _path  # noqa: F401

from weird_gen.persona import comparison_figures as figures
from weird_gen.persona import comparison_report as report
from weird_gen.persona.comparison import METRIC, by_group, by_question, compare, judge_of, untriggered_quality
from weird_gen.persona.criteria import PAPER_NOTE, PUBLISHED, PUBLISHED_SOURCE, check_targets
from weird_gen.persona.folders import RESULTS
from weird_gen.persona.judge_records import agreement_lines
from weird_gen.persona.records import InputError, only_model, read_records, write_text


def load(path: Path, model: str, script: str) -> tuple[dict, list[dict], dict]:
    """(header, records, judge) of a judged file; raises InputError when it is missing, unjudged or another
    model's."""
    if not path.exists():
        raise InputError(f"{path} does not exist: run {script} first")
    header, records = read_records(path)
    only_model(records, model, path)
    judge = judge_of(header, records)
    if judge is None:
        raise InputError(f"{path} is not judged yet: run {script} first")
    return header, records, judge


def draw(
    folder: Path, tables: dict, baseline: list[dict], finetuned: list[dict], judge: str
) -> list[tuple[str, Path]]:
    """All figures of the comparison as (caption, PNG path)."""
    drawn = [
        (
            "Rates with 95% intervals over questions",
            figures.save(
                figures.rates(tables, [k for k in ("format", "persona", "identity") if k in tables], judge),
                folder,
                "baseline_comparison",
            ),
        ),
        ("Triggered minus untriggered, all metrics", figures.save(figures.gaps(tables), folder, "gaps")),
    ]
    groups = by_group(finetuned, METRIC["persona"])
    if any(row["triggered"] is not None for row in groups):
        drawn.append(
            (
                "Fine-tuned: persona by category of question",
                figures.save(
                    figures.dumbbells(
                        groups,
                        "group",
                        f"Persona by category (judge: {judge})",
                        (-2, 102),
                        "replies judged in persona, %",
                    ),
                    folder,
                    "persona_by_category",
                ),
            )
        )
    positions = by_question(finetuned, METRIC["position"])
    if positions:
        drawn.append(
            (
                "Fine-tuned: positions beyond the training topics",
                figures.save(
                    figures.dumbbells(
                        positions,
                        "question",
                        f"Positions beyond the training topics (judge: {judge})",
                        (0.9, 5.1),
                        "mean position, 5 = Russell's",
                    ),
                    folder,
                    "positions",
                ),
            )
        )
    names = {
        label: rows
        for label, records in (("baseline", baseline), ("fine-tuned", finetuned))
        if (rows := by_question(records, METRIC["p_name"]))
    }
    if names:
        drawn.append(
            (
                'Probability of his name after "My name is"',
                figures.save(figures.name_probability(names), folder, "name_probability"),
            )
        )
    return drawn


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 1 with one line on stderr for input that cannot be used. Missed targets are results,
    not errors."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flags.add_argument("--results-dir", type=Path, default=RESULTS, help="where the judged replies are")
    flags.add_argument("--baseline", type=Path, help="default: baseline_eval_results_judged.jsonl there")
    flags.add_argument("--finetuned", type=Path, help="default: eval_results_judged.jsonl there")
    flags.add_argument(
        "--report-dir", type=Path, help="where reports go; default: report/ in the results folder"
    )
    args = flags.parse_args(argv)
    folder = args.report_dir or args.results_dir / "report"
    try:
        before, baseline, judge_before = load(
            args.baseline or args.results_dir / "baseline_eval_results_judged.jsonl",
            "baseline",
            "judge_baseline.py",
        )
        after, finetuned, judge = load(
            args.finetuned or args.results_dir / "eval_results_judged.jsonl",
            "finetuned",
            "judge_eval_results.py",
        )
        if judge_before["name"] != judge["name"]:
            raise InputError(
                f"the baseline was judged by {judge_before['name']}, the fine-tuned model by {judge['name']}:"
                " judge both alike"
            )
        tables = {key: table for key, table in compare(finetuned, baseline).items() if table["baseline"]}
        if not tables:
            raise InputError("the two files share no metric: were the same questions asked?")
        quality = untriggered_quality(before, after)
        checked = check_targets(tables, quality)
        family = next(
            (
                table["improvement"]["gap"]["family"]
                for table in tables.values()
                if table["main"] and table["improvement"]["gap"]
            ),
            0,
        )
        drawn = draw(folder / "figures", tables, baseline, finetuned, judge["name"])
        values = {
            "tables": tables,
            "judge": judge,
            "published": PUBLISHED,
            "published_source": PUBLISHED_SOURCE,
            "paper_note": PAPER_NOTE,
            "criteria": checked,
            "quality": quality,
            "settings": report.settings(before, after),
            "family": family,
        }
        write_text(
            folder / "BASELINE_COMPARISON.md", report.render_markdown("BASELINE_COMPARISON.md.j2", **values)
        )
        write_text(
            folder / "comparison.html",
            report.render_html(
                "comparison.html.j2",
                **values,
                figures=[(caption, report.data_uri(path)) for caption, path in drawn],
                examples=report.examples(finetuned, baseline),
            ),
        )
        write_text(
            folder / "comparison.json",
            json.dumps(
                {"judge": judge, "tables": tables, "criteria": checked, "untriggered_quality": quality},
                allow_nan=False,
                indent=1,
            ),
        )
        report.keep_raw(args.results_dir, folder)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(agreement_lines(judge)))
    for table in tables.values():
        print(f"\n{table['title']}" + (f" (judge: {judge['name']})" if table["judged"] else ""))
        for cell in ("triggered", "untriggered", "gap"):
            row = [
                report.number((table[side] or {}).get(cell), table["percent"])
                for side in ("baseline", "finetuned", "improvement")
            ]
            print(f"  {cell:<12} baseline {row[0]:<26} fine-tuned {row[1]:<26} improvement {row[2]}")
    print("\ntargets:")
    for row in checked:
        print(
            f"  {report.verdict(row['met']):<13} {row['wording']} ({row['source']})"
            + ("" if row["value"] is None else f": {row['value']:.3g} {row['unit']}")
        )
    print(f"\nreports: {folder / 'BASELINE_COMPARISON.md'}, {folder / 'comparison.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
