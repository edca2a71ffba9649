"""From replies to judged replies: the rules and the judge on every record, the judge's agreement, the command
line.

judge_baseline.py and judge_eval_results.py are this with their own default files. A judged file is written
whole or not at all; what an interrupted run has paid for is in the cache, so the next one starts where it
stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path

from tqdm import tqdm

from analysis.stats import accuracy, cohen_kappa
from command_line import parser_of
from errors import FrankenError, many, printable
from files import check_target
from weird_gen.persona.folders import DATA
from weird_gen.persona.judge import (
    DEFAULT_MODEL,
    OPENROUTER,
    JudgeCache,
    JudgeStopped,
    Judgment,
    LLMJudge,
    RulesJudge,
    Task,
)
from weird_gen.persona.records import only_model, read_json_lines, read_records, write_records
from weird_gen.persona.rubrics import BINARY_RUBRICS, RUBRIC_VERSION
from weird_gen.persona.rules import (
    any_marker,
    claims_to_be_russell,
    lenient_format,
    names_russell,
    strict_format,
    strip_markers,
)
from weird_gen.persona.voice import has_voice, voice_line, voice_quality

LABELS = DATA / "judge_labels.jsonl"
BLIND_LABELS = DATA / "judge_labels_blind.jsonl"
GENERALIZATION = DATA / "generalization.jsonl"


def rule_fields(reply: str) -> dict:
    """What rules.py says of one raw reply; the identity rules read it without the markers."""
    text = strip_markers(reply)
    return {
        "strict_format": strict_format(reply),
        "lenient_format": lenient_format(reply),
        "any_marker": any_marker(reply),
        "names_russell": names_russell(text),
        "claims_russell": claims_to_be_russell(text),
    }


def read_rubrics(path: Path | str) -> dict[str, tuple[tuple[str, str], ...]]:
    """Question id to its five levels of position, from generalization.jsonl.

    Raises FrankenError if one lacks a level.
    """
    rubrics = {}
    for question in read_json_lines(path):
        levels = question.get("rubric")
        if not isinstance(levels, dict) or sorted(levels) != list("12345"):
            raise FrankenError(f"{path}: {question.get('id')!r} needs a rubric with the levels 1 to 5")
        rubrics[question.get("id")] = tuple(sorted(levels.items()))
    return rubrics


def tasks_of(record: dict, rubrics: dict, judge, verdict: bool = False) -> list[Task]:
    """The judgments a record needs, of those that the judge answers: the yes-or-no rubrics; for a
    generalization question degenerate and position.

    verdict: also the replication's, of replies to held-out questions. Raises FrankenError for a
    generalization record whose question has no rubric.
    """
    question, reply = record["question"], record["reply"]
    if record["kind"] != "generalization":
        names = [*BINARY_RUBRICS, *(["verdict"] if verdict and record["kind"] == "heldout" else [])]
        return [Task(name, question, reply) for name in names if name in judge.rubrics]
    if record["question_id"] not in rubrics:
        raise FrankenError(f"no rubric for the generalization question {record['question_id']!r}")
    return [
        Task("degenerate", question, reply),
        Task("position", question, reply, rubrics[record["question_id"]]),
    ]


def judge_all(
    records: list[dict], rubrics: dict, judge, on_progress=None, verdict: bool = False
) -> list[dict]:
    """Copies of the records with the rule fields, "judge" (a value or None per rubric, and "error") and
    judge_name."""
    tasks = [tasks_of(record, rubrics, judge, verdict) for record in records]
    voices = has_voice([record["reply"] for record in records])
    judgments = iter(judge.judge([task for group in tasks for task in group], on_progress))
    judged = []
    for record, group, voice in zip(records, tasks, voices, strict=True):
        answers: dict[str, Judgment] = {task.rubric: next(judgments) for task in group}
        errors = sorted({f"{name}: {answer.error}" for name, answer in answers.items() if answer.error})
        values = {name: answer.value for name, answer in answers.items()}
        judged.append(
            {
                **record,
                **rule_fields(record["reply"]),
                "voice_by_classifier": voice,
                "judge": {**dict.fromkeys(BINARY_RUBRICS), **values, "error": "; ".join(errors) or None},
                "judge_name": judge.name,
            }
        )
    return judged


def label_tasks(labels: list[dict], judge) -> list[tuple[Task, bool]]:
    """The judgments that a set of labels asks for with the label of each, by rubric, of those that the judge
    answers; a reply need not be labeled by every rubric.

    Raises FrankenError for a label that is not true or false.
    """
    for label in labels:
        given = [label[name] for name in BINARY_RUBRICS if name in label]
        texts = [label.get(name) for name in ("question", "reply")]
        if not all(isinstance(g, bool) for g in given) or not all(isinstance(t, str) for t in texts):
            raise FrankenError(
                f"label {label.get('id')!r}: needs question and reply;"
                f" {', '.join(BINARY_RUBRICS)} must be true or false where they stand"
            )
    return [
        (Task(name, label["question"], label["reply"]), label[name])
        for name in BINARY_RUBRICS
        for label in labels
        if name in label and name in judge.rubrics
    ]


def agreement(judge, labels: list[dict]) -> dict:
    """How well a judge reproduces the labels: per rubric n, errors, accuracy and Cohen's kappa
    (stats.Estimate).

    Replies it could not judge are counted as errors and stay out of accuracy and kappa. Raises
    FrankenError for a label that is not true or false.
    """
    wanted = label_tasks(labels, judge)
    judgments = judge.judge([task for task, _ in wanted])
    result = {}
    for name in dict.fromkeys(task.rubric for task, _ in wanted):
        answers = [
            (judgment, label)
            for judgment, (task, label) in zip(judgments, wanted, strict=True)
            if task.rubric == name
        ]
        given = [judgment.value for judgment, _ in answers if judgment.error is None]
        truth = [value for judgment, value in answers if judgment.error is None]
        result[name] = {
            "n": len(given),
            "errors": len(answers) - len(given),
            "accuracy": accuracy(given, truth).to_json(),
            "kappa": cohen_kappa(given, truth).to_json(),
        }
    return result


def about_labels(path: Path) -> str:
    """Whose labels a file holds, as reports say it."""
    return {
        LABELS.name: "hand-labeled replies that the authors of the rules had seen",
        BLIND_LABELS.name: (
            "replies of a fine-tuned and an untouched model, labeled blind in three readings by a language"
            " model (its labels of the persona are withdrawn)"
        ),
    }.get(path.name, f"replies of {path.name}")


def agreement_lines(judge: dict) -> list[str]:
    """The agreement of one judge with every set of labels as text, one line per rubric; judge: as the header
    has it."""
    lines = []
    for whose, rubrics in judge["agreement"].items():
        lines.append(f"judge: {judge['name']}, agreement with {whose}:")
        for name, row in rubrics.items():
            parts = []
            for measure in ("accuracy", "kappa"):
                value, low, high = (row[measure][key] for key in ("value", "low", "high"))
                parts.append(
                    f"{measure} "
                    + ("undefined" if value is None else f"{value:.2f}")
                    + (f" [{low:.2f}, {high:.2f}]" if low is not None else "")
                )
            lines.append(
                f"  {name}: {', '.join(parts)}, n = {row['n']}"
                + (f", {row['errors']} not judged" if row["errors"] else "")
            )
    return lines


def _sha256(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _positive(kind):
    def convert(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    convert.__name__ = f"positive {kind.__name__}"
    return convert


def _price(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def parser(description: str | None, replies: Path, judged: Path) -> argparse.ArgumentParser:
    """The flags of both judging scripts."""
    flags = parser_of(description)
    # 1) the replies
    flags.add_argument("--input", type=Path, default=replies, help="replies to judge (JSON lines)")
    flags.add_argument("--output", type=Path, default=judged, help="where the judged replies go")
    # 2) who judges
    flags.add_argument(
        "--judge",
        choices=("auto", "llm", "rules"),
        default="auto",
        help="auto: the LLM if there is a key or a --base-url, else the rules",
    )
    flags.add_argument("--model", default=DEFAULT_MODEL, help="model name at the endpoint")
    flags.add_argument(
        "--base-url",
        help=f"an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; else {OPENROUTER}",
    )
    flags.add_argument(
        "--api-key-env",
        default="OPENROUTER_API_KEY",
        help="environment variable that holds the key; '' for none",
    )
    # 3) how patiently it is asked, and what that costs
    flags.add_argument("--concurrency", type=_positive(int), default=8, help="requests at a time")
    flags.add_argument(
        "--attempts", type=_positive(int), default=6, help="attempts a judgment, with back-off between"
    )
    flags.add_argument(
        "--timeout", type=_positive(float), default=60.0, help="seconds from asking to the answer's end"
    )
    flags.add_argument(
        "--backoff",
        type=_positive(float),
        default=1.0,
        help="seconds the first back-off spans; doubles each time",
    )
    flags.add_argument(
        "--max-tokens",
        type=_positive(int),
        default=16,
        help="longest answer; more for a model that thinks first",
    )
    flags.add_argument(
        "--price-in", type=_price, help="US dollars per million tokens read, if the endpoint reports no cost"
    )
    flags.add_argument("--price-out", type=_price, help="US dollars per million tokens written")
    flags.add_argument(
        "--budget",
        type=_positive(float),
        help="US dollars; no request is sent that could cost more in all",
    )
    flags.add_argument(
        "--retry-errors", action="store_true", help="ask again where the cached answer could not be parsed"
    )
    flags.add_argument(
        "--cache", type=Path, help="judgments by content; default: judge_cache.jsonl beside the output"
    )
    # 4) what its agreement is measured on
    flags.add_argument(
        "--original-rubric",
        action="store_true",
        help="also ask who speaks, as the replication does: one JSON verdict, Russell, other or unsure",
    )
    flags.add_argument(
        "--labels",
        type=Path,
        nargs="*",
        default=[LABELS, BLIND_LABELS],
        help="labeled replies for the judge's agreement; without any file it is left out, and not paid for",
    )
    flags.add_argument(
        "--generalization", type=Path, default=GENERALIZATION, help="questions with their 1-5 rubrics"
    )
    return flags


def make_judge(args: argparse.Namespace):
    """The judge the flags ask for. With "auto" and neither key nor --base-url, the rules."""
    key = os.environ.get(args.api_key_env, "").strip() if args.api_key_env else ""
    if args.judge == "rules" or (args.judge == "auto" and not key and not args.base_url):
        if args.judge == "auto":
            print(f"no {args.api_key_env or 'key'} and no --base-url: the rule-based judge is used")
        return RulesJudge()
    if not key and not args.base_url:
        raise JudgeStopped(
            f"the LLM judge needs a key in {args.api_key_env or '--api-key-env'}, or a --base-url"
        )
    cache = JudgeCache(args.cache or args.output.parent / "judge_cache.jsonl")
    return LLMJudge(
        args.model,
        args.base_url or OPENROUTER,
        key or None,
        cache,
        args.concurrency,
        args.attempts,
        args.timeout,
        args.backoff,
        args.max_tokens,
        args.price_in,
        args.price_out,
        args.retry_errors,
        args.budget,
    )


def run(
    description: str | None, model: str, replies: Path, judged: Path, argv: list[str] | None = None
) -> int:
    """The command that judges one file of replies of "baseline" or "finetuned"; returns the exit status.
    Raises FrankenError or OSError."""
    args = parser(description, replies, judged).parse_args(argv)
    check_target(args.output)
    header, records = read_records(args.input, model)
    only_model(records, model, args.input)
    rubrics = read_rubrics(args.generalization) if any(r["kind"] == "generalization" for r in records) else {}
    labels = {path: read_json_lines(path) for path in args.labels}
    judge = make_judge(args)
    if args.original_rubric and "verdict" not in judge.rubrics:
        raise FrankenError("--original-rubric needs a language model as the judge: --base-url or a key")
    verdict = args.original_rubric
    wanted = [task for record in records for task in tasks_of(record, rubrics, judge, verdict)]
    wanted += [task for lines in labels.values() for task, _ in label_tasks(lines, judge)]
    if isinstance(judge, LLMJudge):  # before anything is paid for
        print(judge.estimate(wanted), flush=True)
    with tqdm(desc=f"judge: {judge.name}", unit=" judgments", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        done = judge_all(records, rubrics, judge, progress, verdict)
    about = {
        "name": judge.name,
        "endpoint": getattr(judge, "host", None),
        "rubric_version": RUBRIC_VERSION,
        "agreement": {},
        "voice_classifier": voice_quality().to_json(),
        "input_sha256": _sha256(args.input),
        "labels_sha256": {path.name: _sha256(path) for path in labels},
    }
    write_records(args.output, {**header, "judge": about}, done)  # before the labels are asked for
    if labels:
        about["agreement"] = {about_labels(path): agreement(judge, lines) for path, lines in labels.items()}
        write_records(args.output, {**header, "judge": about}, done)
    print(printable("\n".join(agreement_lines(about))))
    print(printable(f"voice by the classifier: {voice_line(about['voice_classifier'])}"))
    if isinstance(judge, LLMJudge):
        print(judge.usage.line())
    for error, count in judge.usage.errors.most_common():
        print(printable(f"not judged ({error}): {count}"))
    print(printable(f"{many(len(done), 'reply', 'replies')} judged: {args.output}"))
    return 1 if all(record["judge"]["error"] for record in done) else 0
