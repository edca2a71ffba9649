"""Sweeps at a model's own depth: single layers, windows, blocks run again, and ladders of doses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from errors import FrankenError
from planning.experiment import QUICK, Experiment, Model
from surgery.recipes import Recipe, blend, delete, double, parallel, perturb, repeat, splice

SWEEPS = ("window", "replace", "delete", "double", "repeat", "parallel", "noise", "blend")
SIZED = ("window", "delete", "double", "repeat", "parallel")  # --size and --step say of what, and how densely
WINDOW = GRID = (
    4  # layers of a window, and between two boundaries of the scan over repeats, if nothing is said
)
SWEEP_FIELDS = {
    "kind": str,
    "source": str | None,
    "size": int | None,
    "start": int | None,
    "stop": int | None,
    "dose": float | None,
}
NOISE_LADDER = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
BLEND_LADDER = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def _step(
    kind: str,
    name: str,
    build: Callable[[Model], Recipe],
    why: str,
    source=None,
    start=None,
    stop=None,
    dose=None,
) -> Experiment:
    where = {
        "kind": kind,
        "source": source,
        "size": None if start is None else stop - start,
        "start": start,
        "stop": stop,
        "dose": dose,
    }
    return Experiment(name, f"sweep_{kind}", build, why, suites=QUICK, sweep=where)


def window_sweep(
    width: int, n_layers: int, source: str = "base", stride: int | None = None
) -> list[Experiment]:
    """Replace each window of `width` layers by `source`'s, at native depth, every `stride` (default: width)
    layers.

    Windows that would reach beyond the model are left out. Raises FrankenError for a width that does not fit
    at all.
    """
    if not 1 <= width <= n_layers:
        raise FrankenError(f"a window of {width} layers does not fit a model of {n_layers}")
    return [
        _step(
            "window",
            f"window_{source}_{a}_{a + width}",
            lambda m, a=a: splice(m.recipe, source, a, a + width),
            f"{source} in layers [{a}:{a + width}]",
            source,
            a,
            a + width,
        )
        for a in range(0, n_layers - width + 1, stride or width)
    ]


def sweep(
    kind: str, n_layers: int, sizes: Sequence[int] | None = None, step: int | None = None
) -> list[Experiment]:
    """Where and how much, at native depth: a sweep over layers or blocks, or a ladder of doses over all.

    "window" and "replace" take the base's layers, the one in windows, the other one by one; "delete" and
    "double" take single layers or windows, "parallel" windows whose layers run side by side. "repeat" runs
    [start, stop) once more for every start and stop on a grid, as the block scans of RYS do. "noise" and
    "blend" (base share) change all layers. Every experiment's `sweep` says where it stands: kind, source,
    size, start, stop (layers of this model), dose.

    sizes: layers in a window; if None, 4 for window and parallel, 1 for delete and double, any for repeat.
    step: layers from one window to the next (if None, the size), or between the grid's lines (4). Raises
    FrankenError for sizes that do not fit the model.
    """
    # 1. blocks of layers, and single ones
    if kind == "window":
        windows = [w for size in sizes or (WINDOW,) for w in window_sweep(size, n_layers, stride=step)]
        # in this order the layers below a window need not be computed again
        return sorted(windows, key=lambda w: w.sweep["start"] if w.sweep else 0)
    if kind == "repeat":
        return _repeat_scan(n_layers, sizes, step or GRID)
    if kind == "replace":
        return [
            _step(
                kind,
                f"replace_{k}",
                lambda m, k=k: splice(m.recipe, "base", k, k + 1),
                f"base in layer {k}",
                "base",
                k,
                k + 1,
            )
            for k in range(n_layers)
        ]
    if kind in BLOCKS:
        return _block_sweep(kind, n_layers, sizes or (WINDOW if kind == "parallel" else 1,), step)
    # 2. doses over all layers
    if kind == "noise":
        return [
            _step(
                kind,
                f"noise_{f}",
                lambda m, f=f: perturb(m.recipe, f, m.seed),
                f"{100 * f:g}% noise on all layers",
                dose=f,
            )
            for f in NOISE_LADDER
        ]
    return [
        _step(
            kind,
            f"blend_{s}",
            lambda m, s=s: blend(m.recipe, "base", [s] * m.n),
            f"base share {s} in all layers",
            "base",
            dose=s,
        )
        for s in BLEND_LADDER
    ]


# What a sweep does to a block of layers, and how it is said of a block; of a single layer.
BLOCKS = {
    "delete": (delete, "without layers", "without layer"),
    "double": (double, "twice through each of layers", "twice through layer"),
    "parallel": (parallel, "side by side layers", ""),
}


def _check_sizes(kind: str, n_layers: int, sizes: Sequence[int]) -> None:
    least, most = (2 if kind == "parallel" else 1), (n_layers - 1 if kind == "delete" else n_layers)
    for size in sizes:
        if not least <= size <= most:
            raise FrankenError(
                f"--sweep {kind}: a block of {size} does not fit, of {n_layers} it takes {least} to {most}"
            )


def _block_sweep(kind: str, n_layers: int, sizes: Sequence[int], step: int | None) -> list[Experiment]:
    _check_sizes(kind, n_layers, sizes)
    operation, of_block, of_layer = BLOCKS[kind]
    blocks = [(a, a + size) for size in sizes for a in range(0, n_layers - size + 1, step or size)]
    return [
        _step(
            kind,
            f"{kind}_{a}" if b == a + 1 else f"{kind}_window_{a}_{b}",
            lambda m, a=a, b=b: operation(m.recipe, a, b),
            f"{of_layer} {a}" if b == a + 1 else f"{of_block} [{a}:{b}]",
            None,
            a,
            b,
        )
        for a, b in sorted(blocks)
    ]


def _repeat_scan(n_layers: int, sizes: Sequence[int] | None, step: int) -> list[Experiment]:
    """Every block between two boundaries of the grid 0, step, 2 step, ..., run once more; of the given sizes,
    if any. In the order of their ends: layers up to there are as in the unmodified model."""
    _check_sizes("repeat", n_layers, sizes or ())
    lines = range(0, n_layers + 1, step)
    blocks = [(a, b) for b in lines for a in lines if a < b and (sizes is None or b - a in sizes)]
    if not blocks:
        raise FrankenError(f"--sweep repeat: no such block of {n_layers} layers lies on a grid of {step}")
    return [
        _step(
            "repeat",
            f"repeat_window_{a}_{b}",
            lambda m, a=a, b=b: repeat(m.recipe, a, b),
            f"layers [{a}:{b}] once more",
            None,
            a,
            b,
        )
        for a, b in blocks
    ]
