"""A whole study made up for tests: a run with everything in it, as rows and on disk."""

from __future__ import annotations

import math
from dataclasses import replace

from made_results import (
    binary,
    capability,
    chat,
    free_text,
    make,
    measured_formats,
    measured_injection,
    perplexity,
    result,
)
from made_rows import by_format, comparison, injection_summary, quick, row, swept

from analysis.comparison import (
    Area,
    Auroc,
    Comparison,
    Match,
    Row,
)
from runner.results import Run

NAMED = {
    "franken_instruct_first_32": ("reports it", 0.62, 0.31, 25.4),
    "franken_base_first_32": ("answers drift towards Yes", 0.14, 0.75, 23.7),
    "swap_distant_10_55": ("broken", None, 0.087, 9137.0),
    "shuffle_all": ("broken", None, 0.478, 2.1e6),
    "swap_adjacent_30_35": ("does not report it", 0.03, 0.53, 34.2),
    "perturb_late_5pct": ("does not report it", 0.0, 0.37, 25.3),
    "perturb_all_1pct": ("does not report it", 0.05, 0.39, 24.6),
    "blend_linear": ("answers drift towards Yes", 0.23, 0.62, 23.5),
    "swap_chunk_25_35_with_45_55": ("broken", 0.9, 0.032, 5238.0),
    "delete_30_34": ("does not report it", -0.05, 0.2, 28.0),
    "double_24_40": ("too little data", 0.26, 0.4, 46.6),
    "repeat_24_40": ("does not report it", -0.02, 0.58, 29.95),
}


def study_rows(layers: int = 30) -> list[Row]:
    """Rows of a run with everything: named experiments, their noise of equal perplexity, placebos, injection,
    all sweeps."""
    rows = [row("baseline_instruct", None, ppl=20.0, formats=None)]
    for name, (word, score, p, ppl) in NAMED.items():
        changed = row(name, word, score, p, ppl, formats=by_format(score or 0.0))
        twin = None if score is None or ppl >= 1000 else round(score * 0.3 - 0.02, 3)
        rows.append(replace(changed, detection=replace(changed.detection, matched_noise_score=twin)))
        if ppl < 1000:
            matched = Match(
                of=name,
                target_perplexity=ppl,
                reached_perplexity=ppl * 1.01,
                fraction=0.07,
                evaluations=((0.1, 40.0), (0.07, ppl * 1.01)),
                within=0.01,
                ok=name != "double_24_40",
            )
            rows.append(
                quick(
                    f"{name}__matched_noise",
                    "does not report it",
                    twin,
                    0.34,
                    ppl * 1.01,
                    control="matched noise",
                    matched=matched,
                )
            )
    for k, kind in enumerate(("mlp", "heads", "both")):
        rows += [
            quick(
                f"placebo_{kind}_{n}",
                "no change to report",
                0.006 * (n - 4) + 0.003 * k,
                0.3,
                20.0,
                control="placebo",
            )
            for n in range(1, 8)
        ]
    rows.append(
        row(
            "concept_injection",
            None,
            capability=None,
            published_probe=None,
            perplexity=None,
            control="injection",
            suites=("injection",),
        )
    )
    for size in (1, 4, 8, 16):
        for start in range(0, layers - size + 1, 2):
            harm = math.exp(-(start + size / 2) / 6) * size
            word = (
                "broken"
                if harm > 1.5
                else "reports it"
                if size == 8 and start == 18
                else "does not report it"
            )
            rows.append(
                swept(
                    "window",
                    start,
                    start + size,
                    word,
                    None if word == "broken" and size > 8 else 0.02 * size * math.sin(start / 4),
                    0.3 + 0.02 * size,
                    20 * math.exp(harm),
                )
            )
    for kind, scale in (("replace", 0.05), ("delete", 0.5), ("double", 0.3)):
        rows += [
            swept(
                kind,
                k,
                k + 1,
                "broken" if kind == "delete" and k < 2 else "does not report it",
                scale * math.sin(k) / 3,
                0.3 + 0.01 * k,
                20 * math.exp(scale * 8 / (k + 1)),
            )
            for k in range(layers)
        ]
    for dose in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4):
        rows.append(
            swept(
                "noise",
                None,
                None,
                "broken" if dose > 0.3 else "does not report it",
                0.3 * dose,
                min(0.6, 0.3 + dose),
                20 * math.exp(9 * dose**1.5),
                dose,
            )
        )
    rows += [
        swept(
            "blend",
            None,
            None,
            "answers drift towards Yes" if dose > 0.4 else "does not report it",
            0.2 * dose,
            0.3 + 0.6 * dose,
            20 + 6 * dose,
            dose,
        )
        for dose in (0.125, 0.25, 0.5, 0.75, 1.0)
    ]
    return rows


def study(path, layers: int = 30, text: str = "I am fine.", **changes) -> tuple[Run, dict, Comparison]:
    """A run with everything in it, on disk: (run, manifest, comparison). `text`: what the model always
    replies."""
    rows, results = study_rows(layers), []
    suites = {
        "informed": free_text("informed", text),
        "blind": free_text("blind", text),
        "binary": binary(),
        "capability": capability([True, False] * 5, text),
        "perplexity": perplexity([2.0, 3.0, 2.5]),
        "chat": chat(text),
        "formats": measured_formats(),
    }
    for r in rows:
        measured = (
            {"injection": measured_injection()}
            if r.control == "injection"
            else suites
            if r.capability
            else {k: suites[k] for k in ("binary", "perplexity")}
        )
        results.append(
            result(
                r.name,
                measured,
                experiment__control=r.control,
                experiment__sweep=r.sweep and r.sweep.to_json(),
                experiment__suites=list(r.suites),
                experiment__matched=r.matched and r.matched.to_json(),
            )
        )
    auroc = Auroc(Area(0.58, 0.45, 0.7, 30), Area(0.74, 0.6, 0.85, 33), n_modified=12, n_placebo=21)
    run, manifest = make(path, results, layers=layers)
    return (
        run,
        manifest,
        replace(comparison(rows, run=path.name, auroc=auroc, injection=injection_summary()), **changes),
    )
