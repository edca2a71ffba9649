"""What gpu_bench.py is to reach on which card, and the experiments that its targets were set for."""

from __future__ import annotations

from dataclasses import dataclass

QUICK = ("binary", "perplexity")  # the quick protocol's suites


@dataclass(frozen=True)
class Targets:
    """What is to be reached with the 32B shape, in seconds unless it says otherwise."""

    splice: float = 0.95  # of the pinned rate, from registered pages
    staged: float = 0.80  # of the pinned rate, through staging buffers
    move: float = 0.020  # a layer's move in a sweep, the median
    move_slowest: float = 0.030
    sweep: float = 1.0  # a configuration with the quick protocol, the mean
    sweep_slowest: float = 1.5
    placebo: float = 1.8
    back: float = 0.95  # of the pinned rate, on the way back from noise on all layers
    prefill: float = 0.60  # of the card's own matrix rate, over the Yes/No questions
    injection: float = 17.9  # half of 35.8
    batch: float = 220  # the 50 experiments that the target was set for
    start: float = 30
    step_16: float = 1.3  # times the floor
    step_64: float = 1.5


H100, H200 = Targets(), Targets(injection=14.5)  # half of 29
TARGETS = {"H100": H100, "H200": H200}
# The experiments that "all named experiments" were when its target was set.
NAMED = (
    *("baseline_instruct", "baseline_base", "franken_instruct_first_32", "franken_base_first_32"),
    *("swap_distant_10_55", "shuffle_all", "concept_injection", "swap_adjacent_30_35"),
    *("perturb_late_5pct", "perturb_all_1pct", "franken_instruct_first_48", "blend_linear"),
    *("swap_chunk_25_35_with_45_55", "swap_chunk_16_32_with_32_48", "franken_instruct_first_16"),
    *("franken_base_first_16", "franken_base_first_48", "swap_distant_5_60", "swap_adjacent_31_32"),
    *("blend_early_base", "blend_late_base", "perturb_late_1pct", "perturb_late_10pct"),
    *("perturb_all_5pct", "delete_30_34", "double_24_40", "repeat_24_40", "reverse_24_40"),
    *("keep_every_2nd", *(f"placebo_{what}_{k}" for what in ("mlp", "heads", "both") for k in range(1, 8))),
)
