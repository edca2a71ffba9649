"""Passes over the layers of a live model: prompts to hidden states, hidden states to logits.

Prompts stand packed in one row (engine/packing.py), or are padded on the right where that is not possible;
every row keeps its own positions, and no row sees another's padding. The decoder layers are transformers' own
modules; the loop over them is here, so that cache slots belong to positions and a layer may stand at several
of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F

from engine.attention import ATTENTION, KV, Continued, rope_limits, windows_of
from engine.layers import Attenuated, cache_keyword, compiled_for_modules, mean_of, run_layer
from engine.packing import Behind, Packed, Paths, sees
from engine.prompt_layer import run_prompt_layer
from engine.reuse import MARKS, Entered, in_common, marks
from errors import FrankenError
from franken import LiveModel
from surgery.recipes import Recipe

KEPT_BYTES = 1 << 29  # of hidden states kept for the next experiment


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


class Forward:
    """A live model's layers and norms, run over batches of prompts. `engine.generation.Engine` has the rest.

    Args: `deterministic` and `packed` as an Engine has them.
    """

    def __init__(self, live: LiveModel, deterministic: bool = False, packed: bool | None = None):
        self.live = live
        self.config = live.config
        self.config._attn_implementation = ATTENTION
        on_gpu = live.device.type == "cuda"
        if on_gpu:
            # it plans anew for every new shape: a first experiment took 2.3 s longer, probably so
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.devices = list(dict.fromkeys(bank.device for bank in live.banks))
        self.prefill_tokens = 16384 if on_gpu else 1024  # from 512 on a CPU multiplies as fast as it can
        self.deterministic = deterministic
        self.timing = Timing()
        # told (tokens read, tokens written) after every batch of prompts and every step, for who waits
        self.on_work: Callable[[int, int], object] = lambda read, written: None
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
        # a model whose rotary factors depend on the row's length looks at it
        self.switch, self.longest = rope_limits(self.config)
        self.sinks = any(name.endswith("sinks") for name in live.banks[0].tensors)
        bent = getattr(self.config, "attn_logit_softcapping", None) is not None or self.sinks
        self.packed = packed is not False and not (deterministic or bent)
        self.packed = self.packed and self.switch is None and self.longest is None
        self.rotary_by_kind = hasattr(live.backbone.rotary_emb, "layer_types")

    # ---- one pass ------------------------------------------------------------------------------------------

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

    # ---- prompts -------------------------------------------------------------------------------------------

    def _prompt_mask(self, length: int, start: int):
        """Masks for `length` tokens after `start` others: none where plain causal attention of a prompt to
        itself does."""
        made = {}

        def mask(window, device):
            if not start and (window is None or window >= length):
                return None
            if (window, device) not in made:
                at = torch.arange(start + length, device=device)
                made[window, device] = sees(at[start:, None], at, window)
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
        self._halving(self.prefill_batches(lengths), run)

    def _halving(self, todo: list[list[int]], run: Callable[[list[int]], None]) -> None:
        """Calls `run` with every batch, or with its halves where memory is full."""
        while todo:
            batch = todo.pop(0)
            try:
                run(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self._halve("prefill_tokens")
                todo = [batch[: len(batch) // 2], batch[len(batch) // 2 :], *todo]

    def _halve(self, what: str) -> None:
        setattr(self, what, max(1, getattr(self, what) // 2))
        self.timing.out_of_memory += 1
        self._entered.clear()  # they only save time
        torch.cuda.empty_cache()

    # ---- logits --------------------------------------------------------------------------------------------

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
