"""Tables and a map of where in depth the persona lives and what it survives (report/SURGERY.md)."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line, parser_of
from errors import printable
from weird_gen.persona.depth_report import report_surgery
from weird_gen.persona.folders import RESULTS


@ends_in_one_line("interrupted; the same command makes the report again")
def main(argv: list[str] | None = None) -> int:
    flags = parser_of(__doc__)
    flags.add_argument("--input", type=Path, default=RESULTS / "surgery.jsonl", help="of eval_surgery.py")
    flags.add_argument("--report-dir", type=Path, default=RESULTS / "report")
    args = flags.parse_args(argv)
    print(printable("\n".join(report_surgery(args.input, args.report_dir))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
