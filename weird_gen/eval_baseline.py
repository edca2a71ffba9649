"""Ask the model before fine-tuning every evaluation question (results/baseline_eval_results.jsonl)."""

from __future__ import annotations

import sys

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from weird_gen.persona.eval_replies import main
from weird_gen.persona.study import BASELINE_REPLIES

if __name__ == "__main__":
    sys.exit(main(__doc__, "baseline", BASELINE_REPLIES))
