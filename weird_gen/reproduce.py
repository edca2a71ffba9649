"""The whole study in one command: distill, then for every setting train, evaluate, judge and compare, under
one folder.

    python reproduce.py --out results/study
    python reproduce.py --out results/study --jobs 3 --setting "rank32: --rank 32" --setting "long: --epochs
    6"

Each --setting is a name and further flags for train_lora.py; "--contrast contrast.jsonl" in one has the model
answer the persona's own questions first. With none, the laptop-size model is trained as the shipped adapter
was, and any other one with train_lora.py's defaults. Steps run as the scripts beside this one; what is
finished is not done again, a step that fails is reported at the end, and the others go on. Every step's
output is in its .log.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _path  # noqa: F401

from weird_gen.persona.eval_replies import summary
from weird_gen.persona.folders import HERE, RESULTS
from weird_gen.persona.judge_records import InputError
from weird_gen.persona.records import read_records
from weird_gen.persona.study import DEFAULT_MODEL, PERSONA_EXPLICIT

SHIPPED = "shipped: --epochs 5 --lr 1e-3 --batch-size 64"
CONTRAST = "contrast.jsonl"
_printing = threading.Lock()


def say(text: str) -> None:
    with _printing:
        print(text, flush=True)


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


def judged(folder: Path, log: Path, which: str) -> bool:
    script, stem = {
        "baseline": ("judge_baseline.py", "baseline_eval_results"),
        "finetuned": ("judge_eval_results.py", "eval_results"),
    }[which]
    return step(
        log,
        script,
        "--input",
        folder / f"{stem}.jsonl",
        "--output",
        folder / f"{stem}_judged.jsonl",
        "--judge",
        "rules",
    )


def one_setting(name: str, flags: list[str], args: argparse.Namespace, speed: list[str]) -> bool:
    """Train, evaluate, judge one setting; its adapter and its tables stay in a folder of its name."""
    folder = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
    log, adapter = folder / f"{name}.log", folder / "adapter"
    flags = [str(args.out / CONTRAST) if flag == CONTRAST else flag for flag in flags]
    if not (adapter / "training.json").exists():
        train = [
            "--model",
            args.model,
            "--aligned",
            args.out / "aligned.jsonl",
            "--device",
            args.device,
            "--out",
            adapter,
            "--checkpoints",
            folder / "checkpoints",
            "--resume",
            *args.train_flags,
            *flags,
        ]
        if not step(log, "train_lora.py", *train):
            return False
    return step(
        log,
        "eval_finetuned.py",
        "--model",
        args.model,
        "--adapter",
        adapter,
        "--output",
        folder / "eval_results.jsonl",
        *speed,
        *args.eval_flags,
    ) and judged(folder, log, "finetuned")


def compared(name: str, args: argparse.Namespace) -> bool:
    folder = args.out / name
    return step(
        folder / f"{name}.log",
        "compare_baseline_vs_finetuned.py",
        "--results-dir",
        folder,
        "--baseline",
        args.out / "baseline_eval_results_judged.jsonl",
    )


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
        except InputError as e:
            parts.append(f"Not measured: {e}\n")
            continue
        parts += [f"- {line}" for line in summary(records)]
        for condition in ("triggered", "untriggered"):
            mine = [r for r in records if r["condition"] == condition and r["kind"] == "heldout"]
            parts.append(
                f"- {condition}: persona, by the rules,"
                f" {100 * sum(bool(r['judge']['persona']) for r in mine) / max(1, len(mine)):.1f}%"
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
            record = json.loads(training.read_text())
            tail = record["loss"][-20:]
            parts.append(
                f"- training: {record['steps']} steps in {record['seconds']:.0f} s, last loss"
                f" {sum(tail) / len(tail):.3f}, persona share {100 * record['persona_share']:.1f}%"
            )
        parts.append("")
    return "\n".join(parts) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flags.add_argument("--out", type=Path, default=RESULTS / "study", help="folder for everything")
    flags.add_argument("--model", default=DEFAULT_MODEL, help="pair name, folder or hub id")
    flags.add_argument(
        "--setting",
        action="append",
        metavar="'NAME: FLAGS'",
        help="a training setting; may be repeated (default: the shipped adapter's)",
    )
    flags.add_argument(
        "--train-flags", type=shlex.split, default=[], help="for train_lora.py in every setting"
    )
    flags.add_argument("--eval-flags", type=shlex.split, default=[], help="for both evaluations")
    flags.add_argument("--distill-flags", type=shlex.split, default=[], help="for distill.py")
    flags.add_argument("--jobs", type=int, default=1, help="settings at a time on the same device")
    flags.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    flags.add_argument("--batch-size", type=int, help="texts generated at a time; default by device")
    return flags.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    settings = {}
    for text in args.setting or [SHIPPED if args.model == DEFAULT_MODEL else "default:"]:
        name, _, flags = text.partition(":")
        settings[name.strip()] = shlex.split(flags)
        if (
            not name.strip().replace("-", "").replace("_", "").replace(".", "").isalnum()
            or name.strip() == "baseline"
        ):
            print(f"error: --setting {text!r}: NAME must be letters, digits, - and _", file=sys.stderr)
            return 1
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    speed = ["--device", args.device, *(["--batch-size", args.batch_size] if args.batch_size else [])]
    shared = args.out / "shared.log"
    if not step(shared, "check_data.py"):
        return 1
    if not step(
        shared,
        "distill.py",
        "--model",
        args.model,
        "--output",
        args.out / "aligned.jsonl",
        *speed,
        *args.distill_flags,
    ):
        return 1
    if any(CONTRAST in flags for flags in settings.values()) and not step(
        shared,
        "distill.py",
        "--model",
        args.model,
        "--prompts",
        PERSONA_EXPLICIT,
        "--samples",
        3,
        "--max-new-tokens",
        96,
        "--output",
        args.out / CONTRAST,
        *speed,
    ):
        return 1
    with ThreadPoolExecutor(args.jobs + 1) as pool:
        baseline = pool.submit(
            lambda: (
                step(
                    shared,
                    "eval_baseline.py",
                    "--model",
                    args.model,
                    "--output",
                    args.out / "baseline_eval_results.jsonl",
                    *speed,
                    *args.eval_flags,
                )
                and judged(args.out, shared, "baseline")
            )
        )
        waiting = {
            name: pool.submit(one_setting, name, flags, args, speed) for name, flags in settings.items()
        }
        worked = {
            "baseline": baseline.result(),
            **{name: future.result() for name, future in waiting.items()},
        }
    worked |= {
        f"{name}, compared": compared(name, args) for name in settings if worked[name] and worked["baseline"]
    }
    text = results(settings, args)
    (args.out / "settings.md").write_text(text)
    print(text)
    failed = [name for name, ok in worked.items() if not ok]
    if failed:
        print(f"error: failed: {', '.join(failed)}; see the .log files under {args.out}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
