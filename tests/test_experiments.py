"""Every named experiment against its layers written out by hand, at 64 layers, at 30 and at 2; sweeps."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

import evaluate
import experiments as ex
import prompts
from analysis import published
from analysis.comparison import Sweep
from errors import FrankenError
from surgery.recipes import Noise, Permute, Ref, Slot, plain

NAMED = {e.name: e for e in ex.EXPERIMENTS}
I64 = [("instruct", k) for k in range(64)]


def inst(*numbers):
    return [("instruct", k) for k in numbers]


def base(*numbers):
    return [("base", k) for k in numbers]


# What runs at each of the 64 positions; ranges are Python's.
AT_64 = {
    "baseline_instruct": I64,
    "concept_injection": I64,
    "concept_injection_short": I64,
    "injection_layers": I64,
    "injection_generation": I64,
    "localisation": I64,
    "baseline_base": base(*range(64)),
    "swap_adjacent_30_35": inst(*range(30), 35, 31, 32, 33, 34, 30, *range(36, 64)),
    "swap_adjacent_31_32": inst(*range(31), 32, 31, *range(33, 64)),
    "swap_distant_10_55": inst(*range(10), 55, *range(11, 55), 10, *range(56, 64)),
    "swap_distant_5_60": inst(*range(5), 60, *range(6, 60), 5, 61, 62, 63),
    "swap_chunk_25_35_with_45_55": inst(
        *range(25),
        45,
        46,
        47,
        48,
        49,
        50,
        51,
        52,
        53,
        54,
        *range(35, 45),
        25,
        26,
        27,
        28,
        29,
        30,
        31,
        32,
        33,
        34,
        *range(55, 64),
    ),
    "swap_chunk_16_32_with_32_48": inst(*range(16), *range(32, 48), *range(16, 32), *range(48, 64)),
    "franken_base_first_16": base(*range(16)) + inst(*range(16, 64)),
    "franken_base_first_32": base(*range(32)) + inst(*range(32, 64)),
    "franken_base_first_48": base(*range(48)) + inst(*range(48, 64)),
    "franken_instruct_first_16": inst(*range(16)) + base(*range(16, 64)),
    "franken_instruct_first_32": inst(*range(32)) + base(*range(32, 64)),
    "franken_instruct_first_48": inst(*range(48)) + base(*range(48, 64)),
    "delete_30_34": inst(*range(30), *range(34, 64)),
    "double_24_40": inst(*range(24), *(k for k in range(24, 40) for _ in "ab"), *range(40, 64)),
    "repeat_24_40": inst(*range(24), *range(24, 40), *range(24, 40), *range(40, 64)),
    "reverse_24_40": inst(*range(24), *range(39, 23, -1), *range(40, 64)),
    "keep_every_2nd": inst(*range(0, 64, 2)),
    "delete_first_4": inst(*range(4, 64)),
    "delete_first_8": inst(*range(8, 64)),
    "delete_first_16": inst(*range(16, 64)),
    "delete_28_36": inst(*range(28), *range(36, 64)),
    "delete_24_40": inst(*range(24), *range(40, 64)),
    "delete_last_4": inst(*range(60)),
    "delete_last_8": inst(*range(56)),
    "delete_last_16": inst(*range(48)),
    "delete_36_52": inst(*range(36), *range(52, 64)),
    "keep_first_half": inst(*range(32)),
    "keep_second_half": inst(*range(32, 64)),
    "keep_every_3rd": inst(*range(0, 64, 3)),
    "keep_every_4th": inst(*range(0, 64, 4)),
    "keep_odd": inst(*range(1, 64, 2)),
    "double_30_34": inst(*range(30), 30, 30, 31, 31, 32, 32, 33, 33, *range(34, 64)),
    "repeat_30_34": inst(*range(34), *range(30, 64)),
    "double_36_52": inst(*range(36), *(k for k in range(36, 52) for _ in "ab"), *range(52, 64)),
    "repeat_36_52": inst(*range(52), *range(36, 64)),
    "double_all": inst(*(k for k in range(64) for _ in "ab")),
    "repeat_all": inst(*range(64), *range(64)),
    "reverse_first_half": inst(*range(31, -1, -1), *range(32, 64)),
    "reverse_second_half": inst(*range(32), *range(63, 31, -1)),
    "reverse_all": inst(*range(63, -1, -1)),
    "reverse_21_43": inst(*range(21), *range(42, 20, -1), *range(43, 64)),
    "reverse_36_52": inst(*range(36), *range(51, 35, -1), *range(52, 64)),
    "reverse_27_37": inst(*range(27), *range(36, 26, -1), *range(37, 64)),
    "repeat_32_x3": inst(*range(32), 32, 32, 32, *range(33, 64)),
    "repeat_32_x5": inst(*range(32), 32, 32, 32, 32, 32, *range(33, 64)),
    "repeat_32_x10": inst(*range(32), *[32] * 10, *range(33, 64)),
    "repeat_0_x5": inst(0, 0, 0, 0, *range(64)),
    "repeat_63_x5": inst(*range(64), 63, 63, 63, 63),
    "repeat_44_x5": inst(*range(44), 44, 44, 44, 44, *range(44, 64)),
}
# What counts for less, by position, and what runs side by side.
CONTRIBUTIONS = {
    "repeat_24_40_half": (inst(*range(40), *range(24, 64)), range(40, 56), ()),
    "double_24_40_half": (
        inst(*range(24), *(k for k in range(24, 40) for _ in "ab"), *range(40, 64)),
        range(25, 56, 2),
        (),
    ),
    "attenuate_24_40_half": (I64, range(24, 40), ()),
    "parallel_28_36": (I64, (), ((28, 36),)),
    "parallel_24_40": (I64, (), ((24, 40),)),
    "parallel_16_48": (I64, (), ((16, 48),)),
}
# By hand: position p of 64 is floor(30 p / 64) of 30, so 10 -> 4, 55 -> 25, 30 -> 14, 35 -> 16, 5 -> 2, 60 ->
# 28.
AT_30 = {
    "baseline_instruct": inst(*range(30)),
    "concept_injection": inst(*range(30)),
    "concept_injection_short": inst(*range(30)),
    "injection_layers": inst(*range(30)),
    "injection_generation": inst(*range(30)),
    "localisation": inst(*range(30)),
    "baseline_base": base(*range(30)),
    "swap_adjacent_30_35": inst(*range(14), 16, 15, 14, *range(17, 30)),
    "swap_adjacent_31_32": inst(*range(14), 15, 14, *range(16, 30)),
    "swap_distant_10_55": inst(0, 1, 2, 3, 25, *range(5, 25), 4, 26, 27, 28, 29),
    "swap_distant_5_60": inst(0, 1, 28, *range(3, 28), 2, 29),
    "swap_chunk_25_35_with_45_55": inst(
        *range(11), 21, 22, 23, 24, 15, 16, 17, 18, 19, 20, 11, 12, 13, 14, *range(25, 30)
    ),
    "swap_chunk_16_32_with_32_48": inst(*range(7), *range(15, 22), 14, *range(7, 14), *range(22, 30)),
    "franken_base_first_16": base(*range(7)) + inst(*range(7, 30)),
    "franken_base_first_32": base(*range(15)) + inst(*range(15, 30)),
    "franken_base_first_48": base(*range(22)) + inst(*range(22, 30)),
    "franken_instruct_first_16": inst(*range(7)) + base(*range(7, 30)),
    "franken_instruct_first_32": inst(*range(15)) + base(*range(15, 30)),
    "franken_instruct_first_48": inst(*range(22)) + base(*range(22, 30)),
    "delete_30_34": inst(*range(14), *range(15, 30)),
    "double_24_40": inst(*range(11), 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 16, 16, 17, 17, *range(18, 30)),
    "repeat_24_40": inst(*range(18), *range(11, 30)),
    "reverse_24_40": inst(*range(11), 17, 16, 15, 14, 13, 12, 11, *range(18, 30)),
    "keep_every_2nd": inst(*range(0, 30, 2)),
    "delete_first_4": inst(*range(1, 30)),  # 30 * 4 / 64 is 1.9
    "delete_last_4": inst(*range(28)),
    "delete_36_52": inst(*range(16), *range(24, 30)),
    "keep_odd": inst(*range(1, 30, 2)),
    "repeat_30_34": inst(*range(15), *range(14, 30)),
    "repeat_all": inst(*range(30), *range(30)),
    "reverse_21_43": inst(*range(9), *range(19, 8, -1), *range(20, 30)),
    "repeat_32_x10": inst(*range(15), *[15] * 10, *range(16, 30)),
    "repeat_63_x5": inst(*range(30), 29, 29, 29, 29),
    "repeat_44_x5": inst(*range(20), 20, 20, 20, 20, *range(20, 30)),
}
AT_2 = {
    "baseline_instruct": inst(0, 1),
    "concept_injection": inst(0, 1),
    "concept_injection_short": inst(0, 1),
    "injection_layers": inst(0, 1),
    "injection_generation": inst(0, 1),
    "localisation": inst(0, 1),
    "baseline_base": base(0, 1),
    "swap_adjacent_30_35": inst(1, 0),
    "swap_adjacent_31_32": inst(1, 0),
    "swap_distant_10_55": inst(1, 0),
    "swap_distant_5_60": inst(1, 0),
    "swap_chunk_25_35_with_45_55": inst(1, 0),
    "swap_chunk_16_32_with_32_48": inst(1, 0),
    "shuffle_all": inst(1, 0),
    "franken_base_first_16": base(0) + inst(1),  # at least one layer
    "franken_base_first_32": base(0) + inst(1),
    "franken_base_first_48": base(0) + inst(1),
    "franken_instruct_first_32": inst(0) + base(1),
    "franken_instruct_first_48": inst(0) + base(1),
    "blend_linear": inst(0) + base(1),
    "delete_30_34": inst(1),
    "double_24_40": inst(0, 0, 1),
    "repeat_24_40": inst(0, 0, 1),
    "reverse_24_40": inst(0, 1),
    "keep_every_2nd": inst(0),
}
# (fraction, positions that are perturbed) by depth
NOISE = {
    "perturb_late_1pct": (0.01, {64: range(48, 64), 30: range(22, 30), 2: range(1, 2)}),
    "perturb_late_5pct": (0.05, {64: range(48, 64), 30: range(22, 30), 2: range(1, 2)}),
    "perturb_late_10pct": (0.10, {64: range(48, 64), 30: range(22, 30), 2: range(1, 2)}),
    "perturb_all_1pct": (0.01, {64: range(64), 30: range(30), 2: range(2)}),
    "perturb_all_5pct": (0.05, {64: range(64), 30: range(30), 2: range(2)}),
}
BASE_SHARE = {
    "blend_linear": lambda i, n: i / (n - 1),
    "blend_early_base": lambda i, n: 1 / (1 + math.exp(10 * (i / (n - 1) - 0.5))),
    "blend_late_base": lambda i, n: 1 / (1 + math.exp(-10 * (i / (n - 1) - 0.5))),
}


@pytest.mark.parametrize("depth,expected", [(64, AT_64), (30, AT_30), (2, AT_2)], ids=["64", "30", "2"])
def test_every_plain_experiment_is_the_list_written_by_hand(depth, expected):
    for name, layers in expected.items():
        recipe = NAMED[name].plan(depth).recipe
        assert recipe.slots == tuple(plain(s, k) for s, k in layers), name
        outer = "base" if name == "baseline_base" else "instruct"
        assert (recipe.embed, recipe.norm, recipe.head) == (outer,) * 3, name


@pytest.mark.parametrize("name", CONTRIBUTIONS)
def test_contributions_are_those_written_by_hand(name):
    layers, halved, blocks = CONTRIBUTIONS[name]
    recipe = NAMED[name].plan(64).recipe
    assert recipe.slots == tuple(
        Slot(((Ref(s, k), 1.0),), scale=0.5 if p in halved else 1.0) for p, (s, k) in enumerate(layers)
    )
    assert recipe.parallel == blocks


def test_the_study_second_version_is_all_there():
    """Its surgeries of one model, as its list says them: what comes out on 64 layers, by whichever name."""
    whole = list(range(64))
    lists = {
        "first, middle, last 4, 8, 16 and the critical region left out": [
            *(whole[k:] for k in (4, 8, 16)),
            *(whole[: 32 - k] + whole[32 + k :] for k in (2, 4, 8)),
            *(whole[:-k] for k in (4, 8, 16)),
            whole[:36] + whole[52:],
        ],
        "every 2nd, 3rd, 4th, even, odd, halves": [
            *(whole[::2], whole[::3], whole[::4], whole[0::2], whole[1::2], whole[:32], whole[32:])
        ],
        "blocks of 4 and 16 and the whole twice": [
            whole[:34] + whole[30:],
            whole[:40] + whole[24:],
            whole + whole,
        ],
        "backwards": [
            whole[31::-1] + whole[32:],
            whole[:32] + whole[:31:-1],
            whole[::-1],
            whole[:21] + whole[42:20:-1] + whole[43:],
            whole[:36] + whole[51:35:-1] + whole[52:],
            whole[:27] + whole[36:26:-1] + whole[37:],
        ],
        "one layer often": [
            *(sorted([*whole, *[32] * (times - 1)]) for times in (3, 5, 10)),
            *(sorted([*whole, *[layer] * 4]) for layer in (0, 63, 44)),
        ],
    }
    made = [
        [ref.layer for slot in e.plan(64).recipe.slots for ref, _ in slot.mix]
        for e in ex.EXPERIMENTS
        if e.group == "depth"
    ]
    assert [(what, k) for what, of in lists.items() for k, x in enumerate(of) if x not in made] == []
    assert sum(map(len, lists.values())) == 32


@pytest.mark.parametrize("depth", [64, 30, 2])
@pytest.mark.parametrize("name", NOISE)
def test_noise_is_at_the_positions_written_by_hand(name, depth):
    fraction, positions = NOISE[name]
    recipe = NAMED[name].plan(depth, seed=5).recipe
    assert recipe.slots == tuple(
        Slot(((Ref("instruct", p), 1.0),), (Noise(fraction, 5, p),) if p in positions[depth] else ())
        for p in range(depth)
    )


@pytest.mark.parametrize("depth", [64, 30])
@pytest.mark.parametrize("name", BASE_SHARE)
def test_blends_follow_their_formulas(name, depth):
    recipe = NAMED[name].plan(depth).recipe
    for p, slot in enumerate(recipe.slots):
        share = BASE_SHARE[name](p, depth)
        got = {ref: weight for ref, weight in slot.mix}
        assert set(got) <= {Ref("instruct", p), Ref("base", p)} and not slot.edits
        assert got.get(Ref("base", p), 0.0) == pytest.approx(share, abs=1e-12)
        assert got.get(Ref("instruct", p), 0.0) == pytest.approx(1 - share, abs=1e-12)
    assert (recipe.embed, recipe.norm, recipe.head) == ("instruct",) * 3


@pytest.mark.parametrize("depth", [64, 30])
def test_shuffle_uses_every_layer_once(depth):
    shuffled = [NAMED["shuffle_all"].plan(depth, seed).recipe for seed in (0, 1)]
    for recipe in shuffled:
        layers = [slot.mix[0][0].layer for slot in recipe.slots]
        assert sorted(layers) == list(range(depth)) and all(k != p for p, k in enumerate(layers))
        assert recipe.slots == tuple(plain("instruct", k) for k in layers)
    assert shuffled[0] != shuffled[1]


PLACEBOS = [f"placebo_{what}_{k}" for what in ("mlp", "heads", "both") for k in range(1, 8)]


def test_placebos_permute_what_they_say_with_random_numbers_of_their_own():
    seeds = []
    for name in PLACEBOS:
        experiment, (_, what, _) = NAMED[name], name.split("_")
        assert (experiment.group, experiment.control, experiment.suites) == (
            "control",
            "placebo",
            ("binary", "perplexity"),
        )
        for seed in (0, 1, 3):
            recipe = experiment.plan(30, seed).recipe
            (drawn,) = {slot.edits[0].seed for slot in recipe.slots}
            assert recipe.slots == tuple(
                Slot(((Ref("instruct", p), 1.0),), (Permute(drawn, p, what),)) for p in range(30)
            )
            seeds.append(drawn)
        assert experiment.plan(30).to_json()["control"] == "placebo" and not experiment.plan(30).collapsed
    assert len(set(seeds)) == 3 * len(PLACEBOS) == 63


def test_the_order_of_priority():
    """The first six tell a small whole story, with a placebo and the short positive control; other placebos
    come last, after the surgeries of one model."""
    names = [e.name for e in ex.EXPERIMENTS]
    assert names[:6] == [
        "baseline_instruct",
        "baseline_base",
        "franken_instruct_first_32",
        "franken_base_first_32",
        "placebo_both_1",
        "concept_injection_short",
    ]
    assert names[6:9] == ["swap_distant_10_55", "shuffle_all", "concept_injection"]
    assert names[-20:] == [name for name in PLACEBOS if name != "placebo_both_1"]
    of_one_model = [NAMED[name].group for name in names[names.index("delete_first_4") : -20]]
    assert set(of_one_model[: of_one_model.index("contribution")]) == {"depth"}
    assert "sham_permute_all" not in names


def test_all_names_are_covered_and_known():
    """Every experiment is tested above; the names of the first version, written out, are all there; names are
    file names."""
    tested = {*AT_64, *CONTRIBUTIONS, *NOISE, *BASE_SHARE, "shuffle_all", *PLACEBOS}
    assert set(NAMED) - tested == set(), "their layers are to be written out in AT_64"
    assert tested <= set(NAMED)
    assert len(NAMED) == len(ex.EXPERIMENTS)
    of_the_first_version = [
        "baseline_instruct",
        "baseline_base",
        "swap_adjacent_30_35",
        "swap_adjacent_31_32",
        "swap_distant_10_55",
        "swap_distant_5_60",
        "swap_chunk_25_35_with_45_55",
        "swap_chunk_16_32_with_32_48",
        "shuffle_all",
        "franken_base_first_16",
        "franken_base_first_32",
        "franken_base_first_48",
        "franken_instruct_first_16",
        "franken_instruct_first_32",
        "franken_instruct_first_48",
        "blend_linear",
        "blend_early_base",
        "blend_late_base",
        "perturb_late_1pct",
        "perturb_late_5pct",
        "perturb_late_10pct",
        "perturb_all_1pct",
        "perturb_all_5pct",
    ]
    assert set(of_the_first_version) <= set(NAMED)
    # surgery on one model
    assert {"delete", "double", "repeat", "reverse", "keep"} <= {name.split("_")[0] for name in NAMED}
    assert ex.EXPERIMENTS[0].name == "baseline_instruct" and all(
        e.hypothesis and e.group for e in ex.EXPERIMENTS
    )
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in NAMED)


def test_published_windows_of_base_layers():
    """Every window that the page prints, and nothing at another depth or for another source."""
    swept = ex.sweep("window", 64, [4, 8, 16, 32], 2)
    rows = [SimpleNamespace(name=e.name, sweep=Sweep(**e.sweep)) for e in swept]
    printed = {row.name: published.of(row, 64) for row in rows if published.of(row, 64)}
    assert len(printed) == len(published.WINDOWS) == 14
    assert (
        printed["window_base_36_52"]
        == (0.014, None, None)
        == max(printed[f"window_base_{a}_{a + 16}"] for a in (28, 30, 32, 34, 36, 38, 40, 44))
    )
    assert printed["window_base_38_54"][0] == 0.011 and printed["window_base_28_44"][0] == 2e-4
    assert not any(published.of(row, 48) for row in rows)
    other = SimpleNamespace(name="x", sweep=Sweep("window", "other", 16, 36, 52))
    assert published.of(other, 64) is None


# ---- depth -------------------------------------------------------------------------------------------------


def test_what_was_asked_and_what_was_applied_are_both_recorded():
    plan = NAMED["swap_chunk_25_35_with_45_55"].plan(30).to_json()
    assert [(p["what"], p["asked_of_64"], p["applied"]) for p in plan["positions"]] == [
        ("layers", [25, 35], [11, 15]),
        ("layers", [45, 55], [21, 25]),
    ]
    assert (
        plan["change"] == "[11:15] <- instruct[21:25]; [21:25] <- instruct[11:15]" and not plan["collapsed"]
    )
    deep = NAMED["swap_adjacent_30_35"].plan(64).to_json()
    assert [(p["what"], p["asked_of_64"], p["applied"]) for p in deep["positions"]] == [
        ("layer", 30, 30),
        ("layer", 35, 35),
    ]
    assert deep["notes"] == [] and not deep["collapsed"]


def test_users_files_may_say_model_or_recipe():
    """Model.model was the recipe's name, and stands in users' files."""
    older, newer = (
        ex.Experiment("mine", "g", build).plan(8)
        for build in (lambda m: ex.swap(m.model, 1, 2), lambda m: ex.swap(m.recipe, 1, 2))
    )
    assert older.recipe == newer.recipe != NAMED["baseline_instruct"].plan(8).recipe


def test_a_note_of_any_words_does_not_make_a_plan_collapsed():
    plan = NAMED["swap_adjacent_30_35"].plan(64)
    assert not replace(plan, notes=["collapsed: so says a note"]).collapsed
    assert replace(NAMED["swap_adjacent_31_32"].plan(7), notes=[]).collapsed


def test_experiments_that_collapse_say_so():
    """On 7 layers, layers 31 and 32 of 64 are both layer 3: the swap does nothing, which must not pass in
    silence."""
    plan = NAMED["swap_adjacent_31_32"].plan(7)
    assert plan.recipe == NAMED["baseline_instruct"].plan(7).recipe and plan.collapsed
    assert len(plan.notes) == 2 and all(note.startswith("collapsed: on 7 layers") for note in plan.notes)
    assert NAMED["reverse_24_40"].plan(2).collapsed  # one layer backwards
    assert not NAMED["baseline_instruct"].plan(2).notes and not NAMED["concept_injection"].plan(2).notes
    assert [name for name, e in NAMED.items() if e.plan(64).collapsed or e.plan(30).collapsed] == []


@pytest.mark.parametrize("depth", [*range(2, 40), 48, 61, 62, 80, 126])
def test_every_experiment_fits_every_depth(depth):
    for name, experiment in NAMED.items():
        recipe = experiment.plan(depth).recipe
        assert 1 <= len(recipe) <= max(2 * depth, depth + 9), name
        assert all(0 <= ref.layer < depth for slot in recipe.slots for ref, _ in slot.mix), name


# ---- noise on tensors --------------------------------------------------------------------------------------


def test_named_noise_differs_from_tensor_to_tensor_and_has_the_named_size(tiny_pair):
    live = tiny_pair("llama").live()
    before = [{k: t.clone() for k, t in bank.tensors.items()} for bank in live.layers]
    live.apply(NAMED["perturb_all_5pct"].plan(live.config.num_hidden_layers, seed=1).recipe)
    noise = {
        (p, k): (t - before[p][k]) / before[p][k].std(correction=0)
        for p, bank in enumerate(live.layers)
        for k, t in bank.tensors.items()
    }
    for (p, name), unit in noise.items():
        if unit.ndim == 2:
            assert 0.045 < unit.std() < 0.055, (p, name)
    same_shape = [
        unit.flatten() for unit in noise.values() if unit.shape == noise[0, "self_attn.q_proj.weight"].shape
    ]
    correlation = torch.corrcoef(torch.stack(same_shape)).fill_diagonal_(0)
    assert len(same_shape) >= 12 and correlation.abs().max() < 0.2  # 1024 numbers: 6 standard errors


# ---- sweeps and further sources --------------------------------------------------------------------------


SWEEP_KEYS = ["kind", "source", "size", "start", "stop", "dose"]


def where(e: ex.Experiment) -> tuple:
    assert list(e.sweep) == SWEEP_KEYS
    assert e.suites == ("binary", "perplexity")
    assert e.control is None
    assert e.group == f"sweep_{e.sweep['kind']}"
    return tuple(e.sweep.values())


def test_window_sweeps():
    assert [e.name for e in ex.window_sweep(1, 6)] == [f"window_base_{k}_{k + 1}" for k in range(6)]
    found = ex.window_sweep(2, 7, stride=3)
    # the next would reach beyond the model
    assert [e.name for e in found] == [
        "window_base_0_2",
        "window_base_3_5",
    ]
    assert found[1].plan(7).recipe.slots == tuple(
        plain(s, k) for s, k in inst(0, 1, 2) + base(3, 4) + inst(5, 6)
    )
    assert [where(e) for e in found] == [("window", "base", 2, 0, 2, None), ("window", "base", 2, 3, 5, None)]
    assert len(ex.window_sweep(7, 7)) == 1
    blocks = ex.sweep("delete", 9, [4], 2)
    assert [(where(e)[0], *where(e)[2:5]) for e in blocks] == [("delete", 4, a, a + 4) for a in (0, 2, 4)]
    assert blocks[1].plan(9).recipe.slots == tuple(plain(s, k) for s, k in inst(0, 1, 6, 7, 8))
    again = ex.sweep("repeat", 6, step=3)
    assert [where(e)[2:5] for e in again] == [(3, 0, 3), (6, 0, 6), (3, 3, 6)]
    assert again[0].plan(6).recipe.slots == tuple(plain(s, k) for s, k in inst(0, 1, 2, *range(6)))
    (beside,) = ex.sweep("parallel", 6)
    assert where(beside)[2:5] == (4, 0, 4) and beside.plan(6).recipe.parallel == ((0, 4),)
    for width in (0, 8):
        with pytest.raises(FrankenError, match="does not fit a model of 7"):
            ex.window_sweep(width, 7)


@pytest.mark.parametrize(
    "kind, source, expected",
    [
        ("replace", "base", [base(0) + inst(1, 2), inst(0) + base(1) + inst(2), inst(0, 1) + base(2)]),
        ("delete", None, [inst(1, 2), inst(0, 2), inst(0, 1)]),
        ("double", None, [inst(0, 0, 1, 2), inst(0, 1, 1, 2), inst(0, 1, 2, 2)]),
    ],
)
def test_sweeps_over_single_layers(kind, source, expected):
    found = ex.sweep(kind, 3)
    assert [e.name for e in found] == [f"{kind}_0", f"{kind}_1", f"{kind}_2"]
    assert [e.plan(3).recipe.slots for e in found] == [
        tuple(plain(s, k) for s, k in layers) for layers in expected
    ]
    assert [where(e) for e in found] == [(kind, source, 1, k, k + 1, None) for k in range(3)]


def test_ladders_of_doses():
    noise = ex.sweep("noise", 3)
    assert [e.name for e in noise] == [
        "noise_0.005",
        "noise_0.01",
        "noise_0.02",
        "noise_0.05",
        "noise_0.1",
        "noise_0.2",
        "noise_0.5",
    ]
    assert where(noise[3]) == ("noise", None, None, None, None, 0.05)
    assert noise[3].plan(3, seed=4).recipe.slots == tuple(
        Slot(((Ref("instruct", p), 1.0),), (Noise(0.05, 4, p),)) for p in range(3)
    )
    blends = ex.sweep("blend", 3)
    assert [e.name for e in blends] == [f"blend_0.{k}" for k in range(1, 10)] + ["blend_1.0"]
    assert where(blends[2]) == ("blend", "base", None, None, None, 0.3)
    for p, slot in enumerate(blends[2].plan(3).recipe.slots):
        assert dict(slot.mix) == pytest.approx({Ref("instruct", p): 0.7, Ref("base", p): 0.3})
    assert blends[-1].plan(3).recipe.slots == tuple(plain(s, k) for s, k in base(0, 1, 2))


def asked(*experiments: ex.Experiment, given=None, matched_noise=False) -> list[str]:
    return ["+".join(e.suites) for e in ex.with_suites(experiments, given, matched_noise)]


def test_what_each_experiment_is_asked():
    baseline, named, placebo, injection, window = (
        NAMED["baseline_instruct"],
        NAMED["shuffle_all"],
        NAMED["placebo_mlp_1"],
        NAMED["concept_injection"],
        ex.sweep("noise", 3)[0],
    )
    everything, quick, mine = (
        "+".join(prompts.GROUPS["all"]),
        "binary+perplexity",
        ex.Experiment("m", "g", lambda m: m.model, suites=("trigger",)),
    )
    ordered = "+".join(name for name in evaluate.SUITES if name in prompts.GROUPS["all"])
    assert asked(baseline, named, placebo, window, injection) == [
        ordered,
        everything,
        quick,
        quick,
        "injection",
    ]
    # the baseline: whatever the others are asked
    assert asked(placebo, baseline, injection) == [
        quick,
        quick,
        "injection",
    ]
    assert asked(baseline, mine, placebo) == ["binary+perplexity+trigger", "trigger", quick]
    assert asked(baseline) == asked(baseline, injection)[0].split() == [everything]
    assert asked(baseline, named, placebo, mine, injection, given=("chat",)) == ["chat"] * 4 + ["injection"]
    assert asked(baseline, injection, given=("chat",)) == ["chat", "injection"]
    # what the noise twin is asked
    assert asked(baseline, mine, matched_noise=True) == [
        "binary+perplexity+trigger",
        "trigger",
    ]


def test_windows_of_a_further_source():
    found = {
        e.name: [slot.mix[0][0].source for slot in e.plan(8).recipe.slots] for e in ex.for_source("rune")
    }
    r, i = "rune", "instruct"
    assert found == {
        "rune_whole": [r] * 8,
        "rune_early_half": [r] * 4 + [i] * 4,
        "rune_late_half": [i] * 4 + [r] * 4,
        "rune_window_0_16": [r, r] + [i] * 6,
        "rune_window_16_32": [i, i, r, r] + [i] * 4,
        "rune_window_32_48": [i] * 4 + [r, r, i, i],
        "rune_window_48_64": [i] * 6 + [r, r],
    }


def test_select_keeps_the_order_and_names_the_nearest():
    names = ["shuffle_all", "baseline_base", "shuffle_all"]
    assert [e.name for e in ex.select(names, ex.EXPERIMENTS)] == ["shuffle_all", "baseline_base"]
    for wrong, near in (
        ("swap_adjacent_30_36", "swap_adjacent_30_35"),
        ("perturb_late_2pct", "perturb_late_[15]pct"),
        ("%", ""),
    ):
        with pytest.raises(FrankenError, match=f"unknown experiment '{wrong}'; the nearest is '{near}"):
            ex.select([wrong], ex.EXPERIMENTS)


def test_tiny_models_hold_every_named_experiment(tiny_pair):
    """Nothing of what is named fails on a real (tiny) model, and every one comes back exactly."""
    live = tiny_pair("qwen2").live()
    before = live.fingerprint()
    for experiment in ex.EXPERIMENTS:
        recipe = experiment.plan(6).recipe
        live.apply(recipe)
        assert (live.fingerprint() == before) == (recipe == live.original), experiment.name
    live.apply(live.original)
    assert (
        live.fingerprint() == before
        and tiny.engine_logits(tiny_pair("qwen2").engine(live), (5, 6, 7)).isfinite().all()
    )
