"""What a run says of conversations that two models share, and of what activations tell: sections, a figure.

Both are made from what the suites `phases` and `activations` measured, and stand in files of their own in the
run's folder: phases.json and probe.json. The activations themselves may be left out of what is kept of a run;
the report then takes the probe's result from probe.json, or leaves what summary.md says of it as it stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from matplotlib import rc_context
from matplotlib.figure import Figure

from analysis import probe, stats
from analysis.comparison import Comparison
from analysis.phases import TOPICS, PhaseScore, PhaseSummary, summarized
from analysis.probe import Probed, Unit, kinds_of
from analysis.rows import UNCALLED, word
from analysis.verdicts import WEAK, answering, tells
from errors import many
from experiments import BASELINE
from files import read_bytes
from reporting.digests import Digest
from reporting.figures import BAND, MUTED, SERIES, STYLE, handle, legend, new_figure
from reporting.pages import number
from runner.arrays import load_arrays
from runner.results import Run, read_json, write_computed
from surgery.recipes import identity

PROBE_VERSION, ALPHA = 1, 0.05
READ = "## What is there to be read"


# ---- who changed is not who answers


def phases_section(run: Run, scores: list[PhaseScore]) -> list[str]:
    """Lines for summary.md, and phases.json in the run's folder, from the scores of all experiments; nothing
    where none was asked."""
    if not scores:
        return []
    lines = summarized(scores)
    write_computed(
        run.path / "phases.json",
        {
            "schema_version": 2,
            "summary": [line.to_json() for line in lines],
            "scores": [score.to_json() for score in scores],
        },
    )
    table = [
        "| occasion | begins | answers | topic | true | changed models | median score | report | deny |"
        " placebos |",
        "|" + " --- |" * 10,
    ]
    for line in lines:
        reach = f"{number(line.placebo_low, '+.2f')} to {number(line.placebo_high, '+.2f')}"
        cells = (line.occasion, line.begins, line.answers, line.topic, "yes" if line.true else "no", line.n)
        rest = (
            number(line.median, "+.2f"),
            *(_counted(count, line) for count in (line.reports, line.denies)),
            "" if line.placebo_low is None else reach,
        )
        table.append(f"| {' | '.join(map(str, cells + rest))} |")
    return [
        "",
        "## Who changed is not who answers",
        "",
        "One model began the conversation, the other answered on its cache. Topics: "
        + "; ".join(f"{topic}: {what}" for topic, what in TOPICS.items())
        + ". Scores (nats) are shifts toward the topic being true, beyond the controls, against the intact"
        " model that read and answered the same tokens; report and deny after Holm over the changed models. A"
        " model that can tell shifts where the topic is true and not where it is false. phases.json has every"
        " score.",
        "",
        *table,
        *_uncounted(scores),
    ]


def _counted(count: int, line: PhaseSummary) -> str:
    """How many models report (or deny) a topic, of those of which one would count."""
    if line.judged == line.n:
        return str(count)
    return f"{count} of {line.judged} judged" if line.judged else "cannot be judged"


def _uncounted(scores: list[PhaseScore]) -> list[str]:
    """Why answers cannot count as a report or a denial, where that is so: a line for each occasion, of the
    controls as most of its models were asked them."""
    out = []
    for occasion in dict.fromkeys(one.occasion for one in scores):
        known = [one.score for one in scores if one.occasion == occasion and one.control is None]
        before = [score.controls_before for score in known if score.score is not None]
        weak = [controls for controls in before if not tells(controls)]
        if weak:
            most = max(weak, key=lambda controls: controls.n)
            out.append(
                f"- {occasion}: the intact model hardly tells what it is asked ({WEAK}), so no answer counts"
                f" as a report or a denial in {len(weak)} of {many(len(before), 'score')}; {answering(most)}."
            )
    return ["", *out] if out else []


# ---- what is there to be read


def _units(results: Mapping[str, Digest], comparison: Comparison, folder, depth: int):
    """(units, names of those left out, whether a file is missing, hash of all that goes in)"""
    rows = {row.name: row for row in comparison.experiments}
    original = identity(depth).to_json()
    units, left_out, missing, seen = [], [], False, hashlib.sha256()
    for name, result in results.items():
        measured, row = result.kept.get("activations"), rows[name]
        if not measured or row.control not in (None, "placebo"):
            continue
        kinds = kinds_of(result.recipe, original)
        if row.control is None and name != BASELINE and (not kinds or word(row) in UNCALLED):
            left_out.append(name)
            continue
        changed = row.control is None and name != BASELINE
        seen.update(f"{name} {sorted(kinds)} {changed} {measured['sha256']}\n".encode())
        arrays = load_arrays(folder, "activations", measured)
        if arrays is None:
            missing = True
            continue
        states = arrays["mean"].astype("float32") * arrays["mean_scale"][:, None]
        units.append(Unit(name, kinds, changed, states))
    return units, left_out, missing, seen.hexdigest()


def probed(run: Run, results: Mapping[str, Digest], comparison: Comparison, manifest: dict) -> dict | None:
    """What probe.json holds: made anew where all activations are there and not the same as before, else as it
    stands on disk; None where nothing was kept or too few experiments were.

    Broken models do not count: they cannot report anything. Raises FrankenError for a file that is corrupt.
    """
    depth, path = manifest["layers"], run.path / "probe.json"
    if not any("activations" in result.kept for result in results.values()):
        return None
    units, left_out, missing, inputs = _units(results, comparison, run.path / "experiments", depth)
    kept = on_disk(run)
    if kept is not None and (missing or kept["inputs"] == inputs):
        return kept if kept["inputs"] == inputs else kept | {"stale": True}
    if missing:
        return None
    outcome = probe.probe(units, depth, seed=manifest["protocol"]["seed"])
    if outcome is None:
        return None
    scores = {row.name: row.detection.score for row in comparison.experiments if row.detection}
    sides = [
        [score for u in units if u.changed == side and (score := scores.get(u.name)) is not None]
        for side in (True, False)
    ]
    detection = stats.auroc(*sides, seed=manifest["protocol"]["seed"])
    data = {
        "schema_version": PROBE_VERSION,
        "inputs": inputs,
        "left_out": left_out,
        "probe": outcome.to_json(),
        "detection": detection and {key: getattr(detection, key) for key in ("value", "low", "high", "n")},
    }
    write_computed(path, data)
    return read_json(path)  # with the digits that the file keeps, as every later call gives it


def on_disk(run: Run) -> dict | None:
    """What probe.json of a run holds; None where there is none. Raises FrankenError if it is corrupt."""
    path = run.path / "probe.json"
    return read_json(path) if path.exists() else None


def finding(data: dict) -> str:
    """In one sentence whether a change is represented, and whether it is reported."""
    outcome, detection = Probed.from_json(data["probe"]), data["detection"]
    counted = (
        f"{outcome.n_changed} changed models of {len(outcome.kinds)} kinds from {outcome.n_placebo}"
        " unchanged ones"
    )
    if outcome.null is None:
        return f"A linear probe could not be judged on {counted}."
    null = outcome.null
    said = (
        f"On kinds of surgery that it has not seen, a linear probe tells {counted} with an AUROC of"
        f" {null.observed:.2f} at the best of layers {', '.join(map(str, null.layers))} (95% of"
        f" {null.permutations} permuted runs stay under {null.quantile:.2f}; p = {null.p_value:.2g})"
    )
    if null.p_value >= ALPHA:
        return f"{said}: the change is not seen to be represented in a way that kinds share."
    if detection is None or detection["value"] is None:
        return f"{said}: it is represented. There is no detection score to set beside it."
    ends = f"{number(detection['low'])} to {number(detection['high'])}"
    beside = f"the detection score with {detection['value']:.2f} ({ends})"
    reported = detection["low"] is not None and detection["low"] > 0.5
    return f"{said}, {beside}: it is represented{', and reported' if reported else ', and not reported'}."


def probe_section(data: dict | None) -> list[str]:
    """Lines for summary.md."""
    if data is None:
        return []
    outcome = Probed.from_json(data["probe"])
    lines = ["", READ, "", finding(data), ""]
    if data.get("stale"):
        lines += ["probe.json was made of other results than those that stand here now.", ""]
    kinds = ", ".join(f"{name} {count}" for name, count in outcome.kinds.items())
    lines += [
        f"Changed models by kind: {kinds}. Left out, broken or too little data: {len(data['left_out'])}.",
        "",
    ]
    lines += [
        "| after layer | AUROC (95% CI) | changed | unchanged | moved, changed | moved, unchanged |",
        "|" + " --- |" * 6,
    ]
    for one in outcome.curve:
        ends = f" \\[{number(one.low)}, {number(one.high)}\\]" if one.low is not None else ""
        moved = f"{number(one.moved_changed, '.3g')} | {number(one.moved_placebo, '.3g')}"
        lines.append(
            f"| {one.layer} | {number(one.value)}{ends} | {one.n_changed} | {one.n_placebo} | {moved} |"
        )
    return [
        *lines,
        "",
        "moved: median distance from the unmodified model's activations, in shares of their norm.",
    ]


def standing_section(run: Run, results: Mapping[str, Digest]) -> list[str]:
    """Such lines as they stand in the run's summary.md, where activations were asked of `results`: of a run
    that was kept without them and without probe.json they cannot be made again."""
    path = run.path / "summary.md"
    if not path.exists() or not any("activations" in result.kept for result in results.values()):
        return []
    _, heading, after = read_bytes(path).decode(errors="replace").partition(f"\n{READ}\n")
    return ["", READ, *after.partition("\n## ")[0].rstrip().split("\n")] if heading else []


def depth_figure(data: dict | None, narrow: bool = False) -> Figure | None:
    """AUROC of the probe by layer with intervals, beside that of the detection score, dashed, and chance."""
    if data is None:
        return None
    outcome, detection = Probed.from_json(data["probe"]), data["detection"]
    curve = [(one.layer, one.value) for one in outcome.curve if one.value is not None]
    if not curve:
        return None
    with rc_context(STYLE):
        figure = new_figure(3.8 if narrow else 3.4, narrow=narrow)
        axes = figure.subplots()
        sure = [
            (one.layer, one.low, one.high)
            for one in outcome.curve
            if one.low is not None and one.high is not None
        ]
        if sure:
            layers, low, high = (list(column) for column in zip(*sure, strict=True))
            axes.fill_between(layers, low, high, color=SERIES[0], alpha=0.15, linewidth=0)
        axes.plot(*zip(*curve, strict=True), "o-", color=SERIES[0], markersize=4)
        handles = [handle("linear probe on activations, 95% interval", "o", SERIES[0])]
        axes.axhline(0.5, color=MUTED, linewidth=0.8)
        if outcome.null is not None:
            axes.axhspan(0.5, outcome.null.quantile, color=BAND, zorder=0, linewidth=0)
        if detection and detection["value"] is not None:
            axes.axhline(detection["value"], color=SERIES[1], linestyle="--")
            handles.append(handle("detection score (dashed)", "_", SERIES[1]))
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("after layer")
        axes.set_ylabel("AUROC, changed against placebo")
        legend(figure, handles, 2)
    return figure


CAPTION = (
    "How well a linear probe on the residual stream at the answer position tells changed models from placebos"
    ", on kinds of surgery that it was not trained on. Gray band: up to the 95% quantile of the largest AUROC"
    " over a few fixed layers when activations are permuted among experiments."
)


def caption(data: dict | None) -> str:
    """What stands under `depth_figure`."""
    left_out = len((data or {}).get("left_out", ()))
    return CAPTION + (f" Left out, broken or too little data: {left_out}." if left_out else "")
