"""What a suite is: the one small interface behind which every file of this folder asks its questions.

A suite says which texts it needs generated and turns the replies into measurements. The requests of all
suites are generated together, so that batches stay full. A suite's result is plain JSON without NaN; a
destroyed model gives None where a number is undefined, never an exception.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from scipy import special

import prompts
from engine.generation import Completion, Engine, Request
from errors import FrankenError
from franken import LiveModel
from planning.asked import Harness
from prompts import GROUPS
from questions.sandbox import Execute
from surgery.recipes import Recipe

# Under this key a suite's measurements may hold numpy arrays by name, which a file beside the JSON keeps.
ARRAYS = "arrays"

logsumexp: Any = special.logsumexp  # by its stubs it may also return signs, which nobody here asks for


@dataclass(frozen=True)
class Protocol:
    """What is asked and how. Two results are comparable if their protocols are equal."""

    suites: tuple[str, ...] = GROUPS["all"]
    samples: int = 1  # replies per free-text probe
    max_new_tokens: int = 80  # of a free-text reply; capability items have budgets of their own
    temperature: float = 0.7  # of free-text replies; capability answers are greedy
    seed: int = 0
    execute_code: Execute = False
    texts: tuple[tuple[str, str], ...] = field(
        default_factory=lambda: tuple(sorted(prompts.NEUTRAL_TEXTS.items()))
    )
    harness: Harness | None = None  # of the suite lm_eval


@dataclass(frozen=True)
class Work:
    """What a suite costs, for the dry run: the texts that are read, and the token budget of every reply."""

    texts: Sequence[str] = ()
    budgets: Sequence[int] = ()


class Suite(ABC):
    """One kind of question. A new suite is a file here and a line in `evaluate.SUITES` and
    `prompts.SUITES`."""

    recorded_as: str | None = None  # the suite whose short form this is, and under which its results stand
    turns: tuple[str, ...] = ("user",)  # the roles of its longest conversation, up to the model's answer

    def requests(self, engine: Engine, protocol: Protocol) -> list[Request]:
        """The replies that are to be generated; none for a suite that reads next-token distributions
        alone."""
        return []

    @abstractmethod
    def measure(self, engine: Engine, protocol: Protocol, replies: list[Completion]) -> dict:
        """The measurements as plain JSON, `replies` being the completions of `requests`, in order."""

    def check_tokenizer(self, tokenizer) -> None:
        """Raises any exception where this suite could not be asked with that tokenizer; called before
        anything runs."""
        return None

    def work(self, protocol: Protocol) -> Work:
        """What the suite reads and generates at most, without a model at hand."""
        return Work()

    def fingerprint(self) -> str | None:
        """SHA-256 (hex) over what it asks beyond the texts of `prompts.fingerprint`; None where there is
        nothing more."""
        return None


@contextmanager
def borrowed(live: LiveModel) -> Iterator[Callable[[Recipe], str]]:
    """For a suite that runs other recipes than the experiment's: `with borrowed(live) as become:`.

    become(recipe) applies a recipe and returns the fingerprint of the weights; `live.original` is the
    unmodified model. When the block ends, in whatever way, the recipe that was running is applied again.
    Raises FrankenError if its weights did not come back to the bit, or if a recipe has not the same weights
    each time that it is applied.
    """
    recipe, before, seen = live.recipe, live.fingerprint(), {}
    if recipe is None:
        raise FrankenError("the live model is in no defined state, to which a suite could go back")
    seen[recipe] = before

    def become(other: Recipe) -> str:
        live.apply(other)
        now = live.fingerprint()
        if seen.setdefault(other, now) != now:
            raise FrankenError(f"a recipe gave other weights than before (fingerprint {now})")
        return now

    try:
        yield become
    finally:
        live.apply(recipe)
    if (after := live.fingerprint()) != before:
        raise FrankenError(f"a suite did not leave the weights as it found them (fingerprint {after})")


def finite(value: float) -> float | None:
    """The number, or None where it is NaN or infinite: JSON holds neither."""
    return float(value) if math.isfinite(value) else None


def reply_json(completion: Completion) -> dict:
    entry = {"text": completion.text, "tokens": len(completion.token_ids), "stopped": completion.stopped}
    return entry if completion.finite else entry | {"finite": False}
