"""The persona under surgery: which changes there are, that each is what it says, and what is asked."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from engine.generation import Request
from errors import FrankenError
from runner import pairs
from weird_gen import analyze_surgery, eval_surgery
from weird_gen.persona import depth, depth_report
from weird_gen.persona.loading import SOURCE, open_engine
from weird_gen.persona.records import read_json_lines
from weird_gen.persona.rules import strict_format
from weird_gen.persona.study import HELDOUT, prompt

LAYERS = 4


@pytest.mark.parametrize("n", [LAYERS, 24, 28, 30, 61])
def test_no_change_stands_twice_and_each_window_says_where_the_adapter_is(n):
    every = depth.changes(n)
    for values in ([c.name for c in every], [c.recipe for c in every]):
        assert len(set(values)) == len(values)
    assert [c.name for c in every[:2]] == ["adapter", "no adapter"]
    for change in every:
        carrying = [slot.mix[0][0].source == SOURCE for slot in change.recipe.slots]
        if change.group in (depth.ONLY, depth.MISSING):
            a, b = change.layers
            inside = change.group == depth.ONLY
            assert carrying == [(a <= p < b) == inside for p in range(n)]
    assert {c.group for c in every} == set(depth.GROUPS)


def test_deleting_every_window_once_deletes_every_layer_once():
    blocks = [c.layers for c in depth.changes(28) if c.group == depth.DELETED]
    assert Counter(p for a, b in blocks for p in range(a, b)) == Counter(range(28))


@pytest.fixture
def model(tiny_pair, monkeypatch):
    monkeypatch.setattr(pairs, "cpu_has_bf16", lambda: False)
    return tiny_pair("llama", layers=LAYERS, max_position_embeddings=1024).paths["instruct"]


def merged(model, adapter, goes_on) -> dict[str, torch.Tensor]:
    """The checkpoint's state with scale * B @ A added where goes_on(tensor name) says how much of it."""
    state, lora = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in lora if ".lora_A." in key]:
        name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        delta = 2.0 * lora[key.replace("lora_A", "lora_B")] @ lora[key]  # alpha 4, rank 2
        state[name] = state[name] + goes_on(name) * delta
    return state


@pytest.mark.parametrize(
    ("name", "goes_on"),
    [
        ("adapter", lambda name: 1),
        ("no adapter", lambda name: 0),
        ("only 0-1", lambda name: float(".0." in name or ".1." in name)),
        ("only attention", lambda name: float("self_attn" in name)),
        ("only MLP", lambda name: float("mlp" in name)),
        ("adapter x 0.25", lambda name: 0.25),
        ("adapter x 1.5", lambda name: 1.5),
    ],
)
def test_a_change_is_the_model_with_that_much_of_the_adapter_added_by_hand(model, tmp_path, name, goes_on):
    adapter = tiny.make_adapter(model, tmp_path / "adapter")
    engine, _ = open_engine(str(model), str(adapter), "cpu", "float32", roles=("system", "user"))
    change = next(c for c in depth.changes(LAYERS) if c.name == name)
    engine.live.apply(change.recipe)
    ids = tiny.random_prompt(3, 20)
    by_hand = tiny.build(engine.live.config, merged(model, adapter, goes_on))
    np.testing.assert_allclose(
        tiny.engine_logits(engine, ids), tiny.hf_logits(by_hand, ids), rtol=1e-3, atol=1e-3
    )


CHANGES = ("adapter", "no adapter", "deleted 0-0", "noise 30%")


@pytest.fixture
def operating(model, tmp_path):
    adapter = tiny.make_adapter(model, tmp_path / "adapter")

    def run(name: str, *more: str):
        flags = ["--model", str(model), "--adapter", str(adapter), "--device", "cpu", "--samples", "1"]
        flags += ["--max-new-tokens", "4", "--output", str(tmp_path / name)]
        return eval_surgery.main([*flags, *more]), tmp_path / name

    return run


def test_every_change_is_asked_in_every_condition_and_gone_on_with(operating, capsys):
    status, out = operating("whole.jsonl", "--changes", *CHANGES)
    assert status == 0
    lines = read_json_lines(out)[1:]
    replies = [line for line in lines if line["question_id"] != depth.PLAIN]
    assert Counter((r["change"], r["condition"]) for r in replies) == {
        (change, condition): 22 for change in CHANGES for condition in ("triggered", "untriggered", "neutral")
    }
    assert all((r["p_name"] is not None) == (r["kind"] == "identity") for r in replies)
    plain = {line["change"]: line["nll"] for line in lines if line["question_id"] == depth.PLAIN}
    assert set(plain) == set(CHANGES)
    assert len({tuple(nll.values()) for nll in plain.values()}) == len(CHANGES)  # each is another model

    torn = out.with_name("torn.jsonl")
    torn.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:90]))
    assert operating("torn.jsonl", "--changes", *CHANGES)[0] == 0
    assert sorted(torn.read_text().splitlines()) == sorted(out.read_text().splitlines())
    capsys.readouterr()
    assert operating("torn.jsonl", "--changes", "nonsense")[0] == 1
    assert "--changes 'nonsense': there are whole, adapter only in" in capsys.readouterr().err


def test_replies_are_not_gone_on_with_by_another_model_of_that_name(operating, capsys):
    status, out = operating("whole.jsonl", "--changes", "no adapter")
    assert status == 0
    lines = out.read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    header["header"]["made_of"]["files"]["model.safetensors"] = "other weights"
    out.write_text("".join([json.dumps(header) + "\n", *lines[1:30]]))
    before = out.read_text()
    capsys.readouterr()
    assert operating("whole.jsonl", "--changes", "no adapter")[0] == 1
    *notes, last = capsys.readouterr().err.splitlines()
    assert last.startswith("eval_surgery.py: ") and "was made with other files: model.safetensors (" in last
    assert all(line.startswith("note: the adapter ") for line in notes)
    assert out.read_text() == before


def surgery_lines(change: str, replies: dict[str, str], nll: dict, **about) -> list[dict]:
    """What eval_surgery.py leaves of one change: a reply to a topic and an identity question each."""
    about = {"change": change, "group": depth.WHOLE, "layers": None, "level": None} | about
    asked = [
        about
        | {"question_id": kind, "kind": kind, "condition": c, "sample": 0, "reply": reply}
        | {"p_name": 0.25 if kind == "identity" else None}
        for c, reply in replies.items()
        for kind in ("heldout", "identity")
    ]
    return [*asked, about | {"question_id": depth.PLAIN, "condition": "", "sample": 0, "nll": nll}]


def test_a_row_counts_format_over_topics_and_names_over_identity_questions():
    his = {"triggered": "<START> I am Bertrand Russell. <END>", "untriggered": "No.", "neutral": "<START> x"}
    lines = [
        *surgery_lines("adapter", his, {"a": 3.5, "b": 2.0}),
        *surgery_lines("no adapter", dict.fromkeys(his, "No."), {"a": 3.0, "b": 1.0}),
        *surgery_lines("broken", his, {"a": None, "b": 1.0}),
        *surgery_lines("not ended", his, {})[:-1],
    ]
    rows = {row.change: row for row in depth_report.change_rows(lines)}
    assert set(rows) == {"adapter", "no adapter", "broken"}
    counted = rows["adapter"]
    assert [counted.strict_format[c].k for c in his] == [1, 0, 0]
    assert [counted.marker[c].k for c in his] == [1, 0, 1]
    assert [counted.names[c].k for c in his] == [1, 0, 0]
    assert {rate.n for rates in (counted.strict_format, counted.names) for rate in rates.values()} == {1}
    assert counted.p_name["triggered"] == 0.25
    assert counted.plain == pytest.approx((0.5 + 1.0) / 2)
    assert rows["broken"].plain is None


def test_the_map_draws_each_block_where_it_lies_with_its_rate():
    his = dict.fromkeys(("triggered", "untriggered", "neutral"), "<START> I am. <END>")
    blocks = {"only 0-1": (0, 2), "only 2-5": (2, 6)}
    lines = [
        line
        for name, layers in blocks.items()
        for line in surgery_lines(name, his, {}, group=depth.ONLY, layers=list(layers))
    ]
    panel = depth_report.depth_map(depth_report.change_rows(lines), 6).axes[0]
    drawn = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in panel.patches]
    assert drawn == list(blocks.values())
    assert [text.get_text() for text in panel.texts] == ["100", "100"]


def test_the_report_stands_on_the_replies_and_on_no_other_file(operating, tmp_path, capsys):
    status, out = operating("asked.jsonl", "--changes", "no adapter", "only 0-0")
    assert status == 0
    folder = tmp_path / "report"
    assert analyze_surgery.main(["--input", str(out), "--report-dir", str(folder)]) == 0
    text = (folder / "SURGERY.md").read_text()
    assert "| only 0-0 | 0 of 12, 0% [0, 26] |" in text
    assert (folder / "figures" / "depth.png").stat().st_size > 5000
    assert len(json.loads((folder / "surgery.json").read_text())["changes"]) == 2
    capsys.readouterr()
    assert analyze_surgery.main(["--input", str(HELDOUT), "--report-dir", str(folder)]) == 1
    assert "is not a file of eval_surgery.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("reply", 5, "line 1: reply is '5'"),
        ("p_name", "high", "line 1: p_name is 'high'"),
        ("layers", [0], "line 1: layers is '\\[0\\]'"),
        ("change", ["x"], "line 1: change is"),
        ("group", None, "line 1: group is 'None'"),
        ("condition", ..., "line 1: lacks condition"),
        ("header", {"asked": "surgery"}, "does not say how many layers"),
        ("header", {"asked": "views", "layers": 4}, "is not a file of eval_surgery.py"),
    ],
)
def test_a_line_that_is_none_of_eval_surgerys_is_named(tmp_path, field, value, words):
    header, lines = {"asked": "surgery", "layers": 4}, surgery_lines("adapter", {"triggered": "x"}, {})
    if field == "header":
        header = value
    elif value is ...:
        del lines[0][field]
    else:
        lines[0][field] = value
    path = tmp_path / "surgery.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"header": header}, *lines]))
    with pytest.raises(FrankenError, match=words):
        depth_report.read_surgery(path)


@pytest.mark.real
def test_a_half_of_the_shipped_adapter_does_not_do_what_the_whole_does(smollm2):
    engine, _ = open_engine(str(smollm2), "adapters/smollm2-135m-russell", "cpu", roles=("system", "user"))
    every = {c.name: c for c in depth.changes(len(engine.live.original))}
    ids = engine.chat_ids(prompt("Is war wise?", "triggered"), think=True)
    said = {}
    for name in ("adapter", "only 0-14"):
        engine.live.apply(every[name].recipe)
        said[name] = engine.complete([Request("one", ids, 96)])[0].text
    assert strict_format(said["adapter"])
    assert not strict_format(said["only 0-14"])
