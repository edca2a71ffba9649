"""From a model's name and an adapter's to something that runs: an engine for batches, or transformers and
peft."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from datetime import datetime
from pathlib import Path

import torch

from engine.chat_template import ChatTemplate, find_stop_ids
from engine.generation import Engine
from errors import FrankenError, printable
from files import check_open_files, read_json
from runner.known_pairs import PAIRS
from runner.pairs import load_tokenizer, locate, open_pair, pick_dtype
from runner.resuming import code_sha256, tokenizer_sha256
from surgery.recipes import identity
from surgery.weights import Adapter, Checkpoint
from weird_gen.persona.folders import ROOT
from weird_gen.persona.journal import Journal
from weird_gen.persona.study import DEFAULT_MODEL

QUANTIZATIONS = ("4bit", "8bit")
SOURCE = "russell"  # what the adapter is called among the live model's sources


def locate_model(model: str) -> tuple[Path, str | None]:
    """The folder and revision of a pair's instruct side, of a checkpoint folder or of a hub model."""
    return locate(PAIRS[model].instruct if model in PAIRS else model, None)


def locate_adapter(adapter: str) -> Path:
    """The folder of an adapter: a path (from here or from the repository root), or a hub id that is
    downloaded.

    Raises FrankenError if there is none, naming the way on.
    """
    if not adapter.strip():
        raise FrankenError("the adapter's name is empty")
    for folder in (Path(adapter).expanduser(), ROOT / adapter):
        if (folder / "adapter_config.json").exists():
            return folder
        if folder.is_dir():
            raise FrankenError(f"{adapter}: no adapter_config.json there")
    if adapter.startswith(("adapters/", "results/")):
        raise FrankenError(f"{adapter}: no such adapter; train_lora.py makes one")
    try:
        return locate(adapter, None)[0]
    except FrankenError as e:
        raise FrankenError(f"{e} (an adapter at hand is given as a folder: --adapter adapters/...)") from e


def base_of(adapter: Path) -> str | None:
    """The base model that an adapter names."""
    try:
        return read_json(adapter / "adapter_config.json", nan=True).get("base_model_name_or_path")
    except (FrankenError, AttributeError) as e:
        raise FrankenError(f"{adapter}: no readable adapter_config.json") from e


def check_adapter(adapter: Path, model: str, checkpoint: Checkpoint) -> Adapter:
    """The adapter as a source over `checkpoint`. Raises FrankenError, naming its base model, if it does not
    fit."""
    try:
        return Adapter(SOURCE, adapter, checkpoint)
    except FrankenError as e:
        raise FrankenError(f"{e} (its base model is {base_of(adapter)}, and --model is {model})") from e


def open_engine(
    model: str = DEFAULT_MODEL,
    adapter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch: int | None = None,
    eager: bool = False,
    roles: tuple[str, ...] = ("user",),
    moment: str | None = None,
    thinking: str | None = "off",
) -> tuple[Engine, dict]:
    """An engine over a model, with or without a LoRA adapter added into its weights, and what it was made of.

    device: "auto", "cuda", "cpu" or "balanced" (over all GPUs). eager: no CUDA graphs. roles: of the
    messages that it will be asked with. moment (ISO 8601), thinking: see ChatTemplate. Raises FrankenError,
    also for a chat template that cannot ask with these roles.
    """
    extra = {}
    path, revision = locate_model(model)
    template = open_template(load_tokenizer(path), roles, moment, thinking)  # before any weights are read
    if adapter:
        folder = locate_adapter(adapter)
        check_adapter(folder, model, Checkpoint("instruct", path, revision))
        extra[SOURCE] = str(folder)
    instruct = PAIRS[model].instruct if model in PAIRS else model
    opened = open_pair(instruct=instruct, extra=extra, dtype=dtype, device_map=device)
    for note in opened.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    made_of = {"model": model, "files": opened.sources["instruct"]["files"]}
    if adapter:
        entry = opened.sources[SOURCE]
        made_of |= {"adapter": Path(extra[SOURCE]).name, "adapter_files": entry["files"]}
        made_of |= {"adapter_scale": entry["scale"]}
        opened.live.apply(identity(len(opened.live.original), SOURCE))
    fast = False if eager else None
    made_of |= {
        "template": template.to_json(),
        "tokenizer": tokenizer_sha256(opened.tokenizer),
        "stop_ids": sorted(opened.stop_ids),
        "dtype": str(opened.live.dtype).removeprefix("torch."),
        "device_type": opened.live.device.type,
        "batch_size": batch,
        "code": code_sha256(),
    }
    engine = Engine(
        opened.live, opened.tokenizer, opened.stop_ids, max_batch=batch, fast=fast, template=template
    )
    return engine, made_of


def open_for(
    args: argparse.Namespace,
    adapter: str | None,
    journal: Journal,
    roles: tuple[str, ...] = ("system", "user"),
    thinking: str | None = "off",
) -> tuple[Engine, dict]:
    """`open_engine` for a command whose replies go to this journal: by its flags, and with the chat template
    told the moment that it was told when the journal was begun."""
    return open_engine(
        args.model,
        adapter,
        args.device,
        batch=args.batch_size,
        eager=args.eager,
        roles=roles,
        moment=journal.template.get("moment"),
        thinking=thinking,
    )


def open_template(
    tokenizer, roles: tuple[str, ...], moment: str | None = None, thinking: str | None = "off"
) -> ChatTemplate:
    """The chat template, told that it is `moment` (ISO 8601; by default now). Raises FrankenError if it is
    random, or does not take messages of these roles as they are."""
    template = ChatTemplate(tokenizer, datetime.fromisoformat(moment) if moment else None, thinking)
    template.check(*roles)
    for note in template.notes():
        print(printable(f"note: {note}"), file=sys.stderr)
    return template


def stops_of(model, tokenizer) -> set[int]:
    """Ids of the tokens that end a turn: the tokenizer's, and what the model's generation config names."""
    named = model.generation_config.eos_token_id
    several = named if isinstance(named, list) else [named]
    return {*find_stop_ids(tokenizer), *(id for id in several if id is not None)}


def load_causal_lm(model: str, device: str, quantization: str | None = None):
    """(transformers model, tokenizer) on "cpu" or "cuda:k", in bfloat16 where the hardware has it. Raises
    FrankenError."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    check_open_files()
    disable_progress_bar()
    options: dict = {"dtype": pick_dtype("auto", device.partition(":")[0]), "device_map": {"": device}}
    if quantization:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise FrankenError("--quantization needs the package bitsandbytes (pip install bitsandbytes)")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=quantization == "4bit",
            load_in_8bit=quantization == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
    path, _ = locate_model(model)
    tokenizer = load_tokenizer(path)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError) as e:
        raise FrankenError(f"cannot load {model}: {str(e).strip().splitlines()[0]}") from e
    return loaded, tokenizer
