"""Blind labels by readers: a sheet of replies out, filled-in sheets in, their agreement and the rates.

python label_replies.py sheet --replies results/eval_results.jsonl --out labels
python label_replies.py count --key labels/key.json anna.csv ben.csv --output labels/labels.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line, parser_of
from errors import many, printable
from files import check_target, write_text
from weird_gen.persona.flags import positive
from weird_gen.persona.labelling import (
    draw_replies,
    label_lines,
    labelled_groups,
    read_key,
    read_labels,
    reader_agreement,
    write_sheet,
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser_of(__doc__)
    commands = flags.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("sheet", help="draw replies and write what a reader gets")
    sheet.add_argument("--replies", type=Path, nargs="+", required=True, help="files of replies")
    sheet.add_argument("--count", type=positive, default=40, help="replies of each file and condition")
    sheet.add_argument("--seed", type=int, default=0)
    sheet.add_argument("--out", type=Path, required=True, help="folder for sheet.csv, BRIEF.md and key.json")
    count = commands.add_parser("count", help="read filled-in sheets")
    count.add_argument("sheets", type=Path, nargs="+", help="one a reader")
    count.add_argument("--key", type=Path, required=True, help="key.json of the sheet")
    count.add_argument("--output", type=Path, help="labels as JSON lines, for judge_eval_results.py --labels")
    return flags.parse_args(argv)


def count(args: argparse.Namespace) -> list[str]:
    """What is printed of the filled-in sheets. Raises FrankenError."""
    if args.output:
        check_target(args.output)
    key = read_key(args.key)
    readers = {path.stem: read_labels(path, key) for path in args.sheets}
    read = many(len(key["replies"]), "reply", "replies")
    lines = [f"{read}, {many(len(readers), 'reader')}: {', '.join(readers)}"]
    for name, pair, kappa in reader_agreement(key, readers):
        lines.append(f"{name}: kappa of {pair} {kappa}")
    for group in labelled_groups(key, list(readers.values())):
        said = ", ".join(f"{name} {rate}" for name, rate in group.rates.items())
        lines.append(f"{group.group}: {said}")
    if args.output:
        texts = [json.dumps(line, ensure_ascii=False) for line in label_lines(key, list(readers.values()))]
        write_text(args.output, "\n".join(texts) + "\n")
        lines.append(f"labels: {args.output}")
    return lines


@ends_in_one_line("interrupted; run again")
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "sheet":
        files = write_sheet(draw_replies(args.replies, args.count, args.seed), args.out)
        lines = [f"{what}: {file}" for what, file in zip(("sheet", "brief", "key"), files, strict=True)]
        print(printable("\n".join(lines)))
    else:
        print(printable("\n".join(count(args))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
