"""Exporters of tiny pairs, for the tests of what is taken out of the harness."""

import os
import resource
import signal
from pathlib import Path

import tiny
import torch
from transformers import AutoConfig

from runner import commands, export
from runner.export import Chosen, Exporter
from runner.pairs import Located
from surgery.recipes import blend, identity, permute_units
from surgery.weights import Checkpoint


def located(pair: tiny.Tiny, **sources) -> Located:
    made = {n: Checkpoint(n, p) for n, p in pair.paths.items()} | sources
    return Located(pair.paths["instruct"], pair.config, made, [], {})


def exporter(pair: tiny.Tiny, dtype=torch.float32, **sources) -> Exporter:
    return Exporter(located(pair, **sources), dtype, torch.float32, torch.device("cpu"))


# ---- in a process of its own (small_battery.forked) --------------------------------------------------------


def killed_at(where: str, after: int, words: list[str]) -> None:
    """franken.py's command in this process, which is killed when it calls `export.WHERE` so many times."""
    whole, left = getattr(export, where), [after]

    def dying(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    setattr(export, where, dying)
    commands.main(words)


def measured(folder: Path, layers: int) -> None:
    """Export folder/instruct blended with folder/base to folder/out; by how many kB this process grew
    meanwhile is written to folder/grown."""
    torch.set_num_threads(1)
    sources = {name: Checkpoint(name, folder / name) for name in ("instruct", "base")}
    config = AutoConfig.from_pretrained(folder / "instruct")
    here = Located(folder / "instruct", config, sources, [], {})
    made = Exporter(here, torch.float32, torch.float32, torch.device("cpu"))
    made.write(Chosen("warm", identity(layers)), folder / "warm")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recipe = permute_units(blend(identity(layers), "base", [0.5] * layers), 0)
    made.check = lambda recipe: None
    made.write(Chosen("mine", recipe), folder / "out")
    (folder / "grown").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
