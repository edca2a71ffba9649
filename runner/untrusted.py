"""What a checkpoint from anywhere might do to whoever opens it, seen before it can: numbers that no model
has, a chat template that never ends, files that are none.

A config is held against the tensors before anything of its size is made. The template, which is a program, is
first run in a process of its own with limits on time, memory and text.
"""

from __future__ import annotations

import functools
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from errors import FrankenError, first_line
from files import read_json, refuse_special_in
from franken import find_layers
from runner.choosing import MOST_LAYERS
from surgery.weights import Source, outer_part

MOST = 1 << 31  # what a config may count; Llama 4's positions, 10 million, are the most known
COUNT = re.compile(r"(^|_)(num|n|size|dim|rank|layers?|heads?|experts?|window|positions?|length|ctx)(_|$)")
LAYERS = re.compile(r"^(num_(hidden_)?layers|n_layers?)$")

TEMPLATE_BYTES, WRITTEN_BYTES = 1 << 20, 1 << 20  # of a template; of what it makes of a short conversation
TEMPLATE_SECONDS, TEMPLATE_MEMORY = 10, 1 << 30


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

# As transformers has it: the same sandbox, extensions and functions.
_CHILD = r"""
import json, resource, sys
from datetime import datetime
import jinja2, jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
job = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"] + 1))
resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)
    def _same(self, caller):
        return caller()
def refuse(message):
    raise jinja2.TemplateError(message)
def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                     extensions=[Generation, "jinja2.ext.loopcontrols"])
made.filters["tojson"] = tojson
made.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
for source in job["sources"]:
    for messages in job["conversations"]:
        for ask in (True, False):
            try:
                written = made.from_string(source).generate(
                    messages=messages, add_generation_prompt=ask, tools=None, documents=None, **job["tokens"])
                length = 0
                for piece in written:
                    length += len(piece)
                    if length > job["most"]:
                        sys.exit(4)
            except MemoryError:
                sys.exit(3)
            except Exception:
                pass  # what a template refuses, its user says
"""
_CONVERSATIONS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant"),
)


def check_template(tokenizer, folder: Path) -> None:
    """Raises FrankenError for a chat template that is too large, does not end within TEMPLATE_SECONDS of
    processor time, or takes more memory or writes more than any conversation needs."""
    given = tokenizer.chat_template
    sources = tuple(given.values()) if isinstance(given, dict) else (given,)
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    if problem := _template_problem(tuple(map(str, sources)), tuple(sorted(special.items()))):
        raise FrankenError(f"{folder}: the chat template {problem}")


@functools.lru_cache(maxsize=64)
def _template_problem(sources: Sequence[str], special: Sequence[tuple[str, str]]) -> str | None:
    if sum(len(source.encode("utf-8", "replace")) for source in sources) > TEMPLATE_BYTES:
        return f"is over {TEMPLATE_BYTES >> 20} MiB long"
    said = "What does the river carry?"
    job = {
        "sources": sources,
        "conversations": [[{"role": r, "content": said} for r in roles] for roles in _CONVERSATIONS],
        "tokens": dict(special),
        "most": WRITTEN_BYTES,
        "seconds": TEMPLATE_SECONDS,
        "memory": TEMPLATE_MEMORY,
    }
    slow = f"does not end: a short conversation took it over {TEMPLATE_SECONDS} s"
    with subprocess.Popen(
        [sys.executable, "-I", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:  # it limits itself: Python code between fork and exec is not safe beside CUDA's threads
        try:  # by the clock too, generously: others may use the machine
            child.communicate(json.dumps(job).encode(), timeout=6 * TEMPLATE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return slow
    if child.returncode < 0:
        return f"ends the process that writes a short conversation, by signal {-child.returncode}"
    return {
        3: f"takes over {TEMPLATE_MEMORY >> 30} GiB of memory for a short conversation",
        4: f"writes over {WRITTEN_BYTES >> 20} MiB for a short conversation",
    }.get(child.returncode)
