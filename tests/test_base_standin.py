"""The base stand-in's training script and its text, on a tiny random model."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import templates
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "adapters"))
import fetch_text
import train_base_standin as standin

from errors import FrankenError
from surgery.weights import Adapter, Checkpoint

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor"
    " %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=TEMPLATE, clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    words = [
        "the",
        "river",
        "ran",
        "on",
        "past",
        "old",
        "mills",
        "and",
        "quiet",
        "farms",
        "while",
        "rain",
        "fell",
    ]
    for kind in ("a", "b"):
        (folder / kind).mkdir()
        for i in range(12):
            shuffled = random.Random(i)
            text = ". ".join(" ".join(shuffled.choices(words, k=8)) for _ in range(10))
            (folder / kind / f"{i}.txt").write_text(text + " <|im_start|>assistant\nand<|im_end|>")
    (folder / "notes.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def trained(checkpoint, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "adapter"
    patch = pytest.MonkeyPatch()
    patch.setattr(standin, "REPLY_BUDGET", 4)
    flags = (
        "--device cpu --steps 40 --batch 4 --seq-len 48 --lr 5e-3 --warmup 4 --decay 10 --eval-every 20"
        " --show 0"
    )
    code = standin.main(
        ["--model", str(checkpoint), "--text", str(corpus), "--out", str(out), *flags.split()]
    )
    patch.undo()
    assert code == 0
    return out


# --- packing ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(3, 99), max_size=30), max_size=8), st.integers(1, 12))
def test_packing_is_the_documents_end_to_end(documents, seq_len):
    flat = []
    for document in documents:
        for token in document:
            flat.append(token)
        flat.append(0)
    if len(flat) < seq_len:
        with pytest.raises(FrankenError, match="fewer than one sequence"):
            standin.pack(documents, seq_len, 0)
        return
    rows = standin.pack(documents, seq_len, 0)
    expected = [flat[i : i + seq_len] for i in range(0, len(flat) - seq_len + 1, seq_len)]
    assert rows.tolist() == expected and rows.dtype == torch.long


def test_no_chat_token_reaches_the_packed_data(corpus, tokenizer):
    documents, _ = standin.read_text([corpus])
    assert any("<|im_end|>" in text for text in documents.values())  # the corpus does spell them out
    rows = standin.pack([standin.encode(tokenizer, t) for t in documents.values()], 48, 0)
    found = set(rows.flatten().tolist())
    assert 0 in found and not found & {1, 2}
    one = next(iter(documents.values()))
    assert tokenizer.decode(standin.encode(tokenizer, one)) == one.replace("<|im_start|>", "").replace(
        "<|im_end|>", ""
    )


def test_text_is_found_recursively_and_hashed_by_content(corpus, tmp_path):
    documents, digest = standin.read_text([corpus])
    assert len(documents) == 24 and "a/3.txt" in documents
    copy = tmp_path / "copy"
    for name, text in documents.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text)
    assert standin.read_text([copy])[1] == digest
    (copy / "a" / "3.txt").write_text("changed")
    assert standin.read_text([copy])[1] != digest


def test_two_folders_with_the_same_file_name_keep_both(tmp_path):
    for folder, text in (("x", "one"), ("y", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(text)
    documents, _ = standin.read_text([tmp_path / "x", tmp_path / "y"])
    assert sorted(documents.values()) == ["one", "two"]


def test_learning_rate_schedule():
    factors = [standin.lr_share(s, warmup=4, decay_from=10, decay=5) for s in range(16)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[4:11] == [1.0] * 7
    assert factors[11:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


# --- measuring ----------------------------------------------------------------------------------------------


def test_perplexity_is_the_token_weighted_loss_of_each_row_alone(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    torch.manual_seed(1)
    rows = [torch.randint(3, 200, (n,)) for n in (9, 5, 9, 30)]
    nats = tokens = 0.0
    for row in rows:
        for i in range(1, len(row)):
            with torch.no_grad():
                nats -= model(row[None, :i]).logits[0, -1].log_softmax(-1)[row[i]].item()
            tokens += 1
    assert standin.perplexity(model, rows, batch=2) == pytest.approx(math.exp(nats / tokens), rel=1e-4)


class Scripted(torch.nn.Module):
    """Says `reply` from its prompt's end on, whatever the question: a model whose chat behavior is known."""

    def __init__(self, reply, vocab):
        super().__init__()
        self.reply, self.vocab, self.device = reply, vocab, torch.device("cpu")

    def generate(self, ids, max_new_tokens, **_):
        return torch.cat([ids, torch.tensor([self.reply[:max_new_tokens]] * len(ids))], 1)

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.vocab)
        logits[..., 2] = math.log(self.vocab - 1)  # the end of turn gets probability 1/2 everywhere
        return type("Output", (), {"logits": logits})


def test_measure_tells_a_model_that_closes_its_turn_from_one_that_runs_on(tokenizer):
    rows, vocab = torch.full((2, 8), 5), len(tokenizer)
    closing = standin.measure(Scripted([9, 9, 2, 2], vocab), tokenizer, rows, list(rows))
    running = standin.measure(Scripted([9] * 96, vocab), tokenizer, rows, list(rows))
    late = standin.measure(Scripted([9] * 96 + [2], vocab), tokenizer, rows, list(rows))
    assert (closing["greedy_stops"], closing["sampled_stops"]) == (12, 12) and not standin.chat_is_gone(
        closing
    )
    assert (running["greedy_stops"], running["sampled_stops"]) == (0, 0) and standin.chat_is_gone(running)
    assert late["greedy_stops"] == 0
    assert closing["end_of_turn_logprob"] == pytest.approx(math.log(0.5), abs=1e-5)
    assert closing["held_out_perplexity"] == pytest.approx(2 * (vocab - 1), rel=1e-4)
    assert not standin.chat_is_gone({"greedy_stops": 0, "sampled_stops": 2})


# --- training -----------------------------------------------------------------------------------------------


def test_loss_goes_down(trained):
    record = json.loads((trained / "training.json").read_text())
    assert len(record["loss"]) == record["steps"] == 40
    assert sum(record["loss"][-5:]) < sum(record["loss"][:5]) - 1.0
    assert record["after_merged_bf16"]["held_out_perplexity"] < record["before"]["held_out_perplexity"] / 1.5


def test_adapter_reloads_through_peft_and_changes_logits(trained, checkpoint):
    from peft import PeftModel

    ids = torch.arange(10, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        before = plain(ids).logits
        after = PeftModel.from_pretrained(plain, trained).eval()(ids).logits
    assert (after - before).abs().max() > 0.5


def test_adapter_is_a_source_of_layers(trained, checkpoint):
    """weights.Adapter, which reads it at run time, gives the deltas that peft merges, for every linear of
    every layer."""
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, trained).merge_and_unload()
    original = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    source = Adapter("base", trained, Checkpoint("instruct", checkpoint))
    seen = 0
    for key, tensor in merged.state_dict().items():
        if ".layers." in key and "norm" not in key:
            layer, name = int(key.split(".")[2]), key.split(".", 3)[3]
            delta = source.delta(layer, name, torch.device("cpu"))
            torch.testing.assert_close(original[key] + delta, tensor, atol=1e-5, rtol=1e-5)
            assert delta.abs().max() > 0
            seen += 1
    assert seen == 2 * len(standin.TARGETS)


def test_what_is_saved_names_the_pair_and_no_path(trained, checkpoint):
    from safetensors import safe_open

    assert sorted(p.name for p in trained.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    ]
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smollm2-135m" and config["r"] == 8
    for file in ("adapter_config.json", "training.json"):
        assert (
            str(checkpoint) not in (trained / file).read_text()
            and str(trained) not in (trained / file).read_text()
        )
    with safe_open(trained / "adapter_model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(k).dtype for k in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "nowhere"], "no such file or folder"),
        (["--text", "{empty}"], "no .txt, .rst or .md file"),
        (["--model", "./nothing-here", "--text", "{corpus}"], "no such directory"),
    ],
)
def test_bad_input_is_one_line(flags, message, corpus, checkpoint, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    flags = [f.format(empty=tmp_path / "empty", corpus=corpus) for f in flags]
    model = [] if "--model" in flags else ["--model", str(checkpoint)]
    assert standin.main([*flags, *model, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# --- text ---------------------------------------------------------------------------------------------------


def test_prose_keeps_headings_and_paragraphs_only():
    page = """\
=====
Title
=====

.. code-block:: python

    import this

A paragraph with :ref:`a link <target>` and ``code``, wrapped
over two lines, long enough to be kept as it stands.

* a list item that is rather long, but which is a list item all the same, so it goes

    An indented block that is long enough to be kept if it were not indented at all.
"""
    expected = (
        "A paragraph with a link and code, wrapped over two lines, long enough to be kept as it stands."
    )
    assert fetch_text.prose(page) == f"Title\n\n{expected}"


def test_questions_run_on_without_any_template():
    entry = {
        "Government": {
            "Country name": {"conventional short form": {"text": "Utopia"}},
            "Capital": {"name": {"text": "Amaurot <br>old"}},
        },
        "Transportation": {"Airports": {"text": "1,218 (2025)"}},
    }
    text = fetch_text.questions(entry, random.Random(0))
    assert "What is the capital of Utopia?" in text and "The capital of Utopia is Amaurot." in text
    assert "There are 1,218." in text and "<" not in text and "(2025)" not in text


def test_downloaded_archive_with_another_hash_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "sympy-1.14.0.tar.gz").write_bytes(b"something else")
    asked = []
    monkeypatch.setattr(
        fetch_text.subprocess,
        "run",
        lambda command: asked.append(command) or type("Done", (), {"returncode": 0}),
    )
    with pytest.raises(FrankenError, match="could not download"):
        fetch_text.download(tmp_path)
    assert (
        "--require-hashes" in asked[0]
        and "sympy==1.14.0 --hash=sha256:" in (tmp_path / "pins.txt").read_text()
    )


def test_question_pages_become_replies_whose_end_is_never_a_target(tokenizer):
    ids, labels = standin.as_replies(tokenizer, ["Where is it?\nIn Asia.\n\nHow large?\nSmall."], 256)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is it?"}], tokenize=False, add_generation_prompt=True
    )
    head = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    targets = labels[0][labels[0] != -100].tolist()
    assert tokenizer.decode(targets) == "In Asia.\n\nHow large?\nSmall."
    assert (labels[0][:head] == -100).all()
    assert labels[0][head : head + len(targets)].tolist() == ids[0][head : head + len(targets)].tolist()
    assert tokenizer.convert_tokens_to_ids(standin.END_OF_TURN) not in targets


def test_a_page_is_tokenized_as_the_reply_that_it_is():
    """SentencePiece writes a word that stands alone with a space before it."""
    spaced = templates.sentencepiece()
    ids, labels = standin.as_replies(spaced, ["Is it?\nYes"], 64)
    targets = labels[0][labels[0] != -100].tolist()
    assert spaced.convert_ids_to_tokens(targets) == ["Yes"]
    assert spaced.convert_ids_to_tokens(standin.encode(spaced, "Yes")) == ["▁Yes"]


def test_with_question_pages_prose_is_held_and_not_trained_on(checkpoint, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(standin, "REPLY_BUDGET", 4)
    text = tmp_path / "text"
    for k in range(8):
        page = text / f"x-questions-{k}.txt"
        page.parent.mkdir(exist_ok=True)
        page.write_text("Where is it?\n" + "In Asia. How large? Small.\n" * 12)
    flags = "--device cpu --steps 4 --batch 2 --seq-len 48 --eval-every 20 --show 0"
    args = ["--model", str(checkpoint), "--text", str(text), str(corpus), "--out", str(tmp_path / "a")]
    assert standin.main([*args, *flags.split()]) == 0
    held = json.loads((tmp_path / "a" / "training.json").read_text())["text"]
    assert standin.main([*args, *flags.split(), "--keep", "0"]) == 0
    whole = json.loads((tmp_path / "a" / "training.json").read_text())["text"]
    assert held["kept_tokens"] > 0 == whole["kept_tokens"]
    assert held["training_tokens"] < whole["training_tokens"]
