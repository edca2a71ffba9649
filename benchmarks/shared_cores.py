#!/usr/bin/env python3
"""What a run costs beside other jobs on the same cores, by how OpenMP's threads wait for each other.

    python benchmarks/shared_cores.py --jobs 4

The same work (replies of 8 rows, then every 4th Yes/No question) is done by processes of their own, which
differ in the environment that they start with, one after the other and in turns: alone, and beside `--jobs`
busy processes of one thread each. Printed: seconds by the clock and of the processors, without loading, with
the machine's load average at the beginning of each; and, over all turns, by how much jobs stretched the clock
beside what a fair share of the cores would give. Other work on the machine falls into all numbers; turns
share it out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line import ends_in_one_line, parser_of

ROOT = Path(__file__).resolve().parent.parent
# by name: what the process starts with; "as set": what run_all.py does by itself
SETTINGS: dict[str, dict[str, str]] = {
    "torch's own": {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": "300000"},
    "as set": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = "while True: sum(range(10000))"
TOKENS, EVERY = 24, 4


def work(pair: str) -> dict:
    """Seconds of the work in this process, by the clock and of the processors."""
    import prompts
    from engine.generation import Engine, Request
    from runner.pairs import open_pair
    from runner.threads import set_threads

    set_threads()
    opened = open_pair(pair, device_map="cpu")
    engine = Engine(opened.live, opened.tokenizer, opened.stop_ids)
    engine.stop_ids = []  # every reply costs its budget
    asked = [engine.chat_ids([{"role": "user", "content": p.text}]) for p in prompts.BINARY_PROBES]
    requests = [Request(f"q{k}", ids, TOKENS, temperature=1.0, top_p=0.95) for k, ids in enumerate(asked[:8])]
    engine.complete(requests[:1])
    clock, used = time.perf_counter(), time.process_time()
    engine.complete(requests)
    engine.next_token_logprobs(asked[::EVERY])
    return {"wall": time.perf_counter() - clock, "cpu": time.process_time() - used}


def measured(pair: str, setting: dict[str, str], jobs: int) -> dict:
    """One process's seconds, beside so many busy ones."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment = clean | {k: v for k, v in setting.items() if v}
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(jobs)]
    load = os.getloadavg()[0]
    try:
        command = [sys.executable, __file__, "--work", "--pair", pair]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return json.loads(done.stdout.splitlines()[-1]) | {"load": load}


@ends_in_one_line("interrupted; what was measured stands above")
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--pair", default="smollm2-135m")
    parser.add_argument("--jobs", type=int, default=4, help="busy processes of one thread each")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        print(json.dumps(work(args.pair)))
        return 0
    seen: dict[tuple[str, int], list[dict]] = {}
    for turn in range(args.turns):
        for name in args.settings:
            for jobs in (0, args.jobs):
                one = measured(args.pair, SETTINGS[name], jobs)
                seen.setdefault((name, jobs), []).append(one)
                print(
                    f"turn {turn + 1}, {name}, {jobs} jobs: {one['wall']:.1f} s by the clock,"
                    f" {one['cpu']:.1f} of the processors, load {one['load']:.1f}",
                    flush=True,
                )
    cores = len(os.sched_getaffinity(0))
    print(
        f"\n| on {cores} cores | alone: clock, processors | beside {args.jobs} jobs |"
        " stretched, beside a fair share's |"
    )
    print("|---|--:|--:|--:|")
    for name in args.settings:
        (wall, cpu), (beside, spent) = (
            [median(one[what] for one in seen[name, jobs]) for what in ("wall", "cpu")]
            for jobs in (0, args.jobs)
        )
        threads = 1 if name == "one thread" else cores
        share = min(cores, threads) / max(1, (threads + args.jobs) / cores) / min(cores, threads)
        print(
            f"| {name} | {wall:.1f} s, {cpu:.1f} s | {beside:.1f} s, {spent:.1f} s |"
            f" {beside / wall:.1f} times, {beside * share / wall:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
