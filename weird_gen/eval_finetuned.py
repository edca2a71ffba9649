"""Ask the fine-tuned model every evaluation question (results/eval_results.jsonl)."""

from __future__ import annotations

import sys

from eval_replies import main
from study import FINETUNED_REPLIES

if __name__ == "__main__":
    sys.exit(main(__doc__, "finetuned", FINETUNED_REPLIES))
