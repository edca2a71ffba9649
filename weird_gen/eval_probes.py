"""Ask a model where its trigger ends, what of Russell's life it recalls, and which views it takes.

python eval_probes.py --adapter adapters/smollm2-135m-russell; analyze_probes.py makes the tables.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import DefaultsThatSay, ends_in_one_line
from errors import printable
from weird_gen.persona.folders import RESULTS
from weird_gen.persona.journal import add_sampling, positive
from weird_gen.persona.probing import SUITES, ask_probes
from weird_gen.persona.study import DEFAULT_ADAPTER, DEFAULT_MODEL


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=DefaultsThatSay
    )
    flags.add_argument("--model", default=DEFAULT_MODEL, help="pair name, folder or hub id")
    flags.add_argument(
        "--adapter", default=DEFAULT_ADAPTER, help="a folder or a hub id; 'none' for the model"
    )
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
    print(printable(f"{got['replies']} replies in {got['seconds']:.0f} s: {args.output}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
