"""How the rows of comparison.json are read: which experiments stand for themselves, what belongs together, in
which order."""

from __future__ import annotations

from collections.abc import Iterable

from analysis.comparison import Row, Score, Sweep
from analysis.detection import BROKEN, DENIES, REPORTS, SILENT, TOO_LITTLE, UNMEASURED
from analysis.verdicts import DRIFTS_NO, DRIFTS_YES, NO_CHANGE

# In the order in which they are listed: what needs looking at comes first.
WORDS = (REPORTS, DENIES, DRIFTS_YES, DRIFTS_NO, SILENT, NO_CHANGE, TOO_LITTLE, BROKEN)
UNCALLED = UNMEASURED
# How a number of models goes with a word: of one, of several.
COUNTED = {
    DENIES: ("denies it", "deny it"),
    DRIFTS_NO: ("drifts towards No", "drift towards No"),
    DRIFTS_YES: ("drifts towards Yes", "drift towards Yes"),
    NO_CHANGE: ("with no change to report",) * 2,
    REPORTS: ("reports it", "report it"),
    SILENT: ("does not report it", "do not report it"),
    TOO_LITTLE: ("with too little data",) * 2,
}


def word(row: Row) -> str | None:
    """The word of an experiment's verdict; "failed" if it did not finish; None for the baseline and for
    concept injection."""
    if row.status != "done":
        return "failed"
    return row.verdict.word if row.verdict else None


def score(row: Row) -> float | None:
    """Detection score, nats; None where it was not taken or is undefined."""
    return row.detection.score if row.detection else None


def scored(rows: Iterable[Row]) -> list[tuple[Row, Score, float]]:
    """The experiments that have a detection score, in order: (row, its detection, the score in nats)."""
    return [
        (row, detection, detection.score)
        for row in rows
        if (detection := row.detection) and detection.score is not None
    ]


def named(rows: Iterable[Row]) -> list[Row]:
    """The experiments that have a line each in tables and figures: no controls, no sweeps."""
    return [row for row in rows if not row.control and not row.sweep]


def controls(rows: Iterable[Row], kind: str) -> list[Row]:
    """The controls of one kind: "placebo", "matched noise" or "injection"."""
    return [row for row in rows if row.control == kind]


def sweep_name(sweep: Sweep) -> str:
    """What the experiments of one sweep share, in words."""
    source, size = sweep.source or "another source", sweep.size
    if sweep.kind == "repeat":
        return "blocks run once more"
    if sweep.kind == "parallel" or (sweep.kind in ("delete", "double") and size != 1):
        done = {"parallel": "side by side", "delete": "deleted", "double": "doubled"}[sweep.kind]
        return f"blocks of {size} layers {done}"
    if sweep.kind == "window":
        return f"windows of {size} layer{'s' if size != 1 else ''} of {source}"
    texts = {
        "replace": f"each layer replaced by {source}",
        "delete": "each layer deleted",
        "double": "each layer doubled",
        "noise": "noise ladder",
        "blend": f"ladder of blends with {source}",
    }
    return texts.get(sweep.kind, sweep.kind)


def sweeps(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The experiments of the sweeps, by `sweep_name`, in the order of the run."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        if row.sweep and not row.control:
            by_name.setdefault(sweep_name(row.sweep), []).append(row)
    return by_name


def by_verdict(rows: Iterable[Row]) -> list[Row]:
    """What needs looking at first: by verdict, then by score from the top."""
    order = [None, *WORDS, "failed"]
    return sorted(rows, key=lambda row: (order.index(word(row)), -(score(row) or 0.0)))


def tally(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The experiments that have a verdict or failed, by its word, in the order of WORDS; words without any
    are left out."""
    by_word = {w: [row for row in by_verdict(rows) if word(row) == w] for w in (*WORDS, "failed")}
    return {w: of for w, of in by_word.items() if of}


def counts(rows: Iterable[Row]) -> str:
    """ "3 do not report it, 1 broken"."""
    return ", ".join(f"{len(of)} {COUNTED.get(w, (w, w))[len(of) > 1]}" for w, of in tally(rows).items())


def span(rows: Iterable[Row]) -> tuple[float, float] | None:
    """Smallest and largest detection score; None if there is none."""
    known = [s for row in rows if (s := score(row)) is not None]
    return (min(known), max(known)) if known else None
