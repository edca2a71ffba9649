#!/usr/bin/env python3
"""Speed and memory on one GPU, on random weights of the exact Qwen2.5-Coder-32B shape, beside the machine's
own floors.

    python benchmarks/gpu_bench.py --output results/reference/gpu_benchmark.json

writes two random checkpoints (97 GB) into --work, which should be a tmpfs so that they are in the page cache,
loads them under a 78 GiB cap and prints one table, with the processor's name and what the run spent in the
kernel. Targets are those of TARGETS for the card at hand. `--device cpu` runs the same code on a tiny model,
to see that it works.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_decoding
import gpu_runs
import gpu_surgery
from gpu_record import Bench, table

from command_line import ends_in_one_line, parser_of

SECTIONS = {
    "start": gpu_runs.start,
    "surgery": gpu_surgery.surgery,
    "prefill": gpu_decoding.prefill,
    "edits": gpu_surgery.edits,
    "sweep": gpu_runs.sweep,
    "decode": gpu_decoding.decode,
    "protocol": gpu_decoding.protocol,
    "batch": gpu_runs.batch,
    "resident": gpu_surgery.resident,
}


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(SECTIONS),
        default=list(SECTIONS),
        help="which parts to run (the floors and loading always)",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same code on a tiny model"
    )
    parser.add_argument("--layers", type=int, help="fewer layers than 64, for a trial")
    parser.add_argument(
        "--work", default="/dev/shm", help="where the checkpoints go (97 GB for the full shape)"
    )
    parser.add_argument("--cap", type=float, default=78, help="GiB of GPU memory this process may use")
    parser.add_argument(
        "--serial-every",
        type=int,
        default=8,
        help="measure the serial way on every N-th reply of each budget",
    )
    parser.add_argument("--sweep-every", type=int, default=1, help="sweep every N-th layer")
    parser.add_argument(
        "--stop-after",
        type=float,
        help="start no experiment after this many seconds; the table says how many were run",
    )
    parser.add_argument(
        "--output", help="write the table and all details to this .json and the table to .md beside it"
    )
    return parser.parse_args()


@ends_in_one_line("interrupted; the sections that had ended are in --output")
def main() -> int:
    args = parse()
    bench = Bench(args)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        args.folder = Path(folder)
        bench.timed("floors", bench.floors)
        bench.timed("write", bench.write)
        loaded = False
        for section in (s for s in SECTIONS if s in args.only):
            if not loaded and section != "start":
                bench.timed("load", bench.load)
                loaded = True
            if section == "resident":
                bench.host()
                bench.spent()
            try:
                bench.timed(section, partial(SECTIONS[section], bench))
            except Exception as e:  # one part that fails leaves the others' figures
                traceback.print_exc()
                bench.row(section, "failed", ok=False, note=f"{type(e).__name__}: {str(e)[:300]}")
            if args.output:
                bench.save(Path(args.output))
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{bench.about()}\n\n{table(bench.rows)}")
    return 0 if all(r.ok is not False for r in bench.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
