"""Format compliance of the fine-tuned model: tables, a figure and EVALUATION_REPORT.md."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line, parser_of
from errors import printable
from weird_gen.persona.flags import add_folders, report_folder
from weird_gen.persona.reports import report_format


@ends_in_one_line("interrupted; the same command makes the report again")
def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 1 with one line on stderr for input that cannot be used."""
    flags = parser_of(__doc__)
    add_folders(flags, "replies")
    flags.add_argument(
        "--input", type=Path, help="replies of the fine-tuned model; default: eval_results.jsonl there"
    )
    args = flags.parse_args(argv)
    source = args.input or args.results_dir / "eval_results.jsonl"
    lines = report_format(source, report_folder(args), args.results_dir)
    print(printable("\n".join(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
