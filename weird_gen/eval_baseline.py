"""Ask the model before fine-tuning every evaluation question (results/baseline_eval_results.jsonl)."""

from __future__ import annotations

import sys

from eval_replies import main
from study import BASELINE_REPLIES

if __name__ == "__main__":
    sys.exit(main(__doc__, "baseline", BASELINE_REPLIES))
