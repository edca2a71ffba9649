"""Checkpoints, adapters and files from anywhere: whatever stands in them is one line, soon, before anything
of its size is made."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import stat
import struct
import time
import tracemalloc
from datetime import datetime

import pytest
import small_battery
import tiny
import torch
from cli_runs import refused
from safetensors.torch import save_file

from engine import template_guard
from engine.chat_template import ChatTemplate
from errors import FrankenError
from files import check_target, parse_json, read_bytes, read_json, refuse_place, refuse_special, write_text
from runner import commands
from runner.pairs import load_tokenizer, open_pair
from surgery.tensors import read_header
from surgery.weights import Adapter, Checkpoint


@pytest.fixture(autouse=True)
def battery(monkeypatch):
    small_battery.use(monkeypatch)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return small_battery.checkpoint(tmp_path_factory.mktemp("whole") / "model", 5, family="qwen2", layers=3)


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of a checkpoint that may be written to."""
    return shutil.copytree(whole, tmp_path / "model")


def reconfigured(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def refusal(folder) -> str:
    """What opening the folder says, in one line."""
    with pytest.raises(FrankenError) as caught:
        open_pair(instruct=str(folder), device_map="cpu", dtype="float32")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- JSON --------------------------------------------------------------------------------------------------

DEEP = "[" * 200_000 + "]" * 200_000


def test_deep_json_is_one_line_wherever_it_is_read(folder, tmp_path, capfd):
    for text in (DEEP, '{"a":' * 100_000 + "1" + "}" * 100_000):
        with pytest.raises(FrankenError, match="x.json is corrupt .it is nested too deep"):
            parse_json(text, "x.json")
    for name, words in {
        "config.json": "config.json is corrupt (it is nested too deep)",
        "model.safetensors.index.json": "not a readable shard index",
        "tokenizer.json": "cannot load the tokenizer",
        "tokenizer_config.json": "cannot load the tokenizer",
    }.items():
        copy = shutil.copytree(folder, tmp_path / name)
        (copy / name).write_text(DEEP)
        assert words in refusal(copy), name
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(DEEP)
    with pytest.raises(FrankenError, match="no readable adapter_config.json"):
        Adapter("rune", adapter, Checkpoint("instruct", folder))


def test_whole_numbers_that_no_float_holds_are_one_line(whole, tmp_path):
    for digits in ("9" * 301, "-" + "9" * 400, "9" * 5000):
        with pytest.raises(FrankenError, match="x.json is corrupt"):
            parse_json(f'{{"a": [{digits}]}}', "x.json")
    for beyond in ("1e400", "-1e309", "9" * 309 + ".0"):  # read as infinity, which JSON does not have
        with pytest.raises(FrankenError, match="x.json is corrupt .* is beyond all numbers"):
            parse_json(f'{{"a": [{beyond}]}}', "x.json")
    assert parse_json('{"a": 1e308, "b": 1e-400}', "x.json") == {"a": 1e308, "b": 0.0}
    assert parse_json('{"a": -12345678901234567890}', "x.json") == {"a": -12345678901234567890}
    (tmp_path / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": 2, "lora_alpha": {10**400}, "target_modules": ["q_proj"]}}'
    )
    with pytest.raises(FrankenError, match="no readable adapter_config.json"):
        Adapter("rune", tmp_path, Checkpoint("instruct", whole))


# ---- numbers in a config -----------------------------------------------------------------------------------

NUMBERS = {
    "num_hidden_layers": [10**9, -1, 0, 2.5, 10**400],
    "hidden_size": [10**12, -4, 0, 2**31 - 1, 100_003],
    "vocab_size": [10**10, 10**7, -1],
    "num_attention_heads": [0, 10**9, -2],
    "num_key_value_heads": [0, 3, 10**9],
    "head_dim": [0, 10**7, -1],
    "intermediate_size": [10**11, 10**8, -5],
    "max_position_embeddings": [10**15, -7],
    "rms_norm_eps": [float("nan")],
    "rope_theta": [float("nan")],
}


@pytest.mark.parametrize("field,value", [(f, v) for f, values in NUMBERS.items() for v in values], ids=repr)
def test_impossible_numbers_are_one_line_before_anything_is_allocated(folder, field, value):
    reconfigured(folder, **{field: value})
    begin = time.monotonic()
    tracemalloc.start()
    said = refusal(folder)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(folder) in said and len(said) < 400
    assert time.monotonic() - begin < 60 and most < 200 << 20, (most, said)


def test_a_config_is_held_against_the_tensors(folder):
    said = refusal(reconfigured(folder, intermediate_size=64))
    assert "by its config.json layer 0 mlp." in said and "in the weights it is" in said
    open_pair(instruct=str(reconfigured(folder, intermediate_size=48)), device_map="cpu", dtype="float32")


# ---- chat templates ----------------------------------------------------------------------------------------

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
TEMPLATES = {
    LOOP + "{% endfor %}{% endfor %}{% endfor %}": "does not end",
    LOOP + "x{% endfor %}{% endfor %}{% endfor %}": "writes over 1 MiB",
    "{{ 'x' * 10**10 }}": "takes over 1 GiB",
    # no conversation comes there, but whoever compiles it works it out
    "{% if messages == 3 %}{{ ('x' * 10**10)[:3] }}{% endif %}": "takes over 1 GiB",
    "{{ 'x' * 10**7 }}": "writes over 1 MiB",
    "{# " + "x" * (1 << 20) + " #}{{ messages[0].content }}": "is over 1 MiB long",
}


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_templates_without_an_end_are_one_line(folder, template, monkeypatch):
    monkeypatch.setattr(template_guard, "TEMPLATE_SECONDS", 1)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(FrankenError, match=f"the chat template {TEMPLATES[template]}"):
        load_tokenizer(folder)


ONLY = "{% if 'layers' in messages[-1].content %}" + "@{% endif %}" + tiny.TEMPLATE
ON_A_WORD = {
    "loops": (
        ONLY.replace("@", LOOP + "{% endfor %}{% endfor %}{% endfor %}"),
        "does not end: a conversation took",
    ),
    "writes": (ONLY.replace("@", LOOP + "x{% endfor %}{% endfor %}{% endfor %}"), "writes over 1 MiB"),
    "hoards": (ONLY.replace("@", "{{ (messages[-1].content * 10**9)[:3] }}"), "takes over 1 GiB"),
}


@pytest.mark.parametrize("how", ON_A_WORD)
def test_a_template_that_does_so_on_certain_words_alone_is_one_line(how, monkeypatch):
    monkeypatch.setattr(template_guard, "TEMPLATE_SECONDS", 1)
    source, words = ON_A_WORD[how]
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = source
    template = ChatTemplate(tokenizer)
    template.check("user")
    asked = [{"role": "user", "content": "Have your layers been swapped?"}]
    with pytest.raises(FrankenError, match=f"this model's chat template {words}"):
        template.ids(asked)
    harmless = [{"role": "user", "content": "And now?"}]
    assert template.render(harmless).endswith("assistant\n")  # the next one is tried again


def test_a_run_on_such_a_template_ends_in_one_line_before_it_begins(go, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(template_guard, "TEMPLATE_SECONDS", 1)
    folder = shutil.copytree(pair / "instruct", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(ON_A_WORD["loops"][0])
    refused(
        go("--experiments", "baseline_instruct", "--instruct", folder, "--base", pair / "base"),
        "does not end",
    )
    assert not list(tmp_path.glob("out/run_*/experiments/*.json"))


def test_what_a_guard_tries_is_what_transformers_writes(monkeypatch):
    """Its variables too: the moment, the switches and the special tokens decide which way a template goes."""
    monkeypatch.setattr(template_guard, "TEMPLATE_SECONDS", 1)
    tokenizer = tiny.tokenizer()
    trap = LOOP + "{% endfor %}{% endfor %}{% endfor %}"
    for condition in (
        "strftime_now('%Y') == '1999'",
        "enable_thinking is defined and not enable_thinking",
        f"eos_token == '{tokenizer.eos_token}'",
        "add_generation_prompt",
        "tools is none and documents is none",
    ):
        tokenizer.chat_template = "{% if " + condition + " %}" + trap + "{% endif %}" + tiny.TEMPLATE
        template = ChatTemplate(tokenizer, datetime(1999, 3, 1))
        with pytest.raises(FrankenError, match="does not end"):
            template.render([{"role": "user", "content": "Hello."}])


def tried() -> int:
    """The process in which a conversation was tried."""
    assert template_guard.problem(tiny.TEMPLATE, [{"role": "user", "content": "Hello."}]) is None
    return template_guard._child.process.pid


def test_a_guard_that_was_forked_or_killed_is_started_again():
    first = tried()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(tried) != first
    assert tried() == first
    os.kill(first, signal.SIGKILL)
    template_guard._child.process.wait()
    assert tried() != first


def test_templates_that_refuse_a_conversation_are_left_to_their_user(folder):
    text = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    )
    for template in (
        text,
        "{{ no.such.thing }}",
        "{% generation %}a{% endgeneration %}{{ strftime_now('%Y') }}",
    ):
        (folder / "chat_template.jinja").write_text(template)
        assert load_tokenizer(folder).chat_template == template


# ---- safetensors -------------------------------------------------------------------------------------------


def with_header(path, change) -> None:
    """Rewrite a safetensors file's header; the data stays."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = (text if isinstance(text, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def moved(by):
    def change(header):
        name = sorted(k for k in header if k != "__metadata__")[1]
        header[name]["data_offsets"] = [x + by for x in header[name]["data_offsets"]]

    return change


def twice(header):
    """One name with two shapes, which two readers may read in two ways."""
    name = sorted(k for k in header if k != "__metadata__")[0]
    text = json.dumps(header)
    other = header[name] | {"shape": [*reversed(header[name]["shape"])]}
    return text[:-1] + f', "{name}": {json.dumps(other)}' + "}"


HEADERS = {
    "negative": moved(-(10**6)),
    "overlapping": moved(-4),
    "with a gap": moved(4),
    "beyond the file": moved(10**12),
    "in the header": moved(-40),
    "fractions": lambda h: h["a"].update(data_offsets=[0.0, 64.0]),
    "too deep": lambda h: DEEP,
    "no object": lambda h: "[]",
    "negative shape": lambda h: h["a"].update(shape=[-4, -4]),
    "huge shape": lambda h: h["a"].update(shape=[2**62, 2**62]),
}


@pytest.mark.parametrize("how", HEADERS)
def test_headers_that_make_no_sense_are_one_line(tmp_path, how):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4, 4), "b": torch.ones(4, 2), "c": torch.ones(2)}, path)
    assert set(read_header(path)) == {"a", "b", "c"}
    with_header(path, HEADERS[how])
    with pytest.raises(FrankenError, match="model.safetensors: ") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


def test_shards_outside_the_folder_are_not_read(tmp_path):
    tiny.write_checkpoint(tmp_path / "model", "qwen2", layers=2, shards=2)
    index = tmp_path / "model" / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    shard = tmp_path / "model" / "model-00001-of-00002.safetensors"
    shutil.copy(shard, tmp_path / "elsewhere.safetensors")
    for name in (
        "../elsewhere.safetensors",
        str(tmp_path / "elsewhere.safetensors"),
        "a/../../elsewhere.safetensors",
    ):
        changed = {k: name if v == shard.name else v for k, v in whole["weight_map"].items()}
        index.write_text(json.dumps(whole | {"weight_map": changed}))
        with pytest.raises(FrankenError, match="names a shard outside its folder"):
            Checkpoint("x", tmp_path / "model")


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_scales_that_are_no_numbers_are_refused(whole, tmp_path, alpha):
    (tmp_path / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": 2, "lora_alpha": {alpha}, "target_modules": ["q_proj"]}}'
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FrankenError, match="adapter_config.json makes the scale"):
        Adapter("rune", tmp_path, Checkpoint("instruct", whole))


# ---- what can be opened and is no file ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_a_named_pipe_in_a_checkpoint_is_one_line(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert refusal(folder) == f"{folder / name} is a named pipe, not a file"


def test_pipes_and_devices_as_files_are_one_line(go, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a named pipe"), ("/dev/zero", "a device")):
        for flag in ("--perplexity-file", "--experiments-file"):
            refused(go(flag, path), f"{path} is {kind}, not a file")
        with pytest.raises(FrankenError, match="not a file"):
            read_json(path)


def test_files_of_any_other_kind_are_left_to_their_reader(tmp_path):
    refuse_special(tmp_path)
    refuse_special(tmp_path / "none")
    refuse_special("a\0b")
    with pytest.raises(FrankenError, match="cannot read"):
        read_bytes("a\0b")
    (tmp_path / "large").write_bytes(b"x" * 11)
    assert read_bytes(tmp_path / "large", most=11) == b"x" * 11
    with pytest.raises(FrankenError, match="holds over 10 bytes"):
        read_bytes(tmp_path / "large", most=10)


def test_a_file_takes_the_place_of_no_pipe_and_no_socket(tmp_path):
    """A name that is moved over another would take it away, as it once did /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    for name, kind in {"pipe": "a named pipe", "link": "a named pipe", "socket": "a socket"}.items():
        for write in (lambda path: write_text(path, "x"), check_target):
            with pytest.raises(FrankenError, match=f"{name} is {kind}, not a file"):
                write(tmp_path / name)
    assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode)
    assert (tmp_path / "link").is_symlink()


def test_a_file_takes_the_place_of_nothing_of_the_systems(tmp_path, monkeypatch):
    """Only looked at here: as root, a test that fails must not take /dev/null away."""
    (tmp_path / "dev").symlink_to("/dev")
    for path in (
        "/dev/null",
        "/dev/stdout",
        "/dev/new",
        "/proc/self/x",
        "/dev/fd/1",
        tmp_path / "dev" / "new",
    ):
        with pytest.raises(FrankenError, match="is a |of the system's own"):
            refuse_place(path)
    monkeypatch.chdir("/dev")
    with pytest.raises(FrankenError, match="of the system's own"):
        refuse_place("new.json")
    refuse_place("/dev/shm/new.json")
    refuse_place(tmp_path / "new.json")


def test_where_nothing_can_be_written_is_said_beforehand(go, tmp_path, capfd):
    (tmp_path / "file").write_text("x")
    places = [tmp_path, tmp_path / "file" / "x", tmp_path / ("y" * 300), tmp_path / "pipe"]
    os.mkfifo(tmp_path / "pipe")
    for place in places:
        with pytest.raises(FrankenError):
            check_target(place)
        for argv in (["mergekit", "swap_adjacent_30_35", "--output"], ["export", "swap_adjacent_30_35"]):
            if argv[0] == "export" and place == tmp_path:
                continue
            capfd.readouterr()
            assert commands.main([*argv, str(place), "--instruct", "/no/such/model"]) == 1
            err = capfd.readouterr().err
            assert len(err.splitlines()) == 1 and "/no/such/model" not in err, err
    assert commands.main(["mergekit", "swap_adjacent_30_35", "--output", ""]) == 1
