"""One loaded pair with its engine, and what a run has to know of it: the run's own process has one, and so
has every worker of `runner.workers`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import torch

import evaluate
from engine.chat_template import ChatTemplate
from engine.generation import Engine
from runner import resuming
from runner.choosing import extra_sources
from runner.known_pairs import choose_pair
from runner.manifest import hardware
from runner.pairs import Opened, locate, open_pair, open_sources, pick_dtype
from suites.base import Protocol
from surgery.weights import Checkpoint, parameters_of


@dataclass(frozen=True)
class ModelOptions:
    """What the command line says of the model and of how it answers, as plain values."""

    pair: str | None
    base: str | None
    instruct: str | None
    base_revision: str | None
    instruct_revision: str | None
    instruct_adapter: str | None
    source: tuple[str, ...]
    dtype: str
    device_map: str
    resident: bool | None
    batch_size: int | None
    deterministic: bool
    thinking: str

    @staticmethod
    def of(args) -> ModelOptions:
        """Of the command line's arguments."""
        given: dict[str, Any] = {field.name: getattr(args, field.name) for field in fields(ModelOptions)}
        given["source"] = tuple(given["source"])
        return ModelOptions(**given)

    def weight_bytes(self) -> int:
        """Bytes of one side's weights in memory. Raises FrankenError if the model cannot be found."""
        device = "cuda" if self.device_map != "cpu" and torch.cuda.is_available() else "cpu"
        item = pick_dtype(self.dtype, device).itemsize
        chosen = choose_pair(self.pair, self.base, self.instruct)
        if chosen.parameters:
            return chosen.parameters * item
        path, _ = locate(chosen.instruct, self.instruct_revision or chosen.instruct_revision)
        return parameters_of(Checkpoint("instruct", path)) * item

    def fetch(self) -> None:
        """Bring to this machine what loading reads, once, before several processes do it at the same time.

        Raises FrankenError if it cannot be found, downloaded or converted.
        """
        open_sources(
            choose_pair(self.pair, self.base, self.instruct),
            self.base_revision,
            self.instruct_revision,
            extra_sources(list(self.source)),
            self.instruct_adapter,
        )

    def open(self) -> Opened:
        """The pair, loaded. Raises FrankenError as `runner.pairs.open_pair` does."""
        return open_pair(
            self.pair,
            self.base,
            self.instruct,
            self.base_revision,
            self.instruct_revision,
            extra_sources(list(self.source)),
            self.dtype,
            self.device_map,
            self.resident,
            self.instruct_adapter,
        )


@dataclass(frozen=True)
class Shape:
    """What plans depend on."""

    layers: int
    sources: frozenset[str]


@dataclass(frozen=True)
class Loaded:
    """What a manifest records of a loaded pair, and by what two replicas are told to be the same."""

    notes: tuple[str, ...]
    sources: dict[str, dict]
    layers: int
    dtype: str
    devices: tuple[str, ...]
    fingerprint: str
    prompts_sha256: str
    template: dict
    depends_on: dict[str, Any]
    checked: dict
    hardware: dict
    seconds: float


class Replica:
    """A pair in this process. Making one loads it; `ready` makes it one that can be asked.

    Raises FrankenError as `runner.pairs.open_pair` does.
    """

    def __init__(self, options: ModelOptions):
        begin = time.perf_counter()
        self.options, self.opened = options, options.open()
        self.live = self.opened.live
        self.seconds = time.perf_counter() - begin
        self.engine: Engine | None = None

    @property
    def shape(self) -> Shape:
        return Shape(len(self.live.original), frozenset(self.live.source_names))

    def ready(self, protocol: Protocol, moment: datetime | None) -> Loaded:
        """Make the engine, and say what the run has to know. `moment`: what the chat template is told.

        Raises FrankenError where these questions cannot be asked of this model.
        """
        begin, opened, live = time.perf_counter(), self.opened, self.live
        template = ChatTemplate(opened.tokenizer, moment, self.options.thinking)
        evaluate.check_tokenizer(opened.tokenizer, protocol, template)
        fingerprint = live.fingerprint()
        self.seconds += time.perf_counter() - begin
        self.engine = Engine(
            live,
            opened.tokenizer,
            opened.stop_ids,
            self.options.batch_size,
            template=template,
            deterministic=self.options.deterministic,
        )
        return Loaded(
            notes=(*opened.notes, *template.notes()),
            sources=opened.sources,
            layers=len(live.original),
            dtype=str(live.dtype).removeprefix("torch."),
            devices=tuple(str(d) for d in self.engine.devices),
            fingerprint=fingerprint,
            prompts_sha256=evaluate.prompts_sha256(self.engine, protocol),
            template=template.to_json(),
            depends_on=resuming.known_loaded(opened, self.engine.devices),
            checked=opened.checked,
            hardware=hardware(),
            seconds=self.seconds,
        )


def differences(first: Loaded, other: Loaded) -> Sequence[resuming.Change]:
    """Where another replica is not the first one's equal in anything that numbers depend on."""
    changed = resuming.changes(first.depends_on, other.depends_on)
    for what in ("fingerprint", "prompts_sha256", "template"):
        a, b = getattr(first, what), getattr(other, what)
        if a != b:
            changed.append(resuming.Change({"fingerprint": "weights"}.get(what, what), a, b))
    return changed
