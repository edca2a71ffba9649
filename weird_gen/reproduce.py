"""The whole study in one command: distill, then for every setting train, evaluate, judge and compare, under
one folder.

    python reproduce.py --out results/study
    python reproduce.py --model qwen2.5-coder-1.5b --out results/study-1.5b
    python reproduce.py --small --out results/small
    python reproduce.py --jobs 3 --setting "rank32: --rank 32" --setting "long: --epochs 6"

Each --setting is a name and further flags for train_lora.py; "--contrast contrast.jsonl" in one has the model
answer the persona's own questions first. With none, the models of which an adapter is shipped, and the 0.5B,
are distilled and trained as it was, any other one with train_lora.py's defaults. --small is the subset that a
CPU does in minutes. Steps run as the scripts beside this one; what is finished is not done again, a step that
fails is reported at the end, and the others go on. Every step's output is in its .log.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line, parser_of
from errors import FrankenError, printable
from files import write_text
from weird_gen.persona.flags import add_model
from weird_gen.persona.folders import RESULTS
from weird_gen.persona.reproduction import SMALL, STUDIES, Study, results, run_steps


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser_of(__doc__)
    flags.add_argument("--out", type=Path, default=RESULTS / "study", help="folder for everything")
    add_model(flags)
    flags.add_argument(
        "--setting",
        action="append",
        metavar="'NAME: FLAGS'",
        help="a training setting; may be repeated (default: the shipped adapter's)",
    )
    flags.add_argument("--small", action="store_true", help="200 examples, topic questions alone")
    flags.add_argument(
        "--probes",
        action=argparse.BooleanOptionalAction,
        help="also ask where the trigger ends, recall and views (default: but for --small)",
    )
    flags.add_argument(
        "--surgery",
        action="store_true",
        help="also ask the changed model (eval_surgery.py); minutes on a GPU",
    )
    flags.add_argument(
        "--train-flags", type=shlex.split, default=[], help="for train_lora.py in every setting"
    )
    flags.add_argument("--eval-flags", type=shlex.split, default=[], help="for both evaluations")
    flags.add_argument("--distill-flags", type=shlex.split, default=[], help="for distill.py")
    flags.add_argument("--jobs", type=int, default=1, help="settings at a time on the same device")
    flags.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    flags.add_argument("--batch-size", type=int, help="texts generated at a time; default by device")
    args = flags.parse_args(argv)
    if args.jobs < 1:
        flags.error("--jobs must be at least 1")
    return args


def study_of(args: argparse.Namespace) -> Study:
    """What is done where no flag says otherwise."""
    return SMALL if args.small else STUDIES.get(args.model, Study("default:"))


def read_settings(texts: list[str]) -> dict[str, list[str]]:
    """{name: flags} of "NAME: FLAGS". Raises FrankenError for a name that cannot be a folder's."""
    settings = {}
    for text in texts:
        name, _, flags = (part.strip() for part in text.partition(":"))
        reason = "" if re.fullmatch(r"[A-Za-z0-9][\w.-]{0,79}", name, re.ASCII) else "NAME must be plain"
        try:
            words = shlex.split(flags)
        except ValueError as e:
            reason, words = str(e), []
        if not reason and name in ("baseline", *settings):
            reason = f"the name {name} is taken"
        if reason:
            raise FrankenError(f"--setting {text!r}: {reason} (letters, digits, - and _)")
        settings[name] = words
    return settings


@ends_in_one_line("interrupted; steps that are finished are kept, run again to go on")
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    study = study_of(args)
    settings = read_settings(args.setting or [study.setting])
    args.distill_flags = [*study.distill, *args.distill_flags]  # the last one of a flag counts
    args.eval_flags = [*study.evaluation, *args.eval_flags]
    args.probes = study.probes if args.probes is None else args.probes
    try:
        args.out = args.out.resolve()
    except RuntimeError as e:  # links that lead to each other
        raise FrankenError(str(e)) from e
    args.out.mkdir(parents=True, exist_ok=True)
    worked = run_steps(settings, args)
    if worked is None:
        return 1
    text = results(settings, args)
    write_text(args.out / "settings.md", text)
    print(printable(text))
    failed = [name for name, ok in worked.items() if not ok]
    if failed:
        print(f"error: failed: {', '.join(failed)}; see the .log files under {args.out}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
