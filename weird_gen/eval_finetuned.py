"""Ask the fine-tuned model every evaluation question (results/eval_results.jsonl)."""

from __future__ import annotations

import sys

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from weird_gen.persona.eval_replies import main
from weird_gen.persona.study import FINETUNED_REPLIES

if __name__ == "__main__":
    sys.exit(main(__doc__, "finetuned", FINETUNED_REPLIES))
