"""Exporters of tiny pairs, for the tests of what is taken out of the harness."""

import tiny
import torch

from runner.export import Exporter
from runner.pairs import Located
from surgery.weights import Checkpoint


def located(pair: tiny.Tiny, **sources) -> Located:
    made = {n: Checkpoint(n, p) for n, p in pair.paths.items()} | sources
    return Located(pair.paths["instruct"], pair.config, made, [], {})


def exporter(pair: tiny.Tiny, dtype=torch.float32, **sources) -> Exporter:
    return Exporter(located(pair, **sources), dtype, torch.float32, torch.device("cpu"))
