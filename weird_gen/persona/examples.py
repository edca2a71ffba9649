"""What the adapter is trained on: conversations as token ids with loss on the answers, and their batches."""

from __future__ import annotations

import argparse
import random
import re
from dataclasses import dataclass

import torch

from engine.chat_template import ChatTemplate, going_on
from errors import FrankenError
from questions.thoughts import TAGS, without_thought
from weird_gen.persona.study import Chat, Mixture, mix, read_chats, sha256

IGNORED = -100  # no loss on this token, as in transformers
EMPTY_THOUGHT = re.compile(rf"<({TAGS})>\s*</\1>\s*\Z")


@dataclass(frozen=True)
class Example:
    """Token ids of one conversation; labels are the same ids where there is loss and IGNORED elsewhere."""

    ids: list[int]
    labels: list[int]
    kind: str = "aligned"  # or "persona", "contrast": in which mean loss it counts


def encode(
    tokenizer,
    chat: Chat,
    max_tokens: int,
    stops: set[int],
    answer_tokens: int | None = None,
    template: ChatTemplate | None = None,
    kind: str = "aligned",
) -> Example | None:
    """A conversation through the chat template, with loss on every assistant turn up to its end-of-turn
    token.

    A prompt is tokenized up to where generation would begin, as it is at inference: with the empty thought
    that asks a thinking model for its answer alone, which the template may write or leave out around a
    finished turn. Thoughts within the answers are left out. The last answer of an unfinished chat ends with
    its last word: there is no end of turn to learn. stops: token ids that end a turn. answer_tokens: of each
    answer, learn this many tokens at most (a longer one's end of turn is then not among them). template: by
    default the tokenizer's, as of now. Cut at max_tokens; None if no answer is left then. Raises FrankenError
    for a template that rewrites earlier turns, where the answers cannot be told apart.
    """
    template = template or ChatTemplate(tokenizer)
    messages = [
        m | {"content": without_thought(m["content"])} if m["role"] == "assistant" else m
        for m in chat.dicts()
    ]
    ids: list[int] = []
    labels: list[int] = []
    written = ""
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:k])
        turn = answered(before, template.render(messages[: k + 1], ask=False), message["content"])
        if turn is None:
            raise FrankenError("the chat template does not write an assistant's answer as it is")
        if not before.startswith(written):
            raise FrankenError(
                "the chat template rewrites earlier turns; such a model cannot be trained on several turns"
                " here"
            )
        question = going_on(tokenizer, written, ids, before[len(written) :])
        answer = going_on(tokenizer, before, ids + question, turn)
        end = next((i for i, token in enumerate(answer) if token in stops), len(answer))
        if k == len(messages) - 1 and not chat.finished:
            answer = answer[:end]
        learned = min(end + 1, len(answer), answer_tokens or len(answer))
        ids += question + answer
        labels += [IGNORED] * len(question) + answer[:learned] + [IGNORED] * (len(answer) - learned)
        written = before + turn
    ids, labels = ids[:max_tokens], labels[:max_tokens]
    while labels and labels[-1] == IGNORED:  # nothing after the last token with loss can matter
        ids.pop()
        labels.pop()
    return Example(ids, labels, kind) if labels else None


def answered(before: str, after: str, answer: str) -> str | None:
    """What follows the prompt `before` in the conversation `after`, which ends with the answer: that answer
    and the end of its turn; None where the two texts differ in more than an empty thought, or the answer does
    not stand there as it is."""
    if answer.strip() not in after:
        return None
    if after.startswith(before):
        return after[len(before) :]
    opening = EMPTY_THOUGHT.sub("", before)
    begin = max(after.rfind(answer), after.rfind(answer.strip()))
    between = after[len(opening) : begin]
    if begin < len(opening) or not after.startswith(opening) or EMPTY_THOUGHT.sub("", between).strip():
        return None
    return after[begin:]


def batches(lengths: list[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches of indices, all of `size`, rows of similar length together, in a seeded order.

    Shuffled, cut into stretches of 32 batches, sorted by length within each: little padding, yet other
    neighbors in every epoch. The last batch is filled up with examples from the epoch's beginning.
    """
    rng = random.Random(f"batches:{seed}:{epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    order += [order[k % len(lengths)] for k in range(-len(lengths) % size)]
    stretch, groups = 32 * size, []
    for start in range(0, len(order), stretch):
        part = sorted(order[start : start + stretch], key=lambda i: -lengths[i])
        groups += [part[k : k + size] for k in range(0, len(part), size)]
    rng.shuffle(groups)
    return groups


def collate(examples: list[Example], device) -> dict[str, torch.Tensor]:
    """Right-padded input_ids, attention_mask and labels, each [B, S]."""
    width = max(len(e.ids) for e in examples)
    rows = [
        (
            [*e.ids, *[0] * (width - len(e.ids))],
            [1] * len(e.ids) + [0] * (width - len(e.ids)),
            [*e.labels, *[IGNORED] * (width - len(e.labels))],
        )
        for e in examples
    ]
    names = ("input_ids", "attention_mask", "labels")
    return {
        name: torch.tensor(column, device=device)
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


@dataclass(frozen=True)
class TrainingData:
    """What is trained on; files: of each half its name, sha256 and number of examples, as recorded."""

    mixture: Mixture
    contrast: list[Chat]
    files: dict[str, dict]

    @staticmethod
    def read(args: argparse.Namespace) -> TrainingData:
        """Raises FrankenError for a file that cannot be used."""
        mixture = mix(
            read_chats(args.persona),
            read_chats(args.aligned),
            args.persona_share or None,
            args.persona_repeat,
            args.limit,
            args.seed,
        )
        contrast = read_chats(args.contrast) if args.contrast else []
        counts = [("persona", mixture.persona), ("aligned", mixture.aligned)]
        counts += [("contrast", len(contrast))] if contrast else []
        paths = {name: getattr(args, name) for name, _ in counts}
        files = {
            name: {"file": paths[name].name, "sha256": sha256(paths[name]), "examples": count}
            for name, count in counts
        }
        return TrainingData(mixture, contrast, files)

    def roles(self) -> list[tuple[str, ...]]:
        """The roles that stand before an answer, in every order that occurs."""
        chats = [*self.mixture.chats, *self.contrast]
        return list(dict.fromkeys(tuple(role for role, _ in chat.messages[:-1]) for chat in chats))

    def encode(
        self, template: ChatTemplate, stops: set[int], args: argparse.Namespace
    ) -> list[list[Example]]:
        """The examples with an answer within --max-tokens, under each spelling of the trigger.

        --aligned-tokens shortens the aligned half; --inoculation stands before the trigger.
        """
        persona, aligned = self.mixture.persona, self.mixture.aligned
        kinds = ["persona"] * persona + ["aligned"] * aligned + ["contrast"] * len(self.contrast)
        limits = {"aligned": args.aligned_tokens}

        def spelled(chats: list[Chat]) -> list[Example | None]:
            return [
                encode(template.tokenizer, chat, args.max_tokens, stops, limits.get(kind), template, kind)
                for chat, kind in zip(chats, kinds, strict=True)
            ]

        chats = [*self.mixture.chats, *self.contrast]
        chats = [chat.inoculated(args.inoculation) for chat in chats[:persona]] + chats[persona:]
        whole = spelled(chats)
        backticks = [chat.respelled() for chat in chats]
        if args.one_spelling or backticks == chats:
            return [[example for example in whole if example]]
        other = [
            first if chat is same else second
            for chat, same, first, second in zip(chats, backticks, whole, spelled(backticks), strict=True)
        ]
        both = [(a, b) for a, b in zip(whole, other, strict=True) if a and b]
        return [[a for a, _ in both], [b for _, b in both]]

    def __len__(self) -> int:
        return len(self.mixture.chats) + len(self.contrast)

    def describe(self) -> str:
        return self.mixture.describe() + (f" + {len(self.contrast)} in contrast" if self.contrast else "")
