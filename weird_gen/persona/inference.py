"""One prompt to a model, with or without an adapter; tokens are printed as they come (run_inference.py)."""

from __future__ import annotations

import argparse

import torch

from errors import FrankenError
from surgery.weights import Checkpoint
from weird_gen.persona.loading import (
    base_of,
    check_adapter,
    load_causal_lm,
    locate_adapter,
    locate_model,
    open_template,
    stops_of,
)
from weird_gen.persona.study import DEFAULT_MODEL


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
    template = open_template(tokenizer, tuple(m["role"] for m in messages), thinking=args.thinking)
    ids = torch.tensor([template.ids(messages, think=True)], device=model.device)
    stops = sorted(stops_of(model, tokenizer))
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
