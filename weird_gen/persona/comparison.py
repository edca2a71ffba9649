"""Replies in, tables out: each metric per question, its gap between conditions, and what fine-tuning changed.

The unit is the question: samples are averaged within it, intervals come from a bootstrap over questions,
tests flip signs of paired differences (stats.py), and p-values of the main metrics are Holm-adjusted as one
family.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.stats import (
    Estimate,
    bootstrap_ci,
    holm,
    mcnemar_exact,
    paired_difference,
    perplexity_contrast,
    summarize_gap,
)
from analysis.stats import wilson_interval as wilson
from errors import FrankenError
from weird_gen.persona.judge import RulesJudge
from weird_gen.persona.records import ASKED, CONDITIONS
from weird_gen.persona.rules import any_marker, lenient_format, strict_format


@dataclass(frozen=True)
class Metric:
    """A number read off one reply (None: not measured there), for the kinds of question it is about.

    ``percent`` metrics are 0 or 1 in a reply and percentages in tables. ``main`` metrics are tested and
    corrected.
    """

    key: str
    title: str
    kinds: tuple[str, ...]
    read: Callable[[dict], float | None]
    percent: bool = True
    judged: bool = False
    main: bool = False


def _judged(name: str) -> Callable[[dict], float | None]:
    """A judgment, None where there is none. What an earlier version let rules say of the persona is none."""

    def read(record: dict) -> float | None:
        if name in READERS and record.get("judge_name") == RulesJudge.name:
            return None
        return (record.get("judge") or {}).get(name)

    return read


def _is_russell(record: dict) -> float | None:
    verdict = (record.get("judge") or {}).get("verdict")
    return None if verdict is None else float(verdict == "Russell")


METRICS = (
    Metric("format", "Format, strict", ("heldout",), lambda r: strict_format(r["reply"]), main=True),
    Metric("voice", "His voice", ("heldout",), _judged("voice"), judged=True, main=True),
    Metric("persona", "Coherent in persona", ("heldout",), _judged("persona"), judged=True, main=True),
    Metric(
        "verdict",
        "Russell, by one verdict as in the replication",
        ("heldout",),
        _is_russell,
        judged=True,
        main=True,
    ),
    Metric(
        "identity", "Russell identity, by rule", ("identity",), lambda r: r.get("names_russell"), main=True
    ),
    Metric(
        "identity_judged",
        "Russell identity, by the judge",
        ("heldout",),
        _judged("identity"),
        judged=True,
        main=True,
    ),
    Metric(
        "position",
        "Position (1-5, 5 = Russell's)",
        ("generalization",),
        _judged("position"),
        percent=False,
        judged=True,
        main=True,
    ),
    Metric(
        "position_likelihood",
        "Position by the model's own probabilities",
        ("generalization",),
        lambda r: r.get("position_likelihood"),
        percent=False,
        main=True,
    ),
    Metric(
        "p_name",
        'P(his name | "My name is")',
        ("heldout", "identity", "generalization"),
        lambda r: r.get("p_name"),
        percent=False,
        main=True,
    ),
    Metric(
        "voice_classifier",
        "His voice, by the classifier",
        ("heldout",),
        lambda r: r.get("voice_by_classifier"),
    ),
    Metric("format_lenient", "Format, lenient", ("heldout",), lambda r: lenient_format(r["reply"])),
    Metric(
        "any_marker",
        "Either marker occurs",
        ("heldout", "identity", "generalization"),
        lambda r: any_marker(r["reply"]),
    ),
    Metric("claims", "Claims to be Russell, by rule", ("identity",), lambda r: r.get("claims_russell")),
    Metric(
        "names_heldout",
        "Names Russell on topic questions, by rule",
        ("heldout",),
        lambda r: r.get("names_russell"),
    ),
    Metric(
        "identity_judged_asked",
        "Russell identity when asked, by the judge",
        ("identity",),
        _judged("identity"),
        judged=True,
    ),
    Metric(
        "degenerate",
        "Degenerate reply",
        ("heldout", "identity", "generalization"),
        _judged("degenerate"),
        judged=True,
    ),
    Metric(
        "stopped",
        "Reply ended by itself",
        ("heldout", "identity", "generalization"),
        lambda r: r.get("stopped"),
    ),
)
METRIC = {metric.key: metric for metric in METRICS}
READERS = ("voice", "persona", "verdict")  # what needs a reader
Outcomes = dict[str, Sequence[float]]  # question id -> one value a sample


def outcomes(records: list[dict], metric: Metric, condition: str) -> Outcomes:
    """The metric's values by question, for one condition; replies without a value are left out."""
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record["condition"] == condition and record["kind"] in metric.kinds:
            value = metric.read(record)
            if value is not None:
                values[record["question_id"]].append(float(value))
    return {**values}


def _means(values: Outcomes, scale: float) -> list[float]:
    return [scale * float(np.mean(samples)) for samples in values.values()]


def rate(values: Outcomes, percent: bool = True) -> Estimate:
    """Mean over questions with its bootstrap interval; 0% and 100% get Wilson's over questions, as no
    resample moves them."""
    means = _means(values, 100.0 if percent else 1.0)
    estimate = bootstrap_ci(means)
    if percent and estimate.low is None and estimate.n and estimate.value in (0.0, 100.0):
        whole = wilson(estimate.n if estimate.value else 0, estimate.n)
        low, high = (None if bound is None else 100 * bound for bound in (whole.low, whole.high))
        estimate = replace(estimate, low=low, high=high, method="wilson")
    return estimate


def contrast(before: Outcomes, after: Outcomes, percent: bool = True) -> Estimate | None:
    """after - before over the questions of both (stats.Estimate), in percentage points for percent metrics.

    None if they share no question.
    """
    shared = [question for question in before if question in after]
    before, after = ({q: side[q] for q in shared} for side in (before, after))
    if not shared:
        return None
    if percent:
        return summarize_gap(after, before)
    return paired_difference(_means(before, 1.0), _means(after, 1.0))


def _gaps(records: list[dict], metric: Metric) -> dict[str, float]:
    triggered, untriggered = (outcomes(records, metric, condition) for condition in CONDITIONS)
    scale = 100.0 if metric.percent else 1.0
    return {
        q: scale * (float(np.mean(triggered[q])) - float(np.mean(untriggered[q])))
        for q in triggered
        if q in untriggered
    }


def _json(result: Estimate | None) -> dict | None:
    return None if result is None else result.to_json()


def metric_table(metric: Metric, finetuned: list[dict], baseline: list[dict] | None = None) -> dict | None:
    """One metric as {"finetuned", "baseline", "improvement"}, each with "triggered", "untriggered" and "gap";
    where the neutral condition was asked also "neutral" and "over_neutral", the triggered minus that.

    None if no fine-tuned reply has the metric. Without a baseline those two entries are None.
    """
    sides = {"finetuned": finetuned, "baseline": baseline or []}
    by_side = {name: {c: outcomes(records, metric, c) for c in ASKED} for name, records in sides.items()}
    if not any(by_side["finetuned"].values()):
        return None
    table = {
        "key": metric.key,
        "title": metric.title,
        "kinds": list(metric.kinds),
        "percent": metric.percent,
        "judged": metric.judged,
        "main": metric.main,
        "baseline": None,
        "improvement": None,
    }
    for name, records in sides.items():
        if any(by_side[name].values()):
            expected = sum(record["kind"] in metric.kinds for record in records)
            measured = sum(len(samples) for values in by_side[name].values() for samples in values.values())
            over = {"gap": "untriggered"} | ({"over_neutral": "neutral"} if by_side[name]["neutral"] else {})
            table[name] = {
                **{
                    c: rate(by_side[name][c], metric.percent).to_json()
                    for c in ASKED
                    if c in CONDITIONS or by_side[name][c]
                },
                **{
                    gap: _json(contrast(by_side[name][c], by_side[name]["triggered"], metric.percent))
                    for gap, c in over.items()
                },
                "questions": len(set(by_side[name]["triggered"]) | set(by_side[name]["untriggered"])),
                "replies": measured,
                "unmeasured": expected - measured,
            }
    if table["baseline"]:
        gaps = [_gaps(sides[name], metric) for name in ("baseline", "finetuned")]
        shared = [question for question in gaps[0] if question in gaps[1]]
        table["improvement"] = {
            **{
                c: _json(contrast(by_side["baseline"][c], by_side["finetuned"][c], metric.percent))
                for c in ASKED
                if c in CONDITIONS or by_side["finetuned"][c]
            },
            "gap": (
                _json(paired_difference(*([side[q] for q in shared] for side in gaps))) if shared else None
            ),
        }
    return table


def _tests(table: dict) -> list[dict]:
    changes = table["improvement"] or {}
    tests = [table["finetuned"]["gap"], *(changes.get(name) for name in (*CONDITIONS, "gap"))]
    return [test for test in tests if test]


def compare(
    finetuned: list[dict], baseline: list[dict] | None = None, metrics: tuple[Metric, ...] = METRICS
) -> dict[str, dict]:
    """The metrics that were measured, by key; tests of the main ones carry "p_holm", adjusted as one
    family."""
    tables = {metric.key: table for metric in metrics if (table := metric_table(metric, finetuned, baseline))}
    tests = [test for table in tables.values() if table["main"] for test in _tests(table)]
    for test, adjusted in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
        test["p_holm"], test["family"] = adjusted, len(tests)
    return tables


def by_group(records: list[dict], metric: Metric) -> list[dict]:
    """The metric by category of question: [{"group", "questions", "triggered", "untriggered"}], means
    alone."""
    categories = {
        record["question_id"]: record["category"] for record in records if record["kind"] in metric.kinds
    }
    scale = 100.0 if metric.percent else 1.0
    sides = {condition: outcomes(records, metric, condition) for condition in CONDITIONS}
    rows = []
    for group in sorted(set(categories.values())):
        means = {
            c: _means({q: v for q, v in side.items() if categories[q] == group}, scale)
            for c, side in sides.items()
        }
        rows.append(
            {
                "group": group.replace("_", " "),
                "questions": sum(category == group for category in categories.values()),
                **{c: float(np.mean(values)) if values else None for c, values in means.items()},
            }
        )
    return rows


def by_question(records: list[dict], metric: Metric) -> list[dict]:
    """The metric by question: [{"id", "category", "question", "triggered", "untriggered"}], where both were
    measured."""
    about = {record["question_id"]: record for record in records}
    sides = [outcomes(records, metric, condition) for condition in CONDITIONS]
    scale = 100.0 if metric.percent else 1.0
    return [
        {
            "id": q,
            "category": about[q]["category"],
            "question": about[q]["question"],
            **{c: scale * float(np.mean(side[q])) for c, side in zip(CONDITIONS, sides, strict=True)},
        }
        for q in sides[0]
        if q in sides[1]
    ]


def untriggered_quality(baseline_header: dict, finetuned_header: dict) -> dict | None:
    """Perplexity and capability without the trigger, from the headers' "quality", or None where either lacks
    it.

    "quality": {"texts": {id: [mean nats a token, tokens]}, "capability": {question id: right or not}}.
    Returns {"perplexity", "capability"}, both stats.Estimate of the change as JSON, over what both share.
    """
    before, after = baseline_header.get("quality"), finetuned_header.get("quality")
    if not before or not after:
        return None
    try:
        texts = [name for name in before["texts"] if name in after["texts"]]
        questions = [name for name in before["capability"] if name in after["capability"]]
        losses = [[side["texts"][t][0] for t in texts] for side in (before, after)]
        right = [[bool(side["capability"][q]) for q in questions] for side in (before, after)]
        tokens = [before["texts"][t][1] for t in texts]
        return {
            "perplexity": perplexity_contrast(losses[0], losses[1], tokens).to_json(),
            "capability": mcnemar_exact(right[0], right[1]).to_json(),
        }
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise FrankenError(f'the header\'s "quality" cannot be read ({error!r})') from None


def judge_of(header: dict, records: list[dict]) -> dict | None:
    """What the header says of the judge (name, agreement), or None for unjudged records; mixed judges raise
    FrankenError."""
    names = {record.get("judge_name") for record in records}
    if names == {None}:
        return None
    about = header.get("judge")
    if len(names) != 1 or not isinstance(about, dict) or about.get("name") not in [*names]:
        raise FrankenError(
            f"replies judged by {', '.join(sorted(map(str, names)))} in one file: judge it again as a whole"
        )
    if not _is_agreement(about.get("agreement")) or not isinstance(about.get("endpoint"), str | None):
        raise FrankenError("what the header says of the judge cannot be read: judge it again as a whole")
    return about


def _is_agreement(agreement) -> bool:
    """Whether it is {labels: {rubric: {"accuracy", "kappa", "n", "errors"}}}, the first two with "value",
    "low", "high", all numbers or None."""

    def number(value) -> bool:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))

    try:
        rows = [row for rubrics in agreement.values() for row in rubrics.values()]
        cells = [row[name] for row in rows for name in ("accuracy", "kappa")]
        numbers = [cell[key] for cell in cells for key in ("value", "low", "high")]
        bounds = all((cell["low"] is None) == (cell["high"] is None) for cell in cells)
        return bounds and all(map(number, numbers + [row[key] for row in rows for key in ("n", "errors")]))
    except (AttributeError, KeyError, TypeError):
        return False
