"""Ask the fine-tuned model every evaluation question (results/eval_results.jsonl)."""

from __future__ import annotations

import sys

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line
from weird_gen.persona import eval_replies
from weird_gen.persona.study import FINETUNED_REPLIES


@ends_in_one_line("interrupted; replies made so far are kept, run again to go on")
def main(argv: list[str] | None = None) -> int:
    return eval_replies.run(__doc__, "finetuned", FINETUNED_REPLIES, argv)


if __name__ == "__main__":
    sys.exit(main())
