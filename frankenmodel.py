"""The command `frankenmodel`, for an installation without a checkout: `frankenmodel run ...` is
`python run_all.py ...`, `frankenmodel report ...` is `python report.py ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """usage: frankenmodel run ...     measure changed models (python run_all.py ...)
       frankenmodel report ...  make a run's pages again, or compare runs (python report.py ...)

`frankenmodel run --help` and `frankenmodel report --help` list the options."""


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    command, rest = given[0] if given else "", given[1:]
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
