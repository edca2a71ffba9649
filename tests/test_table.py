"""A run as tidy tables: every reading once, as it stands in the experiments."""

import csv
import json
import math
import re
import sys
from pathlib import Path

import made_results as made
import pytest

import report
from reporting import table

ROOT = Path(__file__).parents[1]
HOSTILE = '=HYPERLINK("http://x","y")\x1b[31m\nred\ud800'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two experiments, of which one has been asked everything by somebody who answers formulas."""
    asked = made.everything(capability=made.capability([True, False], HOSTILE))
    results = [made.result("baseline_instruct", made.everything()), made.result("odd", asked)]
    return made.make(tmp_path_factory.mktemp("run") / "run_x", results)[0]


def written(run, path) -> tuple[list[dict], list[dict]]:
    assert report.main([str(run.path), "--table", str(path)]) == 0
    both = []
    for file in (path, path.with_name(f"{path.stem}.experiments{path.suffix}")):
        with file.open(newline="") as f:
            both.append(list(csv.DictReader(f)))
    return both[0], both[1]


def leaves(value, keys) -> int:
    """How many objects somewhere in JSON have all of these keys."""
    if isinstance(value, dict):
        return (set(keys) <= set(value)) + sum(leaves(part, keys) for part in value.values())
    return sum(leaves(part, keys) for part in value) if isinstance(value, list) else 0


def test_every_reading_stands_in_one_row(run, tmp_path):
    rows, _ = written(run, tmp_path / "run.csv")
    for name in ("baseline_instruct", "odd"):
        measured, mine = run.load(name)["measurements"], [r for r in rows if r["experiment"] == name]
        assert {r["suite"] for r in mine} == set(measured)
        assert sum(r["log_odds"] != "" for r in mine) > 50
        assert sum(r["mass"] != "" for r in mine) == leaves(measured, ("log_odds", "mass"))
        assert sum(r["reply"] != "" for r in mine) == leaves(measured, ("text", "tokens", "stopped"))
        for probe in measured["binary"]["probes"]:
            (row,) = [r for r in mine if r["suite"] == "binary" and r["probe"] == probe["id"]]
            assert float(row["log_odds"]) == probe["log_odds"] and float(row["mass"]) == probe["mass"]
            assert (row["keyed"], row["kind"], row["question"]) == (
                probe["keyed"] or "",
                probe["kind"],
                probe.get("question") or "",
            )


def test_every_experiment_stands_in_one_row_as_in_the_comparison(run, tmp_path):
    _, rows = written(run, tmp_path / "run.csv")
    report.main([str(run.path)])
    compared = json.loads((run.path / "comparison.json").read_text())["experiments"]
    assert [r["name"] for r in rows] == [e["name"] for e in compared] == ["baseline_instruct", "odd"]
    for row, entry in zip(rows, compared, strict=True):
        assert row["status"] == entry["status"] and row["run"] == "run_x"
        assert math.isclose(
            float(row["perplexity.perplexity"]), entry["perplexity"]["perplexity"], rel_tol=1e-9
        )
        assert float(row["performance.seconds"]) == run.load(row["name"])["performance"]["seconds"]


def test_a_models_words_are_no_formula_and_no_control_sequence(run, tmp_path):
    rows, _ = written(run, tmp_path / "run.csv")
    (reply, *_) = [r["reply"] for r in rows if r["suite"] == "capability" and "HYPERLINK" in r["reply"]]
    assert reply.startswith("'=HYPERLINK") and "\x1b" not in reply and "red" in reply


def test_several_runs_are_one_table(run, tmp_path):
    other = made.make(tmp_path / "run_y", [made.result("baseline_instruct", made.everything())])[0]
    out = tmp_path / "both.csv"
    assert report.main([str(run.path), str(other.path), "--table", str(out)]) == 0
    with out.open(newline="") as f:
        assert {(r["run"], r["experiment"]) for r in csv.DictReader(f)} == {
            ("run_x", "baseline_instruct"),
            ("run_x", "odd"),
            ("run_y", "baseline_instruct"),
        }


def test_the_columns_are_documented():
    text = (ROOT / "docs" / "results-format.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.M)
    assert rows == [(name, what) for name, (_, what) in table.READING.items()]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--table", "run.xlsx"], "ends in .parquet or .csv"),
        (["--table", "run.csv", "--pack"], "--table is all that is written"),
        (["--table", "nowhere/run.csv"], "cannot write nowhere/run.csv"),
    ],
)
def test_what_cannot_be_written_is_told_in_one_line(run, capsys, more, words):
    assert report.main([str(run.path), *more]) == 1
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1


def test_without_pyarrow_parquet_says_what_to_install(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert report.main([str(run.path), "--table", str(tmp_path / "run.parquet")]) == 1
    assert "pip install pyarrow" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.extra("pyarrow")
def test_pandas_reads_the_parquet_with_types(run, tmp_path):
    import pyarrow.parquet

    out = tmp_path / "run.parquet"
    assert report.main([str(run.path), "--table", str(out)]) == 0
    rows, _ = written(run, tmp_path / "run.csv")
    read = pyarrow.parquet.read_table(out)
    assert read.column_names == list(table.READING) and read.num_rows == len(rows)
    for plain, typed in zip(rows, read.to_pylist(), strict=True):
        for name, (kind, _) in table.READING.items():
            value = typed[name]
            assert value is None or type(value) is kind
            if kind is float:
                assert (plain[name] == "") if value is None else float(plain[name]) == value
    beside = pyarrow.parquet.read_table(tmp_path / "run.experiments.parquet").to_pylist()
    assert isinstance(beside[1]["perplexity.perplexity"], float) and isinstance(beside[1]["name"], str)
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.read_parquet(out)
    assert frame.groupby("suite").log_odds.count()["binary"] > 50
