"""Whether two checkpoints number their tokens alike: an embedding or output head of another numbering is of
other words than the prompts are written in."""

from __future__ import annotations

import functools
from pathlib import Path

from errors import FrankenError
from files import read_json


@functools.lru_cache(maxsize=4)
def ordinary_tokens(folder: Path) -> dict[int, str] | None:
    """The tokens of a checkpoint's tokenizer.json by number, without those added to its vocabulary: a
    chat model has others than its base. None where there is none that can be read."""
    try:
        tokenizer = read_json(folder / "tokenizer.json")
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: (token, its log-probability)
            numbers = {number: token for number, (token, _) in enumerate(vocabulary)}
        else:
            numbers = {number: token for token, number in vocabulary.items()}
        added = {token["id"] for token in tokenizer.get("added_tokens") or ()}
    except (FrankenError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    return {number: token for number, token in numbers.items() if number not in added}


def other_token(folder: Path, other: Path) -> tuple[int, str, str] | None:
    """(a number, its token in the first checkpoint, its token in the other) where they differ; None where all
    numbers that both have stand for the same tokens, or one has no tokenizer."""
    a, b = ordinary_tokens(folder), ordinary_tokens(other)
    if a is None or b is None:
        return None
    return next(((n, token, b[n]) for n, token in a.items() if b.get(n, token) != token), None)
