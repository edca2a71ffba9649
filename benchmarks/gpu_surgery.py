"""Sections of gpu_bench.py: weights that move, and the ways back."""

from __future__ import annotations

import time

import torch
from gpu_record import Bench, processor_time
from gpu_runs import run_plans
from gpu_targets import QUICK

import experiments
from suites.base import Protocol
from surgery import recipes


def surgery(bench: Bench) -> None:
    """Layers that move on the device and from host memory, and the proof that they are back."""
    live, whole, layer = bench.live, bench.live.original, bench.live.layer_bytes()
    i, j = bench.n * 10 // 64, bench.n * 55 // 64
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated() if bench.on_gpu else 0
    # while pages are registered in the background, launches wait for the driver: nothing has its own rate
    if live.stream.pages is not None:
        live.stream.pages.ready.wait(120)
    # 1) a swap and back
    both = []
    for _ in range(6):
        swapped, undone = live.apply(recipes.swap(whole, i, j)), live.apply(whole)
        both.append(swapped.seconds + undone.seconds)
    took = sorted(both[1:])[2]
    bench.row(
        "swap of two layers, applied and undone",
        f"{took * 1e3:.1f} ms",
        target="< 10 ms",
        ok=took < 0.010,
        note=f"first time {both[0] * 1e3:.1f} ms",
    )
    # 2) every layer elsewhere
    times = [live.apply(recipes.shuffle(whole, seed)).seconds for seed in range(5)]
    extra = torch.cuda.max_memory_allocated() - allocated if bench.on_gpu else 0
    live.apply(whole)
    bench.row("shuffle_all applied", f"{max(times) * 1e3:.0f} ms", target="< 200 ms", ok=max(times) < 0.2)
    bench.row(
        "  its extra GPU memory",
        f"{extra / 1e9:.3f} GB",
        target="<= one layer",
        ok=extra <= layer * 1.001,
        note=f"a layer is {layer / 1e9:.3f} GB",
    )
    # 3) layers from host memory, through staging buffers and from registered pages
    for direct in (False, True):
        _splices(bench, direct)
    begin = time.perf_counter()
    exact = live.fingerprint() == bench.original
    bench.row(
        "fingerprint of all weights",
        f"{(time.perf_counter() - begin) * 1e3:.0f} ms",
        target="back to the bit",
        ok=exact,
    )


def _splices(bench: Bench, direct: bool) -> None:
    """Base layers from host memory, from registered pages (`direct`) or through staging buffers."""
    live, whole = bench.live, bench.live.original
    pages = live.stream.pages
    if direct and (pages is None or not pages.ready.is_set() or not pages.bytes):
        why = f"{pages and pages.refused}"
        return bench.row("splice from registered pages", "not measured", note=why)
    live.stream.direct = direct
    rates, streamed, kernel = [], 0, processor_time()[1]
    for _ in range(4):
        spliced = live.apply(recipes.splice(whole, "base", bench.n // 2, bench.n))
        streamed = spliced.bytes_streamed
        rates.append(streamed / spliced.seconds)
        live.apply(whole)
    kernel = (processor_time()[1] - kernel) / 8
    rate = sorted(rates)[1]
    share, least = rate / bench.pinned_rate, bench.targets.splice if direct else bench.targets.staged
    bench.row(
        f"splice of {bench.n // 2} base layers from host memory,"
        f" {'from registered pages' if direct else 'through staging buffers'}",
        f"{rate / 1e9:.1f} GB/s",
        f"{bench.pinned_rate / 1e9:.1f} GB/s",
        f">= {100 * least:.0f}%",
        share >= least,
        f"{100 * share:.0f}%; {streamed / 1e9:.1f} GB in {streamed / rate:.2f} s, {kernel:.2f} s in the"
        " kernel; all: " + ", ".join(f"{r / 1e9:.1f}" for r in rates),
    )
    ones = []
    for p in range(bench.n // 2, min(bench.n // 2 + 4, bench.n)):
        ones.append(live.apply(recipes.splice(whole, "base", p, p + 1)).seconds)
        live.apply(whole)
    bench.details[f"one_layer_seconds_{'direct' if direct else 'staged'}"] = ones
    if direct and pages is not None:
        bench.details["registered"] = {"bytes": pages.bytes, "refused": pages.refused}
    live.stream.direct = True


def edits(bench: Bench) -> None:
    """Placebos, noise on all layers and an injection, with the ways back."""
    by_name = {e.name: e for e in experiments.EXPERIMENTS}
    names = ("placebo_both_1", "placebo_mlp_1", "placebo_heads_1", "perturb_all_5pct")
    plans, quick = [by_name[name].plan(bench.n) for name in names], Protocol(suites=QUICK)
    run_plans(bench, plans[:1], quick)
    _, results = run_plans(bench, plans, quick)
    bench.details["edits"] = {r["experiment"]["name"]: r["performance"] for r in results}
    exact = all(r["status"] == "done" and r["weights"]["exact"] for r in results)
    slowest = max(results[:3], key=lambda r: r["performance"]["seconds"])["performance"]
    bench.row(
        "a placebo, quick protocol",
        f"{slowest['seconds']:.2f} s",
        target=f"< {bench.targets.placebo} s",
        ok=slowest["seconds"] < bench.targets.placebo and exact,
        note=f"the slowest of mlp, heads, both; its way back {slowest['restore_seconds']:.2f} s, proved"
        f" by the fingerprint: {exact}",
    )
    noise = results[3]["performance"]
    rate = bench.n * bench.live.layer_bytes() / noise["restore_seconds"]
    bench.row(
        "the way back from noise on all layers",
        f"{noise['restore_seconds']:.2f} s",
        f"{bench.pinned_rate / 1e9:.1f} GB/s",
        f">= {100 * bench.targets.back:.0f}%",
        rate >= bench.targets.back * bench.pinned_rate,
        f"{rate / 1e9:.1f} GB/s, {100 * rate / bench.pinned_rate:.0f}%; adding the noise took"
        f" {noise['surgery_seconds']:.2f} s, the whole experiment {noise['seconds']:.2f}",
    )
    injection = next(
        e for e in experiments.with_suites(experiments.EXPERIMENTS, None) if e.name == "concept_injection"
    )
    _, (result,) = run_plans(bench, [injection.plan(bench.n)], Protocol())
    bench.details["injection"] = result["performance"]
    took = result["performance"]["seconds"]
    bench.row(
        "concept injection",
        f"{took:.1f} s",
        target=f"< {bench.targets.injection} s",
        ok=took < bench.targets.injection and result["status"] == "done",
        note=f"{result['performance']['prefill_tokens']} tokens computed",
    )


def resident(bench: Bench) -> None:
    """Last, without the cap: both models on the card."""
    if bench.engine._accelerator:
        bench.engine._accelerator.release()
    if bench.on_gpu:
        torch.cuda.set_per_process_memory_fraction(1.0)
        if torch.cuda.mem_get_info()[0] < (bench.n + 1) * bench.live.layer_bytes():
            return bench.row(
                "splice with both models on the card",
                "not measured",
                target="< 100 ms",
                note="they do not fit this card",
            )
    bench.live.park("base")
    whole = bench.live.original
    times = [
        (
            bench.live.apply(recipes.splice(whole, "base", bench.n // 2, bench.n)).seconds,
            bench.live.apply(whole).seconds,
        )
        for _ in range(4)
    ]
    took = max(there for there, _ in times)
    bench.row(
        f"splice of {bench.n // 2} layers with both models on the card",
        f"{took * 1e3:.0f} ms",
        target="< 100 ms",
        ok=took < 0.1,
        note=(
            f"back {max(back for _, back in times) * 1e3:.0f} ms; exact:"
            f" {bench.live.fingerprint() == bench.original}"
        ),
    )
