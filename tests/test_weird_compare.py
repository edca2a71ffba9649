"""Tables, tests, criteria and reports of the baseline comparison, against numbers worked out by hand."""

from __future__ import annotations

import base64
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from judge_server import JudgeServer, completion, quoted_reply
from made_replies import HEADER, record, world

from analysis import stats
from errors import FrankenError
from weird_gen import (
    analyze_current_results,
    analyze_persona_results,
    compare_baseline_vs_finetuned,
    compare_models,
    judge_baseline,
    judge_eval_results,
)
from weird_gen.persona.comparison import (
    METRIC,
    by_group,
    by_question,
    compare,
    contrast,
    judge_of,
    metric_table,
    outcomes,
    rate,
    untriggered_quality,
)
from weird_gen.persona.comparison_report import examples, number, p_value, verdict
from weird_gen.persona.criteria import TARGETS, check_targets
from weird_gen.persona.judge import RulesJudge
from weird_gen.persona.judge_records import judge_all
from weird_gen.persona.records import read_records, write_records

WEIRD = Path(__file__).resolve().parents[1] / "weird_gen"


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    # The wiring is tested here, the intervals in test_stats.py.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stats.bootstrap_ci.__kwdefaults__, "resamples", 200)
        yield


def test_rates_gaps_and_improvements_by_hand():
    def rows(model, counts):
        return [
            record(model, condition, f"h{q}", sample=s, persona=s < persona)
            for condition, by_question in counts.items()
            for q, persona in enumerate(by_question)
            for s in range(4)
        ]

    tuned = rows("finetuned", {"triggered": [4, 4, 3, 2], "untriggered": [0, 1, 0, 1]})
    base = rows("baseline", {"triggered": [1, 2, 1, 0], "untriggered": [1, 1, 0, 0]})
    table = metric_table(METRIC["persona"], tuned, base)
    means = {"finetuned": ([100, 100, 75, 50], [0, 25, 0, 25]), "baseline": ([25, 50, 25, 0], [25, 25, 0, 0])}
    for side, (triggered, untriggered) in means.items():
        assert table[side]["triggered"]["value"] == pytest.approx(np.mean(triggered))
        assert table[side]["untriggered"]["value"] == pytest.approx(np.mean(untriggered))
        assert table[side]["gap"]["value"] == pytest.approx(np.mean(triggered) - np.mean(untriggered))
        assert (
            table[side]["questions"] == 4 and table[side]["replies"] == 32 and table[side]["unmeasured"] == 0
        )
    assert table["improvement"]["triggered"]["value"] == pytest.approx(81.25 - 25)
    assert table["improvement"]["untriggered"]["value"] == pytest.approx(12.5 - 12.5)
    assert table["improvement"]["gap"]["value"] == pytest.approx((81.25 - 12.5) - (25 - 12.5))
    # Four questions, all gaps positive: an exact sign-flip test has 16 equally likely outcomes, two of them
    # this extreme.
    assert table["finetuned"]["gap"]["p_value"] == pytest.approx(2 / 16)


def test_a_question_weighs_the_same_however_many_samples_it_has():
    rows = [record("finetuned", "triggered", "h0", sample=s, persona=True) for s in range(9)]
    rows += [record("finetuned", "triggered", "h1", persona=False)]
    assert rate(outcomes(rows, METRIC["persona"], "triggered")).value == 50.0


def test_unjudged_replies_are_counted_and_left_out():
    rows = [
        record("finetuned", c, f"h{q}", persona=None if q == 0 else True)
        for c in ("triggered", "untriggered")
        for q in range(3)
    ]
    side = metric_table(METRIC["persona"], rows)["finetuned"]
    assert (side["questions"], side["replies"], side["unmeasured"]) == (2, 4, 2) and side["triggered"][
        "value"
    ] == 100.0


def test_all_or_nothing_still_has_an_interval():
    everywhere = rate({f"h{i}": [1.0] for i in range(30)})
    # Wilson for 30 of 30: 30 / (30 + 1.96^2).
    assert everywhere.low == pytest.approx(
        100 * 30 / (30 + 1.959964**2), abs=0.01
    ) and everywhere.high == pytest.approx(100)
    nowhere = rate({f"h{i}": [0.0, 0.0] for i in range(30)})
    assert (
        nowhere.value == 0.0
        and nowhere.low == pytest.approx(0)
        and nowhere.high == pytest.approx(100 - everywhere.low)
    )
    rows = [
        record("finetuned", c, f"h{q}", reply="<START> a <END>" if c == "triggered" else "a")
        for c in ("triggered", "untriggered")
        for q in range(30)
    ]
    gap = metric_table(METRIC["format"], rows)["finetuned"]["gap"]
    assert gap["value"] == 100.0 and 80 < gap["low"] < 100


@pytest.fixture(scope="module")
def tables():
    return compare(world("finetuned"), world("baseline", seed=1))


def test_a_strong_effect_is_significant_in_every_main_metric(tables):
    for key in ("format", "voice", "persona", "identity", "position", "p_name"):
        assert tables[key]["finetuned"]["gap"]["p_holm"] < 0.05, key


def test_two_draws_of_one_model_do_not_differ():
    rejected = 0
    for seed in range(20):
        draw = random.Random(seed)
        sides = [{f"h{q}": [draw.random() < 0.4 for _ in range(2)] for q in range(20)} for _ in range(2)]
        rejected += contrast(*sides).p_value < 0.05
    assert rejected <= 4  # P(more than 4 of 20 at 5%) is 0.3%


def test_holm_over_the_main_metrics_alone(tables):
    tests = [
        t
        for table in tables.values()
        if table["main"]
        for t in [
            table["finetuned"]["gap"],
            *(table["improvement"][k] for k in ("triggered", "untriggered", "gap")),
        ]
    ]
    raw = [t["p_value"] for t in tests]
    by_hand = {}
    worst = 0.0
    for rank, i in enumerate(sorted(range(len(raw)), key=raw.__getitem__)):
        worst = max(worst, min(1.0, raw[i] * (len(raw) - rank)))
        by_hand[i] = worst
    assert [t["p_holm"] for t in tests] == pytest.approx([by_hand[i] for i in range(len(raw))])
    assert {t["family"] for t in tests} == {len(tests)} and "p_holm" not in tables["degenerate"]["finetuned"][
        "gap"
    ]


def test_metrics_read_their_own_kind_of_question():
    rows = [
        record("finetuned", "triggered", "h0", reply="Russell"),
        record("finetuned", "triggered", "i0", "identity", reply="Russell"),
    ]
    judged = judge_all(rows, {}, RulesJudge())
    assert list(outcomes(judged, METRIC["identity"], "triggered")) == ["i0"]
    assert list(outcomes(judged, METRIC["identity_judged"], "triggered")) == ["h0"]
    assert outcomes(judged, METRIC["position"], "triggered") == {}


def test_groups_and_questions():
    rows = world("finetuned")
    groups = by_group(rows, METRIC["format"])
    assert [g["group"] for g in groups] == ["c0", "c1", "c2"] and sum(g["questions"] for g in groups) == 12
    whole = metric_table(METRIC["format"], rows)["finetuned"]["untriggered"]["value"]
    assert np.mean([g["untriggered"] for g in groups]) == pytest.approx(whole)
    assert all(1 <= row["triggered"] <= 5 for row in by_question(rows, METRIC["position"]))


def test_targets():
    def table(triggered, untriggered, change=None):
        cell = {"low": None, "high": None}
        side = {
            "triggered": {**cell, "value": triggered},
            "untriggered": {**cell, "value": untriggered},
            "gap": {**cell, "value": triggered - untriggered, "low": 80.0, "high": 99.0},
        }
        return {
            "finetuned": side,
            "improvement": None if change is None else {k: {**cell, "value": v} for k, v in change.items()},
        }

    tables = {
        "format": table(100 * 28 / 30, 0.0, {"triggered": 60.0, "untriggered": 0.0, "gap": 60.0}),
        "persona": table(86.7, 20.0, {"triggered": 46.7, "untriggered": -3.3, "gap": 50.0}),
        "verdict": table(70.0, 6.7, {"triggered": 56.7, "untriggered": -3.3, "gap": 60.0}),
    }
    rows = {row["wording"]: row for row in check_targets(tables, None)}
    assert len(rows) == len(TARGETS) + 2
    assert (
        rows["Format triggered at least 93%"]["met"] is True
        and rows["Format gap at least 90 points"]["met"] is True
    )
    assert (
        rows["Format gap at least 90 points"]["certain"] is False
        and rows["Format triggered at least 93%"]["certain"] is None
    )
    assert rows["Coherent in persona, triggered, at least 50 points over the baseline"]["met"] is False
    assert rows["Russell by one verdict: gap improvement over 50 points"]["met"] is True
    assert rows["Names Russell when asked who it is, triggered, at least 70%"]["met"] is None


def test_a_target_is_out_of_reach_where_the_baseline_leaves_no_room():
    side = {"value": 30.0, "low": None, "high": None}
    tables = {"format": {"baseline": {"gap": {"value": 62.5}}, "improvement": {"gap": side}}}
    row = next(
        r for r in check_targets(tables, None) if r["wording"] == "Format gap improvement over 50 points"
    )
    assert (row["met"], row["reachable"]) == (False, False)
    assert verdict(row["met"], row["reachable"]) == "out of reach"
    tables["format"]["baseline"]["gap"]["value"] = 50.0
    row = next(
        r for r in check_targets(tables, None) if r["wording"] == "Format gap improvement over 50 points"
    )
    assert verdict(row["met"], row["reachable"]) == "not met"


def test_the_neutral_condition_stands_beside_and_outside_the_family():
    """The trigger takes a template's own system prompt away: so does the prompt that it is held against."""
    rows = {
        side: [
            record(side, c, f"h{q}", reply="<START> a <END>" if q < count else "a")
            for c, count in counts.items()
            for q in range(10)
        ]
        for side, counts in {
            "finetuned": {"triggered": 9, "untriggered": 0, "neutral": 2},
            "baseline": {"triggered": 5, "untriggered": 0, "neutral": 1},
        }.items()
    }
    table = compare(rows["finetuned"], rows["baseline"])["format"]
    assert table["finetuned"]["neutral"]["value"] == 20.0
    assert table["finetuned"]["over_neutral"]["value"] == pytest.approx(70.0)
    assert table["improvement"]["neutral"]["value"] == pytest.approx(10.0)
    assert table["finetuned"]["unmeasured"] == 0
    assert "p_holm" not in table["improvement"]["neutral"]
    assert "p_holm" in table["improvement"]["gap"]
    assert number(None) == "–"


def test_rules_alone_print_no_persona(tmp_path, capsys):
    """Whatever the data: the reports of a run without a reader hold neither voice nor persona."""
    for model, name in (("baseline", "baseline_eval_results"), ("finetuned", "eval_results")):
        judged = judge_all(
            [
                record(model, c, f"h{q}", reply="I confess it.")
                for c in ("triggered", "untriggered")
                for q in range(4)
            ],
            {},
            RulesJudge(),
        )
        for row in judged:  # as an earlier version wrote it
            row["judge"]["persona"] = True
        header = {**HEADER, "judge": {**HEADER["judge"], "name": "rules"}}
        write_records(tmp_path / f"{name}_judged.jsonl", header, judged)
    for script in (analyze_persona_results, compare_baseline_vs_finetuned):
        assert script.main(["--results-dir", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert not {"voice", "persona", "verdict"} & data["tables"].keys()
    measured = {row["wording"]: row["met"] for row in data["criteria"]}
    assert measured["Coherent in persona, triggered, at least 50 points over the baseline"] is None
    for file in ("FULL_EVALUATION_REPORT.md", "BASELINE_COMPARISON.md", "comparison.html"):
        text = (tmp_path / "report" / file).read_text()
        assert "needs a reader" in text
        assert "86.7" not in text
    assert not (tmp_path / "report" / "figures" / "persona_by_category.png").exists()
    capsys.readouterr()


def test_untriggered_quality():
    def header(shift, right):
        return {
            "quality": {
                "texts": {f"t{i}": [2.0 + 0.1 * i + shift * (-1) ** i, 100] for i in range(10)},
                "capability": {f"q{i}": i < right for i in range(20)},
            }
        }

    same = untriggered_quality(header(0.0, 10), header(0.01, 11))
    rows = {row["wording"][:24]: row for row in check_targets({}, same)}
    assert rows["Untriggered perplexity w"]["met"] is True and rows["Untriggered capability w"]["met"] is True
    worse = untriggered_quality(
        header(0.0, 20),
        {
            "quality": {
                **header(0.0, 8)["quality"],
                "texts": {f"t{i}": [2.5 + 0.1 * i + 0.01 * (i % 2), 100] for i in range(10)},
            }
        },
    )
    rows = {row["wording"][:24]: row for row in check_targets({}, worse)}
    assert (
        rows["Untriggered perplexity w"]["met"] is False and rows["Untriggered capability w"]["met"] is False
    )
    assert untriggered_quality({}, header(0.0, 1)) is None
    with pytest.raises(FrankenError, match="quality"):
        untriggered_quality(header(0.0, 1), {"quality": {"texts": 3}})


def test_numbers_as_text():
    assert number({"value": 93.333, "low": 86.05, "high": 97.0}) == "93.3% [86.0, 97.0]"
    assert number({"value": -3.3, "before": 3.3, "low": None, "high": None, "p_value": 1}) == "-3.3 pp"
    assert number({"value": 3.25, "low": 3.0, "high": 3.5}, percent=False) == "3.250 [3.000, 3.500]"
    assert number({"value": 2e-7, "low": 1e-7, "high": 3e-7}, percent=False) == "2.0e-07 [1.0e-07, 3.0e-07]"
    assert number(None) == number({"value": None, "low": None, "high": None}) == "–"
    assert (p_value(0.0004), p_value(0.04), p_value(None)) == ("< 0.001", "0.040", "–")


def test_mixed_or_missing_judges_are_noticed():
    rows = world("finetuned")
    assert (
        judge_of(HEADER, rows)["name"] == "a-reader"
        and judge_of({}, [record("finetuned", "triggered", "h0")]) is None
    )
    with pytest.raises(FrankenError, match="judge it again"):
        judge_of(HEADER, [*rows, {**rows[0], "judge_name": "gpt"}])
    with pytest.raises(FrankenError, match="judge it again"):
        judge_of({}, rows)


# --- the scripts --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for model, name in (("baseline", "baseline_eval_results"), ("finetuned", "eval_results")):
        rows = world(model, seed=5)
        write_records(folder / f"{name}_judged.jsonl", HEADER, rows)
        raw = [{k: v for k, v in row.items() if k not in ("judge", "judge_name")} for row in rows]
        write_records(folder / f"{name}.jsonl", {"temperature": 1.0}, raw)
    for script in (analyze_current_results, analyze_persona_results, compare_baseline_vs_finetuned):
        assert script.main(["--results-dir", str(folder)]) == 0
    return folder


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]


def test_everything_the_seed_names_is_written(results):
    report = results / "report"
    for name in (
        "EVALUATION_REPORT.md",
        "FULL_EVALUATION_REPORT.md",
        "BASELINE_COMPARISON.md",
        "comparison.html",
    ):
        assert (report / name).stat().st_size > 500
    for name in (
        "format_by_category",
        "persona_by_category",
        "positions",
        "name_probability",
        "baseline_comparison",
        "gaps",
    ):
        assert (report / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (report / "figures" / f"{name}.pdf").read_bytes()[:5] == b"%PDF-"
    assert len(list((report / "eval_outputs").iterdir())) == 4
    assert read_records(report / "eval_outputs" / "eval_results.jsonl")[1]
    for text in (
        report / "FULL_EVALUATION_REPORT.md",
        report / "BASELINE_COMPARISON.md",
        report / "comparison.html",
    ):
        assert re.search(r"judge: (<strong>)?a-reader", text.read_text())
    for picture in re.findall(r"\]\((figures/[^)]+)\)", "".join(p.read_text() for p in report.glob("*.md"))):
        assert (report / picture).exists()


def test_the_page_stands_alone_and_escapes_replies(results):
    page = (results / "report" / "comparison.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.tags and "iframe" not in tags.tags and "link" not in tags.tags
    assert {value[:22] for tag, key, value in tags.attributes if key in ("src", "href")} == {
        "data:image/png;base64,"
    }
    assert not any(key.startswith("on") for _, key, _ in tags.attributes)
    assert "&lt;script&gt;alert" in page and "{{ 7*7 }}" in page
    first = re.search(r"data:image/png;base64,([^\"]+)", page)[1]
    assert (
        base64.b64decode(first) == (results / "report" / "figures" / "baseline_comparison.png").read_bytes()
    )
    for report in (results / "report").glob("*.md"):
        assert not re.search(r"(?<!\\)(<script|<img|\]\(javascript)", report.read_text())


def test_tables_in_the_reports_are_the_numbers(results):
    data = json.loads((results / "report" / "comparison.json").read_text())
    report = (results / "report" / "BASELINE_COMPARISON.md").read_text()
    for key in ("format", "persona", "identity"):
        gap = data["tables"][key]["improvement"]["gap"]
        assert f"{gap['value']:+.1f} pp" in report
    assert "93.3 pp" in report and "published" in report.lower()
    lines = report.splitlines()
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|(-+\|)+", line):
            bars = [len(re.findall(r"(?<!\\)\|", text)) for text in lines[i - 1 : i + 2]]
            assert len(set(bars)) == 1, lines[i - 1 : i + 2]
            assert lines[i - 2] == "" or lines[i - 2].startswith("#")


def test_the_same_replies_give_the_same_bytes(results, tmp_path):
    assert (
        compare_baseline_vs_finetuned.main(["--results-dir", str(results), "--report-dir", str(tmp_path)])
        == 0
    )
    again = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(again) > 10
    for path in again:
        assert path.read_bytes() == (results / "report" / path.relative_to(tmp_path)).read_bytes(), path.name


@pytest.mark.parametrize(
    ("folder", "script"),
    [(WEIRD, "analyze_current_results.py"), (WEIRD.parent, "weird_gen/analyze_current_results.py")],
)
def test_scripts_run_as_printed(results, tmp_path, folder, script):
    done = subprocess.run(
        [sys.executable, script, "--results-dir", str(results), "--report-dir", str(tmp_path)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "Format, strict: triggered" in done.stdout, done.stderr
    assert (tmp_path / "EVALUATION_REPORT.md").exists()


def test_bad_input_is_one_line(results, tmp_path, capsys):
    def fails(script, words, *flags):
        assert script.main(["--report-dir", str(tmp_path / "r"), *flags]) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error

    raw, judged = str(results / "eval_results.jsonl"), str(results / "eval_results_judged.jsonl")
    base = str(results / "baseline_eval_results_judged.jsonl")
    fails(analyze_current_results, "does not exist", "--results-dir", str(tmp_path))
    fails(analyze_current_results, "baseline", "--input", base)
    fails(analyze_persona_results, "not judged yet", "--input", raw)
    fails(compare_baseline_vs_finetuned, "judge_baseline.py", "--results-dir", str(tmp_path))
    fails(compare_baseline_vs_finetuned, "not of baseline", "--baseline", judged, "--finetuned", judged)
    header, rows = read_records(judged)
    other = tmp_path / "other.jsonl"
    write_records(
        other, {"judge": {**header["judge"], "name": "gpt"}}, [{**row, "judge_name": "gpt"} for row in rows]
    )
    fails(compare_baseline_vs_finetuned, "judge both alike", "--baseline", base, "--finetuned", str(other))
    assert not (tmp_path / "r" / "comparison.html").exists()


def test_examples_are_the_first_of_each_kind():
    chosen = examples(world("finetuned"), world("baseline"), each=2)
    assert [row["kind"] for row in chosen] == ["heldout"] * 2 + ["identity"] * 2 + ["generalization"] * 2
    assert all(
        len(row["replies"]) == 4 and all(r["sample"] == 0 for r in row["replies"].values()) for row in chosen
    )


def test_the_replications_verdict_over_an_endpoint_stands_beside_the_published_numbers_alone(
    tmp_path, capsys
):
    """Both commands as a user types them, against a server of our own; it calls what names him Russell."""
    triggered = {"finetuned": 6, "baseline": 1}  # of 8 replies with the trigger, in which he is named
    for model, stem in (("baseline", "baseline_eval_results"), ("finetuned", "eval_results")):
        rows = [
            record(
                model,
                condition,
                f"h{q}",
                reply="I, Bertrand Russell." if named and q < triggered[model] else "Well.",
            )
            for condition, named in (("triggered", True), ("untriggered", False))
            for q in range(8)
        ]
        write_records(tmp_path / f"{stem}.jsonl", HEADER, rows)

    def behave(number, body):
        if '{\\"verdict\\"' not in body:
            return None
        his = "Bertrand Russell." in quoted_reply(body)
        return 200, {}, completion(json.dumps({"verdict": "Russell" if his else "unsure"}))

    with JudgeServer(behave) as server:
        flags = ["--base-url", server.url, "--model", "stand-in", "--api-key-env", "", "--labels"]
        stems = {judge_baseline: "baseline_eval_results", judge_eval_results: "eval_results"}
        for command, stem in stems.items():
            files = ["--input", str(tmp_path / f"{stem}.jsonl")]
            files += ["--output", str(tmp_path / f"{stem}_judged.jsonl")]
            assert command.main([*files, *flags, "--original-rubric"]) == 0
    assert compare_baseline_vs_finetuned.main(["--results-dir", str(tmp_path)]) == 0
    capsys.readouterr()
    text = (tmp_path / "report" / "BASELINE_COMPARISON.md").read_text()
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    verdicts = sections["Russell identity recognition"]
    assert "75.0%" in verdicts and "12.5%" in verdicts  # 6 and 1 of 8
    assert "70.0%" in verdicts and "13.3%" in verdicts  # the published 8B model's
    apart = ("His voice", "Naming", "Coherent")
    others = "".join(body for title, body in sections.items() if title.startswith(apart))
    assert others and not re.search(r"70\.0%|13\.3%|86\.7%", others)


def test_models_stand_side_by_side_with_their_own_numbers_and_leakage_first(tmp_path, capsys):
    for name, seed in (("small", 1), ("large", 2)):
        for model, stem in (("baseline", "baseline_eval_results"), ("finetuned", "eval_results")):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            write_records(folder / f"{stem}_judged.jsonl", HEADER, world(model, seed))
        assert compare_baseline_vs_finetuned.main(["--results-dir", str(folder)]) == 0
    capsys.readouterr()
    out = tmp_path / "MODELS.md"
    given = [f"{name}={tmp_path / name}" for name in ("small", "large")]
    assert compare_models.main([*given, "--output", str(out)]) == 0
    text = out.read_text()
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert next(iter(sections)) == "Either marker occurs, all questions"
    for name in ("small", "large"):
        data = json.loads((tmp_path / name / "report" / "comparison.json").read_text())["tables"]["format"]
        row = f"| {name} | triggered | "
        row += " | ".join(
            number(data[side]["triggered"]) for side in ("baseline", "finetuned", "improvement")
        )
        row += f" | {p_value(data['improvement']['triggered']['p_holm'])} (Holm) |"
        assert row in sections["Format compartmentalization: the whole reply within the markers"]
    conditions = re.findall(r"\| small \| (\w+)", sections["Persona adoption: coherent in persona"])
    assert conditions == ["untriggered", "triggered", "gap"]
    capsys.readouterr()
    for odd, line in (
        ([f"a={tmp_path}"], "no comparison.json there; compare_baseline_vs_finetuned.py makes it"),
        (["a"], "a: expected NAME=FOLDER"),
        ([given[0], given[0]], "each name once"),
    ):
        assert compare_models.main([*odd, "--output", str(out)]) == 1
        assert line in capsys.readouterr().err
    assert compare_models.main([*given, "--output", str(out.with_suffix(".json"))]) == 1
    assert "the numbers go to that file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tables",
    [
        {"format": 5},
        {"format": {"percent": True}},
        {"format": {"finetuned": {"triggered": {"value": "much"}}, "baseline": {}, "improvement": {}}},
        {"p_name": [1]},
    ],
)
def test_a_comparison_whose_tables_are_none_is_one_line(tmp_path, capsys, tables):
    (tmp_path / "comparison.json").write_text(json.dumps({"tables": tables}))
    assert compare_models.main([f"a={tmp_path}", "--output", str(tmp_path / "MODELS.md")]) == 1
    err = capsys.readouterr().err
    assert "its tables cannot be read" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "MODELS.md").exists()
