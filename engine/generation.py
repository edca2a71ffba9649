"""Batched prefill and decode over a live model: next-token distributions, completions, likelihoods.

Prompts stand packed in one row (engine/packing.py), or are padded on the right where that is not possible;
every row keeps its own positions, and no row sees another's padding. Tokens that many prompts begin with are
computed once. The decoder layers are transformers' own modules; the loop over them is here, so that cache
slots belong to positions and a layer may stand at several of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from engine.attention import ATTENTION, KV, Continued, Placed, RowsByLength, rope_limits, windows_of
from engine.chat_template import ChatTemplate, find_stop_ids
from engine.layers import (
    Attenuated,
    cache_keyword,
    compiled_for_modules,
    linears_of,
    mean_of,
    run_layer,
    spread_products,
)
from engine.packing import Behind, Packed, Paths, pack, packed_batches, shared_prefixes
from engine.prompt_layer import run_prompt_layer
from engine.reuse import MARKS, Entered, in_common, marks
from engine.sampling import Completion, Decoding, Request, decode_logits, draw, greedy_exactly, without_nan
from errors import FrankenError
from franken import LiveModel
from surgery.recipes import Recipe

KEPT_BYTES = 1 << 29  # of hidden states kept for the next experiment
CACHE_BYTES = 2 << 30  # of keys and values on a CPU, whose memory nothing else bounds
STEP = 64  # keys are read in whole steps of so many: how a sum over them is split depends on their number
ROWS = 16  # decoded at once with `deterministic`, never more or fewer
TOKENS_AT_ONCE = 256  # of a text on a GPU, in the product with the output head
TOKENS_ON_CPU = 512  # of a text
VOCABULARY_ON_CPU = 2048  # rows of the head, whose logits for them stay in a CPU's caches


@dataclass
class Timing:
    """What the engine has done since the last reset. Seconds are wall-clock, synchronized with the device."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    out_of_memory: int = 0  # how often a batch was halved
    captures: int = 0  # CUDA graphs captured
    capture_seconds: float = 0.0


@dataclass
class CommonStates:
    """Hidden states that prompts have in common on different rows of caches, because these hold the same at
    all positions below `below`: computed for one row, kept for the others and for later calls.

    One of these belongs to one set of weights and of caches that agree below that position.
    """

    below: int
    kept: dict[tuple, torch.Tensor] = field(default_factory=dict)  # by the prompts, packed


class Engine:
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
        self.live, self.tokenizer = live, tokenizer
        self.template = template or ChatTemplate(tokenizer)
        self.config = live.config
        self.config._attn_implementation = ATTENTION
        self.stop_ids: list[int] = sorted({*stop_ids, *find_stop_ids(tokenizer)})
        eos = tokenizer.eos_token_id
        self.own_stops: list[int] = sorted(
            {*stop_ids, *([] if eos is None else [eos])}
        )  # transformers stops at these alone
        on_gpu = live.device.type == "cuda"
        if on_gpu:
            # it plans anew for every new shape: a first experiment took 2.3 s longer, probably so
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.devices = list(dict.fromkeys(bank.device for bank in live.banks))
        self.prefill_tokens = 16384 if on_gpu else 1024  # from 512 on a CPU multiplies as fast as it can
        self.deterministic = deterministic
        self.alone = deterministic or not on_gpu  # each prompt is read by itself
        self.fast = (on_gpu and len(self.devices) == 1) if fast is None else fast
        self.fast &= not deterministic
        most = 64 if on_gpu and not self.fast else 128
        self.max_batch = ROWS if deterministic else max_batch or most
        self.timing = Timing()
        # told (tokens read, tokens written) after every batch of prompts and every step, for who waits
        self.on_work: Callable[[int, int], object] = lambda read, written: None
        self._accelerator = None
        self._entered = Entered()
        # recipes that will run on this engine, where they are known: what they begin with is kept for them
        self.coming: tuple[Recipe, ...] = ()
        for bank in live.banks:
            if bank.module is not None:  # None: a parked layer of another source, which no position runs
                cache_keyword(bank.module)
        # the first bank always runs, and decoder layers have `self_attn`, unknown to nn.Module's type
        attention = cast(Any, live.banks[0].module).self_attn
        self.kv_heads = self.config.num_key_value_heads
        self.head_dim: int = attention.head_dim
        self.norm = live.norm
        self.windows = windows_of(self.config)
        # a model whose rotary factors depend on the row's length looks at it, which no captured graph can
        self.switch, self.longest = rope_limits(self.config)
        self.fast = self.fast and self.switch is None and self.longest is None
        # its decode kernel knows no sinks
        sinks = any(name.endswith("sinks") for name in live.banks[0].tensors)
        self.fast = self.fast and not sinks
        bent = getattr(self.config, "attn_logit_softcapping", None) is not None or sinks
        self.packed = packed is not False and not (deterministic or bent)
        self.packed = self.packed and self.switch is None and self.longest is None
        # which a decode step on a CPU spreads over its threads
        self._linears = [] if on_gpu else linears_of(bank.module for bank in live.banks)
        self.rotary_by_kind = hasattr(live.backbone.rotary_emb, "layer_types")

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

    # ---- the forward pass ----------------------------------------------------------------------------------

    def window_of(self, module) -> int | None:
        """The sliding window in tokens of the layer that a module holds now: it moves with the layer."""
        here = zip(self.live.layers, self.live.attention_kinds(), strict=True)
        return next(self.windows[kind] for bank, kind in here if bank.module is module)

    def _rotary(self, hidden, positions, kinds, lengths=None) -> dict[str, Any]:
        """cos and sin by attention kind: one pair for all kinds, or one each where the model has several
        bases.

        lengths: of each row [B], where the factors depend on it (see `rope_limits`). transformers decides by
        the longest row of a pass; here each row has what it would have alone.
        """
        if self.switch is not None and lengths is not None:
            beyond = (lengths > self.switch).to(positions.device)[:, None, None]
            if not beyond.any():
                positions = positions.clamp_max(self.switch - 1)  # what lies behind is padding
            else:
                # one position beyond the limit more, for which nothing is asked: all have the long factors
                longer = torch.cat([positions, torch.full_like(positions[:, :1], self.switch)], 1)
                long = self._rotary(hidden, longer, kinds)
                long = {kind: tuple(t[:, :-1] for t in both) for kind, both in long.items()}
                if beyond.all():
                    return long
                short = self._rotary(hidden, positions.clamp_max(self.switch - 1), kinds)
                return {
                    kind: tuple(
                        torch.where(beyond, *pair) for pair in zip(long[kind], short[kind], strict=True)
                    )
                    for kind in long
                }
        if self.rotary_by_kind:
            return {kind: self.live.backbone.rotary_emb(hidden, positions, kind) for kind in kinds}
        both = self.live.backbone.rotary_emb(hidden, positions)
        return dict.fromkeys(kinds, both)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        caches: Sequence[Any],
        mask: Callable[[int | None, torch.device], torch.Tensor | Paths | None],
        layer=None,
        asked: tuple = (),
        lengths: torch.Tensor | None = None,
        entering: tuple[int, torch.Tensor] | None = None,
        until: int | None = None,
    ) -> torch.Tensor:
        """Hidden states before the final norm: ids and positions [B, S] -> [B, S, hidden].

        `caches[p]` serves position p, or None; `mask(window, device)` gives the boolean mask, or the Paths of
        packed prompts, for layers of that window. `asked` identifies all that the states depend on besides
        weights: where an earlier model was asked the same, the layers that both begin with are not computed
        again (a window sweep saves half its work; see engine/reuse.py).

        Positions that the recipe runs side by side all read what enters their block. `layer`, which runs each
        position in order instead of `run_layer`, gives back what that position alone makes of it. `lengths`
        [B]: how many tokens each row has with this pass, padding left out. `entering`: a position, and the
        hidden states with which the pass begins there; `until`: the position before which it ends.
        """
        recipe = self.live.recipe if asked else None
        first, hidden = entering or (self._entered.best(asked, recipe) if recipe else (0, None))
        kept_at = self._kept_at(recipe, first) if recipe else frozenset()
        if hidden is None:
            hidden = self.live.backbone.embed_tokens(ids)
        kinds = self.live.attention_kinds()
        rotary, here = self._rotary(hidden, positions, dict.fromkeys(kinds), lengths), {}
        ends = {p: stop for start, stop in self.live.parallel for p in range(start, stop)}
        run, side_by_side = layer or run_layer, []
        for p, (bank, kind, cache) in enumerate(zip(self.live.layers, kinds, caches, strict=True)):
            if p < first:
                continue
            if p == until:
                return hidden
            if p in kept_at:
                assert recipe is not None, "nothing is kept of weights in no defined state"
                self._entered.keep(asked, recipe, p, hidden, self._beside, KEPT_BYTES)
            if (kind, bank.device) not in here:
                here[kind, bank.device] = (
                    tuple(t.to(bank.device) for t in rotary[kind]),
                    positions.to(bank.device),
                )
            cos_sin, at = here[kind, bank.device]
            hidden = hidden.to(bank.device)
            scale = self.live.scales[p]
            module = bank.module if scale == 1 else Attenuated(bank.module, scale)
            out = run(module, hidden, mask(self.windows[kind], bank.device), cos_sin, at, cache)
            if p not in ends:
                hidden = out
                continue
            side_by_side.append(out)
            if p == ends[p] - 1:
                hidden, side_by_side = mean_of(side_by_side), []
        return hidden.to(self.norm.weight.device)

    def _kept_at(self, recipe: Recipe, first: int) -> frozenset[int]:
        """Behind position `first`, where hidden states are kept."""
        to_come = in_common(recipe, self.live.original), *marks(recipe, self.coming)
        return frozenset(p for p in to_come if first < p < len(recipe))

    @property
    def _beside(self) -> int:
        """How many hidden states of a question are kept beside the latest: those of two recipes at most."""
        return 2 * MARKS if self.coming else 0

    def _prompt_mask(self, length: int, start: int):
        """Masks for `length` tokens after `start` others: none where plain causal attention of a prompt to
        itself does."""
        made = {}

        def mask(window, device):
            if not start and (window is None or window >= length):
                return None
            if (window, device) not in made:
                k = torch.arange(start + length, device=device)
                q = k[start:, None]
                made[window, device] = (k <= q) if window is None else (k <= q) & (k > q - window)
            return made[window, device]

        return mask

    def empty_caches(self, rows: int, capacity: int) -> list[KV]:
        """Room for `rows` rows of `capacity` tokens at every position."""
        shape = (rows, self.kv_heads, capacity, self.head_dim)

        def zeros(device: torch.device) -> torch.Tensor:
            return torch.zeros(shape, dtype=self.live.dtype, device=device)

        return [KV(zeros(bank.device), zeros(bank.device)) for bank in self.live.layers]

    def prefill(
        self,
        prompts: Sequence[tuple[int, ...]],
        caches: Sequence[KV | Continued | None] | None = None,
        start: int = 0,
        layer=None,
        asked: tuple = (),
    ) -> torch.Tensor:
        """Hidden states [n, S, hidden] of right-padded prompts, before the final norm.

        start: how many tokens stand before each prompt, held by `caches` of the class Continued.
        layer: runs each layer instead of `run_layer`; called once for every position, in order. asked: see
        `forward`.
        """
        begin, length = time.perf_counter(), max(map(len, prompts))
        if not all(prompts):
            raise FrankenError("a prompt needs at least one token")
        # padded with the row's own last token: a broken model's NaN for some other token would reach the
        # row's states
        ids = torch.tensor([[*prompt, *prompt[-1:] * (length - len(prompt))] for prompt in prompts])
        positions = torch.arange(start, start + length)[None].expand(len(prompts), -1)
        lengths = torch.tensor([start + len(prompt) for prompt in prompts])
        self._refuse_beyond(start, int(lengths.max()))
        hidden = self.forward(
            ids.to(self.live.device),
            positions.to(self.live.device),
            caches or [None] * len(self.live.order),
            self._prompt_mask(length, start),
            layer,
            asked,
            lengths,
        )
        self.synchronize()
        self.timing.prefill_seconds += time.perf_counter() - begin
        self.timing.prefill_tokens += sum(map(len, prompts))
        self.on_work(sum(map(len, prompts)), 0)
        return hidden

    def _refuse_beyond(self, held: int, length: int) -> None:
        """Raises FrankenError for a row of `length` tokens whose rotary factors are not those of the `held`
        tokens already in a cache, or not known."""
        if self.longest is not None and length > self.longest:
            raise FrankenError(
                f"{length} tokens are more than the {self.longest} up to which this model's rotary positions"
                " (dynamic) do not depend on the length of the text"
            )
        if self.switch is not None and 0 < held <= self.switch < length:
            raise FrankenError(
                f"a text that goes on beyond {self.switch} tokens, where this model's rotary positions"
                " (longrope) become others, has to be read anew from its beginning"
            )

    def synchronize(self) -> None:
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [n, vocab] of hidden states [n, hidden]: products and sums in float32, without bf16
        rounding.

        A GPU multiplies two bf16 numbers exactly and adds them up in float32 where it is asked to write
        float32 out (256 rows of the 32B's head on one H100: 10.4 ms -> 0.7; off from float64 by 6e-6 of the
        logits' spread, before by 3e-7).
        """
        head = self.live.model.get_output_embeddings()
        hidden = self.norm(hidden).to(head.weight.device)
        if hidden.is_cuda and hidden.dtype == head.weight.dtype == torch.bfloat16:
            return self._finish(torch.mm(hidden, head.weight.T, out_dtype=torch.float32), head)
        hidden = hidden.float()
        if head.weight.dtype == torch.float32:
            return self._finish(F.linear(hidden, head.weight), head)
        parts = [F.linear(hidden, rows.float()) for rows in head.weight.split(16384)]
        return self._finish(torch.cat(parts, -1), head)

    def _finish(self, logits: torch.Tensor, head) -> torch.Tensor:
        if head.bias is not None:
            logits = logits + head.bias.float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    # ---- distributions and likelihoods ---------------------------------------------------------------------

    def prefill_batches(self, lengths: list[int]) -> list[list[int]]:
        """Indices grouped so that rows of similar length share a padded batch of bounded size."""
        batches: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
            if not batches or (len(batches[-1]) + 1) * lengths[i] > self.prefill_tokens:
                batches.append([])
            batches[-1].append(i)
        return batches

    def in_batches(self, lengths: list[int], run: Callable[[list[int]], None]) -> None:
        """Calls `run` with indices of rows of these lengths, in batches of bounded size, halved where memory
        is full."""
        todo = self.prefill_batches(lengths)
        while todo:
            batch = todo.pop(0)
            try:
                run(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self._halve("prefill_tokens")
                todo = [batch[: len(batch) // 2], batch[len(batch) // 2 :], *todo]

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
        todo = packed_batches(sequences, behind, self.prefill_tokens, start)
        while todo:
            batch = todo.pop(0)
            packed = pack([sequences[i] for i in batch], [behind[i] for i in batch], start)
            asked = () if prefix is None else (prefix, *(sequences[i] for i in batch))
            try:
                below = None if common is None else self._common(packed, caches, common)
                hidden = self.prefill_packed(packed, caches, asked, below)
                for i, path in zip(batch, packed.paths, strict=True):
                    results[i] = read(i, hidden[torch.from_numpy(path[-needed[i] :]).to(hidden.device)])
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self._halve("prefill_tokens")
                todo = [batch[: len(batch) // 2], batch[len(batch) // 2 :], *todo]
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

    def prefill_packed(
        self,
        packed: Packed,
        caches: Sequence[Any] = (),
        asked: tuple = (),
        entering: tuple[int, torch.Tensor] | None = None,
        until: int | None = None,
    ) -> torch.Tensor:
        """Hidden states [N, hidden] of packed prompts, before the final norm.

        caches: of the class KV, full, where the prompts go on after what they hold; of any other class, what
        each position finds as its cache. entering, until: see `forward`.
        """
        begin, made = time.perf_counter(), {}
        full = bool(caches) and isinstance(caches[0], KV)
        held = caches[0].k.shape[0] if full else 0

        def paths(window, device):
            if (window, device) not in made:
                made[window, device] = Paths(packed, held, window, device)
            return made[window, device]

        ids, positions = (
            torch.from_numpy(a)[None].to(self.live.device) for a in (packed.ids, packed.positions)
        )
        behind = [Behind(cache.k, cache.v) for cache in caches] if full else list(caches)
        hidden = self.forward(
            ids,
            positions,
            behind or [None] * len(self.live.order),
            paths,
            compiled_for_modules(run_prompt_layer),
            asked,
            entering=entering,
            until=until,
        )
        self.synchronize()
        self.timing.prefill_seconds += time.perf_counter() - begin
        self.timing.prefill_tokens += len(packed.ids)
        self.on_work(len(packed.ids), 0)
        return hidden[0]

    def _halve(self, what: str) -> None:
        setattr(self, what, max(1, getattr(self, what) // 2))
        self.timing.out_of_memory += 1
        self._entered.clear()  # they only save time
        torch.cuda.empty_cache()

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
                k, now = torch.arange(used, device=device)[None], state.positions.to(device)[:, None]
                seen = k <= now if window is None else (k <= now) & (k > now - window)
                seen = seen[:, None, None]
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
