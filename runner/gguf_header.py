"""Whether a GGUF file's header can be what it says, before the `gguf` library reads it.

The library takes a list's length as it stands and goes on beyond the end of the file, for ever where the
length says so, and it looks for tensors wherever an offset points. Here every count, length and offset is
held against the file's size first. Format: docs/gguf.md of ggml.
"""

from __future__ import annotations

import mmap
import struct
from itertools import pairwise
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

VERSIONS = (2, 3)
MOST_DIMENSIONS = 4  # ggml's own limit
MOST_ITEMS = 4_000_000  # of all lists together; a vocabulary of 262,144 with its merges has about a million
STRING, ARRAY, UINT32 = 8, 9, 4
# Bytes of a value by its type's number; strings and lists say their own.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class _Walk:
    """A place in the file that goes forward, and never beyond its end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at, self.items = data, 0, 0

    def skip(self, count: int) -> int:
        """The place before `count` bytes, which are there."""
        start = self.at
        if count > len(self.data) - start:
            raise ValueError(f"{count} bytes from byte {start} on are asked for, beyond the end of the file")
        self.at += count
        return start

    def number(self, form: str) -> int:
        return struct.unpack_from("<" + form, self.data, self.skip(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        length = self.number("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8")

    def value(self, kind: int) -> None:
        if kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == STRING:
            self.skip(self.number("Q"))
        elif kind == ARRAY:
            self._items(self.number("I"), self.number("Q"))
        else:
            raise ValueError(f"a value of the unknown type {kind}")

    def _items(self, kind: int, count: int) -> None:
        self.items += count
        if self.items > MOST_ITEMS:
            raise ValueError(f"its lists have more than {MOST_ITEMS} entries")
        if kind in SIZES:
            self.skip(SIZES[kind] * count)
        elif kind == STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"a list of values of type {kind}")


def check_header(path: Path) -> None:
    """Raises ValueError, with what is wrong, for a file that no complete GGUF file can be; OSError if it
    cannot be read. Takes time and memory by the length of what is there, whatever the header says."""
    with path.open("rb") as file:
        if file.seek(0, 2) < 24:
            raise ValueError("it is shorter than a header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(data)


def _check(data: mmap.mmap) -> None:
    walk = _Walk(data)
    # 1. what it is
    if walk.number("I") != int.from_bytes(b"GGUF", "little"):
        raise ValueError("it does not begin with GGUF")
    version = walk.number("I")
    if version & 0xFFFF == 0:
        raise ValueError("its bytes are in big-endian order")
    if version not in VERSIONS:
        raise ValueError(f"version {version} of the format, not {VERSIONS[0]} or {VERSIONS[1]}")
    tensors, values = walk.number("Q"), walk.number("Q")
    if tensors * 24 + values * 13 > len(data):  # the fewest bytes of each
        raise ValueError(f"{tensors} tensors and {values} metadata would go beyond the end of the file")
    # 2. metadata
    alignment = 32
    for _ in range(values):
        key, kind = walk.text(), walk.number("I")
        if key == "general.alignment" and kind == UINT32:
            alignment = struct.unpack_from("<I", data, walk.at)[0] if walk.at + 4 <= len(data) else 0
        walk.value(kind)
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment}, which is no power of two")
    # 3. tensors: where each says that it lies
    places = []
    for _ in range(tensors):
        name = walk.text()
        shape = [walk.number("Q") for _ in range(_dimensions(walk, name))]
        size, offset = _bytes_of(name, shape, walk.number("I")), walk.number("Q")
        if offset % alignment:
            raise ValueError(f"{name} begins at byte {offset}, no multiple of {alignment}")
        places.append((offset, offset + size, name))
    # 4. which is in the file, and no other's place
    room = len(data) - (walk.at + -walk.at % alignment)
    places.sort()
    for _, end, name in places:
        if end > room:
            raise ValueError(f"{name} ends {end - room} bytes beyond the end of the file")
    for (_, end, one), (start, _, other) in pairwise(places):
        if start < end:
            raise ValueError(f"{one} and {other} lie over each other")


def _dimensions(walk: _Walk, name: str) -> int:
    count = walk.number("I")
    if not 1 <= count <= MOST_DIMENSIONS:
        raise ValueError(f"{name} has {count} dimensions")
    return count


def _bytes_of(name: str, shape: list[int], kind: int) -> int:
    """Bytes of a tensor, by its shape (the shortest step first) and its type's number."""
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise ValueError(f"{name} is of the unknown type {kind}") from None
    count = 1
    for length in shape:
        count *= length
    if not count or shape[0] % block:
        raise ValueError(f"{name} is {tuple(shape[::-1])}, which is not made of blocks of {block}")
    return count // block * size
