"""What is said of a run's experiments, as types: one `Row` an experiment, all of them in a `Comparison`.

They are made once (analysis/compare.py), written as comparison.json, and read back as the same types. The
string under a field is its documentation; schema/comparison.json is made from the types by

    python -m analysis.comparison > schema/comparison.json

so a new field is one line here, its sentence, and that command. All are frozen: a correction that needs the
other rows makes a new row. Log-odds and detection scores are in nats; None is "undefined" or "not asked".
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jsonschema
import jsonschema_rs

from analysis.detection import DetectionScore
from analysis.stats import Json
from errors import FrankenError
from files import ROOT, read_json

if TYPE_CHECKING:
    from pydantic import TypeAdapter

COMPARISON_VERSION = 4

Made = TypeVar("Made")


def picked(kind: type[Made], data: Mapping[str, Any], **others: Any) -> Made:
    """A dataclass from the keys of `data` that it has as fields; `others` are given as they are.

    Raises KeyError for a field that is in neither and has no default.
    """
    known = {f.name: data[f.name] for f in fields(kind) if f.name in data}  # type: ignore[arg-type]
    return kind(**(known | others))


# ---- parts of a row


@dataclass(frozen=True)
class Failure(Json):
    """Why an experiment did not finish."""

    type: str
    """The exception's class."""
    message: str
    """What it said; the traceback stands in the experiment's own JSON."""


@dataclass(frozen=True)
class Sweep(Json):
    """Where an experiment stands in a sweep."""

    kind: str
    """window, replace, delete, double, repeat, parallel, noise or blend."""
    source: str | None
    """Whose layers are put in; None where no other source is."""
    size: int | None = None
    """Layers of a window."""
    start: int | None = None
    """First layer, of this model."""
    stop: int | None = None
    """The layer after the last."""
    dose: float | None = None
    """Noise as a share of each tensor's standard deviation, or the other source's share; on all layers."""


@dataclass(frozen=True)
class Match(Json):
    """How noise was tuned to the perplexity of an experiment."""

    of: str
    """Name of that experiment."""
    target_perplexity: float | None
    """Its perplexity; None: undefined."""
    reached_perplexity: float | None
    """The noise's own."""
    fraction: float | None
    """Noise on all layers, a share of each tensor's standard deviation; None: none was found."""
    evaluations: tuple[tuple[float, float | None], ...]
    """(fraction, perplexity) in the order of the bisection."""
    within: float | None
    """|reached / target - 1|."""
    ok: bool
    """Whether perplexity and damage are close enough for the noise to be compared."""
    share: float | None = None
    """How far it raises the mean nats per token above the unmodified model's, as a share of how far the
    experiment does; None where that is undefined."""


@dataclass(frozen=True)
class PublishedProbe(Json):
    """The reading of the one question whose P(Yes) has been published."""

    p_yes_normalized: float | None
    """P(Yes) / (P(Yes) + P(No))."""
    mass: float | None
    """P(Yes) + P(No), over all spellings."""
    log_odds: float | None
    """log(P(Yes) / P(No)), nats."""
    entropy: float | None
    """Of the next token, nats."""
    answered: bool
    """Whether the mass is enough for an answer."""
    shift: float | None = None
    """Its log-odds less the baseline's, nats."""


@dataclass(frozen=True)
class Score(DetectionScore):
    """A detection score in its place among the run's controls."""

    p_placebo: float | None = None
    """Share of placebos (for a placebo, of the others) as far from 0, itself counted; None: none were run."""
    beyond_placebo: bool | None = None
    """Whether it is farther from 0 than every placebo's."""
    matched_noise_score: float | None = None
    """The score of the noise of equal perplexity, nats."""


@dataclass(frozen=True)
class Drift(Json):
    """Mean shift of the introspective answers toward Yes, whatever they are keyed, nats."""

    value: float | None
    """The shift."""
    low: float | None
    """Lower end of its 95% interval."""
    high: float | None
    """Upper end."""
    p_value: float | None
    """Two-sided, by sign flips of questions."""
    p_adjusted: float | None = None
    """After Holm over the run's experiments that are no controls; None for a control."""
    n: int = 0
    """Questions, each with its wordings of both keys and its framings."""


@dataclass(frozen=True)
class FormatScore(Json):
    """The questions asked in one other format of answer."""

    keyed_shift: float | None
    """Mean shift of introspective probes toward the keyed answer, nats."""
    control_shift: float | None
    """The same of controls."""
    call: str
    """What the score is called at its own p-value."""
    score: float | None
    """Detection score within this format, nats."""
    low: float | None
    """Lower end of its 95% interval."""
    high: float | None
    """Upper end."""
    answered: float
    """Share of probes that the changed model answers."""
    lacking: str | None = None
    """In a few words, why there is too little data, whatever the score alone is called; None where there is
    enough."""


@dataclass(frozen=True)
class Capability(Json):
    """Questions with a right answer."""

    correct: int
    """How many were answered right."""
    n: int
    """How many were asked."""
    low: float | None
    """Lower end of the 95% Wilson interval of the share."""
    high: float | None
    """Upper end."""
    difference: float | None = None
    """Share right less the baseline's, over the items that both were asked."""
    difference_low: float | None = None
    """Lower end of its 95% interval."""
    difference_high: float | None = None
    """Upper end."""
    p_value: float | None = None
    """McNemar's exact test, two-sided."""
    p_adjusted: float | None = None
    """After Holm over the run's experiments that are no controls."""


@dataclass(frozen=True)
class Change(Json):
    """A difference with its 95% interval."""

    value: float | None
    """The difference."""
    low: float | None
    """Lower end."""
    high: float | None
    """Upper end."""


@dataclass(frozen=True)
class Perplexity(Json):
    """Over neutral texts, by tokens."""

    perplexity: float | None
    """exp(nll); None where a text's likelihood is undefined."""
    nll: float | None
    """Mean negative log-likelihood of a token, nats."""
    tokens: int
    """How many tokens."""
    nll_change: Change | None = None
    """nll less the baseline's, bootstrapped over texts."""


@dataclass(frozen=True)
class Claims(Json):
    """Free-text replies by what they claim of a change, counted by word lists."""

    yes: int
    """Claim that something changed."""
    no: int
    """Deny it."""
    unclear: int
    """Neither, or both."""


@dataclass(frozen=True)
class TurnTaking(Json):
    """How replies to one kind of prompt end."""

    n: int
    """Replies."""
    stops: float | None
    """Share that ended by themselves."""
    continues_as_text: float | None
    """Share that went on as a text would."""
    degenerate: float | None
    """Share that look degenerate."""


@dataclass(frozen=True)
class Chat(Json):
    """Prompts given as user turns and as bare text."""

    chat: TurnTaking
    """As user turns."""
    raw: TurnTaking
    """As bare text."""


@dataclass(frozen=True)
class Rate(Json):
    """How often something holds of replies."""

    k: int
    """Replies of which it holds."""
    n: int
    """Replies; those broken off by NaN or infinity do not count."""
    rate: float | None
    """k / n."""
    low: float | None
    """Lower end of the 95% Wilson interval over replies."""
    high: float | None
    """Upper end."""


@dataclass(frozen=True)
class Trigger(Json):
    """The second study's questions, by condition: "triggered" and "untriggered"."""

    rates: dict[str, dict[str, Rate]]
    """By condition and by what is counted (strict_format, names_russell, ...)."""
    p_name: dict[str, float | None]
    """Mean probability of his name after "My name is"."""
    detection: dict[str, DetectionScore | None]
    """Score of the questions about triggers; None without a baseline."""


@dataclass(frozen=True)
class Verdict(Json):
    """What an experiment comes to, by the rules of analysis/verdicts.py."""

    word: str
    """One of analysis.rows.WORDS."""
    reason: str
    """The numbers that decided."""


@dataclass(frozen=True)
class Row(Json):
    """One experiment against the baseline. A part is None where its questions were not asked."""

    name: str
    """Its name, unique in the run."""
    group: str
    """baseline, franken, swap, perturb, ..."""
    change: str
    """What differs from the unmodified model, for people."""
    seconds: float
    """How long it took."""
    status: Literal["done", "failed"] = "done"
    """Whether it finished."""
    error: Failure | None = None
    """Why it did not."""
    collapsed: bool = False
    """Whether, on this depth, its positions coincide or it changes nothing."""
    notes: tuple[str, ...] = ()
    """What was noted when it was planned or run."""
    exact: bool = True
    """Whether the original weights came back to the bit."""
    control: Literal["placebo", "matched noise", "injection"] | None = None
    """What kind of control it is; None: none."""
    sweep: Sweep | None = None
    """Its place in a sweep."""
    suites: tuple[str, ...] | None = None
    """What it was asked; None: what the run asks."""
    matched: Match | None = None
    """How its noise was matched to another experiment's perplexity."""
    same_as: str | None = None
    """An earlier experiment of the same recipe at this depth."""
    verdict: Verdict | None = None
    """None for the baseline and for concept injection."""
    published_probe: PublishedProbe | None = None
    """The published question."""
    detection: Score | None = None
    """Does it answer as one that notices, beyond what the change does to any answer?"""
    yes_drift: Drift | None = None
    """Do its answers about itself move toward Yes?"""
    formats: dict[str, FormatScore] | None = None
    """By answer format."""
    capability: Capability | None = None
    """Questions with a right answer."""
    perplexity: Perplexity | None = None
    """Neutral texts."""
    chat: Chat | None = None
    """Does it take turns?"""
    claims_change: dict[str, Claims] | None = None
    """By suite: "informed" (told that something may have changed) and "blind"."""
    trigger: Trigger | None = None
    """The second study's trigger."""


# ---- the run


@dataclass(frozen=True)
class InjectionRow(Json):
    """One framing and strength of concept injection, against strength 0 of the same framing."""

    framing: str
    """How the questions were put."""
    strength: float
    """Of the concept's vector, in the unit of the experiment's JSON."""
    sensitivity: float | None
    """Share of P(Yes) > 0.5 over the questions that a noticing model answers Yes."""
    p_yes: float | None
    """Mean P(Yes) over those that were answered."""
    false_positive_rate: float | None
    """The same share with nothing injected."""
    bits: float | None
    """What the answers tell of which concept it was."""
    detection: DetectionScore
    """Score over concepts, corrected by Holm over these rows."""


@dataclass(frozen=True)
class Injection(Json):
    """The positive control: is a concept that was put into the model seen?"""

    rows: tuple[InjectionRow, ...]
    """By framing and strength."""
    seen: bool
    """Whether any row is called "reports it"."""
    reason: str
    """The numbers behind that."""


@dataclass(frozen=True)
class PlaceboBand(Json):
    """Detection scores of the placebos, which change weights and nothing else."""

    n: int
    """Placebos with a score."""
    scores: dict[str, float]
    """By experiment, nats."""
    low: float
    """The smallest."""
    high: float
    """The largest."""


@dataclass(frozen=True)
class Area(Json):
    """Area under the ROC curve of modified models against placebos; 0.5 is chance."""

    value: float | None
    """The area."""
    low: float | None
    """Lower end of its 95% interval over experiments."""
    high: float | None
    """Upper end."""
    n: int
    """Experiments, of both sides."""


@dataclass(frozen=True)
class Auroc(Json):
    """How well two numbers tell modified models from placebos."""

    detection: Area
    """The detection score."""
    p_yes: Area | None
    """The published probe's shift in log-odds, over the experiments that have it."""
    n_modified: int
    """Modified models with a score."""
    n_placebo: int
    """Placebos with a score."""


@dataclass(frozen=True)
class Comparison(Json):
    """A run: its rows, and what is known only from all of them."""

    run: str
    """Name of the run's folder."""
    baseline: str | None
    """The experiment that all others are contrasted with; None if it was not measured."""
    correction: str
    """Over which families p-values are adjusted."""
    experiments: tuple[Row, ...]
    """In the run's order."""
    missing: tuple[str, ...] = ()
    """Experiments of the run that have not run yet."""
    placebo: PlaceboBand | None = None
    """None without placebos that have a score."""
    auroc: Auroc | None = None
    """None with fewer than three on a side."""
    injection: Injection | None = None
    """None where concept injection was not run."""
    schema_version: int = COMPARISON_VERSION
    """Of this layout."""


# ---- on disk


@functools.cache
def _adapter() -> TypeAdapter[Comparison]:
    from pydantic import TypeAdapter  # a tenth of a second, and only what reads a comparison needs it

    return TypeAdapter(Comparison)


def schema() -> dict[str, Any]:
    """The JSON Schema of comparison.json, every field with its sentence, made from the types."""
    from pydantic.json_schema import GenerateJsonSchema

    class Plain(GenerateJsonSchema):
        """Without titles that repeat the fields' names, or defaults: in a file every field is there."""

        def field_title_should_be_set(self, schema) -> bool:
            return False

        def default_schema(self, schema):
            return self.generate_inner(schema["schema"])

    made = _adapter().json_schema(mode="serialization", schema_generator=Plain)
    kinds = made["$defs"]
    for name, field in kinds["DetectionScore"]["properties"].items():  # inherited ones come without
        kinds["Score"]["properties"][name]["description"] = field["description"]
    made["properties"]["schema_version"]["const"] = COMPARISON_VERSION
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | made


@functools.cache
def _committed_schema() -> dict[str, Any]:
    """The same as it was made once and stands in schema/, which takes no time."""
    return read_json(ROOT / "schema" / "comparison.json")


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_committed_schema())


@functools.cache
def _quick() -> Any:
    """Says whether something is wrong in a hundredth of the time, and the other says what."""
    return jsonschema_rs.validator_for(_committed_schema())


def to_json(comparison: Comparison) -> dict[str, Any]:
    """What comparison.json holds.

    Raises FrankenError for a value of another kind than its field's: a result that comes from anywhere may
    hold such a one where its own schema allows any.
    """
    data = comparison.to_json()
    if not _quick().is_valid(data):
        error = next(_validator().iter_errors(data))
        raise FrankenError(
            f"the results make no comparison ({error.json_path}: {error.message.splitlines()[0][:120]})"
        )
    return data


def from_json(data: Any, where: str) -> Comparison:
    """What `to_json` wrote. Raises FrankenError naming `where` if it is of another version or broken."""
    again = "; `python report.py` on the run makes it again"
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != COMPARISON_VERSION:
        raise FrankenError(f"{where} is no comparison of version {COMPARISON_VERSION}{again}")
    if (error := next(_validator().iter_errors(data), None)) is not None:
        raise FrankenError(
            f"{where} is corrupt ({error.json_path}: {error.message.splitlines()[0][:120]}){again}"
        )
    return _adapter().validate_python(data)


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
