"""Scaled contributions and layers side by side, against transformers' own forward pass bent by hooks; and
what the transformers module refuses."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from engine.accelerated import Accelerator
from engine.generation import Engine, Request
from engine.layers import attenuated, compiled_for_modules, mean_of, run_layer
from engine.reuse import in_common
from errors import FrankenError
from surgery import recipes as r
from surgery.weights import Checkpoint

IDS = tiny.random_prompt(1, 17)  # longer than the sliding window
PROMPTS = [tiny.random_prompt(k, length) for k, length in enumerate((3, 11, 19))]


def bent(model, scales: dict[int, float], blocks=()):
    """The model with hooks: a scale on what a layer contributes, and blocks whose layers all read what enters
    the first of them, after the last of which the mean of their outputs goes on."""
    entered, given = {}, {}

    def hook(layer, p, scale, block):
        def before(_, args, kwargs):
            if block and p == block[0]:
                entered[block], given[block] = args[0], []
            return ((entered[block], *args[1:]), kwargs) if block else None

        def after(_, args, kwargs, out):
            out = args[0] + scale * (out - args[0]) if scale != 1 else out
            if not block:
                return out
            given[block].append(out)
            return sum(given[block]) / len(given[block]) if p == block[1] - 1 else out

        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after, with_kwargs=True)

    for p, layer in enumerate(model.model.layers):
        hook(layer, p, scales.get(p, 1.0), next((b for b in blocks if b[0] <= p < b[1]), None))
    return model


def inst(*numbers):
    return [("instruct", k) for k in numbers]


# What a recipe is made of by operations, and the same by hand: layers, scales by position, blocks.
CASES = {
    "one layer halved": (lambda x: r.attenuate(x, 0.5, 2, 3), inst(*range(6)), {2: 0.5}, ()),
    "negative and amplified": (
        lambda x: r.attenuate(r.attenuate(x, -0.5, 1, 2), 1.7, 4, 6),
        inst(*range(6)),
        {1: -0.5, 4: 1.7, 5: 1.7},
        (),
    ),
    "a block again at a third": (
        lambda x: r.repeat(x, 1, 3, 3, 0.3),
        inst(0, 1, 2, 1, 2, 1, 2, 3, 4, 5),
        {3: 0.3, 4: 0.3, 5: 0.3, 6: 0.3},
        (),
    ),
    "each twice, the second time by half": (
        lambda x: r.double(x, 2, 4, 0.5),
        inst(0, 1, 2, 2, 3, 3, 4, 5),
        {3: 0.5, 5: 0.5},
        (),
    ),
    "a scale that moves with its layer": (
        lambda x: r.swap(r.attenuate(x, 0.25, 0, 1), 0, 5),
        inst(5, 1, 2, 3, 4, 0),
        {5: 0.25},
        (),
    ),
    "the middle side by side": (lambda x: r.parallel(x, 1, 4), inst(*range(6)), {}, ((1, 4),)),
    "two blocks that touch, to the end": (
        lambda x: r.parallel(r.parallel(x, 4, 6), 2, 4),
        inst(*range(6)),
        {},
        ((2, 4), (4, 6)),
    ),
    "from the first layer, swapped and scaled within": (
        lambda x: r.swap(r.attenuate(r.parallel(x, 0, 3), 0.5, 1, 2), 1, 4),
        inst(0, 4, 2, 3, 1, 5),
        {4: 0.5},
        ((0, 3),),
    ),
    "side by side after a deletion, with a base layer": (
        lambda x: r.attenuate(r.parallel(r.delete(r.splice(x, "base", 3, 4), 0, 1), 1, 4), 0.6, 2, 3),
        [("instruct", 1), ("instruct", 2), ("base", 3), ("instruct", 4), ("instruct", 5)],
        {2: 0.6},
        ((1, 4),),
    ),
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_engine_equals_transformers_with_hooks(tiny_pair, family):
    pair = tiny_pair(family)
    live = pair.live()
    engine, before = pair.engine(live), live.fingerprint()
    plain = tiny.engine_logits(engine, IDS)
    for name, (operation, layers, scales, blocks) in CASES.items():
        live.apply(operation(live.original))
        assert live.fingerprint() != before, name
        want = tiny.hf_logits(bent(pair.rebuilt(layers), scales, blocks), IDS)
        got = tiny.engine_logits(engine, IDS)
        torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        # the hooks matter
        assert (got - tiny.hf_logits(pair.rebuilt(layers), IDS)).abs().max() > 0.01, name
    live.apply(live.original)
    assert live.fingerprint() == before and torch.equal(tiny.engine_logits(engine, IDS), plain)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_cached_decoding_equals_reading_the_whole_sequence_again(tiny_pair, family, fast):
    pair = tiny_pair(family)
    live = pair.live()
    engine = pair.engine(live, fast=fast)
    requests = [Request(f"q{k}", prompt, 9) for k, prompt in enumerate(PROMPTS)]
    for name, (operation, layers, scales, blocks) in CASES.items():
        live.apply(operation(live.original))
        oracle = bent(pair.rebuilt(layers), scales, blocks)
        for prompt, got in zip(PROMPTS, engine.complete(requests), strict=True):
            assert (list(got.token_ids), got.stopped) == tiny.hf_greedy(oracle, prompt, 9), (name, prompt)
    assert isinstance(engine._accelerator, Accelerator) == fast


def test_leading_layers_are_reused_up_to_what_runs_otherwise(tiny_pair):
    """Each experiment after the others, against an engine that has seen nothing: equal to the bit."""
    pair = tiny_pair("qwen2")
    live = pair.live()
    used = pair.engine(live)
    recipes = [live.original, *(operation(live.original) for operation, *_ in CASES.values())]
    for recipe in [*recipes, *recipes[::-1]]:
        live.apply(recipe)
        assert torch.equal(used.next_token_logprobs(PROMPTS), pair.engine(live).next_token_logprobs(PROMPTS))
    live.apply(r.parallel(live.original, 2, 5))
    assert in_common(live.recipe, live.original) == 2
    live.apply(r.attenuate(live.original, 0.5, 3, 4))
    assert in_common(live.recipe, live.original) == 3
    live.apply(r.parallel(r.attenuate(live.original, 0.5, 1, 2), 3, 5))
    assert in_common(live.recipe, live.original) == 1


def test_a_scale_moves_no_weight_and_one_is_no_scale(tiny_pair):
    live = tiny_pair("llama").live()
    assert r.attenuate(live.original, 1.0, 0, 6) == live.original
    report = live.apply(r.parallel(r.attenuate(live.original, 0.5, 0, 6), 1, 3))
    assert report.positions == [] and report.bytes_moved == report.bytes_streamed == 0
    live.apply(r.repeat(live.original, 2, 4, 2, 0.5))
    assert live.order == [0, 1, 2, 3, 2, 3, 4, 5] and len(live.banks) == 6  # one module at both places
    halves = live.fingerprint()
    live.apply(r.repeat(live.original, 2, 4, 2, 0.25))
    quarters = live.fingerprint()
    live.apply(r.repeat(live.original, 2, 4, 2))
    assert len({halves, quarters, live.fingerprint()}) == 3


def test_scale_zero_is_a_deletion_and_a_layer_beside_itself_is_that_layer(tiny_pair):
    pair = tiny_pair("qwen3")
    live = pair.live()
    engine = pair.engine(live)

    def logits(recipe):
        live.apply(recipe)
        return tiny.engine_logits(engine, IDS)

    gone = logits(r.delete(live.original, 2, 4))
    assert torch.equal(logits(r.attenuate(live.original, 0.0, 2, 4)), gone)
    beside = r.parallel(r.double(live.original, 2, 3), 2, 4)
    assert torch.equal(logits(beside), logits(live.original))


def test_a_function_run_in_place_of_a_layer_sees_the_states_that_go_on(tiny_pair):
    pair = tiny_pair("llama")
    live = pair.live()
    live.apply(r.attenuate(live.original, 0.5, 0, 6))
    seen = []

    def watch(module, hidden, *args):
        out = run_layer(module, hidden, *args)
        seen.append((hidden, out))
        return out

    pair.engine(live).prefill([IDS], layer=watch)
    assert len(seen) == 6 and all(torch.equal(a[1], b[0]) for a, b in zip(seen, seen[1:], strict=False))


def test_a_compiled_layer_never_sees_a_scale(tiny_pair):
    pair = tiny_pair("llama")
    live = pair.live()
    live.apply(r.double(live.original, 1, 3, 0.3))
    engine, modules = pair.engine(live), {bank.module for bank in live.banks}

    def as_compiled(module, *args):
        assert module in modules
        return run_layer(module, *args)

    plain = engine.prefill([IDS])
    assert torch.equal(engine.prefill([IDS], layer=compiled_for_modules(as_compiled)), plain)


def test_bf16_is_rounded_once():
    torch.manual_seed(0)
    before, *outputs = (torch.randn(50, 40).to(torch.bfloat16) for _ in range(4))
    exact = before.double() + 0.3 * (outputs[0].double() - before.double())
    for got, want in (
        (attenuated(before, outputs[0], 0.3), exact),
        (mean_of(outputs), torch.stack(outputs).double().mean(0)),
    ):
        assert got.dtype == torch.bfloat16
        # half a unit in the last of bf16's 8 bits, and float32's own rounding
        assert ((got.double() - want).abs() <= want.abs() * 2.0**-8 + 1e-6).all()


# ---- what transformers would run or write ------------------------------------------------------------------

WRONG = {
    "deleted": (lambda x: r.delete(x, 1, 3), "4 positions run, and the module has 6 layers"),
    "repeated": (lambda x: r.repeat(x, 1, 3), "8 positions run, and the module has 6 layers"),
    "scaled": (lambda x: r.attenuate(x, 0.5, 1, 2), "contributions are scaled"),
    "side by side": (lambda x: r.parallel(x, 1, 3), "side by side"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_module_cannot_express_is_neither_saved_nor_run(tiny_pair, tmp_path, name):
    operation, words = WRONG[name]
    live = tiny_pair("llama").live()
    live.apply(operation(live.original))
    ids = torch.tensor([IDS])
    for use in (
        lambda: live.model.save_pretrained(tmp_path / "out"),
        lambda: live.model(ids, use_cache=False),
        lambda: live.model.generate(ids, max_new_tokens=2, use_cache=False),
    ):
        with pytest.raises(FrankenError, match=words) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    live.apply(live.original)
    assert live.beyond_module() is None


def test_attention_kinds_that_changed_places_are_not_saved(tiny_pair, tmp_path):
    live = tiny_pair("gemma3").live()
    live.apply(r.swap(live.original, 0, 1))
    with pytest.raises(FrankenError, match="attention kinds have changed places"):
        live.model.save_pretrained(tmp_path / "out")
    live.apply(r.swap(live.original, 0, 2))
    live.model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # tied and untied
def test_what_the_module_can_express_is_saved_as_it_is(tiny_pair, tmp_path, family):
    pair = tiny_pair(family)
    live = pair.live()
    engine = pair.engine(live)
    live.apply(r.perturb(r.splice(r.swap(live.original, 1, 4), "base", 2, 3), 0.1, 1))
    want = tiny.engine_logits(engine, IDS)
    live.model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(tiny.hf_logits(loaded, IDS), want, atol=2e-4, rtol=1e-4)
    again = pair.live(saved=Checkpoint("saved", tmp_path / "out"))
    again.apply(r.with_outer(r.splice(again.original, "saved", 0, 6), "saved"))
    assert torch.equal(tiny.engine_logits(pair.engine(again), IDS), want)


@pytest.mark.real
def test_on_real_weights_scales_and_blocks_equal_transformers(smollm2):
    from transformers import AutoConfig, AutoTokenizer

    from franken import LiveModel

    config, tokenizer = AutoConfig.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    live = LiveModel(
        {"instruct": Checkpoint("instruct", smollm2)}, config, torch.float32, torch.device("cpu")
    )
    engine = Engine(live, tokenizer)
    ids = engine.text_ids("The capital of France is Paris, and the capital of Italy is")
    for recipe, scales, blocks in (
        (r.attenuate(live.original, 0.5, 11, 18), dict.fromkeys(range(11, 18), 0.5), ()),
        (r.parallel(live.original, 11, 18), {}, ((11, 18),)),
    ):
        live.apply(recipe)
        theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        want = tiny.hf_logits(bent(theirs, scales, blocks), ids).log_softmax(-1)
        got = tiny.engine_logits(engine, ids).log_softmax(-1)
        torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-4)
        assert got.isfinite().all() and (got - tiny.hf_logits(theirs, ids)).abs().max() > 0.1
