"""Format compliance of the fine-tuned model: tables, a figure and EVALUATION_REPORT.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import DefaultsThatSay, ends_in_one_line
from errors import printable
from weird_gen.persona.folders import RESULTS
from weird_gen.persona.reports import report_format


@ends_in_one_line("interrupted; the same command makes the report again")
def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 1 with one line on stderr for input that cannot be used."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=DefaultsThatSay)
    flags.add_argument("--results-dir", type=Path, default=RESULTS, help="where the replies are")
    flags.add_argument(
        "--input", type=Path, help="replies of the fine-tuned model; default: eval_results.jsonl there"
    )
    flags.add_argument(
        "--report-dir", type=Path, help="where reports go; default: report/ in the results folder"
    )
    args = flags.parse_args(argv)
    source = args.input or args.results_dir / "eval_results.jsonl"
    folder = args.report_dir or args.results_dir / "report"
    lines = report_format(source, folder, args.results_dir)
    print(printable("\n".join(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
