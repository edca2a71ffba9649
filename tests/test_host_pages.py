"""Checkpoint files mapped and registered, so that a GPU reads them where they are."""

import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import FrankenError
from surgery import pages
from surgery.pages import PIECE, Pages, pieces
from surgery.streaming import Stream
from surgery.tensors import read_tensor
from surgery.weights import Checkpoint

NUMBERS = st.integers(0, 3 * PIECE)


class Runtime:
    """A driver that notes what is registered, and refuses from the `fails`-th piece on."""

    def __init__(self, fails=None):
        self.held, self.fails, self.calls = {}, fails, 0

    def cudaHostRegister(self, address, nbytes, flags):
        self.calls += 1
        if self.fails is not None and self.calls > self.fails:
            return 1
        assert address % 4096 == 0 and flags == pages.READ_ONLY
        self.held[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        self.held.pop(address, None)  # a file of another test may let go of its pages now


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three files of 10,000 bytes in pieces of 4,096, a link to the first, and room for all."""
    monkeypatch.setattr(pages, "PIECE", 4096)
    monkeypatch.setattr(pages, "pinnable", lambda: 1 << 40)
    monkeypatch.setattr(pages, "on_tmpfs", lambda path: False)
    made = [str(tmp_path / name) for name in ("a", "b", "c")]
    for file in made:
        with open(file, "wb") as f:
            f.write(os.urandom(10_000))
    os.symlink(made[0], tmp_path / "link")
    return [*made, str(tmp_path / "link")]


def registered(files, monkeypatch, runtime) -> Pages:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    held = Pages(files)
    held.register()
    assert held.ready.wait(10)
    return held


@settings(max_examples=200, deadline=None)
@given(NUMBERS, NUMBERS)
def test_parts_cover_their_bytes_and_cross_no_piece(offset, nbytes):
    parts = list(pieces(offset, nbytes))
    assert sum(n for _, n in parts) == nbytes
    at = offset
    for start, n in parts:
        assert start == at and n > 0 and start // PIECE == (start + n - 1) // PIECE
        at += n


def test_every_file_is_registered_once_and_its_bytes_are_the_files(files, monkeypatch):
    runtime = Runtime()
    held = registered(files, monkeypatch, runtime)
    assert held.refused is None and held.bytes == 30_000
    assert sorted(runtime.held.values()) == 3 * [10_000 - 2 * 4096] + 6 * [4096]
    for file in files:
        assert held.registered(file)
        with open(file, "rb") as f:
            assert held.bytes_of(file, 1234, 5000).numpy().tobytes() == f.read()[1234:6234]
    assert not held.registered("elsewhere") and held.bytes_of("elsewhere", 0, 1) is None
    del held
    assert not runtime.held  # unpinned with the mapping


def test_a_refusal_leaves_nothing_half_registered(files, monkeypatch):
    runtime = Runtime(fails=4)
    held = registered(files, monkeypatch, runtime)
    assert [held.registered(file) for file in files] == [True, False, False, True]
    assert held.refused == "cudaHostRegister gave error 1" and held.bytes == 10_000
    assert len(runtime.held) == 3


def test_no_more_is_pinned_than_memory_allows(files, monkeypatch):
    monkeypatch.setattr(pages, "pinnable", lambda: 20_500)
    held = registered(files, monkeypatch, Runtime())
    assert [held.registered(file) for file in files[:3]] == [True, True, False]
    assert "do not fit" in str(held.refused)
    # what lies in a tmpfs costs nothing more
    monkeypatch.setattr(pages, "on_tmpfs", lambda path: True)
    assert registered(files, monkeypatch, Runtime()).refused is None


def test_bytes_beyond_a_shortened_file_are_not_read(files, monkeypatch):
    held = registered(files, monkeypatch, Runtime())
    os.truncate(files[1], 5000)
    assert held.bytes_of(files[1], 0, 5001) is None
    assert held.bytes_of(files[1], 0, 4096) is not None


def test_small_checkpoints_are_not_held(tiny_pair):
    live, stream = tiny_pair("qwen2").live(), Stream()
    stream.hold(ref for layer in live.sources["instruct"].layers for ref in layer.values())
    assert stream.pages is None


@pytest.mark.gpu
@pytest.mark.parametrize("register", [True, False])
def test_a_gpu_reads_held_files_to_the_bit(tiny_pair, tmp_path, monkeypatch, register):
    """From registered pages, and through staging buffers from mapped ones."""
    monkeypatch.setattr(Stream, "HOLD_ABOVE", 0)
    if not register:
        monkeypatch.setattr(Pages, "register", lambda self: None)
    folder = shutil.copytree(tiny_pair("qwen2").paths["instruct"], tmp_path / "copy")
    refs = [ref for layer in Checkpoint("instruct", folder).layers for ref in layer.values()]
    stream = Stream()
    stream.hold(refs)
    assert stream.pages is not None
    if register:
        assert stream.pages.ready.wait(20) and stream.pages.refused is None
    into = [torch.full(ref.shape, 7.0, dtype=ref.dtype, device="cuda") for ref in refs]
    stream.read(zip(refs, into, strict=True))
    for ref, tensor in zip(refs, into, strict=True):
        assert torch.equal(tensor.cpu(), read_tensor(ref))
    os.truncate(refs[0].path, refs[0].offset)
    with pytest.raises(FrankenError, match="ends early"):
        stream.read(zip(refs, into, strict=True))
