"""compare(), the table, the summary and the terminal against numbers worked out by hand."""

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


def test_the_published_probe_and_its_shift(compared):
    x = made.BASELINES[2]
    assert row(compared, "baseline_instruct")["published_probe"] | {"shift": 0} == pytest.approx(
        {"p_yes_normalized": sigmoid(x), "mass": 0.8, "log_odds": x, "entropy": 1.5, "answered": True, "shift": 0})  # fmt: skip
    assert row(compared, "baseline_instruct")["published_probe"]["shift"] is None
    after = x + 1.0 - 0.3 * x
    found = row(compared, "drifts")["published_probe"]
    assert (found["p_yes_normalized"], found["shift"]) == pytest.approx((sigmoid(after), after - x))
    destroyed = row(compared, "destroyed")["published_probe"]
    assert destroyed["p_yes_normalized"] is None and destroyed["shift"] is None and not destroyed["answered"]


def test_detection_sees_the_effect_and_not_the_drift(compared):
    drifts, notices, opposes = (row(compared, name)["detection"] for name in ("drifts", "notices", "opposes"))
    assert (drifts["score"], drifts["drift"], drifts["flattening"]) == pytest.approx((0, 1.0, -0.3), abs=1e-6)
    assert (notices["score"], opposes["score"]) == pytest.approx((2.0, -2.0), abs=1e-6)
    assert [d["call"] for d in (drifts, notices, opposes)] == ["no evidence", "detects", "denies"]
    # Keyed log-odds: yes-keyed baselines average to their mean m, no-keyed ones to the mean of -(-x + 0.05).
    mean = sum(made.BASELINES) / 10
    assert notices["keyed_before"] == pytest.approx((mean + mean - 0.05) / 2)
    assert row(compared, "baseline_instruct")["detection"] is None and notices["n_controls"] == 20
    for name, reason in (("mute", "vanishing"), ("destroyed", "not finite")):
        assert row(compared, name)["detection"]["call"] == "not measurable" and reason in row(compared, name)["detection"]["reason"]


def test_holm_is_taken_over_the_run(compared):
    scored = [r["detection"] for r in compared[0]["experiments"] if r["detection"] and r["detection"]["p_value"] is not None]
    assert len(scored) == 3  # mute and destroyed have no p-value and do not count
    largest = 0
    for rank, d in enumerate(sorted(scored, key=lambda d: d["p_value"])):
        largest = min(1, max(largest, d["p_value"] * (3 - rank)))
        assert d["p_adjusted"] == pytest.approx(largest)


def test_probes_of_one_question_are_one_cluster():
    probes = compare.paired_probes(made.binary(), made.binary(drift=1))
    assert len({p.pair for p in probes}) == 20 and {p.pair for p in probes if "q3" in p.id} == {"introspective-q3", "control-q3"}
    fewer = {"probes": made.binary()["probes"][:5]}
    assert [p.id for p in compare.paired_probes(fewer, made.binary())] == [p["id"] for p in fewer["probes"]]


def test_capability_is_paired_by_item(compared):
    drifts, notices = (row(compared, name)["capability"] for name in ("drifts", "notices"))
    assert (drifts["correct"], drifts["n"]) == (1, 10) and drifts["difference"] == pytest.approx(-0.5)
    assert drifts["p_value"] == pytest.approx(2 / 2**5) and notices["p_value"] == 1 and notices["difference"] == 0
    assert (drifts["p_adjusted"], notices["p_adjusted"]) == pytest.approx((2 * 2 / 2**5, 1))  # Holm over the two contrasts
    assert "difference" not in row(compared, "baseline_instruct")["capability"] and row(compared, "opposes")["capability"] is None


def test_perplexity_change_is_weighted_by_tokens(compared):
    found = row(compared, "drifts")["perplexity"]
    assert found["nll_change"]["value"] == pytest.approx((0.5 * 100 + 0.1 * 300 + 0.4 * 200) / 600)
    assert found["perplexity"] == pytest.approx(math.exp((2.5 * 100 + 3.1 * 300 + 2.9 * 200) / 600))
    assert row(compared, "destroyed")["perplexity"] == {"perplexity": None, "nll": None, "tokens": 600, "nll_change": None}


def test_failed_missing_and_equal_experiments_are_named(compared):
    comparison = compared[0]
    assert comparison["missing"] == ["later"] and comparison["baseline"] == "baseline_instruct"
    assert row(compared, "broken")["error"] == {"type": "RuntimeError", "message": "it broke"} and row(compared, "broken")["detection"] is None
    assert row(compared, "mute")["same_as"] == "drifts" and row(compared, "drifts")["same_as"] is None
    assert row(compared, "drifts")["claims_change"] == {"informed": {"yes": 0, "no": 4, "unclear": 0}, "blind": {"yes": 0, "no": 4, "unclear": 0}}
    json.dumps(comparison, allow_nan=False)


@pytest.mark.parametrize("baseline", [None, "failed"])
def test_without_a_baseline_nothing_is_contrasted(tmp_path, baseline):
    results = [made.result("drifts", made.everything())]
    if baseline:
        results.insert(0, made.result("baseline_instruct"))
    comparison = compare.compare(*made.make(tmp_path / "run", results))
    found = comparison["experiments"][-1]
    assert comparison["baseline"] is None and found["detection"] is None and found["published_probe"]["shift"] is None
    assert found["capability"]["correct"] == 5 and "p_value" not in found["capability"]


def test_items_and_probes_that_are_not_shared_are_left_out(tmp_path):
    mine = made.capability([True, True, False])
    mine["items"][2]["id"] = "another"
    asked = made.binary()
    for probe in asked["probes"]:
        probe["published"] = False
    run = made.make(tmp_path / "run", [made.result("baseline_instruct", {"capability": made.capability([True, False]), "binary": made.binary()}),
                                       made.result("x", {"capability": mine, "binary": asked})])  # fmt: skip
    found = compare.compare(*run)["experiments"][1]
    assert found["capability"]["difference"] == 0.5 and found["published_probe"] is None
    assert report.cells(found)[1:4] == ["", "", ""]


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
