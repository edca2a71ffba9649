"""The command `frankenmodel`, for an installation without a checkout: `frankenmodel run ...` is
`python run_all.py ...`, `frankenmodel report ...` is `python report.py ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

# What is imported by these plain names, which another package may have, too.
MODULES = (
    *(
        "adapters",
        "analysis",
        "command_line",
        "engine",
        "errors",
        "evaluate",
        "experiments",
        "files",
        "franken",
    ),
    *("planning", "prompts", "questions", "report", "reporting", "run_all", "runner", "suites", "surgery"),
    "weird_gen",
)
USAGE = """usage: frankenmodel run ...     measure changed models (python run_all.py ...)
       frankenmodel report ...  make a run's pages again, or compare runs (python report.py ...)

`frankenmodel run --help` and `frankenmodel report --help` list the options."""


def shadowed() -> str | None:
    """What to say where one of our modules is another package's; None where all lie beside this file."""
    ours = Path(__file__).resolve().parent
    for name in MODULES:
        spec = find_spec(name)
        places = [*(spec.submodule_search_locations or [spec.origin or ""])] if spec else []
        if not any(Path(place).resolve().parent == ours for place in places):
            whose = f"that of {places[0]}" if places else "missing"
            return f"frankenmodel: the module {name} is {whose}: install it in a new environment or by uvx"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    command, rest = given[0] if given else "", given[1:]
    if command in ("run", "report") and (problem := shadowed()):
        print(problem, file=sys.stderr)
        return 1
    if command == "run":
        import run_all  # here: each command imports what it needs alone

        return run_all.main(rest)
    if command == "report":
        import report

        return report.main(rest)
    asked = command in ("-h", "--help")
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
