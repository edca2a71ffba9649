"""The whole study in one command: distill, then for every setting train, evaluate, judge and compare, under
one folder.

    python reproduce.py --out results/study
    python reproduce.py --out results/study --jobs 3 --setting "rank32: --rank 32" --setting "long: --epochs
    6"

Each --setting is a name and further flags for train_lora.py; "--contrast contrast.jsonl" in one has the model
answer the persona's own questions first. With none, the laptop-size model is trained as the shipped adapter
was, and any other one with train_lora.py's defaults. Steps run as the scripts beside this one; what is
finished is not done again, a step that fails is reported at the end, and the others go on. Every step's
output is in its .log.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import DefaultsThatSay, interruptible
from errors import printable
from files import write_text
from weird_gen.persona.folders import RESULTS
from weird_gen.persona.reproduction import SHIPPED, results, run_steps
from weird_gen.persona.study import DEFAULT_MODEL


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=DefaultsThatSay
    )
    flags.add_argument("--out", type=Path, default=RESULTS / "study", help="folder for everything")
    flags.add_argument("--model", default=DEFAULT_MODEL, help="pair name, folder or hub id")
    flags.add_argument(
        "--setting",
        action="append",
        metavar="'NAME: FLAGS'",
        help="a training setting; may be repeated (default: the shipped adapter's)",
    )
    flags.add_argument(
        "--train-flags", type=shlex.split, default=[], help="for train_lora.py in every setting"
    )
    flags.add_argument("--eval-flags", type=shlex.split, default=[], help="for both evaluations")
    flags.add_argument("--distill-flags", type=shlex.split, default=[], help="for distill.py")
    flags.add_argument("--jobs", type=int, default=1, help="settings at a time on the same device")
    flags.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    flags.add_argument("--batch-size", type=int, help="texts generated at a time; default by device")
    return flags.parse_args(argv)


@interruptible("interrupted; steps that are finished are kept, run again to go on")
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    settings = {}
    for text in args.setting or [SHIPPED if args.model == DEFAULT_MODEL else "default:"]:
        name, _, flags = text.partition(":")
        settings[name.strip()] = shlex.split(flags)
        if (
            not name.strip().replace("-", "").replace("_", "").replace(".", "").isalnum()
            or name.strip() == "baseline"
        ):
            print(f"error: --setting {text!r}: NAME must be letters, digits, - and _", file=sys.stderr)
            return 1
    args.out = args.out.resolve()
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
