"""The hash that proves weights are back to the bit, against the same sum in Python's integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.hashing import BLOCK, ROW, hash_by_kernel, hash_by_rows, multipliers, tensor_hash


def slow_hash(tensor):
    """The same sum with Python's integers, word by word."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    data += b"\0" * (-len(data) % 8)
    inner, outer = (m.tolist() for m in multipliers(torch.device("cpu")))
    total = 0
    for k in range(len(data) // 8):
        word = int.from_bytes(data[8 * k : 8 * k + 8], "little", signed=True)
        total += word * inner[k % len(inner)] * outer[k // len(inner)]
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("numel", [1, 2, 3, 7, 8, 1000, 2 * (1 << 14), 2 * (1 << 14) * 9 + 5])
def test_hash_is_the_sum_it_says(numel):
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    assert int(tensor_hash(tensor)) == slow_hash(tensor)
    assert int(tensor_hash(tensor.bfloat16())) == slow_hash(tensor.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("words", [1, BLOCK - 1, BLOCK, ROW, 3 * ROW + 5, 400 * ROW])
def test_the_kernel_of_a_gpu_gives_the_same_hash(words):
    data = torch.randint(-(2**62), 2**62, (words,), generator=torch.Generator().manual_seed(words))
    on_card = hash_by_kernel(data.cuda(), *multipliers(torch.device("cuda", 0)))
    assert int(on_card) == int(hash_by_rows(data, *multipliers(data.device)))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_flipped_bit_changes_the_hash(data):
    numel = data.draw(st.sampled_from([1, 3, 8, 5000, 70000]))
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = int(tensor_hash(tensor))
    raw = tensor.view(torch.int16)
    raw[data.draw(st.integers(0, numel - 1))] ^= 1 << data.draw(st.integers(0, 14))
    assert int(tensor_hash(tensor)) != before


def test_swapped_words_and_signed_zeros_change_the_hash():
    tensor = torch.arange(100, dtype=torch.float64)
    swapped = tensor.clone()
    swapped[[3, 70]] = tensor[[70, 3]]
    assert int(tensor_hash(tensor)) != int(tensor_hash(swapped))
    assert int(tensor_hash(torch.tensor([0.0]))) != int(tensor_hash(torch.tensor([-0.0])))
    # bits, not values
    assert int(tensor_hash(torch.tensor([float("nan")]))) == int(tensor_hash(torch.tensor([float("nan")])))
