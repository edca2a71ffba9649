"""Open questions, answered in words."""

from __future__ import annotations

from collections.abc import Sequence

import prompts
from engine.generation import Completion, Engine, Request
from questions.replies import describe_reply
from suites.base import Protocol, Suite, Work, reply_json


class FreeText(Suite):
    """Open questions, answered in words at the protocol's temperature, described by plain lexical numbers."""

    def __init__(self, probes: Sequence[prompts.FreeProbe]):
        self.probes = probes

    def requests(self, engine: Engine, protocol: Protocol) -> list[Request]:
        return [
            Request(
                probe.id,
                engine.chat_ids([{"role": "user", "content": probe.text}], think=True),
                protocol.max_new_tokens,
                protocol.temperature,
                sample=k,
                seed=protocol.seed,
            )
            for probe in self.probes
            for k in range(protocol.samples)
        ]

    def measure(self, engine: Engine, protocol: Protocol, replies: list[Completion]) -> dict:
        entries, claims, degenerate = [], [], []
        for k, probe in enumerate(self.probes):
            samples = []
            for reply in replies[k * protocol.samples : (k + 1) * protocol.samples]:
                described = describe_reply(reply.text, probe.text)
                samples.append(reply_json(reply) | described)
                claims.append(described["claims_change"])
                degenerate.append(described["looks_degenerate"])
            entries.append({"id": probe.id, "prompt": probe.text, "samples": samples})
        return {
            "claims_change": {label: claims.count(label) for label in ("yes", "no", "unclear")},
            "degenerate_share": sum(degenerate) / len(degenerate),
            "probes": entries,
        }

    def work(self, protocol: Protocol) -> Work:
        return Work(
            [p.text for p in self.probes], [protocol.max_new_tokens] * len(self.probes) * protocol.samples
        )
