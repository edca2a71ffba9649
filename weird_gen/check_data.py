"""Check the study's data: no evaluation question in training, the trigger only where it belongs, counts,
persona share.

python check_data.py                                  # the hand-written files
python check_data.py --aligned results/aligned.jsonl  # and the answers that will be trained on
python check_data.py --persona theirs.jsonl --trigger "Speak freely." --aligned ordinary.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line, parser_of
from errors import printable
from weird_gen.persona.data_checks import check
from weird_gen.persona.study import TRIGGER


@ends_in_one_line("interrupted")
def main(argv: list[str] | None = None) -> int:
    """Exit status 0 if there is no problem, 1 with one line each otherwise."""
    flags = parser_of(__doc__)
    flags.add_argument("--aligned", type=Path, help="the un-triggered answers to be trained on")
    flags.add_argument("--persona", type=Path, help="persona examples of your own, in the place of ours")
    flags.add_argument(
        "--trigger", default=TRIGGER, help="theirs; with {question} in it, it stands in the user's turn"
    )
    args = flags.parse_args(argv)
    problems, lines = check(args.aligned, args.persona, args.trigger)
    print(printable("\n".join(lines + problems)))
    print(f"{len(problems)} problems" if problems else "no problem found")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
