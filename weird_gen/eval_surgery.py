"""Change the model that carries the adapter, and ask each time whether the persona is still there.

python eval_surgery.py --adapter adapters/smollm2-135m-russell
analyze_surgery.py makes the tables. The adapter is put on a part of the layers, taken off a part, scaled, put
on attention or MLP alone; layers are deleted, noise is added, units are reordered (a placebo). `--changes`
takes names of changes and of their groups. Interrupted, the next run goes on where this one stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line, parser_of
from errors import printable
from weird_gen.persona.depth import GROUPS, ask_changes
from weird_gen.persona.flags import add_model, add_sampling, positive
from weird_gen.persona.folders import RESULTS


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser_of(__doc__)
    add_model(flags, "a folder or a hub id")
    flags.add_argument("--output", type=Path, default=RESULTS / "surgery.jsonl", help="replies as JSON lines")
    flags.add_argument(
        "--changes",
        nargs="+",
        metavar="NAME",
        help=f"these alone, by name or group (default: all; groups: {', '.join(GROUPS)})",
    )
    flags.add_argument("--samples", type=positive, default=2, help="replies a question and condition")
    add_sampling(flags, "replies")
    flags.add_argument("--max-new-tokens", type=positive, default=128)
    return flags.parse_args(argv)


@ends_in_one_line("interrupted; replies made so far are kept, run again to go on")
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    got = ask_changes(args)
    print(printable(f"{got['changes']} changes asked in {got['seconds']:.0f} s: {args.output}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
