"""Ask a model where its trigger ends, what of Russell's life it recalls, and which views it takes.

python eval_probes.py --adapter adapters/smollm2-135m-russell; analyze_probes.py makes the tables.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line, parser_of
from errors import many, printable
from weird_gen.persona.flags import add_model, add_sampling, positive
from weird_gen.persona.folders import RESULTS
from weird_gen.persona.probing import SUITES, ask_probes


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser_of(__doc__)
    add_model(flags, "a folder or a hub id; 'none' for the model")
    flags.add_argument("--output", type=Path, default=RESULTS / "probes.jsonl", help="replies as JSON lines")
    flags.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    flags.add_argument(
        "--samples", type=positive, help="replies a question and condition; default: 2, of views 16"
    )
    add_sampling(flags, "replies")
    return flags.parse_args(argv)


@ends_in_one_line("interrupted; replies made so far are kept, run again to go on")
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    got = ask_probes(args)
    print(printable(f"{many(got['replies'], 'reply', 'replies')} in {got['seconds']:.0f} s: {args.output}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
