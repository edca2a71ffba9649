"""The curve through controls' shifts, and what is left of introspective probes' shifts above it.

Linear algebra of the detection score (analysis/detection.py): a score, its error, and both for thousands of
resamples and sign flips at once. Shapes are given in brackets: R resamples or flips, k terms of the curve.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from analysis.stats import snapped

RESOLUTION = (
    0.01  # nats; added in quadrature to standard errors: noiseless data are not infinitely significant
)
MIN_PER_FRAMING = 8  # controls, for a drift and a flattening of a framing's own
SIDES = np.array([0.5, -0.5])  # what the yes- and the no-keyed half weigh in the score
# holes and overhang over which the curve is trusted, in shares of the controls' range
MAX_GAP, MARGIN = 0.25, 0.05


class Grouped(Protocol):
    """A probe, by its name and what it shares with others."""

    @property
    def id(self) -> str: ...

    @property
    def pair(self) -> str | None: ...


class Asked(NamedTuple):
    """Of a probe what the changed model does not decide."""

    id: str
    keyed: str
    baseline: float
    framing: str
    pair: str | None


@dataclass(frozen=True)
class Prepared:
    """All that a score needs which the changed model's answers do not decide."""

    design: Design
    flags: tuple[str, ...]
    ranks: np.ndarray
    """Of the controls' baselines."""
    whole: Weighted
    """Every cluster once."""
    resampled: Weighted
    """The bootstrap's draws."""
    flips: np.ndarray
    """Signs of the clusters of controls and of introspective probes [resamples, clusters], drawn next."""
    state: dict
    """The random generator's, after them."""


@functools.lru_cache(maxsize=5)  # some 10 MB each: an experiment has one of these and one for each format
def prepared(inside: tuple[Asked, ...], controls: tuple[Asked, ...], resamples: int, seed: int) -> Prepared:
    """Of probes without the changed model's answers; remembered, as a run's experiments are mostly asked the
    same questions and contrasted with the same answers."""
    flags: list[str] = []
    sq, sc = (np.array([1.0 if p.keyed == "yes" else -1.0 for p in group]) for group in (inside, controls))
    design = _design(inside, controls, sq, flags)
    rng = np.random.default_rng(seed)
    drawn_c, drawn_q = (_resample(g, sign, resamples, rng) for g, sign in ((design.gc, sc), (design.gq, sq)))
    return Prepared(
        design=design,
        flags=tuple(flags),
        ranks=ranks(np.array([p.baseline for p in controls])),
        whole=design.weighted(np.ones((1, design.gc.shape[1])), np.ones((1, design.gq.shape[1]))),
        resampled=design.weighted(drawn_c, drawn_q),
        flips=flips_of(design, resamples, rng),
        state=dict(rng.bit_generator.state),
    )


@dataclass(frozen=True)
class Weighted:
    """What of estimates turns on multiplicities of clusters alone, [R, ...]."""

    mc: np.ndarray
    """Of controls [R, clusters]."""
    mq: np.ndarray
    """Of introspective probes [R, clusters]."""
    inverse: np.ndarray
    """Of the controls' weighted moments [R, k, k]."""
    influence: np.ndarray
    """Of a control's residual on the score, as HC3 has it [R, controls]."""
    influence_of_terms: np.ndarray
    """Of each term of the curve on the score, by way of each cluster's controls [R, k, clusters]."""
    share: np.ndarray
    """Of one copy of a yes- or a no-keyed probe in the score [R, 2]."""


@dataclass(frozen=True)
class Design:
    """Design matrices and cluster memberships: controls (xc, gc), introspective (xq, gq) with their keyed
    sign."""

    xc: np.ndarray
    xq: np.ndarray
    gc: np.ndarray
    gq: np.ndarray
    sign: np.ndarray
    # on curvature, which bootstrap copies may not identify; on the rest only against singularity
    ridge: np.ndarray

    def weighted(self, mc: np.ndarray, mq: np.ndarray) -> Weighted:
        """Of multiplicities of clusters [R, clusters]."""
        terms = self.xc.shape[1]
        inverse = np.linalg.inv((mc @ (self.gc.T @ self.squares)).reshape(-1, terms, terms) + self.ridge)
        share = SIDES / (mq @ self.in_half.T)
        pull = (mq @ self.gq.T * (share @ self.keyed.T)) @ self.xq
        influence = _each(-pull, inverse) @ self.xc.T * self.hc3(inverse)
        of_terms = np.stack([influence @ (self.gc * term[:, None]) for term in self.xc.T], axis=1)
        return Weighted(mc, mq, inverse, influence, of_terms, share)

    @functools.cached_property
    def squares(self) -> np.ndarray:
        """Products of two terms of each control [controls, k * k]: a product with these is faster than what
        makes them anew."""
        return (self.xc[:, :, None] * self.xc[:, None, :]).reshape(len(self.xc), -1)

    def hc3(self, inverse: np.ndarray) -> np.ndarray:
        """By which residuals of controls are multiplied [R, controls]; `inverse`: of their moments."""
        leverage = inverse.reshape(len(inverse), -1) @ self.squares.T
        return 1 / np.minimum(np.maximum(1 - leverage, 0.1), 1)

    @functools.cached_property
    def keyed(self) -> np.ndarray:
        """Whether an introspective probe is yes- or no-keyed [probes, 2]."""
        return np.stack([self.sign > 0, self.sign < 0], axis=1).astype(float)

    @functools.cached_property
    def halves(self) -> np.ndarray:
        """Whether an introspective probe is in the yes- or the no-keyed half of a cluster
        [probes, 2 * clusters]."""
        return (self.keyed[:, :, None] * self.gq[:, None, :]).reshape(len(self.gq), -1)

    @functools.cached_property
    def terms_of_halves(self) -> np.ndarray:
        """Sums of the terms of the probes in each half of a cluster [k, 2 * clusters]."""
        return self.xq.T @ self.halves

    @functools.cached_property
    def in_half(self) -> np.ndarray:
        """How many probes of each half a cluster has [2, clusters]."""
        return self.keyed.T @ self.gq

    @functools.cached_property
    def unbiased(self) -> np.ndarray:
        """What a half's deviations are multiplied by for its mean being their own [2]."""
        clusters = np.count_nonzero(self.in_half, axis=1)
        return np.sqrt(clusters / (clusters - 1))

    def curve(self, weighted: Weighted, yc: np.ndarray) -> np.ndarray:
        """Terms of the curve through shifts of controls [R or 1, controls]: [R, k]."""
        # the terms' products with the shifts, summed over clusters [R or 1, k, clusters]
        sums = (self.xc.T * yc[:, None]) @ self.gc
        moments = weighted.mc @ sums[0].T if len(yc) == 1 else sums @ weighted.mc[0]
        return _each(moments, weighted.inverse)

    def residuals(self, whole: Weighted, yc: np.ndarray, yq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of controls (HC3) and of introspective probes, from shifts [probes]."""
        beta = self.curve(whole, yc[None])[0]
        return (yc - self.xc @ beta) * self.hc3(whole.inverse)[0], yq - self.xq @ beta

    def measure(self, weighted: Weighted, yc: np.ndarray, yq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score and HC3 standard error [R], from shifts [R or 1, probes]."""
        score, zc, zq = self.parts(weighted, yc, yq)
        return score, _error(zc, zq, weighted)

    def parts(self, weighted: Weighted, yc: np.ndarray, yq: np.ndarray):
        """The score [R], and what each cluster of controls and of introspective probes adds to its error
        [R, clusters]. All are linear in the shifts."""
        beta = self.curve(weighted, yc)
        # influence times residuals of controls, summed over clusters, without the residuals [R, controls]
        # of every draw: arrays of that size took longer than the products
        zc = (
            weighted.influence @ (yc[0, :, None] * self.gc)
            if len(yc) == 1
            else weighted.influence * yc @ self.gc
        )
        zc -= (beta[:, None] @ weighted.influence_of_terms)[:, 0]
        # residuals of introspective probes, summed over each half of a cluster: [R, 2, clusters]
        eq = (yq @ self.halves - beta @ self.terms_of_halves).reshape(len(beta), 2, -1)
        of_half = np.einsum("rc,rhc->rh", weighted.mq, eq) * weighted.share
        # deviations from the mean of its half, in the score's units
        scale = weighted.share * self.unbiased
        eq *= scale[:, :, None]
        zq = eq[:, 0] + eq[:, 1] - (of_half / SIDES * scale) @ self.in_half
        return of_half.sum(axis=1), zc, zq

    def flipped(self, whole: Weighted, null_c: np.ndarray, null_q: np.ndarray, flips: np.ndarray):
        """Score and standard error [R] of shifts whose clusters' signs are flipped: `flips` [R, clusters of
        controls and of introspective probes]. Both come from what each cluster's shifts give alone."""
        nc = self.gc.shape[1]
        alone = np.eye(flips.shape[1])
        score, zc, zq = self.parts(
            whole, alone[:, :nc] @ self.gc.T * null_c, alone[:, nc:] @ self.gq.T * null_q
        )
        together = flips @ np.column_stack([score, zc, zq])
        return together[:, 0], _error(together[:, 1 : 1 + nc], together[:, 1 + nc :], whole)


def _error(zc: np.ndarray, zq: np.ndarray, weighted: Weighted) -> np.ndarray:
    """Standard errors [R] of what each cluster adds [R, clusters]."""
    variance = sum(np.einsum("rc,rc->r", m, z * z) for m, z in ((weighted.mc, zc), (weighted.mq, zq)))
    return np.sqrt(variance + RESOLUTION**2)


def _each(rows: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """Each row [R or 1, k] times its matrix [R or 1, k, k]."""
    return rows @ matrices[0] if len(matrices) == 1 else np.einsum("rk,rkl->rl", rows, matrices)


def _design(inside: Sequence[Asked], controls: Sequence[Asked], sign: np.ndarray, flags: list[str]) -> Design:
    xq, xc = (np.array([p.baseline for p in group], float) for group in (inside, controls))
    scale = xc.std()
    knots = (
        np.quantile(xc, [0.05, 0.25, 0.42, 0.58, 0.75, 0.95] if len(xc) >= 20 else [0.1, 0.4, 0.6, 0.9])
        / scale
    )
    if np.diff(knots).min() < 0.01:
        knots = knots[[0, -1]]
        flags.append("control baselines too alike for a curve: straight line fitted")
    basis = [_natural_spline(x / scale, knots) for x in (xq, xc)]
    linear = [True, True] + [False] * (len(knots) - 2)
    framings = sorted({p.framing for p in [*inside, *controls]})
    if min(sum(p.framing == f for p in controls) for f in framings) >= MIN_PER_FRAMING:
        for f in framings[1:]:
            for i, (group, x) in enumerate(((inside, xq), (controls, xc))):
                here = np.array([p.framing == f for p in group], float)
                basis[i] = np.column_stack([basis[i], here, here * x / scale])
            linear += [True, True]
    elif len(framings) > 1:
        flags.append("too few controls in a framing for its own drift and flattening: framings pooled")
    ridge = np.diag(np.where(linear, 1e-9, 1e-7) * len(xc))
    return Design(
        basis[1], basis[0], membership(clusters_of(controls)), membership(clusters_of(inside)), sign, ridge
    )


def _natural_spline(x: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Natural cubic spline basis [n, K], straight beyond the end knots (Hastie et al., ESL, eq. 5.4)."""

    def d(j):
        return (np.maximum(x - knots[j], 0) ** 3 - np.maximum(x - knots[-1], 0) ** 3) / (knots[-1] - knots[j])

    last = len(knots) - 2
    return np.stack([np.ones_like(x), x] + [d(j) - d(last) for j in range(last)], axis=1)


def covered_by(x: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """Which baselines lie where the controls show what the change does: near one, or in no wide hole of
    theirs."""
    edges = np.concatenate([[-np.inf], np.sort(controls), [np.inf]])
    right = np.clip(np.searchsorted(edges, x), 1, len(edges) - 1)
    nearest = np.abs(x[:, None] - controls).min(axis=1)
    return (nearest <= MARGIN * np.ptp(controls)) | (
        edges[right] - edges[right - 1] <= MAX_GAP * np.ptp(controls)
    )


def clusters_of(probes: Sequence[Grouped]) -> list[Hashable]:
    """A label for each probe; those that are not independent have the same."""
    return [("alone", p.id) if p.pair is None else ("pair", p.pair) for p in probes]


def membership(clusters: Sequence[Hashable]) -> np.ndarray:
    """[n, clusters] 0/1 matrix, clusters in order of first appearance."""
    codes = {label: k for k, label in enumerate(dict.fromkeys(clusters))}
    # the shape of none, too
    return np.eye(len(codes))[[codes[c] for c in clusters]].reshape(len(clusters), len(codes))


def _resample(groups: np.ndarray, sign: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap multiplicities [count, clusters], in strata of clusters alike in keyed composition: no half
    empties."""
    composition = np.stack([groups.T @ (sign > 0), groups.T @ (sign < 0)], axis=1)
    out = np.zeros((count, groups.shape[1]))
    for stratum in np.unique(composition, axis=0):
        members = np.flatnonzero((composition == stratum).all(axis=1))
        out[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=count)
    return out


def flips_of(design: Design, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Signs for every cluster of controls, then of introspective probes [resamples, clusters]."""
    return np.hstack([rng.choice([-1.0, 1.0], size=(resamples, g.shape[1])) for g in (design.gc, design.gq)])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, of ties their mean, less the mean of all."""
    _, which, counts = np.unique(snapped(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which] - (len(values) + 1) / 2
