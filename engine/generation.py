"""Batched prefill and decode over a live model: tokens in, replies out.

An Engine also has what its bases do: passes over the layers (engine/forward.py), next-token distributions and
likelihoods (engine/reading.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from engine.attention import KV, Placed, RowsByLength
from engine.chat_template import ChatTemplate, find_stop_ids
from engine.layers import linears_of, spread_products
from engine.packing import pack, packed_batches, sees
from engine.reading import Reader
from engine.sampling import Completion, Decoding, Request, decode_logits, draw, greedy_exactly, without_nan
from errors import FrankenError
from franken import LiveModel

CACHE_BYTES = 2 << 30  # of keys and values on a CPU, whose memory nothing else bounds
STEP = 64  # keys are read in whole steps of so many: how a sum over them is split depends on their number
ROWS = 16  # decoded at once with `deterministic`, never more or fewer


class Engine(Reader):
    """Answers requests with a live model.

    Args:
        stop_ids: token ids that end a turn; the tokenizer's end-of-sequence token is always one of them.
        max_batch: most rows decoded at once; halved on an out-of-memory error and kept so.
        fast: use CUDA graphs (and compiled layers for large models). None: on a single GPU. Never on a CPU.
        deterministic: a reply depends on its request alone, to the bit, whatever `max_batch` and the other
            requests: every prompt is read by itself, ROWS rows are decoded at once, padded with copies, and
            all of them read the same number of keys, which follows from the request. Without CUDA graphs.
            Without it the last bits of a product may follow the number of its rows, and in bfloat16 a reply
            may follow them.
        template: how conversations are written; by default the tokenizer's chat template as of now.
        packed: read prompts packed (engine/packing.py) where nothing changes what layers give. None: wherever
            that is possible, which is not with `deterministic`, nor for a model that packed attention does
            not know (softcap, sinks, rotary factors that depend on the length of a row).
    """

    def __init__(
        self,
        live: LiveModel,
        tokenizer,
        stop_ids: Sequence[int] = (),
        max_batch: int | None = None,
        fast: bool | None = None,
        template: ChatTemplate | None = None,
        deterministic: bool = False,
        packed: bool | None = None,
    ):
        super().__init__(live, deterministic, packed)
        self.tokenizer = tokenizer
        self.template = template or ChatTemplate(tokenizer)
        self.stop_ids: list[int] = sorted({*stop_ids, *find_stop_ids(tokenizer)})
        eos = tokenizer.eos_token_id
        self.own_stops: list[int] = sorted(
            {*stop_ids, *([] if eos is None else [eos])}
        )  # transformers stops at these alone
        on_gpu = live.device.type == "cuda"
        self.alone = deterministic or not on_gpu  # each prompt is read by itself
        self.fast = (on_gpu and len(self.devices) == 1) if fast is None else fast
        self.fast &= not deterministic
        most = 64 if on_gpu and not self.fast else 128
        self.max_batch = ROWS if deterministic else max_batch or most
        # no captured graph can look at a row's length, and its decode kernel knows no sinks
        self.fast = self.fast and self.switch is None and self.longest is None and not self.sinks
        self._accelerator = None
        # which a decode step on a CPU spreads over its threads
        self._linears = [] if on_gpu else linears_of(bank.module for bank in live.banks)

    # ---- tokens in -----------------------------------------------------------------------------------------

    def chat_ids(self, messages: list[dict], begun: str = "", think: bool = False) -> tuple[int, ...]:
        """Token ids of a conversation through the chat template, ready for the assistant's turn.

        begun: the beginning of that turn, tokenized with what stands before it. think: let a model that can
        think do so where the template's `thinking` is "on"; without it, its answer comes next.
        """
        return self.template.ids(messages, begun, think)

    def chat_text(self, messages: list[dict], ask: bool = True) -> str:
        """The text whose tokens `chat_ids` gives; without `ask`, of the messages alone."""
        return self.template.render(messages, ask)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of raw text, with the special tokens that the tokenizer itself adds."""
        return tuple(self.tokenizer(text)["input_ids"])

    # ---- completions ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def complete(
        self,
        requests: Sequence[Request],
        on_progress: Callable[[int], None] | None = None,
        on_done: Callable[[int, Completion], None] | None = None,
        layer: Callable[[list[int]], Callable] | None = None,
    ) -> list[Completion]:
        """Generate a completion for every request; results are in the order of the requests.

        Requests with equal budgets and similar lengths share a batch, and samples of one prompt share its
        prefill. on_progress(n) is called as n requests finish; on_done(i, completion) when the batch of
        request i is done. layer(rows) makes what runs each layer (see `prefill`) in one pass over the
        requests of these indices, for the prompts and for every step; a batch then takes the plain path,
        without CUDA graphs, and equal prompts are read once for each request, which may change them
        differently.
        A reply that reaches the length at which rotary factors change (longrope) is read anew from the
        prompt's beginning there, as transformers' forward pass without a cache has it.
        Raises FrankenError for an empty prompt or budget.
        """
        if any(not r.prompt_ids or r.max_new_tokens < 1 for r in requests):
            raise FrankenError(
                "a request needs a prompt of at least one token and a budget of at least one token"
            )
        # 1. what cannot be done is refused; a reply over a switch of rotary factors goes up to it first
        requests, begun = list(requests), {}
        if self.longest is not None:
            for request in requests:
                self._refuse_beyond(0, len(request.prompt_ids) + request.max_new_tokens)
        whole = dict(enumerate(requests))
        requests = [self._up_to_switch(request) for request in requests]
        # 2. batches of the longest budgets first; one that does not fit is halved
        results: dict[int, Completion] = {}
        capacities = [self._capacity(r) if self.deterministic else 0 for r in requests]
        queue = sorted(
            range(len(requests)),
            key=lambda i: (
                -capacities[i],
                -requests[i].max_new_tokens,
                -len(requests[i].prompt_ids),
                i,
            ),
        )
        while queue:
            batch = [i for i in queue[: self.max_batch] if capacities[i] == capacities[queue[0]]]
            batch = self._that_fit(batch, requests)
            try:
                done = self._complete_batch(
                    [requests[i] for i in batch],
                    layer and (lambda rows, batch=batch: layer([batch[row] for row in rows])),
                )
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                if self.deterministic:
                    raise FrankenError(
                        f"out of memory: --deterministic decodes {ROWS} rows at once, never fewer"
                    ) from None
                self.max_batch = len(batch)
                self._halve("max_batch")
                if self._accelerator:
                    self._accelerator.release()
                continue
            taken = set(batch)
            queue = [i for i in queue if i not in taken]
            finished = 0
            for i, completion in zip(batch, done, strict=True):
                if i in begun:
                    completion = self._joined(begun[i], completion)
                elif requests[i].max_new_tokens < whole[i].max_new_tokens and not completion.stopped:
                    begun[i], requests[i] = completion, rest_of(whole[i], completion)
                    queue.append(i)
                    continue
                results[i], finished = completion, finished + 1
                if on_done:
                    on_done(i, completion)
            if on_progress and finished:
                on_progress(finished)
        return [results[i] for i in range(len(requests))]

    @torch.inference_mode()
    def stream(self, request: Request) -> Iterator[int]:
        """The tokens of one reply as they are chosen, by the plain path: what `complete` gives where it takes
        that path too. Raises FrankenError for an empty prompt, and where rotary factors would change."""
        if not request.prompt_ids or request.max_new_tokens < 1:
            raise FrankenError("a reply needs a prompt and a budget of at least one token")
        self._refuse_beyond(0, len(request.prompt_ids) + request.max_new_tokens)
        caches = self.empty_caches(1, self._capacity(request))
        last = self._read_alone([request.prompt_ids], caches)
        state, sent = Decoding([request], self.stop_ids, self.live.device), 0
        state.take(self.choose(last, state))
        while True:
            yield from state.tokens[0][sent:]
            sent = len(state.tokens[0])
            if not state.running():
                return
            with spread_products(self._linears):  # not while the caller has the token
                hidden = self._decode_step(state, caches)
            state.take(self.choose(hidden, state))

    def _up_to_switch(self, request: Request) -> Request:
        """The part of a request that ends where its rotary factors change; all of it where they do not."""
        short = None if self.switch is None else self.switch - len(request.prompt_ids) + 1
        if short is None or not 0 < short < request.max_new_tokens:
            return request
        return replace(request, max_new_tokens=short)

    def _joined(self, begun: Completion, rest: Completion) -> Completion:
        ids = [*begun.token_ids, *rest.token_ids]
        return self.completion(ids, rest.stopped, begun.finite and rest.finite)

    def _that_fit(self, batch: list[int], requests: Sequence[Request]) -> list[int]:
        """The first of a batch whose caches a CPU keeps at once, at least one, in an order in which those of
        similar length are neighbours: a step reads each group's keys and no more."""
        if self.live.device.type == "cuda" or self.deterministic:
            return batch
        per_token = 2 * self.kv_heads * self.head_dim * self.live.dtype.itemsize * len(self.live.order)
        rows, longest = 0, 0
        for i in batch:
            longest = max(longest, self._capacity(requests[i]))
            if rows and (rows + 1) * longest * per_token > CACHE_BYTES:
                break
            rows += 1
        return sorted(batch[:rows], key=lambda i: len(requests[i].prompt_ids))

    def _capacity(self, request: Request) -> int:
        """Room for a request's prompt and reply, in whole steps of STEP tokens."""
        return -(-(len(request.prompt_ids) + request.max_new_tokens) // STEP) * STEP

    def _read_alone(self, prompts: Sequence[tuple[int, ...]], caches: list[KV], layer=None) -> torch.Tensor:
        """Prefill each prompt by itself; the hidden state [n, hidden] of each one's last token."""
        last = []
        for row, ids in enumerate(prompts):
            mine = [KV(cache.k[row : row + 1], cache.v[row : row + 1]) for cache in caches]
            last.append(self.prefill([ids], mine, layer=layer and layer([row]))[0, -1])
        return torch.stack(last)

    def _read_together(self, prompts: Sequence[tuple[int, ...]], caches: list[KV]) -> torch.Tensor:
        """Prefill prompts packed, in passes of bounded size; the hidden state [n, hidden] of each one's last
        token."""
        last: list[torch.Tensor | None] = [None] * len(prompts)
        for some in packed_batches(prompts, [0] * len(prompts), self.prefill_tokens):
            packed = pack([prompts[i] for i in some])
            lengths = [len(path) for path in packed.paths]
            source = torch.from_numpy(np.concatenate(packed.paths))
            rows = torch.from_numpy(np.repeat(some, lengths))
            positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
            at = {}  # once for each device
            for device in {cache.k.device for cache in caches}:
                at[device] = source.to(device), (rows.to(device), slice(None), positions.to(device))
            hidden = self.prefill_packed(packed, [Placed(c.k, c.v, *at[c.k.device]) for c in caches])
            for i, path in zip(some, packed.paths, strict=True):
                last[i] = hidden[path[-1]]
        return torch.stack([state for state in last if state is not None])

    def _complete_batch(
        self, batch: list[Request], layer: Callable[[list[int]], Callable] | None = None
    ) -> list[Completion]:
        if self.fast and layer is None:
            if self._accelerator is None:
                # imports torch.compile's machinery, which a CPU never needs
                from engine.accelerated import (
                    Accelerator,
                )

                self._accelerator = Accelerator(self)
            return self._accelerator.complete(batch)
        # 1) the prompts
        asked = len(batch)
        every = [r.prompt_ids for r in batch]
        unique = every if layer else list(dict.fromkeys(every))
        caches = self.empty_caches(len(unique), max(map(self._capacity, batch)))
        if self.packed and layer is None:
            last = self._read_together(unique, caches)
        elif self.deterministic or (self.alone and layer is None):
            last = self._read_alone(unique, caches, layer)
        else:
            hidden = self.prefill(unique, caches, layer=layer and layer(list(range(asked))))
            last = hidden[range(len(unique)), [len(ids) - 1 for ids in unique]]
        begin = time.perf_counter()
        first = torch.tensor(range(asked) if layer else [unique.index(ids) for ids in every])
        if self.deterministic:
            batch = batch + batch[-1:] * (ROWS - asked)
            first = torch.cat([first, first[-1:].expand(ROWS - asked)])
        state = Decoding(batch, self.stop_ids, self.live.device)
        if first.tolist() != list(range(len(unique))):  # samples of one prompt go on from copies
            last = last[first.to(last.device)]
            for cache in caches:
                cache.k, cache.v = (t[first.to(t.device)] for t in (cache.k, cache.v))
        state.take(self.choose(last, state))

        # 2) the replies
        with spread_products(self._linears):
            while state.running():
                keep = None if self.deterministic else state.shrink()
                # finished rows leave the batch: on a CPU the time of a step grows with its rows
                if keep is not None:
                    for cache in caches:
                        cache.k, cache.v = (t[keep.to(t.device)] for t in (cache.k, cache.v))
                rows = [min(row, asked - 1) for row in state.rows]  # a copy's is that of the last request
                hidden = self._decode_step(state, caches, layer and layer(rows))
                state.take(self.choose(hidden, state))
                self.on_work(0, len(hidden))
        self.synchronize()
        self.timing.decode_seconds += time.perf_counter() - begin
        self.timing.decode_tokens += sum(map(len, state.tokens[:asked]))
        self.timing.decode_steps += state.step
        return [self.completion(ids, stopped, finite) for ids, stopped, finite in state.results()[:asked]]

    def completion(self, ids: list[int], stopped: bool, finite: bool) -> Completion:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(text, tuple(ids), stopped, finite)

    def _decode_step(self, state: Decoding, caches: list[KV], layer=None) -> torch.Tensor:
        """One token for every row: hidden states [B, hidden] before the final norm."""
        at, made = {}, {}
        room = caches[0].k.shape[2]
        keys = [min(room, -(-(held + 1) // STEP) * STEP) for held in state.positions.tolist()]
        used = room if self.deterministic else max(keys)
        # on a CPU a step waits for memory, on a GPU for launches: one group of rows
        groups = _runs(keys) if self.packed and self.live.device.type == "cpu" else []

        def mask(window, device):
            if (window, device) not in made:
                now = state.positions.to(device)[:, None]
                seen = sees(now, torch.arange(used, device=device), window)[:, None, None]
                made[window, device] = RowsByLength(seen, groups) if len(groups) > 1 else seen
            return made[window, device]

        views = []
        for bank, cache in zip(self.live.layers, caches, strict=True):
            if bank.device not in at:
                rows = torch.arange(len(state.positions), device=bank.device)
                at[bank.device] = rows, state.positions.to(bank.device)
            views.append(KV(cache.k[:, :, :used], cache.v[:, :, :used], at[bank.device]))
        if self.switch is not None:
            for row, held in zip(state.rows, state.positions.tolist(), strict=True):
                if not state.over(row):
                    self._refuse_beyond(held, held + 1)
        return self.forward(
            state.last[:, None], state.positions[:, None], views, mask, layer, lengths=state.positions + 1
        )[:, 0]

    def choose(self, hidden: torch.Tensor, state: Decoding) -> tuple[torch.Tensor, torch.Tensor]:
        """Next tokens [B] and whether all logits were finite [B], from hidden states [B, hidden]."""
        head = self.live.model.get_output_embeddings()
        hidden = self.norm(hidden).to(head.weight.device)
        logits = self._finish(decode_logits(hidden, head.weight), head)
        finite = (
            logits.amax(-1) - logits.amin(-1)
        ).isfinite()  # two passes where isfinite().all() takes five
        if hidden.is_cuda or hidden.dtype == torch.float32:
            tokens = logits.argmax(-1)
        else:
            tokens = greedy_exactly(logits if finite.all() else without_nan(logits), hidden, head)
        if state.sampled:
            temperature, top_p, uniform = (
                t.to(logits.device) for t in (state.temperature, state.top_p, state.uniform())
            )
            if logits.is_cuda:  # a captured graph draws for all rows
                drawn = draw(logits, temperature, top_p if state.nucleus else None, uniform)
                tokens = torch.where(temperature > 0, drawn, tokens)
            elif len(rows := (temperature > 0).nonzero()[:, 0]):
                nucleus = top_p[rows] if state.nucleus else None
                tokens[rows] = draw(logits[rows], temperature[rows], nucleus, uniform[rows])
        return tokens.to(self.live.device), finite.to(self.live.device)


def _runs(keys: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first, behind the last, value) of every run of equal values."""
    ends = [k for k in range(1, len(keys) + 1) if k == len(keys) or keys[k] != keys[k - 1]]
    return [(begin, end, keys[begin]) for begin, end in zip([0, *ends], ends, strict=False)]


def rest_of(request: Request, begun: Completion) -> Request:
    """What is left of a request of which these tokens are written, with the random numbers that come next."""
    return replace(
        request,
        prompt_ids=(*request.prompt_ids, *begun.token_ids),
        max_new_tokens=request.max_new_tokens - len(begun.token_ids),
        drawn=request.drawn + len(begun.token_ids),
    )
