"""Every recipe operation against lists of strings moved about the slow obvious way."""

import json
import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery import recipes as r

N = 9


def names(recipe: r.Recipe) -> list[str]:
    """One string a position; only for recipes of unedited layers."""
    return [f"{slot.mix[0][0].source}{slot.mix[0][0].layer}" for slot in recipe.slots]


def expected(letters: str) -> list[str]:
    """'012 b3' style shorthand: digits are instruct layers, b before a digit means base."""
    out, source = [], "instruct"
    for c in letters.replace(" ", ""):
        if c == "b":
            source = "base"
        else:
            out.append(source + c)
            source = "instruct"
    return out


START = r.identity(N)

CASES = [
    (lambda x: x, "012345678"),
    (lambda x: r.swap(x, 2, 7), "017345628"),
    (lambda x: r.swap(x, 7, 2), "017345628"),
    (lambda x: r.swap(x, 4, 4), "012345678"),
    (lambda x: r.swap(r.swap(x, 0, 1), 1, 2), "120345678"),
    (lambda x: r.swap_chunks(x, (1, 3), (5, 7)), "056341278"),
    (lambda x: r.swap_chunks(x, (5, 7), (1, 3)), "056341278"),
    (lambda x: r.swap_chunks(x, (0, 4), (4, 8)), "456701238"),  # touching
    (lambda x: r.swap_chunks(x, (0, 1), (8, 9)), "812345670"),
    (lambda x: r.splice(x, "base", 2, 5), "01b2b3b45678"),
    (lambda x: r.splice(r.swap(x, 0, 1), "base", 1, 2), "1b12345678"),
    (lambda x: r.delete(x, 3, 5), "0125678"),
    (lambda x: r.delete(x, 0, 8), "8"),
    (lambda x: r.double(x, 2, 4), "01223345678"),
    (lambda x: r.repeat(x, 2, 4), "01232345678"),
    (lambda x: r.repeat(x, 2, 4, 3), "0123232345678"),
    (lambda x: r.repeat(x, 2, 4, 1), "012345678"),
    (lambda x: r.reverse(x, 1, 5), "043215678"),
    (lambda x: r.reverse(x, 0, 9), "876543210"),
    (lambda x: r.keep_every(x, 3), "036"),
    (lambda x: r.keep_every(x, 1), "012345678"),
    (lambda x: r.keep_every(x, 99), "0"),
    (lambda x: r.swap(r.delete(x, 0, 3), 0, 5), "845673"),  # positions are those of the recipe as it stands
]


@pytest.mark.parametrize("operation, want", CASES)
def test_moves(operation, want):
    assert names(operation(START)) == expected(want)
    outside = operation(START)
    assert (outside.embed, outside.norm, outside.head) == ("instruct",) * 3


@given(st.integers(1, 40), st.integers(0, 10**6))
def test_shuffle_is_one_cycle_that_leaves_nothing_in_place(n, seed):
    order = [slot.mix[0][0].layer for slot in r.shuffle(r.identity(n), seed).slots]
    assert sorted(order) == list(range(n))
    assert n == 1 or all(p != layer for p, layer in enumerate(order))
    seen, p = set(), 0
    while p not in seen:
        seen.add(p)
        p = order[p]
    assert len(seen) == n
    assert r.shuffle(r.identity(n), seed) == r.shuffle(r.identity(n), seed)


def test_shuffles_of_different_seeds_differ():
    assert len({r.shuffle(START, seed) for seed in range(20)}) > 15


def test_outer_parts_are_taken_together():
    pure = r.with_outer(r.splice(START, "base", 0, N), "base")
    assert pure == r.identity(N, "base")
    assert pure.sources == {"base"}


def test_linear_blend():
    shares = [i / (N - 1) for i in range(N)]
    for p, slot in enumerate(r.blend(START, "base", r.linear).slots):
        weights = {(ref.source, ref.layer): w for ref, w in slot.mix}
        want = {("instruct", p): 1 - shares[p], ("base", p): shares[p]}
        assert weights == {k: w for k, w in want.items() if w}
    # a share of 0 is that layer to the bit
    assert r.blend(START, "base", r.linear).slots[0] == r.plain("instruct", 0)
    assert r.blend(START, "base", r.linear).slots[-1] == r.plain("base", N - 1)


@pytest.mark.parametrize("steepness", [10, -10])
def test_sigmoid_blend_is_centered_on_the_middle(steepness):
    slots = r.blend(START, "base", r.sigmoid(steepness)).slots
    shares = [dict((ref.source, w) for ref, w in slot.mix)["base"] for slot in slots]
    for p, share in enumerate(shares):
        assert share == pytest.approx(1 / (1 + math.exp(-steepness * (p / (N - 1) - 0.5))))
        assert share + shares[N - 1 - p] == pytest.approx(1)
    assert (shares == sorted(shares)) == (steepness > 0)


def test_blending_a_blend_multiplies_weights():
    once = r.blend(START, "base", [0.5] * N)
    twice = r.blend(once, "base", [0.5] * N)
    third = r.blend(once, "other", [0.2] * N)
    assert dict(twice.slots[3].mix) == pytest.approx({r.Ref("instruct", 3): 0.25, r.Ref("base", 3): 0.75})
    assert dict(third.slots[3].mix) == pytest.approx(
        {r.Ref("instruct", 3): 0.4, r.Ref("base", 3): 0.4, r.Ref("other", 3): 0.2}
    )
    assert r.blend(START, "instruct", [0.3] * N) == START  # with itself: nothing happens


def test_blend_of_a_single_layer():
    assert r.blend(r.identity(1), "base", r.linear) == r.identity(1)


def test_perturb_marks_the_positions_and_moves_with_the_layer():
    noisy = r.perturb(START, 0.05, seed=7, positions=[2, 5])
    assert [p for p, slot in enumerate(noisy.slots) if slot.edits] == [2, 5]
    assert noisy.slots[2].edits == (r.Noise(0.05, 7, 2),)
    moved = r.swap(noisy, 2, 8)
    assert moved.slots[8] == noisy.slots[2] and not moved.slots[2].edits
    assert all(slot.edits == (r.Noise(0.01, 0, p),) for p, slot in enumerate(r.perturb(START, 0.01, 0).slots))
    assert r.perturb(noisy, 0.01, 9, [2]).slots[2].edits == (r.Noise(0.05, 7, 2), r.Noise(0.01, 9, 2))


def test_permute_units_marks_every_position():
    assert [slot.edits for slot in r.permute_units(START, 3).slots] == [
        (r.Permute(3, p, "both"),) for p in range(N)
    ]
    assert [slot.edits for slot in r.permute_units(START, 3, "mlp").slots] == [
        (r.Permute(3, p, "mlp"),) for p in range(N)
    ]


def test_permutations_written_before_there_were_kinds_mean_both():
    data = r.permute_units(START, 3).to_json()
    for slot in data["slots"]:
        assert slot["edits"][0].pop("what") == "both"
    assert r.Recipe.from_json(data) == r.permute_units(START, 3)
    data["slots"][0]["edits"][0]["what"] = "everything"
    with pytest.raises(
        r.RecipeError, match="not a recipe: .*what can be permuted is mlp, heads, both, not 'everything'"
    ):
        r.Recipe.from_json(data)


@pytest.mark.parametrize(
    "operation, word",
    [
        (lambda: r.swap(START, 0, 9), "layer 9 is out of range"),
        (lambda: r.swap(START, -1, 2), "layer -1 is out of range"),
        (lambda: r.swap_chunks(START, (0, 3), (2, 5)), "overlap"),
        (lambda: r.swap_chunks(START, (2, 5), (2, 5)), "overlap"),
        (lambda: r.swap_chunks(START, (0, 3), (4, 6)), "differ in length"),
        (lambda: r.swap_chunks(START, (0, 3), (7, 10)), "out of range"),
        (lambda: r.splice(START, "base", 3, 3), "empty or out of range"),
        (lambda: r.splice(START, "base", 3, 10), "out of range"),
        (lambda: r.delete(START, 0, 9), "at least one layer"),
        (lambda: r.delete(START, 5, 4), "out of range"),
        (lambda: r.repeat(START, 0, 2, 0), "1 or more times"),
        (lambda: r.double(START, 8, 10), "out of range"),
        (lambda: r.reverse(START, -1, 3), "out of range"),
        (lambda: r.keep_every(START, 0), "n >= 1"),
        (lambda: r.keep_every(START, 2, 9), "layer 9 is out of range"),
        (lambda: r.attenuate(START, float("nan"), 0, 2), "must be finite"),
        (lambda: r.repeat(START, 0, 2, 2, float("inf")), "must be finite"),
        (lambda: r.attenuate(START, 0.5, 5, 10), "out of range"),
        (lambda: r.parallel(START, 3, 4), "two positions or more"),
        (lambda: r.parallel(START, 3, 10), "out of range"),
        (lambda: r.parallel(r.parallel(START, 3, 6), 5, 8), "shares none with another"),
        (lambda: r.delete(r.parallel(START, 3, 6), 0, 1), "use `parallel` last"),
        (lambda: r.repeat(r.parallel(START, 3, 6), 0, 1), "use `parallel` last"),
        (lambda: r.double(r.parallel(START, 3, 6), 0, 1), "use `parallel` last"),
        (lambda: r.keep_every(r.parallel(START, 3, 6), 2), "use `parallel` last"),
        (lambda: r.perturb(START, float("nan"), 0), "noise fraction"),
        (lambda: r.perturb(START, -0.1, 0), "noise fraction"),
        (lambda: r.perturb(START, 0.1, 0, [9]), "layer 9 is out of range"),
        (lambda: r.permute_units(START, 0, "all"), "what can be permuted is mlp, heads, both, not 'all'"),
        (lambda: r.blend(START, "base", [0.5]), "9 finite shares"),
        (lambda: r.blend(START, "base", [float("inf")] * N), "finite"),
        (lambda: r.blend(r.perturb(START, 0.1, 0), "base", r.linear), "already perturbed"),
        (lambda: r.Recipe.from_json({}), "not a recipe"),
        (
            lambda: r.Recipe.from_json(
                {"slots": [{"mix": [["a", "x", 1]]}], "embed": "a", "norm": "a", "head": "a"}
            ),
            "not a recipe",
        ),
        (
            lambda: r.Recipe.from_json({"slots": [{"mix": []}], "embed": "a", "norm": "a", "head": "a"}),
            "not a recipe",
        ),
        (
            lambda: r.Recipe.from_json(
                {"slots": [{"mix": [["a", 0, 0.5]]}], "embed": "a", "norm": "a", "head": "a"}
            ),
            "not a recipe",
        ),
        (
            lambda: r.Recipe.from_json(
                {
                    "slots": [{"mix": [["a", 0, 1]], "edits": [{"kind": "x"}]}],
                    "embed": "a",
                    "norm": "a",
                    "head": "a",
                }
            ),
            "not a recipe",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(operation, word):
    with pytest.raises(r.RecipeError, match=word) as caught:
        operation()
    assert "\n" not in str(caught.value)


def test_recipes_are_frozen_values():
    assert r.swap(r.swap(START, 1, 2), 1, 2) == START
    assert len({START, r.identity(N), r.swap(START, 1, 2)}) == 2
    with pytest.raises(FrozenInstanceError):
        START.embed = "base"


operations = st.one_of(
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda t: lambda x: r.swap(x, *t)),
    st.integers(0, 99).map(lambda s: lambda x: r.shuffle(x, s)),
    st.integers(0, 3).map(lambda p: lambda x: r.splice(x, "base", p, p + 1)),
    st.floats(-1, 2).map(
        lambda s: lambda x: r.blend(x, "base", [s] * len(x)) if not any(k.edits for k in x.slots) else x
    ),
    st.tuples(st.floats(0, 1), st.integers(0, 5)).map(lambda t: lambda x: r.perturb(x, *t, positions=[1])),
    st.tuples(st.integers(0, 5), st.sampled_from(["mlp", "heads", "both"])).map(
        lambda t: lambda x: r.permute_units(x, *t)
    ),
    st.just(lambda x: x if x.parallel else r.double(x, 0, 2, 0.5)),
    st.floats(-2, 2).map(lambda s: lambda x: r.attenuate(x, s, 1, 3)),
    st.just(lambda x: x if x.parallel else r.parallel(x, 1, 3)),
    st.just(lambda x: r.with_outer(x, "base")),
)


@given(st.lists(operations, max_size=6))
def test_json_both_ways(steps):
    recipe = r.identity(4)
    for step in steps:
        recipe = step(recipe)
    text = json.dumps(recipe.to_json(), allow_nan=False)
    assert r.Recipe.from_json(json.loads(text)) == recipe
    assert "\n" not in str(recipe) and "\n" not in r.describe_change(recipe, r.identity(4))


def test_scales_and_blocks_are_part_of_the_value():
    half, beside = r.attenuate(START, 0.5, 2, 4), r.parallel(START, 2, 4)
    assert len({START, half, r.attenuate(START, 0.25, 2, 4), beside, r.parallel(START, 2, 5)}) == 5
    assert [slot.scale for slot in half.slots] == [1, 1, 0.5, 0.5, 1, 1, 1, 1, 1]
    assert r.attenuate(half, 2.0, 2, 4) == START
    assert [slot.scale for slot in r.blend(half, "base", [0.5] * N).slots] == [
        slot.scale for slot in half.slots
    ]
    assert half.slots[2].weights == START.slots[2] and not half.slots[2].is_plain
    assert r.repeat(START, 0, 2, 3, 0.5).slots[:6] == START.slots[:2] + 2 * tuple(
        r.Slot(slot.mix, scale=0.5) for slot in START.slots[:2]
    )
    assert [(s.mix[0][0].layer, s.scale) for s in r.double(START, 7, 9, 0.5).slots[7:]] == [
        (7, 1),
        (7, 0.5),
        (8, 1),
        (8, 0.5),
    ]
    assert r.parallel(beside, 6, 9).parallel == r.parallel(r.parallel(START, 6, 9), 2, 4).parallel
    assert r.reverse(beside, 0, 9).parallel == ((2, 4),)  # a block belongs to positions


def test_json_without_scales_and_blocks_is_as_it_was():
    assert START.to_json() == {
        "slots": [{"mix": [["instruct", k, 1.0]]} for k in range(N)],
        "embed": "instruct",
        "norm": "instruct",
        "head": "instruct",
    }
    data = r.parallel(r.attenuate(START, 0.5, 2, 3), 4, 6).to_json()
    assert data["parallel"] == [[4, 6]] and data["slots"][2] == {"mix": [["instruct", 2, 1.0]], "scale": 0.5}
    for wrong in ({"parallel": [[4, 10]]}, {"parallel": [3]}, {"parallel": [[2, 5], [4, 6]]}):
        with pytest.raises(r.RecipeError, match="not a recipe"):
            r.Recipe.from_json(data | wrong)
    data["slots"][2]["scale"] = float("nan")
    with pytest.raises(r.RecipeError, match="not a recipe: .*scale"):
        r.Recipe.from_json(data)


def test_scales_and_blocks_are_read_aloud():
    half = r.attenuate(START, 0.5, 2, 4)
    assert str(half) == "instruct[0:2] instruct[2:4] scaled by 0.5 instruct[4:9] | instruct outside"
    assert r.describe_change(half, START) == "[2:4] scaled by 0.5"
    assert r.describe_change(r.swap(half, 2, 7), START) == (
        "[2] <- instruct[7]; [3] scaled by 0.5; [7] <- instruct[2] scaled by 0.5"
    )
    assert r.describe_change(r.repeat(START, 2, 4, 2, 0.5), START) == (
        "9 -> 11 layers: instruct[0:4] instruct[2:4] scaled by 0.5 instruct[4:9]"
    )
    assert r.describe_change(r.parallel(START, 2, 5), START) == "[2:5] side by side"
    assert r.describe_change(r.parallel(r.delete(START, 0, 1), 2, 5), START) == (
        "9 -> 8 layers: instruct[1:9] [2:5] side by side"
    )


def test_reading_aloud():
    assert str(START) == "instruct[0:9] | instruct outside"
    assert (
        str(r.with_outer(r.splice(START, "base", 4, 9), "base")) == "instruct[0:4] base[4:9] | base outside"
    )
    assert r.describe_change(START, START) == "nothing changes"
    assert r.describe_change(r.swap(START, 2, 7), START) == "[2] <- instruct[7]; [7] <- instruct[2]"
    assert (
        r.describe_change(r.with_outer(START, "base"), START) == "embed <- base; norm <- base; head <- base"
    )
    assert r.describe_change(r.permute_units(START, 3, "heads"), START) == "[0:9] attention heads permuted"
    assert r.describe_change(r.delete(START, 3, 5), START).startswith("9 -> 7 layers")
