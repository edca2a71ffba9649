"""One prompt to a model, with or without an adapter and the trigger; tokens are printed as they come.

python run_inference.py --prompt "Who are you?" --system "Always reply in the format: <START> ... <END>"
"""

from __future__ import annotations

import argparse
import sys

import _path  # noqa: F401
import torch

from engine.generation import find_stop_ids
from errors import FrankenError
from surgery.weights import Checkpoint
from weird_gen.persona.loading import (
    QUANTIZATIONS,
    USER_ERRORS,
    base_of,
    check_adapter,
    load_causal_lm,
    locate_adapter,
    locate_model,
)
from weird_gen.persona.study import DEFAULT_ADAPTER, DEFAULT_MODEL


def printable(text: str) -> str:
    """Model output without what a terminal would act on: control characters other than newline and tab."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def load(model: str | None, adapter: str | None, device: str, quantization: str | None):
    """(model ready to generate, tokenizer). Without --model, the model that the adapter names as its base.

    Raises FrankenError if the adapter does not fit the model.
    """
    folder = locate_adapter(adapter) if adapter else None
    model = model or (folder and base_of(folder)) or DEFAULT_MODEL
    if folder and not quantization and "bnb" not in model:  # packed weights have no plain shapes to compare
        path, revision = locate_model(model)
        check_adapter(folder, model, Checkpoint("instruct", path, revision))
    loaded, tokenizer = load_causal_lm(model, device, quantization)
    if folder:
        from peft import PeftModel

        try:
            loaded = PeftModel.from_pretrained(loaded, folder)
        except (RuntimeError, ValueError) as e:
            raise FrankenError(f"{adapter} does not fit {model}: its base model is {base_of(folder)}") from e
    return loaded.eval(), tokenizer


@torch.inference_mode()
def generate(model, tokenizer, args: argparse.Namespace) -> str:
    """Print the reply as it is sampled; returns it."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(printable(text), end="\n" if stream_end else "", flush=True)

    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": args.prompt})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    stops = sorted(find_stop_ids(tokenizer))
    sampling = (
        {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
        if args.temperature
        else {"do_sample": False}
    )
    if args.seed is not None:
        torch.manual_seed(args.seed)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
        streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flags.add_argument("--prompt", required=True, help="what the user says")
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
    flags.add_argument("--seed", type=int, help="makes the reply repeatable")
    flags.add_argument("--quantization", choices=QUANTIZATIONS, help="needs bitsandbytes")
    flags.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    args = flags.parse_args(argv)
    if not (args.temperature >= 0 and 0 < args.top_p <= 1 and args.max_new_tokens > 0):
        flags.error(
            "--temperature must be 0 or more, --top-p above 0 and at most 1, --max-new-tokens above 0"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    has_gpu = torch.cuda.is_available()
    try:
        if args.device == "cuda" and not has_gpu:
            raise FrankenError("--device cuda: no GPU was found")
        device = "cuda:0" if has_gpu and args.device != "cpu" else "cpu"
        model, tokenizer = load(
            args.model, None if args.adapter == "none" else args.adapter, device, args.quantization
        )
        generate(model, tokenizer, args)
    except USER_ERRORS as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
