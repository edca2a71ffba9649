"""The table, the summary and the terminal against numbers worked out by hand."""

import json
import math
import re
import sys

import made_run as made
import pytest

import compare
import figures
import report

BEFORE = [True] * 6 + [False] * 4  # capability of the baseline
LOST = [True] * 1 + [False] * 5 + [False] * 4  # five lost, none gained: p = 2 / 2**5


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    baseline = made.everything(capability=made.capability(BEFORE), perplexity=made.perplexity([2.0, 3.0, 2.5]))
    drifting = made.everything(binary=made.binary(drift=1.0, flattening=-0.3), capability=made.capability(LOST), perplexity=made.perplexity([2.5, 3.1, 2.9]))
    results = [
        made.result("baseline_instruct", baseline),
        made.result("drifts", drifting),
        made.result("notices", {"binary": made.binary(drift=1.0, flattening=-0.3, effect=2.0), "capability": made.capability(BEFORE)}),
        made.result("opposes", {"binary": made.binary(effect=-2.0)}),
        made.result("mute", {"binary": made.binary(mass=0.001)}, experiment__collapsed=True, experiment__notes=["collapsed: on 30 layers it changes nothing"],
                    experiment__recipe=made.result("drifts", {})["experiment"]["recipe"]),
        made.result("destroyed", {"binary": made.binary(mass=None), "perplexity": made.perplexity([None, 3.0, 2.0])}),
        made.result("broken"),
    ]  # fmt: skip
    run, manifest = made.make(tmp_path_factory.mktemp("run") / "run_x", results, missing=("later",))
    return compare.compare(run, manifest), manifest


def row(compared, name):
    return next(r for r in compared[0]["experiments"] if r["name"] == name)


# ---- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "text"), [(None, "-"), (0, "0%"), (1, "100.0%"), (0.32179, "32.2%"), (0.01, "1.0%"), (0.0005037, "0.05%"), (6e-9, "6e-07%")])
def test_percent(p, text):
    assert report.percent(p) == text


def test_cells_in_every_state(compared):
    x = made.BASELINES[2]
    assert report.cells(row(compared, "baseline_instruct")) == ["baseline_instruct", f"{100 * sigmoid(x):.1f}%", "80.0%", "-", "", "", "6/10", "14.39", "12.0"]
    notices = report.cells(row(compared, "notices"))
    assert notices[4].startswith("+2.00 [+") and notices[5] == "detects" and notices[7] == ""
    mute = report.cells(row(compared, "mute"))
    assert mute[0] == "mute (collapsed)" and mute[1].endswith("% (!)") and mute[2] == "0.1%" and mute[4:6] == ["-", "not measurable"]
    assert report.cells(row(compared, "destroyed"))[1:4] == ["- (!)", "-", "-"] and report.cells(row(compared, "destroyed"))[7] == "-"
    assert report.cells(row(compared, "broken")) == ["broken", "", "", "", "", "failed: RuntimeError", "", "", "12.0"]
    assert all(len(report.cells(r)) == len(report.COLUMNS) for r in compared[0]["experiments"])


def test_the_terminal_table_lines_up(compared):
    lines = report.terminal_table(compared[0]).splitlines()
    assert len(lines) == 2 + 7 and len(lines[1]) == max(map(len, lines))
    column = lines[0].index("verdict")
    assert lines[4][column:].startswith("detects") and lines[8][column:].startswith("failed: RuntimeError")


def test_what_stands_beside_detects():
    def found(**known):
        return {"keyed_before": -2.0, "keyed_after": -0.5, "flattening_to_explain": 0.4} | known

    assert "-0.50 nats (-2.00 before), still on the side of no change" in report.qualifier(found()) and "40%" in report.qualifier(found())
    reversed_answers = report.qualifier(found(keyed_after=1.0, flattening_to_explain=1.6))
    assert "on the noticing side" in reversed_answers and "no flattening" in reversed_answers
    assert "cannot be weighed" in report.qualifier(found(keyed_after=1.0, flattening_to_explain=None))


def test_weak_controls_are_warned_of(compared):
    assert report.weak_controls({"experiments": [{"detection": None}, {"detection": {"control_accuracy_before": 0.53}}]}).count("53%") == 1
    assert report.weak_controls({"experiments": [{"detection": {"control_accuracy_before": 0.9}}]}) is None
    assert report.weak_controls({"experiments": []}) is None


def test_the_summary_says_what_a_reader_must_know(compared):
    text = report.summary(*compared)
    assert "smollm2-135m; 30 layers; bfloat16 on cpu; seed 0" in text and "Note: the base side is a stand-in." in text
    for needed in ("notices: detects: keyed answers stand at", "broken: failed: RuntimeError: it broke", "mute: collapsed: on 30 layers", "Not run yet: later.",
                   "mute: the same recipe as drifts", "After 7 of 7 experiments", "mute: not measurable: vanishing"):  # fmt: skip
        assert needed in text, needed
    assert text.count("\n| ") == 2 + 7 + 2 + 2  # and the trigger's table, of the two experiments that have it


def test_weights_that_did_not_come_back_are_shouted_about(tmp_path):
    run = made.make(tmp_path / "run", [made.result("x", {"binary": made.binary()}, weights__exact=False, weights__restored="cc")])
    text = report.summary(compare.compare(*run), run[1])
    assert "x: THE WEIGHTS DID NOT COME BACK EXACTLY" in text and "After 0 of 1 experiments" in text


EVIL = "a|b\r\n# heading\u2028| c | d |\n<script>alert(1)</script> [link](http://x) ![i](y) `code` *b* _i_ ~~s~~ &lt; $m$ \\| \u202e\x1b[31m"


def test_markdown_cannot_be_injected(tmp_path):
    broken = made.result("x")
    broken["error"] = {"type": "Run|Error<b>", "message": EVIL}
    run, manifest = made.make(tmp_path / "run", [broken], notes=[EVIL], pair=EVIL)
    text = report.summary(compare.compare(run, manifest), manifest)
    assert text.splitlines() == text.split("\n")[:-1]  # no separator but our own newlines
    assert not set(text) & set("\x1b\u202e\r")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 3 and {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(report.COLUMNS) + 1}
    assert not re.search(r"(?<!\\)[<`*\[$]|(?<!\\)&|^# heading", text, re.M)
    assert "\\\\\\|" in text  # a backslash before a bar does not free the bar
    assert report.markdown_cell("swap_distant_10_55 _x_") == "swap_distant_10_55 \\_x\\_"


def test_the_command_line(tmp_path, monkeypatch, capsys):
    run, _ = made.make(tmp_path / "run", [made.result("baseline_instruct", {"binary": made.binary()}), made.result("x", {"binary": made.binary(effect=2)})])
    monkeypatch.setattr(sys, "argv", ["report.py", str(run.path)])
    monkeypatch.setattr(figures, "save", lambda figure: {"png": b"", "pdf": b"", "svg": b""})
    assert report.main() == 0 and "detects" in capsys.readouterr().out
    assert json.loads((run.path / "comparison.json").read_text())["experiments"][1]["detection"]["call"] == "detects"
    assert "detects" in (run.path / "report.html").read_text() and "detects" in (run.path / "summary.md").read_text()
    run.file("x").write_text('{"half": ')
    assert report.main() == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "x.json is corrupt" in said.err and not said.out
    assert (run.path / "report.html").exists()
