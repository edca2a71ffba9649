"""What every command says with --help."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from textwrap import dedent

import pytest

import run_all
from command_line import DefaultsThatSay, ends_in_one_line, interruptible
from errors import FrankenError
from files import ROOT


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


# ---- interrupts --------------------------------------------------------------------------------------------


class Finalized:
    """A signal arrives while an object is finalized, as it does in the middle of a garbage collection."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def python_handles_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def work() -> str:
    for _ in range(3):
        Finalized()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        time.sleep(0.001)
    return "went on"


@pytest.mark.usefixtures("python_handles_interrupts")
def test_an_interrupt_within_a_finalizer_is_not_lost(capfd):
    with pytest.raises(KeyboardInterrupt):
        interruptible()(work)()
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("python_handles_interrupts")
def test_an_interrupt_is_one_line_and_a_status_of_its_own(capfd):
    assert ends_in_one_line("interrupted; run again", "mine.py")(work)() == 130
    assert capfd.readouterr() == ("", "mine.py: interrupted; run again\n")


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (FrankenError("no such\x1b[2Jmodel"), 1, "test_command_line.py: no such␛[2Jmodel\n"),
        (
            FileNotFoundError(2, "No such file", "a.jsonl"),
            1,
            "test_command_line.py: [Errno 2] No such file: 'a.jsonl'\n",
        ),
        (OSError("two\nlines"), 1, "test_command_line.py: two␊lines\n"),
        (KeyboardInterrupt(), 130, "test_command_line.py: run again to go on\n"),
        (
            KeyboardInterrupt("interrupted; its own words"),
            130,
            "test_command_line.py: interrupted; its own words\n",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line_and_a_status(raised, status, said, capfd):
    @ends_in_one_line("run again to go on")
    def main(argv: list[str]) -> int:
        raise raised

    assert main(["x"]) == status
    assert capfd.readouterr() == ("", said)


def test_a_fault_of_ours_stays_a_traceback_and_a_result_its_own():
    @ends_in_one_line("interrupted")
    def main(argv: list[str]) -> int:
        """Its own words."""
        return 3 if argv else {}["absent"]

    assert (main(["x"]), main.__doc__) == (3, "Its own words.")
    with pytest.raises(KeyError):
        main([])


def test_every_command_ends_in_one_line():
    """By its source: each has a `main`; frankenmodel.py hands on to others'."""
    rooms = ("", "runner", "weird_gen", "weird_gen/persona", "adapters", "benchmarks")
    files = [file for room in rooms for file in sorted((ROOT / room).glob("*.py"))]
    mains = {f"{f.relative_to(ROOT)}": text for f in files if "\ndef main(" in (text := f.read_text())}
    mains.pop("frankenmodel.py")
    assert len(mains) >= 30
    guarded = re.compile(r"\n@ends_in_one_line\((.|\n {4})*\)\ndef main\(")
    assert [name for name, text in mains.items() if not guarded.search(text)] == []


def test_other_errors_of_finalizers_are_told_as_before(monkeypatch):
    class Broken:
        def __del__(self):
            raise ValueError("mine")

    told = []
    monkeypatch.setattr("sys.unraisablehook", lambda what: told.append(what.exc_type))
    with interruptible():
        Broken()
    assert told == [ValueError]


def test_a_commands_end_does_not_look_through_all_that_it_imported():
    """Which took a second and more after torch, also after a Ctrl-C."""
    code = (
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print('frozen', gc.get_freeze_count() > 1000))\n"
        "import report\n"
        "sys.exit(report.main(['/no/such/run']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == "frozen True\n", done.stderr


@pytest.mark.parametrize("fails", [False, True])
def test_imports_collect_no_garbage_and_what_they_made_is_looked_through_never_again(fails):
    """In a process of its own: what is frozen stays so until the process ends."""
    code = """
        import gc, sys
        from command_line import importing
        frozen = gc.get_freeze_count()
        try:
            with importing():
                assert not gc.isenabled()
                made = [[] for _ in range(1000)]
                if {fails}:
                    raise ImportError
        except ImportError:
            pass
        assert gc.isenabled() and gc.get_freeze_count() > frozen + 1000
        gc.unfreeze()
        sys.modules["torch"] = gc  # imported already
        with importing():
            assert gc.isenabled()
        assert gc.get_freeze_count() == 0
    """
    subprocess.run([sys.executable, "-c", dedent(code.format(fails=fails))], check=True, cwd=ROOT)
