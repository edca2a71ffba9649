"""Tensors on disk, streamed to where they run.

No checkpoint is loaded whole. A `Stream` reads any list of tensors with positioned reads: straight into the
parameters on a CPU, through a ring of pinned buffers on a GPU, which reads for itself what surgery/pages.py
has registered. Host memory is bounded by that ring; the file itself stays in the page cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch

from errors import FrankenError
from surgery.pages import Pages
from surgery.pages import pieces as registered_pieces
from surgery.tensors import TensorRef, as_bytes, read_exactly


class _Converted(NamedTuple):
    """A tensor that torch fills, in pieces of `step` numbers."""

    ref: TensorRef
    flat: torch.Tensor
    step: int
    mapped: int | None  # where its file begins in memory, if it is mapped


class _Slot(NamedTuple):
    """A pinned buffer, and the event that the last copy out of it records."""

    buffer: torch.Tensor
    array: np.ndarray
    address: int
    event: torch.cuda.Event
    handle: int

    @classmethod
    def made(cls, nbytes: int, stream: torch.cuda.Stream) -> _Slot:
        buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        event = torch.cuda.Event(blocking=True)  # waits without spinning
        event.record(stream)  # from now on it has a handle
        return cls(buffer, buffer.numpy(), buffer.data_ptr(), event, event.cuda_event)


class _Ring:
    """The pinned buffers of one GPU, in the order in which their copies were sent off, all in one stream.

    Whoever takes the first of `free` has the buffer that is done with soonest, and puts it back as the last.
    """

    def __init__(self, device: torch.device, count: int, nbytes: int):
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream(device)
            # A process that forks ends what its other threads alone held, and to end an event there aborts
            self.slots = [_Slot.made(nbytes, self.stream) for _ in range(count)]
        self.handle, self.free = self.stream.cuda_stream, deque(self.slots)


class _Staged(NamedTuple):
    """Bytes on their way to a GPU as they are."""

    ring: _Ring
    target: int  # where they go on the card
    nbytes: int
    source: int  # where they are in memory if their file is mapped, else in the file
    path: str | None  # of a file that is not mapped


Pieces = deque[tuple[_Converted, int]]  # of a tensor, and the number of it that they begin with
StagedPieces = deque[tuple[_Staged, int]]  # and the byte of it


class _Driver(NamedTuple):
    """Calls of CUDA's driver that return at once and keep the interpreter's lock; each gives 0 or the number
    of an error."""

    copy: Callable[[int, int, int, int], int]  # to, from, bytes, stream
    record: Callable[[int, int], int]  # event, stream
    is_done: Callable[[int], int]  # event; not 0: not yet


@functools.cache
def driver() -> _Driver | None:
    """None where there is no such library (AMD's cards)."""
    try:
        library = ctypes.PyDLL("libcuda.so.1")
    except OSError:
        return None
    copy, record, is_done = library.cuMemcpyHtoDAsync_v2, library.cuEventRecord, library.cuEventQuery
    copy.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    record.argtypes, is_done.argtypes = [ctypes.c_void_p] * 2, [ctypes.c_void_p]
    return _Driver(copy, record, is_done)


class Stream:
    """Reads tensors from disk into parameters where they run, many at a time.

    On a CPU the reads go straight into the parameters. On a GPU, files whose pages are registered (`hold`)
    are copied from where they lie in the page cache, at the rate of pinned memory. For all others `workers`
    threads share a ring of pinned buffers: some are being filled while others are on their way to the card.
    Buffers are filled by positioned reads, and from a file that is mapped by a copy of its mapped bytes,
    which spends no time in the kernel (14 threads: 36 -> 42 GB/s).

    The interpreter's lock is the limit: a thread that waits for it has to be woken, which costs a virtual
    machine more than what it waits for. So a piece needs it for a few microseconds (`_stage`), threads are no
    more than fill the buffers at the card's rate, and whoever waits for a buffer waits for the one that is
    done with first (benchmarks/README.md has what each brings).

    Attributes: bytes_read, counted over the stream's life; pages, what is held, or None.
    """

    CHUNK = 5 << 20  # bytes of one read and one copy
    WORKERS = 10
    ON_THE_WAY = 6  # buffers beside those that are being filled; 16 x 5 MiB bound the host memory at 0.1 GiB
    HOLD_ABOVE = 1 << 30  # bytes: to read less takes no time

    def __init__(self, workers: int | None = None):
        self.workers = workers or min(self.WORKERS, len(os.sched_getaffinity(0)))
        self.bytes_read = 0
        self.pages: Pages | None = None
        self.direct = True  # whether registered pages are read by the card; a benchmark does without
        self._local, self._lock = threading.local(), threading.Lock()
        self._rings: dict[torch.device, _Ring] = {}
        self._direct: dict[torch.device, torch.cuda.Stream] = {}
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="stream")

    @property
    def pinned_bytes(self) -> int:
        """How much host memory the buffers of one GPU take."""
        return (self.workers + self.ON_THE_WAY) * self.CHUNK

    def hold(self, refs: Iterable[TensorRef]) -> None:
        """Map the files of these tensors and register their pages with the GPU, in the background. Wherever
        that cannot be done, nothing is lost but time."""
        refs = [part for ref in refs for part in ref.parts or (ref,) if part.packed is None]
        if sum(ref.nbytes for ref in refs) < self.HOLD_ABOVE:
            return
        try:
            self.pages = Pages(dict.fromkeys(ref.path for ref in refs))
        except (OSError, ValueError):  # a file system that cannot be mapped
            return
        self.pages.register()

    @torch.no_grad()
    def read(self, jobs: Iterable[tuple[TensorRef, torch.Tensor]]) -> None:
        """Fill each tensor with what its TensorRef names, converting to the tensor's dtype; blocks until
        done.

        Raises FrankenError for a shape that differs, a short read or an I/O error; the tensors are then
        undefined.
        """
        # 1. what the card reads by itself, and the pieces of what is brought to it
        pieces: Pieces = deque()
        staged: StagedPieces = deque()
        direct: list[tuple[TensorRef, torch.Tensor]] = []
        filled: list[torch.Tensor] = []
        for ref, into in jobs:
            if tuple(into.shape) != ref.shape:
                raise FrankenError(
                    f"{ref.path}: a tensor of shape {list(ref.shape)} cannot fill {list(into.shape)}"
                )
            self.bytes_read += ref.nbytes
            flat, begun = into.detach().view(-1), 0
            filled.append(flat)
            for part in ref.parts or (ref,):
                own = flat[begun : begun + math.prod(part.shape)]
                begun += len(own)
                if self._is_registered(part, own):
                    direct.append((part, own))
                elif own.is_cuda and own.dtype == part.dtype and part.packed is None and driver() is not None:
                    staged.extend(self._cut_bytes(part, own))
                else:
                    pieces.extend(self._cut(part, own))
        # 2. what the default stream still does with these parameters comes first
        devices = {flat.device for flat in filled if flat.is_cuda}
        for device in devices:
            torch.cuda.synchronize(device)
        # 3. both at once
        try:
            for ref, flat in direct:
                self._copy_registered(ref, flat)
            with self._threads(bool(devices)) as pool:
                threads = min(self.workers, len(pieces) + len(staged))
                futures = [pool.submit(self._drain, pieces, staged) for _ in range(threads)]
                wait(futures)  # all of them, even after a failure
            for future in futures:
                future.result()
        finally:
            for device in devices:  # no late read or copy may land in what is loaded next
                torch.cuda.synchronize(device)

    def _threads(self, on_gpu: bool) -> contextlib.AbstractContextManager[ThreadPoolExecutor]:
        """Threads that stay, for a GPU; on a CPU new ones, which end: each that lives on keeps a
        team of torch's threads, and with more of those than processors all of them sleep early where they
        wait for each other (products of a decode step on two cores: 45 ms, so 80; runner/threads.py)."""
        if on_gpu:
            return contextlib.nullcontext(self._pool)
        return ThreadPoolExecutor(self.workers, thread_name_prefix="stream")

    def _cut(self, ref: TensorRef, flat: torch.Tensor) -> Iterable[tuple[_Converted, int]]:
        step, packed = self.CHUNK // ref.dtype.itemsize, ref.packed
        if packed is not None:
            step = max(step // packed.unit(), 1) * packed.unit()
        mapped = self._mapped(ref) if flat.is_cuda and packed is None else None
        return zip(repeat(_Converted(ref, flat, step, mapped)), range(0, flat.numel(), step))

    def _cut_bytes(self, ref: TensorRef, flat: torch.Tensor) -> Iterable[tuple[_Staged, int]]:
        mapped = self._mapped(ref)
        source, path = (ref.offset, ref.path) if mapped is None else (mapped + ref.offset, None)
        staged = _Staged(self._ring(flat.device), flat.data_ptr(), ref.nbytes, source, path)
        return zip(repeat(staged), range(0, ref.nbytes, self.CHUNK))

    def _mapped(self, ref: TensorRef) -> int | None:
        return None if self.pages is None else self.pages.address(ref.path, ref.offset + ref.nbytes)

    def _is_registered(self, ref: TensorRef, flat: torch.Tensor) -> bool:
        if not (flat.is_cuda and flat.dtype == ref.dtype and self.direct) or self.pages is None:
            return False
        return ref.packed is None and self.pages.registered(ref.path)

    def _copy_registered(self, ref: TensorRef, flat: torch.Tensor) -> None:
        """Copy a tensor from registered pages. Raises FrankenError if the file has become shorter."""
        assert self.pages is not None, "asked before"
        device = flat.device
        if device not in self._direct:
            self._direct[device] = torch.cuda.Stream(device)
        target = flat.view(torch.uint8)
        with torch.cuda.stream(self._direct[device]):
            for offset, nbytes in registered_pieces(ref.offset, ref.nbytes):
                source = self.pages.bytes_of(ref.path, offset, nbytes)
                if source is None:
                    raise FrankenError(f"{ref.path}: the file ends early, before byte {offset + nbytes}")
                begin = offset - ref.offset
                target[begin : begin + nbytes].copy_(source, non_blocking=True)

    @torch.inference_mode()  # a thread of its own does not inherit it, and weights may have been made in it
    def _drain(self, pieces: Pieces, staged: StagedPieces) -> None:
        """Bring pieces until none is left or one fails."""
        try:
            self._stage(staged)
            while pieces:
                try:
                    tensor, start = pieces.popleft()
                except IndexError:  # another thread took the last one
                    return
                self._bring(tensor, start)
        except BaseException:
            staged.clear()
            pieces.clear()
            raise

    def _stage(self, pieces: StagedPieces) -> None:
        """Bring pieces to their GPUs until none is left. Raises RuntimeError with the driver's number.

        Every call of torch gives the interpreter's lock up and waits for it again; the driver's own calls
        keep it. It is given up while a buffer is filled, and while one is waited for. To call a function of
        this module for every piece cost a quarter of the rate (12 threads, 16 cores: 40 -> 30 GB/s).
        """
        calls, step, memmove, entered = driver(), self.CHUNK, ctypes.memmove, None
        if calls is None:  # then none is staged
            return
        copy, record, is_done = calls
        while pieces:
            try:
                (ring, target, size, source, path), start = pieces.popleft()
            except IndexError:  # another thread took the last one
                return
            if ring is not entered:
                entered = self._enter(ring)
            nbytes = min(step, size - start)
            slot = ring.free.popleft()
            try:
                if is_done(slot.handle):
                    slot.event.synchronize()
                if path is None:
                    memmove(slot.address, source + start, nbytes)
                else:
                    read_exactly(self._descriptor(path), slot.array[:nbytes], source + start, path)
                error = copy(target + start, slot.address, nbytes, ring.handle)
                error = error or record(slot.handle, ring.handle)
            finally:
                ring.free.append(slot)
            if error:
                raise RuntimeError(f"copying to the GPU gave CUDA error {error}")

    def _bring(self, tensor: _Converted, start: int) -> None:
        """A piece that is converted, or goes to a CPU."""
        ref, flat, step, mapped = tensor
        into, place = flat[start : start + step], ref.offset + start * ref.dtype.itemsize
        if ref.packed is not None:
            into.copy_(ref.packed.values(start, start + len(into), into.device))
        elif into.is_cuda:
            ring, nbytes = self._enter(self._ring(into.device)), len(into) * ref.dtype.itemsize
            slot = ring.free.popleft()
            try:
                slot.event.synchronize()
                if mapped is None:
                    read_exactly(self._descriptor(ref.path), slot.array[:nbytes], place, ref.path)
                else:
                    ctypes.memmove(slot.address, mapped + place, nbytes)
                into.copy_(slot.buffer[:nbytes].view(ref.dtype), non_blocking=True)
                slot.event.record()
            finally:
                ring.free.append(slot)
        elif into.dtype == ref.dtype:
            read_exactly(self._descriptor(ref.path), as_bytes(into), place, ref.path)
        else:
            raw = torch.empty(len(into), dtype=ref.dtype)
            read_exactly(self._descriptor(ref.path), as_bytes(raw), place, ref.path)
            into.copy_(raw)

    def _descriptor(self, path: str) -> int:
        files = self._local.__dict__.setdefault("files", {})
        if path not in files:
            try:
                files[path] = open(path, "rb", buffering=0)  # noqa: SIM115 - lives as long as its thread
            except OSError as e:
                raise FrankenError(f"{path}: cannot read the weights: {e.strerror}") from e
        return files[path].fileno()

    def _ring(self, device: torch.device) -> _Ring:
        with self._lock:
            if device not in self._rings:
                self._rings[device] = _Ring(device, self.workers + self.ON_THE_WAY, self.CHUNK)
            return self._rings[device]

    def _enter(self, ring: _Ring) -> _Ring:
        """Make the ring's stream this thread's current one, and with it the GPU."""
        if self._local.__dict__.get("ring") is not ring:
            torch.cuda.set_stream(ring.stream)
            self._local.ring = ring
        return ring
