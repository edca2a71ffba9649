"""Sections of gpu_bench.py: prompts read, tokens written, and both against the plain way."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from gpu_record import Bench
from gpu_targets import QUICK
from torch import profiler

import prompts
from engine.attention import ATTENTION
from engine.forward import Timing
from engine.generation import Request
from evaluate import SUITES, evaluate
from suites.base import Protocol
from surgery import recipes


def prefill(bench: Bench) -> None:
    """How far the Yes/No questions are from the card's matrix rate, by the tokens that are computed."""
    engine, config = bench.engine, bench.live.config
    inside = sum(t.numel() for t in bench.live.banks[0].tensors.values() if t.ndim == 2) * bench.n
    head = config.hidden_size * config.vocab_size
    for name in QUICK:
        took = []
        for _ in range(4):
            engine.timing, begin = Timing(), time.perf_counter()
            engine._entered.clear()
            SUITES[name]().measure(engine, Protocol(), [])
            took.append((time.perf_counter() - begin, engine.timing.prefill_seconds))
        whole, passes = sorted(took[1:])[1]
        tokens = engine.timing.prefill_tokens
        bench.details.setdefault("prefill_seconds", {})[name] = took
        rows = len(prompts.BINARY_PROBES) if name == "binary" else tokens
        work = 2 * (inside * tokens + head * rows)
        share = work / whole / bench.matrix_rate
        bench.row(
            f"prefill, {'Yes/No questions' if name == 'binary' else name}",
            f"{work / whole / 1e12:.0f} TFLOP/s",
            f"{bench.matrix_rate / 1e12:.0f} TFLOP/s",
            f">= {100 * bench.targets.prefill:.0f}%" if name == "binary" else "",
            share >= bench.targets.prefill if name == "binary" else None,
            f"{100 * share:.0f}%; {tokens} tokens computed in {whole:.3f} s with all that the host does,"
            f" {passes:.3f} s of it in the layers ({tokens / whole:.0f} tokens/s)",
        )
    if bench.on_gpu:
        for name in QUICK:
            _profile(bench, name)


def _profile(bench: Bench, name: str) -> None:
    """Note which kernels a suite's time on the card goes to."""
    bench.engine._entered.clear()
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
        SUITES[name]().measure(bench.engine, Protocol(), [])
    kernels = sorted(profile.key_averages(), key=lambda k: -k.device_time_total)[:16]
    bench.details.setdefault("kernels", {})[name] = [
        [k.key[:100], round(k.device_time_total / 1e3, 2), k.count] for k in kernels
    ]


def _requests(n: int, new: int, temperature: float, prompt: int = 256) -> list[Request]:
    """n requests of random tokens, each of `prompt` tokens and a budget of `new`."""
    return [
        Request(f"b{i}", tuple(5 + (31 * i + 7 * k) % 3900 for k in range(prompt)), new, temperature)
        for i in range(n)
    ]


def decode(bench: Bench) -> None:
    """One decode step beside the time that reading the weights once takes; and what is captured again."""
    engine, new = bench.engine, 64 if bench.on_gpu else 8
    floor = bench.step_bytes / bench.read_rate
    bench.row(
        "floor: one decode step",
        f"{floor * 1e3:.2f} ms",
        note=f"{bench.step_bytes / 1e9:.1f} GB of weights read once",
    )
    for rows, most in ((16, bench.targets.step_16), (64, bench.targets.step_64)):
        engine.timing = Timing()
        engine.complete(_requests(rows, 3, 0.7))
        bench.details[f"first_capture_seconds_{rows}"] = engine.timing.capture_seconds
        for temperature in (0.0, 0.7):
            engine.complete(_requests(rows, 3, temperature))
            steps = []
            # the median: a full garbage collection stops the host for 0.2 s now and then
            for _ in range(3):
                engine.timing = Timing()
                engine.complete(_requests(rows, new, temperature))
                steps.append(engine.timing.decode_seconds / engine.timing.decode_steps)
            step = sorted(steps)[1]
            bench.row(
                f"one decode step, batch {rows}, {'sampled' if temperature else 'greedy'}",
                f"{step * 1e3:.2f} ms",
                f"{floor * 1e3:.2f} ms",
                f"<= {most}x",
                step <= most * floor,
                f"{step / floor:.2f}x; context 256 to {256 + new}; {rows / step:.0f} tokens/s",
            )
    compiled = bench.details["first_capture_seconds_16"] + bench.details["first_capture_seconds_64"]
    bench.row("compiling and capturing, once", f"{compiled:.1f} s", note="batch sizes 16 and 64")
    block = bench.n * 24 // 64, bench.n * 40 // 64
    for name, recipe in (
        ("deleted", recipes.delete(bench.live.original, *block)),
        ("repeated", recipes.repeat(bench.live.original, *block)),
    ):
        bench.live.apply(recipe)
        engine.timing = Timing()
        engine.complete(_requests(16, 3, 0.7))
        bench.row(
            f"capturing again, {block[1] - block[0]} layers {name}",
            f"{engine.timing.capture_seconds * 1e3:.0f} ms",
            note=(f"{len(recipe)} layers run, {engine.timing.captures} graph; same depth: no capture at all"),
        )
    bench.live.apply(bench.live.original)


def protocol(bench: Bench) -> None:
    """The whole protocol of one experiment, beside the plain way."""
    engine, protocol, read = bench.engine, Protocol(), bench.engine.next_token_logprobs
    probes: list[tuple[int, ...]] = []

    def remember(prompts, **how):
        probes.extend(prompts)
        return read(prompts, **how)

    fast, phases = 0.0, {}
    with mock.patch.object(engine, "next_token_logprobs", remember):
        for _ in range(2):  # the first time compiles and captures
            probes.clear()
            engine._entered.clear()  # no layers' states from a sweep before
            engine.timing, begin = Timing(), time.perf_counter()
            _, phases = evaluate(engine, protocol)
            fast = time.perf_counter() - begin
    bench.details["protocol"] = {"seconds": fast, "phases": phases, "timing": asdict(engine.timing)}
    requests = [r for name in protocol.suites for r in SUITES[name]().requests(engine, protocol)]
    serial, note = _serial(bench, requests, probes, protocol)
    bench.row(
        "whole protocol, one experiment",
        f"{fast:.2f} s",
        f"serial {serial:.0f} s",
        ">= 20x faster",
        serial >= 20 * fast,
        f"{serial / fast:.0f}x; {note}; {len(requests)} replies, {engine.timing.decode_tokens} tokens",
    )


def _serial(
    bench: Bench, requests: list[Request], probes: list[tuple[int, ...]], protocol: Protocol
) -> tuple[float, str]:
    """Seconds of the plain way: one generate() a prompt, one forward pass a probe or text, on the same
    weights."""
    # 1) the engine's layers behind the plain attention
    model, every, tokens = bench.live.model, bench.args.serial_every, 0
    attentions: list[Any] = [bank.module.self_attn for bank in bench.live.layers if bank.module is not None]
    for i, attention in enumerate(attentions):  # generate()'s own cache goes by layer number
        attention.layer_idx = i
    bench.live.config._attn_implementation = "sdpa"
    total, measured = 0.0, 0

    def timed(function) -> float:
        if bench.on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        if bench.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def generate(r: Request, budget: int):
        ids = torch.tensor([r.prompt_ids], device=bench.device)
        sampling = (
            {"do_sample": True, "temperature": r.temperature, "top_k": 0}
            if r.temperature
            else {"do_sample": False}
        )
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=budget,
            min_new_tokens=budget,
            pad_token_id=0,
            **sampling,
        )

    # 2) a sample of every kind of request, scaled up
    with torch.inference_mode():
        generate(requests[0], 4)
        budgets = {(r.max_new_tokens, r.temperature) for r in requests}
        for budget, temperature in sorted(budgets):
            group = [r for r in requests if (r.max_new_tokens, r.temperature) == (budget, temperature)]
            sample = group[::every]
            took = sum(timed(lambda r=r: generate(r, r.max_new_tokens)) for r in sample)
            measured, tokens = measured + len(sample), tokens + sum(r.max_new_tokens for r in sample)
            total += took / len(sample) * len(group)
        bench.details["serial_seconds_per_token"] = total / sum(r.max_new_tokens for r in requests)
        texts = [bench.engine.text_ids(text) for _, text in protocol.texts]
        for group in (probes, texts):
            sample = group[::4]
            took = sum(
                timed(
                    lambda ids=ids: (
                        model(torch.tensor([ids], device=bench.device))
                        .logits.float()
                        .log_softmax(-1)[0, -1]
                        .cpu()
                    )
                )
                for ids in sample
            )
            total += took / len(sample) * len(group)
    # 3) back to the engine's own
    bench.live.config._attn_implementation = ATTENTION
    for attention in attentions:
        attention.layer_idx = 0
    return (
        total,
        (
            f"serial measured on {measured} of {len(requests)} replies ({tokens} tokens) and a quarter of"
            " the probes, scaled"
        ),
    )
