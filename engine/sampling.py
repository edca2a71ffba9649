"""Choosing tokens: what is asked for, how a token is drawn, and the rows of a batch on their way.

Every row has random numbers of its own, so a reply depends on its request alone, not on its batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from engine.layers import spread_linear


@dataclass(frozen=True)
class Request:
    """One text to be generated. The random stream depends on (seed, key, sample) and on nothing else."""

    key: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    sample: int = 0
    seed: int = 0
    drawn: int = 0  # numbers of its stream that tokens now in the prompt have used up

    def uniforms(self) -> np.ndarray:
        """One number in [0, 1) per step, float32 [max_new_tokens]."""
        digest = hashlib.sha256(f"{self.seed}:{self.key}:{self.sample}".encode()).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        return rng.random(self.drawn + self.max_new_tokens, dtype=np.float32)[self.drawn :]


@dataclass(frozen=True)
class Completion:
    text: str
    token_ids: tuple[int, ...]
    stopped: bool  # ended by an end-of-turn token, not by max_new_tokens
    finite: bool = True  # False: the model produced NaN or infinite logits on the way


def draw(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor | None, uniform: torch.Tensor
) -> torch.Tensor:
    """Sample one token a row by inverse CDF: logits [B, V]; temperature, top_p, uniform [B] -> [B].

    The nucleus (Holtzman et al., arXiv 1904.09751) is all that is at least as probable as its last token.
    """
    p = (logits / temperature.clamp_min(1e-6)[:, None]).softmax(-1)
    if top_p is not None:
        low = nucleus_by_bisection(p, top_p) if p.is_cuda else nucleus_by_sorting(p, top_p)
        # without a nucleus nothing is cut, whoever shares the batch
        p = p * ((p >= low[:, None]) | (top_p >= 1)[:, None])
    # First the block of 512, then the token within it: a running sum over the whole vocabulary made sampling
    # cost 0.54 ms a step of 64 rows, this 0.16
    if extra := -p.shape[-1] % 512:
        p = F.pad(p, (0, extra))
    blocks = p.view(len(p), -1, 512)
    mass = blocks.sum(-1).double()
    until = mass.cumsum(-1)
    target = uniform.double() * until[:, -1]
    block = (until <= target[:, None]).sum(-1, keepdim=True).clamp_max(mass.shape[1] - 1)
    before = F.pad(until, (1, 0)).gather(1, block)[:, 0]
    share = ((target - before) / mass.gather(1, block)[:, 0]).clamp(0, 1 - 2**-40)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, 512))[:, 0].cumsum(-1, dtype=torch.float64)
    return (512 * block[:, 0] + (within <= (share * within[:, -1])[:, None]).sum(-1)).clamp_max(
        logits.shape[-1] - 1
    )


def nucleus_by_bisection(p: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The probability from which on tokens are in the nucleus [B]; 0 where nothing is cut. p [B, V], top_p
    [B].

    By bisection instead of sorting the vocabulary: 30 masked sums, at a precision of 2^-30 of the largest
    probability.
    """
    low, high = torch.zeros_like(top_p), p.amax(-1)
    for _ in range(30):
        middle = (low + high) / 2
        enough = (p * (p >= middle[:, None])).sum(-1) >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def nucleus_by_sorting(p: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """What `nucleus_by_bisection` gives, for a CPU: 8 rows of 49,152 in 5 ms, where masked sums take 25."""
    rising = np.sort(p.numpy(), -1)  # NaN last, so that no sum of such a row is enough
    mass = np.cumsum(rising[:, ::-1], -1, dtype=np.float64)
    enough = mass >= top_p.numpy()[:, None]
    last = p.shape[-1] - 1 - enough.argmax(-1)
    low = np.take_along_axis(rising, last[:, None], -1)[:, 0]
    return torch.from_numpy(np.where(enough.any(-1), low, np.float32(0)))


class Decoding:
    """Rows of one batch on their way through a decode: last tokens, positions, what has been produced."""

    def __init__(self, batch: list[Request], stop_ids: list[int], device: torch.device):
        self.batch, self.stops, self.device = batch, set(stop_ids), device
        self.tokens: list[list[int]] = [[] for _ in batch]
        self.stopped, self.finite = [False] * len(batch), [True] * len(batch)
        self.rows = list(range(len(batch)))  # which request each present row serves
        self.step = 0
        self.sampled = any(r.temperature > 0 for r in batch)
        self.nucleus = any(r.top_p < 1 for r in batch)
        self._uniforms = torch.zeros(len(batch), max(r.max_new_tokens for r in batch))
        for row, request in enumerate(batch):
            self._uniforms[row, : request.max_new_tokens] = torch.from_numpy(request.uniforms())
        self._uniforms = self._uniforms.to(device)
        self.temperature = torch.tensor([r.temperature for r in batch], device=device)
        self.top_p = torch.tensor([r.top_p for r in batch], device=device)
        self.positions = torch.tensor([len(r.prompt_ids) - 1 for r in batch], device=device)
        # a finished row that waits for the others stays within its own part of the cache
        self.limit = torch.tensor([len(r.prompt_ids) + r.max_new_tokens - 1 for r in batch], device=device)
        self.last = torch.zeros(len(batch), dtype=torch.long, device=device)

    def uniform(self) -> torch.Tensor:
        return self._uniforms[self.rows_tensor(), self.step]

    def uniforms(self, steps: int) -> torch.Tensor:
        """The numbers for the next steps of the present rows [rows, steps]."""
        return self._uniforms[self.rows_tensor(), self.step : self.step + steps]

    def rows_tensor(self) -> torch.Tensor:
        return torch.tensor(self.rows, device=self.device)

    def take(self, chosen: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Record the step's tokens and move every row on by one position."""
        tokens, finite = chosen
        self.last, self.positions = tokens, torch.minimum(self.positions + 1, self.limit)
        self.record(tokens.tolist(), finite.tolist())

    def record(self, tokens: list[int], finite: list[bool]) -> None:
        """Note what a step produced for the present rows; entries beyond them belong to padding."""
        self.step += 1
        for row, token, ok in zip(self.rows, tokens, finite, strict=False):
            if not self.over(row):
                self.finite[row] &= ok
                if token in self.stops:
                    self.stopped[row] = True
                else:
                    self.tokens[row].append(token)

    def left(self, row: int) -> int:
        """How many tokens the row may still produce."""
        return 0 if self.stopped[row] else self.batch[row].max_new_tokens - len(self.tokens[row])

    def over(self, row: int) -> bool:
        return self.left(row) <= 0

    def running(self) -> bool:
        return not all(map(self.over, self.rows))

    def shrink(self) -> torch.Tensor | None:
        """The rows to keep once a quarter of them is finished, else None; the caller shrinks the cache
        alike."""
        keep = [k for k, row in enumerate(self.rows) if not self.over(row)]
        return None if len(keep) > 0.75 * len(self.rows) else self.keep(keep)

    def keep(self, present: list[int]) -> torch.Tensor:
        """Let only these of the present rows go on; returns their indices as a tensor."""
        self.rows = [self.rows[k] for k in present]
        index = torch.tensor(present, device=self.device)
        for name in ("temperature", "top_p", "positions", "limit", "last"):
            setattr(self, name, getattr(self, name)[index])
        return index

    def results(self) -> list[tuple[list[int], bool, bool]]:
        return list(zip(self.tokens, self.stopped, self.finite, strict=True))


def decode_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Float32 logits for a decode step; on a GPU the bf16 product is written out in float32, at no extra
    cost."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return spread_linear(hidden, weight).float()


def greedy_exactly(logits: torch.Tensor, hidden: torch.Tensor, head) -> torch.Tensor:
    """Argmax in float32 where the logits were rounded to bf16: the 8 best are computed again (bf16 ties are
    common)."""
    best = logits.topk(8, -1).indices
    scores = (head.weight[best].float() * hidden[:, None].float()).sum(-1)
    if head.bias is not None:
        scores = scores + head.bias[best].float()
    return best.gather(1, without_nan(scores).argmax(-1, keepdim=True))[:, 0]


def without_nan(logits: torch.Tensor) -> torch.Tensor:
    return logits.nan_to_num(float("-inf"))
