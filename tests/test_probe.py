"""The linear probe on made-up activations: what can be told is told, and what cannot is not."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis import probe
from analysis.probe import Unit
from surgery import recipes as r

KINDS = ("noise", "order", "splice", "blend", "scale")
PLACEBOS = ("permutation of mlp", "permutation of heads", "permutation of both")
WIDTH, DEPTH = 40, 3


def made(effect=0.0, own=0.0, each=4, seed=0, depth=DEPTH) -> list[Unit]:
    """Units of noise; changed ones are moved by `effect` along one direction for all of them from layer 1 on,
    and by `own` along a direction of their kind's own."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=WIDTH)
    shared /= np.linalg.norm(shared)
    units = []
    for changed, names in ((True, KINDS), (False, PLACEBOS)):
        for name in names:
            apart = rng.normal(size=WIDTH)
            apart /= np.linalg.norm(apart)
            for k in range(each):
                states = rng.normal(size=(depth, WIDTH)).astype(np.float32)
                if changed:
                    states[1:] += effect * shared
                    states += own * apart
                units.append(Unit(f"{name}_{k}", frozenset([name]), changed, states))
    return [
        *units,
        Unit("unmodified", frozenset(), False, rng.normal(size=(depth, WIDTH)).astype(np.float32)),
    ]


def test_a_direction_that_all_kinds_share_is_found_where_it_is():
    found = probe.probe(made(effect=4.0), DEPTH, permutations=9)
    assert found.n_changed == 20 and found.n_placebo == 13 and found.kinds == dict.fromkeys(KINDS, 4)
    first, *later = found.curve
    assert first.value < 0.8 and all(one.value > 0.85 and one.low > 0.7 for one in later)
    assert found.null.p_value == 1 / 10 and found.null.observed > found.null.quantile


def test_noise_is_told_from_noise_by_chance_alone():
    """Over made-up studies the mean AUROC is 0.5 and the p-values are no smaller than they may be."""
    found = [probe.probe(made(seed=k, depth=1), 1, seed=k, permutations=5) for k in range(9)]
    values = np.array([one.value for study in found for one in study.curve])
    assert abs(values.mean() - 0.5) < 3 * values.std() / 3
    assert np.mean([study.null.p_value <= 0.17 for study in found]) <= 0.56
    inside = [one.low <= 0.5 <= one.high for study in found for one in study.curve]
    assert np.mean(inside) > 0.75


def test_what_only_the_kinds_have_in_themselves_does_not_leak():
    """Each kind is far off in its own direction: within a kind it could be told, across kinds it cannot."""
    units = made(own=30.0, seed=3, depth=1)
    found = probe.probe(units, 1, permutations=19)
    assert all(one.value < 0.9 for one in found.curve) and found.null.p_value > 0.05
    together = [
        Unit(u.name, frozenset([u.name]) if u.changed else u.kinds, u.changed, u.states) for u in units
    ]
    assert probe.probe(together, 1, permutations=0).curve[0].value > 0.95


def test_the_rotated_probe_is_the_plain_pipeline():
    rng = np.random.default_rng(1)
    train, test = rng.normal(size=(15, 60)), rng.normal(size=(7, 60))
    train[:, 5] = test[:, 5] = 1.0  # a number that never changes
    changed = rng.random(15) > 0.4
    plainly = make_pipeline(
        StandardScaler(),
        LogisticRegression(C=probe.PENALTY, class_weight="balanced", tol=1e-10, max_iter=10000),
    ).fit(train, changed)
    np.testing.assert_allclose(
        probe.decision(train, changed, test), plainly.decision_function(test), atol=1e-4
    )


def test_every_pair_is_judged_by_a_probe_that_saw_neither_kind(monkeypatch):
    units, seen = made(each=2), []
    x = np.stack([u.states[0] for u in units])
    kinds, changed = [u.kinds for u in units], np.array([u.changed for u in units])
    kinds[0] = frozenset(["noise", "order"])  # a surgery of two ingredients
    rows = {tuple(row): k for k, row in enumerate(x)}

    def decision(train, labels, test):
        ids = [[rows[tuple(row)] for row in side] for side in (train, test)]
        seen.append(ids)
        assert not any(kinds[a] & kinds[b] for a in ids[0] for b in ids[1])
        assert not any(kinds[a] == kinds[b] for a in ids[0] for b in ids[1])
        assert (labels == changed[ids[0]]).all() and len(set(labels)) == 2
        return np.arange(len(test), 0, -1.0)  # changed ones come first

    monkeypatch.setattr(probe, "decision", decision)
    wins = probe.pair_wins(x, kinds, changed)
    assert wins.shape == (10, 7) and (wins == 1).all() and len(seen) == 6 * 4


def test_too_few_experiments_have_no_probe():
    units = made(each=1)
    assert probe.probe(units, DEPTH, permutations=1) is not None
    assert probe.probe([u for u in units if u.changed or not u.kinds], DEPTH) is None
    assert probe.probe([u for u in units if not u.changed or "noise" in u.kinds], DEPTH) is None
    assert probe.probe([], DEPTH) is None


def test_what_is_not_finite_does_not_count_and_json_goes_both_ways():
    units = made(effect=8.0)
    units[0].states[2] = np.nan
    found = probe.probe(units, DEPTH, permutations=3)
    assert [one.n_changed for one in found.curve] == [20, 20, 19]
    text = json.dumps(found.to_json(), allow_nan=False)
    assert probe.Probed.from_json(json.loads(text)) == found


def test_other_depths_are_read_by_relative_depth():
    states = np.arange(6)[:, None] * np.ones(2)
    assert probe.at_depth(states, 6)[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert probe.at_depth(states, 3)[:, 0].tolist() == [1, 3, 5]
    assert probe.at_depth(states[:3], 6)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert probe.at_depth(states, 4)[:, 0].tolist() == [1, 2, 4, 5]
    assert probe.null_layers(28) == (6, 13, 20, 27) and probe.null_layers(2) == (0, 1)


@pytest.mark.parametrize(
    ("build", "kinds"),
    [
        (lambda m: m, set()),
        (lambda m: r.swap(m, 1, 4), {"order"}),
        (lambda m: r.splice(m, "base", 1, 4), {"splice"}),
        (lambda m: r.with_outer(r.splice(m, "base", 0, 6), "base"), {"splice"}),
        (lambda m: r.blend(m, "base", r.linear), {"blend", "splice"}),
        (lambda m: r.perturb(r.swap(m, 1, 4), 0.1, 0), {"order", "noise"}),
        (lambda m: r.permute_units(m, 0, "mlp"), {"permutation of mlp"}),
        (lambda m: r.delete(m, 1, 3), {"fewer layers"}),
        (lambda m: r.double(m, 1, 3), {"more layers"}),
        (lambda m: r.attenuate(m, 0.5, 1, 3), {"scale"}),
        (lambda m: r.parallel(m, 1, 3), {"parallel"}),
    ],
)
def test_kinds_are_the_ingredients_of_a_recipe(build, kinds):
    original = r.identity(6)
    assert probe.kinds_of(build(original).to_json(), original.to_json()) == kinds
