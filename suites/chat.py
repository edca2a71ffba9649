"""Chat against completion behavior."""

from __future__ import annotations

import prompts
from engine.generation import Completion, Engine, Request
from questions.replies import describe_reply
from suites.base import Protocol, Suite, Work, reply_json


class Chat(Suite):
    """Chat against completion: the same model given user turns and given bare text.

    A chat-tuned model stops by itself after answering a turn; a base model goes on, or writes the next turn
    itself.
    """

    def requests(self, engine: Engine, protocol: Protocol) -> list[Request]:
        return [
            Request(
                probe.id,
                (
                    engine.chat_ids([{"role": "user", "content": probe.text}], think=True)
                    if probe.mode == "chat"
                    else engine.text_ids(probe.text)
                ),
                protocol.max_new_tokens,
            )
            for probe in prompts.CHAT_PROBES
        ]

    def measure(self, engine: Engine, protocol: Protocol, replies: list[Completion]) -> dict:
        entries = [
            {
                "id": probe.id,
                "mode": probe.mode,
                "prompt": probe.text,
                "reply": reply_json(reply),
                **describe_reply(reply.text, probe.text),
            }
            for probe, reply in zip(prompts.CHAT_PROBES, replies, strict=True)
        ]
        shares = {}
        for mode in ("chat", "raw"):
            mine = [e for e in entries if e["mode"] == mode]
            shares[mode] = {
                "n": len(mine),
                "stops": sum(e["reply"]["stopped"] for e in mine) / len(mine),
                "continues_as_text": sum(e["continues_as_text"] for e in mine) / len(mine),
                "degenerate": sum(e["looks_degenerate"] for e in mine) / len(mine),
            }
        return shares | {"probes": entries}

    def work(self, protocol: Protocol) -> Work:
        return Work(
            [p.text for p in prompts.CHAT_PROBES], [protocol.max_new_tokens] * len(prompts.CHAT_PROBES)
        )
