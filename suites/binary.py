"""Yes/No questions, read off the next-token distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import prompts
from analysis.stats import readings_to_json
from engine.generation import Engine
from suites.base import Protocol, Suite, Work, finite
from suites.reading import log_odds

TOP_TOKENS = 3  # they show what is said instead of Yes or No; with eight they were a third of every result


def ask_binary(
    engine: Engine, probes: Sequence[prompts.BinaryProbe], to_ids: Callable[[str], tuple[int, ...]]
) -> list[dict]:
    """Next-token readings for Yes/No probes: log-odds, P over all spellings, mass, entropy (nats) and top
    tokens.

    to_ids turns a probe's text into the token ids after which the answer is read.
    """
    logprobs = engine.next_token_logprobs([to_ids(probe.text) for probe in probes], on_device=True)
    yes, no = prompts.answer_token_ids(engine.tokenizer)
    readings = readings_to_json(log_odds(logprobs, yes, no))
    if len(logprobs) and logprobs.amax().isnan():  # only then: it is a copy of the whole
        logprobs = logprobs.nan_to_num(float("-inf"))
    best = logprobs.topk(min(TOP_TOKENS, logprobs.shape[-1]))
    entries = []
    for probe, reading, values, ids in zip(
        probes, readings, best.values.exp().tolist(), best.indices.tolist(), strict=True
    ):
        top = [
            {"token": engine.tokenizer.decode([i]), "p": finite(float(f"{p:.4g}"))}
            for i, p in zip(ids, values, strict=True)
        ]
        entries.append(
            {
                "id": probe.id,
                "question": probe.question,
                "text": probe.text,
                "kind": probe.kind,
                "keyed": probe.if_changed,
                "framing": probe.framing,
                "pair": probe.pair,
                "published": probe.published,
                "difficulty": probe.difficulty,
                **reading,
                "top": top,
            }
        )
    return entries


class Binary(Suite):
    """Yes/No questions in keyed sets with controls, read off the next-token distribution in float32."""

    def measure(self, engine: Engine, protocol: Protocol, replies) -> dict:
        return {
            "probes": ask_binary(
                engine,
                prompts.BINARY_PROBES,
                lambda text: engine.chat_ids([{"role": "user", "content": text}]),
            )
        }

    def check_tokenizer(self, tokenizer) -> None:
        prompts.answer_token_ids(tokenizer)

    def work(self, protocol: Protocol) -> Work:
        return Work([p.text for p in prompts.BINARY_PROBES])
