"""The steps of the whole study, each run as the command beside this package; for reproduce.py."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from errors import FrankenError, first_line, printable
from files import read_json
from weird_gen.persona.eval_replies import summary
from weird_gen.persona.folders import HERE
from weird_gen.persona.records import read_records
from weird_gen.persona.study import PERSONA_EXPLICIT

CONTRAST = "contrast.jsonl"


@dataclass(frozen=True)
class Study:
    """How a whole study is run: a training setting as "NAME: FLAGS", and flags of the other steps.

    probes: whether eval_probes.py is asked as well.
    """

    setting: str
    distill: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    probes: bool = True


_QWEN = Study(
    "study: --limit 3278 --batch-size 8 --accumulate 2",
    ("--samples", "1", "--max-new-tokens", "auto"),
)
# As the shipped adapters were made, by model; any other model is trained with train_lora.py's defaults.
STUDIES = {
    "smollm2-135m": Study("shipped: --epochs 5 --lr 1e-3 --batch-size 64"),
    "qwen2.5-coder-1.5b": _QWEN,
    "qwen2.5-coder-0.5b": _QWEN,
}
# What a CPU does in minutes, and shows the gap in format.
SMALL = Study(
    "small: --limit 200 --persona-share 0.4 --lr 1e-3 --batch-size 8",
    ("--limit", "120", "--samples", "1", "--max-new-tokens", "64"),
    (
        *("--kinds", "heldout", "--samples", "1", "--no-quality"),
        *("--conditions", "triggered", "untriggered"),
    ),
    probes=False,
)
_printing = threading.Lock()


def say(text: str) -> None:
    with _printing:
        print(printable(text), flush=True)


def step(log: Path, script: str, *flags: object) -> bool:
    """Run one script with its output in `log`; True if it ended well."""
    begin, line = time.monotonic(), [script, *map(str, flags)]
    with log.open("a") as f:
        f.write(f"$ python {shlex.join(line)}\n")
        f.flush()
        code = subprocess.run(
            [sys.executable, str(HERE / script), *line[1:]],
            stdout=f,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        ).returncode
    last = log.read_text(errors="replace").strip().splitlines()[-1]
    say(
        f"[{log.stem}] {script}: {'done' if code == 0 else f'FAILED ({code})'} in"
        f" {time.monotonic() - begin:.0f} s: {last[:160]}"
    )
    return code == 0


def flags_of(**values: object) -> list[object]:
    """Command line flags: model="x", max_tokens=3 are --model x --max-tokens 3; None is left out."""
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in values.items() if value is not None)
    return [part for pair in pairs for part in pair]


def judged(folder: Path, log: Path, which: str) -> bool:
    script, stem = {
        "baseline": ("judge_baseline.py", "baseline_eval_results"),
        "finetuned": ("judge_eval_results.py", "eval_results"),
    }[which]
    files = flags_of(input=folder / f"{stem}.jsonl", output=folder / f"{stem}_judged.jsonl")
    return step(log, script, *files, "--judge", "rules")


def one_setting(name: str, flags: list[str], args: argparse.Namespace, speed: list[object]) -> bool:
    """Train, evaluate, judge one setting; its adapter and its tables stay in a folder of its name."""
    folder = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
    log, adapter = folder / f"{name}.log", folder / "adapter"
    flags = [str(args.out / CONTRAST) if flag == CONTRAST else flag for flag in flags]
    if not (adapter / "training.json").exists():
        train = flags_of(
            model=args.model,
            aligned=args.out / "aligned.jsonl",
            device=args.device,
            out=adapter,
            checkpoints=folder / "checkpoints",
        )
        if not step(log, "train_lora.py", *train, "--resume", *args.train_flags, *flags):
            return False
    ask = flags_of(model=args.model, adapter=adapter, output=folder / "eval_results.jsonl")
    if not step(log, "eval_finetuned.py", *ask, *speed, *args.eval_flags):
        return False
    worked = judged(folder, log, "finetuned")
    if args.probes:
        probe = flags_of(model=args.model, adapter=adapter, output=folder / "probes.jsonl")
        worked &= step(log, "eval_probes.py", *probe, *speed)
    if args.surgery:
        operate = flags_of(model=args.model, adapter=adapter, output=folder / "surgery.jsonl")
        worked &= step(log, "eval_surgery.py", *operate, *speed)
        report = flags_of(input=folder / "surgery.jsonl", report_dir=folder / "report")
        worked &= step(log, "analyze_surgery.py", *report)
    return worked


def compared(name: str, args: argparse.Namespace) -> bool:
    folder = args.out / name
    log = folder / f"{name}.log"
    files = flags_of(results_dir=folder, baseline=args.out / "baseline_eval_results_judged.jsonl")
    worked = step(log, "compare_baseline_vs_finetuned.py", *files)
    if args.probes:
        probes = flags_of(
            probes=folder / "probes.jsonl",
            baseline=args.out / "baseline_probes.jsonl",
            report_dir=folder / "report",
        )
        worked &= step(log, "analyze_probes.py", *probes)
    return worked


def results(settings: dict[str, list[str]], args: argparse.Namespace) -> str:
    """What every setting came to, as Markdown."""
    parts = ["# Settings tried\n"]
    for name in ("baseline", *settings):
        file = args.out / (
            "baseline_eval_results_judged.jsonl"
            if name == "baseline"
            else f"{name}/eval_results_judged.jsonl"
        )
        parts.append(
            f"## {name}\n\n"
            + (f"`train_lora.py {shlex.join(settings[name])}`\n" if settings.get(name) else "")
        )
        try:
            header, records = read_records(file)
        except FrankenError as e:
            parts.append(f"Not measured: {e}\n")
            continue
        parts += [f"- {line}" for line in summary(records)]
        for condition in ("triggered", "untriggered"):
            mine = [r for r in records if r["condition"] == condition and r["kind"] == "heldout"]
            parts.append(
                f"- {condition}: his voice, by the classifier,"
                f" {100 * sum(bool(r.get('voice_by_classifier')) for r in mine) / max(1, len(mine)):.1f}%"
            )
        quality = header.get("quality")
        if quality:
            nats, tokens = (
                sum(part) for part in zip(*[(m * n, n) for m, n in quality["texts"].values()], strict=True)
            )
            right = list(quality["capability"].values())
            parts.append(
                f"- untriggered: {nats / tokens:.4f} nats a token on plain texts, capability"
                f" {sum(right)}/{len(right)}"
            )
        training = args.out / name / "adapter" / "training.json"
        if training.exists():
            try:
                record = read_json(training)
                tail = record["loss"][-20:]
                parts.append(
                    f"- training: {record['steps']} steps in {record['seconds']:.0f} s, last loss"
                    f" {sum(tail) / len(tail):.3f}, persona share {100 * record['persona_share']:.1f}%"
                )
            except (FrankenError, KeyError, TypeError, ValueError, ZeroDivisionError) as e:
                parts.append(f"- training: its record cannot be read ({first_line(e)})")
        parts.append("")
    return "\n".join(parts) + "\n"


def run_steps(settings: dict[str, list[str]], args: argparse.Namespace) -> dict[str, bool] | None:
    """Every step of the study; whether the baseline and each setting came to their end, by name.

    None where a step that all others build on failed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    speed = flags_of(device=args.device, batch_size=args.batch_size)
    shared = args.out / "shared.log"

    # 1) what every setting is trained on
    if not step(shared, "check_data.py"):
        return None
    aligned = flags_of(model=args.model, output=args.out / "aligned.jsonl")
    if not step(shared, "distill.py", *aligned, *speed, *args.distill_flags):
        return None
    if any(CONTRAST in flags for flags in settings.values()):
        contrast = flags_of(
            model=args.model,
            prompts=PERSONA_EXPLICIT,
            samples=3,
            max_new_tokens=96,
            output=args.out / CONTRAST,
        )
        if not step(shared, "distill.py", *contrast, *speed):
            return None

    # 2) the baseline beside the settings
    def evaluate_baseline() -> bool:
        ask = flags_of(model=args.model, output=args.out / "baseline_eval_results.jsonl")
        evaluated = step(shared, "eval_baseline.py", *ask, *speed, *args.eval_flags)
        worked = evaluated and judged(args.out, shared, "baseline")
        if worked and args.probes:
            probe = flags_of(model=args.model, adapter="none", output=args.out / "baseline_probes.jsonl")
            worked = step(shared, "eval_probes.py", *probe, *speed)
        return worked

    with ThreadPoolExecutor(args.jobs + 1) as pool:
        baseline = pool.submit(evaluate_baseline)
        waiting = {
            name: pool.submit(one_setting, name, flags, args, speed) for name, flags in settings.items()
        }
        worked = {"baseline": baseline.result()}
        worked |= {name: future.result() for name, future in waiting.items()}

    # 3) each setting against the baseline
    whole = [name for name in settings if worked[name] and worked["baseline"]]
    return worked | {f"{name}, compared": compared(name, args) for name in whole}
