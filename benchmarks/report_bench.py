"""How long `report.py` takes, how much memory and how large a page, for runs of any size.

    python benchmarks/report_bench.py results/reference/smollm2-135m --experiments 68 1001

The experiments of a committed run are written again and again under new names until there are so many, in a
folder that is removed at the end, and `report.py` is run on it as a user runs it. Prints for each size: wall
and processor seconds; the highest memory of the process that makes the report, and of the largest of those
that help it; bytes of the page and of what lies beside it.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

if str(Path(__file__).resolve().parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line import Parser, ends_in_one_line
from errors import FrankenError
from experiments import BASELINE
from files import ROOT, read_json
from runner.results import Run, write_json


def multiplied(path: Path, count: int, folder: Path) -> Run:
    """A run of `count` experiments in `folder`, of those of the run at `path` in turn."""
    run, manifest = Run.resume(str(path))
    done = [name for name in manifest["experiments"] if run.load(name) is not None]
    if BASELINE not in done:
        raise FrankenError(f"{path} has no {BASELINE}")
    results = {name: run.load(name) for name in done}
    made, names = Run(folder), []
    (folder / "experiments").mkdir(parents=True)
    for k in range(count):
        again, old = divmod(k, len(done))
        result = copy.deepcopy(results[done[old]])
        assert result is not None, "only what has run is here"
        experiment = result["experiment"]
        if again:
            experiment["name"] += f"_{again}"
            if experiment.get("matched"):
                experiment["matched"]["of"] += f"_{again}"
        names.append(experiment["name"])
        made.save(result)
    write_json(made.manifest_path, manifest | {"experiments": names})
    return made


def timed(folder: Path) -> dict[str, float]:
    """Run report.py on the folder; its seconds and bytes. Raises FrankenError if it fails."""
    begun = time.perf_counter()
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        # a child that waits for it knows what it and its helpers took apart
        os.execv(sys.executable, [sys.executable, "-c", _CHILD, str(ROOT / "report.py"), str(folder)])
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        raise FrankenError(f"report.py failed on {folder}")
    memory = re.findall(r"\d+", (folder / "memory").read_text())
    beside = [f for f in (folder / "replies").glob("*")] + [f for f in (folder / "figures").glob("*")]
    return {
        "seconds": seconds,
        "processor seconds": usage.ru_utime + usage.ru_stime,
        "MB, the process": int(memory[0]) / 1e3,
        "MB, its largest helper": int(memory[1]) / 1e3,
        "MB of page": (folder / "report.html").stat().st_size / 1e6,
        "MB beside it": sum(f.stat().st_size for f in beside) / 1e6,
    }


_CHILD = """
import pathlib, resource, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    kb = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    (pathlib.Path(sys.argv[1]) / "memory").write_text(str(kb))
"""


@ends_in_one_line("interrupted")
def main() -> int:
    p = Parser(description="Time report.py on runs of any size, made from a committed one.")
    p.add_argument("run", type=Path, help="a results/reference/... folder")
    p.add_argument("--experiments", type=int, nargs="+", default=[68, 1001], metavar="N")
    p.add_argument("--times", type=int, default=1, help="how often each size is timed; the fastest counts")
    args = p.parse_args()
    suites = ", ".join(read_json(args.run / "manifest.json")["protocol"]["suites"])
    print(f"{args.run} ({suites}), {len(os.sched_getaffinity(0))} processors")
    for count in args.experiments:
        work = Path(tempfile.mkdtemp(prefix="report_bench_"))
        try:
            made = multiplied(args.run, count, work / "run")
            best = min((timed(made.path) for _ in range(args.times)), key=lambda one: one["seconds"])
        finally:
            shutil.rmtree(work)
        print(f"{count} experiments: " + ", ".join(f"{value:.1f} {what}" for what, value in best.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
