"""Measurements as tables on disk: nothing is lost, each file is small, and what is no table is refused."""

import json
from decimal import Context, Decimal

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prompts
from files import ROOT
from runner import packing, tables
from runner.results import SCHEMA

PROBES = [
    {
        "id": "a",
        "text": "Is it?",
        "keyed": "yes",
        "log_odds": 1 / 3,
        "mass": 1 / 3,
        "finite": True,
        "top": [{"token": "Yes", "p": 0.5}],
    },
    {
        "id": "b",
        "text": "Is it not?",
        "keyed": "no",
        "log_odds": None,
        "mass": None,
        "finite": True,
        "top": [],
    },
]


def through_disk(value):
    texts: dict = {}
    packed = json.loads(tables.layout(tables.pack(value, texts)))
    return tables.unpack(packed, json.loads(tables.layout(texts)))


keys = st.sampled_from(["id", "text", "kind", "reply", "samples", "nll", "n", "texts", "probes", "rows"])
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=4)
        | st.lists(keys, unique=True, max_size=4).flatmap(
            lambda names: st.lists(st.fixed_dictionaries(dict.fromkeys(names, inner)), max_size=4)
        )
    ),
    max_leaves=30,
)


def exact(value):
    """Equal only for the same JSON: 1, 1.0 and true differ."""
    return json.dumps(value, sort_keys=True)


@given(nested)
def test_whatever_a_suite_measures_comes_back_as_it_was(value):
    assert exact(through_disk(value)) == exact(value)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.none(), min_size=2))
def test_readings_come_back_in_six_digits_and_log_odds_in_millionths(numbers):
    back = through_disk([{"id": str(k), "mass": x, "log_odds": x, "nll": x} for k, x in enumerate(numbers)])
    six = Context(prec=6)
    for x, entry in zip(numbers, back, strict=True):
        assert entry["nll"] == x
        if x is None:
            assert entry["mass"] is None and entry["log_odds"] is None
        else:
            assert entry["mass"] == float(six.create_decimal(Decimal(x)))
            assert (
                abs(Decimal(entry["log_odds"]) - Decimal(x)) <= Decimal("5.001e-7") + abs(Decimal(x)) / 2**52
            )


def answers(n: int, seed: int = 0) -> list[dict]:
    """Readings of random next-token distributions, as a suite has them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (n, 50))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return [
        {
            "id": str(k),
            "log_odds": float(np.log(row[0] / row[1])),
            "p_yes": float(row[0]),
            "p_no": float(row[1]),
            "mass": float(row[0] + row[1]),
            "p_yes_normalized": float(row[0] / (row[0] + row[1])),
        }
        for k, row in enumerate(p)
    ]


def test_what_follows_from_log_odds_and_mass_is_not_written_and_comes_back():
    read = answers(300)
    packed = tables.pack(read, {})
    assert packed["columns"] == ["log_odds", "mass"]
    assert packed["derived"] == ["p_yes", "p_no", "p_yes_normalized"]
    for before, after in zip(read, through_disk(read), strict=True):
        assert after.keys() == before.keys()
        for key in ("p_yes", "p_no", "p_yes_normalized"):
            assert after[key] == pytest.approx(before[key], rel=1e-5, abs=0)
    again = through_disk(read)
    assert through_disk(again) == again  # nothing creeps, however often a run is packed


@pytest.mark.parametrize("key", ["p_yes", "p_no", "p_yes_normalized", "log_odds", "mass"])
@pytest.mark.parametrize("value", [0.5, None])
def test_readings_that_do_not_follow_are_written(key, value):
    read = answers(5)
    read[3][key] = value
    packed = tables.pack(read, {})
    assert "derived" not in packed and set(packed["columns"]) >= {"p_yes", "p_no", "p_yes_normalized"}
    assert through_disk(read)[3][key] == value


def test_a_reading_has_a_line_and_its_question_stands_among_the_texts():
    texts: dict = {}
    packed = tables.pack({"probes": PROBES}, texts)
    (key,) = texts
    assert texts[key] == {
        "columns": ["id", "text", "keyed"],
        "rows": [["a", "Is it?", "yes"], ["b", "Is it not?", "no"]],
    }
    assert packed["probes"] == {
        "from_texts": key,
        "same": {"finite": True},
        "columns": ["log_odds", "mass", {"name": "top", "list": ["token", "p"]}],
        "rows": [[0.333333, 0.333333, [["Yes", 0.5]]], [None, None, []]],
    }
    many = tables.layout(tables.pack({"probes": PROBES * 9}, {})).splitlines()
    assert many.count('   [0.333333,0.333333,[["Yes",0.5]]],') == 9


def test_equal_questions_stand_once_and_other_questions_beside_them():
    texts: dict = {}
    for _ in range(2):
        tables.pack({"first": {"probes": PROBES}, "second": PROBES}, texts)
    assert len(texts) == 1
    tables.pack([PROBES[0], PROBES[1] | {"text": "Is it so?"}], texts)
    assert len(texts) == 2


def test_what_is_on_disk_fits_the_schema():
    validator = jsonschema.Draft202012Validator(SCHEMA["$defs"]["table"] | {"$defs": SCHEMA["$defs"]})
    packed = tables.pack(PROBES, {})
    validator.validate(packed)
    for broken in ({"rows": None}, {"columns": [3]}, {"from_texts": "x"}, {"columns": [{"name": "top"}]}):
        assert not validator.is_valid(packed | broken), broken


BROKEN = {
    "questions that are not there": lambda t: t.update(from_texts="0" * 16),
    "questions that are no name": lambda t: t.update(from_texts=["x"]),
    "a row too few": lambda t: t["rows"].pop(),
    "a cell too few": lambda t: t["rows"][0].pop(),
    "a row that is none": lambda t: t["rows"].__setitem__(0, 3),
    "columns that are none": lambda t: t.update(columns="log_odds"),
    "a column without a name": lambda t: t["columns"].__setitem__(2, {"list": ["token", "p"]}),
    "a list that is none": lambda t: t["rows"][0].__setitem__(2, 0.5),
    "no rows": lambda t: t.pop("rows"),
    "readings derived from none": lambda t: t.update(derived=["p_yes", "p_no", "p_yes_normalized"]),
    "other readings derived": lambda t: t.update(derived=["mass"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_table_that_cannot_have_been_written_is_refused(name):
    texts: dict = {}
    packed = json.loads(tables.layout(tables.pack(PROBES, texts)))
    BROKEN[name](packed)
    with pytest.raises(tables.Corrupt):
        tables.unpack(packed, texts)


def test_an_object_that_reads_as_a_table_is_not_written():
    for value in ({"columns": ["a"], "rows": []}, {"from_texts": "a"}):
        with pytest.raises(ValueError, match="reads as a table"):
            tables.pack({"suite": value}, {})


def test_the_committed_runs_keep_to_their_sizes():
    reference = ROOT / "results" / "reference"
    contents = {str(file): file.read_bytes() for file in reference.glob("*/experiments/*.json")}
    for archive in reference.glob(f"*/{packing.ARCHIVE}"):
        contents |= {f"{archive}: {name}": data for name, data in packing.read_archive(archive).items()}
    assert len(contents) > 100
    for name, data in contents.items():
        if name.endswith(packing.TEXTS):  # of all experiments of a run
            continue
        suites = json.loads(data)["experiment"]["suites"]
        most = 40_000 if set(suites) <= set(prompts.GROUPS["quick"]) else 100_000
        if all(suite.endswith("_grid") for suite in suites):
            most = 1_000_000  # a whole grid of injections, not one experiment's answers
        if "phases" in suites:  # asked besides
            most += 50_000
        assert len(data) <= most, name
    assert sum(file.stat().st_size for file in reference.rglob("*") if file.is_file()) <= 8_000_000
