"""Judge the replies of the model before fine-tuning (results/baseline_eval_results.jsonl)."""

from __future__ import annotations

import sys

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line
from weird_gen.persona import judge_records
from weird_gen.persona.folders import RESULTS


@ends_in_one_line("interrupted; judgments made so far are kept, run again to go on")
def main(argv: list[str] | None = None) -> int:
    replies, judged = RESULTS / "baseline_eval_results.jsonl", RESULTS / "baseline_eval_results_judged.jsonl"
    return judge_records.run(__doc__, "baseline", replies, judged, argv)


if __name__ == "__main__":
    sys.exit(main())
