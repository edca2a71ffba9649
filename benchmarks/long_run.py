"""Whether a run of a thousand experiments takes as long and as much memory at its end as at its beginning.

    python benchmarks/long_run.py --experiments 1000

A tiny random model, changed by noise of a thousand strengths in one run of `run_all.py`, and the report at
its end. Of the first and the last tenth of the experiments it prints the median seconds, and how much the
run's highest memory grew for each experiment between them. The exit status is 1 if an experiment takes a
tenth longer at the end, or memory grows by over 50 kB for each.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if str(Path(__file__).resolve().parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu_checkpoint
from command_line import Parser, ends_in_one_line
from errors import FrankenError
from files import ROOT
from runner.results import Run

LONGER, GROWTH = 1.1, 50e3  # times as long; bytes an experiment

EXPERIMENTS = """
from experiments import Experiment, perturb

EXPERIMENTS = [
    Experiment(f"noise_of_{{k}}", "mine", lambda m, k=k: perturb(m.recipe, 0.001 + k * 1e-5, k), "")
    for k in range(1, {count})
]
"""


@ends_in_one_line("interrupted")
def main() -> int:
    p = Parser(description="Seconds and memory an experiment, over a run of a thousand.")
    p.add_argument("--experiments", type=int, default=1000, metavar="N", help="at least 20")
    p.add_argument("--suites", default="quick", help="what each is asked")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="long_run_") as work:
        base, instruct = gpu_checkpoint.write_pair(Path(work), gpu_checkpoint.SHAPE_TINY, torch.device("cpu"))
        mine = Path(work) / "experiments_of_mine.py"
        mine.write_text(EXPERIMENTS.format(count=args.experiments))
        command = [sys.executable, str(ROOT / "run_all.py"), "--base", str(base), "--instruct", str(instruct)]
        command += ["--device-map", "cpu", "--experiments-file", str(mine), "--suites", args.suites]
        begun = time.perf_counter()
        done = subprocess.run([*command, "--output", work], capture_output=True, text=True)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            raise FrankenError("run_all.py failed, as told above")
        took = time.perf_counter() - begun
        (folder,) = re.findall(r"results in (\S+)", done.stderr)
        run, manifest = Run.resume(folder)
        results = [run.load(name) for name in manifest["experiments"]]
        costs = [result["performance"] for result in results if result is not None]
    # the first of all warms up what the others share
    tenth = max(2, len(costs) // 10)
    first, last = costs[1 : tenth + 1], costs[-tenth:]
    seconds = [statistics.median(cost["seconds"] for cost in part) for part in (first, last)]
    growth = (last[-1]["peak_memory_bytes"] - first[-1]["peak_memory_bytes"]) / (len(costs) - tenth)
    print(
        f"{len(costs)} experiments in {took:.0f} s with the report; highest memory"
        f" {last[-1]['peak_memory_bytes'] / 1e6:.0f} MB"
    )
    print(f"seconds an experiment, median: {seconds[0]:.3f} in the first tenth, {seconds[1]:.3f} in the last")
    print(f"memory: {growth / 1e3:+.1f} kB an experiment")
    return int(seconds[1] > LONGER * seconds[0] or growth > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
