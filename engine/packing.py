"""Prompts packed into one row of tokens: no padding, and what prompts begin with alike is computed once.

A layer treats every token by itself but in attention, so all prompts of a pass may stand one after the other.
Prompts are sorted; of each only what differs from the one before it is added, and its attention looks along
the *path* of its tokens, wherever they stand. A GPU has the kernel for this; elsewhere a loop does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

PASS_TOKENS = 64  # a further pass over the layers costs about as much as this many tokens more in a batch
KEYS_PER_TOKEN = 16  # at most so many keys are gathered for each token of a pass


@dataclass(frozen=True)
class Packed:
    """Prompts of one pass, packed.

    ids, positions: of the tokens that are computed [N]. paths: for every prompt, in the order in which they
    were given, where its tokens stand among them [its length]. segments: which prompt each run of new tokens
    belongs to, and how many they are, in the order in which they stand. rows, start: prompt i follows on row
    rows[i] of caches that hold `start` tokens each.
    """

    ids: np.ndarray
    positions: np.ndarray
    paths: list[np.ndarray]
    segments: list[tuple[int, int]]
    rows: Sequence[int]
    start: int

    def sequences(self) -> list[tuple[int, ...]]:
        """The prompts, in the order in which they were given."""
        return [tuple(self.ids[path].tolist()) for path in self.paths]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _sorted(sequences: Sequence[tuple[int, ...]], rows: Sequence[int]) -> list[int]:
    return sorted(range(len(sequences)), key=lambda i: (rows[i], sequences[i], i))


def packed_batches(
    sequences: Sequence[tuple[int, ...]], rows: Sequence[int], most: int, start: int = 0
) -> list[list[int]]:
    """All indices, in batches that compute at most `most` tokens each (one sequence alone may be longer)."""
    batches: list[list[int]] = []
    tokens = keys = 0
    order = _sorted(sequences, rows)
    for before, i in pairwise([None, *order]):
        assert i is not None, "None stands at the beginning alone"
        new, reach = len(sequences[i]), start + len(sequences[i])
        shared = 0
        if before is not None and rows[before] == rows[i]:
            shared = common_length(sequences[before], sequences[i])
        if not batches or tokens + new - shared > most or keys + reach > KEYS_PER_TOKEN * most:
            batches.append([])
            tokens, keys, shared = 0, 0, 0
        batches[-1].append(i)
        tokens, keys = tokens + new - shared, keys + reach
    return batches


def pack(sequences: Sequence[tuple[int, ...]], rows: Sequence[int] | None = None, start: int = 0) -> Packed:
    """The sequences packed. `rows` and `start`: see Packed; without rows nothing stands before them."""
    rows = [0] * len(sequences) if rows is None else rows
    ids, positions, segments = [], [], []
    paths: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(sequences)
    before, path = None, np.zeros(0, dtype=np.int64)
    for i in _sorted(sequences, rows):
        shared = 0
        if before is not None and rows[before] == rows[i]:
            shared = common_length(sequences[before], sequences[i])
        new = sequences[i][shared:]
        path = np.concatenate([path[:shared], np.arange(len(ids), len(ids) + len(new))])
        ids += new
        positions += range(start + shared, start + len(sequences[i]))
        if new:  # a prompt like the one before it needs nothing
            segments.append((i, len(new)))
        paths[i], before = path, i
    return Packed(np.array(ids), np.array(positions), paths, segments, rows, start)


class Paths:
    """What attention looks at, given where layers pass on a mask: for one device and one window.

    keys [K]: for each segment in turn all tokens of its path up to its own last, as indices into the keys of
    a layer: those of the caches, row after row, then those of this pass. from_query, from_key [segments + 1]:
    where each segment's queries and keys begin. masks: without a GPU, of every segment [its queries, its
    keys], None for one that is its whole path and is seen causally.
    """

    def __init__(self, packed: Packed, cached_rows: int, window: int | None, device: torch.device):
        held = cached_rows * packed.start
        keys, lengths = [], []
        for i, _ in packed.segments:
            row = packed.rows[i] * packed.start
            keys.append(np.arange(row, row + packed.start))
            keys.append(held + packed.paths[i])
            lengths.append(packed.start + len(packed.paths[i]))
        queries = [n for _, n in packed.segments]
        self.window, self.longest = window, (max(queries), max(lengths))
        self.bounds = np.cumsum([0, *queries]), np.cumsum([0, *lengths])
        self.keys = torch.from_numpy(np.concatenate(keys)).to(device)
        self.from_query, self.from_key = (torch.from_numpy(b).to(device, torch.int32) for b in self.bounds)
        self.masks: list[torch.Tensor | None] = []  # made by the first layer that asks for them

    def mask(self, k: int, device: torch.device) -> torch.Tensor | None:
        """The mask of segment k: made once for all layers of a pass."""
        if not self.masks:
            shapes = zip(*map(np.diff, self.bounds), strict=True)
            self.masks = [_causal(int(new), int(keys), self.window, device) for new, keys in shapes]
        return self.masks[k]


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """What the last `queries` of so many tokens see of them; None where it is all up to themselves and they
    are all there are, for which kernels need no mask and compute half."""
    if queries == keys and (window is None or window >= keys):
        return None
    at = torch.arange(keys, device=device)
    return sees(at[keys - queries :, None], at, window)


def sees(now: torch.Tensor, at: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether a token at position `now` attends to one at position `at`: boolean, broadcast of the two."""
    return (at <= now) if window is None else (at <= now) & (at > now - window)


def attend_along_paths(query, key, value, paths: Paths, scaling) -> torch.Tensor:
    """Causal attention of every segment to its path: query [1, H, N, D], key and value [1, G, T, D] -> [1, N,
    H, D]. A segment's tokens are the last of its path, of which each sees those up to itself."""
    query = query[0].transpose(0, 1)
    keys, values = (t[0].transpose(0, 1).index_select(0, paths.keys) for t in (key, value))
    width = query.shape[-1]
    if query.is_cuda and query.element_size() == 2 and width % 8 == 0 and width <= 256:
        window = (
            {} if paths.window is None else {"window_size_left": paths.window - 1, "window_size_right": 0}
        )
        out = torch.ops.aten._flash_attention_forward(
            query,
            keys,
            values,
            paths.from_query,
            paths.from_key,
            *paths.longest,
            0.0,
            True,
            False,
            scale=scaling,
            **window,
        )[0]
        return out[None]
    segments = enumerate(zip(*map(pairwise, paths.bounds), strict=True))
    return torch.cat(
        [
            _attend(query[a:b], keys[c:d], values[c:d], paths.mask(k, query.device), scaling)
            for k, ((a, b), (c, d)) in segments
        ]
    )[None]


def _attend(query, keys, values, seen: torch.Tensor | None, scaling) -> torch.Tensor:
    """One segment by itself: query [Q, H, D], keys and values [K, G, D] -> [Q, H, D]. seen: see Paths."""
    q, k, v = (t.transpose(0, 1)[None] for t in (query, keys, values))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=seen,
        is_causal=seen is None,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


class Behind:
    """The cache of one position while packed prompts go on after tokens that it already holds.

    k, v: [rows, G, P, D]; what is new is not kept.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor):
        self.k, self.v = k, v

    def update(self, key, value, layer_idx, *args, **kwargs):
        return tuple(
            torch.cat([held.transpose(0, 1).flatten(1, 2)[None], new], 2)
            for held, new in ((self.k, key), (self.v, value))
        )


def shared_prefixes(
    sequences: Sequence[tuple[int, ...]], needed: Sequence[int]
) -> list[tuple[int, list[int]]]:
    """All indices in groups of sequences that begin alike, as (how many tokens they share, indices); 0 for
    the others.

    A group leaves at least the last needed[i] tokens to each of its sequences. Of all ways to cut the sorted
    sequences into groups it is the one that computes the fewest tokens, where a group's pass of its own
    counts as PASS_TOKENS.
    """
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i], i))
    free = [len(sequences[i]) - needed[i] for i in order]
    common = [common_length(sequences[a], sequences[b]) for a, b in zip(order, order[1:], strict=False)]
    # for the first n sequences: the most tokens saved, and the last group's (begin, tokens shared)
    saved, cuts = (
        [0],
        [],
    )
    for end in range(1, len(order) + 1):
        best, cut, shared = saved[-1], (end - 1, 0), free[end - 1]
        for begin in range(end - 2, -1, -1):
            shared = min(shared, common[begin], free[begin])
            if shared <= 0:
                break
            gain = saved[begin] + (end - begin - 1) * shared - PASS_TOKENS
            if gain > best:
                best, cut = gain, (begin, shared)
        saved.append(best)
        cuts.append(cut)
    groups, alone, end = [], [], len(order)
    while end:
        begin, shared = cuts[end - 1]
        if shared:
            groups.append((shared, sorted(order[begin:end])))
        else:
            alone.append(order[begin])
        end = begin
    return groups + ([(0, sorted(alone))] if alone else [])
