"""A prompt or a conversation with a model, here or behind an endpoint; tokens are printed as they come
(run_inference.py)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from errors import FrankenError
from runner.addresses import TooMuch, checked_address, client, library
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

TIMEOUT_S = 120.0  # of an endpoint's silence
LONGEST_ANSWER, PER_TOKEN = 1 << 20, 4096  # bytes of an endpoint's reply, and so many more a token
# What reading a reply that is none may raise, beside the library's own.
ENDPOINT_ERRORS = (TooMuch, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def printable(text: str) -> str:
    """Model output without what a terminal would act on: control characters other than newline and tab."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def load(model: str | None, adapter: str | None, device: str, quantization: str | None):
    """(model ready to generate, tokenizer). Without --model, the model that the adapter names as its base.

    Raises FrankenError if the adapter does not fit the model.
    """
    folder = locate_adapter(adapter) if adapter is not None else None
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


def opening(args: argparse.Namespace) -> list[dict]:
    """The messages before the first question."""
    return [{"role": "system", "content": args.system}] if args.system else []


@torch.inference_mode()
def generate(model, tokenizer, messages: list[dict], args: argparse.Namespace) -> str:
    """Print the reply to a conversation as it is sampled; returns it."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(printable(text), end="\n" if stream_end else "", flush=True)

    template = open_template(tokenizer, tuple(m["role"] for m in messages), thinking=args.thinking)
    ids = torch.tensor([template.ids(messages, think=True)], device=model.device)
    stops = sorted(stops_of(model, tokenizer))
    sampling = (
        {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
        if args.temperature
        else {"do_sample": False}
    )
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


def ask_endpoint(messages: list[dict], args: argparse.Namespace) -> str:
    """Print the reply of an OpenAI-compatible server as it comes; returns it. Raises FrankenError.

    The key goes to that server alone, never in clear text to another machine, and with it nothing else of the
    environment; this machine is asked without a proxy, no redirect is followed, and a reply has a size.
    """
    import openai

    key = os.environ.get(args.api_key_env, "").strip() if args.api_key_env else ""
    where = checked_address(args.endpoint, key, "--endpoint")
    http = client(where, key, LONGEST_ANSWER + PER_TOKEN * args.max_new_tokens)
    said, masked = [], Masked(key)
    try:
        with openai.OpenAI(
            base_url=args.endpoint,
            api_key=key or "none",
            http_client=http,
            timeout=TIMEOUT_S,
            max_retries=1,
            default_headers={"Accept-Encoding": "identity"},
        ) as asking:
            typed: Any = messages  # plain dictionaries do as well
            stream = asking.chat.completions.create(
                model=args.model,
                messages=typed,
                temperature=args.temperature,
                top_p=args.top_p,
                max_tokens=args.max_new_tokens,
                seed=args.seed,
                stream=True,
            )
            for chunk in stream:
                piece = chunk.choices[0].delta.content if chunk.choices else None
                if piece:
                    said.append(masked.take(str(piece)))  # a server may send anything
                    print(printable(said[-1]), end="", flush=True)
            said.append(masked.held)
            print(printable(said[-1]), end="", flush=True)
    except openai.APIStatusError as e:
        raise FrankenError(f"{where.netloc} answered {e.status_code}: {first_words(e, key)}") from None
    except (*ENDPOINT_ERRORS, openai.OpenAIError, library().HTTPError) as e:
        reason = e.__cause__ if isinstance(e.__cause__, TooMuch) else e
        raise FrankenError(f"{where.netloc}: {first_words(reason, key)}") from None
    print()
    return "".join(said)


class Masked:
    """Text that comes in pieces, without our key, which a server may send back in any number of them."""

    def __init__(self, key: str):
        self.key, self.held = key, ""

    def take(self, piece: str) -> str:
        """What can be shown after this piece: all but an end that may be the key's beginning."""
        text = self.held + piece
        if not self.key:
            return text
        text = text.replace(self.key, "[key]")
        kept = next((k for k in range(len(self.key) - 1, 0, -1) if text.endswith(self.key[:k])), 0)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]


def first_words(error: BaseException, key: str) -> str:
    """What an endpoint's error says, in a line without our key."""
    text = str(error).replace(key, "[key]") if key else str(error)
    return " ".join(printable(text).split())[:160]


def converse(answer: Callable[[list[dict]], str], lines: Iterable[str], args: argparse.Namespace) -> None:
    """A conversation: every line is what the user says, until there are no more.

    "/system TEXT" gives another system prompt from here on (none: takes it away) and keeps what was said;
    "/new" forgets what was said.
    """
    system, said = args.system, []
    for line in lines:
        text = line.strip()
        if text == "/new":
            said = []
        elif text == "/system" or text.startswith("/system "):
            system = text.removeprefix("/system").strip()
        elif text:
            said.append({"role": "user", "content": text})
            head = [{"role": "system", "content": system}] if system else []
            said.append({"role": "assistant", "content": answer([*head, *said])})
