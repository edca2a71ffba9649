"""What the command line's words ask, as far as no suite is needed to tell: suites by name, a text for
perplexity, tasks of lm-evaluation-harness. torch is not imported here, so that a typo is told at once."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from errors import FrankenError, nearest
from files import read_bytes
from prompts import GROUPS, SUITES


@dataclass(frozen=True)
class Harness:
    """What lm-evaluation-harness is to ask: tasks by name, a folder of further ones, documents of each at
    most."""

    tasks: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None


def parse_suites(text: str) -> tuple[str, ...]:
    """Suite names from "introspection,perplexity"; groups are expanded. Raises FrankenError for an unknown
    name."""
    names: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in GROUPS and name not in SUITES:
            known = [*SUITES, *GROUPS]
            raise FrankenError(f"unknown suite {name!r}; there are {', '.join(known)}{nearest(name, known)}")
        names += GROUPS.get(name, (name,))
    if not names:
        raise FrankenError("no suite is named")
    return tuple(dict.fromkeys(names))


def read_text(path: str) -> tuple[tuple[str, str], ...]:
    """A user's text for the perplexity suite. Raises FrankenError if it cannot be read as UTF-8 or is
    empty."""
    try:
        text = read_bytes(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise FrankenError(f"{path}: cannot be read as UTF-8 text") from e
    if len(text.split()) < 2:
        raise FrankenError(f"{path}: holds no text to measure perplexity on")
    return ((Path(path).name, text),)


def check_installed() -> None:
    """Raises FrankenError if lm_eval is not installed; it is not imported."""
    try:
        there = importlib.util.find_spec("lm_eval") is not None
    except ValueError:  # sys.modules says that it is not there
        there = False
    if not there:
        raise FrankenError("--lm-eval needs lm-eval: pip install lm-eval")
