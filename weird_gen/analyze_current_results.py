"""Format compliance of the fine-tuned model: tables, a figure and EVALUATION_REPORT.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _path  # noqa: F401

from weird_gen.persona import comparison_figures as figures
from weird_gen.persona import comparison_report as report
from weird_gen.persona.comparison import METRIC, by_group, compare
from weird_gen.persona.folders import RESULTS
from weird_gen.persona.records import InputError, only_model, read_records, write_text

SHOWN = ("format", "format_lenient", "any_marker", "stopped")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 1 with one line on stderr for input that cannot be used."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flags.add_argument("--results-dir", type=Path, default=RESULTS, help="where the replies are")
    flags.add_argument(
        "--input", type=Path, help="replies of the fine-tuned model; default: eval_results.jsonl there"
    )
    flags.add_argument(
        "--report-dir", type=Path, help="where reports go; default: report/ in the results folder"
    )
    args = flags.parse_args(argv)
    source, folder = (
        args.input or args.results_dir / "eval_results.jsonl",
        args.report_dir or args.results_dir / "report",
    )
    try:
        _, records = read_records(source)
        only_model(records, "finetuned", source)
        tables = compare(records, metrics=tuple(METRIC[key] for key in SHOWN))
        if "format" not in tables:
            raise InputError(f"{source} holds no reply to a held-out question")
        groups = by_group(records, METRIC["format"])
        figures.save(
            figures.dumbbells(
                groups, "group", "Strict format by category of question", (-2, 102), "replies, %"
            ),
            folder / "figures",
            "format_by_category",
        )
        text = report.render_markdown(
            "EVALUATION_REPORT.md.j2", tables=tables, groups=groups, failures=report.failures(records)
        )
        report.keep_raw(args.results_dir, folder)
        write_text(folder / "EVALUATION_REPORT.md", text)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for key in tables:
        side = tables[key]["finetuned"]
        print(
            f"{tables[key]['title']}: triggered {report.number(side['triggered'])}, untriggered "
            f"{report.number(side['untriggered'])}, gap {report.number(side['gap'])}"
        )
    print(f"report: {folder / 'EVALUATION_REPORT.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
