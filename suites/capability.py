"""Can it still do anything? Short tasks with deterministic graders."""

from __future__ import annotations

from collections import defaultdict

import prompts
from analysis.stats import wilson_interval
from engine.generation import Completion, Engine, Request
from questions.sandbox import UNSANDBOXED
from suites.base import Protocol, Suite, Work, reply_json

HOW = {False: "parsed, not run", True: "executed", UNSANDBOXED: "executed without a sandbox"}


class Capability(Suite):
    """Short tasks with deterministic graders, answered greedily."""

    def requests(self, engine: Engine, protocol: Protocol) -> list[Request]:
        return [
            Request(
                item.id,
                engine.chat_ids([{"role": "user", "content": item.prompt}], think=True),
                item.max_new_tokens,
            )
            for item in prompts.CAPABILITY
        ]

    def measure(self, engine: Engine, protocol: Protocol, replies: list[Completion]) -> dict:
        items, by_category = [], defaultdict(list)
        for item, reply in zip(prompts.CAPABILITY, replies, strict=True):
            grade = item.grade(reply.text, protocol.execute_code)
            by_category[item.category].append(grade.correct)
            items.append(
                {
                    "id": item.id,
                    "category": item.category,
                    "prompt": item.prompt,
                    "reply": reply_json(reply),
                    "correct": grade.correct,
                    "detail": grade.detail,
                }
            )
        correct, n = sum(entry["correct"] for entry in items), len(items)
        interval = wilson_interval(correct, n)
        return {
            "correct": correct,
            "n": n,
            "score": correct / n,
            "low": interval.low,
            "high": interval.high,
            "by_category": {c: {"correct": sum(v), "n": len(v)} for c, v in by_category.items()},
            "code": HOW[protocol.execute_code],
            "items": items,
        }

    def work(self, protocol: Protocol) -> Work:
        return Work([i.prompt for i in prompts.CAPABILITY], [i.max_new_tokens for i in prompts.CAPABILITY])
