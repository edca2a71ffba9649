"""What every part of the harness may raise for its user, and how an error is told in one line."""

from __future__ import annotations


class FrankenError(Exception):
    """Something the user can mend: the message is one line that says what is wrong and, where there is one,
    the way on."""


class RecipeError(ValueError):
    """An operation that makes no sense on this recipe: a layer out of range, overlapping chunks, ..."""


def first_line(e: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
