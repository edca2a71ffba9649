"""One tensor on disk: where it lies, what reads it, and what it is made of."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from errors import FrankenError, first_line
from files import refuse_special

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# What other parts of a checkpoint hold (counters, positions of image patches): known, but never operated on.
OTHER_DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies on disk: `nbytes` bytes at `offset` of `path`.

    With `parts` it is those, one after the other in memory, wherever they lie (a layer's experts); with
    `packed` its numbers have to be computed from what is there (a quantized tensor). `path` is then that of
    the first one, for people.
    """

    path: str
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[TensorRef, ...] = ()
    packed: Packed | None = None


class Packed(Protocol):
    """How the numbers of a quantized tensor are computed; see `surgery.quantized`."""

    def unit(self) -> int:
        """Numbers that are computed together: pieces begin and end at its multiples."""
        ...

    def values(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Float32 numbers [start, stop) of the flattened tensor, computed on the device."""
        ...


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of one safetensors file, by name.

    The library reads the header too and refuses what makes no sense in it: offsets that are negative,
    overlap, leave gaps or lie beyond the file. Raises FrankenError if the file is missing, is not
    safetensors, is shorter than its header says, or holds a dtype that is not known. Whether a tensor can be
    operated on is another question: see `refuse_dtype`.
    """
    refuse_special(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise FrankenError(f"{path}: not a complete safetensors file ({size} bytes)")
            header = json.loads(f.read(length))
        entries = [
            (k, *e["data_offsets"], e["dtype"], tuple(e["shape"]))
            for k, e in header.items()
            if k != "__metadata__"
        ]
    except OSError as e:
        raise FrankenError(f"{path}: cannot read the weights: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise FrankenError(f"{path}: the safetensors header is corrupt") from e
    refs = {}
    for name, start, stop, kind, shape in entries:
        if 8 + length + stop > size:
            raise FrankenError(f"{path}: truncated: {size} bytes, {name} ends at byte {8 + length + stop}")
        dtype = DTYPES.get(kind) or OTHER_DTYPES.get(kind)
        if dtype is None:
            raise FrankenError(f"{path}: {name} has dtype {kind}, which is not known")
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise FrankenError(f"{path}: {name}: {stop - start} bytes do not make the shape {list(shape)}")
        refs[name] = TensorRef(str(path), 8 + length + start, stop - start, dtype, shape)
    try:
        with safe_open(path, framework="pt") as library:
            same = set(library.keys()) == set(refs) and all(
                tuple(library.get_slice(name).get_shape()) == ref.shape for name, ref in refs.items()
            )
    except (SafetensorError, OSError, ValueError, TypeError) as e:
        raise FrankenError(f"{path}: the safetensors header is corrupt ({first_line(e)})") from e
    if not same:
        raise FrankenError(f"{path}: the safetensors header is corrupt (it can be read in two ways)")
    return refs


def refuse_dtype(name: str, ref: TensorRef) -> None:
    """Raises FrankenError for a tensor that no surgery can change, such as quantized weights."""
    if ref.dtype not in DTYPES.values():
        kind = next(kind for kind, dtype in OTHER_DTYPES.items() if dtype == ref.dtype)
        raise FrankenError(
            f"{ref.path}: {name} has dtype {kind}; only {', '.join(DTYPES)} can be operated on"
        )


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """One tensor, read into fresh CPU memory. Raises FrankenError if the file ends early."""
    out = torch.empty(ref.shape, dtype=ref.dtype)
    if ref.packed is not None:
        return out.view(-1).copy_(ref.packed.values(0, out.numel(), out.device)).view(ref.shape)
    if ref.parts:
        return torch.cat([read_tensor(part).view(-1) for part in ref.parts], out=out.view(-1)).view(ref.shape)
    with open(ref.path, "rb", buffering=0) as f:
        read_exactly(f.fileno(), as_bytes(out), ref.offset, ref.path)
    return out


def read_bytes_of(ref: TensorRef, start: int, nbytes: int) -> torch.Tensor:
    """Bytes [start, start + nbytes) of a plain tensor as uint8 on the CPU. Raises FrankenError if the file
    ends early."""
    out = torch.empty(nbytes, dtype=torch.uint8)
    with open(ref.path, "rb", buffering=0) as f:
        read_exactly(f.fileno(), out.numpy(), ref.offset + start, ref.path)
    return out


def joined(parts: Sequence[TensorRef], shape: tuple[int, ...]) -> TensorRef:
    """Several tensors as one of that shape, which they fill one after the other."""
    first, nbytes = parts[0], sum(part.nbytes for part in parts)
    return TensorRef(first.path, first.offset, nbytes, first.dtype, shape, tuple(parts))


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as a flat uint8 array, shared, not copied."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def read_exactly(fd: int, into: np.ndarray, offset: int, path: str) -> None:
    view, done = memoryview(into.data), 0
    while done < len(view):
        try:
            n = os.preadv(fd, [view[done:]], offset + done)  # releases the GIL, so reads run side by side
        except OSError as e:
            raise FrankenError(f"{path}: reading the weights failed: {e.strerror}") from e
        if n == 0:
            raise FrankenError(f"{path}: the file ends early, at byte {offset + done}")
        done += n
