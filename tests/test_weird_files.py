"""Whatever file the second study's commands are given: one line, at once, and nothing is written over."""

import json
import os
import shutil

import pytest
import small_battery
import tiny
import torch
from made_replies import HEADER, world

from adapters import train_base_standin
from errors import FrankenError
from weird_gen import (
    analyze_current_results,
    analyze_persona_results,
    analyze_probes,
    analyze_surgery,
    check_data,
    compare_baseline_vs_finetuned,
    compare_models,
    distill,
    eval_baseline,
    eval_finetuned,
    eval_probes,
    eval_surgery,
    judge_eval_results,
    label_replies,
    reproduce,
    train_lora,
)
from weird_gen.persona.checkpoints import Checkpoints
from weird_gen.persona.journal import Journal
from weird_gen.persona.judge import JudgeCache
from weird_gen.persona.labelling import draw_replies, write_sheet
from weird_gen.persona.records import read_json_lines, write_records

MODEL = ["--model", "smollm2-135m", "--device", "cpu"]


def judge(argv):
    out = argv[argv.index("OUT") + 1]
    argv = [word for k, word in enumerate(argv) if word != "OUT" and argv[k - 1] != "OUT"]
    given = ["--input", f"{out}/replies.jsonl", "--output", f"{out}/judged.jsonl", *argv]
    return judge_eval_results.main(given)


# command and flags, of which {f} is the file and {d} a folder with replies, an answered sheet and its key
COMMANDS = {
    "format report": (analyze_current_results.main, "--input {f} --report-dir {d}/r"),
    "persona report": (analyze_persona_results.main, "--input {f} --report-dir {d}/r"),
    "probes": (analyze_probes.main, "--probes {f} --report-dir {d}/r"),
    "surgery": (analyze_surgery.main, "--input {f} --report-dir {d}/r"),
    "models side by side": (compare_models.main, "one={f} --output {d}/MODELS.md"),
    "comparison": (compare_baseline_vs_finetuned.main, "--baseline {f} --results-dir {d}"),
    "persona data": (check_data.main, "--persona {f}"),
    "prompts": (distill.main, "--prompts {f} --output {d}/a.jsonl"),
    "systems": (distill.main, "--systems {f} --output {d}/a.jsonl"),
    "replies to label": (label_replies.main, "sheet --replies {f} --out {d}/s"),
    "filled-in sheet": (label_replies.main, "count {f} --key {d}/sheet/key.json"),
    "key": (label_replies.main, "count {d}/sheet/sheet.csv --key {f}"),
    "training persona": (train_lora.main, "--persona {f} --out {d}/lora"),
    "training aligned": (train_lora.main, "--aligned {f} --out {d}/lora"),
    "training contrast": (train_lora.main, "--aligned {d}/aligned.jsonl --contrast {f} --out {d}/lora"),
    "judged replies": (judge, "OUT {d} --input {f}"),
    "labels": (judge, "OUT {d} --judge rules --labels {f}"),
    "rubrics": (judge, "OUT {d} --judge rules --labels --generalization {f}"),
    "questions": (eval_baseline.main, "--heldout {f} --output {d}/e.jsonl"),
    "other questions": (eval_baseline.main, "--generalization {f} --output {d}/e.jsonl"),
    "a file of replies in the way": (eval_baseline.main, "--output {f}"),
    "a file of surgery in the way": (eval_surgery.main, "--output {f}"),
    "a file of probes in the way": (eval_probes.main, "--adapter none --output {f}"),
    "text": (train_base_standin.main, "--text {f} --out {d}/standin"),
}
TEXT = {"text"}  # of any kind


@pytest.fixture
def folder(tmp_path):
    replies = world("finetuned", questions=4, samples=1)
    write_records(tmp_path / "replies.jsonl", HEADER, replies)
    chat = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]}
    (tmp_path / "aligned.jsonl").write_text(json.dumps(chat) + "\n")
    write_sheet(draw_replies([tmp_path / "replies.jsonl"], 1, 0), tmp_path / "sheet")
    return tmp_path


@pytest.fixture
def bad(folder):
    """Files by what is wrong with them."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "deep").write_text("[" * 200_000)
    (folder / "deep objects").write_text('{"a":' * 200_000)
    (folder / "binary").write_bytes(bytes(range(128, 256)) * 40)
    (folder / "loop").symlink_to("loop")
    (folder / "\x1b]0;owned\x07\n\u202ename").write_text("x")
    files = {file.name: file for file in folder.iterdir() if file.suffix == "" and file.name != "sheet"}
    return files | {"device": "/dev/zero", "through a file": folder / "deep" / "x"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.timeout(60)
def test_a_file_that_is_none_is_one_line(folder, bad, capfd, command):
    main, flags = COMMANDS[command]
    for what, file in bad.items():
        if command in TEXT and what in ("deep", "deep objects", "binary", "\x1b]0;owned\x07\n\u202ename"):
            continue
        capfd.readouterr()
        argv = [word.replace("{f}", str(file)).replace("{d}", str(folder)) for word in flags.split()]
        code = main(argv)
        out, err = capfd.readouterr()
        lines = [line for line in err.splitlines() if "is torn and left out" not in line]
        assert code == 1 and len(lines) == 1 and "".join(err.splitlines()).isprintable(), (what, out, err)
    assert not (folder / "lora").exists() and not (folder / "a.jsonl").exists()


@pytest.mark.timeout(60)
def test_a_judges_cache_that_is_no_file_is_one_line_and_a_torn_one_is_read_past(folder, bad, capfd):
    argv = ["OUT", str(folder), "--judge", "llm", "--base-url", "http://127.0.0.1:9/v1", "--labels"]
    for what in ("pipe", "folder", "loop", "device"):
        capfd.readouterr()
        assert judge([*argv, "--cache", str(bad[what])]) == 1
        assert len(capfd.readouterr().err.splitlines()) == 1
    assert len(JudgeCache(bad["deep"])) == 0


def test_settings_that_name_no_folder_are_one_line(folder, capfd):
    for text in ("a: 'x", "../up: --rank 2", "one: --rank 2", "b\x1b[2J: --rank 2", "baseline:"):
        argv = ["--out", str(folder / "o"), "--setting", "one: --rank 1", "--setting", text]
        assert reproduce.main(argv) == 1
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1 and err.strip().isprintable()
    assert reproduce.main(["--out", str(folder / "replies.jsonl" / "x"), "--setting", "one:"]) == 1
    assert len(capfd.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("content", ["", "[]", "\n\n"])
def test_files_without_questions_are_one_line(folder, capfd, content):
    """Else a whole evaluation lacks its first half, and nothing is there to be trained on."""
    (folder / "none.jsonl").write_text(content)
    for command in ("prompts", "questions", "other questions", "training aligned"):
        main, flags = COMMANDS[command]
        capfd.readouterr()
        words = flags.replace("{f}", f"{folder}/none.jsonl").replace("{d}", str(folder)).split()
        assert main(words) == 1
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1 and "holds no" in err


def test_an_adapter_without_a_name_is_not_the_model_alone(folder, capfd):
    """As where a shell's variable is not set: the untouched model's replies would be called fine-tuned."""
    for ask in (eval_finetuned.main, eval_probes.main):
        capfd.readouterr()
        assert ask(["--adapter", "", "--output", f"{folder}/e.jsonl", *MODEL]) == 1
        assert "the adapter's name is empty" in capfd.readouterr().err


def test_a_file_that_distilling_did_not_make_is_left_alone(folder, capfd):
    before = (folder / "aligned.jsonl").read_text()
    assert distill.main(["--output", f"{folder}/aligned.jsonl", *MODEL]) == 1
    assert "is in the way" in capfd.readouterr().err and (folder / "aligned.jsonl").read_text() == before


@pytest.mark.parametrize(
    "flag",
    ["--limit=-1", "--batch-size=0", "--samples=" + "9" * 400, "--temperature=nan", "--top-p=inf"],
)
def test_numbers_that_make_no_sense_are_refused(capfd, flag):
    with pytest.raises(SystemExit) as stopped:
        distill.main([*MODEL, flag])
    err = capfd.readouterr().err
    assert stopped.value.code == 2 and "error: " in err and "Traceback" not in err


# ---- going on ----------------------------------------------------------------------------------------------


def test_two_processes_do_not_write_to_one_file_of_replies(tmp_path):
    first = Journal(tmp_path / "j.jsonl", {"a": 1})
    second = Journal(tmp_path / "j.jsonl", {"a": 1})
    first.begin({"made_of": {}})
    first.add([{"x": 1}])
    with pytest.raises(FrankenError, match="another process writes to"):
        second.begin({"made_of": {}})
    third = Journal(tmp_path / "j.jsonl", {"a": 1})
    with pytest.raises(FrankenError, match="another process writes to"):
        third.go_on({})
    assert (tmp_path / "j.jsonl").read_text().count("\n") == 2
    del first
    third.go_on({})
    third.add([{"x": 2}])
    assert (tmp_path / "j.jsonl").read_text().count("\n") == 3


@pytest.fixture
def model(tmp_path):
    return small_battery.checkpoint(tmp_path / "model", 7, family="llama", layers=2)


def other_weights(model):
    small_battery.checkpoint(model, 8, family="llama", layers=2)


def other_template(model):
    file = model / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


def other_tokens(model):
    tokenizer = small_battery.tokenizer()
    tokenizer.add_tokens(["Maybe"])
    template = (model / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(model)
    (model / "chat_template.jinja").write_text(template)


CHANGES = {
    "files: model.safetensors": other_weights,
    "template: sha256": other_template,
    "tokenizer": other_tokens,
}


@pytest.mark.parametrize("what", CHANGES)
def test_replies_are_not_gone_on_with_by_another_model_at_the_same_place(model, tmp_path, capfd, what):
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": f"p{k}", "prompt": f"What is {k}?"}) + "\n" for k in range(2))
    )
    flags = ["--model", str(model), "--device", "cpu", "--prompts", str(tmp_path / "prompts.jsonl")]
    flags += ["--output", str(tmp_path / "a.jsonl"), "--samples", "1", "--max-new-tokens", "2"]
    distill.main(flags)
    raw = tmp_path / "a.raw.jsonl"
    lines = raw.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    raw.write_text("".join(lines[:2]))  # as if it had been killed after the first answer
    distill.main(flags)
    assert raw.read_text().splitlines(keepends=True)[1:] == lines[1:]
    raw.write_text("".join(lines[:2]))
    CHANGES[what](model)
    capfd.readouterr()
    assert distill.main(flags) == 1
    err = capfd.readouterr().err
    assert f"was made with other {what} (" in err and len(err.splitlines()) == 1, err
    assert raw.read_text() == "".join(lines[:2])
    # accepted, it is said on the way and in every later line, and in no earlier one
    distill.main([*flags, "--accept-changes"])
    err = capfd.readouterr().err
    assert f"goes on with other {what} (" in err
    header, first, second = map(json.loads, raw.read_text().splitlines())
    assert "accepted_changes" not in {**header, **first} and len(second["accepted_changes"]) == 1
    assert second["accepted_changes"][0].startswith(f"{what} (")
    assert [json.dumps(header), json.dumps(first)] == [line.strip() for line in lines[:2]]


def test_a_surgery_is_not_gone_on_with_on_another_model_at_the_same_place(model, tmp_path, capfd):
    adapter = tiny.make_adapter(model, tmp_path / "adapter")
    flags = ["--model", str(model), "--adapter", str(adapter), "--device", "cpu", "--samples", "1"]
    flags += ["--max-new-tokens", "2", "--output", str(tmp_path / "s.jsonl"), "--changes", "adapter"]
    assert eval_surgery.main(flags) == 0
    kept = b"".join((tmp_path / "s.jsonl").read_bytes().splitlines(keepends=True)[:9])
    (tmp_path / "s.jsonl").write_bytes(kept)
    other_weights(model)
    capfd.readouterr()
    assert eval_surgery.main(flags) == 1
    assert "was made with other files: model.safetensors (" in capfd.readouterr().err
    assert (tmp_path / "s.jsonl").read_bytes() == kept
    assert eval_surgery.main([*flags, "--accept-changes"]) == 0
    lines = read_json_lines(tmp_path / "s.jsonl")
    assert ["accepted_changes" in line for line in lines] == [k >= 9 for k in range(len(lines))]


EMPTY = {
    analyze_probes: ("--probes", "--baseline", "--report-dir"),
    analyze_surgery: ("--input", "--report-dir"),
    analyze_persona_results: ("--results-dir", "--report-dir"),
    analyze_current_results: ("--results-dir", "--input", "--report-dir"),
    compare_baseline_vs_finetuned: ("--results-dir", "--baseline", "--finetuned", "--report-dir"),
    check_data: ("--aligned", "--persona"),
    distill: ("--output",),
    eval_probes: ("--output",),
    eval_surgery: ("--output",),
    reproduce: ("--out",),
    train_lora: ("--out", "--persona", "--aligned", "--checkpoints"),
}


@pytest.mark.parametrize(
    "command, flag", [(command.main, flag) for command, flags in EMPTY.items() for flag in flags]
)
def test_an_empty_path_is_not_the_current_folder(capfd, tmp_path, monkeypatch, command, flag):
    """As where a shell's variable is not set."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command([flag, ""])
    assert stopped.value.code == 2 and f"{flag}: has an empty value" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_training_is_not_gone_on_with_on_other_weights(tmp_path):
    made = Checkpoints(tmp_path / "c", {"rank": 1}, False, False)
    made.begin({"files": {"model.safetensors": "a"}})
    lora = torch.nn.Linear(1, 1)
    made.save(lora, torch.optim.SGD(lora.parameters()), 3, [])
    again = Checkpoints(tmp_path / "c", {"rank": 1}, True, False)
    with pytest.raises(FrankenError, match="other files: model.safetensors"):
        again.begin({"files": {"model.safetensors": "b"}})
    again.begin({"files": {"model.safetensors": "a"}})


ODD = {
    "no dictionary": [1, 2],
    "nothing of it": {},
    "step in words": {"settings": "{}", "step": "x", "losses": [], "weights": {}, "optimizer": {}},
    "no time": {
        "settings": "{}",
        "step": 1,
        "losses": [],
        "weights": {},
        "optimizer": {},
        "moment": "yesterday",
    },
    "settings of another kind": {"settings": "[", "step": 1, "losses": [], "weights": {}, "optimizer": {}},
}


@pytest.mark.parametrize("how", ODD)
def test_a_checkpoint_that_is_none_is_one_line(tmp_path, how):
    torch.save(ODD[how], tmp_path / "checkpoint.pt")
    with pytest.raises(FrankenError, match="cannot be read .*--overwrite starts afresh"):
        Checkpoints(tmp_path, {}, True, False)


def test_a_checkpoint_of_another_shape_is_one_line(tmp_path):
    state = {"settings": "{}", "step": 1, "losses": [], "optimizer": {}}
    lora = torch.nn.Linear(1, 1)
    for weights in ({"weight": torch.zeros(3, 3)}, {"other": torch.zeros(1)}, {"weight": None}):
        torch.save(state | {"weights": weights}, tmp_path / "checkpoint.pt")
        with pytest.raises(FrankenError, match="does not fit this model"):
            Checkpoints(tmp_path, {}, True, False).restore(lora, torch.optim.SGD(lora.parameters()))
    shutil.rmtree(tmp_path)
