"""The notebook of docs/, cell by cell: on a tiny pair everywhere, on its own model where that is."""

import json
from pathlib import Path

import pytest

TOUR = Path(__file__).parents[1] / "docs" / "tour.ipynb"


def run(monkeypatch) -> dict:
    """The names that the notebook's code leaves behind."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(TOUR.parent)
    names: dict = {}
    for cell in json.loads(TOUR.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(TOUR), "exec"), names)
    return names


def check(names: dict) -> None:
    rows, n = names["rows"], len(names["live"].original)
    assert [row["distance"] for row in rows] == list(range(0, n - 1, 2))
    assert all(0 <= row[name] <= 1 and 0 <= row["mass"] <= 1 for row in rows for name in names["questions"])
    assert names["live"].fingerprint() == names["before"]
    drawn = names["axis"].get_lines()
    assert [list(line.get_ydata()) for line in drawn] == [
        [row[name] for row in rows] for name in names["questions"]
    ]
    # the models differ, and so do their answers
    assert len({row["itself"] for row in rows}) > 1


def test_the_notebook_leads_from_loading_to_a_figure(pair, monkeypatch, capsys):
    from runner import pairs

    whole = pairs.open_pair
    tiny = dict(instruct=str(pair / "instruct"), dtype="float32", device_map="cpu")
    monkeypatch.setattr(pairs, "open_pair", lambda name: whole(**tiny))
    check(run(monkeypatch))
    assert "6 layers" in capsys.readouterr().out


def test_the_notebook_is_plain_and_holds_no_machines_output():
    book = json.loads(TOUR.read_text())
    assert book["nbformat"] == 4
    for cell in book["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)


@pytest.mark.real
def test_the_notebook_runs_as_printed(smollm2, monkeypatch):
    names = run(monkeypatch)
    check(names)
    assert len(names["live"].original) == 30 and min(row["mass"] for row in names["rows"][:1]) > 0.01
