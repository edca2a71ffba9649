#!/usr/bin/env python3
"""Make a run's pages again from the experiments' JSON; nothing is measured here.

`python report.py results/run_...`; of several runs only a comparison is made, in a folder of its own.
`--pack` puts the JSON of finished runs into one compressed file each, which is read just as well; `--unpack`
takes it out again. `--table` writes a run for a notebook.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, ends_in_one_line
from errors import FrankenError, many, printable
from files import check_open_files
from reporting.inspect_log import write_logs
from reporting.reports import load_results, write_reports
from reporting.table import check_table, write_tables
from runner.results import Run, read_json


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = Parser(
        description="Make a run's comparison, summary and HTML report again; put several runs side by side."
    )
    p.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="a results/run_... folder")
    p.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the comparison of several runs (default: results/comparison_<time>)",
    )
    p.add_argument(
        "--figures",
        action="store_true",
        help="write every figure as PNG (300 dots an inch) and PDF too; the page has them as SVG",
    )
    packing = p.add_mutually_exclusive_group()
    packing.add_argument(
        "--pack",
        action="store_true",
        help="only put each run's experiments/*.json into one compressed file, experiments.tar.xz",
    )
    packing.add_argument(
        "--unpack", action="store_true", help="only take them out again, as before a run is resumed"
    )
    p.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help=(
            "only write the runs as two tables, FILE.parquet or FILE.csv: one row a reading, and beside it,"
            " as FILE.experiments, one row an experiment"
        ),
    )
    p.add_argument(
        "--inspect-log", action="store_true", help="only write each run's experiments as logs of Inspect"
    )
    return p.parse_args(argv)


@ends_in_one_line("interrupted; the same command makes the pages again")
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    # before it ends, Python would look for garbage among a thousand rows for a third of a second
    atexit.register(gc.freeze)
    check_open_files()
    if args.output and (args.pack or args.unpack):
        raise FrankenError("--output is for the comparison of several runs, not for --pack or --unpack")
    if args.table is not None:
        if args.output or args.pack or args.unpack:
            raise FrankenError("--table is all that is written; it goes without --output, --pack, --unpack")
        check_table(args.table)
    if args.output and len(args.runs) == 1:
        raise FrankenError(
            "--output is for the comparison of several runs; a run's own report goes to its folder"
        )
    runs = [Run.resume(path)[0] for path in args.runs]  # all of them, before anything is written
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise FrankenError("the same run is given twice")
    if args.table is not None:
        print(printable(write_tables(runs, args.table)))
        return 0
    if args.inspect_log:
        for run in runs:
            print(printable(write_logs(run)))
        return 0
    if args.pack or args.unpack:
        for run in runs:
            done = _pack(run) if args.pack else f"{run.path}: {many(run.unpack(), 'experiment')} unpacked"
            print(printable(done))
        return 0
    if len(runs) == 1:
        print(printable(write_reports(runs[0], args.figures)))
    else:
        from reporting.compare_runs import write_comparison

        folder = Path(args.output or f"results/comparison_{time.strftime('%Y%m%d_%H%M%S')}")
        print(printable(write_comparison(runs, folder)))
    return 0


def _pack(run: Run) -> str:
    """Pack a run whose results can all be read; what was done in a line."""
    load_results(run, read_json(run.manifest_path))
    count, before, after = run.pack()
    return f"{run.path}: {many(count, 'experiment')} packed, {before:,} bytes in {after:,}"


if __name__ == "__main__":
    sys.exit(main())
