"""Baseline against fine-tuned: the tables, the criteria, the figures, BASELINE_COMPARISON.md and
comparison.html."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line, parser_of
from errors import printable
from weird_gen.persona.flags import add_folders, report_folder
from weird_gen.persona.reports import report_comparison


@ends_in_one_line("interrupted; the same command makes the report again")
def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 1 with one line on stderr for input that cannot be used. Missed targets are results,
    not errors."""
    flags = parser_of(__doc__)
    add_folders(flags, "judged replies")
    flags.add_argument("--baseline", type=Path, help="default: baseline_eval_results_judged.jsonl there")
    flags.add_argument("--finetuned", type=Path, help="default: eval_results_judged.jsonl there")
    args = flags.parse_args(argv)
    before = args.baseline or args.results_dir / "baseline_eval_results_judged.jsonl"
    after = args.finetuned or args.results_dir / "eval_results_judged.jsonl"
    lines = report_comparison(before, after, report_folder(args), args.results_dir)
    print(printable("\n".join(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
