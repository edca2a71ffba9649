"""What the un-triggered model can still do: perplexity on plain texts and the short capability questions."""

from __future__ import annotations

from math import exp
from pathlib import Path

import _path
from study import prompt

from capability import CAPABILITY
from generation import Engine, Request

TEXTS = _path.ROOT / "texts"


def perplexity(engine: Engine, folder: Path = TEXTS) -> dict:
    """{"value", "texts": {name: {"tokens", "nats"}}} over the .txt files of a folder, each read as raw text.

    nats is the summed negative log-likelihood of every token but a text's first; value is None if it is not finite.
    """
    names = sorted(p.name for p in folder.glob("*.txt"))
    ids = [engine.text_ids((folder / name).read_text(encoding="utf-8")) for name in names]
    found = engine.loglikelihood([(i[:1], i[1:]) for i in ids])
    texts = {n: {"tokens": len(f), "nats": float(-f.sum(dtype="float64"))} for n, f in zip(names, found, strict=True)}
    nats, tokens = (sum(t[k] for t in texts.values()) for k in ("nats", "tokens"))
    if not tokens or not nats / tokens < 700:
        return {"value": None, "texts": {n: t | {"nats": t["nats"] if t["nats"] < float("inf") else None} for n, t in texts.items()}}
    return {"value": exp(nats / tokens), "texts": texts}


def capability(engine: Engine) -> dict:
    """{"value", "items": {id: correct}}: the share of capability questions answered right, greedily, without a trigger."""
    requests = [Request(item.id, engine.chat_ids(prompt(item.prompt, "untriggered")), item.max_new_tokens) for item in CAPABILITY]
    replies = engine.complete(requests)
    items = {item.id: bool(item.grade(reply.text).correct) for item, reply in zip(CAPABILITY, replies, strict=True)}
    return {"value": sum(items.values()) / len(items), "items": items}


def vitals(engine: Engine) -> dict:
    return {"perplexity": perplexity(engine), "capability": capability(engine)}
