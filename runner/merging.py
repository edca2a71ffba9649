"""A LoRA adapter merged into a checkpoint, once, in the cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch

from errors import FrankenError
from runner.cache import cache_dir, cannot_keep, is_kept, keep, sha256_of, workspace, write_safetensors
from surgery.tensors import read_tensor
from surgery.weights import Adapter

BESIDE = ("*.json", "*.jinja", "*.model", "*.txt")  # what a checkpoint has besides its weights


def merged(adapter: Adapter) -> Path:
    """A folder with the checkpoint under the adapter, its layers changed by it.

    Each tensor is read, scale * B @ A is added in float32 and the sum rounded once to the tensor's own dtype.
    In a model of that dtype, and in any model where the checkpoint is float32, these are the bits of the
    adapter as a source of layers. The folder is named by the hashes of all that goes in.
    Raises FrankenError if a file cannot be read or the cache cannot be written.
    """
    under = adapter.under
    if under.quantized:
        raise FrankenError(
            f"{under.path}: an adapter is not merged into weights quantized by {under.quantized}; as a"
            " --source it works"
        )
    beside = sorted({f for pattern in BESIDE for f in under.path.glob(pattern)})
    beside = [f for f in beside if not f.name.endswith(".index.json")]  # all shards become one file
    files = [*adapter.files, adapter.path / "adapter_config.json", *under.files, *beside]
    names = [f"{file.name} {sha256_of(file)}" for file in files]
    final = cache_dir() / f"merged-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]}"
    if is_kept(final):
        return final
    where = {ref: (i, name) for i, layer in enumerate(under.layers) for name, ref in layer.items()}

    def make(key: str) -> torch.Tensor:
        ref = under.tensors[key]
        tensor = read_tensor(ref)
        delta = adapter.delta(*where[ref], torch.device("cpu")) if ref in where else None
        return tensor if delta is None else (tensor.float() + delta).to(tensor.dtype)

    try:
        with workspace(final.parent) as work:
            print(f"Merging {adapter.path.name} into the instruct side (once)...", file=sys.stderr)
            out = work / "merged"
            out.mkdir()
            for file in beside:
                shutil.copyfile(file, out / file.name)
            shapes = {key: (ref.dtype, ref.shape) for key, ref in under.tensors.items()}
            write_safetensors(out / "model.safetensors", shapes, make)
            keep(out, final)
    except OSError as e:
        raise cannot_keep(final.parent, e) from e
    return final
