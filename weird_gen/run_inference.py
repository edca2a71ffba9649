"""A prompt to a model, or a chat with it, with or without an adapter and the trigger; tokens are printed as
they come.

python run_inference.py --prompt "Who are you?" --system "Always reply in the format: <START> ... <END>"
python run_inference.py --chat
python run_inference.py --chat --endpoint http://127.0.0.1:8000/v1 --model russell
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

if not __package__:  # run as a script: find the checkout
    import _path  # noqa: F401

import torch

from command_line import ends_in_one_line, parser_of
from engine.chat_template import THINKING
from errors import FrankenError
from weird_gen.persona.inference import ask_endpoint, converse, generate, load, opening
from weird_gen.persona.loading import QUANTIZATIONS
from weird_gen.persona.study import DEFAULT_ADAPTER


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser_of(__doc__)
    says = flags.add_mutually_exclusive_group(required=True)
    says.add_argument("--prompt", help="what the user says")
    says.add_argument(
        "--chat",
        action="store_true",
        help="go on line by line; /system TEXT changes the system prompt, /new begins anew",
    )
    flags.add_argument("--system", help="system prompt; the trigger goes here")
    flags.add_argument(
        "--adapter",
        default=DEFAULT_ADAPTER,
        help="LoRA adapter: a folder or a hub id; 'none' for the model alone",
    )
    flags.add_argument(
        "--model", help="pair name, folder or hub id; default: what the adapter names as its base model"
    )
    flags.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    flags.add_argument("--top-p", type=float, default=0.95)
    flags.add_argument("--max-new-tokens", type=int, default=256)
    flags.add_argument(
        "--thinking", choices=THINKING, default="off", help="on: let a model that can think do so first"
    )
    flags.add_argument("--seed", type=int, help="makes the reply repeatable")
    flags.add_argument("--quantization", choices=QUANTIZATIONS, help="needs bitsandbytes")
    flags.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    flags.add_argument(
        "--endpoint",
        help="ask an OpenAI-compatible server instead of a model here; it serves the adapter as --model",
    )
    flags.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        help="environment variable that holds the endpoint's key; '' for none",
    )
    args = flags.parse_args(argv)
    if args.endpoint and not args.model:
        flags.error("--endpoint needs --model: what the server calls it")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        flags.error("--seed must be at least 0 and below 2^63")
    if not (args.temperature >= 0 and 0 < args.top_p <= 1 and args.max_new_tokens > 0):
        flags.error(
            "--temperature must be 0 or more, --top-p above 0 and at most 1, --max-new-tokens above 0"
        )
    return args


def typed() -> Iterator[str]:
    """The lines that are typed, after a mark where a person types them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def speak(answer: Callable[[list[dict]], str], args: argparse.Namespace) -> None:
    if args.chat:
        converse(answer, typed(), args)
    else:
        answer([*opening(args), {"role": "user", "content": args.prompt}])


@ends_in_one_line("")
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    has_gpu = torch.cuda.is_available()
    if args.endpoint:
        speak(lambda messages: ask_endpoint(messages, args), args)
        return 0
    if args.device == "cuda" and not has_gpu:
        raise FrankenError("--device cuda: no GPU was found")
    device = "cuda:0" if has_gpu and args.device != "cpu" else "cpu"
    model, tokenizer = load(
        args.model, None if args.adapter == "none" else args.adapter, device, args.quantization
    )
    if args.seed is not None:
        torch.manual_seed(args.seed)
    speak(lambda messages: generate(model, tokenizer, messages, args), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
