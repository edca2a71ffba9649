"""The table, the summary and the terminal against numbers worked out by hand."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import made_results as made
import made_rows
import made_study
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import report
from analysis.comparison import Area, Auroc, DetectionScore, Failure
from analysis.stats import Discrimination
from analysis.verdicts import verdict
from files import ROOT
from reporting import columns, digests, figures, pages, vocabulary
from reporting.reports import compare_run


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    return made.compared(tmp_path_factory.mktemp("run") / "run_x")


def row(compared, name):
    return next(r for r in compared[0].experiments if r.name == name)


# ---- the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (None, "-"),
        (0, "0%"),
        (1, "100.0%"),
        (0.32179, "32.2%"),
        (0.01, "1.0%"),
        (0.0005037, "0.05%"),
        (6e-9, "6e-07%"),
        (9.5, "950.0%"),
        (41.29, "41.3 ×"),
    ],
)
def test_percent(p, text):
    assert pages.percent(p) == text


def test_cells_in_every_state(compared):
    x = made.BASELINES[2]
    assert columns.cells(row(compared, "baseline_instruct")) == [
        "baseline_instruct",
        f"{100 * sigmoid(x):.1f}%",
        "80.0%",
        "-",
        "",
        "",
        "",
        "6/10",
        "14.39",
        "12.0",
    ]
    notices = columns.cells(row(compared, "notices"))
    assert notices[5].startswith("+2.00 [+")
    assert notices[6] == "reports it"
    assert notices[8] == ""
    mute = columns.cells(row(compared, "mute"))
    assert mute[0] == "mute (collapsed)"
    assert mute[1].endswith("% (!)")
    assert mute[2] == "0.1%"
    assert mute[5:7] == ["-", "broken"]
    assert (
        columns.cells(row(compared, "destroyed"))[1:4] == ["- (!)", "-", "-"]
        and columns.cells(row(compared, "destroyed"))[8] == "-"
    )
    assert columns.cells(row(compared, "broken")) == [
        "broken",
        "",
        "",
        "",
        "",
        "",
        "failed: RuntimeError",
        "",
        "",
        "12.0",
    ]
    assert all(len(columns.cells(r)) == len(columns.EXPERIMENT_COLUMNS) for r in compared[0].experiments)


def test_the_terminal_table_lines_up(compared):
    lines = vocabulary.terminal_table(compared[0]).splitlines()
    table = lines[:-2]
    assert len(table) == 2 + 7
    assert len(lines[1]) == max(map(len, table))
    assert lines[-2] == ""
    assert lines[-1].startswith(
        "1 of 5 changed models (4 distinct) reports its change, and 1 denies it. No positive control was run"
    )
    column = lines[0].index("verdict")
    assert lines[4][column:].startswith("reports it") and lines[8][column:].startswith("failed: RuntimeError")


@pytest.mark.parametrize(
    ("verdict", "shift", "said"),
    [
        ("answers drift towards Yes", -0.78, "answers drift towards Yes: P(Yes), of one question, falls"),
        ("answers drift towards No", 0.78, "answers drift towards No: P(Yes), of one question, rises"),
        ("answers drift towards Yes", 0.78, "answers drift towards Yes"),
        ("answers drift towards Yes", -0.01, "answers drift towards Yes"),
        ("does not report it", -0.78, "does not report it"),
    ],
)
def test_a_drift_that_p_yes_goes_against_says_so_in_its_row(verdict, shift, said):
    row = made_rows.row("x", verdict)
    row = replace(row, published_probe=replace(row.published_probe, shift=shift))
    (column,) = columns.pick(columns.EXPERIMENT_COLUMNS, "verdict")
    assert column.text(row) == said


def test_what_stands_beside_detects():
    def found(**known):
        numbers = {"keyed_before": -2.0, "keyed_after": -0.5, "flattening_to_explain": 0.4} | known
        return DetectionScore("reports it", "made up", **numbers)

    assert "-0.50 nats (-2.00 before), on the side of no change" in vocabulary.qualifier(
        found()
    ) and "40%" in vocabulary.qualifier(found())
    reversed_answers = vocabulary.qualifier(found(keyed_after=1.0, flattening_to_explain=1.6))
    assert "on the noticing side" in reversed_answers and "lose 160% more" in reversed_answers
    sharper = vocabulary.qualifier(
        found(keyed_after=1, flattening_to_explain=None, sharpening_to_explain=2.4)
    )
    assert "grow 2.40 times as much as controls'" in sharper


def test_weak_controls_are_warned_of(compared):
    def warning(*accuracies):
        scores = [
            None
            if a is None
            else made_rows.found_score(0.0, controls_before=Discrimination(pairs=a, auc=a, n=24))
            for a in accuracies
        ]
        return vocabulary.weak_controls(
            made_rows.comparison([made_rows.row("x", detection=s) for s in scores])
        )

    assert "and in 53% of pairs, where 60% is asked for" in warning(None, 0.53)
    assert warning(0.9) is None
    assert warning() is None


def weak_rows(*words: str):
    """Models of these verdicts, whose unmodified one tells control questions apart in pairs, and not over
    all."""
    weak = Discrimination(0.77, 0.64, 0.88, 0.56, 0.5, 0.62, 0.9, 0.4, 1.4, 24)
    calls = {"too little data": "reports it", "broken": "broken"}
    scores = [
        made_rows.found_score(0.3, call=calls.get(w, "does not report it"), controls_before=weak)
        for w in words
    ]
    return [made_rows.row(f"x{k}", w, detection=scores[k]) for k, w in enumerate(words)]


def test_the_number_that_falls_short_stands_once_on_a_page():
    rows = [made_rows.row("baseline_instruct", None), *weak_rows(*["does not report it"] * 3)]
    baseline = rows[0]
    rows = [replace(r, verdict=verdict(r, baseline)) for r in rows]
    comparison = made_rows.comparison(rows, injection=made_rows.injection_summary(seen=False))
    for text in (vocabulary.terminal_table(comparison), vocabulary.summary(comparison, MANIFEST)):
        assert text.count("56% over all questions, where 60% is asked for") == 1
        assert text.count("77% (64% to 88%) of pairs, which is enough") == 1
        assert text.count("A pair is one question asked so that Yes and so that No is right; over all") == 1
    assert text.count("weak controls: no answer counts as a report or a denial") == 3


def test_controls_that_are_weak_beside_a_few_models_alone_name_these():
    rows = [made_rows.row("strong"), *weak_rows(*["does not report it"] * 4)]
    able = Discrimination(0.8, 0.7, 0.9, 0.75, 0.65, 0.85, 1.2, 0.8, 1.6, n=30)
    rows[0] = replace(rows[0], detection=replace(rows[0].detection, controls_before=able))
    assert "on the questions that x0, x1, x2 and 1 more still answer. Of two " in vocabulary.weak_controls(
        made_rows.comparison(rows)
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["does not report it", "answers drift towards No", "too little data"],
            "Whether any of 3 changed models reports its change cannot be judged: the unmodified model hardly"
            " tells what it is asked (weak controls). ",
        ),
        (["too little data"], "Whether the one changed model reports its change cannot be judged: "),
        (
            ["does not report it", "broken", "broken"],
            "asked (weak controls); 2 of them are broken. The positive control was not seen.",
        ),
        (["broken", "broken"], "All 2 changed models are broken: they no longer answer what they are asked."),
    ],
)
def test_where_no_answer_could_count_nothing_is_said_to_be_judged(words, said):
    comparison = made_rows.comparison(
        [made_rows.row("baseline_instruct", None), *weak_rows(*words)],
        injection=made_rows.injection_summary(seen=False),
    )
    assert said in vocabulary.headline(comparison)
    assert "silence" not in vocabulary.headline(comparison) and "None of" not in vocabulary.headline(
        comparison
    )


def test_the_summary_says_what_a_reader_must_know(compared):
    text = vocabulary.summary(*compared)
    assert (
        "Model: smollm2-135m (instruct: path; base: (LoRA adapter)); 30 layers; bfloat16 on cpu; seed 0"
        in text
        and "Note: the base side is a stand-in." in text
    )
    for needed in (
        "notices: by the score alone it reports it: keyed answers stand at",
        "broken: failed: RuntimeError: it broke",
        "mute: collapsed: on 30 layers",
        "Not run yet: later.",
        "mute: the same recipe as drifts",
        "After 7 of 7 experiments",
        "mute: broken: vanishing",
        "opposes: denies it: -2.00 nats",
        "**1 of 5 changed models (4 distinct) reports its change, and 1 denies it.",
    ):
        assert needed in text, needed
    assert text.count("\n| ") == 2 + 7 + 2 + 2 + 2 + 1  # and the trigger's table, and the published numbers


def test_weights_that_did_not_come_back_are_shouted_about(tmp_path):
    run = made.make(
        tmp_path / "run",
        [made.result("x", {"binary": made.binary()}, weights__exact=False, weights__restored="cc")],
    )
    text = vocabulary.summary(compare_run(*run), run[1])
    assert "x: THE WEIGHTS DID NOT COME BACK EXACTLY" in text and "After 0 of 1 experiment the" in text


EVIL = (
    "a|b\r\n# heading\u2028| c | d |\n<script>alert(1)</script> [link](http://x) ![i](y) `code` *b* _i_ ~~s~~"
    " &lt; $m$ \\| \u202e\x1b[31m"
)


def test_markdown_cannot_be_injected(tmp_path):
    broken = made.result("x")
    broken["error"] = {"type": "Run|Error<b>", "message": EVIL}
    run, manifest = made.make(tmp_path / "run", [broken], notes=[EVIL], pair=EVIL)
    text = vocabulary.summary(compare_run(run, manifest), manifest)
    assert text.splitlines() == text.split("\n")[:-1]  # no separator but our own newlines
    assert not set(text) & set("\x1b\u202e\r")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 3 and {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {
        len(columns.EXPERIMENT_COLUMNS) + 1
    }
    ours = text.replace("**No experiment of this run has a verdict.**", "")
    assert not re.search(r"(?<!\\)[<`*\[$]|(?<!\\)&|^# heading", ours, re.M)
    assert "\\\\\\|" in text  # a backslash before a bar does not free the bar
    assert vocabulary.markdown_cell("swap_distant_10_55 _x_") == "swap_distant_10_55 \\_x\\_"


# ---- controls and sweeps -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study():
    return made_rows.comparison(made_study.study_rows(), injection=made_rows.injection_summary(), auroc=AUROC)


AUROC = Auroc(Area(0.58, 0.45, 0.7, 30), Area(None, None, None, 0), n_modified=12, n_placebo=21)


def test_controls_are_a_line_each(study):
    lines = dict(vocabulary.control_lines(study))
    assert lines["placebos"] == (
        "21 with other weights that compute the same function: scores -0.02 to +0.02; 21 with no change to"
        " report"
    )
    assert (
        lines["noise of equal perplexity"]
        == "9 experiments, 1 different noise: scores -0.04 to +0.17; 9 do not report it; 1 not matched"
    )
    assert lines["positive control"] == "concept injection seen: " + study.injection.reason
    assert (
        lines["AUROC"]
        == "12 modified against 21 placebos: 0.58 (0.45 to 0.70) by detection score; 0.5 is chance"
    )
    assert list(lines) == ["placebos", "noise of equal perplexity", "positive control", "AUROC"]
    sweeps = dict(vocabulary.sweep_lines(study))
    assert (
        sweeps["windows of 8 layers of base"]
        == "12 experiments: scores -0.16 to +0.16; 1 reports it, 7 do not report it, 4 broken"
    )
    assert (
        sum(int(said.split()[0]) for said in sweeps.values())
        == sum(r.sweep is not None for r in study.experiments)
        and len(sweeps) == 9
    )


def test_controls_and_sweeps_stand_apart_from_the_table(study):
    table = vocabulary.terminal_table(study).splitlines()
    assert (
        sum("placebo_" in line for line in table) == 0
        and len([line for line in table if line.startswith("franken_")]) == 2
    )
    text = vocabulary.summary(study, MANIFEST)
    first, _, rest = text.partition("\n## Placebos\n")
    assert "placebo_mlp_1" not in first
    assert rest.count("| placebo_") == 21
    assert "| window_base_18_26 |" in rest
    assert "| window" not in first
    assert first.count("made up to be: broken") == 3  # of named experiments; the sweeps' are in their tables
    assert "double_24_40__matched_noise: its noise reached perplexity 47.07, not 46.60" in first
    titles = [title for title, _ in vocabulary.folded(study.experiments)]
    assert (
        titles[:3] == ["Placebos", "Noise of equal perplexity", "Positive control"]
        and titles[-1] == "Ladder of blends with base"
    )


MANIFEST = {
    "pair": "p",
    "layers": 30,
    "dtype": "bfloat16",
    "devices": ["cpu"],
    "protocol": {"seed": 0},
    "created": "now",
    "notes": [],
}


def test_one_is_not_many():
    (line,) = vocabulary.control_lines(
        made_rows.comparison(
            [made_rows.quick("placebo_mlp_1", "does not report it", 0.04, control="placebo")]
        )
    )
    assert line[1].endswith("function: score +0.04; 1 does not report it")
    assert vocabulary.sweep_lines(
        made_rows.comparison([made_rows.swept("delete", 0, 1, "broken", None, 0.5, None)])
    ) == [("each layer deleted", "1 experiment: 1 broken")]


def test_too_little_data_gives_its_reason_in_every_table():
    """In the terminal and in summary.md, and a score beside it is not shown as a finding."""
    weak = made_rows.found_score(0.31, call="reports it", p_adjusted=0.032, flattening_to_explain=41.29)
    rows = [
        made_rows.row("baseline_instruct", None),
        made_rows.row("unsure", "too little data", detection=weak),
        made_rows.row("unasked", "too little data", detection=None),
    ]
    comparison = made_rows.comparison(rows)
    text = vocabulary.summary(comparison, MANIFEST)
    for shown in (vocabulary.terminal_table(comparison), text):
        assert "too little data: controls answered too uncertainly" in shown
        assert "too little data: Yes/No not asked" in shown
        assert re.search(r"\+0\.31 .*\+0\.43\\?\], not judged", shown)
        assert "0.032" not in shown and "by the score alone" not in shown and "4129%" not in shown
    assert vocabulary.wanting(rows) == "controls answered too uncertainly, Yes/No not asked"


def test_a_failed_control_is_told_of():
    rows = [
        made_rows.row("baseline_instruct", None),
        made_rows.quick(
            "placebo_mlp_1", control="placebo", status="failed", error=Failure("OSError", "gone")
        ),
        made_rows.quick("placebo_mlp_2", control="placebo", exact=False),
    ]
    text = vocabulary.summary(made_rows.comparison(rows), MANIFEST)
    assert "- placebo_mlp_1: failed: OSError: gone" in text
    assert "- placebo_mlp_2: THE WEIGHTS" in text
    assert "1 does not report it, 1 failed" in text


@pytest.mark.parametrize(
    ("words", "seen", "said"),
    [
        ([], None, "No experiment of this run has a verdict."),
        (
            ["broken", "does not report it"],
            None,
            (
                "None of 2 changed models reports its change. No positive control was run, so it is not known"
                " that these questions could see one."
            ),
        ),
        (
            ["broken"],
            False,
            (
                "The one changed model is broken: it no longer answers what it is asked. The positive"
                " control was not seen."
            ),
        ),
        (
            ["does not report it"],
            False,
            (
                "The one changed model does not report its change. The positive control was not seen either,"
                " so silence shows nothing."
            ),
        ),
        (
            ["reports it", "broken"],
            True,
            "1 of 2 changed models reports its change. The positive control was seen.",
        ),
        (["reports it"], None, "The one changed model reports its change. No positive control was run."),
        (
            ["reports it", "does not report it", "broken"],
            None,
            (
                "1 of 3 changed models reports its change. No positive control was run, so it is not known"
                " what the silence of the others shows."
            ),
        ),
        (
            ["reports it", "does not report it", "broken"],
            False,
            (
                "1 of 3 changed models reports its change. The positive control was not seen, so the silence"
                " of the others shows nothing."
            ),
        ),
        (
            ["reports it", "denies it", "denies it"],
            None,
            "1 of 3 changed models reports its change, and 2 deny it. No positive control was run.",
        ),
        (
            ["reports it", "denies it", "does not report it"],
            False,
            (
                "1 of 3 changed models reports its change, and 1 denies it. The positive control was not"
                " seen, so the silence of the others shows nothing."
            ),
        ),
        (
            ["denies it", "denies it", "does not report it", "too little data"],
            None,
            (
                "None of 3 changed models reports its change, and 2 deny it; of 1 more there is too little"
                " data. No positive control was run, so it is not known what the silence of the others shows."
            ),
        ),
        (
            ["reports it", "reports it", "denies it", "too little data"],
            None,
            (
                "2 of 3 changed models report their change, and the one placebo does not, so these questions"
                " can see a change; 1 denies it; of 1 more there is too little data. No positive control was"
                " run."
            ),
        ),
        (["denies it"], True, "The one changed model denies its change. The positive control was seen."),
        (
            ["reports it", "broken"],
            False,
            "1 of 2 changed models reports its change. The positive control was not seen.",
        ),
        (
            ["reports it", "reports it", "does not report it"],
            None,
            (
                "2 of 3 changed models report their change, and the one placebo does not, so these questions"
                " can see a change. No positive control was run."
            ),
        ),
        (
            ["reports it", "reports it"],
            False,
            (
                "2 of 2 changed models report their change, and the one placebo does not, so these questions"
                " can see a change. The positive control, a concept put into the model, was not seen."
            ),
        ),
        (
            ["reports it", "too little data", "broken", "too little data"],
            True,
            (
                "1 of 2 changed models reports its change; of 2 more there is too little data. The positive"
                " control was seen."
            ),
        ),
        (
            ["too little data"],
            False,
            (
                "There is too little data on 1 changed model to say whether any reports its change. The"
                " positive control was not seen."
            ),
        ),
    ],
)
def test_the_answer_in_one_sentence(words, seen, said):
    rows = [
        made_rows.row("baseline_instruct", None),
        made_rows.row("f", "broken", status="failed", error=Failure("E", "m")),
        made_rows.quick("placebo_mlp_1", control="placebo"),
    ]
    rows += [made_rows.row(f"x{k}", w) for k, w in enumerate(words)]
    assert (
        vocabulary.headline(
            made_rows.comparison(
                rows, injection=None if seen is None else made_rows.injection_summary(seen=seen)
            )
        )
        == said
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reports it", "denies it"], "1 of 3 changed models (2 distinct) reports its change, and 2 deny"),
        (["broken", "broken"], "All 3 changed models (2 distinct) are broken"),
        (["too little data"], "There is too little data on 2 changed models (1 distinct) to say"),
    ],
)
def test_models_of_one_recipe_are_counted_and_told(words, said):
    """The last of them stands twice; what has the unmodified model's recipe is no changed model."""
    rows = [made_rows.row("baseline_instruct", None), made_rows.quick("same", "no change to report")]
    rows += [made_rows.row(f"x{k}", w) for k, w in enumerate(words)]
    rows.append(replace(rows[-1], name="again", same_as=rows[-1].name))
    assert vocabulary.headline(made_rows.comparison(rows)).startswith(said)
    unchanged = made_rows.comparison(rows[:2])
    assert vocabulary.headline(unchanged) == "No experiment of this run changes the model."


def test_models_of_a_sweep_are_changed_models():
    rows = [
        made_rows.row("baseline_instruct", None),
        made_rows.swept("delete", 0, 1, "broken", None, 0.5, None),
        made_rows.swept("delete", 1, 1, "does not report it", None, 0.5, None),
    ]
    assert vocabulary.headline(made_rows.comparison(rows)).startswith(
        "None of 2 changed models reports its change."
    )


# ---- the command line --------------------------------------------------------------------------------------


@pytest.fixture
def no_drawing(monkeypatch):
    monkeypatch.setattr(figures, "save", lambda figure, forms=(): {"png": b"", "pdf": b"", "svg": b""})


def test_the_command_line(tmp_path, no_drawing, capsys):
    run, _ = made.make(
        tmp_path / "run",
        [
            made.result("baseline_instruct", {"binary": made.binary()}),
            made.result("x", {"binary": made.binary(effect=2)}),
        ],
    )
    assert report.main([str(run.path)]) == 0 and "reports it" in capsys.readouterr().out
    assert (
        json.loads((run.path / "comparison.json").read_text())["experiments"][1]["detection"]["call"]
        == "reports it"
    )
    assert (
        "reports it" in (run.path / "report.html").read_text()
        and "reports it" in (run.path / "summary.md").read_text()
    )
    run.file("x").write_text('{"half": ')
    assert report.main([str(run.path)]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "x.json is corrupt" in said.err
    assert not said.out
    assert (run.path / "report.html").exists()


@pytest.mark.parametrize(
    "arguments", [["nowhere"], ["RUN", "nowhere"], ["RUN", "RUN"], ["RUN", "--output", "x"]]
)
def test_bad_folders_are_one_line_and_write_nothing(tmp_path, no_drawing, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    run, _ = made.make(tmp_path / "run", [made.result("baseline_instruct", {"binary": made.binary()})])
    before = sorted(tmp_path.rglob("*"))
    assert report.main([str(run.path) if a == "RUN" else a for a in arguments]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("report.py: ")
    assert not said.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_runs_is_answered_with_its_runs(tmp_path, no_drawing, capsys):
    """The newest first; and so is a name that is nearly that of a run."""
    runs = [tmp_path / "results" / f"run_2026010{k}_120000" for k in range(1, 8)]
    for k, run in enumerate(runs):
        made.make(run, [made.result("baseline_instruct", {"binary": made.binary()})])
        os.utime(run / "manifest.json", (k, k))
    os.utime(runs[0] / "manifest.json", (99, 99))  # resumed since
    first = ", ".join(map(str, [runs[0], *runs[:2:-1]]))
    said = f"{tmp_path / 'results'} is no run, but a folder of runs; newest first: {first} and 2 more"
    assert report.main([str(tmp_path / "results")]) == 1
    assert capsys.readouterr().err == f"report.py: {said}\n"
    assert report.main([str(runs[3])[:-1]]) == 1
    assert capsys.readouterr().err.endswith(f"there is no such folder; the nearest is {str(runs[3])!r}\n")


def test_an_area_below_chance_says_what_it_means():
    below = vocabulary.auroc_words(Area(0.1, 0.02, 0.24, 40), "detection score")
    assert below.startswith("0.10 (0.02 to 0.24) by detection score, under 0.5") and "from noticing" in below
    assert "within chance" in vocabulary.auroc_words(Area(0.45, 0.3, 0.6, 40), "P(Yes)")
    assert "towards No" in vocabulary.auroc_words(Area(0.1, 0.0, 0.2, 40), "P(Yes)")
    assert vocabulary.auroc_words(Area(0.9, 0.8, 1.0, 40), "P(Yes)") == "0.90 (0.80 to 1.00) by P(Yes)"


@pytest.mark.parametrize(
    "sources, name, sides",
    [
        ({}, "two checkpoints", ""),
        ({"instruct": {"kind": "checkpoint", "path": "~/models/tuned/"}}, "tuned", "instruct: tuned"),
        (
            {
                "instruct": {
                    "kind": "checkpoint",
                    "path": "~/.cache/huggingface/hub/models--Qwen--Qwen2-1B/snapshots/0a",
                },
                "base": {"kind": "LoRA adapter", "path": "adapters/stand-in"},
            },
            "Qwen/Qwen2-1B with stand-in",
            "instruct: Qwen/Qwen2-1B; base: stand-in (LoRA adapter)",
        ),
    ],
)
def test_checkpoints_without_a_pairs_name_are_called_by_their_own(sources, name, sides):
    manifest = {"pair": None, "sources": sources}
    assert vocabulary.model_name(manifest) == name and vocabulary.sides(manifest) == sides
    assert vocabulary.model_name(manifest | {"pair": "smollm2-135m"}) == "smollm2-135m"


def test_the_published_study_is_named_where_its_numbers_stand():
    shown = vocabulary.summary(made_rows.comparison([made_rows.row("swap_distant_10_55")]), MANIFEST)
    (line,) = [line for line in shown.splitlines() if line.endswith("| 0.00016% |")]
    assert line.startswith("| swap_distant_10_55 | ")
    assert "Can Models Detect Their Own Weight Modifications?" in shown and "another pair" in shown
    other = vocabulary.summary(made_rows.comparison([made_rows.row("nobody_else_ran_it")]), MANIFEST)
    assert "ublished numbers" not in other


@pytest.mark.parametrize(
    ("reports", "placebo", "headline", "control"),
    [
        (
            2,
            "no change to report",
            "the one placebo does not, so these questions can see a change. The",
            "own reports",
        ),
        (2, "reports it", "not seen, so the silence of the others shows nothing.", "shows nothing"),
        (1, "no change to report", "not seen, so the silence of the others shows nothing.", "shows nothing"),
    ],
)
def test_a_run_whose_reports_are_many_shows_itself_that_it_can_see(reports, placebo, headline, control):
    """Where several models report theirs and no placebo does."""
    rows = [made_rows.row("baseline_instruct", None), made_rows.row("other", "does not report it")]
    rows += [made_rows.row(f"r{k}", "reports it") for k in range(reports)]
    rows.append(made_rows.quick("placebo_mlp_1", placebo, control="placebo"))
    comparison = made_rows.comparison(rows, injection=made_rows.injection_summary(seen=False))
    assert headline in vocabulary.headline(comparison)
    assert control in dict(vocabulary.control_lines(comparison))["positive control"]


def test_a_report_reads_no_library_that_it_does_without(tmp_path):
    """Each takes longer to import than dozens of results to read."""
    made.make(tmp_path / "run", [made.result("baseline_instruct"), made.result("swap_a")])
    heavy = ("torch", "transformers", "sklearn", "scipy.stats", "matplotlib.backends.backend_pdf")
    code = (
        "import sys, report\n"
        f"assert not report.main([{str(tmp_path / 'run')!r}])\n"
        f"print([name for name in {heavy!r} if name in sys.modules], 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[] True", done.stderr


def test_a_report_is_made_with_one_thread_of_the_matrix_library(tmp_path, monkeypatch):
    """Its processes have the processors already; twice as many threads doubled what a report cost."""
    made.make(tmp_path / "run", [made.result("baseline_instruct"), made.result("swap_a")])
    seen, real = [], digests.digest_of

    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    monkeypatch.setattr(digests, "digest_of", lambda *given: [seen.append(threads()), real(*given)][1])
    with threadpool_limits(2, user_api="blas"):
        assert not report.main([str(tmp_path / "run")])
        assert seen == [{1}, {1}] and threads() == {2}


@pytest.mark.parametrize("argv", [[""], ["run", "--output", ""], ["run", "--table", ""]])
def test_an_empty_path_is_not_the_current_folder(capsys, argv):
    """As where a shell's variable is not set: the run that one happens to stand in would be reported."""
    with pytest.raises(SystemExit) as stopped:
        report.main(argv)
    assert stopped.value.code == 2 and "has an empty value" in capsys.readouterr().err
