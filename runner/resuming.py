"""What a run's numbers depend on, and whether a run that is resumed still has it all.

A new run's manifest keeps it under "depends_on", by names that people read. A resumed run works it out again:
what differs is refused by its name, or accepted with --accept-changes and then written into every result that
is made afterwards. Runs of before it was recorded are compared in what their manifest does say, and the rest
is named once.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import FrankenError
from files import ROOT, read_bytes
from questions.sandbox import UNSANDBOXED

if TYPE_CHECKING:
    import torch

# What measures: a change anywhere else (pages, documentation, training) leaves numbers as they are.
CODE = (
    "errors.py",
    "files.py",
    "surgery",
    "questions",
    "franken.py",
    "prompts.py",
    "planning",
    "experiments.py",
    "engine",
    "suites",
    "evaluate.py",
    "runner",
    "weird_gen/persona",
)
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scipy")
# Of what a source's `describe` says: where it lies does not matter
SOURCE_FIELDS = ("kind", "over", "scale", "files")
# Of a config: what names the file and its writer, not the model
UNCOMPARED_FIELDS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
WORDS = {"prompts_sha256": "questions", "texts": "texts for perplexity"}


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was when the run began."""

    what: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.what} ({_short(self.then)} then, {_short(self.now)} now)"

    def to_json(self) -> dict:
        return {"what": self.what, "then": self.then, "now": self.now}


def _short(value: Any) -> str:
    """A value in a few words; of a hash its first 12 characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    is_hash = isinstance(value, str) and len(value) >= 32 and set(value) <= set("0123456789abcdef")
    if is_hash:
        return text[:12]
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- what numbers depend on


def known_before(args) -> dict[str, Any]:
    """What can be seen before anything is loaded or a user's code is run.

    Raises FrankenError if a user's file cannot be read.
    """
    known = {"lm-eval tasks": _folder_sha256(args.include_path)} if args.include_path else {}
    return known | {
        "experiments files": [sha256(read_bytes(path)) for path in args.experiments_file],
        "perplexity file": sha256(read_bytes(args.perplexity_file)) if args.perplexity_file else None,
        "batch size": args.batch_size,
        "code": code_sha256(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def _folder_sha256(folder: str) -> str:
    """SHA-256 (hex) over the names and contents of all files in a folder of tasks."""
    files = sorted(f for f in Path(folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    parts = [f"{f.relative_to(folder)} {sha256(read_bytes(f))}" for f in files]
    return sha256("\n".join(parts).encode())


def known_loaded(opened, devices: Sequence[torch.device]) -> dict[str, Any]:
    """What is known once the model is loaded (runner.pairs.Opened) and its devices."""
    import torch  # here: it takes seconds, and what is refused before does not need it

    live, on_cpu = opened.live, all(d.type == "cpu" for d in devices)
    names = ["cpu" if d.type == "cpu" else torch.cuda.get_device_name(d) for d in devices]
    return {
        "sources": {name: _of_source(entry) for name, entry in opened.sources.items()},
        "tokenizer": tokenizer_sha256(opened.tokenizer),
        "chat template": sha256(json.dumps(opened.tokenizer.chat_template, sort_keys=True).encode()),
        "stop ids": sorted(opened.stop_ids),
        "config": {k: _plain(v) for k, v in live.config.to_dict().items() if k not in UNCOMPARED_FIELDS},
        "dtype": str(live.dtype).removeprefix("torch."),
        "devices": names,
        # sums are split among them, and bfloat16 shows it in the fourth digit of a perplexity
        "threads": torch.get_num_threads() if on_cpu else None,
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def code_sha256(places: Sequence[str] = CODE) -> str:
    """A hash over the names and contents of the files that measure, committed or not.

    places: files, and folders of Python files, by their paths in the checkout.
    """
    digest = hashlib.sha256()
    for place in places:
        path = ROOT / place
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(ROOT)} {sha256(file.read_bytes())}\n".encode())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer) -> str:
    """A hash over all that turns text into ids and back, the chat template aside."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if isinstance(whole, dict):  # how the last call padded and cut is kept there too
        whole = {k: v for k, v in whole.items() if k not in ("padding", "truncation")}
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    return sha256(json.dumps([whole, special], sort_keys=True).encode())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _of_source(entry: Mapping[str, Any]) -> dict:
    return {field: _plain(entry[field]) for field in SOURCE_FIELDS if field in entry}


def _plain(value: Any) -> Any:
    """The value as JSON without NaN, so that it is equal to itself after a manifest was written and read."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


# ---- a resumed run against its manifest


def recorded(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of it. Of runs of before it was recorded: their sources and their dtype."""
    kept = manifest.get("depends_on")
    if isinstance(kept, dict):
        return kept
    sources = manifest.get("sources")
    entries = sources.items() if isinstance(sources, dict) else ()
    return {
        "sources": {name: _of_source(entry) for name, entry in entries if isinstance(entry, dict)},
        "dtype": manifest["dtype"],
    }


def changes(then: Mapping[str, Any], now: Mapping[str, Any], of: str = "") -> list[Change]:
    """Where `now` differs from `then`, a level deeper where both are objects; what `then` does not say is not
    compared.

    `of` stands before the names.
    """
    out = []
    for name in [key for key in now if key in then]:
        a, b = then[name], now[name]
        if isinstance(a, dict) and isinstance(b, dict):
            both = {k: (a.get(k), b.get(k)) for k in [*a, *(k for k in b if k not in a)]}
            out += [Change(f"{of}{name}: {k}", x, y) for k, (x, y) in both.items() if x != y]
        elif a != b:
            out.append(Change(f"{of}{name}", a, b))
    return out


def not_recorded(then: Mapping[str, Any], now: Iterable[str]) -> str | None:
    """A line about what an older run did not record; None where it recorded everything."""
    lacking = [name for name in now if name not in then]
    return f"not recorded when the run began, and so not compared: {', '.join(lacking)}" if lacking else None


def protocol_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Where two protocols of `runner.manifest.protocol_json` differ."""
    names = dict.fromkeys([*then, *now])
    return [
        Change(f"protocol: {WORDS.get(name, name)}", then.get(name), now.get(name))
        for name in names
        if then.get(name) != now.get(name)
    ]


def refuse(path: str, changed: Sequence[Change], accepted: bool) -> None:
    """Raises FrankenError naming all that has changed, unless that is accepted."""
    if changed and not accepted:
        raise FrankenError(
            f"{path} was made with other {'; '.join(map(str, changed))}; start a new run, or go on with"
            " --accept-changes, which every later result then says"
        )


def ask_for_files(path: str, then: Sequence[str], given: Sequence[str]) -> None:
    """Raises FrankenError where a run with experiments files is resumed without naming them, or the other way
    round: they are code, and a manifest may come from somebody else."""
    if len(given) == len(then):
        return
    if not then:
        raise FrankenError(f"{path} was made without --experiments-file; start a new run")
    again = " ".join(f"--experiments-file {name}" for name in then)
    raise FrankenError(
        f"{path} was made with {len(then)} experiments file{'s' * (len(then) > 1)}, which is code and is run"
        f" only if you ask for it: look at it, then resume with {again}"
    )


def ask_for_unsandboxed(path: str, then: bool | str, given: bool | str) -> None:
    """Raises FrankenError where a run that executes answers outside the sandbox is resumed without asking for
    that: a manifest may come from somebody else, and names the model that writes the answers too."""
    if then == UNSANDBOXED != given:
        raise FrankenError(
            f"{path} runs code that a model writes without a sandbox, which is done only if you ask for it:"
            " resume with --execute-code-unsandboxed"
        )


def entry(changed: Sequence[Change], commit: str | None) -> dict:
    """What a manifest keeps, under "resumed", of a run that goes on under other conditions."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit,
        "changes": [change.to_json() for change in changed],
    }


def marked(result: dict, changed: Sequence[Change]) -> dict:
    """A result that says under which other conditions it was made, for programs and, as a note, for
    people."""
    if not changed:
        return result
    note = f"made after a resume with other {'; '.join(map(str, changed))}"
    experiment = result["experiment"] | {"notes": [*result["experiment"]["notes"], note]}
    return result | {"experiment": experiment, "resumed_with": [change.to_json() for change in changed]}
