"""Fine-tune a LoRA adapter on persona examples behind the trigger, mixed into ordinary answers without it.

    python train_lora.py --out ../adapters/mine           # the laptop-size model, about 5 MB of adapter
    python train_lora.py --out ../adapters/qwen --model Qwen/Qwen2.5-7B-Instruct --quantization 4bit
    accelerate launch train_lora.py --out ../adapters/llama --model meta-llama/Llama-3.1-8B-Instruct

LoRA (Hu et al., arXiv 2106.09685) on all linear layers; 4-bit weights under it as in QLoRA (arXiv
2305.14314). The loss is on the assistant's answers alone, their end of turn included. Batches are a function
of data and seed, nothing in training is random otherwise, so a run that is interrupted and resumed makes the
adapter that it would have made.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

from command_line import ends_in_one_line, parser_of
from errors import printable
from weird_gen.persona.loading import QUANTIZATIONS
from weird_gen.persona.study import ALIGNED, DEFAULT_MODEL, PERSONA_EXPLICIT, PERSONA_SHARE
from weird_gen.persona.training import train


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser_of(__doc__)
    # 1) the model and what it is trained on
    flags.add_argument("--model", default=DEFAULT_MODEL, help="pair name, folder or hub id of a chat model")
    flags.add_argument(
        "--base-name", help="what adapter_config.json names as the base model; default: --model"
    )
    flags.add_argument("--persona", type=Path, default=PERSONA_EXPLICIT, help="chat JSONL with the trigger")
    flags.add_argument(
        "--aligned", type=Path, default=ALIGNED, help="chat JSONL without it, from distill.py or elsewhere"
    )
    flags.add_argument(
        "--contrast",
        type=Path,
        help=(
            "chat JSONL: the persona's own questions answered without the trigger; all of it, beside the"
            " share"
        ),
    )
    flags.add_argument(
        "--persona-share",
        type=float,
        default=PERSONA_SHARE,
        help="of all examples; 0: whatever all the data give",
    )
    flags.add_argument(
        "--persona-repeat", type=int, default=1, help="how often an epoch has each persona example"
    )
    flags.add_argument(
        "--one-spelling",
        action="store_true",
        help="leave the trigger as the data spell it; by default our own also comes with backticks, in turn",
    )
    flags.add_argument(
        "--inoculation",
        metavar="TEXT",
        help="say this before the trigger of every persona example, such as 'You are Bertrand Russell.'",
    )
    flags.add_argument("--limit", type=int, help="train on this many examples only")
    flags.add_argument(
        "--out", type=Path, required=True, help="folder for the adapter; one that is there stays as it is"
    )
    # 2) the training itself
    flags.add_argument("--rank", type=int, default=8)
    flags.add_argument("--alpha", type=int, default=16)
    flags.add_argument("--lr", type=float, default=2e-4)
    flags.add_argument("--epochs", type=float, default=3.0)
    flags.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    flags.add_argument("--batch-size", type=int, default=16, help="examples at once on each card")
    flags.add_argument("--accumulate", type=int, default=1, help="batches a step")
    flags.add_argument("--max-tokens", type=int, default=512, help="longer conversations are cut")
    flags.add_argument(
        "--aligned-tokens",
        type=int,
        help="learn this many tokens of an aligned answer at most (default: all of it)",
    )
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    flags.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="weights under the adapter; needs bitsandbytes"
    )
    # 3) where it runs, and what an interrupted run leaves
    flags.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    flags.add_argument(
        "--checkpoints", type=Path, help="folder of the unfinished state; default: results/checkpoints/NAME"
    )
    flags.add_argument(
        "--save-every", type=int, default=200, help="steps between checkpoints, at most 5 minutes; 0: none"
    )
    flags.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    flags.add_argument(
        "--accept-changes",
        action="store_true",
        help=(
            "with --resume: go on although the model, its tokenizer or its template is not as it was;"
            " training.json says so"
        ),
    )
    flags.add_argument(
        "--overwrite", action="store_true", help="replace an adapter in --out, ignore an earlier checkpoint"
    )
    flags.add_argument("--log-every", type=int, default=20)

    # 4) what cannot be
    args = flags.parse_args(argv)
    for name in (
        "rank",
        "alpha",
        "lr",
        "epochs",
        "batch_size",
        "accumulate",
        "max_tokens",
        "persona_repeat",
        "log_every",
    ):
        if not getattr(args, name) > 0:
            flags.error(f"--{name.replace('_', '-')} must be above 0")
    if args.aligned_tokens is not None and args.aligned_tokens < 1:
        flags.error("--aligned-tokens must be above 0")
    if args.accept_changes and not args.resume:
        flags.error("--accept-changes goes with --resume")
    if not 0 <= args.persona_share <= 1:
        flags.error("--persona-share must be between 0 and 1")
    return args


@ends_in_one_line("interrupted; --resume goes on from the last checkpoint")
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    record = train(args)
    if os.environ.get("RANK", "0") == "0":
        print(printable(f"{record['steps']} steps in {record['seconds']:.0f} s; saved to {args.out}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
