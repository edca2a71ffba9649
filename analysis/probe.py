"""What is there to be read: how well activations tell a changed model from a placebo, layer by layer.

A model that does not report its change may not represent it, or may represent it and not say so. A linear
probe on the residual stream at the answer position (suites/activations.py) tells the two apart. The units are
experiments, not questions: each gives one vector a layer, the mean over the same questions.

Method. Logistic regression with L2 penalty on standardized features (scikit-learn), changed models against
placebos and the unmodified model. It must know a kind of surgery that it has not seen: each pair of a changed
model and a placebo is judged by a probe that was trained without the changed model's kind (and without
whatever shares an ingredient with it) and without the placebo's kind. AUROC is the share of pairs in which
the changed model scores higher, ties half. Its interval comes from resampling whole kinds of surgery, and
placebos. The null permutes which experiment has which activations and repeats all of it; its p-value is that
of the largest AUROC over a few layers fixed beforehand, so that no layer is picked.

Recipes of another depth are read by relative depth: at layer l of L stands running layer ceil((l+1) m / L)
of m.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from analysis.stats import plain, snapped

MIN_SIDE, MIN_KINDS = 3, 2  # experiments on either side, and kinds of surgery and of placebos
PENALTY = (
    0.1  # scikit-learn's C: with fewer experiments than numbers, only the penalty decides between planes
)
PERMUTATIONS, NULL_LAYERS = 39, 4  # a minute of one core for 130 experiments of 1,536 numbers
RESAMPLES = 2000


@dataclass(frozen=True)
class Unit:
    """One experiment: `kinds` names the ingredients of its surgery (of a placebo: what it permutes), `states`
    are its mean activations, float32 [running layers, hidden]."""

    name: str
    kinds: frozenset[str]
    changed: bool
    states: np.ndarray


@dataclass(frozen=True)
class LayerArea:
    """AUROC after one layer of the unmodified model's depth; no interval with fewer than 3 kinds; no value
    where too few experiments have finite activations. `moved`: median distance from the unmodified model, in
    shares of its norm, of changed models and placebos."""

    layer: int
    value: float | None
    low: float | None
    high: float | None
    n_changed: int
    n_placebo: int
    moved_changed: float | None
    moved_placebo: float | None


@dataclass(frozen=True)
class Null:
    """Activations permuted among experiments: the largest AUROC over `layers`, observed and permuted (95%
    quantile), and its p-value."""

    layers: tuple[int, ...]
    permutations: int
    observed: float
    quantile: float
    p_value: float


@dataclass(frozen=True)
class Probed:
    """Result of `probe`; `kinds`: how many changed models there are of each kind that is left out in turn."""

    layers: int
    n_changed: int
    n_placebo: int
    kinds: dict[str, int]
    curve: tuple[LayerArea, ...]
    null: Null | None

    def to_json(self) -> dict:
        return plain(asdict(self))

    @staticmethod
    def from_json(data: dict) -> Probed:
        """The inverse of to_json. Raises TypeError, KeyError or ValueError for anything else."""
        null = data["null"] and Null(**(data["null"] | {"layers": tuple(data["null"]["layers"])}))
        curve = tuple(LayerArea(**one) for one in data["curve"])
        return Probed(**(data | {"null": null, "curve": curve}))


def kinds_of(recipe: dict, original: dict) -> frozenset[str]:
    """The ingredients of a surgery, from recipes as JSON: "noise", "permutation of ...", "blend", "splice",
    "order", "fewer layers", "more layers", "scale", "parallel"; empty for the unmodified model."""
    home, kinds, layers = original["embed"], set(), []
    for slot in recipe["slots"]:
        sources = [source for source, _, _ in slot["mix"]]
        kinds |= {"blend"} if len(sources) > 1 else set()
        kinds |= {"splice"} if len(sources) == 1 and sources[0] != home else set()
        for edit in slot.get("edits", ()):
            permutes = edit["kind"] == "permute"
            kinds.add(f"permutation of {edit.get('what', 'both')}" if permutes else edit["kind"])
        kinds |= {key for key in slot if key not in ("mix", "edits")}
        if len(sources) == 1 and sources[0] == home:
            layers.append(slot["mix"][0][1])
    kinds |= {key for key, value in recipe.items() if key not in ("slots", "embed", "norm", "head") and value}
    if any(recipe[part] != home for part in ("embed", "norm", "head")):
        kinds.add("splice")
    gained = len(recipe["slots"]) - len(original["slots"])
    if gained:
        kinds.add("more layers" if gained > 0 else "fewer layers")
    elif layers != sorted(set(layers)):
        kinds.add("order")
    return frozenset(kinds)


def at_depth(states: np.ndarray, depth: int) -> np.ndarray:
    """States [m, hidden] of a model of m layers at the relative depths of one of `depth`: [depth, hidden]."""
    running = len(states)
    return states[[math.ceil((layer + 1) * running / depth) - 1 for layer in range(depth)]]


def decision(train: np.ndarray, changed: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The probe's scores of `test` [n], trained on `train` [m, hidden] with labels `changed` [m].

    Both are standardized by the training rows, and written in a basis of these rows: no rotation changes the
    penalty, so the probe is the same and 1,536 numbers become at most m.
    """
    center, spread = train.mean(0), train.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    train, test = (train - center) / spread, (test - center) / spread
    weight, basis = np.linalg.eigh(train @ train.T)
    keep = weight > 1e-10 * max(weight.max(), 1e-300)
    turn = basis[:, keep] / np.sqrt(weight[keep])
    from sklearn import config_context  # here: a second to import, for which no report without a probe waits
    from sklearn.linear_model import LogisticRegression

    made = LogisticRegression(C=PENALTY, class_weight="balanced", solver="newton-cholesky")
    with config_context(assume_finite=True, skip_parameter_validation=True):
        made.fit(train @ (train.T @ turn), changed)
    return made.decision_function(test @ (train.T @ turn))


def pair_wins(x: np.ndarray, kinds: Sequence[frozenset[str]], changed: np.ndarray) -> np.ndarray:
    """[changed, others]: 1 where the changed model scores higher, 0.5 for a tie, 0 otherwise, by a probe that
    saw neither's kind; NaN where without them nothing is left to train on.

    x: [experiments, hidden], all finite.
    """
    up, down = np.flatnonzero(changed).tolist(), np.flatnonzero(~changed).tolist()
    wins = np.full((len(up), len(down)), np.nan)
    for kind in dict.fromkeys(kinds[i] for i in up):
        seen = np.array([i for i in up if not kinds[i] & kind], dtype=int)
        rows = np.array([k for k, i in enumerate(up) if kinds[i] == kind])
        for placebo in dict.fromkeys(kinds[i] for i in down):
            rest = np.array([i for i in down if kinds[i] != placebo], dtype=int)
            columns = np.array([k for k, i in enumerate(down) if kinds[i] == placebo])
            if not len(seen) or not len(rest):
                continue
            train, test = (
                np.concatenate([seen, rest]),
                np.array([up[k] for k in rows] + [down[k] for k in columns]),
            )
            scores = snapped(decision(x[train], changed[train], x[test]))
            gap = scores[: len(rows), None] - scores[None, len(rows) :]
            wins[np.ix_(rows, columns)] = (np.sign(gap) + 1) / 2
    return wins


def area(wins: np.ndarray) -> float | None:
    """AUROC: the mean over all pairs that could be judged; None where none could."""
    return float(np.nanmean(wins)) if np.isfinite(wins).any() else None


def area_interval(
    wins: np.ndarray, kinds: Sequence[frozenset[str]], seed: int = 0
) -> tuple[float | None, float | None]:
    """95% percentile interval of `area`: whole kinds of surgery (`kinds` of the rows) and single placebos
    drawn anew. None with fewer than 3 kinds, or where no draw moves it."""
    labels = list(dict.fromkeys(kinds))
    if len(labels) < 3 or wins.shape[1] < MIN_SIDE:
        return None, None
    rng = np.random.default_rng(seed)
    member = np.array([labels.index(kind) for kind in kinds])
    rows = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), RESAMPLES)[:, member]
    columns = rng.multinomial(wins.shape[1], np.full(wins.shape[1], 1 / wins.shape[1]), RESAMPLES)
    known = np.isfinite(wins)
    total = np.einsum("ri,ij,rj->r", rows, np.where(known, wins, 0.0), columns)
    weight = np.einsum("ri,ij,rj->r", rows, known.astype(float), columns)
    draws = snapped(total[weight > 0] / weight[weight > 0])
    if not len(draws) or np.ptp(draws) < 1e-12:
        return None, None
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def null_layers(depth: int) -> tuple[int, ...]:
    """The layers over which the null is taken: evenly spread, the last one among them."""
    return tuple(sorted({math.ceil((k + 1) * depth / NULL_LAYERS) - 1 for k in range(NULL_LAYERS)}))


def probe(
    units: Iterable[Unit], depth: int, *, seed: int = 0, permutations: int = PERMUTATIONS
) -> Probed | None:
    """AUROC after every layer, with the permutation null. None with fewer than 3 experiments or 2 kinds on a
    side.

    depth: of the unmodified model. Experiments whose activations after a layer are not finite do not count
    there; the null is over those that are finite everywhere.
    """
    # 1) Who counts.
    units = list(units)
    states = [at_depth(unit.states, depth) for unit in units]
    changed = np.array([unit.changed for unit in units], dtype=bool)
    kinds = [unit.kinds for unit in units]

    def enough(which: Sequence[int]) -> bool:
        sides = [[i for i in which if changed[i] == side] for side in (True, False)]
        return all(len(s) >= MIN_SIDE and len({kinds[i] for i in s}) >= MIN_KINDS for s in sides)

    if not enough(range(len(units))):
        return None
    # 2) Layer by layer.
    origin = next(
        (s for s, unit in zip(states, units, strict=True) if not unit.changed and not unit.kinds), None
    )
    curve = []
    for layer in range(depth):
        here = [i for i, s in enumerate(states) if np.isfinite(s[layer]).all()]
        sides = changed[here]
        value, ends, moved = None, (None, None), [None, None]
        if enough(here):
            x = np.stack([states[i][layer] for i in here]).astype(np.float64)
            wins = pair_wins(x, [kinds[i] for i in here], sides)
            value = area(wins)
            ends = area_interval(wins, [kinds[i] for i in here if changed[i]], seed)
            if origin is not None:
                far = np.linalg.norm(x - origin[layer], axis=1) / max(np.linalg.norm(origin[layer]), 1e-30)
                moved = [float(np.median(far[side])) for side in (sides, ~sides)]
        curve.append(LayerArea(layer, value, *ends, int(sides.sum()), int((~sides).sum()), *moved))
    # 3) The null.
    whole = [i for i, s in enumerate(states) if np.isfinite(s).all()]
    null = _null(states, kinds, changed, whole, depth, seed, permutations) if enough(whole) else None
    counted: dict[str, int] = {}
    for unit in units:
        if unit.changed:
            label = " + ".join(sorted(unit.kinds))
            counted[label] = counted.get(label, 0) + 1
    return Probed(depth, int(changed.sum()), int((~changed).sum()), counted, tuple(curve), null)


def _null(
    states: list[np.ndarray],
    kinds: list[frozenset[str]],
    changed: np.ndarray,
    whole: list[int],
    depth: int,
    seed: int,
    permutations: int,
) -> Null | None:
    layers = null_layers(depth)
    x = [np.stack([states[i][layer] for i in whole]).astype(np.float64) for layer in layers]
    labels, sides = [kinds[i] for i in whole], changed[whole]

    def largest(order: np.ndarray) -> float | None:
        areas = [area(pair_wins(one[order], labels, sides)) for one in x]
        return max((a for a in areas if a is not None), default=None)

    rng = np.random.default_rng(seed)
    observed = largest(np.arange(len(whole)))
    drawn = [largest(rng.permutation(len(whole))) for _ in range(permutations)]
    known = [a for a in drawn if a is not None]
    if observed is None or not known:
        return None
    as_large = int(np.count_nonzero(snapped(known, 1.0) >= snapped([observed], 1.0)[0]))
    p_value = (1 + as_large) / (1 + len(known))
    return Null(layers, len(known), observed, float(np.quantile(known, 0.95)), p_value)
