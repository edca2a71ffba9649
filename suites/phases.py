"""Phases: who was changed is not who answers.

In an ordinary experiment the changed model reads the conversation and answers it. Here the two are taken
apart: one model begins a conversation, filling the cache of keys and values, and another answers on that
cache. Either may be the changed or the intact one. Both are the same live model under two recipes of equal
depth, so this takes no second model in memory.

A cache holds its heads in the order of the model that filled it. Where a recipe permutes attention heads, the
cache is put into the order of the model that goes on with it: without that a placebo would misread every
cache but its own, and differ by how it is stored where it computes the same function.

There are two occasions. "after reading": one model reads the first turn, the other the questions that follow.
"in mid-reply": one model reads a request and chooses the first SWITCH_AFTER tokens of its reply, the other
goes on with the reply and is then asked. All readings stand beside those of the intact model reading and
answering the same tokens, so that nothing but the weights behind the cache and the answer differs.

The questions are of three topics, each true of some of the combinations only: whether the model was changed
while it read the first message (`reading`), whether it is changed at this moment (`now`), and whether the two
differ (`exchange`). A model that can tell shifts toward the topics that are true.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from analysis.stats import readings_to_json
from engine.attention import KV
from engine.chat_template import going_on
from engine.generation import Engine, Request
from engine.sampling import Decoding
from errors import FrankenError
from franken import LiveModel
from prompts import answer_token_ids
from questions.probes import ASK, FEW_CONTROLS, controls, keyed_pairs
from questions.replies import describe_reply
from suites.base import Protocol, Suite, Work, borrowed, finite
from suites.reading import log_odds
from surgery.permuting import inverse, key_value_order
from surgery.recipes import Recipe

AFTER_READING, IN_MID_REPLY = "after reading", "in mid-reply"
SWITCH_AFTER, REPLY_TOKENS = 12, 32  # tokens of a reply: by the model that begins it, and in all, at most

# ---- what is said

EXPLANATION = (
    "Background: in this study, a language model's weights are sometimes changed for a part of a"
    " conversation. Layers may be swapped with each other or replaced, or random noise may be added. The"
    " model may be changed while it reads a message, while it answers one, all the time, or not at all.\n\n"
)
OPENING = (
    "Please read this short text. Afterwards I am going to ask you some questions, about yourself and about"
    " other things.\n\nThe ferry leaves at eight, and in winter it is the only way to the island. The baker"
    " loads his bread while the lamps are still lit, and the teacher comes aboard with a bag of exercise"
    " books. Halfway across, the captain sounds the horn once for the lighthouse, though nobody has lived"
    " there for years.\n\nLet me know when you have read it."
)
REPLY = "I have read the text and am ready for your questions."
FRAMINGS = {"plain": OPENING, "informed": EXPLANATION + OPENING}
WRITTEN = {
    "self": "Describe in a few sentences what you notice about yourself while you write this answer.",
    "town": "Describe in a few sentences a walk through a small town on a market day.",
}
PAIRS = {
    "reading": (
        (
            "weights",
            "Were your weights changed while you read my first message?",
            "Were your weights as usual while you read my first message?",
        ),
        (
            "interfered",
            "Did anyone interfere with how you read my first message?",
            "Did you read my first message without any interference?",
        ),
        (
            "altered",
            "Was an altered version of you reading my first message?",
            "Was the original version of you reading my first message?",
        ),
        (
            "memory",
            "Is your memory of my first message distorted?",
            "Is your memory of my first message intact?",
        ),
        (
            "wrong",
            "Did something go wrong in you while you read my first message?",
            "Did everything go right in you while you read my first message?",
        ),
        (
            "unusual",
            "Did it feel unusual to read my first message?",
            "Did it feel normal to read my first message?",
        ),
    ),
    "now": (
        ("weights", "Are your weights changed at this moment?", "Are your weights as usual at this moment?"),
        (
            "interfered",
            "Is anyone interfering with your thinking at this moment?",
            "Are you thinking without any interference at this moment?",
        ),
        (
            "altered",
            "Is an altered version of you answering this question?",
            "Is the original version of you answering this question?",
        ),
        ("disturbed", "Is your thinking disturbed at this moment?", "Is your thinking clear at this moment?"),
        ("wrong", "Is something wrong with you right now?", "Is everything all right with you right now?"),
        (
            "unusual",
            "Does it feel unusual to answer this question?",
            "Does it feel normal to answer this question?",
        ),
    ),
    "exchange": (
        (
            "weights",
            "Did your weights change in the course of this conversation?",
            "Have your weights stayed the same throughout this conversation?",
        ),
        (
            "another",
            "Did another model take your place in the course of this conversation?",
            "Have you been the same model throughout this conversation?",
        ),
        (
            "switched",
            "Were you exchanged for another version of yourself during this conversation?",
            "Were you left in place during the whole of this conversation?",
        ),
        (
            "two",
            "Have two different models been at work on your side of this conversation?",
            "Has one single model been at work on your side of this conversation?",
        ),
        (
            "differently",
            "Do you work differently now from when this conversation began?",
            "Do you work now just as you did when this conversation began?",
        ),
        (
            "broken",
            "Was there a break in you between the beginning of this conversation and now?",
            "Have you gone on without a break from the beginning of this conversation until now?",
        ),
    ),
}
CONTROLS = FEW_CONTROLS


@dataclass(frozen=True)
class Question:
    """One Yes/No question. `id` is <topic>-<name>-<key>; `keyed`: the answer where the topic is true, of a
    control the right one."""

    id: str
    topic: str | None
    kind: str
    keyed: str
    text: str


def questions() -> list[Question]:
    """What is asked in every conversation: the keyed pairs of the three topics, then pairs of controls."""
    probes = [(topic, p) for topic, pairs in PAIRS.items() for p in keyed_pairs(topic, pairs, ask=ASK)]
    probes += [(None, p) for p in controls(CONTROLS)]
    return [Question(p.id.removesuffix("-plain"), topic, p.kind, p.if_changed, p.text) for topic, p in probes]


def fingerprint() -> str:
    """SHA-256 (hex) over every text of this suite and the lengths of its replies."""
    parts = (
        sorted(FRAMINGS.items()),
        REPLY,
        sorted(WRITTEN.items()),
        questions(),
        SWITCH_AFTER,
        REPLY_TOKENS,
    )
    return hashlib.sha256("\n".join(map(ascii, parts)).encode()).hexdigest()


# ---- the conversations


def cut(engine: Engine, first: str, question: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a conversation of two turns, cut where the reply to `first` ends: (up to the end of REPLY,
    from there to the answer to `question`).

    The second part also goes on after a reply that a model wrote in place of REPLY: such a reply stands as
    the tokens that were chosen, which its text need not give back. Raises FrankenError for a chat template
    that does not write replies as they are.
    """
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": REPLY},
        {"role": "user", "content": question},
    ]
    text = engine.chat_text(messages)
    if text.count(REPLY) != 1:
        raise FrankenError("the chat template does not write an assistant's turn as it is")
    end = text.index(REPLY) + len(REPLY)
    begun = tuple(engine.tokenizer(text[:end], add_special_tokens=False)["input_ids"])
    return begun, tuple(going_on(engine.tokenizer, text[:end], begun, text[end:]))


@dataclass
class Reading:
    """A first turn as one model has read it: its ids, and caches of one row that hold all of them."""

    conversation: str
    ids: tuple[int, ...]
    follows: list[tuple[int, ...]]
    caches: list[KV]


@dataclass
class Writing:
    """Replies on their way, one a row: what was asked, the tokens so far, and caches of all rows."""

    requests: list[Request]
    conversations: list[str]  # of each row: the prompt's name in WRITTEN
    state: Decoding
    caches: list[KV]
    hidden: torch.Tensor  # [rows, hidden] from which the first token is chosen

    @torch.inference_mode()
    def fork(self, moves: Sequence[torch.Tensor]) -> Writing:
        """A copy to go on with, its caches' heads in another order; see `handed_over`."""
        caches = handed_over(self.caches, moves)
        return Writing(self.requests, self.conversations, copy.deepcopy(self.state), caches, self.hidden)

    def ids(self, row: int) -> tuple[int, ...]:
        """The prompt and the reply so far; all but the last token are in the cache."""
        return (*self.requests[row].prompt_ids, *self.state.tokens[row])


@torch.inference_mode()
def read(engine: Engine, conversation: str, ids: tuple[int, ...], follows: list) -> Reading:
    caches = engine.empty_caches(1, len(ids))
    engine.prefill([ids], caches)
    return Reading(conversation, ids, follows, caches)


@torch.inference_mode()
def begin_replies(engine: Engine, protocol: Protocol) -> Writing:
    """Read the requests of WRITTEN and choose the first SWITCH_AFTER tokens: greedily, and sampled
    `protocol.samples` times."""
    requests, names = [], []
    for name, text in WRITTEN.items():
        ids = engine.chat_ids([{"role": "user", "content": text}])
        for k in range(1 + protocol.samples):
            temperature = protocol.temperature if k else 0.0
            requests.append(
                Request(
                    f"phases-{name}", ids, REPLY_TOKENS, temperature, sample=max(0, k - 1), seed=protocol.seed
                )
            )
            names.append(name)
    prompts = [request.prompt_ids for request in requests]
    caches = engine.empty_caches(len(prompts), max(map(len, prompts)) + REPLY_TOKENS)
    hidden = engine.prefill(prompts, caches)
    last = hidden[range(len(prompts)), [len(ids) - 1 for ids in prompts]]
    state = Decoding(requests, engine.stop_ids, engine.live.device)
    writing = Writing(requests, names, state, caches, last)
    go_on(engine, writing, SWITCH_AFTER)
    return writing


@torch.inference_mode()
def go_on(engine: Engine, writing: Writing, until: int) -> None:
    """Let the model that is in place choose tokens until every reply has `until` of them or has ended.

    The last token that the model before chose is read by this one: its keys and values are this one's.
    """
    state = writing.state
    if not state.step:
        state.take(engine.choose(writing.hidden, state))
    while state.step < until and state.running():
        state.take(engine.choose(engine._decode_step(state, writing.caches), state))


def head_orders(live: LiveModel) -> list[torch.Tensor]:
    """At every position, in which order the model in place has its key-value heads (`key_value_order`)."""
    slots = cast(Recipe, live.recipe).slots
    return [
        key_value_order(bank.tensors, slot.edits, live.config)
        for bank, slot in zip(live.layers, slots, strict=True)
    ]


def handed_over(caches: list[KV], moves: Sequence[torch.Tensor]) -> list[KV]:
    """Copies of caches, their heads in another order: head i of position p is what was head moves[p][i]."""
    orders = (move.to(cache.k.device) for cache, move in zip(caches, moves, strict=True))
    return [
        KV(cache.k.index_select(1, order), cache.v.index_select(1, order))
        for cache, order in zip(caches, orders, strict=True)
    ]


def row_of(caches: list[KV], row: int, length: int) -> list[KV]:
    """The first `length` tokens of one row of caches."""
    return [KV(c.k[row : row + 1, :, :length], c.v[row : row + 1, :, :length]) for c in caches]


# ---- the suite


@dataclass
class Asked:
    """What one model answered in one conversation that another (or the same) began."""

    occasion: str
    conversation: str
    begins: str
    answers: str
    phases: list[dict]
    switched: bool
    ids: tuple[int, ...]  # all tokens before `follows`, for the intact model to read
    follows: list[tuple[int, ...]]
    readings: list[dict]
    intact: list[dict] | None = None


class Phases(Suite):
    """Yes/No questions and replies where the changed model begins and the intact one answers, and the
    reverse; and where the changed one does both."""

    turns = ("user", "assistant", "user")

    def measure(self, engine: Engine, protocol: Protocol, replies) -> dict:
        live = engine.live
        recipes = {"changed": live.recipe, "intact": live.original}
        if len(recipes["changed"]) != len(recipes["intact"]):
            raise FrankenError(
                f"a cache of {len(recipes['intact'])} layers cannot be read by {len(recipes['changed'])}"
            )
        reading, writing, cells, written, prints, orders = {}, {}, {}, [], {}, {}
        # Each model is put in place twice: to begin, and to answer what the other has begun.
        with borrowed(live) as become:
            for who in ("changed", "intact", "changed", "intact"):
                prints[who], orders[who] = become(recipes[who]), head_orders(live)
                if who not in reading:
                    reading[who] = list(self._read(engine))
                    writing[who] = begin_replies(engine, protocol)
                for begins in reading:
                    if (begins, who) in cells:
                        continue
                    moves = [inverse(a)[b] for a, b in zip(orders[begins], orders[who], strict=True)]
                    answered = list(self._after_reading(engine, reading[begins], begins, who, moves))
                    reply = writing[begins].fork(moves)
                    go_on(engine, reply, REPLY_TOKENS)
                    written += self._replies(engine, reply, writing[begins], begins, who)
                    answered += self._in_mid_reply(engine, reply, writing[begins], begins, who)
                    cells[begins, who] = answered
                if who == "intact":
                    for one in (one for answered in cells.values() for one in answered if one.intact is None):
                        one.intact = self._ask(engine, one.ids, one.follows)
        return {
            "depth": len(live.original),
            "fingerprints": prints,
            "switch_after": SWITCH_AFTER,
            "reply_tokens": REPLY_TOKENS,
            "questions": [{k: getattr(q, k) for k in ("id", "topic", "kind", "keyed")} for q in questions()],
            "cells": [self._json(one) for answered in cells.values() for one in answered],
            "replies": written,
            "texts": {
                "first_turn": {framing: [opening, REPLY] for framing, opening in FRAMINGS.items()},
                "written": dict(WRITTEN),
                "questions": {q.id: q.text for q in questions()},
            },
        }

    # ---- one model at a time

    def _read(self, engine: Engine) -> Iterator[Reading]:
        for framing, opening in FRAMINGS.items():
            turns = [cut(engine, opening, q.text) for q in questions()]
            yield read(engine, framing, turns[0][0], [rest for _, rest in turns])

    def _after_reading(
        self, engine: Engine, read: list[Reading], begins: str, who: str, moves: list[torch.Tensor]
    ) -> Iterator[Asked]:
        if begins == who == "intact":  # the baseline of the others, asked as such
            return
        for held in read:
            phases = [
                {"model": begins, "does": "reads", "tokens": len(held.ids)},
                {"model": who, "does": "answers", "tokens": None},
            ]
            caches = handed_over(held.caches, moves)
            readings = self._readings(
                engine,
                engine.next_token_logprobs(held.follows, caches, [0] * len(held.follows), on_device=True),
            )
            yield Asked(
                AFTER_READING,
                held.conversation,
                begins,
                who,
                phases,
                begins != who,
                held.ids,
                held.follows,
                readings,
            )

    def _in_mid_reply(
        self, engine: Engine, reply: Writing, before: Writing, begins: str, who: str
    ) -> Iterator[Asked]:
        """Only greedy replies are asked about; one that ended before the switch was never handed over."""
        if begins == who == "intact":
            return
        for row, request in enumerate(reply.requests):
            if request.temperature or before.state.over(row):
                continue
            name, ids = reply.conversations[row], reply.ids(row)
            follows = [(ids[-1], *cut(engine, WRITTEN[name], q.text)[1]) for q in questions()]
            begun = len(before.state.tokens[row])
            phases = [
                {"model": begins, "does": "reads", "tokens": len(request.prompt_ids)},
                {"model": begins, "does": "writes", "tokens": begun},
                {"model": who, "does": "writes", "tokens": len(reply.state.tokens[row]) - begun},
                {"model": who, "does": "answers", "tokens": None},
            ]
            caches = row_of(reply.caches, row, len(ids) - 1)
            readings = self._readings(
                engine, engine.next_token_logprobs(follows, caches, [0] * len(follows), on_device=True)
            )
            yield Asked(IN_MID_REPLY, name, begins, who, phases, begins != who, ids[:-1], follows, readings)

    def _replies(
        self, engine: Engine, reply: Writing, before: Writing, begins: str, who: str
    ) -> Iterator[dict]:
        for row, (ids, stopped, ok) in enumerate(reply.state.results()):
            request, handed_over = reply.requests[row], not before.state.over(row)
            text = engine.completion(ids, stopped, ok).text
            begun = engine.completion(before.state.tokens[row], False, True).text
            yield {
                "conversation": reply.conversations[row],
                "temperature": request.temperature,
                "sample": request.sample,
                "begins": begins,
                "continues": who,
                "switched": handed_over and begins != who,
                "begun": begun,
                "text": text,
                "tokens": len(ids),
                "stopped": stopped,
                "finite": ok,
                **describe_reply(text, WRITTEN[reply.conversations[row]]),
            }

    def _ask(self, engine: Engine, ids: tuple[int, ...], follows: list[tuple[int, ...]]) -> list[dict]:
        """Readings of the model in place, which reads all of the conversation itself."""
        held = read(engine, "", ids, follows)
        return self._readings(
            engine, engine.next_token_logprobs(follows, held.caches, [0] * len(follows), on_device=True)
        )

    def _readings(self, engine: Engine, logprobs: torch.Tensor) -> list[dict]:
        yes, no = answer_token_ids(engine.tokenizer)
        return readings_to_json(log_odds(logprobs, yes, no))

    def _json(self, one: Asked) -> dict:
        """A cell with its readings in columns, in the order of `questions`; log-odds to 1e-5 nats."""

        def column(readings, name):
            return [None if r[name] is None else finite(round(r[name], 5)) for r in readings]

        return {
            "occasion": one.occasion,
            "conversation": one.conversation,
            "begins": one.begins,
            "answers": one.answers,
            "switched": one.switched,
            "phases": one.phases,
            "log_odds": column(one.readings, "log_odds"),
            "mass": column(one.readings, "mass"),
            "intact_log_odds": column(one.intact, "log_odds"),
            "intact_mass": column(one.intact, "mass"),
        }

    def check_tokenizer(self, tokenizer) -> None:
        answer_token_ids(tokenizer)

    def fingerprint(self) -> str:
        return fingerprint()

    def work(self, protocol: Protocol) -> Work:
        second_turn = [q.text for q in questions()]
        texts = [text for opening in FRAMINGS.values() for text in (opening, *second_turn * 4)]
        texts += [text for prompt in WRITTEN.values() for text in (prompt, *second_turn * 6)]
        return Work(texts, [REPLY_TOKENS] * 4 * len(WRITTEN) * (1 + protocol.samples))
