"""What gpu_bench.py measures against and writes: the machine's own rates, the models, the table."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_checkpoint
import torch
import transformers
from gpu_targets import TARGETS

from engine.generation import Engine
from files import write_text
from runner.manifest import processor
from runner.pairs import open_pair

GIB = 1 << 30


def processor_time() -> tuple[float, float]:
    """Seconds of this process in the program and in the kernel, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime, used.ru_stime


@dataclass
class Row:
    """One line of the table; `ok` is None for a figure without a target."""

    what: str
    measured: str
    floor: str = ""
    target: str = ""
    ok: bool | None = None
    note: str = ""


class Watch:
    """Peaks of this process's own host memory and of the memory it reserves on the GPU, sampled 20 times a
    second."""

    def __init__(self):
        self.host = self.gpu = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            self.host = max(self.host, int(status.split("RssAnon:")[1].split()[0]) << 10)
            if torch.cuda.is_available():
                self.gpu = max(self.gpu, torch.cuda.memory_reserved())
            time.sleep(0.05)


def seconds(function, repeats: int, on_gpu: bool) -> float:
    """Median seconds of a call, by device events on a GPU."""
    times = []
    for _ in range(repeats + 1):
        if on_gpu:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in (0, 1))
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
    return sorted(times[1:])[repeats // 2]  # the first call warms up


def table(rows: list[Row]) -> str:
    lines = ["| what | measured | floor | reach | | note |", "|---|---|---|---|---|---|"]
    for r in rows:
        mark = {True: "yes", False: "**no**", None: ""}[r.ok]
        lines.append(f"| {r.what} | {r.measured} | {r.floor} | {r.target} | {mark} | {r.note} |")
    return "\n".join(lines)


class Bench:
    """One run of the benchmark: its models, the rates it is measured against, the rows and details so far."""

    def __init__(self, args):
        self.args, self.begun = args, time.perf_counter()
        self.rows: list[Row] = []
        self.details: dict[str, Any] = {}
        self.on_gpu = args.device == "cuda"
        self.device = torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")
        self.watch = Watch()
        self.n = args.layers or (64 if self.on_gpu else 8)
        name = torch.cuda.get_device_name(0) if self.on_gpu else ""
        self.card = next((card for card in TARGETS if card in name), None)
        self.targets = TARGETS[self.card or "H100"]

    def row(self, *args, **kwargs) -> None:
        """Add a Row to the table, and print it at once."""
        self.rows.append(Row(*args, **kwargs))
        print(" | ".join(str(v) for v in asdict(self.rows[-1]).values()), flush=True)

    # ---- floors and loading --------------------------------------------------------------------------------

    def floors(self) -> None:
        """What the machine does at best: memory read, host to device, matrix products."""
        size = (8 if self.on_gpu else 1 / 256) * GIB
        data = torch.empty(int(size) // 2, dtype=torch.bfloat16, device=self.device).normal_()
        vector = torch.randn(8192, dtype=torch.bfloat16, device=self.device)
        readers = {
            "sum of int64": data.view(torch.int64).sum,
            "sum of float32": data.view(torch.float32).sum,
            "bf16 matrix-vector product": lambda: torch.mv(data.view(-1, 8192), vector),
        }
        rates = {name: data.nbytes / seconds(f, 10, self.on_gpu) for name, f in readers.items()}
        host = torch.empty(int(size) // 4, dtype=torch.uint8, pin_memory=self.on_gpu)
        target = data.view(torch.uint8)[: len(host)]
        self.read_rate = max(rates.values())  # the fastest reader makes the strictest floor
        self.pinned_rate = len(host) / seconds(lambda: target.copy_(host, non_blocking=True), 5, self.on_gpu)
        self.details["read_bytes_per_second"] = rates
        side = 8192 if self.on_gpu else 256
        a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=self.device) for _ in (0, 1))
        self.matrix_rate = 2 * side**3 / seconds(lambda: [a @ b for _ in range(20)], 5, self.on_gpu) * 20
        self.row(
            "floor: read bandwidth", f"{self.read_rate / 1e12:.2f} TB/s", note=f"best of {', '.join(rates)}"
        )
        self.row("floor: pinned host to device", f"{self.pinned_rate / 1e9:.1f} GB/s")
        self.row(
            "floor: bf16 matrix products",
            f"{self.matrix_rate / 1e12:.0f} TFLOP/s",
            note=f"{side} x {side} x {side}, random numbers, 20 in a row",
        )

    def write(self) -> None:
        """Write the two checkpoints: the full shape for a GPU, a tiny one for a CPU."""
        shape = gpu_checkpoint.SHAPE_32B if self.on_gpu else gpu_checkpoint.SHAPE_TINY
        shape = shape | ({"num_hidden_layers": self.args.layers} if self.args.layers else {})
        begin = time.perf_counter()
        self.paths = gpu_checkpoint.write_pair(self.args.folder, shape, self.device)
        self.details["write_seconds"] = time.perf_counter() - begin
        if self.on_gpu:
            torch.cuda.empty_cache()

    def load(self) -> None:
        """Open them as a run does, under the cap on GPU memory."""
        instruct, base = self.paths
        if self.on_gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.args.cap * GIB / total))
        begin = time.perf_counter()
        opened = open_pair(
            None, base=str(base), instruct=str(instruct), device_map=self.args.device, resident=False
        )
        self.details["open_seconds"] = time.perf_counter() - begin
        self.live, self.tokenizer = opened.live, opened.tokenizer
        self.n, surgery = len(self.live.original), self.live.first_surgery
        rate = surgery.bytes_streamed / surgery.seconds
        self.row(
            "first load from the page cache",
            f"{rate / 1e9:.1f} GB/s",
            target=">= 5 GB/s",
            ok=rate >= 5e9,
            note=f"{surgery.bytes_streamed / 1e9:.1f} GB in {surgery.seconds:.1f} s",
        )
        self.details["open"] = {"seconds": self.details["open_seconds"], "checked": str(opened.checked)[:500]}
        self.engine = Engine(self.live, self.tokenizer)
        head = self.live.model.get_output_embeddings().weight
        self.step_bytes = self.n * self.live.layer_bytes() + head.nbytes
        self.original = self.live.fingerprint()

    def host(self) -> None:
        """The most host memory that this process had of its own so far."""
        ring = self.live.stream.pinned_bytes if self.on_gpu else 0
        peak = self.watch.host + ring
        self.row(
            "host memory beyond the page cache",
            f"{peak / GIB:.1f} GiB",
            target="< 8 GiB",
            ok=peak < 8 * GIB,
            note=f"anonymous {self.watch.host / GIB:.1f}, pinned {ring / GIB:.1f}",
        )

    # ---- what is written ---------------------------------------------------------------------------------

    def about(self) -> str:
        """What was measured where, in a line."""
        name = torch.cuda.get_device_name(0) if self.on_gpu else "CPU (tiny model)"
        return (
            f"{name}, torch {torch.__version__}, transformers {transformers.__version__},"
            f" {time.strftime('%Y-%m-%d')}, {self.n} layers, {os.cpu_count()} CPU cores ({processor()})."
            f" Targets of an {self.card or 'H100 (this card has none of its own)'}"
        )

    def spent(self) -> None:
        """What the run has spent of the processor so far; the details have it by section."""
        user, kernel = processor_time()
        self.row(
            "processor time of this process",
            f"{user + kernel:.0f} s",
            note=f"{user:.0f} s in the program, {kernel:.0f} s in the kernel, of which writing the"
            f" checkpoints took {self.details.get('processor', {}).get('write', [0, 0])[1]:.0f}",
        )

    def timed(self, name: str, part: Callable[[], None]) -> None:
        """Run a part and note its seconds, in all and of the processor."""
        before, begin = processor_time(), time.perf_counter()
        try:
            part()
        finally:
            spent = [round(b - a, 2) for a, b in zip(before, processor_time(), strict=True)]
            self.details.setdefault("processor", {})[name] = spent
            self.details.setdefault("wall", {})[name] = round(time.perf_counter() - begin, 2)

    def save(self, path: Path) -> None:
        """Write everything to `path`, and the table to the .md beside it."""
        write_text(
            path,
            json.dumps(
                {"about": self.about(), "rows": [asdict(r) for r in self.rows], "details": self.details},
                indent=1,
            )
            + "\n",
        )
        write_text(
            path.with_suffix(".md"),
            f"# GPU benchmark\n\n{self.about()}. Random weights of the Qwen2.5-Coder-32B shape in bf16; "
            f"one command: `python benchmarks/gpu_bench.py`.\n\n{table(self.rows)}\n",
        )
