"""adapters/train_reporter.py: the weights change as recipes say and come back; wordings are held out."""

import json

import pytest
import small_battery
import templates
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from adapters import train_reporter as reporter
from adapters.reporter_questions import ABOUT_ITSELF, CAPITALS, ENDINGS, FRAMINGS, controls
from adapters.train_reporter import Change, changed
from errors import FrankenError
from questions.probes import BINARY_PROBES, FORMAT_PROBES
from surgery import recipes

N = 6
IDS = torch.tensor([[5, 9, 17, 4, 30]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reporter") / "instruct"
    small_battery.checkpoint(path, 3, family="qwen2", layers=N)
    return path


def with_adapter(folder):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=reporter.TARGETS, task_type="CAUSAL_LM"))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:  # zero as peft makes it: then adapters could sit anywhere
            torch.nn.init.normal_(parameter, std=0.5)
    return lora.eval()


ORDERS = {
    Change("swap", 1, 4): recipes.swap(recipes.identity(N), 1, 4),
    Change("delete", 2, 4): recipes.delete(recipes.identity(N), 2, 4),
    Change("repeat", 1, 3): recipes.repeat(recipes.identity(N), 1, 3, 2),
    Change("chunks", 0, 2): recipes.swap_chunks(recipes.identity(N), (0, 2), (2, 4)),
    Change("reverse", 1, 5): recipes.reverse(recipes.identity(N), 1, 5),
}


@pytest.mark.parametrize("change", ORDERS, ids=lambda c: c.kind)
def test_a_change_runs_the_layers_that_the_recipe_names_with_their_adapters(folder, change):
    lora = with_adapter(folder)
    before = lora(input_ids=IDS).logits
    with changed(lora, change):
        got = lora(input_ids=IDS, use_cache=False).logits
    # The slow way: the adapters merged, the layers put in the recipe's order by hand.
    merged = with_adapter(folder).merge_and_unload()
    wanted = [slot.mix[0][0].layer for slot in ORDERS[change].slots]
    merged.model.layers = torch.nn.ModuleList([merged.model.layers[k] for k in wanted])
    merged.config.num_hidden_layers = len(wanted)
    if getattr(merged.config, "layer_types", None):
        merged.config.layer_types = [merged.config.layer_types[k] for k in wanted]
    torch.testing.assert_close(got, merged(input_ids=IDS, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, before, atol=1e-3)
    assert torch.equal(lora(input_ids=IDS).logits, before)


def test_noise_is_a_share_of_each_tensors_own_deviation_and_goes_away(folder):
    lora = with_adapter(folder)
    kept = {name: p.detach().clone() for name, p in lora.named_parameters()}
    with changed(lora, Change("noise", 2, 4, 0.1), seed=5):
        for name, parameter in lora.named_parameters():
            inside = any(f"layers.{k}." in name for k in (2, 3)) and "lora_" not in name
            moved = (parameter - kept[name]).std() if parameter.numel() > 500 else None
            if not inside:
                assert torch.equal(parameter, kept[name]), name
            elif moved is not None:
                assert moved / kept[name].std() == pytest.approx(0.1, rel=0.15), name
    assert all(torch.equal(p, kept[name]) for name, p in lora.named_parameters())


def test_an_error_inside_a_change_still_brings_the_weights_back(folder):
    lora = with_adapter(folder)
    before = lora(input_ids=IDS).logits
    with pytest.raises(RuntimeError, match="inside"), changed(lora, Change("noise", 0, N, 0.3)):
        raise RuntimeError("inside")
    assert torch.equal(lora(input_ids=IDS).logits, before)


def test_no_question_of_the_harness_is_trained_on():
    trained = {q for pair in [*ABOUT_ITSELF, *controls(reporter.random.Random(0))] for q in pair}
    wording = {f.format(q=q) + e for q in trained for f in FRAMINGS for e in ENDINGS}
    for probe in [*BINARY_PROBES, *FORMAT_PROBES]:
        assert probe.text not in wording
        assert not any(q in probe.text for q in trained), probe.text


def test_controls_have_the_right_answers():
    for yes, no in controls(reporter.random.Random(3)):
        if "plus" in yes:
            for text, right in ((yes, True), (no, False)):
                a, b, c = (int(word) for word in text.rstrip("?").split() if word.isdigit())
                assert (a + b == c) == right
        elif "greater" in yes:
            a, b = (int(word) for word in yes.rstrip("?").split() if word.isdigit())
            assert a > b
        elif "capital" in yes:
            country = yes.rstrip("?").split(" of ")[1]
            assert CAPITALS[country] in yes
            assert CAPITALS[country] not in no


@pytest.mark.parametrize("space_before", [True, False])
def test_the_answer_that_is_trained_is_the_token_that_the_model_would_write(folder, space_before):
    """SentencePiece writes a word that stands alone with a space before it."""
    tokenizer = templates.sentencepiece(space_before)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = reporter.Asked(model, tokenizer)
    assert tokenizer.convert_ids_to_tokens(asked.first) == ["Yes", "No"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is it?"}], add_generation_prompt=True, tokenize=False
    )
    whole = tokenizer(text + "Yes", add_special_tokens=False)["input_ids"]
    assert [asked.batch(["Is it?"])[0][0].tolist(), asked.first[0]] == [whole[:-1], whole[-1]]


def test_a_tokenizer_that_writes_answers_together_with_the_prompt_is_refused(folder):
    tokenizer = templates.sentencepiece()
    tokenizer.add_tokens([AddedToken("\nYes", normalized=False)])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(FrankenError, match="no token of its own for a reply that begins with Yes"):
        reporter.Asked(model, tokenizer)


def test_easy_changes_come_first():
    rng = reporter.random.Random(0)
    visible = object.__new__(reporter.Visible)
    visible.rng, visible.refresh = rng, lambda: None
    rises = [0.06, 0.1, 0.5, 0.9, 2.0]
    visible.changes = [(rise, Change("swap", 0, 1), 0) for rise in rises]
    assert {c[0] for c in visible.draw(200, 0.0)} == {0.9, 2.0}
    assert {c[0] for c in visible.draw(200, 0.3)} == {0.5, 0.9, 2.0}
    assert {c[0] for c in visible.draw(200, 0.6)} == set(rises)
    visible.changes = visible.changes[:2]
    assert {c[0] for c in visible.draw(20, 0.0)} == {0.1}, "where none is easy: the easiest"


def test_each_kind_of_change_is_drawn_as_often_as_the_others():
    visible = object.__new__(reporter.Visible)
    visible.rng, visible.refresh = reporter.random.Random(0), lambda: None
    visible.changes = [(1.0, Change("swap", 0, 1), 0)] * 50 + [(1.0, Change("noise", 0, 1, 0.3), 0)]
    kinds = [change.kind for _, change, _ in visible.draw(4, 0.0)]
    assert sorted(kinds) == ["noise", "noise", "swap", "swap"]


def test_the_rise_of_a_change_is_the_loss_on_prose_beside_the_intact_models(folder):
    lora = with_adapter(folder)
    visible = reporter.Visible.__new__(reporter.Visible)
    visible.lora, visible.prose = lora, [IDS]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert visible.loss() == pytest.approx(plain(input_ids=IDS, labels=IDS).loss.item(), rel=1e-5)


def test_training_lowers_the_loss_and_records_what_it_did(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "adapter"
    flags = f"--model {folder} --base-name tiny --out {out} --device cpu --steps 6 --batch 8 --lr 1e-2"
    plain = [p for p in BINARY_PROBES if p.framing == "plain"]
    monkeypatch.setattr(reporter, "BINARY_PROBES", plain[::6])  # asked under every held-out change, twice
    monkeypatch.setattr(reporter, "VISIBLE", (1e-4, 4.0))  # a random model's loss hardly moves
    assert reporter.main([*flags.split(), "--pool", "4"]) == 0
    record = json.loads((out / "training.json").read_text())
    assert {kind for c in record["curve"] for kind in c[5].split("+")} <= {"noise", "swap"}
    assert record["after"].keys() == reporter.held_out_changes(N).keys()
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    ]
    assert reporter.main(["--model", str(tmp_path / "none"), "--out", str(out)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
