"""Which experiments can be a checkpoint, and where one may be written: what is refused before torch is
imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from errors import FrankenError
from files import refuse_place
from prompts import ONE_DEPTH
from surgery.recipes import Recipe

RECORD = "frankenmodel.json"  # in the folder: what it was made of
SHARD_BYTES = 5_000_000_000  # of one file at most, unless a single tensor is larger


def refuse_inexpressible(
    name: str, recipe: Recipe, suites: Sequence[str] | None, control: str | None
) -> None:
    """Raises FrankenError, naming the experiment, for what no weights and no config of transformers say."""
    if control == "injection":
        raise FrankenError(
            f"{name} cannot be a checkpoint: it adds a concept to activations, which no weights say"
        )
    if of_two := [suite for suite in suites or () if suite in ONE_DEPTH]:
        raise FrankenError(
            f"{name} cannot be a checkpoint: {of_two[0]} is a conversation of two models, and a checkpoint is"
            " one"
        )
    if recipe.parallel:
        start, stop = recipe.parallel[0]
        raise FrankenError(
            f"{name} cannot be a checkpoint: positions [{start}:{stop}] run side by side (parallel layers),"
            " and transformers runs layers one after the other"
        )
    for p, slot in enumerate(recipe.slots):
        if slot.scale != 1:
            raise FrankenError(
                f"{name} cannot be a checkpoint: position {p} contributes {slot.scale:g} of what its layer"
                " makes (attenuate, or repeat and double with a scale), which no weights say"
            )


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises FrankenError for a folder that may not be written: one that holds something, unless `overwrite`
    is said and it is an export's."""
    refuse_place(folder)
    try:
        os.lstat(folder)
    except FileNotFoundError:
        return
    except OSError as e:
        raise FrankenError(f"cannot write {folder}: {e.strerror}") from e
    if folder.is_symlink() or not folder.is_dir():
        raise FrankenError(f"{folder} is there and is no folder")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise FrankenError(f"{folder} is not empty; --overwrite replaces an earlier export")
    if not (folder / RECORD).is_file():
        raise FrankenError(
            f"{folder} was not written by export (there is no {RECORD} in it), so --overwrite leaves it alone"
        )


@dataclass(frozen=True)
class Chosen:
    """What is taken out of the harness: a name, its recipe, and what else is known of the experiment."""

    name: str
    recipe: Recipe
    change: str = ""  # one line for people
    hypothesis: str = ""
    suites: tuple[str, ...] | None = None
    control: str | None = None
