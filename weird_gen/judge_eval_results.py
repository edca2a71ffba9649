"""Judge the replies of the fine-tuned model (results/eval_results.jsonl)."""

from __future__ import annotations

import sys

import _path
from judge_records import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "finetuned", _path.RESULTS / "eval_results.jsonl",
                  _path.RESULTS / "eval_results_judged.jsonl"))
