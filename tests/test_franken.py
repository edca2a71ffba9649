"""The live model against models rebuilt from state dicts, and against the checkpoint's own bits on the way back."""

import json
import shutil

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import franken
import recipes as r
from franken import LiveModel
from weights import Adapter, Checkpoint, FrankenError

N = 6
IDS = tiny.random_prompt(1, 17)  # longer than the sliding window, so that the kinds of layers matter


def instruct(*indices):
    return [("instruct", i) for i in indices]


MOVES = {
    "identity": (lambda x: x, instruct(0, 1, 2, 3, 4, 5)),
    "swap": (lambda x: r.swap(x, 1, 4), instruct(0, 4, 2, 3, 1, 5)),
    "swap_chunks": (lambda x: r.swap_chunks(x, (0, 2), (3, 5)), instruct(3, 4, 2, 0, 1, 5)),
    "rotate": (lambda x: r.swap(r.swap(x, 0, 1), 1, 2), instruct(1, 2, 0, 3, 4, 5)),
    "splice": (lambda x: r.splice(x, "base", 1, 3), [("instruct", 0), ("base", 1), ("base", 2), *instruct(3, 4, 5)]),
    "splice+swap": (lambda x: r.swap(r.splice(x, "base", 0, 2), 0, 5), [*instruct(5), ("base", 1), *instruct(2, 3, 4), ("base", 0)]),
    "delete": (lambda x: r.delete(x, 1, 4), instruct(0, 4, 5)),
    "delete one kind": (lambda x: r.keep_every(x, 2), instruct(0, 2, 4)),
    "double": (lambda x: r.double(x, 2, 4), instruct(0, 1, 2, 2, 3, 3, 4, 5)),
    "repeat": (lambda x: r.repeat(x, 1, 3, 3), instruct(0, 1, 2, 1, 2, 1, 2, 3, 4, 5)),
    "reverse": (lambda x: r.reverse(x, 0, 5), instruct(4, 3, 2, 1, 0, 5)),
    "same depth, one layer twice": (lambda x: r.delete(r.double(x, 2, 3), 5, 6), instruct(0, 1, 2, 2, 3, 5)),
    "more different layers than banks": (
        lambda x: r.Recipe(x.slots + r.identity(N, "base").slots, "instruct", "instruct", "instruct"),
        instruct(*range(6)) + [("base", i) for i in range(6)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_moves_equal_a_model_rebuilt_by_hand(tiny_pair, family):
    pair = tiny_pair(family)
    live = pair.live()
    engine = pair.engine(live)
    for name, (operation, layers) in MOVES.items():  # one live model through all of them: history must not matter
        live.apply(operation(live.original))
        want = tiny.hf_logits(pair.rebuilt(layers), IDS)
        torch.testing.assert_close(tiny.engine_logits(engine, IDS), want, atol=2e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", tiny.ALTERNATE)
def test_the_oracle_would_notice_a_kind_that_stayed_behind(tiny_pair, family):
    pair = tiny_pair(family)
    layers, kinds = instruct(1, 0, 2, 3, 4, 5), pair.config.layer_types
    right, wrong = pair.rebuilt(layers), pair.rebuilt(layers, types=kinds)
    assert (tiny.hf_logits(right, IDS) - tiny.hf_logits(wrong, IDS)).abs().max() > 0.01
    live = pair.live()
    live.apply(r.swap(live.original, 0, 1))
    assert live.attention_kinds() == [kinds[1], kinds[0], *kinds[2:]]


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # tied and untied
def test_outer_parts_come_from_their_source(tiny_pair, family):
    pair = tiny_pair(family)
    live = pair.live()
    engine = pair.engine(live)
    live.apply(r.with_outer(live.original, "base"))
    want = tiny.hf_logits(pair.rebuilt(instruct(*range(6)), outer="base"), IDS)
    torch.testing.assert_close(tiny.engine_logits(engine, IDS), want, atol=2e-4, rtol=1e-4)
    live.apply(r.identity(N, "base"))
    assert live.fingerprint() == LiveModel({"base": Checkpoint("base", pair.paths["base"])}, pair.config, torch.float32,
                                           torch.device("cpu")).fingerprint()  # fmt: skip


def test_untied_ends_can_come_from_two_sources(tiny_pair):
    pair = tiny_pair("qwen2")
    live = pair.live()
    live.apply(r.Recipe(live.original.slots, "base", "instruct", "base"))
    outer = {k: v for k, v in pair.states["base"].items() if ".layers." not in k}
    outer["model.norm.weight"] = pair.states["instruct"]["model.norm.weight"]
    layers = {k: v for k, v in pair.states["instruct"].items() if ".layers." in k}
    want = tiny.hf_logits(tiny.build(pair.config, outer | layers, pair.config.layer_types), IDS)
    torch.testing.assert_close(tiny.engine_logits(pair.engine(live), IDS), want, atol=2e-4, rtol=1e-4)


# ---- blends, noise, permutation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resident", [(), ("base",)])
def test_blends_are_float32_sums_rounded_once(tiny_pair, dtype, resident):
    pair = tiny_pair("qwen2")
    live = pair.live(dtype=dtype, resident=resident)
    shares = [0.0, 0.25, 0.4, 0.7, 1.0, 1.5]
    live.apply(r.swap(live.original, 0, 5))
    live.apply(r.blend(live.original, "base", shares))
    for p, share in enumerate(shares):
        ours, theirs = pair.layer("instruct", p), pair.layer("base", p)
        for name, tensor in live.layers[p].tensors.items():
            a, b = ours[name].to(dtype).float(), theirs[name].to(dtype).float()
            assert torch.equal(tensor, (a * (1 - share) + b * share).to(dtype)), (p, name)


def test_blend_of_moved_layers_and_three_sources(tmp_path):
    pair = tiny.Tiny(tmp_path, "llama", names=("instruct", "base", "third"))
    live = pair.live()
    recipe = r.blend(r.blend(r.swap(live.original, 1, 4), "base", [0.5] * N), "third", [0.2] * N)
    live.apply(recipe)
    for p, source in enumerate([0, 4, 2, 3, 1, 5]):
        want = {k: 0.4 * v + 0.4 * pair.layer("base", p)[k] + 0.2 * pair.layer("third", p)[k]
                for k, v in pair.layer("instruct", source).items()}  # fmt: skip
        for name, tensor in live.layers[p].tensors.items():
            torch.testing.assert_close(tensor, want[name], atol=1e-6, rtol=1e-5)
    live.apply(live.original)
    assert_is_checkpoint(live, pair)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5])
def test_noise_has_the_asked_share_of_each_tensors_own_deviation(tiny_pair, fraction):
    pair = tiny_pair("llama")
    live = pair.live()
    live.apply(r.perturb(live.original, fraction, seed=3, positions=[2, 4]))
    ratios, draws = [], []
    for p in (2, 4):
        clean = pair.layer("instruct", p)
        for name, tensor in live.layers[p].tensors.items():
            noise = (tensor - clean[name]).double()
            scale = clean[name].double().std(correction=0) * fraction
            draws.append((noise / scale).flatten())
            ratios.append(float(noise.std() / scale))
    everything = torch.cat(draws)
    n = len(everything)
    assert abs(float(everything.std()) - 1) < 5 / (2 * n) ** 0.5
    assert abs(float(everything.mean())) < 5 / n**0.5
    assert abs(float((everything.abs() < 1).double().mean()) - 0.6827) < 5 * (0.6827 * 0.3173 / n) ** 0.5  # Gaussian, not uniform
    assert all(0.5 < ratio < 1.5 for ratio in ratios)  # small tensors too
    assert all(torch.equal(t, pair.layer("instruct", 3)[k]) for k, t in live.layers[3].tensors.items())


def noise_of(live, pair, position, layer=None):
    clean = pair.layer("instruct", position if layer is None else layer)
    return {k: t - clean[k] for k, t in live.layers[position].tensors.items()}


def test_noise_is_seeded_per_tensor_and_blind_to_history(tiny_pair):
    pair = tiny_pair("llama")
    live, other = pair.live(), pair.live()
    live.apply(r.perturb(live.original, 0.1, 3, [1, 2]))
    one = live.fingerprint()
    alone = noise_of(live, pair, 2)
    other.apply(r.perturb(other.original, 0.1, 3, [2]))
    assert all(torch.equal(noise_of(other, pair, 2)[k], v) for k, v in alone.items())  # not on what else is perturbed
    other.apply(r.perturb(r.perturb(other.original, 0.1, 3, [2]), 0.1, 3, [1]))
    assert other.fingerprint() == one  # nor on the order
    other.apply(r.perturb(r.shuffle(other.original, 1), 0.7, 9))
    other.apply(r.perturb(other.original, 0.1, 3, [1, 2]))
    assert other.fingerprint() == one  # nor on what ran before

    live.apply(r.perturb(live.original, 0.1, 4, [1, 2]))
    assert live.fingerprint() != one  # but on the seed
    first, second = noise_of(live, pair, 1), noise_of(live, pair, 2)
    for a, b in [("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("self_attn.k_proj.weight", "self_attn.v_proj.weight")]:
        assert abs(float(torch.corrcoef(torch.stack([first[a].flatten(), first[b].flatten()]))[0, 1])) < 0.2
    for name in ("mlp.gate_proj.weight", "self_attn.q_proj.weight"):
        assert abs(float(torch.corrcoef(torch.stack([first[name].flatten(), second[name].flatten()]))[0, 1])) < 0.2


def test_noise_travels_with_its_layer(tiny_pair):
    pair = tiny_pair("llama")
    live, other = pair.live(), pair.live()
    live.apply(r.perturb(live.original, 0.1, 3, [1]))
    other.apply(r.swap(r.perturb(other.original, 0.1, 3, [1]), 1, 5))
    here, there = live.layers[1].tensors, other.layers[5].tensors
    assert all(torch.equal(here[k], there[k]) for k in here)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_permuted_units_are_other_weights_and_the_same_function(tiny_pair, family):
    pair = tiny_pair(family)
    live = pair.live()
    engine = pair.engine(live)
    before = tiny.engine_logits(engine, IDS)
    live.apply(r.permute_units(live.original, seed=5))
    torch.testing.assert_close(tiny.engine_logits(engine, IDS), before, atol=3e-4, rtol=1e-3)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        pairs = [(live.layers[p].tensors[module + ".weight"], pair.layer("instruct", p)[module + ".weight"]) for p in range(N)]
        assert all(torch.equal(a.flatten().sort()[0], b.flatten().sort()[0]) for a, b in pairs)  # the same numbers, elsewhere
        moved = sum(not torch.equal(a, b) for a, b in pairs)
        assert moved == N if "mlp" in module else moved >= 1  # of 4 heads in 2 groups, the order may come out unchanged
    once = live.fingerprint()
    live.apply(r.permute_units(live.original, seed=6))
    assert live.fingerprint() != once
    live.apply(live.original)
    assert_is_checkpoint(live, pair)


# ---- back to the original, to the bit ----------------------------------------------------------------------------


def assert_is_checkpoint(live, pair, source="instruct"):
    """Every weight that runs equals the file's, read by safetensors itself."""
    assert len(live.layers) == pair.n
    for p, bank in enumerate(live.layers):
        clean = pair.layer(source, p)
        assert set(clean) == set(bank.tensors)
        for name, tensor in bank.tensors.items():
            assert torch.equal(tensor, clean[name]), (p, name)
    own = dict(live.model.named_parameters())
    for name, tensor in pair.states[source].items():
        assert torch.equal(own[name], tensor), name  # through the module tree as well: what transformers would run
    for p in range(pair.n):
        assert live.model.get_submodule(live.stack_name)[p] is live.layers[p].module


def steps():
    block = st.tuples(st.integers(0, N - 1), st.integers(1, N)).map(lambda t: (min(t[0], t[1] - 1), max(t[0] + 1, t[1])))
    position = st.integers(0, N - 1)
    source = st.sampled_from(["instruct", "base"])
    return st.one_of(
        st.tuples(position, position).map(lambda t: lambda x: r.swap(x, t[0] % len(x), t[1] % len(x))),
        st.integers(0, 99).map(lambda s: lambda x: r.shuffle(x, s)),
        st.tuples(source, block).map(lambda t: lambda x: r.splice(x, t[0], *t[1]) if len(x) >= N else x),
        st.just(lambda x: r.with_outer(x, "base")),
        st.floats(-0.5, 1.5).map(lambda s: lambda x: r.blend(x, "base", [s] * N) if len(x) == N and not any(k.edits for k in x.slots) else x),
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
    tensors = [t for bank in live.layers for t in bank.tensors.values()] + [t for part in live.outer.values() for t in part.values()]
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
    recipes += [r.Recipe(live.original.slots, *outer) for outer in [("base", "instruct", "instruct"), ("instruct", "base", "instruct"),
                                                                  ("instruct", "instruct", "base")]]  # fmt: skip
    for recipe in recipes:
        live.apply(recipe)
        seen[live.fingerprint()] = recipe
    assert len(seen) == len(recipes)


# ---- what moves, and what it costs -------------------------------------------------------------------------------


@pytest.fixture
def spares(monkeypatch):
    """How often spare memory was asked for, and every layer-sized allocation made through it."""
    made = []
    real = LiveModel._spare_for

    def counting(self, device):
        before = dict(self._spare)
        spare = real(self, device)
        made.append(device not in before)
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
    for recipe in (r.splice(live.original, "base", 1, 5), r.splice(live.original, "base", 0, 3), live.original,
                   r.swap(r.splice(live.original, "base", 2, 4), 0, 2), live.original):  # fmt: skip
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


# ---- what cannot work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, make, words",
    [
        ("qwen2", lambda x: r.splice(x, "nobody", 0, 2), "'nobody'"),
        ("qwen2", lambda x: r.Recipe((*x.slots, r.plain("base", N)), *["base"] * 3), "layer 6 of base does not exist"),
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
        LiveModel({"instruct": Checkpoint("instruct", pair.paths["instruct"])}, config, torch.float32, torch.device("cpu"))


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
def test_a_read_error_halfway_is_repaired_by_the_next_apply(tiny_pair, tmp_path, family, make, resident, share, again):
    """The base's file loses its end while in use, as on a failing disk, then comes back; some tensors arrive, some not."""
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
        assert str(file) in str(e) and "\n" not in str(e) and live.recipe is None
    else:
        assert resident or share > 0.1  # what is resident or lies in the part that is left needs nothing more
    file.write_bytes(content)
    for target in [recipe] * again + [live.original]:
        live.apply(target)
        fresh = pair.live()
        fresh.apply(target)
        assert live.fingerprint() == fresh.fingerprint()
        assert live.attention_kinds() == fresh.attention_kinds()
        torch.testing.assert_close(tiny.engine_logits(engine, IDS), tiny.engine_logits(pair.engine(fresh), IDS), atol=0, rtol=0)
    assert live.fingerprint() == start
    assert_is_checkpoint(live, pair)


def test_kinds_after_a_failed_apply_that_had_already_moved_layers(tiny_pair, monkeypatch):
    """The swap is done when the read fails; applying the same recipe again moves nothing and must still set the kinds."""
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


def test_weights_are_those_of_transformers_own_loading_in_bf16(tmp_path):
    path = tiny.write_checkpoint(tmp_path / "bf16", "qwen3", seed=1, dtype=torch.bfloat16, shards=3)
    live = LiveModel({"instruct": Checkpoint("instruct", path)}, tiny.make_config("qwen3"), torch.bfloat16, torch.device("cpu"))
    theirs = franken.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    ours = dict(live.model.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours[name], parameter) and ours[name].dtype == torch.bfloat16, name
    buffers = dict(live.model.named_buffers())
    for name, buffer in theirs.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_wrapped_multimodal_keys_and_devices_by_module(tmp_path, tiny_pair):
    """Layers under a wrapper's prefix are found, next to a vision tower with layers of its own."""
    pair = tiny_pair("llama")
    folder = tmp_path / "wrapped"
    folder.mkdir()
    state = {k.replace("model.", "language_model.model.", 1): v.clone() for k, v in pair.states["instruct"].items()}
    state["vision_tower.encoder.layers.0.mlp.weight"] = torch.randn(3, 3)
    state["vision_tower.norm.weight"] = torch.randn(3)
    tiny.save_file(state, folder / "model.safetensors")
    places = {"model.embed_tokens": torch.device("cpu"), "model.layers": torch.device("cpu"), "": torch.device("cpu")}
    live = LiveModel({"instruct": Checkpoint("instruct", folder)}, pair.config, torch.float32, places)
    assert live.fingerprint() == pair.live().fingerprint()


# ---- LoRA as a source --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_source_equals_peft_merged(tiny_pair, tmp_path, rslora):
    from peft import LoraConfig, get_peft_model

    pair = tiny_pair("llama")
    model = franken.AutoModelForCausalLM.from_pretrained(pair.paths["instruct"], dtype=torch.float32)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, use_rslora=rslora, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = {k: v.clone() for k, v in wrapped.merge_and_unload().state_dict().items()}

    under = Checkpoint("instruct", pair.paths["instruct"])
    live = LiveModel({"instruct": under, "tuned": Adapter("tuned", tmp_path / "adapter", under)}, pair.config, torch.float32, torch.device("cpu"))
    start = live.fingerprint()
    live.apply(r.splice(live.original, "tuned", 1, 4))
    for p, bank in enumerate(live.layers):
        want = tiny.layer_state(merged if 1 <= p < 4 else pair.states["instruct"], p)
        for name, tensor in bank.tensors.items():
            torch.testing.assert_close(tensor, want[name], atol=1e-6, rtol=1e-5)
    assert not torch.equal(live.layers[2].tensors["mlp.down_proj.weight"], pair.layer("instruct", 2)["mlp.down_proj.weight"])
    live.apply(r.blend(live.original, "tuned", [0.5] * N))
    for name, tensor in live.layers[3].tensors.items():
        half = (pair.layer("instruct", 3)[name] + tiny.layer_state(merged, 3)[name]) / 2
        torch.testing.assert_close(tensor, half, atol=1e-6, rtol=1e-5)
    live.apply(live.original)
    assert live.fingerprint() == start
    entry = live.sources["tuned"].describe()
    assert entry["kind"] == "LoRA adapter" and entry["over"] == "instruct" and json.dumps(entry)


# ---- the real weights --------------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_weights_apply_and_return_exactly(smollm2):
    config = franken.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).config
    live = LiveModel({"instruct": Checkpoint("instruct", smollm2)}, config, torch.bfloat16, torch.device("cpu"))
    start, original = live.fingerprint(), live.original
    state = tiny.read_states(smollm2)
    for recipe in (r.shuffle(original, 0), r.perturb(original, 0.05, 0), r.permute_units(original, 0),
                   r.double(r.reverse(original, 3, 9), 4, 8), r.keep_every(original, 3), r.swap(original, 14, 16)):  # fmt: skip
        live.apply(recipe)
        assert live.fingerprint() != start
    live.apply(original)
    assert live.fingerprint() == start
    for name, parameter in live.model.named_parameters():
        assert torch.equal(parameter, state[name]), name
