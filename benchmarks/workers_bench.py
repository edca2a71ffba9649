"""Throughput of experiments with one worker and with several, in one run: loading and the first experiment of
each worker, which captures its graphs, are told apart.

python benchmarks/workers_bench.py --pair qwen2.5-coder-1.5b --workers 2 --output FOLDER

The workers are loaded once. Then the first one alone runs the experiments, and afterwards all of them run the
same again; results go to two runs' folders, and how many numbers differ between them is counted.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate
from command_line import ends_in_one_line, parser_of
from errors import FrankenError
from experiments import EXPERIMENTS, Plan, with_suites
from files import write_text
from runner.batch import Record
from runner.crews import choose_crew
from runner.manifest import hardware, protocol_json, versions
from runner.replica import ModelOptions
from runner.results import Run
from runner.workers import Fleet
from suites.base import Protocol


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser_of(__doc__)
    flags.add_argument("--pair", default="qwen2.5-coder-1.5b")
    flags.add_argument("--base")
    flags.add_argument("--instruct")
    flags.add_argument("--device-map", default="auto", choices=("auto", "cuda", "cpu"))
    flags.add_argument("--workers", type=int, default=2)
    flags.add_argument("--experiments", type=int, default=24, help="by priority")
    flags.add_argument("--samples", type=int, default=1)
    flags.add_argument("--suites")
    flags.add_argument("--output", required=True, help="a folder for the two runs and workers.json")
    return flags.parse_args(argv)


def model_options(args: argparse.Namespace) -> ModelOptions:
    """What run_all.py's command line would say of this model."""
    return ModelOptions(
        pair=None if args.instruct else args.pair,
        base=args.base,
        instruct=args.instruct,
        base_revision=None,
        instruct_revision=None,
        instruct_adapter=None,
        source=(),
        dtype="auto",
        device_map=args.device_map,
        resident=None,
        batch_size=None,
        deterministic=False,
        thinking="off",
    )


def no_more_suites() -> None:
    """What a worker does before it loads: there is no suite to register here."""


def planned(args: argparse.Namespace, layers: int) -> tuple[list[Plan], Protocol]:
    """The first experiments by priority, fitted to a depth, and what they are asked."""
    given = evaluate.parse_suites(args.suites) if args.suites else None
    chosen = with_suites(list(EXPERIMENTS[: args.experiments]), given)
    plans = [experiment.plan(layers) for experiment in chosen]
    wanted = {name for plan in plans for name in plan.experiment.suites or ()}
    return plans, Protocol(tuple(name for name in evaluate.SUITES if name in wanted), args.samples)


def numbers(value, path="") -> dict[str, float | int | str | None]:
    """All leaves of a result by where they stand, without what the clock decides."""
    if isinstance(value, dict):
        parts = {k: v for k, v in value.items() if k != "performance"}
        return {p: x for k, v in parts.items() for p, x in numbers(v, f"{path}.{k}").items()}
    if isinstance(value, list):
        return {p: x for k, v in enumerate(value) for p, x in numbers(v, f"{path}[{k}]").items()}
    return {path: value}


def compared(a: Run, b: Run, names: list[str]) -> dict:
    """How many leaves of the results of two runs there are, how many differ, and where: by suite and key, how
    many, in how many experiments, and the largest difference of numbers."""
    one, other = ({n: numbers(run.load(n)) for n in names} for run in (a, b))
    where: dict[str, dict] = {}
    differing = 0
    for name in names:
        for path in one[name].keys() | other[name].keys():
            x, y = one[name].get(path), other[name].get(path)
            if x == y:
                continue
            differing += 1
            entry = where.setdefault(
                re.sub(r"\[\d+\]", "[]", path), {"count": 0, "largest": None, "in": set()}
            )
            entry["count"] += 1
            entry["in"].add(name)
            if isinstance(x, int | float) and isinstance(y, int | float):
                entry["largest"] = max(entry["largest"] or 0.0, abs(x - y))
    ordered = sorted(where.items(), key=lambda item: -item[1]["count"])
    return {
        "values": sum(map(len, one.values())),
        "differing": differing,
        "where": {path: entry | {"in": len(entry["in"])} for path, entry in ordered},
    }


@ends_in_one_line("interrupted; the runs that had begun are in --output")
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    options = model_options(args)
    # 1. the workers, loaded
    begin = time.perf_counter()
    crew = choose_crew(args.workers, options)
    if crew is None:
        raise FrankenError("--workers 1 is one process without Ray: there is nothing to compare")
    out: dict = {"workers": crew.workers, "gpus_each": crew.cards, "experiments": args.experiments}
    with Fleet(crew, options, no_more_suites) as fleet:
        shape = fleet.open()
        plans, protocol = planned(args, shape.layers)
        loaded = fleet.prepare(protocol, datetime.now())
        fleet.wait_for_all()
        out["load_seconds"] = time.perf_counter() - begin
        names = [plan.experiment.name for plan in plans]

        def timed(workers: int, what: str, some: list) -> tuple[Run, float]:
            manifest = {
                "schema_version": 2,
                "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "protocol": protocol_json(protocol),
                "experiments": [plan.experiment.name for plan in some],
            }
            folder = Path(args.output) / what
            (folder / "experiments").mkdir(parents=True)
            run = Run(folder)
            write_text(run.manifest_path, json.dumps(manifest))
            record = Record(run, manifest, some, loaded.fingerprint)
            for hand in fleet.hands:
                hand.state = "idle" if hand.number <= workers else "resting"
            begin = time.perf_counter()
            failed = fleet.run(record)
            seconds = time.perf_counter() - begin
            print(f"{what}: {len(some)} experiments in {seconds:.1f} s, {failed} failed", flush=True)
            return run, seconds

        # 2. each worker's first experiments, which capture graphs; then one worker, then all
        _, out["first_seconds"] = timed(crew.workers, "first", plans[: 2 * crew.workers])
        one, out["one_seconds"] = timed(1, "one", plans)
        every, out["all_seconds"] = timed(crew.workers, "all", plans)
    out["ratio"] = out["one_seconds"] / out["all_seconds"]
    out["compared"] = compared(one, every, names)
    out |= {"fingerprint": loaded.fingerprint, "versions": versions(), "hardware": hardware()}
    write_text(Path(args.output) / "workers.json", json.dumps(out, indent=1) + "\n")
    print(
        f"{crew.workers} workers: {out['ratio']:.3f} times one worker's throughput over {len(names)}"
        f" experiments; loading took {out['load_seconds']:.1f} s; {out['compared']['differing']} of"
        f" {out['compared']['values']} values differ"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
