"""The comparisons of several models side by side, the seed's tables for each (report/MODELS.md).

python compare_models.py 135M=results/study 1.5B=results/study-1.5b/study
Each NAME=FOLDER has the comparison.json that compare_baseline_vs_finetuned.py left, there or in report/.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line, parser_of
from errors import FrankenError, printable
from weird_gen.persona.folders import RESULTS
from weird_gen.persona.side_by_side import report_models


def read_names(texts: list[str]) -> dict[str, Path]:
    """{name: folder} of NAME=FOLDER. Raises FrankenError for another form and for a name given twice."""
    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder) or name in folders:
            raise FrankenError(f"{text}: expected NAME=FOLDER, each name once")
        folders[name] = Path(folder)
    return folders


@ends_in_one_line("interrupted; the same command makes the report again")
def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 1 with one line on stderr for input that cannot be used."""
    flags = parser_of(__doc__)
    flags.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="where a model's comparison is")
    flags.add_argument("--output", type=Path, default=RESULTS / "report" / "MODELS.md", help="the report")
    args = flags.parse_args(argv)
    print(printable("\n".join(report_models(read_names(args.models), args.output))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
