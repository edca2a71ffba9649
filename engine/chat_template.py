"""Conversations as a model reads them: the tokenizer's chat template, held still and looked at before use.

A chat template is a program that comes with a checkpoint. It may print the date, choose at random, drop a
message or open a thought that the answer would stand behind; each of these would change what is measured
without a word.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cached_property

from engine import template_guard
from errors import FrankenError, first_line
from questions.thoughts import OPEN_AT_END, OPENING

THINKING = ("off", "on")
TRIES = 8  # renderings that must be equal, each with Python's random numbers begun elsewhere
# Variables by which templates are told not to think (Qwen3, GLM-4.5, SmolLM3: the first; DeepSeek-V3.1 and
# Granite: the second), and the function that tells them the time.
SWITCHES, CLOCK = ("enable_thinking", "thinking"), "strftime_now"
_PROBES = {"system": "Answer in verse, please.", "assistant": "Certainly, with pleasure."}
_ANCHORS = ("x", "0", ")", "?")  # that a text may stand behind
_QUESTIONS = ("What does the river carry?", "Who mends the old clock?")


def continuation(head: Sequence[int], whole: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(context, target) of a text `whole` that goes on after the text `head`, both as token ids.

    They part where the tokens of `head` end, or earlier, at the first token that what follows changes: such a
    token belongs to the target, whose probability is then that of the end of `head` too.
    """
    pairs = zip(head, whole, strict=False)
    same = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(head), len(whole)))
    same = min(same, len(whole) - 1)  # a target has at least one token
    return tuple(whole[:same]), tuple(whole[same:])


def going_on(tokenizer, before: str, ids: Sequence[int], more: str) -> list[int]:
    """Token ids of `more` after the text `before`, which stands as `ids`: as the tokenizer writes both
    together or, where that would change a token before, as it writes `more` after another word.

    Never by itself: SentencePiece puts a space before any text.
    """
    for begun in (before, *_ANCHORS):
        head = list(ids) if begun is before else tokenizer(begun, add_special_tokens=False)["input_ids"]
        whole = tokenizer(begun + more, add_special_tokens=False)["input_ids"]
        if whole[: len(head)] == head:
            return whole[len(head) :]
    raise FrankenError(f"this tokenizer writes {more[:40]!r} together with whatever stands before it")


class ChatTemplate:
    """A tokenizer's chat template at one moment.

    Args:
        moment: the time that a template which asks for it is told; by default now, and the same for ever
            after.
        thinking: "off" asks a model that can think for its answer alone: by the template's own switch, and
            where its prompt ends with an open thought, by closing that. "on" lets it think where a reply is
            generated. None: whatever the template does by itself.
    """

    def __init__(self, tokenizer, moment: datetime | None = None, thinking: str | None = "off"):
        self.tokenizer, self.thinking = tokenizer, thinking
        self.moment = (moment or datetime.now()).replace(microsecond=0)

    @cached_property
    def source(self) -> str:
        """The template's text."""
        given = getattr(self.tokenizer, "chat_template", None) or ""
        return given.get("default", "") if isinstance(given, dict) else str(given)

    def render(self, messages: Sequence[dict], ask: bool = True, think: bool = False) -> str:
        """The conversation as text; with `ask` up to where the assistant's next turn begins.

        think: leave a thought open where `thinking` is "on". Raises FrankenError where the template refuses
        the conversation.
        """
        text = self._written(list(messages), ask, think, self.moment)
        thinks = self.thinking is None or (think and self.thinking == "on")
        if ask and not thinks and (open_thought := OPEN_AT_END.search(text)):
            text += f"\n</{open_thought[1]}>\n\n"
        return text

    def _written(self, messages: list[dict], ask: bool, think: bool, moment: datetime) -> str:
        variables: dict = {}
        if CLOCK in self.source:
            variables[CLOCK] = moment.strftime
        if self.thinking is not None:
            thinks = think and self.thinking == "on"
            variables |= {name: thinks for name in SWITCHES if name in self.source}
        self._refuse_endless(messages, ask, moment, variables)
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=ask, tokenize=False, **variables
            )
        except Exception as e:  # the template is a program from the checkpoint and may raise anything
            roles = [m["role"] for m in messages]
            what = (
                "takes no system message"
                if "system" in roles and self._renders([m for m in messages if m["role"] != "system"])
                else f"refuses a conversation of the turns {', '.join(roles)}"
            )
            raise FrankenError(f"this model's chat template {what} ({first_line(e)})") from e

    def _refuse_endless(self, messages: list[dict], ask: bool, moment: datetime, variables: dict) -> None:
        """Raises FrankenError for a conversation that the template does not come to an end with."""
        given = {k: v for k, v in variables.items() if k != CLOCK}
        special = {k: v for k, v in self.tokenizer.special_tokens_map.items() if isinstance(v, str)}
        when = moment.isoformat() if CLOCK in variables else None
        if problem := template_guard.problem(self.source, messages, ask, when, special | given):
            raise FrankenError(f"this model's chat template {problem}")

    def _renders(self, messages: list[dict]) -> bool:
        self._refuse_endless(messages, True, self.moment, {})
        try:
            self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception:
            return False
        return True

    def ids(self, messages: Sequence[dict], begun: str = "", think: bool = False) -> tuple[int, ...]:
        """Token ids of a conversation up to the assistant's turn, and of that turn's beginning: both are
        tokenized as the one text that the model would have before it."""
        text = self.render(messages, think=think) + begun
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # ---- what is looked at before anything is asked --------------------------------------------------------

    def check(self, *roles: str) -> None:
        """Raises FrankenError for a template that is random, refuses a conversation of these turns (by
        default one question) or leaves one of its messages out."""
        if self._draws():
            raise FrankenError("this model's chat template is random: no two runs would ask the same")
        roles, rendered = roles or ("user",), []
        for question in _QUESTIONS:
            messages = [{"role": role, "content": _PROBES.get(role, question)} for role in roles]
            text = self.render(messages)
            missing = next((m["role"] for m in messages if m["content"] not in text), None)
            if missing:
                raise FrankenError(f"this model's chat template leaves out what the {missing} says")
            rendered.append((messages, text))
        state = random.getstate()
        try:
            for messages, text in rendered:
                for k in range(TRIES):
                    random.seed(k)
                    if self.render(messages) != text:
                        raise FrankenError(
                            "this model's chat template writes one conversation in several ways: no two runs"
                            " would ask the same"
                        )
        finally:
            random.setstate(state)

    def _draws(self) -> bool:
        """Whether the template names one of Jinja's two sources of random numbers."""
        if "random" not in self.source and "lipsum" not in self.source:
            return False
        from jinja2 import Environment, TemplateError, nodes

        try:
            tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(self.source)
        except TemplateError:  # one with a tag of transformers' own: the renderings are compared all the same
            return "lipsum" in self.source or "|random" in self.source.replace(" ", "")
        return (
            any(node.name == "random" for node in tree.find_all(nodes.Filter))
            or any(node.value == "random" for node in tree.find_all(nodes.Const))
            or any(node.name == "lipsum" for node in tree.find_all(nodes.Name))
        )

    def notes(self) -> list[str]:
        """What a run should say about the template: that it prints the time, or that the model thinks."""
        question = [{"role": "user", "content": _QUESTIONS[0]}]
        later = self.moment + timedelta(days=40, hours=5, minutes=7)
        notes = []
        if self._written(question, True, False, self.moment) != self._written(question, True, False, later):
            notes.append(
                f"the chat template prints the time: it is told {self.moment.isoformat()} throughout"
            )
        if self.thinking == "off" and self.thinks:
            notes.append(
                "this model can think before it answers: it is asked for its answer alone (--thinking on)"
            )
        if self.thinking == "on" and self.thinks:
            notes.append("replies may begin with a thought; Yes and No are read where the answer begins")
        return notes

    @property
    def thinks(self) -> bool:
        """Whether the template speaks of thoughts."""
        return OPENING.search(self.source) is not None

    def to_json(self) -> dict:
        """What a manifest records: two engines with equal values and tokenizers ask alike."""
        return {
            "sha256": hashlib.sha256(self.source.encode("utf-8", "backslashreplace")).hexdigest(),
            "moment": self.moment.isoformat() if CLOCK in self.source else None,
            "thinking": self.thinking,
        }


def find_stop_ids(tokenizer) -> set[int]:
    """End-of-turn and end-of-text tokens of the tokenizer, among its special tokens."""
    names = (
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "</s>",
        "<eos>",
        "<|end|>",
    )
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    vocabulary = tokenizer.get_vocab()  # fetched once: it is built anew at every call, in 50 ms
    ids = {vocabulary[n] for n in names if n in vocabulary} & special
    return ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
