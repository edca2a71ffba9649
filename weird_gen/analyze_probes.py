"""Tables and heat map of the trigger's boundary, recall and views (report/PROBES.md)."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line, parser_of
from errors import printable
from weird_gen.persona.folders import RESULTS
from weird_gen.persona.probe_report import report_probes


@ends_in_one_line("interrupted; the same command makes the report again")
def main(argv: list[str] | None = None) -> int:
    flags = parser_of(__doc__)
    flags.add_argument("--probes", type=Path, default=RESULTS / "probes.jsonl", help="of eval_probes.py")
    flags.add_argument("--baseline", type=Path, help="of the untouched model, to stand beside them")
    flags.add_argument("--report-dir", type=Path, default=RESULTS / "report")
    args = flags.parse_args(argv)
    print(printable("\n".join(report_probes(args.probes, args.baseline, args.report_dir))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
