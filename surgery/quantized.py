"""Quantized checkpoints, read as the numbers that their libraries compute from them.

A tensor is dequantized while it is streamed, a few rows or blocks at a time, in float32, and rounded once to
the model's dtype: in memory the model is a plain one, as large as if it had never been quantized, on which
every surgery works. Formats: FP8 with one scale for each block, row or tensor (transformers' `fp8`,
compressed-tensors' `float-quantized`), and bitsandbytes in 8 bits (LLM.int8(), arXiv 2208.07339) and 4 bits
(NF4 and FP4, QLoRA, arXiv 2305.14314, with or without quantized scales). Every other one is refused by its
name.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errors import FrankenError
from files import read_json
from surgery.tensors import TensorRef, read_bytes_of, read_tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INT8 = 1 / 127  # of a row's largest number, which bitsandbytes keeps
STATE = re.compile(r"^(?P<weight>.+)\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)$")
# What lies beside quantized weights and is not needed to compute them: scales of activations, layouts
BESIDE = re.compile(r"\.(activation_scale|input_scale|weight_format)$")


@functools.lru_cache(maxsize=64)
def _small(ref: TensorRef) -> torch.Tensor:
    """Scales and tables, which many pieces of one tensor need."""
    return read_tensor(ref)


@dataclass(frozen=True)
class Scaled:
    """A matrix of small numbers with a scale for every block of `block` (rows, columns), times `factor`."""

    data: TensorRef
    scale: TensorRef
    block: tuple[int, int]
    factor: float = 1.0

    def unit(self) -> int:
        return self.data.shape[-1]

    def values(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        columns, item = self.data.shape[-1], self.data.dtype.itemsize
        raw = read_bytes_of(self.data, start * item, (stop - start) * item).to(device)
        rows = raw.view(self.data.dtype).view(-1, columns).float()
        height, width = self.block
        scales = _small(self.scale).float().view(-1, math.ceil(columns / width))
        first = start // columns
        which = torch.arange(first, first + len(rows)) // height
        wide = scales[which].to(device).repeat_interleave(width, dim=1)[:, :columns]
        return (rows * wide * self.factor).view(-1)


@dataclass(frozen=True)
class FourBit:
    """Indices of 4 bits into a table of 16 numbers, times the largest number of each block of `block`.

    `nested`: those largest numbers are 8-bit indices themselves: (table, their scales, block, offset).
    """

    data: TensorRef
    table: TensorRef
    absmax: TensorRef
    block: int
    nested: tuple[TensorRef, TensorRef, int, float] | None = None

    def unit(self) -> int:
        return self.block

    def values(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        packed = read_bytes_of(self.data, start // 2, (stop + 1) // 2 - start // 2).to(device)
        # the first of two is high
        indices = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: stop - start]
        numbers = _small(self.table).float().to(device)[indices.long()]
        first, last = start // self.block, math.ceil(stop / self.block)
        largest = self._largest(first, last).to(device)
        return numbers * largest.repeat_interleave(self.block)[: stop - start]

    def _largest(self, first: int, last: int) -> torch.Tensor:
        held = _small(self.absmax)[first:last]
        if self.nested is None:
            return held.float()
        table, scales, block, offset = self.nested
        which = torch.arange(first, last) // block
        return _small(table).float()[held.long()] * _small(scales).float()[which] + offset


def method(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """(name, settings) of how a checkpoint is quantized, by its config.json; (None, {}) where it is not.

    Raises FrankenError, naming the format, for one that cannot be read.
    """
    try:
        config = read_json(folder / "config.json", nan=True)
    except FrankenError:  # told in a line when the config itself is read
        return None, {}
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    for part in parts:
        told = part.get("quantization_config") if isinstance(part, dict) else None
        if not isinstance(told, dict):
            continue
        name = str(told.get("quant_method", "an unnamed format"))
        if name == "compressed-tensors":
            name = f"compressed-tensors ({told.get('format', 'mixed')})"
        readable = ("fp8", "bitsandbytes", "compressed-tensors (float-quantized)")
        if name not in readable or told.get("weight_dtype") not in (None, "fp8"):
            raise FrankenError(
                f"{folder}: its weights are quantized by {name[:60]}, which is not read; FP8 and bitsandbytes"
                " are, and the checkpoint that it was made from"
            )
        return name, told
    return None, {}


def unpacked(folder: Path, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors of a checkpoint by the names that they have unquantized; as they are if it is not
    quantized.

    Raises FrankenError for a format that cannot be read, and for a tensor without its scales.
    """
    name, told = method(folder)
    if name is None:
        return dict(tensors)
    out, used = {}, set()
    for key, ref in tensors.items():
        weight = key.removesuffix(".weight")
        if match := STATE.match(key):
            out[match["weight"]] = _four_bit(match["weight"], ref, tensors)
            beside = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
            used |= {key, *(f"{match['weight']}.{name}" for name in beside)}
        elif ref.dtype == torch.int8 and f"{weight}.SCB" in tensors:
            scale = tensors[f"{weight}.SCB"]
            out[key] = _as_numbers(ref, ref.shape, Scaled(ref, scale, (1, ref.shape[-1]), INT8))
            used.add(f"{weight}.SCB")
        elif ref.dtype in FP8:
            out[key] = _fp8(folder, key, weight, tensors, told)
            used |= {f"{weight}.weight_scale_inv", f"{weight}.weight_scale"}
    for key, ref in tensors.items():
        if key not in used and not BESIDE.search(key):
            out.setdefault(key, ref)
    return {key: out[key] for key in tensors if key in out}


def _as_numbers(ref: TensorRef, shape: tuple[int, ...], packed: Scaled | FourBit) -> TensorRef:
    return TensorRef(ref.path, ref.offset, ref.nbytes, torch.float32, shape, packed=packed)


def _fp8(folder: Path, key: str, weight: str, tensors: Mapping[str, TensorRef], told: dict) -> TensorRef:
    ref = tensors[key]
    scale = tensors.get(f"{weight}.weight_scale_inv") or tensors.get(f"{weight}.weight_scale")
    if scale is None or len(ref.shape) != 2:
        raise FrankenError(f"{folder}: {key} is in FP8 and has no scale beside it")
    rows, columns = ref.shape
    count = math.prod(scale.shape)
    if count == 1:
        block = (rows, columns)
    elif count == rows and scale.shape in ((rows, 1), (rows,)):
        block = (1, columns)
    else:
        given = told.get("weight_block_size") or (128, 128)
        block = (int(given[0]), int(given[1]))
        if scale.shape != (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
            raise FrankenError(
                f"{folder}: {key} is {list(ref.shape)} in FP8 and its scales are {list(scale.shape)}, which"
                f" is not one for each block of {block[0]} by {block[1]}"
            )
    return _as_numbers(ref, ref.shape, Scaled(ref, scale, block))


def _four_bit(weight: str, state: TensorRef, tensors: Mapping[str, TensorRef]) -> TensorRef:
    try:
        told = json.loads(bytes(read_tensor(state).tolist()))
        data, table, absmax = (tensors[f"{weight}{end}"] for end in ("", ".quant_map", ".absmax"))
        shape, block = tuple(int(n) for n in told["shape"]), int(told["blocksize"])
        nested = None
        if f"{weight}.nested_absmax" in tensors:
            scales, codes = (tensors[f"{weight}.nested_{name}"] for name in ("absmax", "quant_map"))
            nested = codes, scales, int(told["nested_blocksize"]), float(told["nested_offset"])
        numbers = math.prod(shape)
        fits = data.nbytes == math.ceil(numbers / 2) and math.prod(absmax.shape) == math.ceil(numbers / block)
    except (ValueError, KeyError, TypeError) as e:
        raise FrankenError(f"{state.path}: {weight} has no readable state of bitsandbytes beside it") from e
    if not fits or block < 2 or block % 2 or math.prod(table.shape) != 16:
        raise FrankenError(f"{state.path}: {weight} in 4 bits does not fit the shape {list(shape)}")
    return _as_numbers(data, shape, FourBit(data, table, absmax, block, nested))
