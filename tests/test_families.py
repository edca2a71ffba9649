"""What families do otherwise than Llama, against transformers' own eager forward pass without a cache."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from exports import exporter
from transformers import AutoModelForCausalLM

from engine.generation import Engine
from engine.sampling import Request
from errors import FrankenError
from franken import LiveModel, permute_units, perturb, repeat, swap
from runner.export import Chosen
from runner.pairs import open_pair, read_config
from runner.self_check import check_code, check_weights
from surgery.weights import Checkpoint

LIMIT = 40  # tokens after which longrope's factors are others
KINDS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "gpt_oss": dict(  # sinks, experts, alternating windows
        head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=tiny.WINDOW, layer_types=KINDS
    ),
    "exaone4": dict(  # the window stands on every module, also on those that see everything
        head_dim=8, sliding_window=tiny.WINDOW, sliding_window_pattern=4, layer_types=KINDS
    ),
    "apertus": {},  # activations with saved buffers
    "phi": dict(num_key_value_heads=4),  # a final norm of another name, a bias on the head
    "phi3": dict(
        hidden_size=64,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=LIMIT,
        sliding_window=None,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0] * 6,
            "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0],
        },
    ),
    "olmo2": {},  # norms of queries and keys with a weight for every channel of all heads
    "olmo3": dict(sliding_window=tiny.WINDOW, layer_types=KINDS),
    "stablelm": dict(qk_layernorm=True),  # one norm a head
    # experts: one matrix each on disk, one tensor for all in memory
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(  # every second layer has none
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        decoder_sparse_step=2,
    ),
}
EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "qwen2_moe")
PAIRWISE = ["sliding_attention", "full_attention"] * 2
FURTHER = {
    "arcee": {},  # no gate
    "diffllama": dict(head_dim=8),  # the difference of two attentions
    "ernie4_5": dict(head_dim=8),
    "glm": dict(head_dim=8),  # gate and up in one matrix
    "glm4": dict(head_dim=8),
    "helium": dict(head_dim=8),
    "hunyuan_v1_dense": dict(head_dim=8),
    "ministral": dict(head_dim=8, sliding_window=tiny.WINDOW, layer_types=PAIRWISE),
    "nemotron": dict(head_dim=8),  # norms with one added to their weight, part of a head rotated
    "seed_oss": dict(head_dim=8),
    "starcoder2": dict(sliding_window=tiny.WINDOW),
    "vaultgemma": dict(head_dim=8, sliding_window=tiny.WINDOW, layer_types=PAIRWISE, query_pre_attn_scalar=8),
    "hyperclovax": dict(head_dim=8),
    # its config takes no None where others name no token that begins a text
    "cwm": dict(head_dim=8, sliding_window=tiny.WINDOW, layer_types=KINDS),
    "solar_open": dict(head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}
FAMILIES |= FURTHER
NO_MLP = ("gpt_oss", "apertus", "phi", "phi3", "arcee", "glm", "glm4", "nemotron", "starcoder2", "solar_open")
NO_HEADS = ("phi", "phi3", "diffllama", "hunyuan_v1_dense")
HYBRIDS = {
    "granitemoehybrid": dict(
        num_local_experts=0,
        layer_types=["mamba", "mamba", "attention", "mamba"],
        mamba_n_heads=8,
        mamba_d_state=8,
        mamba_d_head=8,
        mamba_n_groups=1,
        shared_intermediate_size=48,
    ),
    "falcon_h1": dict(
        mamba_d_ssm=64, mamba_n_heads=8, mamba_d_state=8, mamba_d_head=8, mamba_n_groups=1, head_dim=8
    ),
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, mamba_d_state=8, num_experts=2
    ),
    "qwen3_next": dict(
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """opened(model type) -> (engine, transformers' own model), made once."""
    made = {}

    def get(kind):
        if kind not in made:
            changes = {"model_type": kind, "tie_word_embeddings": False} | FAMILIES[kind]
            path = tiny.write_checkpoint(tmp_path_factory.mktemp(kind), layers=4, **changes)
            theirs = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            config = type(theirs.config).from_pretrained(path)
            sources = {"instruct": Checkpoint("instruct", path)}
            live = LiveModel(sources, config, torch.float32, torch.device("cpu"))
            made[kind] = Engine(live, tiny.tokenizer()), theirs
        return made[kind]

    return get


def last_logprobs(model, ids):
    return tiny.hf_logits(model, ids)[-1].log_softmax(-1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_prompts_and_replies_are_those_of_transformers(opened, kind):
    engine, theirs = opened(kind)
    prompts = [tiny.random_prompt(k, n) for k, n in enumerate((4, 17, 30))]
    for ids in prompts:
        assert torch.allclose(tiny.engine_logits(engine, ids), tiny.hf_logits(theirs, ids), atol=1e-4)
    replies = engine.complete([Request(str(k), ids, 8) for k, ids in enumerate(prompts)])
    for ids, reply in zip(prompts, replies, strict=True):
        assert list(reply.token_ids) == tiny.hf_greedy(theirs, ids, 8, tuple(engine.stop_ids))[0]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("what", ["mlp", "heads", "both"])
def test_a_placebo_leaves_the_function_or_is_refused(opened, kind, what):
    engine, ids = opened(kind)[0], tiny.random_prompt(3, 30)
    live, before = engine.live, tiny.engine_logits(engine, tiny.random_prompt(3, 30))
    fingerprint = live.fingerprint()
    odd_mlp, odd_heads = kind in (*NO_MLP, *EXPERTS), kind in NO_HEADS
    # experts, no gate, fused; an output projection of another name, tensors indexed by a place in a head
    if (what != "heads" and odd_mlp) or (what != "mlp" and odd_heads):
        with pytest.raises(
            FrankenError, match="needs separate projections, and there is no|does not know how"
        ):
            live.apply(permute_units(live.original, 7, what))
    else:
        live.apply(permute_units(live.original, 7, what))
        assert live.fingerprint() != fingerprint
        assert torch.allclose(tiny.engine_logits(engine, ids), before, atol=1e-4)
    live.apply(live.original)
    assert live.fingerprint() == fingerprint


@pytest.mark.parametrize("kind", FURTHER)
def test_layers_change_places_as_in_a_model_that_is_built_so(opened, kind):
    engine, theirs = opened(kind)
    live, ids, order = engine.live, tiny.random_prompt(5, 25), (3, 1, 2, 0)
    before, fingerprint = tiny.engine_logits(engine, ids), live.fingerprint()
    live.apply(swap(live.original, 0, 3))
    state = {k: v for k, v in theirs.state_dict().items() if ".layers." not in k}
    for position, index in enumerate(order):
        layer = tiny.layer_state(theirs.state_dict(), index)
        state |= {f"model.layers.{position}.{name}": t for name, t in layer.items()}
    kinds = FURTHER[kind].get("layer_types")
    rebuilt = tiny.build(theirs.config, state, kinds and [kinds[i] for i in order])
    if kind == "diffllama":  # a number of its place in the model, which a layer takes along
        for position, index in enumerate(order):
            own = theirs.model.layers[index].self_attn.lambda_init
            rebuilt.model.layers[position].self_attn.lambda_init = own
    assert torch.allclose(tiny.engine_logits(engine, ids), tiny.hf_logits(rebuilt, ids), atol=1e-4)
    assert not torch.allclose(tiny.engine_logits(engine, ids), before, atol=1e-4)
    live.apply(live.original)
    assert live.fingerprint() == fingerprint and torch.equal(tiny.engine_logits(engine, ids), before)


REFUSED = {
    # weightless norms, positions or norms outside the layers, other names, tensors that are elsewhere on disk
    "olmo": {},
    "nanochat": {},
    "gpt_neox": {},
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "bloom": dict(n_head=4),
    "falcon": {},
    "codegen": dict(n_embd=32, n_head=4, n_layer=4, rotary_dim=4),
    "granitemoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "phimoe": dict(num_local_experts=4),
    "cohere2": dict(head_dim=8, sliding_window=tiny.WINDOW, layer_types=KINDS),
    "persimmon": {},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_cannot_be_run_is_one_line_where_a_pair_is_opened(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("FRANKENMODEL_CACHE", str(tmp_path / "cache"))
    changes = {"model_type": kind, "tie_word_embeddings": False} | REFUSED[kind]
    path = tiny.write_checkpoint(tmp_path / "model", layers=4, **changes)
    with pytest.raises(FrankenError) as caught:
        open_pair(instruct=str(path), device_map="cpu")
    assert "\n" not in str(caught.value)


def test_a_window_moves_with_its_layer_where_every_module_states_one(opened):
    engine, theirs = opened("exaone4")
    live, ids = engine.live, tiny.random_prompt(5, 25)
    live.apply(swap(live.original, 1, 2))
    assert live.attention_kinds() == [KINDS[i] for i in (0, 2, 1, 3)]
    state = {k: v for k, v in theirs.state_dict().items() if ".layers." not in k}
    for position, index in enumerate((0, 2, 1, 3)):
        layer = tiny.layer_state(theirs.state_dict(), index)
        state |= {f"model.layers.{position}.{name}": t for name, t in layer.items()}
    rebuilt = tiny.build(theirs.config, state, [KINDS[i] for i in (0, 2, 1, 3)])
    assert torch.allclose(tiny.engine_logits(engine, ids), tiny.hf_logits(rebuilt, ids), atol=1e-4)
    assert [engine.window_of(bank.module) for bank in live.layers] == [5, None, 5, 5]
    live.apply(live.original)


def test_saved_buffers_belong_to_their_layer(opened):
    live = opened("apertus")[0].live
    assert "mlp.act_fn.beta" in live.banks[0].tensors
    live.banks[0].tensors["mlp.act_fn.beta"].fill_(0.25)
    assert live.banks[0].module.mlp.act_fn.beta == 0.25  # one memory
    live.banks[0].held = None
    live.apply(live.original)
    assert live.banks[0].module.mlp.act_fn.beta == 0.5


# ---- experts and hybrids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_layer_moves_with_its_experts(opened, kind):
    engine, theirs = opened(kind)
    live, ids = engine.live, tiny.random_prompt(5, 25)
    live.apply(swap(live.original, 0, 3))
    state = theirs.state_dict()
    moved = {k: v for k, v in state.items() if ".layers." not in k}
    for position, index in enumerate((3, 1, 2, 0)):
        moved |= {f"model.layers.{position}.{k}": t for k, t in tiny.layer_state(state, index).items()}
    rebuilt = tiny.build(theirs.config, moved)
    assert torch.allclose(tiny.engine_logits(engine, ids), tiny.hf_logits(rebuilt, ids), atol=1e-4)
    live.apply(repeat(live.original, 1, 3))
    assert len(live.layers) == 6
    live.apply(live.original)
    assert torch.allclose(tiny.engine_logits(engine, ids), tiny.hf_logits(theirs, ids), atol=1e-4)


EXPORTED = {
    "swap": lambda r: swap(r, 1, 3),
    "repeat": lambda r: repeat(r, 1, 3),
    "noise": lambda r: perturb(r, 0.1, 3),
}


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("kind", EXPERTS)
def test_transformers_runs_exported_experts_as_they_ran_here(opened, tmp_path, kind, name):
    engine, ids = opened(kind)[0], tiny.random_prompt(6, 25)
    live, recipe = engine.live, EXPORTED[name](engine.live.original)
    pair = SimpleNamespace(paths={"instruct": live.sources["instruct"].path}, config=live.config)
    try:
        if kind == "qwen2_moe" and name == "repeat":  # every second layer has no experts
            with pytest.raises(FrankenError, match="not made deeper or shallower"):
                live.apply(recipe)
            return
        live.apply(recipe)
        done = exporter(pair).write(Chosen("mine", recipe), tmp_path / "out")
        assert done.fingerprint == live.fingerprint()
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
        ).eval()
        assert model.config.num_hidden_layers == len(recipe)
        assert torch.allclose(tiny.engine_logits(engine, ids), tiny.hf_logits(model, ids), atol=1e-4)
    finally:
        live.apply(live.original)


def test_layers_with_and_without_experts_do_not_change_places(opened):
    live = opened("qwen2_moe")[0].live
    before = live.fingerprint()
    live.apply(swap(live.original, 1, 3))  # both have experts
    assert live.fingerprint() != before
    live.apply(live.original)
    assert live.fingerprint() == before
    with pytest.raises(FrankenError, match="position 0 cannot hold layer 1: the two are not built alike"):
        live.apply(swap(live.original, 0, 1))
    with pytest.raises(FrankenError, match="not made deeper or shallower"):
        live.apply(repeat(live.original, 0, 2))
    assert live.fingerprint() == before


@pytest.mark.parametrize("kind", EXPERTS)
def test_the_check_at_load_passes_on_experts(opened, kind, monkeypatch, tmp_path):
    monkeypatch.setenv("FRANKENMODEL_CACHE", str(tmp_path))
    engine = opened(kind)[0]
    assert max(check_code(engine.config, torch.device("cpu"))["differences"].values()) < 1e-4
    assert check_weights(engine.live, "instruct", engine.config)["difference"] < 1e-4


@pytest.mark.parametrize("kind", HYBRIDS)
def test_layers_that_keep_another_state_than_keys_and_values_are_refused_by_their_kind(kind, tmp_path):
    changes = {"model_type": kind, "tie_word_embeddings": False} | HYBRIDS[kind]
    path = tiny.write_checkpoint(tmp_path, layers=4, **changes)
    with pytest.raises(
        FrankenError, match=f"{kind} has layers of the kind (hybrid|linear_attention|mamba), whose"
    ):
        read_config(path)


# ---- longrope ----------------------------------------------------------------------------------------------


def test_rotary_factors_are_those_of_the_row_alone(opened):
    """transformers takes the long factors for all rows of a batch in which one is long."""
    engine, theirs = opened("phi3")
    short, long = tiny.random_prompt(1, LIMIT), tiny.random_prompt(2, LIMIT + 1)
    for asked in ([short], [long], [short, long], [long, short, long[:-1], short[:5]]):
        for ids, row in zip(asked, engine.next_token_logprobs(asked), strict=True):
            assert torch.allclose(row, last_logprobs(theirs, ids), atol=1e-4), len(ids)


def test_a_common_beginning_is_not_shared_across_the_limit(opened):
    engine, theirs = opened("phi3")
    stem = tiny.random_prompt(3, LIMIT - 4)
    asked = [(*stem, *tiny.random_prompt(10 + k, 1 + k % 8)) for k in range(16)]
    for ids, row in zip(asked, engine.next_token_logprobs(asked), strict=True):
        assert torch.allclose(row, last_logprobs(theirs, ids), atol=1e-4), len(ids)


@pytest.mark.parametrize("length", [LIMIT - 5, LIMIT, LIMIT + 1])
def test_a_reply_that_crosses_the_limit_is_read_anew(opened, length):
    """The reference has no cache: transformers' generate() with one feeds the model a single token there."""
    engine, theirs = opened("phi3")
    ids, done = tiny.random_prompt(4, length), []
    others = [Request("other", tiny.random_prompt(9, 7), 12), Request("long", tiny.random_prompt(8, 60), 12)]
    reply = engine.complete(
        [others[0], Request("q", ids, 12), others[1]], on_done=lambda i, c: done.append(i)
    )[1]
    assert list(reply.token_ids) == tiny.hf_greedy(theirs, ids, 12, tuple(engine.stop_ids))[0]
    assert sorted(done) == [0, 1, 2]


def test_a_reply_across_the_limit_is_that_of_generate_without_a_cache(opened):
    """With one, transformers 5.17 drops the cache at the limit and feeds the model the last token alone, at
    every step from there on: what it writes is no continuation of the prompt, and no oracle."""
    engine, theirs = opened("phi3")
    ids = tiny.random_prompt(4, LIMIT - 5)

    def generated(use_cache: bool) -> list[int]:
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 999, "pad_token_id": 0}
        return theirs.generate(torch.tensor([ids]), use_cache=use_cache, **settings)[0, len(ids) :].tolist()

    written, cached = generated(False), generated(True)
    assert list(engine.complete([Request("q", ids, 12)])[0].token_ids) == written
    if cached != written:  # until transformers mends it
        seen = [*ids, *cached]
        for position in range(LIMIT + 1, len(seen)):
            alone = last_logprobs(theirs, seen[position - 1 : position])
            assert seen[position] == int(alone.argmax()), position


def test_a_sampled_reply_goes_on_with_its_own_random_numbers(opened):
    """Where the distribution is nearly flat, what is drawn shows the random numbers: those of one stream."""
    request = Request("q", tiny.random_prompt(4, LIMIT - 3), 10, temperature=1.0)
    rest = Request("q", request.prompt_ids, 6, temperature=1.0, drawn=4)
    assert (rest.uniforms() == request.uniforms()[4:]).all()


def test_a_cache_that_would_need_other_factors_is_refused(opened):
    engine = opened("phi3")[0]
    stem = tiny.random_prompt(3, LIMIT - 2)
    caches = engine.empty_caches(1, len(stem))
    engine.prefill([stem], caches)
    assert engine.next_token_logprobs([(5, 6)], caches, [0]).isfinite().all()
    with pytest.raises(FrankenError, match="goes on beyond 40 tokens"):
        engine.next_token_logprobs([(5, 6, 7)], caches, [0])


def test_dynamic_scaling_is_refused_beyond_the_length_it_changes_at(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    pair = tiny.Tiny(tmp_path, "llama", rope_parameters=scaling, max_position_embeddings=32, layers=2)
    engine = pair.engine()
    assert engine.next_token_logprobs([tiny.random_prompt(1, 32)]).isfinite().all()
    for ask in (
        lambda: engine.next_token_logprobs([tiny.random_prompt(1, 33)]),
        lambda: engine.complete([Request("q", tiny.random_prompt(1, 30), 3)]),
    ):
        with pytest.raises(FrankenError, match="33 tokens are more than the 32"):
            ask()


# ---- what is refused ---------------------------------------------------------------------------------------


def test_attention_that_is_passed_something_unknown_is_refused(opened):
    engine = opened("olmo2")[0]
    attention = engine.live.banks[0].module.self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs, position_bias=torch.zeros(1))
    try:
        with pytest.raises(FrankenError, match="Olmo2Attention passes position_bias to attention"):
            engine.prefill([(5, 6)])
    finally:
        attention.forward = forward


def test_a_tensor_of_which_the_order_is_unknown_is_refused_before_anything_moves(opened):
    from franken import Permute, permute_units_in_place

    live = opened("olmo2")[0].live
    layer = {name: tensor.clone() for name, tensor in live.banks[0].tensors.items()}
    for odd, what in (("self_attn.gate_proj.weight", "heads"), ("mlp.router.weight", "mlp")):
        with_odd = layer | {odd: torch.zeros(7, 32)}
        before = {name: tensor.clone() for name, tensor in with_odd.items()}
        with pytest.raises(FrankenError, match=f"does not know how {odd}"):
            permute_units_in_place(with_odd, Permute(1, 0, what), live.config)
        assert all(torch.equal(tensor, before[name]) for name, tensor in with_odd.items())
