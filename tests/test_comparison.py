"""comparison.json: written, checked by its schema, and read back as the same types."""

import json
from dataclasses import fields, is_dataclass, replace

import jsonschema
import made_results as made
import made_rows
import made_study
import pytest

from analysis import comparison
from analysis.stats import Discrimination
from errors import FrankenError
from files import ROOT
from reporting.reports import compare_run, read_comparison
from runner.results import Run, write_json


def study():
    return made_rows.comparison(
        made_study.study_rows(), injection=made_rows.injection_summary(), missing=("later",), auroc=None
    )


def written(value):
    """Through the text of a file and back."""
    return json.loads(json.dumps(comparison.to_json(value), allow_nan=False))


def test_the_committed_schema_is_the_types():
    committed = json.loads((ROOT / "schema" / "comparison.json").read_text())
    assert committed == comparison.schema(), "python -m analysis.comparison > schema/comparison.json"
    jsonschema.Draft202012Validator.check_schema(committed)


def test_every_field_is_documented():
    kinds = comparison.schema()["$defs"] | {"Comparison": comparison.schema()}
    bare = [
        f"{name}.{field}"
        for name, kind in kinds.items()
        for field, about in kind["properties"].items()
        if len(about.get("description", "")) < 3
    ]
    assert bare == []


def test_the_schema_names_every_field_of_every_type():
    kinds = comparison.schema()["$defs"] | {"Comparison": comparison.schema()}
    types = [kind for kind in vars(comparison).values() if is_dataclass(kind)] + [Discrimination]
    own = {kind.__name__: [f.name for f in fields(kind)] for kind in types}
    assert {name: list(kind["properties"]) for name, kind in kinds.items()} == own
    assert all(kind["required"] == list(kind["properties"]) for kind in kinds.values())


def test_what_is_written_is_read_back_equal():
    assert comparison.from_json(written(study()), "a file") == study()


def test_a_measured_run_is_read_back_equal(tmp_path):
    measured, _ = made.compared(tmp_path / "run_x")
    assert measured.experiments[1].trigger is not None
    assert comparison.from_json(written(measured), "a file") == measured


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: d | {"schema_version": 1}, "no comparison of version 4"),
        (lambda d: [d], "no comparison of version 4"),
        (lambda d: d | {"baseline": 3}, r"corrupt \(\$.baseline"),
        (lambda d: d | {"unheard": 3}, "'unheard' was unexpected"),
        (lambda d: {k: v for k, v in d.items() if k != "run"}, "'run' is a required property"),
    ],
)
def test_another_file_is_refused_in_one_line(spoil, said):
    with pytest.raises(FrankenError, match=said) as refused:
        comparison.from_json(spoil(written(study())), "x/comparison.json")
    assert str(refused.value).startswith("x/comparison.json is ")
    assert "\n" not in str(refused.value)


def test_a_value_of_another_kind_is_not_written():
    row = replace(made_rows.row("x"), seconds="long")
    with pytest.raises(FrankenError, match="'long' is not of type 'number'"):
        comparison.to_json(made_rows.comparison([row]))


def test_a_run_without_comparison_is_one_line(tmp_path):
    with pytest.raises(FrankenError, match="cannot read .*comparison.json"):
        read_comparison(Run(tmp_path))


@pytest.mark.real
def test_the_reference_run_of_real_weights_is_read_back_equal(tmp_path):
    run, manifest = Run.resume(str(ROOT / "results" / "reference" / "smollm2-135m-russell"))
    measured = compare_run(run, manifest)
    write_json(tmp_path / "comparison.json", comparison.to_json(measured))
    assert read_comparison(Run(tmp_path)) == measured
