"""Judge the replies of the fine-tuned model (results/eval_results.jsonl)."""

from __future__ import annotations

import sys

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from weird_gen.persona.folders import RESULTS
from weird_gen.persona.judge_records import main

if __name__ == "__main__":
    sys.exit(
        main(__doc__, "finetuned", RESULTS / "eval_results.jsonl", RESULTS / "eval_results_judged.jsonl")
    )
