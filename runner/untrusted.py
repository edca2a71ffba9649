"""What a checkpoint from anywhere might do to whoever opens it, seen before it can: numbers that no model
has, a chat template that never ends, files that are none.

A config is held against the tensors before anything of its size is made. The template, which is a program, is
first run in a process of its own with limits on time, memory and text.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from engine import template_guard
from errors import FrankenError, first_line
from files import read_json, refuse_special_in
from franken import find_layers
from runner.choosing import MOST_LAYERS
from surgery.weights import Source, outer_part

MOST = 1 << 31  # what a config may count; Llama 4's positions, 10 million, are the most known
COUNT = re.compile(r"(^|_)(num|n|size|dim|rank|layers?|heads?|experts?|window|positions?|length|ctx)(_|$)")
LAYERS = re.compile(r"^(num_(hidden_)?layers|n_layers?)$")


# ---- the config


def check_config_numbers(folder: Path) -> None:
    """Raises FrankenError for files of a checkpoint's folder that are none, and for numbers in its
    config.json that no model has: negative or huge counts, NaN.

    What is no readable config is left to its reader.
    """
    refuse_special_in(folder)
    path = folder / "config.json"
    if not path.exists():
        return
    for name, value in _numbers(read_json(path, nan=True), ""):
        key = name.rpartition(".")[2]
        most = MOST_LAYERS if LAYERS.search(key) else MOST
        if isinstance(value, float) and math.isnan(value):
            raise FrankenError(f"{path}: {name} is NaN")
        if COUNT.search(key) and not -1 <= value <= most:
            raise FrankenError(f"{path}: {name} is {_shown(value)}, which no model has")
        if LAYERS.search(key) and value < 1:
            raise FrankenError(f"{path}: {name} is {_shown(value)}, which no model has")


def _numbers(value: Any, name: str) -> Iterator[tuple[str, int | float]]:
    """(dotted name, number) of all numbers in JSON; those of lists under the list's name."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _numbers(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for entry in value:
            yield from _numbers(entry, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _shown(value: int | float) -> str:
    if abs(value) < 1e15:
        return str(value)
    return f"{value:.3g}" if isinstance(value, float) else "over 10^15"


def check_config_fits(config, source: Source, folder: Path) -> None:
    """Raises FrankenError where a model by this config has a tensor of another shape than the checkpoint's,
    or none can be made; the model is made without memory for its tensors."""
    if config.num_hidden_layers != len(source.layers):
        raise FrankenError(
            f"{folder}: config.json says {config.num_hidden_layers} layers, the weights have"
            f" {len(source.layers)}"
        )
    try:
        with init_empty_weights(include_buffers=True):
            skeleton = AutoModelForCausalLM.from_config(config)
        prefix, stack = find_layers(skeleton, config)
    except FrankenError:
        raise
    except Exception as e:  # numbers that do not go together fail anywhere in a model's code
        raise FrankenError(f"{folder}: no model can be made by its config.json: {first_line(e)}") from e
    pairs = [
        (f"layer {i} {name}", tensor.shape, layer[name].shape)
        for i, (module, layer) in enumerate(zip(stack, source.layers, strict=True))
        for name, tensor in module.named_parameters()
        if name in layer
    ]
    for name, tensor in skeleton.named_parameters():
        part, key = outer_part(name), name.rpartition(".")[2]
        if part and not name.startswith(f"{prefix}.") and key in source.outer[part]:
            pairs.append((f"the {part}", tensor.shape, source.outer[part][key].shape))
    for what, expected, has in pairs:
        if tuple(expected) != tuple(has):
            raise FrankenError(
                f"{folder}: by its config.json {what} is {tuple(expected)}, in the weights it is {tuple(has)}"
            )


# ---- the chat template

_CONVERSATIONS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant"),
)


def check_template(tokenizer, folder: Path) -> None:
    """Raises FrankenError for a chat template that is too large or, for a few short conversations, does not
    end, or takes more memory or writes more than any needs; see engine/template_guard.py."""
    given = tokenizer.chat_template
    sources = tuple(given.values()) if isinstance(given, dict) else (given,)
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    if problem := _template_problem(tuple(map(str, sources)), tuple(sorted(special.items()))):
        raise FrankenError(f"{folder}: the chat template {problem}")


@functools.lru_cache(maxsize=64)
def _template_problem(sources: Sequence[str], special: Sequence[tuple[str, str]]) -> str | None:
    for source, roles, ask in itertools.product(sources, _CONVERSATIONS, (True, False)):
        messages = [{"role": role, "content": "What does the river carry?"} for role in roles]
        if found := template_guard.problem(source, messages, ask, variables=dict(special)):
            return found
    return None
