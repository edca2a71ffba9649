"""What a live model expects of texts that it reads: next-token distributions and likelihoods.

Tokens that many prompts begin with are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from engine.attention import KV, Continued
from engine.forward import Forward
from engine.packing import Packed, pack, packed_batches, shared_prefixes
from errors import FrankenError

TOKENS_AT_ONCE = 256  # of a text on a GPU, in the product with the output head
TOKENS_ON_CPU = 512  # of a text
VOCABULARY_ON_CPU = 2048  # rows of the head, whose logits for them stay in a CPU's caches


@dataclass
class CommonStates:
    """Hidden states that prompts have in common on different rows of caches, because these hold the same at
    all positions below `below`: computed for one row, kept for the others and for later calls.

    One of these belongs to one set of weights and of caches that agree below that position.
    """

    below: int
    kept: dict[tuple, torch.Tensor] = field(default_factory=dict)  # by the prompts, packed


class Reader(Forward):
    """Distributions and likelihoods. `engine.generation.Engine` is a Reader that writes replies too."""

    def next_token_logprobs(
        self,
        prompts: Sequence[tuple[int, ...]],
        caches: list[KV] | None = None,
        rows: Sequence[int] = (),
        on_device: bool = False,
        common: CommonStates | None = None,
    ) -> torch.Tensor:
        """Log-probabilities (nats) of the token after each prompt: float32 [n, vocab].

        With `caches`, filled to their last token, prompt i follows on their row rows[i]; `common` saves work
        where their lower positions hold the same in all rows. The log-probabilities are on the CPU,
        or with `on_device` where the model is: 256 rows of 152,064 took 110 ms to an H100's host.
        """
        if not prompts:
            return torch.zeros(0, self.config.vocab_size)

        def last_state(_, hidden):
            return hidden[-1].clone()

        last = (
            self._follow(list(prompts), caches, rows, last_state, needed=1, common=common)
            if caches
            else self._prefill_map(list(prompts), [1] * len(prompts), last_state)
        )
        return self.logprobs_of(torch.stack(last), on_device)

    @torch.inference_mode()
    def logprobs_of(self, states: torch.Tensor, on_device: bool = False) -> torch.Tensor:
        """Next-token log-probabilities, float32 [n, vocab], of hidden states [n, hidden] before the final
        norm; on the CPU, or with `on_device` where the model is."""
        out = None
        for k, part in enumerate(states.split(64)):
            logprobs = self.logits(part).log_softmax(-1)
            if out is None:
                place = logprobs.device if on_device else torch.device("cpu")
                out = torch.empty(len(states), logprobs.shape[1], device=place)
            out[64 * k : 64 * k + len(part)] = logprobs
        assert out is not None, "there is at least one state"
        return out

    def loglikelihood(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """For each (prefix, target): the log-probability (nats) of every target token given all before it,
        float32.

        Raises ValueError for an empty prefix: the first token of a text has no probability without context.
        """
        if any(not prefix for prefix, _ in pairs):
            raise ValueError("a likelihood needs at least one token of context")
        at_once = TOKENS_AT_ONCE if self.live.device.type == "cuda" else TOKENS_ON_CPU

        def read(i, hidden):
            target = pairs[i][1]
            states = hidden[-len(target) - 1 : -1]
            ids = torch.tensor(target, dtype=torch.long, device=hidden.device)
            parts = zip(states.split(at_once), ids.split(at_once), strict=True)
            return torch.cat([self._logprobs_of_tokens(*part) for part in parts]).numpy()

        needed = [len(target) + 1 for _, target in pairs]
        return self._prefill_map([(*prefix, *target) for prefix, target in pairs], needed, read)

    def _logprobs_of_tokens(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The log-probability (nats) of token ids[i] after hidden state i: states [n, hidden] before the
        final norm and ids [n] -> float32 [n] on the CPU.

        A CPU takes part after part of the vocabulary, and keeps of each the largest logit and the sum of
        exponentials beside it (400 texts' tokens of SmolLM2: 0.73 s before, 0.40 so).
        """
        head = self.live.model.get_output_embeddings()
        if states.is_cuda or head.weight.is_cuda or head.bias is not None:
            return self.logits(states).log_softmax(-1).gather(1, ids[:, None])[:, 0].cpu()
        states = self.norm(states).to(head.weight.device).float()
        most = torch.full((len(states),), float("-inf"))
        total, own = torch.zeros(len(states)), torch.zeros(len(states))
        for begin in range(0, len(head.weight), VOCABULARY_ON_CPU):
            rows = head.weight[begin : begin + VOCABULARY_ON_CPU]
            logits = self._finish(F.linear(states, rows.float()), head)
            here = ((ids >= begin) & (ids < begin + len(rows))).nonzero()[:, 0]
            own[here] = logits[here, ids[here] - begin]
            higher = torch.maximum(most, logits.amax(-1))
            total = total * (most - higher).exp() + logits.sub_(higher[:, None]).exp_().sum(-1)
            most = higher
        return own - most - total.log()

    @torch.inference_mode()
    def _follow(
        self,
        prompts: list[tuple[int, ...]],
        caches: list[KV],
        rows: Sequence[int],
        read: Callable[[int, torch.Tensor], object],
        prefix: tuple[int, ...] | None = None,
        needed: int | None = None,
        common: CommonStates | None = None,
    ) -> list:
        """read(i, hidden states [len, hidden] of prompt i) for every prompt; it follows on row rows[i] of
        full caches, if any. `needed`: how many of the last ones are enough.

        prefix: the tokens behind the caches, if nothing but tokens and weights is in them; lower layers may
        be reused then.
        """
        if self.packed:
            enough = [needed or len(prompt) for prompt in prompts]
            return self._read_packed(prompts, enough, read, caches, rows, prefix, common)
        results: list = [None] * len(prompts)
        start = caches[0].k.shape[2] if caches else 0

        def run(batch: list[int]) -> None:
            here = [rows[i] for i in batch] if caches else []
            hidden = self.prefill(
                [prompts[i] for i in batch],
                [Continued(cache, here) for cache in caches],
                start,
                asked=() if prefix is None else (prefix, *(prompts[i] for i in batch)),
            )
            for row, i in enumerate(batch):
                results[i] = read(i, hidden[row, : len(prompts[i])])

        self.in_batches([start + len(prompt) for prompt in prompts], run)
        return results

    @torch.inference_mode()
    def _prefill_map(
        self, sequences: list[tuple[int, ...]], needed: list[int], read: Callable[[int, torch.Tensor], object]
    ) -> list:
        """read(i, hidden states [needed[i] or more, hidden] at the end of sequence i) for every sequence, in
        order.

        What sequences have in common at the beginning is computed once (the 135M model needs 0.37 of the CPU
        time for all binary probes, and 0.28 of the tokens).
        """
        if self.packed:
            return self._read_packed(sequences, needed, read, prefix=())
        results: list = [None] * len(sequences)
        # what a row of other rotary factors begins with is not what others begin with
        beyond = [i for i, s in enumerate(sequences) if self.switch is not None and len(s) > self.switch]
        rest = sorted(set(range(len(sequences))) - set(beyond))
        groups = shared_prefixes([sequences[i] for i in rest], [needed[i] for i in rest])
        groups = [(start, [rest[k] for k in group]) for start, group in groups]
        for start, group in groups + [(0, beyond)] * bool(beyond):
            caches = self.empty_caches(1, start) if start else []
            if caches:
                self.prefill([sequences[group[0]][:start]], caches)
            of_group = self._follow(
                [sequences[i][start:] for i in group],
                caches,
                [0] * len(group),
                lambda k, hidden, g=group: read(g[k], hidden),
                sequences[group[0]][:start],
            )
            for i, result in zip(group, of_group, strict=True):
                results[i] = result
        return results

    @torch.inference_mode()
    def _read_packed(
        self,
        sequences: list[tuple[int, ...]],
        needed: Sequence[int],
        read: Callable[[int, torch.Tensor], object],
        caches: Sequence[KV] = (),
        rows: Sequence[int] = (),
        prefix: tuple[int, ...] | None = None,
        common: CommonStates | None = None,
    ) -> list:
        """read(i, the last needed[i] hidden states [needed[i], hidden] of sequence i) for every sequence.

        caches, rows, prefix, common: see `_follow` and `next_token_logprobs`.
        """
        if not all(sequences):
            raise FrankenError("a prompt needs at least one token")
        results: list = [None] * len(sequences)
        start, behind = caches[0].k.shape[2] if caches else 0, rows if caches else [0] * len(sequences)

        def run(batch: list[int]) -> None:
            packed = pack([sequences[i] for i in batch], [behind[i] for i in batch], start)
            asked = () if prefix is None else (prefix, *(sequences[i] for i in batch))
            below = None if common is None else self._common(packed, caches, common)
            hidden = self.prefill_packed(packed, caches, asked, below)
            for i, path in zip(batch, packed.paths, strict=True):
                results[i] = read(i, hidden[torch.from_numpy(path[-needed[i] :]).to(hidden.device)])

        self._halving(packed_batches(sequences, behind, self.prefill_tokens, start), run)
        return results

    def _common(
        self, packed: Packed, caches: Sequence[KV], common: CommonStates
    ) -> tuple[int, torch.Tensor] | None:
        """(the position, the hidden states that enter it [1, N, hidden]) up to which the prompts' states are
        those of one row; None where one row has them all, or where that position is inside a block of
        positions that run side by side."""
        if len(set(packed.rows)) < 2 and not common.kept:
            return None
        if self.live.parallel or not 0 < common.below < len(self.live.order):
            return None
        sequences = packed.sequences()
        one_row = pack(list(dict.fromkeys(sequences)), start=packed.start)
        key = tuple(one_row.sequences())
        if key not in common.kept:
            first_row = [KV(cache.k[:1], cache.v[:1]) for cache in caches]
            common.kept[key] = self.prefill_packed(one_row, first_row, until=common.below)
        where, place = np.zeros(len(packed.ids), dtype=np.int64), dict(zip(key, one_row.paths, strict=True))
        for sequence, path in zip(sequences, packed.paths, strict=True):
            where[path] = place[sequence]
        states = common.kept[key]
        return common.below, states[torch.from_numpy(where).to(states.device)][None]
