"""Exact intervals of a share (Clopper and Pearson, Biometrika 26, 1934), for rates that a reader counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Rate:
    """k of n, in percent with its exact 95% interval; value, low and high are None where n is 0."""

    k: int
    n: int
    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        """For tables: "13 of 40, 32% [19, 49]"."""
        if self.value is None:
            return "–"
        return f"{self.k} of {self.n}, {self.value:.0f}% [{self.low:.0f}, {self.high:.0f}]"


def exact_rate(values: Iterable[bool]) -> Rate:
    """The share of true values. The interval takes them as independent."""
    known = [bool(v) for v in values]
    k, n = sum(known), len(known)
    if not n:
        return Rate(0, 0, None, None, None)
    bounds = binomtest(k, n).proportion_ci(0.95, method="exact")
    return Rate(k, n, 100 * k / n, 100 * float(bounds.low), 100 * float(bounds.high))
