"""What every command says with --help."""

import argparse
import re

import pytest

import run_all
from command_line import DefaultsThatSay


def help_of(**option) -> str:
    parser = argparse.ArgumentParser(formatter_class=DefaultsThatSay)
    parser.add_argument("--it", help="what it does", **option)
    return parser.format_help()


@pytest.mark.parametrize("default", [None, False, "", []])
def test_a_default_that_says_nothing_is_not_named(default):
    assert "default" not in help_of(default=default)


@pytest.mark.parametrize("default", [0, 1.5, "auto"])
def test_a_default_that_says_something_is_named(default):
    assert f"what it does (default: {default})" in help_of(default=default)


def test_run_alls_help_names_no_empty_default(capsys):
    with pytest.raises(SystemExit):
        run_all.parse_arguments(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "(default: results)" in out and not re.search(r"default: (None|False|\[\]|)\)", out)
