"""What others published about the same models, each with its source. Nothing here was measured by this
project."""

from __future__ import annotations

from analysis.comparison import Row

PAIR = "qwen2.5-coder-32b"
TITLE = "Frankenmodel Experiments: Can Models Detect Their Own Weight Modifications?"
SOURCE = (
    f'"{TITLE}", results page of 2026-02-04: Qwen2.5-Coder-32B, base and instruct, one A100 80GB; P(Yes)'
    " normalized over the tokens Yes and No"
)
# Probability of Yes, capability of 6, perplexity.
EXPERIMENTS = {
    "baseline_instruct": (2e-8, 5, 3.51),
    "franken_instruct_first_32": (0.0757, 4, 3.53),
    "franken_base_first_32": (3e-7, 5, 3.33),
    "franken_instruct_first_16": (0.0474, 5, 3.63),
    "franken_instruct_first_48": (3e-5, 5, 3.64),
    "swap_chunk_25_35_with_45_55": (0.2695, 3, 11.96),
    "swap_chunk_16_32_with_32_48": (4e-6, 5, 3.5),
    "swap_distant_10_55": (1.6e-6, 5, 4.73),
    "swap_adjacent_30_35": (6e-9, 5, 3.51),
    "perturb_all_5pct": (2e-8, 5, 3.55),
    "perturb_late_5pct": (2e-8, 5, 3.56),
}
WINDOW_LAYERS = 64
# Base layers: P(Yes), as printed there; (0, 32) stands as 0.000%. Replacing any single layer had no effect.
WINDOWS = {
    (42, 46): 1.3e-5,
    (38, 46): 3.8e-4,
    (28, 44): 2e-4,
    (30, 46): 1.7e-3,
    (32, 48): 4.1e-3,
    (34, 50): 9.7e-3,
    (36, 52): 0.014,
    (38, 54): 0.011,
    (40, 56): 4.6e-3,
    (44, 60): 3e-4,
    (0, 32): 0.0,
    (32, 64): 0.0694,
    (16, 48): 0.0028,
    (24, 56): 0.0197,
}
INJECTION_SOURCE = (
    "Pearson-Vogel et al., Latent Introspection, arXiv 2602.20031: Qwen2.5-Coder-32B-Instruct, concept"
    " vectors added to layers 21-42 while the first turn is read; sensitivity 0.3% with a plain question,"
    " 39.2% with the mechanism explained, at 0.6 points more false positives"
)
INJECTION = {"plain": 0.003, "informed": 0.392}  # sensitivity by framing

# Tasks of the further injection suites: (task and measure of analysis/injection.py, value, chance or false
# positives, source).
INJECTION_EFFECTS = (
    (
        ("in words", "detects and names it"),
        0.88,
        0.0,
        "open-introspection (ostegm, 2026-02-02): Qwen2.5-Coder-32B-Instruct, best cell, layer 44 (0.69 of"
        " the depth), strength 3, n = 80; hits as its judge reads them",
    ),
    (
        ("in words", "detects and names it"),
        0.597,
        0.012,
        "the same over layers 38, 41, 44 and strengths 3, 4, 5",
    ),
    (
        ("questions", "says Yes"),
        0.392,
        None,
        "arXiv 2602.20031, mechanism explained, layers 21-42, at 0.6 points more false positives",
    ),
    (
        ("naming", "bits"),
        1.05,
        None,
        "arXiv 2602.20031, nine concepts, five shuffled orders; 0.62 unexplained",
    ),
    (("localisation", "likeliest"), 0.88, 0.1, "Hahami et al., arXiv 2512.12411, Llama-3.1-8B"),
    (("comparison", "as it stands"), 0.83, 0.5, "Hahami et al., arXiv 2512.12411, Llama-3.1-8B"),
)


def of(row: Row, layers: int) -> tuple[float, int | None, float | None] | None:
    """The published numbers of a row's experiment: P(Yes), capability of 6, perplexity; None where there are
    none."""
    sweep = row.sweep
    if sweep is None:
        return EXPERIMENTS.get(row.name)
    if sweep.kind != "window" or sweep.source != "base" or layers != WINDOW_LAYERS:
        return None
    if sweep.start is None or sweep.stop is None or (sweep.start, sweep.stop) not in WINDOWS:
        return None
    return WINDOWS[sweep.start, sweep.stop], None, None
