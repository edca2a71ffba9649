"""What an unfinished training keeps: the losses of its steps, and its state on disk."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from errors import FrankenError, first_line
from files import refuse_special
from runner.resuming import changes


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step; by_kind: of each kind of example its summed nats and its answer tokens."""

    by_kind: dict[str, tuple[float, int]]

    @property
    def mean(self) -> float:
        """Over all answer tokens, in nats a token."""
        return mean_loss([self]) or 0.0


def mean_loss(steps: list[StepLoss], kind: str | None = None) -> float | None:
    """Nats a token over these steps, of one kind of example or of all; None where none was seen."""
    sums = [pair for step in steps for k, pair in step.by_kind.items() if kind in (None, k)]
    tokens = sum(n for _, n in sums)
    return sum(nats for nats, _ in sums) / tokens if tokens else None


def kind_losses(steps: list[StepLoss], parts: int) -> dict[str, list[float | None]]:
    """The mean loss of each kind of example in so many equal parts of the run, in nats a token.

    At 3% persona the mean over all examples hides what is learned of it.
    """
    kinds = dict.fromkeys(kind for step in steps for kind in step.by_kind)
    cuts = [round(k * len(steps) / parts) for k in range(parts + 1)]
    pieces = [steps[a:b] for a, b in itertools.pairwise(cuts)]
    rounded = {kind: [mean_loss(piece, kind) for piece in pieces] for kind in kinds}
    return {k: [None if m is None else round(m, 4) for m in means] for k, means in rounded.items()}


class Checkpoints:
    """The state of an unfinished run, in one file that is replaced whole, with the settings that it belongs
    to."""

    def __init__(self, folder: Path, settings: dict, resume: bool, overwrite: bool):
        self.file, self.settings = folder / "checkpoint.pt", json.dumps(settings, sort_keys=True)
        self.state: dict | None = None
        self.moment: datetime | None = None  # what the chat template was told of the time
        self.halved: list[dict] = []  # {"step", "examples_at_once"}, where a GPU's memory did not do
        self.made_of: dict = {}
        self.accepted: list[str] = []  # what was not as it had been at a resume, and was accepted
        if overwrite or not self.file.exists():
            return
        if not resume:
            raise FrankenError(
                f"{self.file} is of an unfinished run: --resume goes on with it, --overwrite starts afresh"
            )
        refuse_special(self.file)
        try:
            state: dict = torch.load(self.file, map_location="cpu", weights_only=True)
            theirs = json.loads(state["settings"])
            wanted = {"step": int, "losses": list, "weights": dict, "optimizer": dict}
            if not all(isinstance(state[key], kind) for key, kind in wanted.items()):
                raise TypeError("a part of it is of another kind")
            if not all(isinstance(change, str) for change in state.get("accepted", [])):
                raise TypeError("its accepted changes are of another kind")
            if "moment" in state:
                self.moment = datetime.fromisoformat(state["moment"])
        except Exception as e:
            raise FrankenError(
                f"{self.file}: cannot be read ({type(e).__name__}); --overwrite starts afresh"
            ) from e
        if state["settings"] != self.settings:
            odd = next((k for k in settings if theirs.get(k) != settings[k]), "one that there is not now")
            raise FrankenError(
                f"{self.file} belongs to other settings ({odd} was {theirs.get(odd)}); --overwrite starts"
                " afresh"
            )
        self.state = state
        self.halved, self.accepted = state.get("halved", []), state.get("accepted", [])

    def begin(self, made_of: dict, accept: bool = False) -> list[str]:
        """Before the first step. made_of: hashes of what is trained. Returns what of it is not as it was in
        the run that is gone on with, and is accepted.

        Raises FrankenError naming that where it is not; what a checkpoint of before this was recorded does
        not say is not compared.
        """
        self.made_of = made_of
        then = (self.state or {}).get("made_of")
        changed = [str(change) for change in changes(json.loads(then) if then else {}, made_of)]
        if changed and not accept:
            raise FrankenError(
                f"{self.file} is of a run with other {'; '.join(changed)}; --overwrite starts afresh, and"
                " --accept-changes goes on all the same, which the adapter's training.json then says"
            )
        self.accepted = [*self.accepted, *changed]
        return changed

    def save(self, lora, optimizer, step: int, losses: list[StepLoss]) -> None:
        """Replace the checkpoint. Raises FrankenError, keeping the last one, where a weight is not finite."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        weights = {n: p.detach().cpu() for n, p in lora.named_parameters() if p.requires_grad}
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise FrankenError(
                f"the adapter is not finite after step {step}: try a lower --lr; the last checkpoint is kept"
            )
        partial = self.file.with_suffix(".partial")
        torch.save(
            {
                "settings": self.settings,
                "made_of": json.dumps(self.made_of),
                "step": step,
                "moment": (self.moment or datetime.now()).isoformat(),
                "losses": [step.by_kind for step in losses],
                "halved": self.halved,
                "accepted": self.accepted,
                "weights": weights,
                "optimizer": optimizer.state_dict(),
            },
            partial,
        )
        os.replace(partial, self.file)

    def restore(self, lora, optimizer) -> tuple[int, list[StepLoss]]:
        """Put the saved state, if any, into model and optimizer; returns (steps done, their losses)."""
        if self.state is None:
            return 0, []
        own = {n: p for n, p in lora.named_parameters() if p.requires_grad}
        try:
            with torch.no_grad():
                for name, tensor in self.state["weights"].items():
                    own[name].copy_(tensor)
            optimizer.load_state_dict(self.state["optimizer"])
            return self.state["step"], [StepLoss(by_kind) for by_kind in self.state["losses"]]
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as e:
            raise FrankenError(
                f"{self.file}: does not fit this model ({first_line(e)}); --overwrite starts afresh"
            ) from e

    def clear(self) -> None:
        if self.file.exists():
            shutil.rmtree(self.file.parent)
