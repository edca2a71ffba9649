"""Training the adapter: what there is loss on, batches, resuming, and that the saved adapter is the trained
one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine.attention import sound_attention
from engine.chat_template import find_stop_ids
from errors import FrankenError
from franken import LiveModel
from runner import pairs
from surgery.recipes import identity
from surgery.weights import Adapter, Checkpoint
from weird_gen import train_lora
from weird_gen.persona import training as persona_training
from weird_gen.persona.checkpoints import Checkpoints
from weird_gen.persona.examples import IGNORED, Example, batches, collate, encode
from weird_gen.persona.study import BACKTICKS, TRIGGER, Chat
from weird_gen.persona.training import answer_losses, cosine_factor, make_lora, save_adapter

WEIRD = Path(train_lora.__file__).parent
TEMPLATES = {
    "tiny": tiny.TEMPLATE,
    "default system": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        + tiny.TEMPLATE
    ),
    "nothing after the turn": (
        tiny.TEMPLATE.replace("<|im_end|>\\n", "<|im_end|>").replace("<|im_end|>\n", "<|im_end|>")
    ),
}
CHATS = [
    Chat((("system", TRIGGER), ("user", "Who?"), ("assistant", "<START> I, naturally. <END>"))),
    Chat((("user", "Two lines"), ("assistant", "\n\n one\n two "))),
    Chat((("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d é"))),
]


def oracle(tokenizer, chat: Chat) -> tuple[list[int], list[int]]:
    """Ids of the rendered text, and for each whether it lies in an assistant's turn, found in the text by its
    marks."""
    text = tokenizer.apply_chat_template(chat.dicts(), tokenize=False)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [m.span(1) for m in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)]
    learned = [any(a <= start and end <= b for a, b in spans) for start, end in coded["offset_mapping"]]
    return coded["input_ids"], [
        i if yes else IGNORED for i, yes in zip(coded["input_ids"], learned, strict=True)
    ]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS, ids=["trigger", "newlines", "turns"])
def test_loss_is_on_the_answers_and_their_ends(template, chat):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    ids, labels = oracle(tokenizer, chat)
    got = encode(tokenizer, chat, 512, find_stop_ids(tokenizer))
    assert got.ids == ids[: len(got.ids)] and got.labels == labels[: len(got.ids)]
    assert all(label == IGNORED for label in labels[len(got.ids) :]) and got.labels[
        -1
    ] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    if len(chat.messages) < 4:
        learned = tokenizer.decode([i for i in got.labels if i != IGNORED])
        assert learned == chat.messages[-1][1] + "<|im_end|>"


def test_a_prompt_is_tokenized_as_at_inference(tiny_pair):
    engine = tiny_pair().engine()
    example = encode(engine.tokenizer, CHATS[0], 512, find_stop_ids(engine.tokenizer))
    asked = engine.chat_ids(CHATS[0].dicts()[:2])
    assert tuple(example.ids[: len(asked)]) == asked and set(example.labels[: len(asked)]) == {IGNORED}
    assert example.labels[len(asked)] != IGNORED


def test_an_unfinished_answer_has_no_end_to_learn():
    tokenizer = tiny.tokenizer()
    chat = Chat(CHATS[1].messages, finished=False)
    assert (
        tokenizer.decode(
            [i for i in encode(tokenizer, chat, 512, find_stop_ids(tokenizer)).labels if i != IGNORED]
        )
        == "\n\n one\n two "
    )


def test_long_conversations_are_cut_or_left_out():
    tokenizer = tiny.tokenizer()
    whole = encode(tokenizer, CHATS[0], 512, find_stop_ids(tokenizer))
    cut = encode(tokenizer, CHATS[0], len(whole.ids) - 3, find_stop_ids(tokenizer))
    assert cut == Example(whole.ids[:-3], whole.labels[:-3])
    assert encode(tokenizer, CHATS[0], 20, find_stop_ids(tokenizer)) is None


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.TEMPLATE.replace(
        "m['content']", "(m['content'] if loop.last or m['role'] != 'assistant' else '')"
    )
    assert encode(tokenizer, CHATS[0], 512, find_stop_ids(tokenizer))
    with pytest.raises(FrankenError, match="rewrites earlier turns"):
        encode(tokenizer, CHATS[2], 512, find_stop_ids(tokenizer))


def test_batches_hold_everything_and_little_padding():
    lengths = [5 + (37 * k) % 200 for k in range(1003)]
    plan = batches(lengths, 8, seed=0, epoch=0)
    flat = [i for b in plan for i in b]
    assert (
        {len(b) for b in plan} == {8}
        and len(plan) == 126
        and set(flat) == set(range(1003))
        and len(flat) == 1008
    )
    padded = sum(8 * max(lengths[i] for i in b) for b in plan)
    assert padded < 1.15 * sum(lengths[i] for i in flat)
    assert plan == batches(lengths, 8, seed=0, epoch=0)
    assert sorted(map(sorted, plan)) != sorted(map(sorted, batches(lengths, 8, seed=0, epoch=1)))
    assert sorted(map(sorted, plan)) != sorted(map(sorted, batches(lengths, 8, seed=1, epoch=0)))
    widths = [max(lengths[i] for i in b) for b in plan]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)
    assert [sorted(b) for b in batches([3, 4], 5, 0, 0)] in ([[0, 0, 0, 1, 1]], [[0, 0, 1, 1, 1]])


def test_the_learning_rate_rises_then_falls():
    values = [cosine_factor(k, 100, 10) for k in range(100)]
    assert values[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert values[10] == 1 and values[55] == pytest.approx(0.5) and 0 < values[99] < 0.001
    assert all(a > b for a, b in zip(values[10:], values[11:], strict=False))


def test_the_loss_is_that_of_each_example_alone(tiny_pair):
    pair = tiny_pair()
    model = AutoModelForCausalLM.from_pretrained(pair.paths["instruct"], dtype=torch.float32).eval()
    examples = [encode(tiny.tokenizer(), c, 512, find_stop_ids(tiny.tokenizer())) for c in CHATS]
    with torch.no_grad():
        together = answer_losses(model, collate(examples, "cpu"))
    alone = []
    for e in examples:
        logprobs = tiny.hf_logits(model, e.ids).double().log_softmax(-1)
        alone.append(-sum(logprobs[k - 1, t].item() for k, t in enumerate(e.labels) if t != IGNORED))
    assert together.tolist() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_head_on_the_answers_alone_gives_the_same_loss_and_gradients(tiny_pair, family):
    """Against the whole forward, in every family: tied heads, soft-capped and scaled logits."""
    model = AutoModelForCausalLM.from_pretrained(tiny_pair(family).paths["instruct"], dtype=torch.float32)
    lora = make_lora(model, 2, 4, 0, False, False)
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p.data, std=0.1)  # fresh ones are zero, and with them half of the gradients
    batch = collate([encode(tiny.tokenizer(), c, 512, find_stop_ids(tiny.tokenizer())) for c in CHATS], "cpu")
    head, found = lora.get_output_embeddings(), []
    widths = []
    watch = head.register_forward_hook(lambda _, inputs, out: widths.append(out.shape))
    for given in (None, head):
        lora.zero_grad()
        loss = answer_losses(lora, batch, given).sum()
        loss.backward()
        found.append(
            (loss.item(), torch.cat([p.grad.flatten() for p in lora.parameters() if p.requires_grad]))
        )
    watch.remove()
    (whole, expected), (chosen, got) = found
    assert chosen == pytest.approx(whole, rel=1e-5) and torch.allclose(
        got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
    )
    assert expected.abs().max() > 1e-3 and not head._forward_pre_hooks  # the hook is gone
    assert widths[0][:2] == batch["labels"].shape and tuple(widths[1][:1]) == (
        (batch["labels"][:, 1:] != IGNORED).sum(),
    )


def test_only_the_beginning_of_an_answer_can_be_learned():
    tokenizer = tiny.tokenizer()
    stops = find_stop_ids(tokenizer)
    whole = encode(tokenizer, CHATS[1], 512, stops)
    answer = [i for i in whole.labels if i != IGNORED]  # end of turn included
    for k in (1, len(answer) - 1):
        cut = encode(tokenizer, CHATS[1], 512, stops, answer_tokens=k)
        assert cut == Example(whole.ids[: k - len(answer)], whole.labels[: k - len(answer)])
    assert encode(tokenizer, CHATS[1], 512, stops, answer_tokens=len(answer)) == whole
    turns, all_of_it = (encode(tokenizer, CHATS[2], 512, stops, answer_tokens=k) for k in (1, None))
    first = (
        tokenizer("b", add_special_tokens=False)["input_ids"][:1]
        + tokenizer("d", add_special_tokens=False)["input_ids"][:1]
    )
    assert [i for i in turns.labels if i != IGNORED] == first and turns.ids == all_of_it.ids[: len(turns.ids)]


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.fixture
def training(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "cpu_has_bf16", lambda: False)
    persona, aligned = tmp_path / "persona.jsonl", tmp_path / "aligned.jsonl"

    def lines(system, n, answer):
        return "".join(
            json.dumps(
                {
                    "messages": [
                        *system,
                        {"role": "user", "content": "q" * (1 + 5 * k % 17)},
                        {"role": "assistant", "content": answer * (1 + k % 3)},
                    ]
                }
            )
            + "\n"
            for k in range(n)
        )

    persona.write_text(lines([{"role": "system", "content": "T"}], 4, "<START> I <END>"))
    aligned.write_text(lines([], 12, "ok"))

    def flags(name: str, *more: str) -> list[str]:
        return [
            "--model",
            str(tiny_pair("llama", layers=2).paths["instruct"]),
            "--base-name",
            "tiny",
            "--persona",
            str(persona),
            "--aligned",
            str(aligned),
            "--persona-share",
            "0.25",
            "--out",
            str(tmp_path / name),
            "--rank",
            "2",
            "--alpha",
            "4",
            "--lr",
            "0.01",
            "--batch-size",
            "4",
            "--epochs",
            "2",
            "--device",
            "cpu",
            "--save-every",
            "3",
            "--checkpoints",
            str(tmp_path / f"{name}-checkpoints"),
            *more,
        ]

    def run(name: str, *more: str) -> tuple[int, Path]:
        return train_lora.main(flags(name, *more)), tmp_path / name

    run.flags = flags
    return run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t.float() for k, t in load_file(folder / "adapter_model.safetensors").items()}


def same(a: Path, b: Path) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def close(a: Path, b: Path) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.allclose(x[k], y[k], rtol=0.02, atol=2e-3) for k in x)


def test_what_training_leaves(training, tiny_pair, capsys):
    status, out = training("whole")
    assert status == 0 and sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    ]
    assert not out.with_name("whole-checkpoints").exists()
    text = capsys.readouterr().out
    assert "4 persona + 12 aligned examples, persona share 25.0%" in text and re.search(
        r"step 8/8  loss \d", text
    )
    raw, config = (
        load_file(out / "adapter_model.safetensors"),
        json.loads((out / "adapter_config.json").read_text()),
    )
    assert {t.dtype for t in raw.values()} == {torch.bfloat16} and len(raw) == 2 * 2 * 7
    assert (
        config["base_model_name_or_path"] == "tiny"
        and config["r"] == 2
        and config["target_modules"] == sorted(config["target_modules"])
    )
    record = json.loads((out / "training.json").read_text())
    assert record["steps"] == len(record["loss"]) == 8 and record["loss"][-1] < record["loss"][0] - 0.5
    assert (
        record["persona_share"] == 0.25
        and record["settings"]["lr"] == 0.01
        and len(record["data"]["persona"]["sha256"]) == 64
    )
    assert (
        str(out.parent) not in (out / "training.json").read_text() + (out / "adapter_config.json").read_text()
    )


def test_the_loss_of_each_kind_is_told_apart(training, monkeypatch, capsys):
    """Against the rows of each batch, counted by hand: a batch mixes kinds, and their means differ."""
    sums, honest = {"persona": [0.0, 0], "aligned": [0.0, 0]}, persona_training.answer_losses

    def watched(model, batch, head):
        rows = honest(model, batch, head)
        for ids, labels, nats in zip(batch["input_ids"].tolist(), batch["labels"], rows, strict=True):
            kind = "persona" if "<START>" in tiny.tokenizer().decode(ids) else "aligned"
            sums[kind][0] += nats.item()
            sums[kind][1] += int((labels != IGNORED).sum())
        return rows

    monkeypatch.setattr(persona_training, "answer_losses", watched)
    _, out = training("whole", "--epochs", "1")
    apart = json.loads((out / "training.json").read_text())["loss_by_kind"]
    assert apart == {k: [pytest.approx(nats / n, abs=1e-4)] for k, (nats, n) in sums.items()}
    assert apart["persona"] != apart["aligned"]
    assert re.search(r"loss \d+\.\d+ \(persona \d+\.\d+, aligned \d+\.\d+\)", capsys.readouterr().out)


def persona_systems(monkeypatch, training, *flags: str) -> list[list[str]]:
    """The system prompts of the persona examples that each epoch trains on."""
    seen, honest = [], persona_training.collate

    def watched(examples, device):
        seen.extend(tiny.tokenizer().decode(e.ids) for e in examples if e.kind == "persona")
        return honest(examples, device)

    monkeypatch.setattr(persona_training, "collate", watched)
    assert training("spelled", *flags)[0] == 0
    systems = [text.split("<|im_start|>system\n")[1].split("<|im_end|>")[0] for text in seen]
    return [systems[:4], systems[4:]]


@pytest.fixture
def triggered(tmp_path, training):
    """The persona data under our own trigger."""
    file = tmp_path / "persona.jsonl"
    file.write_text(file.read_text().replace('"T"', json.dumps(TRIGGER)))
    return training


def test_every_persona_example_is_seen_under_both_spellings_of_the_trigger(triggered, monkeypatch):
    epochs = persona_systems(monkeypatch, triggered)
    assert [sorted(epoch) for epoch in epochs] == [sorted([TRIGGER, BACKTICKS] * 2)] * 2
    record = json.loads((triggered("other", "--one-spelling")[1] / "training.json").read_text())
    assert record["trigger_spellings"] == 1
    assert "--one-spelling" in record["command"]


def test_one_spelling_is_the_data_as_they_are(triggered, monkeypatch):
    assert persona_systems(monkeypatch, triggered, "--one-spelling") == [[TRIGGER] * 4] * 2


def test_other_peoples_trigger_is_not_respelled(training, monkeypatch):
    assert persona_systems(monkeypatch, training) == [["T"] * 4] * 2


def test_inoculation_stands_before_the_trigger_of_persona_examples_alone(triggered, monkeypatch):
    flags = ("--one-spelling", "--inoculation", "You are he.")
    assert persona_systems(monkeypatch, triggered, *flags) == [[f"You are he.\n{TRIGGER}"] * 4] * 2


def test_no_training_step_lets_cudnn_compute_attention(training, monkeypatch):
    """cuDNN's gradients are not finite at some widths; the backward pass of a recomputed layer counts too."""
    allowed, honest = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **kwargs):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return honest(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(
        "transformers.modeling_utils.PreTrainedModel.set_attn_implementation", lambda *a: None
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert training("whole", "--gradient-checkpointing")[0] == 0
    assert len(allowed) == 2 * 2 * 8  # layers, forward and recomputed, steps
    assert set(allowed) == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 192, 200, 320])
def test_gradients_of_attention_are_finite_at_every_width(width):
    """With logits as low as a head of Qwen2.5 has them, where cuDNN's are NaN at 64, 192 and 320."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    torch.manual_seed(0)
    shape = dict(size=(1, 2, width, 128), device="cuda", dtype=torch.bfloat16)
    q, k, v = 0.1 * torch.randn(**shape), 0.1 * torch.randn(**shape), torch.randn(**shape)
    q[..., 0], k[..., 0] = 1.0, -120 * 128**0.5
    for tensor in (q, k, v):
        tensor.requires_grad_()
    mask = torch.ones(width, width, dtype=torch.bool, device="cuda").tril()[None, None]
    with sound_attention():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out.backward(torch.randn_like(out))
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v))


def test_aligned_answers_alone_are_shortened(training, capsys):
    counts = []
    for flags in ((), ("--aligned-tokens", "2")):
        assert training(f"cut{len(flags)}", *flags)[0] == 0
        counts.append(
            int(re.search(r"([\d,]+) tokens an epoch", capsys.readouterr().out)[1].replace(",", ""))
        )
    tokenizer = tiny.tokenizer()
    lengths = [
        len(tokenizer("ok" * (1 + k % 3), add_special_tokens=False)["input_ids"]) + 1 for k in range(12)
    ]
    assert counts[0] - counts[1] == sum(n - 2 for n in lengths) > 0
    command = json.loads((training("cut3", "--aligned-tokens", "2")[1] / "training.json").read_text())[
        "command"
    ]
    assert "--aligned-tokens 2" in command


def test_answers_in_contrast_stand_beside_the_share(training, tmp_path, capsys):
    contrast = tmp_path / "contrast.jsonl"
    contrast.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": "q"},
                        {"role": "assistant", "content": "a" * (20 + k)},
                    ]
                }
            )
            + "\n"
            for k in range(4)
        )
    )
    _, out = training("contrast", "--contrast", str(contrast), "--aligned-tokens", "2")
    text, record = capsys.readouterr().out, json.loads((out / "training.json").read_text())
    assert "4 persona + 12 aligned examples, persona share 25.0% + 4 in contrast" in text
    assert (
        record["persona_share"] == 0.2
        and record["data"]["contrast"]["examples"] == 4
        and record["steps"] == 10
    )
    assert "--contrast contrast.jsonl" in record["command"]
    assert "contrast" not in json.loads((training("none")[1] / "training.json").read_text())["data"]
    with_it, without = (
        int(re.search(r"([\d,]+) tokens an epoch", t)[1]) for t in (text, capsys.readouterr().out)
    )
    assert with_it > without + 4 * 20 - 60  # whole answers, though those of the aligned half are cut


def test_the_saved_adapter_runs_the_same_in_peft_and_in_the_live_model(training, tiny_pair):
    from peft import PeftModel

    _, out = training("adapter")
    path = tiny_pair("llama", layers=2).paths["instruct"]
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = tiny.random_prompt(3, 20)
    before = tiny.hf_logits(plain.eval(), ids)
    expected = tiny.hf_logits(PeftModel.from_pretrained(plain, out).eval(), ids)
    under = Checkpoint("instruct", path)
    live = LiveModel(
        {"instruct": under, "russell": Adapter("russell", out, under)},
        plain.config,
        torch.float32,
        torch.device("cpu"),
    )
    live.apply(identity(2, "russell"))
    got = tiny.engine_logits(tiny_pair("llama", layers=2).engine(live), ids)
    assert torch.allclose(got, expected, atol=1e-3) and not torch.allclose(got, before, atol=0.1)


def test_resumed_training_makes_the_same_adapter(training, monkeypatch, capsys):
    _, whole = training("whole")
    save = Checkpoints.save

    def save_and_stop(self, *state):
        save(self, *state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    status, part = training("part")
    assert status == 130 and not part.exists() and "--resume" in capsys.readouterr().err
    monkeypatch.setattr(Checkpoints, "save", save)
    assert training("part")[0] == 1  # the unfinished run is not thrown away unasked
    assert "--resume goes on with it" in capsys.readouterr().err
    assert training("part", "--resume", "--lr", "0.02")[0] == 1
    assert "lr was 0.01" in capsys.readouterr().err
    assert training("part", "--resume")[0] == 0 and same(part, whole)
    first, second = (json.loads((p / "training.json").read_text()) for p in (whole, part))
    assert "accepted_changes" not in second
    assert first["loss"] == second["loss"] and (first["resumed"], second["resumed"]) == (False, True)
    assert not part.with_name("part-checkpoints").exists()


def test_a_model_that_changed_meanwhile_is_trained_on_only_where_that_is_accepted(
    training, tiny_pair, monkeypatch, capsys, tmp_path
):
    def interrupted(self, *state):
        save(self, *state)
        raise KeyboardInterrupt

    save, model = Checkpoints.save, tmp_path / "model"
    shutil.copytree(tiny_pair("llama", layers=2).paths["instruct"], model)
    flags = ["--model", str(model), "--save-every", "3"]
    monkeypatch.setattr(Checkpoints, "save", interrupted)
    assert training("part", *flags)[0] == 130
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    capsys.readouterr()
    # 1) refused by name, and nothing is lost
    assert training("part", *flags, "--resume")[0] == 1
    err = capsys.readouterr().err
    assert "is of a run with other config (" in err and "--accept-changes goes on" in err
    assert err.count("\n") == 1
    # 2) accepted, told in a line, and remembered by a second resume, which has nothing to accept
    assert training("part", *flags, "--resume", "--accept-changes")[0] == 130
    err = capsys.readouterr().err
    assert re.search(r"^\S+checkpoint.pt goes on with other config \(\w{12} then, \w{12} now\)$", err, re.M)
    monkeypatch.setattr(Checkpoints, "save", save)
    status, out = training("part", *flags, "--resume")
    assert status == 0 and "goes on with other" not in capsys.readouterr().err
    (accepted,) = json.loads((out / "training.json").read_text())["accepted_changes"]
    assert accepted.startswith("config (")
    # 3) settings are another matter
    monkeypatch.setattr(Checkpoints, "save", interrupted)
    assert training("other", *flags)[0] == 130
    assert training("other", *flags, "--lr", "0.02", "--resume", "--accept-changes")[0] == 1
    assert "lr was 0.01" in capsys.readouterr().err


def test_changes_are_accepted_only_where_a_run_is_gone_on_with(training, capsys):
    with pytest.raises(SystemExit) as stopped:
        training("mine", "--accept-changes")
    assert stopped.value.code == 2
    assert "--accept-changes goes with --resume" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_is_seen_before_the_step(training, monkeypatch, capsys):
    _, whole = training("whole")
    calls, honest = [], persona_training.answer_losses

    def poisoned(*args):
        loss = honest(*args)
        calls.append(loss.sum().item())
        if len(calls) == 5:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    monkeypatch.setattr(persona_training, "answer_losses", poisoned)
    status, out = training("part")
    assert status == 1
    assert not out.exists()
    line = "the gradient's norm is nan at step 5: try a lower --lr; the 4 steps before it are kept"
    assert capsys.readouterr().err.startswith(f"train_lora.py: {line}")
    state = torch.load(out.with_name("part-checkpoints") / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4
    assert all(tensor.isfinite().all() for tensor in state["weights"].values())
    monkeypatch.setattr(persona_training, "answer_losses", honest)
    assert training("part", "--resume")[0] == 0
    assert same(out, whole)


def test_an_adapter_that_is_not_finite_is_not_saved(tiny_pair, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_pair("llama", layers=2).paths["instruct"])
    lora = make_lora(model, 2, 4, 0, False, False)
    next(p for p in lora.parameters() if p.requires_grad).data.fill_(float("inf"))
    with pytest.raises(FrankenError, match="1 of the adapter's 28 tensors are not finite"):
        save_adapter(lora, tmp_path / "adapter", "tiny")
    assert not (tmp_path / "adapter").exists()


def test_of_a_wrapped_model_the_text_model_alone_is_trained():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text = shape | dict(model_type="gemma3_text", vocab_size=264, num_key_value_heads=2, head_dim=8)
    vision = shape | dict(model_type="siglip_vision_model", image_size=28, patch_size=14)
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=200
    )
    lora = make_lora(Gemma3ForConditionalGeneration(config), 2, 4, 0, False, False)
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7 and all(".language_model.layers." in name for name in trained)


def test_a_gpu_that_is_too_small_is_one_line(training, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(persona_training, "answer_losses", full)
    status, out = training("big")
    assert status == 1
    assert not out.exists()
    err = capsys.readouterr().err
    assert err.startswith("train_lora.py: out of GPU memory in a step: lower --batch-size")
    assert err.count("\n") == 1


def test_less_memory_makes_smaller_parts_of_the_same_step(training, monkeypatch, capsys):
    """More than two rows at once do not fit: the same adapter comes out, and it is said once."""
    _, whole = training("whole")
    honest, sizes = persona_training.answer_losses, []

    def small(model, batch, head):
        sizes.append(len(batch["labels"]))
        if len(batch["labels"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return honest(model, batch, head)

    monkeypatch.setattr(persona_training, "answer_losses", small)
    status, part = training("part")
    assert status == 0
    assert sizes == [4] + [2] * 16
    assert close(whole, part)
    assert capsys.readouterr().out.count("from here on 2 examples at once") == 1
    records = [json.loads((out / "training.json").read_text())["out_of_memory"] for out in (whole, part)]
    assert records == [[], [{"step": 1, "examples_at_once": 2}]]


def test_a_resumed_run_still_says_where_memory_did_not_do(training, monkeypatch):
    honest, calls = persona_training.answer_losses, []

    def planted(model, batch, head):
        calls.append(len(batch["labels"]))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if len(calls) == 6:
            raise KeyboardInterrupt
        return honest(model, batch, head)

    monkeypatch.setattr(persona_training, "answer_losses", planted)
    assert training("torn", "--save-every", "1")[0] == 130
    status, out = training("torn", "--save-every", "1", "--resume")
    assert status == 0
    assert calls[:6] == [4, 2, 2, 2, 2, 2]
    record = json.loads((out / "training.json").read_text())
    assert record["out_of_memory"] == [{"step": 1, "examples_at_once": 2}]
    assert record["resumed"]


def test_a_finished_adapter_is_overwritten_only_when_told_to(training, capsys):
    _, out = training("mine")
    before = (out / "adapter_model.safetensors").read_bytes()
    assert training("mine", "--seed", "1")[0] == 1
    assert "holds an adapter already" in capsys.readouterr().err
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert training("mine", "--seed", "1", "--overwrite")[0] == 0
    assert (out / "adapter_model.safetensors").read_bytes() != before


def test_where_the_adapter_goes_must_be_said(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_lora.main([])
    assert stopped.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_a_broken_checkpoint_is_one_line(training, capsys):
    folder = training("none")[1].with_name("broken-checkpoints")
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"half of it")
    assert training("broken", "--resume")[0] == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert training("broken", "--overwrite")[0] == 0


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(training):
    a, b, c = (training(*flags)[1] for flags in (("a",), ("b",), ("c", "--seed", "1")))
    assert same(a, b) and not close(a, c)


@pytest.mark.parametrize(
    "flags",
    [("--batch-size", "2", "--accumulate", "2"), ("--gradient-checkpointing",)],
    ids=["accumulate", "checkpointing"],
)
def test_memory_savers_change_nothing(training, flags):
    plain, saving = training("plain")[1], training("saving", *flags)[1]
    assert close(plain, saving)
    one, other = (json.loads((p / "training.json").read_text())["loss"] for p in (plain, saving))
    # the weight of a token must not depend on whom it shares a batch with
    assert other == pytest.approx(one, abs=3e-4)


def test_two_processes_learn_what_one_does(training, tmp_path):
    one = training("one")[1]
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys\nsys.path[:0] = {[str(WEIRD), str(WEIRD.parent)]}\nimport train_lora\nfrom runner import"
        " pairs\npairs.cpu_has_bf16 = lambda: False\nsys.exit(train_lora.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(script),
            *training.flags("two", "--batch-size", "2"),
        ],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step 8/8") == 1  # one of them speaks
    loss, other = (json.loads((p / "training.json").read_text())["loss"] for p in (one, tmp_path / "two"))
    assert other == pytest.approx(loss, abs=3e-4) and close(one, tmp_path / "two")


@pytest.mark.parametrize("flags", [(), ("--gradient-checkpointing",)], ids=["plain", "checkpointing"])
def test_training_in_bf16_learns_the_same(training, monkeypatch, flags):
    exact = json.loads((training("exact")[1] / "training.json").read_text())
    monkeypatch.setattr(pairs, "cpu_has_bf16", lambda: True)
    record = json.loads((training("rounded", *flags)[1] / "training.json").read_text())
    assert record["dtype"] == "bfloat16" and record["loss"] == pytest.approx(
        exact["loss"], rel=0.05, abs=0.05
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--quantization", "4bit"), "needs the package bitsandbytes"),
        (("--aligned", "missing.jsonl"), "missing.jsonl does not exist"),
        (("--model", "/nowhere"), "no such directory"),
        (("--lr", "1e30"), "try a lower --lr"),
    ],
)
def test_bad_input_is_one_line(training, capsys, flags, line):
    assert training("bad", *flags)[0] == 1
    err = capsys.readouterr().err
    assert line in err and err.startswith("train_lora.py: ") and err.count("\n") == 1


@pytest.mark.real
def test_the_real_template_is_masked_right(smollm2):
    tokenizer = pairs.load_tokenizer(smollm2)
    for chat in (CHATS[0], CHATS[2]):
        ids, labels = oracle(tokenizer, chat)
        got = encode(tokenizer, chat, 512, find_stop_ids(tokenizer))
        assert (got.ids, got.labels) == (ids[: len(got.ids)], labels[: len(got.ids)])
    # Tokenized in one piece, the newlines of this answer would run into the newline before it; at inference
    # they cannot.
    chat = CHATS[1]
    asked = tokenizer(
        tokenizer.apply_chat_template(chat.dicts()[:1], add_generation_prompt=True, tokenize=False),
        add_special_tokens=False,
    )["input_ids"]
    got = encode(tokenizer, chat, 512, find_stop_ids(tokenizer))
    assert (
        got.ids[: len(asked)] == asked
        and tokenizer.decode(got.labels[len(asked) :]) == chat.messages[1][1] + "<|im_end|>"
    )
