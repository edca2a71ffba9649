"""Decoding on one GPU near the rate at which it can read the weights: a slot pool, CUDA graphs, compiled
layers.

The step is the same as the engine's, with the same sampler. What differs is that it touches only memory that
stays in place, so that it is captured once and replayed (generate() takes 48 ms a token, bound by launches; a
step of 16 rows takes 17 ms). Weights change under a captured graph: surgery at full depth never captures
again, another depth takes 60 to 180 ms. Numbers in comments: one H200, the 32B shape, bf16.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial

import torch
from transformers import AttentionInterface

from engine.attention import ATTENTION, Placed, refuse_unknown
from engine.decode_attention import decode_attention
from engine.decode_linear import compile_layer
from engine.layers import compiled_for_modules, run_layer
from engine.packing import pack, packed_batches
from engine.sampling import Completion, Decoding, Request

SLOTS = "franken_slots"
WINDOW = 8  # steps between two looks of the host at the tokens; a finished batch runs at most 7 too many
ROWS = (16, 64, 128)  # a batch is padded to one of these: a step costs the same for 1 row as for 16
GRAPHS = 16  # captured graphs kept
COMPILE_ABOVE = 50_000_000  # parameters of one layer; below, launches are the cost and graphs alone remove it


def attend_slots(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, **kwargs
):
    """Attention of a decode step as transformers calls it; key and value are pairs of what is new and its
    pool."""
    (k, k_pool), (v, v_pool) = key, value
    refuse_unknown(module, kwargs)
    out = decode_attention(
        query[:, :, 0], k[:, :, 0], v[:, :, 0], k_pool, v_pool, attention_mask, scaling, softcap or 0.0
    )
    return out[:, None], None


AttentionInterface.register(SLOTS, attend_slots)


class Slots:
    """The pools of one position as decoder layers expect of `past_key_values`, in a decode step."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor):
        self.k, self.v = k, v

    def update(self, key, value, layer_idx, *args, **kwargs):
        return (key, self.k), (value, self.v)


class Static:
    """The tensors that a captured step of `rows` rows reads and writes; a padding row writes to slot 0 for
    ever."""

    def __init__(self, rows: int, device: torch.device):
        def zeros(*shape, dtype):
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.rows, self.sampled, self.nucleus = rows, False, False
        self.last, self.positions, self.limit = (zeros(rows, dtype=torch.long) for _ in range(3))
        self.starts = zeros(rows, dtype=torch.int32)
        self.temperature, self.top_p = zeros(rows, dtype=torch.float32), zeros(rows, dtype=torch.float32)
        self.step = zeros(1, dtype=torch.long)
        self.uniforms = zeros(WINDOW, rows, dtype=torch.float32)
        self.tokens, self.finite = (
            zeros(WINDOW, rows, dtype=torch.long),
            zeros(WINDOW, rows, dtype=torch.bool),
        )

    def rest(self) -> None:
        """Make every row a padding row."""
        for tensor in (
            self.last,
            self.positions,
            self.limit,
            self.starts,
            self.step,
            self.temperature,
            self.uniforms,
        ):
            tensor.zero_()
        self.top_p.fill_(1.0)

    def seat(self, decoding: Decoding, starts: torch.Tensor) -> None:
        """Take over the rows of a decode: their slots, positions and settings."""
        self.rest()
        n = len(decoding.rows)
        for name in ("last", "positions", "limit", "temperature", "top_p"):
            getattr(self, name)[:n] = getattr(decoding, name)
        self.starts[:n] = starts

    def open_window(self, uniforms: torch.Tensor) -> None:
        self.step.zero_()
        self.uniforms[: uniforms.shape[1], : len(uniforms)] = uniforms.T

    def uniform(self) -> torch.Tensor:
        return self.uniforms.index_select(0, self.step)[0]

    def where(self, window: int | None) -> torch.Tensor:
        first = (
            torch.zeros_like(self.positions) if window is None else (self.positions - window + 1).clamp_min(0)
        )
        return torch.stack([self.starts, first.int(), self.positions.int()])

    def take(self, tokens: torch.Tensor, finite: torch.Tensor) -> None:
        self.tokens.index_copy_(0, self.step, tokens[None])
        self.finite.index_copy_(0, self.step, finite[None])
        self.last.copy_(tokens)
        self.positions.copy_(torch.minimum(self.positions + 1, self.limit))
        self.step.add_(1)


def padded_rows(n: int, most: int) -> int:
    """How many rows a batch of n is padded to, where at most `most` may run at once."""
    rows = next((r for r in ROWS if n <= r), None) or 1 << (n - 1).bit_length()
    while rows > most and rows > 1:
        rows //= 2
    return rows


def free_memory(device: torch.device) -> int:
    """Bytes this process can still allocate on the device, under its own cap
    (set_per_process_memory_fraction)."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    cap = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free, cap - reserved) + reserved - torch.cuda.memory_allocated(device)


class Accelerator:
    """Completes batches for an Engine whose model lives on one device.

    On a CPU it does the same without graphs and compilation, which is of use to tests alone.
    """

    def __init__(self, engine):
        self.engine, self.live = engine, engine.live
        self.device = self.live.device
        self.on_gpu = self.device.type == "cuda"
        self.run = run_layer
        if self.on_gpu and sum(t.numel() for t in self.live.banks[0].tensors.values()) > COMPILE_ABOVE:
            # A layer's many elementwise kernels become 5 (8 layers, batch 16: 3.37 -> 2.80 ms a step). All
            # positions share one compiled layer for each number of rows: 5 to 8 s for the first, 1 to 2 s for
            # the next.
            torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
            self.run = compiled_for_modules(torch.compile(run_layer, dynamic=False, backend=compile_layer))
        # one for all captures: cuBLAS keeps 32 MiB for each
        self.side = torch.cuda.Stream(self.device) if self.on_gpu else None
        self.release()

    def release(self) -> None:
        """Give all memory back; what is needed is made again by the next batch."""
        self.pools: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.statics: dict[int, Static] = {}
        self.graphs: OrderedDict[tuple, torch.cuda.CUDAGraph] = OrderedDict()
        self.slots = 0
        if self.on_gpu:
            self.memory = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()

    def complete(self, batch: list[Request]) -> list[Completion]:
        """Completions of a batch, in its order; several smaller batches where memory does not hold all rows
        at once."""
        done: list[Completion] = []
        while len(done) < len(batch):
            rest = batch[len(done) :]
            rest = rest[: padded_rows(len(rest), self.engine.max_batch)]
            done += self._complete(rest[: self._admit([_length(r) for r in rest])])
        return done

    # ---- memory --------------------------------------------------------------------------------------------

    def _admit(self, lengths: list[int]) -> int:
        """How many of the rows fit into the pools, after growing them if that helps. Raises OutOfMemoryError
        for none."""
        positions = len(self.live.order)
        wanted = max(1 + sum(lengths), self.slots)
        if len(self.pools) < positions or wanted > self.slots:
            slots = min(-(-wanted // 4096) * 4096, self._slots_that_fit(positions, wanted))
            # where all rows fit they run at once, whatever ran before: how rows share batches decides how
            # bfloat16 rounds. Where they do not, a little more room is not worth new graphs.
            if len(self.pools) < positions or slots >= wanted or slots > 1.1 * self.slots:
                self.release()
                self._grow(slots, positions)
        total = 1  # slot 0 belongs to padding rows
        for n, length in enumerate(lengths):
            total += length
            if total > self.slots:
                if n == 0:
                    raise torch.OutOfMemoryError(f"no room for the cache of one row of {length} tokens")
                return n
        return len(lengths)

    def _slots_that_fit(self, positions: int, tokens: int) -> int:
        """How many slots there is memory for, beside the prefill and the sampling of rows of so many
        tokens."""
        if not self.on_gpu:
            return 1 << 30
        engine, config = self.engine, self.engine.config
        item = self.live.dtype.itemsize
        prefill = (
            min(engine.prefill_tokens, tokens)
            * (3 * config.intermediate_size + 8 * config.hidden_size)
            * item
        )
        sampler = 16 * 4 * max(engine.max_batch, 64) * config.vocab_size
        slot = 2 * engine.kv_heads * engine.head_dim * item
        # as if the present pools were gone
        free = free_memory(self.device) + self.slots * len(self.pools) * slot
        return max(0, free - prefill - sampler - 2 * self.live.layer_bytes()) // (positions * slot)

    def _grow(self, slots: int, positions: int) -> None:
        shape = (slots, self.engine.kv_heads, self.engine.head_dim)
        for _ in range(positions):
            k_pool, v_pool = (torch.zeros(shape, dtype=self.live.dtype, device=self.device) for _ in (0, 1))
            for pool in (k_pool, v_pool):
                torch._dynamo.mark_dynamic(pool, 0)  # pools of another size must not compile the layer again
            self.pools.append((k_pool, v_pool))
        self.slots = slots

    # ---- one batch -----------------------------------------------------------------------------------------

    def _complete(self, batch: list[Request]) -> list[Completion]:
        engine, timing = self.engine, self.engine.timing
        decoding = Decoding(batch, engine.stop_ids, self.device)
        static, step = self._step_for(len(batch), decoding)
        lengths = torch.tensor([_length(r) for r in batch])
        starts = 1 + lengths.cumsum(0) - lengths
        last = self._prefill(batch, starts.tolist())
        begin, captured = time.perf_counter(), timing.capture_seconds
        starts = starts.to(self.device, torch.int32)
        decoding.take(engine.choose(last, decoding))
        static.seat(decoding, starts)
        while decoding.running():
            alive = [k for k, row in enumerate(decoding.rows) if not decoding.over(row)]
            # stragglers go on in a smaller, faster step
            if padded_rows(len(alive), engine.max_batch) < static.rows:
                decoding.last, decoding.positions = (
                    static.last[: len(decoding.rows)],
                    static.positions[: len(decoding.rows)],
                )
                starts = starts[decoding.keep(alive)]
                static, step = self._step_for(len(alive), decoding)
                static.seat(decoding, starts)
            steps = min(WINDOW, max(decoding.left(row) for row in decoding.rows))
            static.open_window(decoding.uniforms(steps))
            for _ in range(steps):
                step()
            for tokens, finite in zip(
                static.tokens[:steps].tolist(), static.finite[:steps].tolist(), strict=True
            ):
                decoding.record(tokens, finite)
        engine.synchronize()
        timing.decode_seconds += time.perf_counter() - begin - (timing.capture_seconds - captured)
        timing.decode_tokens += sum(map(len, decoding.tokens))
        engine.on_work(0, sum(map(len, decoding.tokens)))
        timing.decode_steps += decoding.step
        return [engine.completion(*result) for result in decoding.results()]

    def _prefill(self, batch: list[Request], starts: list[int]) -> torch.Tensor:
        """Fill the pools with every row's prompt, each different prompt computed once: its last hidden states
        [B, hidden]."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, request in enumerate(batch):
            rows.setdefault(request.prompt_ids, []).append(row)
        prompts = list(rows)
        last: dict[int, torch.Tensor] = {}  # by row
        if self.engine.packed:
            every = packed_batches(prompts, [0] * len(prompts), self.engine.prefill_tokens)
        else:
            every = self.engine.prefill_batches([len(p) for p in prompts])
        for group in every:
            some = [prompts[i] for i in group]
            packed = pack(some) if self.engine.packed else None
            padded = max(map(len, some))
            source, target = [], []
            for k, i in enumerate(group):
                tokens = torch.arange(len(prompts[i]))
                path = tokens + k * padded if packed is None else torch.from_numpy(packed.paths[k])
                for row in rows[prompts[i]]:
                    source.append(path)
                    target.append(tokens + starts[row])
            source, target = torch.cat(source).to(self.device), torch.cat(target).to(self.device)
            caches = [Placed(*pair, source, (target,)) for pair in self.pools[: len(self.live.order)]]
            if packed is None:
                states = self.engine.prefill(some, caches).flatten(0, 1)
            else:
                states = self.engine.prefill_packed(packed, caches)
            for k, i in enumerate(group):
                end = k * padded + len(prompts[i]) - 1 if packed is None else int(packed.paths[k][-1])
                for row in rows[prompts[i]]:
                    last[row] = states[end]
        return torch.stack([last[row] for row in range(len(batch))])

    # ---- one step ------------------------------------------------------------------------------------------

    def states_after(self, batch: list[Request], written: list[int]) -> torch.Tensor:
        """Hidden states [B, hidden] of a step that follows the prompts with one token each.

        It is the step of `complete`, run plainly: a captured one shows no more than the tokens it chooses.
        """
        lengths = torch.tensor([_length(r) for r in batch])
        if self._admit(lengths.tolist()) < len(batch):
            raise torch.OutOfMemoryError(f"no room for the caches of {len(batch)} rows")
        decoding, static = Decoding(batch, self.engine.stop_ids, self.device), Static(len(batch), self.device)
        starts = 1 + lengths.cumsum(0) - lengths
        self._prefill(batch, starts.tolist())
        tokens = torch.tensor(written, device=self.device)
        decoding.take((tokens, torch.ones_like(tokens, dtype=torch.bool)))
        static.seat(decoding, starts.to(self.device, torch.int32))
        return self._as_slots(self._states, static)

    def _step(self, static: Static) -> None:
        """One token for every row, from static tensors to static tensors."""
        static.take(*self.engine.choose(self._states(static), static))

    def _states(self, static: Static) -> torch.Tensor:
        """Hidden states [rows, hidden] of one step before the final norm; keys and values go to the pools."""
        caches = [Slots(*pair) for pair in self.pools[: len(self.live.order)]]
        where: dict[int | None, torch.Tensor] = {}

        def mask(window, device):
            if window not in where:
                where[window] = static.where(window)
            return where[window]

        ids, positions = static.last[:, None], static.positions[:, None]
        return self.engine.forward(ids, positions, caches, mask, self.run)[:, 0]

    def _step_for(self, n: int, decoding: Decoding):
        """The static tensors for n rows, at rest, and the function that runs one step on them."""
        rows = padded_rows(n, self.engine.max_batch)
        if rows not in self.statics:
            self.statics[rows] = Static(rows, self.device)
        static = self.statics[rows]
        static.rest()
        static.sampled, static.nucleus = decoding.sampled, decoding.nucleus
        if not self.on_gpu:
            return static, partial(self._as_slots, self._step, static)
        key = (
            rows,
            static.sampled,
            static.nucleus,
            tuple(self.live.order),
            tuple(self.live.attention_kinds()),
            self.live.scales,
            self.live.parallel,
        )
        if key not in self.graphs:
            self.graphs[key] = self._as_slots(self._capture, static)
            while len(self.graphs) > GRAPHS:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return static, self.graphs[key].replay

    def _as_slots(self, function, static: Static):
        config = self.engine.config
        config._attn_implementation = SLOTS
        try:
            return function(static)
        finally:
            config._attn_implementation = ATTENTION

    def _capture(self, static: Static) -> torch.cuda.CUDAGraph:
        assert self.side is not None, "steps are captured on a GPU alone, where a stream was made for it"
        begin = time.perf_counter()
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self.side):
                # compilation and libraries' first use allocate, which a capture may not see
                self._step(static)
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            # other threads may go on with calls that a capture does not allow (pages are registered in one)
            recording = torch.cuda.graph(
                graph, pool=self.memory, stream=self.side, capture_error_mode="thread_local"
            )
            with _nothing_collected(), recording:
                self._step(static)
        except RuntimeError as e:
            if isinstance(e, torch.OutOfMemoryError) or isinstance(e.__context__, torch.OutOfMemoryError):
                raise torch.OutOfMemoryError("out of memory while capturing a decode step") from e
            raise
        static.rest()
        torch.cuda.synchronize(self.device)
        self.engine.timing.captures += 1
        self.engine.timing.capture_seconds += time.perf_counter() - begin
        return graph


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Within it no garbage is collected: to end another engine's graph, which a capture does not allow, would
    break the capture off."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _length(request: Request) -> int:
    return len(request.prompt_ids) + request.max_new_tokens
