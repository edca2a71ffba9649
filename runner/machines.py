"""Machines that a run can be planned for from another one: `--dry-run --for h100-80gb`.

Rates are not data sheets': they are what the work that runner.estimate counts takes in the measured times.
It counts every prompt whole, where the engine reads common beginnings once, and steps of 32 rows, where a GPU
decodes 64; so they are higher than the hardware's own. Both measured times are of the Qwen2.5-Coder-32B
shape, in bf16: a placebo of the heads (the quick protocol, with no layers kept from another experiment) and
the whole protocol of one experiment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from errors import FrankenError, nearest

GIB = 1 << 30
# Of the 32B shape: parameters in layers, bytes of all weights; counted: prompt tokens of the quick and the
# whole protocol, decode steps of the whole.
INSIDE, WEIGHTS = 31.2e9, 65.5e9
QUICK_TOKENS, WHOLE_TOKENS, WHOLE_STEPS = 18303, 30441, 232
HOST_MEMORY = 2.7 * GIB  # beside the page cache, measured with the 32B shape on both cards


@dataclass(frozen=True)
class Machine:
    """`memory`: bytes of one card. `flops`, `bandwidth`: per second, of the work counted. `to_device`:
    bytes/s streamed from the page cache. `basis`: where that comes from. `start`: seconds until the first
    experiment, with weights of the 32B shape in the page cache and no kernel compiled; None: not measured."""

    name: str
    cards: int
    memory: float
    flops: float
    bandwidth: float
    to_device: float
    basis: str
    start: float | None = None


def measured(
    name: str,
    memory: float,
    quick: float,
    whole: float,
    move: float,
    to_device: float,
    start: float,
    basis: str,
) -> Machine:
    """From seconds measured with the 32B shape: one quick experiment, of which `move` is the surgery and its
    way back, one experiment's whole protocol, and the start."""
    flops = 2 * INSIDE * QUICK_TOKENS / (quick - move)
    step = (whole - 2 * INSIDE * WHOLE_TOKENS / flops) / WHOLE_STEPS
    return Machine(name, 1, memory, flops, WEIGHTS / step, to_device, basis, start)


H200 = measured(
    "h200-141gb",
    139.8 * GIB,
    0.87,
    3.19,
    0.102,
    54.6e9,
    23.2,
    "measured on one H200, 2026-11-26, with random weights of the 32B shape",
)
# The whole protocol was measured behind a sweep, which saved it 0.6 s: 3.21 + 0.6.
H100 = measured(
    "h100-80gb",
    79.2 * GIB,
    0.88,
    3.81,
    0.116,
    54.1e9,
    22.4,
    "measured on one H100 80GB, 2026-11-26, with random weights of the 32B shape",
)


def scaled(name: str, cards: int, memory: float, flops: float, bandwidth: float) -> Machine:
    """A card that was not measured: the H100's times by the ratio of the data sheets' dense bf16 FLOP/s (989
    tera for the H100) and memory bandwidth (3.35 TB/s), over PCIe 4 instead of 5. Cards of one host take
    turns, so that several are no faster than one."""
    return Machine(
        name,
        cards,
        memory * GIB,
        H100.flops * flops / 989e12,
        H100.bandwidth * bandwidth / 3.35e12,
        H100.to_device / 2,
        "NOT measured: the H100's times by the ratio of the data sheets' FLOP/s and memory bandwidth",
    )


A100 = scaled("a100-80gb", 1, 79.0, 312e12, 2.04e12)
MACHINES = {
    machine.name: machine
    for machine in (
        H200,
        H100,
        A100,
        scaled("a100-40gb", 1, 39.4, 312e12, 1.555e12),
        scaled("a10-24gb", 1, 22.0, 125e12, 0.6e12),
        scaled("2x40gb", 2, 39.4, 312e12, 1.555e12),
        replace(H100, name="2xh100-80gb", cards=2),
        replace(A100, name="2xa100-80gb", cards=2),
    )
}


def machine(name: str) -> Machine:
    """The machine of that name. Raises FrankenError with the names there are."""
    if name not in MACHINES:
        raise FrankenError(f"--for {name}: expected one of {', '.join(MACHINES)}{nearest(name, MACHINES)}")
    return MACHINES[name]
