"""Files of a run: written whole or not at all, checked when read, and what the schema lets through."""

import copy
import errno
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys

import jsonschema
import pytest
import small_battery

import evaluate
import prompts
import run_all
from errors import FrankenError
from runner import results
from runner.manifest import protocol_json
from runner.results import SCHEMA, Run, check_writable, read_json, write_json, write_text
from suites.base import Protocol


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two experiments with all suites, the second of them failed. Not to be written to."""
    folder = tmp_path_factory.mktemp("results")
    for k, name in enumerate(("instruct", "base")):
        small_battery.checkpoint(folder / name, 100 + k, layers=2)
    (folder / "mine.py").write_text(
        "from experiments import *\n"
        "EXPERIMENTS = [Experiment('nowhere', 'mine', lambda m: swap(m.model, 0, 1))]\n"
    )
    whole, calls = evaluate.evaluate, []

    def once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise FrankenError("nothing is measured")
        return whole(*args)

    with pytest.MonkeyPatch.context() as m:
        small_battery.use(m)
        m.setattr(evaluate, "evaluate", once)
        assert (
            run_all.main(
                small_battery.arguments(folder, folder / "out", "--experiments-file", folder / "mine.py")
            )
            == 1
        )
    (path,) = (folder / "out").iterdir()
    return path


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that may be written to."""
    (tmp_path / "run" / "experiments").mkdir(parents=True)
    for file in [*finished.glob("*.json"), *finished.glob("experiments/*.json")]:
        (tmp_path / "run" / file.relative_to(finished)).write_bytes(file.read_bytes())
    return Run(tmp_path / "run")


# ---- writing -----------------------------------------------------------------------------------------------


def test_text_survives_whatever_a_model_writes(tmp_path):
    for data in (
        {"text": '\ud800 lone, \x00 nul, \u2028, é, 🙂, "quotes" \\'},
        {"numbers": [1e-300, 0.1, -0.0, 2**63]},
    ):
        write_json(tmp_path / "a.json", data)
        assert read_json(tmp_path / "a.json") == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_nan_is_written_or_read(tmp_path, value):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": value})
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.json").write_text(json.dumps({"x": value}))
    with pytest.raises(FrankenError, match="a.json is corrupt .* is not JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, number):
    write_text(tmp_path / "a.txt", "old")

    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(FrankenError, match=f"cannot write .*a.txt: {os.strerror(number)}"):
        write_text(tmp_path / "a.txt", "new " * 9999)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path):
    """The partial file is made to be /dev/full, which accepts opening and refuses every byte."""
    write_text(tmp_path / "a.txt", "old")
    (tmp_path / f".a.txt.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(FrankenError, match="a.txt: No space left on device"):
        write_text(tmp_path / "a.txt", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_folder_that_is_not_there_any_more(tmp_path):
    (tmp_path / "file").write_text("")
    for gone in ("none", "file"):
        with pytest.raises(FrankenError, match="cannot write"):
            write_text(tmp_path / gone / "a.txt", "new")


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/none", "/dev/full"])
def test_unwritable_places_are_refused(tmp_path, where):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FrankenError, match="cannot write results to .*: [A-Z]") as caught:
        check_writable(str(tmp_path / where))
    assert "\n" not in str(caught.value) and (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_seen_before_the_run(tmp_path, monkeypatch):
    class Full:
        def __init__(self, **kwargs):
            self.file = open("/dev/full", "wb")  # noqa: SIM115

        def __enter__(self):
            return self.file

        def __exit__(self, *args):
            self.file.close()

    monkeypatch.setattr(results.tempfile, "TemporaryFile", Full)
    with pytest.raises(FrankenError, match="No space left on device"):
        check_writable(str(tmp_path))


def test_the_last_bits_of_what_is_computed_are_not_written(tmp_path):
    """Which differ from one processor's kernels to another's."""
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    numbers = [0.1, 2 / 3, 1e-300, -7.0, 123456.789, 0.0]
    results.write_computed(one, {"a": [{"b": x} for x in numbers], "n": 3, "whole": True, "none": None})
    moved = [math.nextafter(math.nextafter(x, 9e9), 9e9) if x else x for x in numbers]
    results.write_computed(other, {"a": [{"b": x} for x in moved], "n": 3, "whole": True, "none": None})
    assert moved != numbers and one.read_bytes() == other.read_bytes()
    again = json.loads(one.read_text())
    assert [line["b"] for line in again["a"]] == pytest.approx(numbers, rel=1e-9, abs=0)
    assert again["n"] == 3 and again["whole"] is True and again["none"] is None


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(results.time, "strftime", lambda *args: "run_20260101_000000")
    made = [Run.create(str(tmp_path / "new" / "out"), {"n": k}) for k in range(3)]
    assert [r.path.name for r in made] == [
        "run_20260101_000000",
        "run_20260101_000000_1",
        "run_20260101_000000_2",
    ]
    assert [read_json(r.manifest_path)["n"] for r in made] == [0, 1, 2] and all(
        (r.path / "experiments").is_dir() for r in made
    )


def test_the_101st_run_of_a_second_gets_a_folder_too(tmp_path, monkeypatch):
    monkeypatch.setattr(results.time, "strftime", lambda *args: "run_20260101_000000")
    for k in range(100):
        (tmp_path / f"run_20260101_000000{f'_{k}' if k else ''}").mkdir()
    assert Run.create(str(tmp_path), {"n": 100}).path.name == "run_20260101_000000_100"


# ---- the schema --------------------------------------------------------------------------------------------


def objects(schema, value, path=()):
    """(path, schema) of every object in `value` for which the schema names required keys."""
    if "oneOf" in schema:
        schema = next(
            (s for s in schema["oneOf"] if s.get("type") == "object" and isinstance(value, dict)), {}
        )
    if isinstance(value, dict):
        yield path, schema
        for key, sub in schema.get("properties", {}).items():
            if key in value:
                yield from objects(sub, value[key], (*path, key))
    elif isinstance(value, list) and value and "items" in schema:
        yield from objects(schema["items"], value[0], (*path, 0))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def test_results_fit_the_schema_and_every_required_key_is_needed(run):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    whole, failed = (run.load(name) for name in ("baseline_instruct", "nowhere"))
    assert set(whole["measurements"]) == set(small_battery.SUITES)
    assert whole["status"] == "done"
    assert whole["error"] is None
    assert failed["measurements"] == {}
    assert failed["status"] == "failed"
    assert failed["error"]["type"] == "FrankenError"
    tried = 0
    for result in (whole, failed):
        for path, schema in list(objects(SCHEMA, result)):
            for key in schema.get("required", []):
                broken = copy.deepcopy(result)
                del at(broken, path)[key]
                assert not results.VALIDATOR.is_valid(broken), (path, key)
                tried += 1
    assert tried > 120


def test_what_is_quick_to_check_the_schema_agrees_with_what_words_its_errors(run):
    """On every result with any one value of it replaced by one of each other kind."""
    tried = refused = 0
    for name in ("baseline_instruct", "nowhere"):
        whole = run.load(name)
        assert results.QUICK.is_valid(whole)
        for path, _ in itertools.islice(objects(SCHEMA, whole), 12):
            for key in at(whole, path):
                for value in (None, True, 1, 1.0, 1.5, -1, "", "a" * 9, [], {}, [1], 1e300, 2**70):
                    broken = copy.deepcopy(whole)
                    at(broken, path)[key] = value
                    agreed = results.VALIDATOR.is_valid(broken)
                    assert results.QUICK.is_valid(broken) == agreed, (path, key, value)
                    tried, refused = tried + 1, refused + (not agreed)
    assert tried > 500 and 0.3 < refused / tried < 1


def test_a_lone_surrogate_is_left_to_the_slower_check(run):
    result = run.load("baseline_instruct")
    result["experiment"]["hypothesis"] = "\ud800"
    results.check(result)
    result["experiment"]["notes"] = "\ud800"
    with pytest.raises(jsonschema.ValidationError):
        results.check(result)


def test_the_file_itself_fits_the_schema_and_holds_no_question(run):
    text = run.file("baseline_instruct").read_text()
    results.VALIDATOR.validate(json.loads(text))
    asked = run.load("baseline_instruct")["measurements"]["binary"]["probes"][0]["text"]
    assert asked not in text
    assert run.texts_path.read_text().count(asked) == 1


def test_results_of_version_1_are_read_as_they_stand(run):
    """In version 1 a file held what is now made of it: no tables, the questions in full."""
    result = run.load("baseline_instruct") | {"schema_version": 1}
    run.file("baseline_instruct").write_text(json.dumps(result, indent=1))
    run.texts_path.unlink()
    assert Run(run.path).load("baseline_instruct") == result
    manifest = read_json(run.manifest_path) | {"schema_version": 1}
    write_json(run.manifest_path, manifest)
    assert Run.resume(str(run.path))[1] == manifest


def test_the_schema_is_held_against_a_file_once(run, monkeypatch):
    checks, whole = [], results.check

    def counting(result):
        checks.append(result["status"])
        whole(result)

    monkeypatch.setattr(results, "check", counting)
    first = run.load("baseline_instruct")
    assert run.load("baseline_instruct") == first
    assert len(checks) == 1
    run.save(first)
    assert run.load("baseline_instruct") == first
    assert len(checks) == 2
    text = run.file("baseline_instruct").read_text()
    run.file("baseline_instruct").write_text(text.replace('"exact": true', '"exact": "true"'))
    with pytest.raises(FrankenError, match="is corrupt"):
        run.load("baseline_instruct")


def test_a_digit_that_changed_on_disk_is_noticed(run):
    """No schema can tell one number from another; results of before the hash are read as they stand."""
    written = json.loads(run.file("baseline_instruct").read_text())
    written["measurements"]["perplexity"]["perplexity"] += 1
    run.file("baseline_instruct").write_text(json.dumps(written))
    with pytest.raises(FrankenError, match="baseline_instruct.json is corrupt .it is not what was written"):
        run.load("baseline_instruct")
    del written["sha256"]
    run.file("baseline_instruct").write_text(json.dumps(written))
    assert run.load("baseline_instruct")["status"] == "done"


def test_no_byte_of_a_result_changes_unnoticed(run):
    """Every 97th byte, turned into another: a digit into a digit, so that it is JSON still."""
    file = run.file("baseline_instruct")
    content = file.read_bytes()
    for at in range(0, len(content), 97):
        other = b"7" if content[at : at + 1] != b"7" else b"1"
        file.write_bytes(content[:at] + other + content[at + 1 :])
        with pytest.raises(FrankenError, match="is corrupt"):
            run.load("baseline_instruct")
    file.write_bytes(content)
    assert run.load("baseline_instruct")["status"] == "done"


@pytest.mark.parametrize("text", ["lone \ud800", '"sha256": "' + "0" * 64 + '"', "1e400", "\x00"])
def test_whatever_a_model_writes_is_sealed_and_read_again(run, text):
    result = run.load("baseline_instruct")
    result["experiment"]["notes"] = [text]
    run.save(result)
    assert run.load("baseline_instruct") == result


def test_an_older_seal_is_of_the_data_however_they_are_laid_out(run):
    written = json.loads(run.file("baseline_instruct").read_text())
    del written["sha256"]
    digest = hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
    run.file("baseline_instruct").write_text(json.dumps({"sha256": digest} | written, indent=1))
    assert run.load("baseline_instruct")["status"] == "done"


@pytest.mark.parametrize("how", ["gone", "changed", "no JSON", "of another kind"])
def test_texts_that_are_not_those_of_the_run_are_named(run, how):
    text = run.texts_path.read_text()
    if how == "gone":
        run.texts_path.unlink()
    else:
        broken = {"changed": text.replace("Answer", "Reply"), "no JSON": text[:-9], "of another kind": "[]"}
        run.texts_path.write_text(broken[how])
    said = "texts.json is missing; put it back" if how == "gone" else "texts.json is corrupt"
    with pytest.raises(FrankenError, match=said) as caught:
        Run(run.path).load("baseline_instruct")
    assert "\n" not in str(caught.value) and "move" not in str(caught.value)


def test_texts_that_lack_a_question_are_at_fault_and_not_the_result_that_asks_it(run):
    data = json.loads(run.texts_path.read_text())
    first = next(key for key in data["texts"] if key in run.file("baseline_instruct").read_text())
    taken = data["texts"].pop(first)
    write_json(run.texts_path, data)
    with pytest.raises(FrankenError) as caught:
        Run(run.path).load("baseline_instruct")
    place = run.file("baseline_instruct")
    said = f"{run.texts_path} lacks the questions {first[:40]!r} of {place}; put it back"
    assert str(caught.value).startswith(said) and "corrupt" not in str(caught.value)
    data["texts"][first] = taken
    write_json(run.texts_path, data)
    assert Run(run.path).load("baseline_instruct")["status"] == "done"


BREAKS = {
    "another version": lambda r: r.update(schema_version=3),
    "another status": lambda r: r.update(status="maybe"),
    "numbers as text": lambda r: r["measurements"]["perplexity"].update(perplexity="12"),
    "a count with a fraction": lambda r: r["measurements"]["capability"].update(correct=0.5),
    "true for a count": lambda r: r["measurements"]["capability"].update(n=True),
    "a key that is neither": lambda r: r["measurements"]["binary"]["probes"][0].update(keyed="perhaps"),
    "a reply that is no text": lambda r: r["measurements"]["chat"]["probes"][0]["reply"].update(text=None),
    "an error in text": lambda r: r.update(error="it failed"),
    "a fingerprint that is missing": lambda r: r["weights"].update(original=None),
    "layers that are no list": lambda r: r["experiment"]["recipe"].update(slots={}),
    "seconds as null": lambda r: r["performance"].update(seconds=None),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_schema_rejects(run, name):
    result = run.load("baseline_instruct")
    BREAKS[name](result)
    with pytest.raises(jsonschema.ValidationError):
        run.save(result)
    write_json(run.file("baseline_instruct"), result)
    with pytest.raises(
        FrankenError, match=r"baseline_instruct.json is corrupt \(\$.*; move it away and resume"
    ) as caught:
        run.load("baseline_instruct")
    assert "\n" not in str(caught.value)


# ---- reading -----------------------------------------------------------------------------------------------


CORRUPT = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short of its end": lambda data: data.rstrip()[:-1],
    "not UTF-8": lambda data: data.replace(b"The control", b"The \xffcontrol"),
    "zeros": lambda data: b"\x00" * len(data),
    "NaN": lambda data: data.replace(b'"nll": ', b'"nll": NaN, "old": ', 1),
    "beyond all numbers": lambda data: data.replace(b'"nll": ', b'"nll": 1e400, "old": ', 1),
    "a list": lambda data: b"[]",
    "another experiment": lambda data: data.replace(b"baseline_instruct", b"shuffle_all"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_results_are_named_in_one_line(run, name):
    file = run.file("baseline_instruct")
    file.write_bytes(CORRUPT[name](file.read_bytes()))
    with pytest.raises(
        FrankenError,
        match="baseline_instruct.json is corrupt .*; move it away and resume to run that experiment again$",
    ) as caught:
        run.load("baseline_instruct")
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_cannot_be_read(run):
    assert run.load("swap_adjacent_30_35") is None
    run.file("swap_adjacent_30_35").mkdir()
    with pytest.raises(FrankenError, match="cannot read .*swap_adjacent_30_35.json: Is a directory"):
        run.load("swap_adjacent_30_35")
    with pytest.raises(FrankenError, match="cannot read .*manifest.json: No such file"):
        Run.resume(str(run.path / "none"))


@pytest.mark.parametrize("key", results.MANIFEST.schema["required"])
def test_a_manifest_that_lacks_something_is_refused(run, key):
    manifest = Run.resume(str(run.path))[1]
    for broken in ({k: v for k, v in manifest.items() if k != key}, manifest | {key: 1.5}):
        if key == "pair" and broken.get("pair") is None:
            continue  # two checkpoints have no name, which null says as well as nothing
        write_json(run.manifest_path, broken)
        with pytest.raises(
            FrankenError, match=f"manifest.json is (corrupt .{key}|not a manifest of version 1 to 2)"
        ):
            Run.resume(str(run.path))


WRONG_WITHIN = {
    "experiments.0": lambda m: m["experiments"].__setitem__(0, 5),
    "devices.0": lambda m: m["devices"].__setitem__(0, 0),
    "hardware": lambda m: m.update(hardware="2020"),
    "hardware.gpus": lambda m: m["hardware"].update(gpus=3),
    "hardware.processor": lambda m: m["hardware"].pop("processor"),
    "protocol.seed": lambda m: m["protocol"].pop("seed"),
    "protocol.temperature": lambda m: m["protocol"].update(temperature=[]),
    "command.0": lambda m: m["command"].__setitem__(0, 1),
    "versions": lambda m: m.update(versions=[[]]),
    "load_seconds": lambda m: m.update(load_seconds=[]),
    "sources.instruct": lambda m: m["sources"].update(instruct=1e300),
    "template": lambda m: m.update(template=["moment"]),
    "resumed": lambda m: m.update(resumed=3),
    "layers": lambda m: m.update(layers=10**9),
}


@pytest.mark.parametrize("place", WRONG_WITHIN)
def test_a_manifest_of_another_form_is_refused_by_the_place(run, place):
    """Each of these ended report.py or a resume in a traceback."""
    manifest = Run.resume(str(run.path))[1]
    full = {
        "command": ["run_all.py"],
        "versions": {"torch": "2"},
        "hardware": {"processor": "x", "threads": 1, "memory_bytes": 1, "gpus": []},
        "sources": {"instruct": {"kind": "checkpoint", "path": "x", "files": {}}},
        "load_seconds": 1.0,
    }
    manifest = full | manifest
    write_json(run.manifest_path, manifest)
    Run.resume(str(run.path))
    WRONG_WITHIN[place](manifest)
    write_json(run.manifest_path, manifest)
    with pytest.raises(FrankenError, match=f"corrupt .{place} is missing or of another kind"):
        Run.resume(str(run.path))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "3"])
def test_a_manifest_that_is_none_is_refused(run, text):
    run.manifest_path.write_text(text)
    with pytest.raises(FrankenError, match="manifest.json is (corrupt|not a manifest)"):
        Run.resume(str(run.path))


# ---- alone in the folder -----------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_a_dead_ones_lock_is_none(run):
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX);"
            " print('held', flush=True); sys.stdin.read()",
            run.path,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert held.stdout.readline() == b"held\n"
    with pytest.raises(FrankenError, match="another process is at work on"), run.alone():
        pytest.fail("two at once")
    held.kill()
    held.wait()
    with run.alone():
        pass


def test_half_written_files_of_dead_processes_are_removed(run):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = run.path / "experiments" / f".a.json.{dead.pid}.partial"
    ours = run.path / f".manifest.json.{os.getpid()}.partial"
    for partial in (left, ours):
        partial.write_text("{")
    with run.alone():
        assert not left.exists()
        assert ours.exists()


# ---- the manifest ------------------------------------------------------------------------------------------


def test_the_manifest_says_what_ran_on_what(finished):
    manifest = read_json(finished / "manifest.json")
    assert {"created", "command", "commit", "versions", "hardware", "sources", "load_seconds"} <= set(
        manifest
    )
    assert manifest["versions"].keys() >= {"python", "torch", "transformers", "safetensors"} and all(
        manifest["versions"][k] for k in ("python", "torch")
    )
    assert manifest["hardware"]["memory_bytes"] > 1 << 30 and manifest["hardware"]["cpus"] >= 1
    assert manifest["experiments"] == ["baseline_instruct", "nowhere"] and (
        manifest["layers"],
        manifest["dtype"],
        manifest["devices"],
    ) == (2, "float32", ["cpu"])

    for source, entry in manifest["sources"].items():
        digest = hashlib.sha256((finished.parents[1] / source / "model.safetensors").read_bytes()).hexdigest()
        assert entry["files"]["model.safetensors"]["sha256"] == digest and entry["kind"] == "checkpoint"


def test_protocols_are_equal_in_the_manifest_only_if_they_ask_the_same(monkeypatch):
    def recorded(**changes):
        return json.loads(json.dumps(protocol_json(Protocol(**changes))))

    first = recorded()
    # what is compared on resume has been through JSON
    assert recorded() == first == protocol_json(Protocol())
    text = prompts.NEUTRAL_TEXTS["news"]
    assert {"id": "news", "characters": len(text)} == {
        k: v
        for k, v in first["texts"][[t["id"] for t in first["texts"]].index("news")].items()
        if k != "sha256"
    }
    assert text[:40] not in json.dumps(first)
    different = [
        {"seed": 1},
        {"samples": 2},
        {"max_new_tokens": 81},
        {"suites": ("binary",)},
        {"texts": (("news", text[:-1]),)},
        {"execute_code": True},
    ]
    assert all(recorded(**changes) != first for changes in different)
    monkeypatch.setattr(prompts, "CAPABILITY", prompts.CAPABILITY[1:])
    assert recorded() != first
