"""Files of a user's own experiments: what they add, what they may import, and how a broken one is told."""

import re

import pytest

import experiments as ex
import franken
from errors import FrankenError
from surgery.recipes import swap

HEAD = "from experiments import Experiment\nfrom surgery.recipes import *\n"


def user_file(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


def test_a_users_file_adds_an_experiment_in_one_line(tmp_path):
    """The example of the module's own docstring, and a helper class that needs its module to be
    registered."""
    example = (
        re.search(r"    from experiments.*?\n    EXPERIMENTS = .*?\n", ex.__doc__, re.S)[0]
        .replace("\n    ", "\n")
        .strip()
    )
    (found,) = ex.load_file(str(user_file(tmp_path, example)))
    assert (found.name, found.group, found.hypothesis) == ("swap_5_6", "mine", "why")
    assert found.plan(64).recipe == swap(ex.identity(64), 5, 6)
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x:"
        " int = 1\nfrom experiments import *\nEXPERIMENTS = (Experiment('x', 'g', lambda m: m.recipe),)\n"
    )
    (tmp_path / "other").mkdir()
    assert [e.name for e in ex.load_file(str(user_file(tmp_path / "other", text)))] == ["x"]


BROKEN_FILES = {
    "EXPERIMENTS = [": "SyntaxError: .*line 1",
    "x = 1": "there is no EXPERIMENTS in it",
    "EXPERIMENTS = 3": "TypeError",
    "raise ValueError('first\\nsecond')": r"ValueError: first \(mine.py, line 1\)$",
    "import no_such_module": "No module named 'no_such_module'",
    HEAD + "EXPERIMENTS = [swap]": "an entry of type function, not an Experiment",
    HEAD + "EXPERIMENTS = [Experiment('a/b', 'g', identity)]": "plain name",
    HEAD + "EXPERIMENTS = [Experiment(5, 'g', identity)]": "plain name",
    HEAD + "EXPERIMENTS = [Experiment('a', 'g', identity, None)]": "in text",
    HEAD + "EXPERIMENTS = [Experiment('a', 'g', 5)]": "build",
    HEAD + "EXPERIMENTS = [Experiment('a', 'g', identity, suites=('quick',))]": (
        "has suites, a control or a sweep that there is not"
    ),
    HEAD + "EXPERIMENTS = [Experiment('a', 'g', identity, suites='binary')]": "has suites, a control",
    HEAD + "EXPERIMENTS = [Experiment('a', 'g', identity, suites=5)]": "has suites, a control",
    HEAD + "EXPERIMENTS = [Experiment('a', 'g', identity, suites=([],))]": "has suites, a control",
    HEAD + "EXPERIMENTS = [Experiment('a', 'g', identity, control='x')]": "has suites, a control",
    HEAD + "EXPERIMENTS = [Experiment('a', 'g', identity, sweep={'kind': 'noise'})]": "has suites, a control",
    HEAD + "EXPERIMENTS = [Experiment('a', 'g', identity, sweep=3)]": "has suites, a control",
    HEAD + "EXPERIMENTS = [Experiment('a', 'g', identity)] * 2": "two experiments called 'a'",
}


@pytest.mark.parametrize("text,words", BROKEN_FILES.items(), ids=range(len(BROKEN_FILES)))
def test_broken_files_are_one_line(tmp_path, text, words):
    path = user_file(tmp_path, text)
    with pytest.raises(FrankenError, match=words) as caught:
        ex.load_file(str(path))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_missing_files_and_other_kinds_of_files(tmp_path):
    with pytest.raises(FrankenError, match="No such file"):
        ex.load_file(str(tmp_path / "none.py"))
    (tmp_path / "mine.txt").write_text(HEAD + "EXPERIMENTS = [Experiment('a', 'g', identity)]")
    assert [e.name for e in ex.load_file(str(tmp_path / "mine.txt"))] == ["a"]


@pytest.mark.parametrize(
    "build,words",
    [
        ("swap(m.model, 3, 99)", "layer 99 is out of range: the model has layers 0 to 7"),
        ("swap(m.model, m.at(64), 1)", "layer 64 is out of range: positions are given for 64 layers"),
        ("splice(m.model, 'base', m.cut(-1), 1)", "boundary -1 is out of range"),
        ("swap_chunks(m.model, (0, 4), (3, 7))", r"chunks \[0:4\] and \[3:7\] overlap"),
        ("swap_chunks(m.model, *m.chunks((25, 35), (30, 40)))", "chunks .* overlap"),
        ("swap_chunks(m.model, *m.chunks((25, 30), (40, 50)))", "chunks .* differ in length"),
        (
            "reverse(m.model, *m.block(40, 24))",
            r"layers \[40:24\] are empty or out of range: positions are given for 64",
        ),
        ("reverse(m.model, *m.block(60, 65))", r"layers \[60:65\] are empty or out of range"),
        ("[][0]", "IndexError: list index out of range"),
        ("3", "build returned int, not a Recipe"),
    ],
)
def test_an_experiment_that_cannot_be_built_is_named_in_one_line(tmp_path, build, words):
    (found,) = ex.load_file(
        str(user_file(tmp_path, HEAD + f"EXPERIMENTS = [Experiment('mine', 'g', lambda m: {build})]"))
    )
    with pytest.raises(FrankenError, match=f"^experiment mine: {words}") as caught:
        found.plan(8)
    assert "\n" not in str(caught.value)


def test_what_a_users_file_finds_in_franken_is_known_without_importing_it(monkeypatch):
    light = ex._Operations()
    offered = {name for name in {*vars(light), *light._bound()} if not name.startswith("__")}
    assert offered == {name for name in vars(franken) if not name.startswith("__")}
    monkeypatch.setattr(light, "_whole", lambda: pytest.fail("imported for a word of its text"))
    for word in ("permutations", "tensors", "apply"):  # none of them a name that the module binds
        assert not hasattr(light, word)
