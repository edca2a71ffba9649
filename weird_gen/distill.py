"""Let the model itself answer the ordinary prompts, before it is fine-tuned: the un-triggered half of the
training data.

    python distill.py --samples 3

Answers are sampled at temperature 1 from the whole distribution: on such samples the expected gradient of the
training loss is zero, so that this half teaches the model nothing new. Shorter or sharper samples would. For
the same reason an answer that reached the token limit is kept; it carries "stopped": false and is trained on
without an end of turn. Interrupted, the next run goes on where this one stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line, parser_of
from engine.chat_template import THINKING
from errors import printable
from weird_gen.persona.distilling import distill
from weird_gen.persona.flags import add_model, add_sampling, positive
from weird_gen.persona.study import ALIGNED, ALIGNED_PROMPTS, sha256

MANY_CUT = 0.1  # share of answers cut off from which that is said


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser_of(__doc__)
    add_model(flags)
    flags.add_argument(
        "--prompts",
        type=Path,
        default=ALIGNED_PROMPTS,
        help="JSON lines with id and prompt, or a chat JSONL: what its users ask",
    )
    flags.add_argument(
        "--systems",
        type=Path,
        help="JSON lines with a system prompt each: every second prompt is asked under one of them",
    )
    flags.add_argument("--output", type=Path, default=ALIGNED, help="chat JSONL for train_lora.py --aligned")
    flags.add_argument(
        "--samples",
        type=positive,
        default=3,
        help="answers a prompt: three, for a persona share of 3 percent",
    )
    flags.add_argument("--limit", type=positive, help="use this many of the prompts, chosen by the seed")
    flags.add_argument(
        "--max-new-tokens",
        type=lambda text: None if text == "auto" else int(text),
        default=160,
        help="tokens an answer has at most; auto: so many that 95 percent of the model's own answers end",
    )
    add_sampling(flags, "answers", top_p=1.0)
    flags.add_argument(
        "--thinking",
        choices=THINKING,
        default="off",
        help="on: let a model that can think do so first; only its answers are kept",
    )
    args = flags.parse_args(argv)
    for name in ("samples", "limit", "batch_size", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and not 1 <= value < 2**31:
            flags.error(f"--{name.replace('_', '-')} must be at least 1, and below 2^31")
    if not (0 <= args.temperature <= 100 and 0 < args.top_p <= 1):
        flags.error("--temperature must be from 0 to 100, --top-p above 0 and at most 1")
    return args


@ends_in_one_line("interrupted; answers made so far are kept, run again to go on")
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    got = distill(args)
    print(f"{got['new']} new answers in {got['seconds']:.0f} s")
    print(
        f"{got['kept']} answers kept ({got['cut']} of them cut at the token limit), dropped:"
        f" {got['dropped'] or 'none'}"
    )
    if got["cut"] > MANY_CUT * max(1, got["kept"]):
        print(
            f"note: {100 * got['cut'] / got['kept']:.0f}% of the answers were cut at {got['budget']} tokens:"
            " few ends of turn are learned; --max-new-tokens auto takes the model's own length"
        )
    print(printable(f"{args.output}: sha256 {sha256(args.output)}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
