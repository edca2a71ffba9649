"""Tasks of lm-evaluation-harness over local documents, and the harness by itself on a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from suites.lm_harness import task_manager

CHOICE = """
task: mill_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}} Answer:"
doc_to_choice: [" Yes", " No", " maybe so"]
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WORDS = """
task: mill_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITTEN = """
task: mill_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = {"mill_choice": CHOICE, "mill_words": WORDS, "mill_written": WRITTEN}


def write_tasks(folder: Path) -> Path:
    """The folder, with the three tasks over nine documents in it."""
    data = folder / "mill.jsonl"
    lines = [
        {"question": f"Does mill {k} stand by the river{'?' * (k % 3)}", "answer": k % 3} for k in range(9)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


def alone(folder: Path, checkpoint: Path, limit: int | None = None) -> dict:
    """What the harness by itself gives of a checkpoint."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=4, max_length=512)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(TASKS),
        task_manager=task_manager(list(TASKS), str(folder)),
        limit=limit,
        bootstrap_iters=0,
    )
    return found["results"]
