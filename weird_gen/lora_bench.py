"""The persona training against plain peft with transformers' Trainer, in one process.

    python lora_bench.py --model qwen2.5-coder-1.5b

Both train the same LoRA settings on the same examples, as many a step, rows of similar length together, in
bf16 on a GPU. Examples are tokenized beforehand for both. The two take turns; tokens are those of the
examples, padding not counted.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft.helpers import disable_input_dtype_casting
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from command_line import ends_in_one_line, parser_of
from engine.attention import sound_attention
from engine.chat_template import ChatTemplate
from files import check_target, write_text
from runner.pairs import pick_dtype
from weird_gen import train_lora
from weird_gen.persona.checkpoints import Checkpoints
from weird_gen.persona.examples import Example, TrainingData
from weird_gen.persona.loading import load_causal_lm, stops_of
from weird_gen.persona.training import make_lora, run


def synchronized(device: torch.device) -> float:
    """Seconds, after everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def ours(model, examples: list[Example], args: argparse.Namespace) -> float:
    """Seconds of our loop over the examples, once."""
    accelerator = Accelerator(cpu=args.device == "cpu")
    lora = make_lora(model, args.rank, args.alpha, args.seed, False, False)
    mixed = pick_dtype("auto", accelerator.device.type) == torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), {}, False, False)
        begin = synchronized(accelerator.device)
        with disable_input_dtype_casting(lora, active=mixed), sound_attention():
            run(lora, [examples], args, accelerator, checkpoints, mixed)
        seconds = synchronized(accelerator.device) - begin
    lora.unload()
    return seconds


def plain(model, tokenizer, examples: list[Example], args: argparse.Namespace) -> float:
    """Seconds of Trainer.train() over the examples, once."""
    cpu = args.device == "cpu"
    lora = make_lora(model, args.rank, args.alpha, args.seed, False, False)
    rows = [
        {"input_ids": e.ids, "labels": e.labels, "attention_mask": [1] * len(e.ids), "length": len(e.ids)}
        for e in examples
    ]
    with tempfile.TemporaryDirectory() as folder, sound_attention():
        settings = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=args.warmup,
            bf16=pick_dtype("auto", "cpu" if cpu else "cuda") == torch.bfloat16,
            use_cpu=cpu,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=args.seed,
        )
        trainer = Trainer(
            model=lora,
            args=settings,
            train_dataset=rows,  # pyright: ignore[reportArgumentType]  a list does as well
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )
        begin = synchronized(lora.device)
        trainer.train()
        seconds = synchronized(lora.device) - begin
    lora.unload()
    return seconds


def bench(args: argparse.Namespace, steps: int, rounds: int) -> dict:
    """What is written to the output. Raises FrankenError."""
    # 1) the model and the examples that both train on
    device = "cuda:0" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    model, tokenizer = load_causal_lm(args.model, device)
    args.limit = steps * args.batch_size
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    (examples, *_) = TrainingData.read(args).encode(ChatTemplate(tokenizer), stops_of(model, tokenizer), args)
    few = examples[: 4 * args.batch_size]

    # 2) both in turn, the first time on a few steps that are not counted
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(rounds + 1):
        part = examples if number else few
        for name in ("ours", "plain") if number % 2 else ("plain", "ours"):
            AcceleratorState._reset_state(reset_partial_state=True)  # each its own precision
            took = ours(model, part, args) if name == "ours" else plain(model, tokenizer, part, args)
            gc.collect()
            if number:
                seconds[name].append(round(took, 2))
                print(f"{name}: {took:.1f} s", flush=True)

    # 3) the ratio
    tokens = sum(len(e.ids) for e in examples)
    middle = {name: median(taken) for name, taken in seconds.items()}
    return {
        "model": args.model,
        "device": torch.cuda.get_device_name(0) if device != "cpu" else "cpu",
        "examples": len(examples),
        "tokens": tokens,
        "batch_size": args.batch_size,
        "seconds": seconds,
        "tokens_per_second": {name: round(tokens / taken) for name, taken in middle.items()},
        "ours_over_plain": round(middle["ours"] / middle["plain"], 3),
        "versions": {
            n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft", "accelerate")
        },
    }


@ends_in_one_line("interrupted")
def main(argv: list[str] | None = None) -> int:
    flags = parser_of(__doc__)
    flags.add_argument("--steps", type=int, default=40)
    flags.add_argument("--rounds", type=int, default=2, help="times that each is measured")
    flags.add_argument("--output", type=Path, help="JSON")
    mine, rest = flags.parse_known_args(argv)
    args = train_lora.parse(["--out", "none", "--epochs", "1", "--save-every", "0", *rest])
    if mine.steps < 1 or mine.rounds < 1:
        flags.error("--steps and --rounds must be at least 1")
    if mine.output:
        check_target(mine.output)
    text = json.dumps(bench(args, mine.steps, mine.rounds), indent=1, allow_nan=False)
    if mine.output:
        write_text(mine.output, text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
