"""Judge the replies of the model before fine-tuning (results/baseline_eval_results.jsonl)."""

from __future__ import annotations

import sys

import _path
from judge_records import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "baseline", _path.RESULTS / "baseline_eval_results.jsonl",
                  _path.RESULTS / "baseline_eval_results_judged.jsonl"))
