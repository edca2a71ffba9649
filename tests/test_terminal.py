"""What reaches a terminal and summary.md: no control character, nothing hidden, no traceback from what
cannot be encoded, and a line where too few files may be open."""

import json
import os
import subprocess
import sys

import pytest
import small_battery
from cli_runs import latest, read, resealed
from hidden import ESCAPE, UNSEEN, plain

import report
from errors import FrankenError, printable
from files import ROOT
from reporting.vocabulary import markdown_cell


@pytest.fixture(autouse=True)
def battery(monkeypatch):
    small_battery.use(monkeypatch)


def test_an_error_is_one_line_without_control_characters():
    said = str(FrankenError(f"{ESCAPE}/a\nb: \ud800 {UNSEEN}"))
    assert plain(said) and "\n" not in said and said.encode("utf-8")
    assert "a␊b" in said and "␛]0;owned␇" in said
    assert str(FrankenError("two words")) == "two words"


def test_names_with_control_characters_come_out_harmless(go, pair, tmp_path):
    for argv in (
        ["--experiments", f"swap{ESCAPE}"],
        ["--experiments-file", f"/no/{ESCAPE}.py"],
        ["--perplexity-file", "/no/\udcff.txt"],
        ["--instruct", f"/no/{ESCAPE}\nplace"],
        ["--source", f"a=/no/{ESCAPE}"],
        ["--suites", f"binary,{ESCAPE}"],
    ):
        code, out, err = go(*argv)
        assert code == 1 and out == "" and plain(err) and len(err.splitlines()) == 1, (argv, err)


def test_a_failed_experiments_own_words_come_out_harmless(go, tmp_path, monkeypatch):
    import evaluate

    def failing(*args):
        raise ValueError(f"{ESCAPE} {UNSEEN} \ud800 | *bold*")

    monkeypatch.setattr(evaluate, "evaluate", failing)
    code, out, err = go("--experiments", "baseline_instruct")
    run = latest(tmp_path / "out")
    assert (
        code == 1 and plain(out) and plain(err) and "baseline_instruct failed: ValueError: ␛]0;owned␇" in err
    )
    assert read(run)["baseline_instruct"]["error"]["message"].startswith(
        ESCAPE
    )  # the record has it as it was
    assert plain((run / "summary.md").read_text())


def test_a_received_runs_words_come_out_harmless(finished, capfd):
    """Its notes, its folder and a result's words: all of them anybody's."""
    manifest = json.loads((finished / "manifest.json").read_text())
    manifest |= {"notes": [ESCAPE + UNSEEN], "pair": ESCAPE, "dtype": ESCAPE, "created": UNSEEN + "\ud800"}
    (finished / "manifest.json").write_text(json.dumps(manifest))
    file = finished / "experiments" / "blend_linear.json"
    result = json.loads(file.read_text())
    result["experiment"]["notes"] = [f"{ESCAPE}{UNSEEN}\u202e"]
    file.write_text(resealed(json.dumps(result)))
    moved = finished.rename(finished.with_name("a\x1b[31m\udcff"))
    assert report.main([str(moved)]) == 0
    out, err = capfd.readouterr()
    assert plain(out) and plain(err) and "Report: " in out
    assert plain((moved / "summary.md").read_text())


def test_a_cell_of_markdown_loses_what_is_not_seen():
    assert markdown_cell(f"a{UNSEEN}b\u202ec\x1bd\ud800e") == "ab c de"
    assert markdown_cell("naïve 🙂 日本") == "naïve 🙂 日本"


def test_printable_leaves_lines_and_letters():
    assert printable("a\tb\nc é 🙂") == "a\tb\nc é 🙂"


def test_a_table_whose_words_no_terminal_can_encode_is_printed(finished):
    """stdout of a real process, in UTF-8, which has no lone surrogates."""
    moved = finished.rename(finished.with_name("run\udcff"))
    command = [sys.executable, "report.py", os.fsencode(moved)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert "⟨U+DCFF⟩" in done.stdout.decode()


@pytest.mark.parametrize("command", ["run_all.py", "report.py"])
def test_too_few_files_are_one_line(command, tmp_path):
    limited = (
        f"ulimit -n 12; exec {sys.executable} {command} {tmp_path if command == 'report.py' else '--all'}"
    )
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"{command}: only 12 files may be open at once, and 64 are needed; raise it with `ulimit -n 1024`\n"
    )


def test_a_soft_limit_is_raised(tmp_path):
    script = "ulimit -S -n 20; exec {} -c 'import files, resource; files.check_open_files();"
    script += " print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 64)'"
    done = subprocess.run(
        ["bash", "-c", script.format(sys.executable)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "True\n", done.stderr
