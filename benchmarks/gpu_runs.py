"""Sections of gpu_bench.py: whole runs, from a cold start to all named experiments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_record import GIB, Bench
from gpu_targets import NAMED, QUICK

import experiments
from files import ROOT
from suites.base import Protocol


def start(bench: Bench) -> None:
    """From the command to the first experiment, in a process of its own, with empty caches of kernels and
    with those that this leaves."""
    with tempfile.TemporaryDirectory(dir=bench.args.work) as place:
        ready, took, capture, whole = _started(bench, Path(place), "start")
        again = _started(bench, Path(place), "start again")
    bench.row(
        "start to first experiment, checkpoint in the page cache",
        f"{ready:.1f} s",
        target=f"< {bench.targets.start:.0f} s",
        ok=ready < bench.targets.start,
        note=f"its whole protocol done after {ready + took:.1f} s, {capture:.1f} s of them compiling and"
        f" capturing, report written after {whole:.1f} s; no kernel compiled before",
    )
    ready, took, capture, _ = again
    bench.row(
        "  the same again, with the kernels that it compiled",
        f"{ready:.1f} s",
        note=f"its whole protocol done after {ready + took:.1f} s, {capture:.1f} s of them compiling and"
        " capturing",
    )


def _started(bench: Bench, place: Path, name: str) -> tuple[float, float, float, float]:
    """Seconds of one run: to its first experiment, of that, of its compiling and capturing, of all."""
    instruct, base = bench.paths
    results, names = place / name, ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FRANKENMODEL_CACHE")
    caches = {variable: str(place / variable.lower()) for variable in names}
    command = [sys.executable, "run_all.py", "--base", str(base), "--instruct", str(instruct)]
    command += ["--experiments", "baseline_instruct", "--output", str(results)]
    begin, wall = time.time(), time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | caches, capture_output=True, text=True, timeout=240
    )
    whole = time.perf_counter() - wall
    bench.details[name] = {"seconds": whole, "stderr": done.stderr[-3000:], "code": done.returncode}
    (file,) = results.glob("*/experiments/baseline_instruct.json")
    performance = json.loads(file.read_text())["performance"]
    ready = file.stat().st_mtime - begin - performance["seconds"]
    return ready, performance["seconds"], performance["capture_seconds"], whole


def run_plans(bench: Bench, plans, protocol) -> tuple[float, list[dict]]:
    """Run experiments: seconds of all that --stop-after let begin, and their results."""
    from runner.batch import run_experiment

    begin, results = time.perf_counter(), []
    for plan in plans:
        if bench.args.stop_after and results and time.perf_counter() - bench.begun > bench.args.stop_after:
            break
        results.append(run_experiment(bench.engine, plan, protocol, bench.original))
        p = results[-1]["performance"]
        problem = (results[-1]["error"] or {}).get("message", "")[:200]
        print(
            f"  {plan.experiment.name:36} {p['seconds']:6.2f} s (surgery {p['surgery_seconds']:.3f}, back"
            f" {p['restore_seconds']:.3f}, prefill {p['prefill_seconds']:.2f}, decode"
            f" {p['decode_seconds']:.2f}, capture {p['capture_seconds']:.2f}) exact"
            f" {results[-1]['weights']['exact']} {problem}",
            flush=True,
        )
        json.dumps(results[-1], allow_nan=False)
    return time.perf_counter() - begin, results


def batch(bench: Bench) -> None:
    """All experiments of NAMED, each with its own protocol, and the memory that they took."""
    every_one = experiments.with_suites(experiments.EXPERIMENTS, None)
    plans = [e.plan(bench.n) for e in every_one if e.name in NAMED]
    took, results = run_plans(bench, plans, Protocol())
    every, cut = len(plans), len(results) < len(plans)
    good = all(r["status"] == "done" and r["weights"]["exact"] for r in results)
    bench.details["batch"] = {r["experiment"]["name"]: r["performance"] for r in results}
    if bench.on_gpu:  # how often the allocator had to give cached memory back to find room under the cap
        bench.details["allocation_retries"] = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    bench.row(
        f"{every} named experiments, each with its own protocol",
        f"{took:.0f} s",
        target=f"< {bench.targets.batch:.0f} s",
        ok=None if cut else took < bench.targets.batch and good,
        note=f"{took / len(results):.1f} s each; all done, weights back to the bit: {good}"
        + (f"; only {len(results)} of {every} were run" if cut else ""),
    )
    ooms = sum(r["performance"]["out_of_memory"] for r in results)
    if bench.on_gpu:
        bench.row(
            "peak GPU memory of the full batch",
            f"{bench.watch.gpu / GIB:.1f} GiB",
            target=f"< {bench.args.cap} GiB",
            ok=bench.watch.gpu < bench.args.cap * GIB,
            note=f"reserved by the process, capped there; {ooms} batches halved",
        )


def sweep(bench: Bench) -> None:
    """One base layer at every position in turn, with the quick protocol."""
    plans = [e.plan(bench.n) for e in experiments.window_sweep(1, bench.n)][:: bench.args.sweep_every]
    took, results = run_plans(bench, plans, Protocol(suites=QUICK))
    each = [r["performance"]["seconds"] for r in results]
    move = sorted(r["performance"]["surgery_seconds"] for r in results)
    bench.details["sweep"] = {"seconds": each, "move_seconds": move}
    bench.row(
        "sweep, quick protocol, one configuration",
        f"{took / len(results):.2f} s",
        target=f"< {bench.targets.sweep} s, slowest {bench.targets.sweep_slowest}",
        ok=took / len(results) < bench.targets.sweep and max(each) < bench.targets.sweep_slowest,
        note=f"{len(results)} of {bench.n} configurations; slowest {max(each):.2f} s",
    )
    bench.row(
        "  the layer's move",
        f"{move[len(move) // 2] * 1e3:.1f} ms",
        target=f"< {1e3 * bench.targets.move:.0f} ms, slowest {1e3 * bench.targets.move_slowest:.0f}",
        ok=move[len(move) // 2] < bench.targets.move and move[-1] < bench.targets.move_slowest,
        note=f"median; slowest {move[-1] * 1e3:.1f} ms",
    )
