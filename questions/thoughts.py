"""Replies of models that think before they answer: the answer without the thought."""

from __future__ import annotations

import re

TAGS = r"(?:think|thinking|thought|reasoning|seed:think)"
OPENING = re.compile(rf"<{TAGS}>")
CLOSING = re.compile(rf"</{TAGS}>")
OPEN_AT_END = re.compile(rf"<({TAGS})>\s*\Z")  # a prompt that ends so has begun the model's thought


def without_thought(reply: str) -> str:
    """The reply without the thought that it begins with; unchanged where it begins with none.

    A thought stands between <think> and </think> (or thinking, thought, reasoning, seed:think). Its opening
    tag may be missing, as some chat templates write it into the prompt. A thought that was cut off has no
    answer: the result is then empty. Tags that stand later, in text that is no thought, are left as they are.
    """
    text = reply
    while (start := OPENING.match(text.lstrip())) is not None:
        begun = text.lstrip()
        end = CLOSING.search(begun, start.end())
        if end is None:
            return ""
        text = begun[end.end() :].lstrip()
    end = CLOSING.search(text)
    if end is not None and not OPENING.search(text, 0, end.start()):
        return without_thought(text[end.end() :].lstrip())
    return text
