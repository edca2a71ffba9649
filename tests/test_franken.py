"""The live model against models rebuilt from state dicts, and against the checkpoint's own bits on the way
back."""

import json

import pytest
import tiny
import torch
from moves import IDS, MOVES, N, assert_is_checkpoint, instruct

import franken
from franken import LiveModel
from surgery import recipes as r
from surgery.weights import Adapter, Checkpoint


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_moves_equal_a_model_rebuilt_by_hand(tiny_pair, family):
    pair = tiny_pair(family)
    live = pair.live()
    engine = pair.engine(live)
    for name, (
        operation,
        layers,
    ) in MOVES.items():  # one live model through all of them: history must not matter
        live.apply(operation(live.original))
        want = tiny.hf_logits(pair.rebuilt(layers), IDS)
        torch.testing.assert_close(
            tiny.engine_logits(engine, IDS), want, atol=2e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


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
    assert (
        live.fingerprint()
        == LiveModel(
            {"base": Checkpoint("base", pair.paths["base"])}, pair.config, torch.float32, torch.device("cpu")
        ).fingerprint()
    )


def test_untied_ends_can_come_from_two_sources(tiny_pair):
    pair = tiny_pair("qwen2")
    live = pair.live()
    live.apply(r.Recipe(live.original.slots, "base", "instruct", "base"))
    outer = {k: v for k, v in pair.states["base"].items() if ".layers." not in k}
    outer["model.norm.weight"] = pair.states["instruct"]["model.norm.weight"]
    layers = {k: v for k, v in pair.states["instruct"].items() if ".layers." in k}
    want = tiny.hf_logits(tiny.build(pair.config, outer | layers, pair.config.layer_types), IDS)
    torch.testing.assert_close(tiny.engine_logits(pair.engine(live), IDS), want, atol=2e-4, rtol=1e-4)


# ---- blends, noise, permutation ----------------------------------------------------------------------------


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
            want = a.double() * (1 - share) + b.double() * share
            # of float32 the sum's own two roundings, of bfloat16 the one that follows
            allowed = 3e-7 * (a.abs() * abs(1 - share) + b.abs() * share) + want.abs() * (
                2**-8 if dtype == torch.bfloat16 else 0
            )
            assert ((tensor.double() - want).abs() <= allowed).all(), (p, name)


def test_blend_of_moved_layers_and_three_sources(tmp_path):
    pair = tiny.Tiny(tmp_path, "llama", names=("instruct", "base", "third"))
    live = pair.live()
    recipe = r.blend(r.blend(r.swap(live.original, 1, 4), "base", [0.5] * N), "third", [0.2] * N)
    live.apply(recipe)
    for p, source in enumerate([0, 4, 2, 3, 1, 5]):
        want = {
            k: 0.4 * v + 0.4 * pair.layer("base", p)[k] + 0.2 * pair.layer("third", p)[k]
            for k, v in pair.layer("instruct", source).items()
        }
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
    # Gaussian, not uniform
    assert abs(float((everything.abs() < 1).double().mean()) - 0.6827) < 5 * (0.6827 * 0.3173 / n) ** 0.5
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
    # not on what else is perturbed
    assert all(torch.equal(noise_of(other, pair, 2)[k], v) for k, v in alone.items())
    other.apply(r.perturb(r.perturb(other.original, 0.1, 3, [2]), 0.1, 3, [1]))
    assert other.fingerprint() == one  # nor on the order
    other.apply(r.perturb(r.shuffle(other.original, 1), 0.7, 9))
    other.apply(r.perturb(other.original, 0.1, 3, [1, 2]))
    assert other.fingerprint() == one  # nor on what ran before

    live.apply(r.perturb(live.original, 0.1, 4, [1, 2]))
    assert live.fingerprint() != one  # but on the seed
    first, second = noise_of(live, pair, 1), noise_of(live, pair, 2)
    for a, b in [
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        ("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ]:
        assert abs(float(torch.corrcoef(torch.stack([first[a].flatten(), first[b].flatten()]))[0, 1])) < 0.2
    for name in ("mlp.gate_proj.weight", "self_attn.q_proj.weight"):
        assert (
            abs(float(torch.corrcoef(torch.stack([first[name].flatten(), second[name].flatten()]))[0, 1]))
            < 0.2
        )


def test_noise_travels_with_its_layer(tiny_pair):
    pair = tiny_pair("llama")
    live, other = pair.live(), pair.live()
    live.apply(r.perturb(live.original, 0.1, 3, [1]))
    other.apply(r.swap(r.perturb(other.original, 0.1, 3, [1]), 1, 5))
    here, there = live.layers[1].tensors, other.layers[5].tensors
    assert all(torch.equal(here[k], there[k]) for k in here)


HEAD_SIDE = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP_SIDE = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


@pytest.mark.parametrize(
    "what, permuted", [("mlp", MLP_SIDE), ("heads", HEAD_SIDE), ("both", MLP_SIDE | HEAD_SIDE)]
)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_permuted_units_are_other_weights_and_the_same_function(tiny_pair, family, what, permuted):
    pair = tiny_pair(family)
    live = pair.live()
    engine = pair.engine(live)
    before = tiny.engine_logits(engine, IDS)
    live.apply(r.permute_units(live.original, 5, what))
    torch.testing.assert_close(tiny.engine_logits(engine, IDS), before, atol=3e-4, rtol=1e-3)
    for module in sorted(HEAD_SIDE | MLP_SIDE):
        pairs = [
            (live.layers[p].tensors[module + ".weight"], pair.layer("instruct", p)[module + ".weight"])
            for p in range(N)
        ]
        # the same numbers, elsewhere
        assert all(torch.equal(a.flatten().sort()[0], b.flatten().sort()[0]) for a, b in pairs)
        moved = sum(not torch.equal(a, b) for a, b in pairs)
        if module not in permuted:
            assert moved == 0
        else:  # of 4 heads in 2 groups, the order may come out unchanged
            assert moved == N if module in MLP_SIDE else moved >= N / 3, module
    norms = [
        (live.layers[p].tensors[k], v)
        for p in range(N)
        for k, v in pair.layer("instruct", p).items()
        if "norm" in k
    ]
    assert norms and all(torch.equal(a, b) for a, b in norms)
    once = live.fingerprint()
    live.apply(r.permute_units(live.original, 6, what))
    assert live.fingerprint() != once
    live.apply(live.original)
    assert_is_checkpoint(live, pair)


@pytest.mark.parametrize("what", ["mlp", "heads", "both"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_placebo_is_taken_back_on_the_device_to_the_bit(tiny_pair, family, what):
    pair = tiny_pair(family)
    live = pair.live()
    live.apply(r.permute_units(r.permute_units(live.original, 5, what), 6, what))
    back = live.apply(live.original)
    assert back.bytes_streamed == 0
    assert back.positions == list(range(N))
    assert_is_checkpoint(live, pair)


def test_only_permutations_are_taken_back_without_the_checkpoint(tiny_pair):
    pair = tiny_pair("qwen2")
    live = pair.live()
    noisy = r.perturb(live.original, 0.1, seed=1, positions=[2])
    # noise cannot be subtracted to the bit: its layer is read again, permuted before or after
    live.apply(r.permute_units(noisy, 5))
    assert live.apply(noisy).bytes_streamed == 0
    assert live.apply(live.original).bytes_streamed == live.layer_bytes()
    live.apply(r.perturb(r.permute_units(live.original, 5), 0.1, seed=1, positions=[2]))
    assert live.apply(live.original).bytes_streamed == live.layer_bytes()
    assert_is_checkpoint(live, pair)


def test_layers_permuted_and_moved_come_back_from_where_they_are(tiny_pair):
    pair = tiny_pair("qwen2")
    live = pair.live()
    live.apply(r.swap(r.permute_units(live.original, 5), 0, N - 1))
    assert live.apply(live.original).bytes_streamed == 0
    assert_is_checkpoint(live, pair)


def test_both_permutations_are_the_two_of_their_seed(tiny_pair):
    live = tiny_pair("qwen2").live()
    live.apply(r.permute_units(r.permute_units(live.original, 5, "mlp"), 5, "heads"))
    one = live.fingerprint()
    live.apply(r.permute_units(live.original, 5))
    assert live.fingerprint() == one


@pytest.mark.parametrize("kv_heads", [1, 2, 8])  # one group, groups of four, a group each
def test_heads_stay_with_the_keys_they_look_at(tmp_path, kv_heads):
    """With 8 heads of width 4: query heads of one group still stand together, before their own output
    columns."""
    pair = tiny.Tiny(
        tmp_path, "qwen2", names=("instruct",), num_attention_heads=8, num_key_value_heads=kv_heads
    )
    live = pair.live()
    engine = pair.engine(live)
    before = tiny.engine_logits(engine, IDS)
    live.apply(r.permute_units(live.original, 2, "heads"))
    torch.testing.assert_close(tiny.engine_logits(engine, IDS), before, atol=3e-4, rtol=1e-3)

    def came_from(p: int, projection: str, heads: int) -> list[int]:
        """For every head, which head of the checkpoint it was, by its rows (the columns of the output
        projection)."""
        name = f"self_attn.{projection}_proj.weight"
        new, old = (
            t.T if projection == "o" else t
            for t in (live.layers[p].tensors[name], pair.layer("instruct", p)[name])
        )
        return [
            next(j for j, o in enumerate(old.reshape(heads, 4, -1)) if torch.equal(o, h))
            for h in new.reshape(heads, 4, -1)
        ]

    changed = 0
    for p in range(N):
        q, k = came_from(p, "q", 8), came_from(p, "k", kv_heads)
        assert came_from(p, "o", 8) == q and came_from(p, "v", kv_heads) == k
        assert [head * kv_heads // 8 for head in q] == [g for g in k for _ in range(8 // kv_heads)]
        changed += q != list(range(8))
    assert changed == N


# ---- loading -----------------------------------------------------------------------------------------------


def test_weights_are_those_of_transformers_own_loading_in_bf16(tmp_path):
    path = tiny.write_checkpoint(tmp_path / "bf16", "qwen3", seed=1, dtype=torch.bfloat16, shards=3)
    live = LiveModel(
        {"instruct": Checkpoint("instruct", path)},
        tiny.make_config("qwen3"),
        torch.bfloat16,
        torch.device("cpu"),
    )
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
    state = {
        k.replace("model.", "language_model.model.", 1): v.clone() for k, v in pair.states["instruct"].items()
    }
    state["vision_tower.encoder.layers.0.mlp.weight"] = torch.randn(3, 3)
    state["vision_tower.norm.weight"] = torch.randn(3)
    tiny.save_file(state, folder / "model.safetensors")
    places = {
        "model.embed_tokens": torch.device("cpu"),
        "model.layers": torch.device("cpu"),
        "": torch.device("cpu"),
    }
    live = LiveModel({"instruct": Checkpoint("instruct", folder)}, pair.config, torch.float32, places)
    assert live.fingerprint() == pair.live().fingerprint()


# ---- LoRA as a source --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_source_equals_peft_merged(tiny_pair, tmp_path, rslora):
    from peft import LoraConfig, get_peft_model

    pair = tiny_pair("llama")
    model = franken.AutoModelForCausalLM.from_pretrained(pair.paths["instruct"], dtype=torch.float32)
    torch.manual_seed(0)
    wrapped = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=12, use_rslora=rslora, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = {k: v.clone() for k, v in wrapped.merge_and_unload().state_dict().items()}

    under = Checkpoint("instruct", pair.paths["instruct"])
    live = LiveModel(
        {"instruct": under, "tuned": Adapter("tuned", tmp_path / "adapter", under)},
        pair.config,
        torch.float32,
        torch.device("cpu"),
    )
    start = live.fingerprint()
    live.apply(r.splice(live.original, "tuned", 1, 4))
    for p, bank in enumerate(live.layers):
        want = tiny.layer_state(merged if 1 <= p < 4 else pair.states["instruct"], p)
        for name, tensor in bank.tensors.items():
            torch.testing.assert_close(tensor, want[name], atol=1e-6, rtol=1e-5)
    assert not torch.equal(
        live.layers[2].tensors["mlp.down_proj.weight"], pair.layer("instruct", 2)["mlp.down_proj.weight"]
    )
    live.apply(r.blend(live.original, "tuned", [0.5] * N))
    for name, tensor in live.layers[3].tensors.items():
        half = (pair.layer("instruct", 3)[name] + tiny.layer_state(merged, 3)[name]) / 2
        torch.testing.assert_close(tensor, half, atol=1e-6, rtol=1e-5)
    live.apply(live.original)
    assert live.fingerprint() == start
    entry = live.sources["tuned"].describe()
    assert entry["kind"] == "LoRA adapter"
    assert entry["over"] == "instruct"
    assert json.dumps(entry)
