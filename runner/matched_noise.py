"""Damage-matched noise: Gaussian noise on all layers, just enough to raise perplexity as far as an experiment
did.

A model can say Yes because it notices a change or because it is damaged. Its noise twin is as damaged, by
perplexity on the same texts, and otherwise unlike it: what both report, damage explains. The fraction is
found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from math import inf, log

import evaluate
from analysis.stats import DAMAGE, as_damaged, share_of_damage
from engine.generation import Engine
from errors import FrankenError
from experiments import QUICK, TWIN, Experiment, Plan, with_suites
from surgery.recipes import perturb

MARGIN = 0.01  # below this share above the unmodified model's perplexity there is no damage to match
TOLERANCE = 0.02  # relative deviation of perplexity at which the bisection ends, if the damage agrees too
BISECTION = "bisection of the noise"  # what progress calls it
EVALUATIONS = 12  # at most; each halves the range of the logarithm of the fraction
# noise, as a share of each tensor's own standard deviation: invisible, and nothing left
LOWEST, HIGHEST = (
    0.001,
    4.0,
)


Tried = list[tuple[float, float | None]]  # [(fraction, perplexity), ...] in the order tried


def search(target: float | None, unmodified: float | None) -> Generator[float, float | None, Tried]:
    """A bisection that yields the fractions to measure and is sent their perplexities; returns all it tried.

    It ends where perplexity is the target's within TOLERANCE, and has risen from the unmodified model's as
    far (analysis.stats.as_damaged): two percent of it are more than all that a slight change does.

    On a fixed grid: the fractions depend on the answers alone. The perplexity of a fraction is expected to
    rise, None (undefined) counting as above everything; where it does not, the search still ends, after
    EVALUATIONS at most. A target of None is not searched for: only HIGHEST is tried.
    """
    if target is None:
        return [(HIGHEST, (yield HIGHEST))]
    low, high, tried = 0.0, 1.0, []
    for _ in range(EVALUATIONS):
        middle = (low + high) / 2
        fraction = float(f"{LOWEST * (HIGHEST / LOWEST) ** middle:.6g}")
        reached = yield fraction
        tried.append((fraction, reached))
        if is_match(reached, target, unmodified):
            break
        if reached is None or reached > target:
            high = middle
        else:
            low = middle
    return tried


def bisect(
    target: float | None, unmodified: float | None, perplexity: Callable[[float], float | None]
) -> Tried:
    """`search`, answered by a function."""
    steps = search(target, unmodified)
    fraction = next(steps)
    while True:
        try:
            fraction = steps.send(perplexity(fraction))
        except StopIteration as end:
            return end.value


def wants(experiment: Experiment) -> bool:
    """Whether an experiment may have a noise twin: it is neither a control nor a baseline."""
    return experiment.control is None and experiment.group != "baseline"


def deviation(reached: float | None, target: float | None) -> float:
    """|reached / target - 1|; infinite where either is undefined."""
    return inf if reached is None or target is None else abs(reached / target - 1)


def is_match(reached: float | None, target: float | None, unmodified: float | None) -> bool:
    """Whether noise does what an experiment did, by perplexities: its own, the target, the unmodified
    model's."""
    return deviation(reached, target) <= TOLERANCE and as_damaged(
        share_of_damage(reached, target, unmodified)
    )


def nearest(tried: Sequence[tuple[float, float | None]], target: float | None) -> tuple[float, float | None]:
    """The try whose perplexity is nearest to the target as a ratio; the first one where none is defined."""
    return min(
        tried,
        key=lambda attempt: inf if attempt[1] is None or target is None else abs(log(attempt[1] / target)),
    )


class Twins:
    """Which experiments of a run have a noise twin, and what it is once its noise has been measured.

    Args:
        layers: of the unmodified model.
        protocol: of the run; perplexity is measured on its texts, noise is drawn from its seed.
        suites: what --suites says, or None; the twins are asked the quick protocol then.
        also: what --also says: suites that the twins are asked besides.

    `known` has the perplexity by fraction (0: unmodified), shared by all searches. It only saves time: they
    begin with the same fractions, so that they ask for many of the same points. The answers are the same.
    """

    def __init__(
        self,
        layers: int,
        protocol: evaluate.Protocol,
        suites: tuple[str, ...] | None = None,
        also: tuple[str, ...] = (),
    ):
        self.layers, self.protocol, self.suites, self.also = layers, protocol, suites, also
        self.known: dict[float, float | None] = {}

    def unmodified(self) -> float | None:
        """Perplexity of the unmodified model, which has to be known by now; None: undefined."""
        return self.known[0.0]

    def refusal(self, result: dict) -> str | None:
        """Why an experiment, measured, has no noise twin after all, as a note for people; None where it has
        one."""
        if "perplexity" not in result["measurements"]:
            return "no matched noise: its perplexity was not measured"
        changed, unmodified = result["measurements"]["perplexity"]["perplexity"], self.unmodified()
        if unmodified is None:
            return "no matched noise: the unmodified model's perplexity is undefined"
        if changed is not None and changed <= unmodified * (1 + MARGIN):
            return (
                f"no matched noise: its perplexity, {changed:.2f}, is not above the unmodified model's"
                f" {unmodified:.2f} by more than {MARGIN:.0%}"
            )
        return None

    def twin(self, plan: Plan, target: float | None) -> Plan:
        """The twin of an experiment of perplexity `target`, before its noise is known: it changes nothing
        yet."""
        return self._plan(
            plan.experiment.name,
            None,
            {
                "of": plan.experiment.name,
                "target_perplexity": target,
                "reached_perplexity": None,
                "fraction": None,
                "evaluations": [],
                "within": None,
                "ok": False,
            },
        )

    def found(self, twin: Plan, tried: Tried) -> Plan:
        """The twin with the noise whose perplexity came nearest."""
        matched = twin.matched
        assert matched is not None, "`twin` made this plan, and said there what it is matched to"
        fraction, reached = nearest(tried, matched["target_perplexity"])
        off = deviation(reached, matched["target_perplexity"])
        noise = matched | {
            "reached_perplexity": reached,
            "fraction": fraction,
            "evaluations": [list(one) for one in tried],
            "within": None if off == inf else off,
            "ok": is_match(reached, matched["target_perplexity"], self.unmodified()),
        }
        return self._plan(matched["of"], fraction, noise)

    def _plan(self, of: str, fraction: float | None, matched: dict) -> Plan:
        experiment = Experiment(
            of + TWIN,
            "control",
            lambda m: perturb(m.recipe, fraction, m.seed) if fraction else m.recipe,
            f"Noise on all layers, tuned to the perplexity of {of}: what both report, damage explains",
            changes_nothing=not fraction,
            control="matched noise",
            suites=QUICK,
        )
        plan = with_suites([experiment], self.suites, also=self.also)[0].plan(self.layers, self.protocol.seed)
        return replace(
            plan,
            matched=matched,
            notes=plan.notes
            + ([] if matched["ok"] or not fraction else [_shortfall(matched, self.unmodified())]),
        )


class Matcher(Twins):
    """Noise twins, measured in this process. `engine`: its live model is modified while a twin is searched
    for, and left so; the rest as in `Twins`."""

    def __init__(
        self,
        engine: Engine,
        protocol: evaluate.Protocol,
        suites: tuple[str, ...] | None = None,
        also: tuple[str, ...] = (),
    ):
        super().__init__(len(engine.live.original), protocol, suites, also)
        self.engine = engine

    def perplexity(self, fraction: float) -> float | None:
        """Perplexity of the unmodified model with this noise on all layers, by the perplexity suite; None:
        undefined."""
        if fraction not in self.known:
            self.known[fraction] = noised_perplexity(self.engine, self.protocol, fraction)
        return self.known[fraction]

    def unmodified(self) -> float | None:
        """Perplexity of the unmodified model. Raises FrankenError if it cannot be measured."""
        try:
            return self.perplexity(0.0)
        except Exception as e:
            raise unmeasured(e) from e

    def find(self, twin: Plan, on_progress: Callable[[str, int, int], None] | None = None) -> Plan:
        """The twin with its noise, found by bisection. **The live model is left with the last noise
        tried.**"""
        matched = twin.matched
        assert matched is not None, "`twin` made this plan, and said there what it is matched to"
        count = 0

        def measured(fraction: float) -> float | None:
            nonlocal count
            if on_progress:
                on_progress(BISECTION, count, EVALUATIONS)
            count += 1
            return self.perplexity(fraction)

        return self.found(twin, bisect(matched["target_perplexity"], self.unmodified(), measured))


def noised_perplexity(engine: Engine, protocol: evaluate.Protocol, fraction: float) -> float | None:
    """Perplexity of the unmodified model with this noise on all layers (0: none); None: undefined. **The live
    model is left so.**"""
    live = engine.live
    live.apply(perturb(live.original, fraction, protocol.seed) if fraction else live.original)
    measurements, _ = evaluate.evaluate(engine, replace(protocol, suites=("perplexity",)))
    return measurements["perplexity"]["perplexity"]


def unmeasured(e: Exception) -> FrankenError:
    """What ends a run whose unmodified model's perplexity could not be measured."""
    reason = (str(e).splitlines() or [""])[0]
    return FrankenError(f"the unmodified model's perplexity cannot be measured: {type(e).__name__}: {reason}")


def _shortfall(matched: dict, unmodified: float | None) -> str:
    """A sentence about noise that did not reach the perplexity asked for."""
    target, reached = matched["target_perplexity"], matched["reached_perplexity"]
    if target is None:
        return (
            f"{matched['of']} has no finite perplexity, which no noise can be matched to: this is the"
            " strongest that is tried"
        )
    share = share_of_damage(reached, target, unmodified)
    got = (
        "left the perplexity undefined"
        if reached is None
        else f"reached {reached:.2f}, off by {matched['within']:.1%}"
        + ("" if share is None else f", and {share:.0%} of the rise in nats per token")
    )
    return (
        f"no noise was found that raises perplexity to {target:.2f} within {TOLERANCE:.0%}, and by as many"
        f" nats per token within {DAMAGE:.0%}: the nearest of"
        f" {len(matched['evaluations'])} tries {got}"
    )
