"""What every part of the harness may raise for its user, and how that, a number or a name is put in words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Controls, directions and separators of text, zero-width characters, lone surrogates, tags, noncharacters.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e0fff]"
)


def printable(text: str) -> str:
    """Text that a terminal or a page may show: what hides or reorders text, moves a cursor or cannot be
    encoded is spelled out; lines and tabs stay."""
    if text.isprintable() and text.isascii():  # most are
        return text
    return HIDDEN.sub(
        lambda m: chr(0x2400 + ord(m[0])) if m[0] < " " else f"⟨U+{ord(m[0]):04X}⟩",
        text.replace("\r\n", "\n"),
    )


def one_line(text: str) -> str:
    """printable text without ends of lines, which a name may hold."""
    return printable(text.strip()).replace("\n", "␊")


def many(n: int, what: str, of_them: str = "") -> str:
    """ "1 placebo", "21 placebos", "1,000 placebos"; `of_them`: the plural where no s makes it."""
    return f"{n:,} {what if n == 1 else of_them or what + 's'}"


def nearest(word: str, known: Iterable[str]) -> str:
    """The way on for a mistyped name, to be added to an error's line; empty where none is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; the nearest is {near[0]!r}" if near else ""


class FrankenError(Exception):
    """Something the user can mend: the message is one line that says what is wrong and, where there is one,
    the way on.

    The line may hold names of files, of tensors and other people's words: what it is printed as is harmless
    to a terminal, and one line.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class RecipeError(ValueError):
    """An operation that makes no sense on this recipe: a layer out of range, overlapping chunks, ..."""


def first_line(e: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
