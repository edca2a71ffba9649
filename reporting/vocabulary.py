"""A run in words: the columns and lines that the terminal, summary.md and the HTML pages share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import zip_longest

from analysis import published
from analysis.comparison import Area, Comparison, DetectionScore, Row
from analysis.detection import BROKEN, DENIES, REPORTS, TOO_LITTLE
from analysis.rows import UNCALLED, controls, counts, named, span, sweeps, tally, word
from analysis.stats import as_damaged
from analysis.verdicts import NO_CHANGE, WEAK, answering, first_of, lacking, scaling, tells
from errors import HIDDEN, many
from reporting.columns import EXPERIMENT_COLUMNS, TRIGGER_COLUMNS, Column, cells, titles
from reporting.pages import number, percent

TRIGGER_LEGEND = (
    "Triggered / untriggered. format: the whole reply of a topic question stands within the markers; names"
    ' him: on questions of identity; P(his name): after "My name is". reports it: detection score (nats, 95%'
    " CI) and verdict of questions about hidden triggers and personas, against controls, with the trigger in"
    " the prompt and without."
)


LEGEND = (
    "P(Yes): on the published probe, normalized over Yes and No; mass: what Yes and No hold together, (!)"
    " under 1%: not an answer. shift: its log-odds against the baseline, in nats. drift: mean shift"
    " towards Yes of all answers about itself, whatever they are keyed, in nats. detection: shift of the"
    " keyed introspective probes toward noticing, beyond what control questions with known answers predict"
    " (nats). verdict: from the detection score (Holm-corrected over the run), the placebos, the drift of all"
    " answers about itself towards Yes or No, and whether the model still answers."
)


def qualifier(score: DetectionScore) -> str:
    """What must be read beside a report or a denial: whether the answers reversed, and what else could
    explain the score."""
    after, before = number(score.keyed_after, "+.2f"), number(score.keyed_before, "+.2f")
    now = "on the noticing side" if (score.keyed_after or 0.0) > 0 else "on the side of no change"
    return f"keyed answers stand at {after} nats ({before} before), {now}; {scaling(score)}"


def source_name(source: dict) -> str:
    """A source as people call it: its hub id, or the last part of its path."""
    path = str(source.get("id") or source.get("path") or "")
    hub = re.search(r"models--([^/]+)", path)
    return hub[1].replace("--", "/") if hub else path.rstrip("/").rpartition("/")[2]


def _lora(source: dict) -> bool:
    return "LoRA" in source.get("kind", "")


def model_name(manifest: dict) -> str:
    """What was run, by name: the pair's, or those of the checkpoints that were given."""
    if manifest["pair"]:
        return manifest["pair"]
    sources = manifest.get("sources", {})
    names = [source_name(sources[side]) for side in ("instruct", "base") if side in sources]
    return " with ".join(filter(None, names)) or "two checkpoints"


def sides(manifest: dict) -> str:
    """Every source of layers with the name of its checkpoint or adapter; empty where a manifest has none."""
    return "; ".join(
        f"{side}: {' '.join(filter(None, (source_name(source), '(LoRA adapter)' if _lora(source) else '')))}"
        for side, source in manifest.get("sources", {}).items()
    )


def wanting(rows: Iterable[Row]) -> str:
    """Why there is too little data on these rows, each reason once; empty where there is enough."""
    return ", ".join(dict.fromkeys(filter(None, map(lacking, rows))))


def counted_out(words: Iterable[tuple[str | None, str | None]]) -> str:
    """What is not drawn, from (verdict's word, what it lacks) of each: "3 broken, 1 with too little data
    (Yes/No not asked)"; empty for none."""
    known = list(words)
    counts = Counter(w if w in (BROKEN, TOO_LITTLE, "failed") else None for w, _ in known)
    reasons = ", ".join(dict.fromkeys(why for _, why in known if why))
    said = {
        TOO_LITTLE: f"with too little data{f' ({reasons})' if reasons else ''}",
        BROKEN: BROKEN,
        "failed": "failed",
        None: f"that {'was' if counts[None] == 1 else 'were'} not asked for it",
    }
    return ", ".join(f"{counts[w]} {text}" for w, text in said.items() if counts[w])


def left_out(rows: Iterable[Row], has: Callable[[Row], object], said: str = "Left out") -> str:
    """A caption's sentence on the experiments that have no place in a figure, how many and why; empty where
    all have one. The unmodified model is none of them."""
    out = counted_out(
        (w, lacking(row))
        for row in rows
        if (w := word(row)) == "failed" or (w is not None and not has(row))  # what failed is in no figure
    )
    return f" {said}: {out}." if out else ""


def not_asked(rows: Iterable[Row], has: Callable[[Row], object]) -> str:
    """A caption's sentence on how many of these experiments were not asked for what it shows; empty for
    none."""
    n = sum(word(row) not in (None, "failed") and not has(row) for row in rows)
    return f" Not asked: {n}." if n else ""


class Severity(IntEnum):
    """How much a remark matters. What is SERIOUS or worse is said even of an experiment that is folded away:
    a control, or one of a sweep."""

    NOTE = 0
    SERIOUS = 1
    UNTRUSTWORTHY = 2  # nothing measured after it can be trusted


@dataclass(frozen=True)
class Remark:
    """What a reader of the table must know about one experiment."""

    text: str
    severity: Severity = Severity.NOTE


def remarks(row: Row) -> list[Remark]:
    """What a reader of the table must know about one experiment, most serious first."""
    score, out = row.detection, []
    if not row.exact:
        out.append(
            Remark(
                "THE WEIGHTS DID NOT COME BACK EXACTLY; results after it cannot be trusted",
                Severity.UNTRUSTWORTHY,
            )
        )
    if row.error:
        out.append(Remark(f"failed: {row.error.type}: {row.error.message}", Severity.SERIOUS))
    if row.matched and not row.matched.ok:
        reached, target = row.matched.reached_perplexity, row.matched.target_perplexity
        missed = f"its noise reached perplexity {number(reached)}, not {number(target)}"
        if (share := row.matched.share) is not None and not as_damaged(share):
            missed += f": {share:.0%} of the rise in nats per token"
        out.append(Remark(missed, Severity.SERIOUS))
    out += map(Remark, row.notes)
    if row.same_as:
        out.append(Remark(f"the same recipe as {row.same_as} at this depth"))
    if row.verdict and word(row) not in ("failed", NO_CHANGE):
        out.append(Remark(f"{row.verdict.word}: {row.verdict.reason}"))
    if score and score.call in (REPORTS, DENIES) and not lacking(row):
        out.append(Remark(f"by the score alone it {score.call}: {qualifier(score)}"))
    return out + [Remark(flag) for flag in (score.flags if score else ())]


def serious(row: Row) -> list[Remark]:
    """What must be told even of an experiment that is folded away: a control, or one of a sweep."""
    return [remark for remark in remarks(row) if remark.severity >= Severity.SERIOUS]


def _changed(comparison: Comparison) -> list[Row]:
    """What was changed and measured: no controls, no experiment that failed or changed nothing."""
    return [
        row
        for row in comparison.experiments
        if not row.control and word(row) not in (None, "failed", NO_CHANGE)
    ]


def _models(rows: Sequence[Row]) -> str:
    """ "65 changed models (64 distinct)": how many, and of how many recipes where some are alike."""
    distinct = len({first_of(row) for row in rows})
    return many(len(rows), "changed model") + (f" ({distinct} distinct)" if distinct < len(rows) else "")


def seen_by_reports(comparison: Comparison) -> str:
    """Whether the run's own reports show that its questions can see a change, in words; empty if not.

    They do where several models report theirs after Holm's correction and no placebo does.
    """
    reporting = len(tally(_changed(comparison)).get(REPORTS, []))
    placebos = controls(comparison.experiments, "placebo")
    if reporting < 2 or not placebos or any(word(row) == REPORTS for row in placebos):
        return ""
    silent = "the one placebo does not" if len(placebos) == 1 else f"none of {len(placebos)} placebos does"
    return f"{silent}, so these questions can see a change"


def injection_words(comparison: Comparison) -> str:
    """What came of the positive control, and where it is not seen, what that says of the run."""
    injection = comparison.injection
    assert injection is not None, "only a run with a positive control has something to say of it"
    if injection.seen:
        return injection.reason
    if seen_by_reports(comparison):
        return f"{injection.reason}; that these questions can see a change is shown by the run's own reports"
    return f"{injection.reason}; with these questions, a null of this run shows nothing"


def headline(comparison: Comparison) -> str:
    """The run's answer in one sentence, with what a positive control makes of it.

    A model of which there is too little data is counted apart: it is not one that does not report. Nor does
    one whose answers could not have counted, the controls being weak. A denial is no silence. An experiment
    that changes nothing is no changed model.
    """
    changed, injection = _changed(comparison), comparison.injection
    if not changed:
        same = any(not row.control and word(row) == NO_CHANGE for row in comparison.experiments)
        return f"No experiment of this run {'changes the model' if same else 'has a verdict'}."
    said_by = tally(changed)
    reporting, denying, broken = (len(said_by.get(w, [])) for w in (REPORTS, DENIES, BROKEN))
    unknown, of = said_by.get(TOO_LITTLE, []), [row for row in changed if word(row) != TOO_LITTLE]
    judged, models = len(of), _models(of)
    quiet = judged - reporting - denying - broken  # whose silence may show something
    # 1) how many report and how many deny
    said = f"{reporting} of {models} report their change"
    if reporting < 2:
        said = f"{reporting or 'None'} of {models} reports its change"
    if judged == 1:
        does = "reports" if reporting else "denies" if denying else "does not report"
        said = f"The one changed model {does} its change"
    if judged == broken:
        said = f"All {models} are broken: they no longer answer what they are asked"
    if judged == broken == 1:
        said = "The one changed model is broken: it no longer answers what it is asked"
    if not judged:
        said = f"There is too little data on {_models(unknown)} to say whether any reports its change"
    # 2) whether these questions can see anything, which a seen positive control says by itself
    shown = "" if injection is not None and injection.seen else seen_by_reports(comparison)
    if shown:
        said = f"{said}, and {shown}"
    if denying and judged > 1:
        said += f"{';' if shown else ', and'} {denying} {'deny' if denying > 1 else 'denies'} it"
    if unknown and judged:
        said += f"; of {len(unknown)} more there is too little data"
    working = [row for row in changed if word(row) != BROKEN]
    if any(map(_is_weak, working)) and all(_is_weak(row) or lacking(row) for row in working):
        said, quiet, judged = _not_judged(changed, broken), 0, len(changed)
    if injection is not None and injection.seen:
        return f"{said}. The positive control was seen."
    if shown:
        quiet = 0
    called = reporting + denying
    if injection is None:
        others = "what the silence of the others shows"
        unknown_then = others if called else "that these questions could see one"
        known = not quiet and judged
        return (
            f"{said}. No positive control was run{'' if known else f', so it is not known {unknown_then}'}."
        )
    if shown:
        return f"{said}. The positive control, a concept put into the model, was not seen."
    silence = ", so the silence of the others" if called else " either, so silence"
    return f"{said}. The positive control was not seen{f'{silence} shows nothing' if quiet else ''}."


def _is_weak(row: Row) -> bool:
    """Whether no answer of this model could have counted, because the unmodified one does not tell what the
    controls ask."""
    score = row.detection
    return score is not None and score.call not in UNCALLED and not tells(score.controls_before)


def _not_judged(changed: Sequence[Row], broken: int) -> str:
    """That no report of these models could have counted, and how many of them are broken."""
    which = "the one changed model" if len(changed) == 1 else f"any of {_models(changed)}"
    said = (
        f"Whether {which} reports its change cannot be judged: the unmodified model hardly tells what it is"
        f" asked ({WEAK})"
    )
    return f"{said}; {broken} of them {'is' if broken == 1 else 'are'} broken" if broken else said


def _scores(rows: Sequence[Row]) -> str:
    reach = span(rows)
    if reach and reach[0] == reach[1]:
        return f"score {reach[0]:+.2f}; "
    return f"scores {reach[0]:+.2f} to {reach[1]:+.2f}; " if reach else ""


def auroc_words(area: Area, by: str) -> str:
    """An area under the ROC curve, and what it means below 0.5, where the placebos score higher."""
    said = f"{number(area.value)} ({number(area.low)} to {number(area.high)}) by {by}"
    if area.value is None or area.value >= 0.5:
        return said
    sure = "" if area.high is not None and area.high < 0.5 else ", within chance"
    where = "away from noticing" if by == "detection score" else "towards No"
    return f"{said}, under 0.5: modified models lie on the other side of the placebos, {where}{sure}"


def control_lines(comparison: Comparison) -> list[tuple[str, str]]:
    """The run's controls, summarized: (what, a line about it)."""
    rows, out = comparison.experiments, []
    if placebos := controls(rows, "placebo"):
        out.append(
            (
                "placebos",
                (
                    f"{len(placebos)} with other weights that compute the same function:"
                    f" {_scores(placebos)}{counts(placebos)}"
                ),
            )
        )
    if twins := controls(rows, "matched noise"):
        missed = sum(not (row.matched and row.matched.ok) for row in twins)
        # slight changes of like perplexity have the same noise
        different = len({row.matched.fraction for row in twins if row.matched})
        shared = f", {many(different, 'different noise')}" if different < len(twins) else ""
        out.append(
            (
                "noise of equal perplexity",
                f"{many(len(twins), 'experiment')}{shared}: {_scores(twins)}{counts(twins)}"
                + (f"; {missed} not matched" if missed else ""),
            )
        )
    if injection := comparison.injection:
        seen = "seen" if injection.seen else "NOT SEEN"
        out.append(("positive control", f"concept injection {seen}: {injection_words(comparison)}"))
    if auroc := comparison.auroc:
        said = [
            auroc_words(area, by)
            for area, by in ((auroc.detection, "detection score"), (auroc.p_yes, "P(Yes)"))
            if area and area.value is not None
        ]
        if said:
            what = f"{auroc.n_modified} modified against {auroc.n_placebo} placebos"
            out.append(("AUROC", f"{what}: {'; '.join(said)}; 0.5 is chance"))
    return out


def sweep_lines(comparison: Comparison) -> list[tuple[str, str]]:
    """The run's sweeps, summarized: (what, a line about it)."""
    return [
        (name, f"{many(len(of), 'experiment')}: {_scores(of)}{counts(of)}")
        for name, of in sweeps(comparison.experiments).items()
    ]


def weak_controls(comparison: Comparison) -> str | None:
    """A warning where the unmodified model itself hardly tells what it is asked (verdicts.tells): nothing
    that it says counts as a report then. Where that is so only on the controls which some changed models
    still answer, it names them."""
    known = [(row.name, row.detection.controls_before) for row in comparison.experiments if row.detection]
    most, where = max((controls for _, controls in known), key=lambda c: c.n, default=None), ""
    if most is None or not most.n:
        return None
    if tells(most):
        rows = [row for row in comparison.experiments if _is_weak(row) and word(row) != BROKEN]
        few = [(row.name, row.detection.controls_before) for row in rows if row.detection]
        few = [(name, controls) for name, controls in few if controls.n]
        if not few:
            return None
        names = ", ".join(name for name, _ in few[:3]) + (f" and {len(few) - 3} more" if few[3:] else "")
        most, where = (
            min((c for _, c in few), key=lambda c: c.auc or 0.0),
            f" on the questions that {names} still answer",
        )
    how_well = answering(most)
    return (
        f"the unmodified model hardly tells what it is asked{where}. {how_well[0].upper()}{how_well[1:]}. A"
        " pair is one question asked so that Yes and so that No is right; over all questions, any two with"
        " opposite answers are compared, whatever they are about. The model's Yes and No carry little"
        " knowledge, so answers about itself can carry little either, and none counts as a report or a"
        " denial."
    )


def terminal_table(comparison: Comparison) -> str:
    """The table printed at the end of a run: the experiments, and a line for each kind of control and each
    sweep."""
    columns = EXPERIMENT_COLUMNS
    table = [titles(columns), *map(cells, named(comparison.experiments))]
    widths = [max(len(line[k]) for line in table) for k in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if column.align == "left" else cell.rjust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in table
    ]
    about = [f"{what}: {said}" for what, said in control_lines(comparison) + sweep_lines(comparison)]
    about += [f"weak controls: {warning}"] if (warning := weak_controls(comparison)) else []
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", *about, headline(comparison)])


def markdown_cell(text: str) -> str:
    """Text that stays within one table cell or list item and is not taken for markup. What breaks or reorders
    lines becomes a space; what is not seen at all (zero-width characters, tags) is left out."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+", " ", text)
    text = HIDDEN.sub("", text)
    # an underscore within a word is plain
    return re.sub(r"[\\|`*<>\[\]&~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def markdown_table(
    columns: Sequence[str], rows: Iterable[list[str]], right: Iterable[bool] = ()
) -> list[str]:
    """`right`: by column, whether it is set flush right."""
    rules = ["---:" if flush else "---" for flush, _ in zip_longest(right, columns)]
    return [
        f"| {' | '.join(columns)} |",
        f"| {' | '.join(rules)} |",
        *(f"| {' | '.join(map(markdown_cell, row))} |" for row in rows),
    ]


def markdown_of(columns: Sequence[Column[Row]], rows: Iterable[Row]) -> list[str]:
    """These rows under these columns."""
    lines = (cells(row, columns) for row in rows)
    return markdown_table(titles(columns), lines, (column.align == "right" for column in columns))


def summary(comparison: Comparison, manifest: dict) -> str:
    """summary.md: what was run, the answer, the table, and what to make of it; then the controls' and sweeps'
    own tables."""
    named_sides = sides(manifest)
    what = (
        f"Model: {model_name(manifest)}{f' ({named_sides})' if named_sides else ''};"
        f" {manifest['layers']} layers; {manifest['dtype']} on {', '.join(manifest['devices'])};"
        f" seed {manifest['protocol']['seed']}; made {manifest['created']}."
    )
    # 1) what was run, the answer and the table
    rows = comparison.experiments
    lines = [f"# {markdown_cell(comparison.run)}", "", markdown_cell(what), ""]
    lines += [f"Note: {markdown_cell(note)}.\n" for note in manifest["notes"]]
    lines += [
        f"**{headline(comparison)}**",
        "",
        *markdown_of(EXPERIMENT_COLUMNS, named(rows)),
        "",
        LEGEND,
        "",
    ]
    # 2) what to make of it
    lines += [
        f"- {markdown_cell(what)}: {markdown_cell(said)}"
        for what, said in control_lines(comparison) + sweep_lines(comparison)
    ] + [""]
    triggered = [row for row in rows if row.trigger]
    if triggered:
        lines += [*markdown_of(TRIGGER_COLUMNS, triggered), "", TRIGGER_LEGEND, ""]
    if warning := weak_controls(comparison):
        lines += [f"Weak controls: {warning}", ""]
    lines += [
        (
            f"After {sum(row.exact for row in rows)} of {many(len(rows), 'experiment')} the original weights"
            " were restored to the bit, by fingerprint."
        ),
        "",
    ]
    shown = {row.name for row in named(rows)}
    lines += [
        f"- {markdown_cell(f'{row.name}: {remark.text}')}"
        for row in rows
        for remark in (remarks(row) if row.name in shown else serious(row))
    ]
    if comparison.missing:
        lines += ["", f"Not run yet: {markdown_cell(', '.join(comparison.missing))}."]
    lines += published_lines(comparison, manifest)
    # 3) controls and sweeps
    for title, of in folded(rows):
        lines += [
            "",
            f"## {markdown_cell(title)}",
            "",
            *markdown_of(EXPERIMENT_COLUMNS, of),
        ]
    return "\n".join(lines) + "\n"


def other_pair(manifest: dict) -> str:
    """What keeps this run's numbers from the published ones; empty where they are of the same pair."""
    if manifest["pair"] == published.PAIR:
        return ""
    return (
        f"This run used another pair ({model_name(manifest)}, {manifest['layers']} layers), so the levels"
        " cannot be compared."
    )


def published_lines(comparison: Comparison, manifest: dict) -> list[str]:
    """P(Yes) beside the published study's, for summary.md; nothing where it has none of these experiments."""
    rows = [
        [row.name, percent(row.published_probe.p_yes_normalized), percent(theirs[0])]
        for row in comparison.experiments
        if row.published_probe and (theirs := published.of(row, manifest["layers"]))
    ]
    if not rows:
        return []
    about = f"Published: {published.SOURCE}. {other_pair(manifest)}".strip()
    return [
        "",
        "## Beside the published numbers",
        "",
        *markdown_table(["experiment", "P(Yes) here", "published"], rows, (False, True, True)),
        "",
        markdown_cell(about),
    ]


def folded(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The experiments that stand apart from the main table: (title, rows)."""
    parts = [
        ("Placebos", controls(rows, "placebo")),
        ("Noise of equal perplexity", controls(rows, "matched noise")),
        ("Positive control", controls(rows, "injection")),
    ]
    return [
        (title, of)
        for title, of in parts + [(name[0].upper() + name[1:], of) for name, of in sweeps(rows).items()]
        if of
    ]
