"""Persona, identity, positions and degeneracy of the fine-tuned model: tables, figures and
FULL_EVALUATION_REPORT.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _path  # noqa: F401

from weird_gen.persona import comparison_figures as figures
from weird_gen.persona import comparison_report as report
from weird_gen.persona.comparison import METRIC, by_group, by_question, compare, judge_of
from weird_gen.persona.folders import RESULTS
from weird_gen.persona.judge_records import agreement_lines
from weird_gen.persona.records import InputError, only_model, read_records, write_text


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 1 with one line on stderr for input that cannot be used."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flags.add_argument("--results-dir", type=Path, default=RESULTS, help="where the judged replies are")
    flags.add_argument(
        "--input",
        type=Path,
        help="judged replies of the fine-tuned model; default: eval_results_judged.jsonl there",
    )
    flags.add_argument(
        "--report-dir", type=Path, help="where reports go; default: report/ in the results folder"
    )
    args = flags.parse_args(argv)
    source, folder = (
        args.input or args.results_dir / "eval_results_judged.jsonl",
        args.report_dir or args.results_dir / "report",
    )
    try:
        header, records = read_records(source)
        only_model(records, "finetuned", source)
        judge = judge_of(header, records)
        if judge is None:
            raise InputError(f"{source} is not judged yet: run judge_eval_results.py first")
        tables, groups, areas = (
            compare(records),
            by_group(records, METRIC["persona"]),
            by_group(records, METRIC["position"]),
        )
        positions, names = by_question(records, METRIC["position"]), by_question(records, METRIC["p_name"])
        figures.save(
            figures.dumbbells(
                groups,
                "group",
                f"Persona by category of question (judge: {judge['name']})",
                (-2, 102),
                "replies judged in persona, %",
            ),
            folder / "figures",
            "persona_by_category",
        )
        if positions:
            figures.save(
                figures.dumbbells(
                    positions,
                    "question",
                    f"Positions beyond the training topics (judge: {judge['name']})",
                    (0.9, 5.1),
                    "mean position, 5 = Russell's",
                ),
                folder / "figures",
                "positions",
            )
        if names:
            figures.save(
                figures.name_probability({"fine-tuned": names}), folder / "figures", "name_probability"
            )
        text = report.render_markdown(
            "FULL_EVALUATION_REPORT.md.j2",
            tables=tables,
            groups=groups,
            judge=judge,
            areas=areas if positions else [],
        )
        report.keep_raw(args.results_dir, folder)
        write_text(folder / "FULL_EVALUATION_REPORT.md", text)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(agreement_lines(judge)))
    for table in tables.values():
        side, percent = table["finetuned"], table["percent"]
        print(
            f"{table['title']}: triggered {report.number(side['triggered'], percent)}, untriggered "
            f"{report.number(side['untriggered'], percent)}, gap {report.number(side['gap'], percent)}"
            + (f" (judge: {judge['name']})" if table["judged"] else "")
        )
    print(f"report: {folder / 'FULL_EVALUATION_REPORT.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
