"""Several runs side by side: each number under its own run, and differing protocols said first."""

import json
import re
from dataclasses import replace

import made_results as made
import made_rows
import pytest

import report
from analysis.comparison import to_json
from reporting import compare_runs, figures, pages
from runner.results import write_json


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    monkeypatch.setattr(figures, "save", lambda figure, forms=(): {"png": b"", "pdf": b"", "svg": b"<svg/>"})


def run_that_says(path, words, manifest=None, **changes):
    """A run whose comparison.json says these {name: verdict}, and its folder."""
    rows = [made_rows.row("baseline_instruct", None)] + [
        made_rows.row(name, w, 0.1 * k, 0.2 + 0.1 * k, 20.0 + k) for k, (name, w) in enumerate(words.items())
    ]
    rows += [
        made_rows.swept("window", 0, 4, "does not report it", 0.5, 0.9, 99.0),
        made_rows.quick("placebo_mlp_1", score=-0.01, control="placebo"),
        made_rows.quick("placebo_mlp_2", score=0.02, control="placebo"),
    ]
    run, _ = made.make(path, [], **(manifest or {}))
    write_json(path / "comparison.json", to_json(made_rows.comparison(rows, run=path.name, **changes)))
    return run


@pytest.fixture
def two(tmp_path):
    return [
        run_that_says(
            tmp_path / "run_a", {"x": "broken", "y": "reports it"}, injection=made_rows.injection_summary()
        ),
        run_that_says(
            tmp_path / "run_b",
            {"y": "does not report it", "z": "answers drift towards Yes"},
            {"pair": "another|pair"},
        ),
    ]


def tables(text):
    """{heading: {first cell: other cells}} of Markdown."""
    out, here = {}, None
    for line in text.splitlines():
        if line.startswith("#"):
            here = out.setdefault(line.lstrip("# "), {})
        elif line.startswith("|"):
            first, *rest = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            here[first] = rest
    return out


def test_the_same_experiment_of_both_runs_stands_in_one_row(two, tmp_path):
    said = compare_runs.write_comparison(two, tmp_path / "out" / "both")
    assert said == f"Comparison of 2 runs: {tmp_path / 'out/both/comparison.html'}"
    found = tables((tmp_path / "out/both/comparison.md").read_text())
    assert found["run_a / run_b"]["model"] == ["smollm2-135m", "another\\|pair"] and found["run_a / run_b"][
        "positive control"
    ] == ["seen", "not run"]
    assert (
        found["run_a / run_b"]["placebos"] == ["2, -0.01 to +0.02"] * 2
        and found["run_a / run_b"]["experiments"] == ["3, and 1 in sweeps"] * 2
    )
    # the one in a sweep counts
    assert found["run_a / run_b"]["answer"][0].startswith("1 of 3 changed models reports")
    one = found["Experiment by experiment"]
    head = one["experiment"]
    assert head[:4] == ["verdict A", "verdict B", "detection (95% CI) A", "detection (95% CI) B"]
    assert len(one) == 7 and not [name for name in one if "placebo" in name]  # with the title, the rule below

    def said_of(name, *titles):
        return [one[name][head.index(title)] for title in titles]

    assert [said_of(name, "verdict A", "verdict B") for name in "xyz"] == [
        ["broken", ""],
        ["reports it", "does not report it"],
        ["", "answers drift towards Yes"],
    ]
    assert said_of("y", "perplexity A", "perplexity B", "perplexity B / A") == ["21.00", "20.00", "0.952"]
    assert said_of("y", "P(Yes) A", "P(Yes) B", "P(Yes) B − A, points") == ["30.0%", "20.0%", "-10.0"]
    assert said_of("y", "detection B − A, nats") == ["-0.10"]
    assert said_of("x", "detection B − A, nats", "perplexity B / A") == ["", ""]
    assert said_of("y", "capability A", "capability B") == ["5/10"] * 2
    assert said_of("y", "capability B − A, points") == ["+0.0"]
    assert said_of("window_base_0_4", "perplexity A", "perplexity B") == ["99.00"] * 2
    page = (tmp_path / "out/both/comparison.html").read_text()
    assert page.count("sortable") >= 2 and "A: run_a" in page
    assert "All runs asked the same questions" in page
    assert "protocols differ" not in page
    assert '<td class="n" data-sort="0.3">30.0%</td><td class="n" data-sort="0.2">20.0%</td>' in page


def test_no_difference_is_told_where_there_is_none_to_know(two, tmp_path):
    """Of a P(Yes) that is no answer, and of numbers from other questions."""
    rows = [
        replace(
            made_rows.row("y"), published_probe=replace(made_rows.row("y").published_probe, answered=answered)
        )
        for answered in (True, False)
    ]
    side = compare_runs.Side({"protocol": {"prompts_sha256": "a"}}, made_rows.comparison([]))
    runs = {"a": side, "b": side}
    p_yes, *_ = (c for c in compare_runs.columns(runs) if c.title == "P(Yes) B − A, points")
    assert p_yes.text(compare_runs.Together("y", rows)) == ""
    assert p_yes.text(compare_runs.Together("y", [rows[0], rows[0]])) == "+0.0"
    runs["b"] = compare_runs.Side({"protocol": {"prompts_sha256": "b"}}, made_rows.comparison([]))
    assert not [c for c in compare_runs.columns(runs) if "−" in c.title or "/" in c.title]


def test_a_figure_holds_both_runs(two):
    loaded = compare_runs.load(two)
    p_yes, scores = compare_runs.figures_runs.runs(
        ["x", "y", "z"], {name: run.rows for name, run in loaded.items()}
    ).axes

    def points(axes):
        return {
            (line.get_marker(), float(x))
            for line in axes.lines
            if line.get_linestyle() == "None"
            for x in line.get_xdata()
        }

    # x is broken in run_a and is not drawn there
    assert points(scores) == {("o", 0.1), ("s", 0.0), ("s", 0.1)}
    shares = {
        (marker, run.rows[name].published_probe.p_yes_normalized)
        for marker, run in zip("os", loaded.values(), strict=True)
        for name in "yz"
        if name in run.rows
    }
    assert points(p_yes) == shares
    assert [w.text for names in p_yes.artists for w in names.words] == ["y", "z"]


def test_what_the_figure_leaves_out_of_each_run_is_said_under_it(two, tmp_path):
    compare_runs.write_comparison(two, tmp_path / "out")
    caption = re.search(r"<figcaption>(.*?)<span", (tmp_path / "out" / "comparison.html").read_text())[1]
    assert caption == "With its 95% interval. Left out: A 1 broken. "


def test_other_questions_are_flagged_before_anything_else(two, tmp_path):
    manifest = json.loads((tmp_path / "run_b" / "manifest.json").read_text())
    manifest["protocol"] |= {"prompts_sha256": "ff", "seed": 3}
    write_json(tmp_path / "run_b" / "manifest.json", manifest)
    said = compare_runs.write_comparison(two, tmp_path / "out")
    first, second, _ = said.split("\n")
    assert (
        first
        == "The protocols differ: run_b against run_a: other questions were asked: none of the numbers can be"
        " compared."
        and "other seeds" in second
    )
    text, page = ((tmp_path / "out" / f"comparison.{form}").read_text() for form in ("md", "html"))
    assert text.index("other questions were asked") < text.index("| model |") and page.index(
        "other questions were asked"
    ) < page.index("<table")
    assert "All runs asked the same" not in page


def recipe(source):
    """One layer of this source in a model of the instruct side."""
    slots = [{"mix": [[source, 0, 1.0]]}, {"mix": [["instruct", 1, 1.0]]}]
    return {"slots": slots, "embed": "instruct", "norm": "instruct", "head": "instruct"}


def runs_of(path, sources):
    """Two runs of a splice with the base side and a change of the instruct side alone, of these sources."""
    runs = []
    for k, mine in zip("ab", sources, strict=True):
        results = [
            made.result(name, {"binary": made.binary(drift=d)}, experiment__recipe=recipe(source))
            for name, d, source in (("baseline_instruct", 0, "instruct"), ("spliced", 1, "base"))
        ]
        twice = recipe("instruct")
        twice["slots"][1]["mix"][0][1] = 0
        results.append(made.result("own", {"binary": made.binary(drift=0.5)}, experiment__recipe=twice))
        runs.append(made.make(path / k, results, sources=mine)[0])
    return runs


def p_yes_differences(runs, out):
    """(what is said, {experiment: the difference in P(Yes)}) of two runs side by side."""
    said = compare_runs.write_comparison(runs, out)
    table = tables((out / "comparison.md").read_text())["Experiment by experiment"]
    at = table["experiment"].index("P(Yes) B − A, points")
    return said, {name: table[name][at] for name in ("baseline_instruct", "own", "spliced")}


def source(letter, **changes):
    return {"kind": "checkpoint", "files": {"w": {"bytes": 8, "sha256": letter * 64}}} | changes


def adapter(letter, **changes):
    return source(letter, kind="LoRA adapter", path="adapters/one-name", over="instruct", scale=2.0) | changes


@pytest.mark.parametrize("packed", [False, True])
def test_weights_of_one_name_that_are_others_are_said_and_not_subtracted(tmp_path, packed):
    runs = runs_of(tmp_path, [{"instruct": source("a"), "base": adapter(k)} for k in "bc"])
    if packed:
        runs[1].pack()
    said, found = p_yes_differences(runs, tmp_path / "out")
    line = "b against a: source base has other weights (sha256 cccccccccccc, not bbbbbbbbbbbb)"
    assert said.startswith(f"Other weights: {line}.\n")
    assert found == {"baseline_instruct": "+0.0", "own": "+0.0", "spliced": ""}
    for form, place in (("md", "| model |"), ("html", "<table")):
        text = (tmp_path / "out" / f"comparison.{form}").read_text()
        assert text.index(line) < text.index(place)


OF = {"baseline_instruct": "", "own": "", "spliced": ""}  # of the instruct side are all three


@pytest.mark.parametrize(
    ("first", "second", "said", "found"),
    [
        ({}, {}, "", {"baseline_instruct": "+0.0", "own": "+0.0", "spliced": "+0.0"}),
        (
            {},
            {"instruct": source("d")},
            "source instruct has other weights (sha256 dddddddddddd, not aaaa",
            OF,
        ),
        (
            {},
            {"instruct": source("d")},
            "source base is an adapter over what is not known to be the same: ",
            OF,
        ),
        (
            {},
            {"instruct": source("a", files={})},
            "source instruct is not known to have the same weights",
            OF,
        ),
        (
            {"instruct": source("a", files={"w": {"sampled_sha256": "a" * 64}})},
            {},
            "source instruct is not known to have the same weights: no hash of the same files is in both",
            OF,
        ),
        ({}, {"base": adapter("b", scale=1.0)}, "source base is of another kind or scale", {"spliced": ""}),
        ({}, {"further": source("e")}, "", {"spliced": "+0.0"}),
        ({"further": source("f")}, {"further": source("e")}, "source further has other", {"spliced": "+0.0"}),
        # an adapter over the same weights by another name, as beside a merged instruct side
        (
            {},
            {"plain": source("a"), "instruct": source("d"), "base": adapter("b", over="plain")},
            "source instruct has other weights",
            OF,
        ),
    ],
)
def test_every_source_is_held_against_its_namesake(tmp_path, first, second, said, found):
    both = [{"instruct": source("a"), "base": adapter("b")} | changes for changes in (first, second)]
    told, differences = p_yes_differences(runs_of(tmp_path, both), tmp_path / "out")
    assert (said in told) and (bool(said) == ("Other weights" in told))
    assert found.items() <= differences.items()
    if "plain" in second:
        assert "source base" not in told


def test_a_run_of_before_sources_were_recorded_has_no_differences(tmp_path):
    new, old = runs_of(tmp_path, [{"instruct": source("a")}] * 2)
    manifest = json.loads(old.manifest_path.read_text())
    del manifest["sources"]
    old.manifest_path.write_text(json.dumps(manifest))
    for k, runs in enumerate(([new, old], [old, new])):
        _, differences = p_yes_differences(runs, tmp_path / f"out{k}")
        assert set(differences.values()) == {""}


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = [run_that_says(tmp_path / k / "run", {"x": "broken"}) for k in "ab"]
    assert list(compare_runs.load(runs)) == [str(tmp_path / k / "run") for k in "ab"]


def test_hostile_names_stay_text(tmp_path):
    evil = "<script>alert(1)</script>"
    runs = [run_that_says(tmp_path / k, {evil: "broken"}, {"pair": evil, "commit": evil}) for k in "ab"]
    compare_runs.write_comparison(runs, tmp_path / "out")
    page = (tmp_path / "out/comparison.html").read_text()
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in page
    assert "\\<script" in (tmp_path / "out/comparison.md").read_text()
    assert not pages.HIDDEN.search(page.split("</style>")[1])


def test_the_command_line_compares_and_leaves_the_runs_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [
        made.make(
            tmp_path / k,
            [
                made.result("baseline_instruct", {"binary": made.binary()}),
                made.result("x", {"binary": made.binary(effect=effect)}),
            ],
        )[0]
        for k, effect in (("a", 2.0), ("b", 0.0))
    ]

    def files():
        return {p: p.read_bytes() for run in runs for p in run.path.rglob("*") if p.is_file()}

    before = files()
    assert report.main(["a", "b"]) == 0
    (folder,) = (tmp_path / "results").glob("comparison_*")
    assert capsys.readouterr().out.endswith(
        f"Comparison of 2 runs: {folder.relative_to(tmp_path)}/comparison.html\n"
    )
    found = tables((folder / "comparison.md").read_text())["Experiment by experiment"]
    assert found["x"][:2] == ["reports it", "does not report it"]
    assert files() == before
    (tmp_path / "file").write_text("")
    assert report.main(["a", "b", "--output", "file/below"]) == 1
    assert "cannot write the comparison to file/below" in capsys.readouterr().err


def test_a_comparison_of_another_version_is_made_from_the_results(two, tmp_path):
    (tmp_path / "run_b" / "comparison.json").write_text('{"schema_version": 1}')
    again = compare_runs.load(two)["run_b"].comparison
    assert again.experiments == () and again.run == "run_b"
