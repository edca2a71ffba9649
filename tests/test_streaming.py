"""Tensors streamed to where they run: conversion, failed reads, staging with a driver that copies late."""

import ctypes
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import save_file

from errors import FrankenError
from surgery import streaming
from surgery.pages import Pages
from surgery.streaming import Stream
from surgery.tensors import read_header


@pytest.mark.parametrize("on_disk", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("in_memory", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk", [8, 24, 1 << 20])
def test_streaming_converts_like_torch(tmp_path, monkeypatch, on_disk, in_memory, chunk):
    """Chunks far smaller than a tensor, so that their seams are tested."""
    monkeypatch.setattr(Stream, "CHUNK", chunk)
    torch.manual_seed(0)
    state = {
        "a": torch.randn(7, 5, dtype=torch.float64).to(on_disk),
        "b": torch.randn(13, dtype=torch.float64).to(on_disk),
    }
    save_file(state, tmp_path / "x.safetensors")
    refs = read_header(tmp_path / "x.safetensors")
    out = {k: torch.full(v.shape, float("nan"), dtype=in_memory) for k, v in state.items()}
    stream = Stream(workers=3)
    stream.read([(refs[k], out[k]) for k in state])
    assert all(torch.equal(out[k], state[k].to(in_memory)) for k in state)
    assert stream.bytes_read == sum(v.nbytes for v in state.values())


@torch.inference_mode()
def test_weights_made_in_inference_mode_are_read_by_threads_that_are_not_in_it(tmp_path):
    value = torch.randn(13)
    save_file({"x": value.clone()}, tmp_path / "x.safetensors")
    out = torch.empty(13, dtype=torch.bfloat16)
    Stream(workers=2).read([(read_header(tmp_path / "x.safetensors")["x"], out)])
    assert torch.equal(out, value.bfloat16())


def test_nothing_may_land_late_after_a_failed_read(tmp_path, monkeypatch):
    """One piece fails at once while another is slow: read() must not raise before the slow one has stopped
    writing."""
    save_file({"bad": torch.ones(4), "slow": torch.ones(4)}, tmp_path / "x.safetensors")
    refs = read_header(tmp_path / "x.safetensors")
    real, started, finished = streaming.read_exactly, threading.Event(), threading.Event()

    def read(fd, into, offset, path):
        if offset == refs["bad"].offset:
            assert started.wait(5)
            raise FrankenError("bad sector")
        started.set()
        time.sleep(0.2)
        real(fd, into, offset, path)
        finished.set()

    monkeypatch.setattr(streaming, "read_exactly", read)
    with pytest.raises(FrankenError, match="bad sector"):
        Stream(workers=2).read([(refs["bad"], torch.empty(4)), (refs["slow"], torch.empty(4))])
    assert finished.is_set()


class LateDriver:
    """A driver that copies as late as it may: when a buffer's event is waited for, or at the end.

    A buffer that is filled again before that loses what was on its way.
    """

    def __init__(self, fails_at: int | None = None):
        self.on_the_way: dict[int, tuple[int, int]] = {}  # buffer -> to, bytes
        self.events: set[int] = (
            set()
        )  # those of buffers on their way; an event's handle is its buffer's address
        self.fails_at, self.copies = fails_at, 0

    def calls(self):
        return streaming._Driver(self.copy, self.record, lambda handle: int(handle in self.events))

    def copy(self, to, buffer, nbytes, stream):
        self.copies += 1
        self.on_the_way[buffer] = to, nbytes
        return 700 if self.copies == self.fails_at else 0

    def record(self, event, stream):
        self.events.add(event)
        return 0

    def finish(self, buffer):
        to, nbytes = self.on_the_way.pop(buffer)
        ctypes.memmove(to, buffer, nbytes)
        self.events.discard(buffer)

    def ring(self, count: int, nbytes: int):
        slots = []
        for _ in range(count):
            buffer = torch.empty(nbytes, dtype=torch.uint8)
            address = buffer.data_ptr()
            event = SimpleNamespace(synchronize=partial(self.finish, address))
            slots.append(
                streaming._Slot(buffer, buffer.numpy(), address, cast(torch.cuda.Event, event), address)
            )
        return SimpleNamespace(handle=0, free=deque(slots), slots=slots)


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """staged(driver, mapped) -> a stream of three threads with five buffers of 64 bytes, its ring, the pieces
    of two tensors, and the tensors themselves: as on disk and to be filled."""

    def get(driver: LateDriver, mapped: bool):
        on_disk = {"a": torch.randn(1000), "b": torch.randn(7, 45)}
        save_file(on_disk, tmp_path / "x.safetensors")
        refs = read_header(tmp_path / "x.safetensors")
        stream, ring = Stream(workers=3), driver.ring(5, 64)
        monkeypatch.setattr(stream, "CHUNK", 64)
        monkeypatch.setattr(stream, "_ring", lambda device: ring)
        monkeypatch.setattr(stream, "_enter", lambda ring: ring)
        monkeypatch.setattr(streaming, "driver", driver.calls)
        if mapped:
            stream.pages = Pages([refs["a"].path])
        into = {name: torch.full_like(value, 7.0) for name, value in on_disk.items()}
        pieces = deque(p for name in refs for p in stream._cut_bytes(refs[name], into[name].view(-1)))
        return stream, ring, pieces, on_disk, into

    return get


@pytest.mark.parametrize("mapped", [True, False])
def test_staged_pieces_arrive_to_the_bit_however_late_they_are_copied(staged, mapped):
    driver = LateDriver()
    stream, ring, pieces, on_disk, into = staged(driver, mapped)
    assert len(pieces) == 63 + 20  # 4,000 and 1,260 bytes
    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(stream._drain, deque(), pieces) for _ in range(3)]:
            future.result()
    for buffer in list(driver.on_the_way):
        driver.finish(buffer)
    assert all(torch.equal(into[name], on_disk[name]) for name in on_disk)
    assert sorted(slot.address for slot in ring.free) == sorted(slot.address for slot in ring.slots)


def test_an_error_of_the_driver_ends_staging_and_gives_the_buffers_back(staged):
    stream, ring, pieces, *_ = staged(LateDriver(fails_at=9), True)
    others = deque([("never brought", 0)])
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        stream._drain(others, pieces)
    assert not pieces and not others and len(ring.free) == 5


def test_a_shape_that_does_not_fit_is_refused(tmp_path):
    save_file({"a": torch.ones(4, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(FrankenError, match=r"\[4, 3\] cannot fill \[3, 4\]"):
        Stream().read([(read_header(tmp_path / "x.safetensors")["a"], torch.empty(3, 4))])
