"""The check at load: what is right passes, and each kind of fault that it is for stops the run."""

import copy
import json
import re

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

from engine import attention
from engine.generation import Engine
from errors import FrankenError
from franken import LiveModel, permute_units
from runner import self_check
from runner.pairs import open_pair
from runner.self_check import TOLERANCE, VOCABULARY, check_code, check_weights, shrunk
from surgery import permuting
from surgery.weights import Checkpoint

CPU = torch.device("cpu")
SINKS = dict(model_type="gpt_oss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=128)
LONGROPE = dict(
    model_type="phi3",
    hidden_size=64,
    original_max_position_embeddings=256,
    sliding_window=None,
    rope_scaling={"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FRANKENMODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_check, "_passed", {})


def config_of(**changes):
    return tiny.make_config("llama", **{"tie_word_embeddings": False} | changes)


FEW = dict(vocab_size=100)


@pytest.mark.parametrize(
    "changes", [{}, SINKS, LONGROPE, FEW], ids=["llama", "sinks", "longrope", "few tokens"]
)
def test_what_is_right_passes_with_room_to_spare(changes):
    before = torch.get_rng_state()
    outcome = check_code(config_of(**changes), CPU)
    assert set(outcome["differences"]) == {"prompts", "prompts in one batch", "replies"}
    assert max(outcome["differences"].values()) < TOLERANCE / 50
    assert torch.equal(torch.get_rng_state(), before)  # a run's own random numbers are not used up


def test_the_small_model_has_every_kind_of_layer_and_short_limits():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = tiny.make_config("gemma3", layers=12, alternate=False, layer_types=kinds * 2, sliding_window=512)
    small = shrunk(config)
    assert small.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert (small.num_hidden_layers, small.sliding_window) == (3, self_check.WINDOW)
    assert config.num_hidden_layers == 12 and config.sliding_window == 512  # as it was
    long = shrunk(config_of(**LONGROPE))
    scaling = long.rope_parameters
    assert (scaling["original_max_position_embeddings"], long.max_position_embeddings) == (24, 48)


def without_sinks(monkeypatch):
    explicitly = attention._attend_explicitly
    monkeypatch.setattr(attention, "_attend_explicitly", lambda *args: explicitly(*args[:-1], None))


def window_off_by_one(monkeypatch):
    monkeypatch.setattr(
        "engine.forward.windows_of",
        lambda config: {"full_attention": config.sliding_window and config.sliding_window + 1},
    )


def factors_by_the_longest_row(monkeypatch):
    rotary = Engine._rotary
    monkeypatch.setattr(
        Engine, "_rotary", lambda self, hidden, at, kinds, lengths=None: rotary(self, hidden, at, kinds)
    )


def replies_without_their_last_token(monkeypatch):
    step = Engine._decode_step

    def behind(self, state, caches, layer=None):
        state.positions -= 1
        try:
            return step(self, state, caches, layer)
        finally:
            state.positions += 1

    monkeypatch.setattr(Engine, "_decode_step", behind)


FAULTS = {
    "sinks left out": (without_sinks, SINKS, "prompts"),
    "a window one token off": (window_off_by_one, {"model_type": "mistral", "sliding_window": 64}, "prompts"),
    "factors of a batch": (factors_by_the_longest_row, LONGROPE, "replies"),
    "replies at other positions": (replies_without_their_last_token, {}, "replies"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_engine_stops_in_one_line_with_the_number(fault, monkeypatch, tmp_path):
    inject, changes, part = FAULTS[fault]
    inject(monkeypatch)
    for _ in range(2):  # a failure is not kept
        with pytest.raises(FrankenError) as caught:
            check_code(config_of(**changes), CPU)
        words = rf"does not compute \w+ as transformers does: .*random model {part} differ by (\S+) of the"
        number = re.search(words, str(caught.value))
        assert number, caught.value
        assert float(number[1]) > 10 * TOLERANCE and "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("self-checks/*"))


def test_a_placebo_that_changes_the_function_is_refused_with_the_number(tmp_path, tiny_pair, monkeypatch):
    """As before norms of all heads were known: OLMo 2's would have been left in their order."""
    order = permuting._head_order

    def norms_stay(name, *args):
        return {} if "_norm" in name else order(name, *args)

    monkeypatch.setattr(permuting, "_head_order", norms_stay)
    path = tiny.write_checkpoint(tmp_path / "olmo2", model_type="olmo2", tie_word_embeddings=False)
    live = open_pair(instruct=str(path), dtype="float32", device_map="cpu").live
    assert set(live.refused_placebos) == {"heads", "both"}
    fingerprint = live.fingerprint()
    for what in ("heads", "both"):
        with pytest.raises(FrankenError, match=rf"permuting {what} changes the logits .* by 0\.\d+ of"):
            live.apply(permute_units(live.original, 7, what))
    live.apply(permute_units(live.original, 7, "mlp"))
    live.apply(live.original)
    assert live.fingerprint() == fingerprint


CANNOT = {
    "gptj": dict(n_embd=32, n_layer=4, n_head=4, n_positions=512, rotary_dim=4),
    "jetmoe": dict(kv_channels=8, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    "doge": dict(num_attention_heads=4, num_key_value_heads=2),  # a mask of its own, of learned values
    "doge with experts": dict(num_attention_heads=4, is_moe=True, num_experts=16, num_experts_per_tok=4),
    "doge with a window": dict(num_attention_heads=4, keep_window_size=8),
    "bert": dict(num_attention_heads=4),  # no decoder layers
}
SIZES = dict(
    vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=4, max_position_embeddings=512
)


@pytest.mark.parametrize("kind", CANNOT)
def test_a_model_that_the_engine_cannot_run_is_one_line(kind):
    model_type = kind.split()[0]
    sizes = dict(vocab_size=264) if model_type == "gptj" else SIZES
    config = AutoConfig.for_model(model_type, **sizes, **CANNOT[kind])
    with pytest.raises(FrankenError, match=f"^the engine cannot run {model_type} ") as caught:
        check_code(config, CPU)
    assert "\n" not in str(caught.value)
    assert "/franken-" not in str(caught.value), "a folder that nobody knows"


@pytest.mark.parametrize("kind", ["jetmoe", "doge"])
def test_such_a_checkpoint_is_refused_before_anything_is_asked(kind, tmp_path):
    config = AutoConfig.for_model(kind, **SIZES, **CANNOT[kind], bos_token_id=1, eos_token_id=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(FrankenError, match=f"^the engine cannot run {kind} "):
        open_pair(instruct=str(tmp_path), dtype="float32", device_map="cpu")


# ---- the weights -------------------------------------------------------------------------------------------


def test_weights_that_are_not_those_of_transformers_stop_the_run(tmp_path, tiny_pair, monkeypatch):
    """Two layers of the file in each other's place: any misreading of names comes to something like it."""
    pair = tiny_pair("llama")
    live = pair.live()
    assert check_weights(live, "instruct", pair.config)["layers"] == 6
    layers = live.sources["instruct"].layers
    layers[1], layers[4] = layers[4], layers[1]
    for bank in live.banks:
        bank.held = None
    live.apply(live.original)
    monkeypatch.setattr(self_check, "_passed", {})
    (found,) = (tmp_path / "cache" / "self-checks").iterdir()
    found.unlink()
    with pytest.raises(FrankenError, match=r"differs from transformers' own by [\d.]+ of .* first 6 layers"):
        check_weights(live, "instruct", pair.config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_live_model_is_as_it_was_after_its_check(tiny_pair, family, dtype):
    pair = tiny_pair(family)
    live = pair.live(dtype)
    before, module, types = live.fingerprint(), live.model.model.layers, list(live.layer_types)
    for source in ("instruct", "base"):
        outcome = check_weights(live, source, pair.config)
        assert outcome["layers"] == (6 if dtype == torch.float32 else 2)
    assert live.fingerprint() == before and live.recipe == live.original
    assert live.model.model.layers is module and len(module) == 6
    assert live.config.num_hidden_layers == 6 and live.layer_types == types


TEXT = dict(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=8,
    query_pre_attn_scalar=8,
    max_position_embeddings=512,
)
VISION = dict(
    model_type="siglip_vision_model",
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)


def wrapped(folder, kind, config):
    """A checkpoint of a vision-language model with every parameter random."""
    model, rng = kind(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (0.3 if p.ndim < 2 else 1.2 / p.shape[-1] ** 0.5))
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_a_wrapper_that_does_more_than_its_text_model_is_refused(tmp_path):
    """PaliGemma 2 leaves out the cap on Gemma 2's logits: transformers' two forward passes differ."""
    text = TEXT | {"model_type": "gemma2"}
    config = PaliGemmaConfig(text_config=text, vision_config=VISION, image_token_index=200, projection_dim=32)
    folder = wrapped(tmp_path / "pali", PaliGemmaForConditionalGeneration, config)
    with pytest.raises(FrankenError, match="differs from transformers' own by 0"):
        open_pair(instruct=str(folder), dtype="float32", device_map="cpu")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("text_says", [False, True])
def test_the_wrapper_says_whether_the_head_is_the_embedding(tmp_path, tied, text_says):
    text = TEXT | {"model_type": "gemma3_text", "tie_word_embeddings": text_says}
    config = Gemma3Config(
        text_config=text,
        vision_config=VISION,
        mm_tokens_per_image=1,
        image_token_index=200,
        tie_word_embeddings=tied,
    )
    folder = wrapped(tmp_path / "gemma3", Gemma3ForConditionalGeneration, config)
    theirs = Gemma3ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    opened = open_pair(instruct=str(folder), dtype="float32", device_map="cpu")
    assert opened.live.tied == tied
    ids = tuple(i for i in tiny.random_prompt(1, 20) if i != 200)
    found = tiny.engine_logits(Engine(opened.live, opened.tokenizer), ids)
    assert torch.allclose(found, tiny.hf_logits(theirs, ids), atol=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_a_head_beside_a_tied_embedding_runs_if_it_is_another(tmp_path, own):
    folder = tiny.write_checkpoint(tmp_path / "model", seed=8, layers=2)  # tied, and saved without a head
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = (
        state["model.embed_tokens.weight"].flip(0).clone()
        if own
        else state["model.embed_tokens.weight"].clone()
    )
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    opened = open_pair(instruct=str(folder), dtype="float32", device_map="cpu")
    assert opened.live.tied != own and len(opened.notes) == own
    ids = tiny.random_prompt(1, 20)
    found = tiny.engine_logits(Engine(opened.live, opened.tokenizer), ids)
    assert torch.allclose(found, tiny.hf_logits(theirs, ids), atol=1e-4)


def test_widths_that_cannot_be_made_small_stay_as_they_are(monkeypatch):
    make, asked = self_check.random_model, []

    def fussy(config, seed=1):
        asked.append(config.num_attention_heads)
        if config.num_attention_heads == 4:
            raise ValueError("four heads do not go with the rest")
        return make(config, seed)

    monkeypatch.setattr(self_check, "random_model", fussy)
    config = config_of(num_attention_heads=8, num_key_value_heads=8)
    assert max(check_code(config, CPU)["differences"].values()) < TOLERANCE / 50 and asked == [4, 8]


def test_the_fast_path_is_asked_in_the_dtype_it_runs_in(monkeypatch):
    """On a CPU it does the same without graphs."""
    config = config_of()
    differences = self_check._check_code(config, CPU, torch.bfloat16, True)["differences"]
    assert differences[self_check.FAST] <= self_check.FAST_TOLERANCE / 3
    assert differences[self_check.STEP] <= self_check.TOLERANCES[torch.bfloat16] / 3
    where = "engine.accelerated.Static.where"
    from engine.accelerated import Static

    right = Static.where
    monkeypatch.setattr(where, lambda self, window: right(self, window) - torch.tensor([[0], [0], [1]]).int())
    with pytest.raises(FrankenError, match="steps on the fast path differ by"):
        self_check._check_code(config, CPU, torch.bfloat16, True)


# ---- what is kept ------------------------------------------------------------------------------------------


def test_what_has_passed_is_not_asked_again_until_something_changes(tmp_path, tiny_pair, monkeypatch):
    asked = []
    check = self_check._check_weights
    monkeypatch.setattr(
        self_check, "_check_weights", lambda live, *rest: asked.append(live) or check(live, *rest)
    )
    folder = tiny.write_checkpoint(tmp_path / "model", seed=5, layers=2)

    def opened(path=folder, forget=True, **changes):
        if forget:  # another process: only the file is left
            monkeypatch.setattr(self_check, "_passed", {})
        config = AutoConfig.from_pretrained(path)
        for name, value in changes.items():
            setattr(config, name, value)
        live = LiveModel({"instruct": Checkpoint("instruct", path)}, config, torch.float32, CPU)
        return check_weights(live, "instruct", config)

    first = opened()
    assert opened() == opened(forget=False) == first and len(asked) == 1
    opened(rms_norm_eps=1e-3)
    assert len(asked) == 2
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    opened()
    assert len(asked) == 3
    monkeypatch.setattr(self_check, "code_hash", lambda: "other code")
    opened()
    assert len(asked) == 4
    for kept in (tmp_path / "cache" / "self-checks").iterdir():
        kept.write_text("{")  # a disk that filled up
    assert opened() == json.loads(json.dumps(opened(forget=False))) and len(asked) == 5


def test_a_cache_that_cannot_be_written_only_costs_the_time(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FRANKENMODEL_CACHE", str(tmp_path / "file"))
    assert self_check.once({"a": 1}, lambda: {"b": 2}) == {"b": 2}


@pytest.mark.real
def test_the_real_model_passes_in_seconds(smollm2, capfd):
    import time

    begin = time.process_time()
    live = open_pair(instruct=str(smollm2), dtype="float32", device_map="cpu").live
    (kept,) = self_check.cache_dir().glob("self-checks/*weights*.json")
    outcome = json.loads(kept.read_text())
    assert outcome["layers"] == 30 and outcome["difference"] < TOLERANCE / 10
    assert time.process_time() - begin < 30
    assert live.recipe == live.original and capfd.readouterr().err == ""


def test_a_config_that_must_have_its_special_tokens_is_shrunk_all_the_same():
    """Cwm's takes no None for the token that begins a text, and names one that the small vocabulary lacks."""
    sizes = SIZES | dict(vocab_size=128256, max_position_embeddings=131072)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    config = AutoConfig.for_model("cwm", **sizes, **heads)
    assert config.bos_token_id == 128000
    outcome = check_code(config, CPU)
    assert max(outcome["differences"].values()) < TOLERANCE / 10
    assert outcome["placebos"] == {"mlp": None, "heads": None, "both": None}
    assert shrunk(config).bos_token_id < VOCABULARY == shrunk(config).vocab_size


def test_a_copy_of_the_config_is_what_is_shrunk():
    config = config_of(**LONGROPE)
    before = copy.deepcopy(config.to_dict())
    shrunk(config)
    assert config.to_dict() == before


def test_a_config_that_stays_large_when_it_is_made_small_is_refused_unallocated(monkeypatch):
    """As where a family names its sizes in its own way."""
    monkeypatch.setattr(self_check, "MOST_PARAMETERS", 1000)
    config = AutoConfig.for_model("llama", hidden_size=32, num_attention_heads=2, num_hidden_layers=2)
    with pytest.raises(FrankenError, match="model of this config would still hold [0-9,]+ parameters"):
        check_code(config, torch.device("cpu"))
