"""Back to the original, to the bit, from wherever the live model has been; what moves on the way, and what
cannot work."""

import shutil

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moves import IDS, MOVES, N, assert_is_checkpoint, instruct
from transformers import AutoTokenizer

import franken
from engine.generation import Engine
from errors import FrankenError
from franken import LiveModel
from surgery import recipes as r
from surgery.weights import Checkpoint


def steps():
    block = st.tuples(st.integers(0, N - 1), st.integers(1, N)).map(
        lambda t: (min(t[0], t[1] - 1), max(t[0] + 1, t[1]))
    )
    position = st.integers(0, N - 1)
    source = st.sampled_from(["instruct", "base"])
    return st.one_of(
        st.tuples(position, position).map(lambda t: lambda x: r.swap(x, t[0] % len(x), t[1] % len(x))),
        st.integers(0, 99).map(lambda s: lambda x: r.shuffle(x, s)),
        st.tuples(source, block).map(lambda t: lambda x: r.splice(x, t[0], *t[1]) if len(x) >= N else x),
        st.just(lambda x: r.with_outer(x, "base")),
        st.floats(-0.5, 1.5).map(
            lambda s: (
                lambda x: (
                    r.blend(x, "base", [s] * N) if len(x) == N and not any(k.edits for k in x.slots) else x
                )
            )
        ),
        st.integers(0, 3).map(lambda s: lambda x: r.perturb(x, 0.1, s, [0, len(x) - 1])),
        st.integers(0, 3).map(lambda s: lambda x: r.permute_units(x, s)),
        block.map(lambda b: lambda x: r.double(x, *b) if N <= len(x) < 14 else x),
        block.map(lambda b: lambda x: r.repeat(x, *b) if N <= len(x) < 14 else x),
        block.map(lambda b: lambda x: r.reverse(x, *b) if len(x) >= N else x),
        block.map(lambda b: lambda x: r.delete(x, *b) if len(x) >= N and b != (0, N) else x),
        st.integers(1, 3).map(lambda n: lambda x: r.keep_every(x, n)),
    )


def build_recipe(parts):
    recipe = r.identity(N)
    for part in parts:
        recipe = part(recipe)
    return recipe


@pytest.fixture(scope="module")
def walkers(tiny_pair):
    """Live models that are never made anew: every example starts from whatever the last one left."""
    pair = tiny_pair("qwen2")
    return pair, [pair.live(), pair.live(resident=("base",))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(walk=st.lists(st.lists(steps(), max_size=4), min_size=1, max_size=3))
def test_any_walk_ends_where_it_began(walkers, walk):
    pair, lives = walkers
    fingerprints = []
    for live in lives:
        start = live.fingerprint()
        for parts in walk:
            live.apply(build_recipe(parts))
        fingerprints.append(live.fingerprint())
        live.apply(live.original)
        assert live.fingerprint() == start
        assert_is_checkpoint(live, pair)
    assert fingerprints[0] == fingerprints[1]  # what is parked where does not enter


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(history=st.lists(steps(), max_size=4), target=st.lists(steps(), max_size=4))
def test_the_result_does_not_depend_on_the_route(walkers, history, target):
    pair, (live, other) = walkers
    recipe = build_recipe(target)
    live.apply(build_recipe(history))
    live.apply(recipe)
    other.apply(other.original)
    other.apply(recipe)
    assert live.fingerprint() == other.fingerprint()
    for p, slot in enumerate(recipe.slots):
        if slot.is_plain:
            clean = pair.layer(slot.mix[0][0].source, slot.mix[0][0].layer)
            assert all(torch.equal(t, clean[k]) for k, t in live.layers[p].tensors.items()), (p, slot)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_changes_the_fingerprint(walkers, data):
    _, (live, _) = walkers
    live.apply(live.original)
    before = live.fingerprint()
    tensors = [t for bank in live.layers for t in bank.tensors.values()] + [
        t for part in live.outer.values() for t in part.values()
    ]
    tensor = tensors[data.draw(st.integers(0, len(tensors) - 1))].view(-1).view(torch.int32)
    where, bit = data.draw(st.integers(0, tensor.numel() - 1)), data.draw(st.integers(0, 30))
    tensor[where] ^= 1 << bit
    assert live.fingerprint() != before
    tensor[where] ^= 1 << bit
    assert live.fingerprint() == before


def test_fingerprint_sees_every_kind_of_change(tiny_pair):
    live = tiny_pair("qwen2").live()
    seen = {}
    recipes = [operation(live.original) for operation, _ in MOVES.values()]
    recipes += [r.with_outer(live.original, "base"), r.identity(N, "base"), r.permute_units(live.original, 0)]
    recipes += [
        r.Recipe(live.original.slots, *outer)
        for outer in [
            ("base", "instruct", "instruct"),
            ("instruct", "base", "instruct"),
            ("instruct", "instruct", "base"),
        ]
    ]
    for recipe in recipes:
        live.apply(recipe)
        seen[live.fingerprint()] = recipe
    assert len(seen) == len(recipes)


# ---- what moves, and what it costs -------------------------------------------------------------------------


@pytest.fixture
def spares(monkeypatch):
    """How often spare memory was asked for, and every layer-sized allocation made through it."""
    made = []
    real = LiveModel._spare_for

    def counting(self, *given):
        before = len(self._spare)
        spare = real(self, *given)
        made.append(len(self._spare) > before)
        return spare

    monkeypatch.setattr(LiveModel, "_spare_for", counting)
    return made


@pytest.mark.parametrize("seed", range(5))
def test_shuffle_streams_nothing_and_needs_one_layer_of_spare_memory(tiny_pair, spares, seed):
    live = tiny_pair("llama").live()
    storages = [{k: t.data_ptr() for k, t in bank.tensors.items()} for bank in live.banks]
    done = live.apply(r.shuffle(live.original, seed))
    assert sum(spares) == 1 and len(live.banks) == N
    assert storages == [{k: t.data_ptr() for k, t in bank.tensors.items()} for bank in live.banks]
    assert done.bytes_streamed == 0 and done.bytes_computed == 0
    assert done.bytes_moved == (N + 1) * live.layer_bytes()  # one cycle: every layer once, one of them twice
    assert done.positions == list(range(N))
    back = live.apply(live.original)
    assert back.bytes_streamed == 0 and sum(spares) == 1


def test_bytes_are_counted(tiny_pair):
    pair = tiny_pair("llama")
    live = pair.live()
    one = live.layer_bytes()
    assert one == sum(t.numel() * 4 for t in pair.layer("instruct", 0).values())

    def cost(recipe):
        done = live.apply(recipe)
        return done.bytes_moved // one, done.bytes_streamed // one, done.bytes_computed // one, done.positions

    start = live.original
    assert cost(start) == (0, 0, 0, [])
    assert cost(r.swap(start, 1, 4)) == (3, 0, 0, [1, 4])
    assert cost(r.swap(start, 1, 4)) == (0, 0, 0, [])
    assert cost(r.swap(start, 2, 3)) == (6, 0, 0, [1, 2, 3, 4])
    assert cost(start) == (3, 0, 0, [2, 3])
    assert cost(r.splice(start, "base", 0, 2)) == (0, 2, 0, [0, 1])
    assert cost(start) == (0, 2, 0, [0, 1])
    assert cost(r.perturb(start, 0.1, 0, [5])) == (0, 0, 1, [5])
    assert cost(start) == (0, 1, 0, [5])
    assert cost(r.blend(start, "base", [0.5] * N)) == (0, N, N, list(range(N)))
    assert cost(start) == (0, N, 0, list(range(N)))
    assert cost(r.delete(start, 1, 4)) == (0, 0, 0, [])
    assert cost(r.double(start, 1, 4)) == (0, 0, 0, [])  # a repeated layer runs twice from one storage
    assert cost(r.reverse(r.delete(start, 4, 6), 0, 4)) == (0, 0, 0, [])
    assert cost(start) == (0, 0, 0, [])
    assert live.apply(r.Recipe(start.slots, "instruct", "base", "instruct")).bytes_streamed == 32 * 4


def test_a_resident_source_is_copied_not_streamed(tiny_pair):
    pair = tiny_pair("llama")
    live = pair.live(resident=("base",))
    one = live.layer_bytes()
    assert live.fingerprint() == pair.live().fingerprint()
    for recipe in (
        r.splice(live.original, "base", 1, 5),
        r.splice(live.original, "base", 0, 3),
        live.original,
        r.swap(r.splice(live.original, "base", 2, 4), 0, 2),
        live.original,
    ):
        assert live.apply(recipe).bytes_streamed == 0, recipe
    done = live.apply(r.blend(live.original, "base", [0.5] * N))
    assert done.bytes_streamed == 0 and done.bytes_computed == N * one
    live.apply(live.original)
    assert_is_checkpoint(live, pair)


def test_a_layer_added_for_a_deep_recipe_is_used_again(tiny_pair):
    live = tiny_pair("qwen2-alternating").live()
    deep = r.Recipe(live.original.slots + r.identity(N, "base").slots, *["instruct"] * 3)
    live.apply(deep)
    assert len(live.banks) == 2 * N
    live.apply(live.original)
    live.apply(r.perturb(deep, 0.1, 0))
    live.apply(deep)
    assert len(live.banks) == 2 * N


# ---- what cannot work --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, make, words",
    [
        ("qwen2", lambda x: r.splice(x, "nobody", 0, 2), "'nobody'"),
        (
            "qwen2",
            lambda x: r.Recipe((*x.slots, r.plain("base", N)), *["base"] * 3),
            "layer 6 of base does not exist",
        ),
        ("qwen2", lambda x: r.Recipe((r.plain("base", -1),), *["base"] * 3), "layer -1 of base"),
        ("llama", lambda x: r.Recipe(x.slots, "instruct", "instruct", "base"), "one tensor"),
        ("gemma3", lambda x: r.blend(r.swap(x, 0, 1), "base", r.linear), "different attention kinds"),
    ],
)
def test_impossible_recipes_change_nothing(tiny_pair, family, make, words):
    live = tiny_pair(family).live()
    before = live.fingerprint(), live.recipe
    with pytest.raises(FrankenError, match=words) as caught:
        live.apply(make(live.original))
    assert "\n" not in str(caught.value)
    assert (live.fingerprint(), live.recipe) == before


def test_unknown_kinds_of_layers_are_refused(tiny_pair):
    pair = tiny_pair("qwen2")
    config = tiny.make_config("qwen2")
    config.layer_types = ["linear_attention"] + ["full_attention"] * 5
    with pytest.raises(FrankenError, match="linear_attention"):
        LiveModel(
            {"instruct": Checkpoint("instruct", pair.paths["instruct"])},
            config,
            torch.float32,
            torch.device("cpu"),
        )


FAILURES = [
    lambda x: r.splice(x, "base", 0, N),
    lambda x: r.swap(r.splice(x, "base", 2, 4), 1, 2),
    lambda x: r.blend(r.swap(x, 0, 2), "base", [0, 0.5, 0.3, 0.5, 1, 1]),
    lambda x: r.Recipe(r.swap(x, 0, 1).slots[:4] + (r.plain("base", 0), r.plain("base", 1)), *["base"] * 3),
    lambda x: r.Recipe(r.reverse(x, 0, N).slots + r.identity(N, "base").slots, *["instruct"] * 3),
    lambda x: r.swap(r.with_outer(x, "base"), 0, 1),
]


@pytest.mark.parametrize("resident", [(), ("base",)])
@pytest.mark.parametrize("family", ["qwen2-alternating", "gemma3"])
@pytest.mark.parametrize("make", FAILURES)
@pytest.mark.parametrize("share, again", [(0.1, False), (0.5, True), (0.8, False)])
def test_a_read_error_halfway_is_repaired_by_the_next_apply(
    tiny_pair, tmp_path, family, make, resident, share, again
):
    """The base's file loses its end while in use, as on a failing disk, then comes back; some tensors arrive,
    some not."""
    pair = tiny_pair(family)
    file = shutil.copytree(pair.paths["base"], tmp_path / "base") / "model.safetensors"
    live = pair.live(base=Checkpoint("base", tmp_path / "base"), resident=resident)
    engine, content, start = pair.engine(live), file.read_bytes(), live.fingerprint()
    recipe = make(live.original)
    with open(file, "r+b") as f:
        f.truncate(int(len(content) * share))
    try:
        live.apply(recipe)
    except FrankenError as e:
        assert str(file) in str(e)
        assert "\n" not in str(e)
        assert live.recipe is None
    else:
        assert resident or share > 0.1  # what is resident or lies in the part that is left needs nothing more
    file.write_bytes(content)
    for target in [recipe] * again + [live.original]:
        live.apply(target)
        fresh = pair.live()
        fresh.apply(target)
        assert live.fingerprint() == fresh.fingerprint()
        assert live.attention_kinds() == fresh.attention_kinds()
        torch.testing.assert_close(
            tiny.engine_logits(engine, IDS), tiny.engine_logits(pair.engine(fresh), IDS), atol=0, rtol=0
        )
    assert live.fingerprint() == start
    assert_is_checkpoint(live, pair)


def test_kinds_after_a_failed_apply_that_had_already_moved_layers(tiny_pair, monkeypatch):
    """The swap is done when the read fails; applying the same recipe again moves nothing and must still set
    the kinds."""
    pair = tiny_pair("gemma3")
    live = pair.live()
    engine = pair.engine(live)
    recipe = r.splice(r.swap(live.original, 0, 1), "base", 5, 6)

    def fail(self, jobs):
        raise FrankenError("the disk is gone")

    with monkeypatch.context() as m:
        m.setattr(franken.Stream, "read", fail)
        with pytest.raises(FrankenError, match="the disk is gone"):
            live.apply(recipe)
    live.apply(recipe)
    want = tiny.hf_logits(pair.rebuilt([*instruct(1, 0, 2, 3, 4), ("base", 5)]), IDS)
    torch.testing.assert_close(tiny.engine_logits(engine, IDS), want, atol=2e-4, rtol=1e-4)


# ---- the real weights --------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_weights_apply_and_return_exactly(smollm2):
    config = franken.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).config
    live = LiveModel(
        {"instruct": Checkpoint("instruct", smollm2)}, config, torch.bfloat16, torch.device("cpu")
    )
    start, original = live.fingerprint(), live.original
    state = tiny.read_states(smollm2)
    for recipe in (
        r.shuffle(original, 0),
        r.perturb(original, 0.05, 0),
        r.permute_units(original, 0),
        r.double(r.reverse(original, 3, 9), 4, 8),
        r.keep_every(original, 3),
        r.swap(original, 14, 16),
    ):
        live.apply(recipe)
        assert live.fingerprint() != start
    live.apply(original)
    assert live.fingerprint() == start
    for name, parameter in live.model.named_parameters():
        assert torch.equal(parameter, state[name]), name


@pytest.mark.real
@pytest.mark.parametrize("what", ["mlp", "heads", "both"])
def test_real_placebos_compute_the_same_function(smollm2, what):
    config = franken.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).config
    live = LiveModel(
        {"instruct": Checkpoint("instruct", smollm2)}, config, torch.float32, torch.device("cpu")
    )
    engine = Engine(live, AutoTokenizer.from_pretrained(smollm2))
    before = tiny.engine_logits(engine, IDS)
    state = tiny.read_states(smollm2)
    live.apply(r.permute_units(live.original, 1, what))
    torch.testing.assert_close(tiny.engine_logits(engine, IDS), before, atol=2e-3, rtol=1e-3)
    layers = [
        (name, p) for name, p in live.model.named_parameters() if ".layers." in name and "norm" not in name
    ]
    changed = {name for name, p in layers if not torch.equal(p, state[name])}
    concerned = {name for name, _ in layers if what == "both" or (".mlp." in name) == (what == "mlp")}
    # three groups keep their order in one layer of six
    assert changed <= concerned and len(changed) > 0.8 * len(concerned)
