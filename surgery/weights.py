"""Checkpoints on disk to one layer's tensors, streamed to where they run.

Nothing here loads a checkpoint whole. A `Checkpoint` knows, for every tensor, its file, offset, dtype and
shape; a `Stream` reads any list of them with positioned reads: straight into the parameters on a CPU, through
a ring of pinned buffers on a GPU, which reads for itself what surgery/pages.py has registered. Host memory is
bounded by that ring; the file itself stays in the page cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from errors import FrankenError
from files import ROOT, read_json
from surgery.experts import fused
from surgery.pages import Pages
from surgery.pages import pieces as registered_pieces
from surgery.quantized import method, unpacked
from surgery.tensors import TensorRef, as_bytes, read_exactly, read_header, read_tensor, refuse_dtype

Layer = dict[str, torch.Tensor]  # name within the layer, such as "self_attn.q_proj.weight" -> tensor
OUTER_PARTS = ("embed", "norm", "head")  # what a model has besides its layers

LAYER_KEY = re.compile(r"^(?P<prefix>(?:.*?\.)?)(?:layers|h|blocks)\.(?P<index>\d+)\.(?P<name>.+)$")
OUTER_KEY = {
    "embed": re.compile(r"^(?P<prefix>(?:.*\.)?)(embed_tokens|wte)\.(?P<name>weight)$"),
    "norm": re.compile(
        r"^(?P<prefix>(?:.*\.)?)(norm|ln_f|final_layernorm|final_layer_norm)\.(?P<name>weight|bias)$"
    ),
    "head": re.compile(r"^(?P<prefix>(?:.*\.)?)lm_head\.(?P<name>weight|bias)$"),
}
# Buffers that older checkpoints hold and transformers computes itself.
COMPUTED_KEY = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def outer_part(key: str) -> str | None:
    """Which of OUTER_PARTS a parameter outside the layers belongs to by its name, or None."""
    return next((part for part, pattern in OUTER_KEY.items() if pattern.search(key)), None)


class Checkpoint:
    """A source of layers: a directory of safetensors of one model.

    `layers[i]` and `outer[part]` map tensor names to TensorRefs, `tensors` maps the keys of the files. The
    decoder layers are the numbered stack that has a token embedding beside it, under whatever prefix
    ("model.", "language_model.model."); the final norm is the one beside them, and the head stands at that
    place or above it. All else (a vision tower with layers, norms and projections of its own) is left alone.

    Of a quantized checkpoint the refs say how its numbers are computed, and a layer's experts are one tensor
    (`surgery.quantized`, `surgery.experts`).

    Attributes: prefix, of the decoder stack's keys; wrapped, whether there is anything else; quantized, the
    name of the format, or None.
    Raises FrankenError for a missing or truncated shard, for a directory without safetensors, and for weights
    quantized in a way that cannot be read.
    """

    def __init__(self, name: str, path: str | Path, revision: str | None = None):
        self.name, self.path, self.revision = name, Path(path), revision
        self.layers: list[dict[str, TensorRef]] = []
        self.outer: dict[str, dict[str, TensorRef]] = {part: {} for part in OUTER_PARTS}
        self.quantized = method(self.path)[0]  # before anything is read
        self.tensors = unpacked(self.path, self._all_tensors())
        # 1. the decoder layers: the numbered stack beside the token embedding
        stacks: dict[str, dict[int, dict[str, TensorRef]]] = {}
        embedded, used = set(), set()
        for key, ref in self.tensors.items():
            if match := LAYER_KEY.match(key):
                if not COMPUTED_KEY.search(key):
                    layer = stacks.setdefault(match["prefix"], {}).setdefault(int(match["index"]), {})
                    layer[match["name"]] = ref
            elif match := OUTER_KEY["embed"].match(key):
                embedded.add(match["prefix"])
        texts = [prefix for prefix in stacks if prefix in embedded] or list(stacks)
        numbered = stacks[texts[0]] if len(texts) == 1 else {}
        if not numbered or sorted(numbered) != list(range(len(numbered))):
            raise FrankenError(
                f"{self.path}: no single numbered stack of decoder layers found (prefixes: {sorted(stacks)})"
            )
        self.prefix = texts[0]
        self.layers = [numbered[i] for i in range(len(numbered))]
        # 2. what belongs to them outside: embedding and norm beside them, the head there or above
        for key in sorted(self.tensors, key=len):  # of two heads the inner one is the stack's
            for part, pattern in OUTER_KEY.items():
                match = pattern.match(key)
                if not match:
                    continue
                beside = self.prefix == match["prefix"]
                if beside or (part == "head" and self.prefix.startswith(match["prefix"])):
                    self.outer[part][match["name"]] = self.tensors[key]
                    used.add(key)
        # 3. only these have to be numbers that can be operated on
        for key, ref in self.tensors.items():
            match = LAYER_KEY.match(key)
            if key in used or (match and match["prefix"] == self.prefix):
                used.add(key)
                refuse_dtype(key, ref)
        self.wrapped = len(used) < len(self.tensors)
        self.layers = [fused(layer) for layer in self.layers]

    def _all_tensors(self) -> dict[str, TensorRef]:
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            # other files beside it may hold the same weights under other names
            whole = self.path / "model.safetensors"
            files = [whole] if whole.exists() else sorted(self.path.glob("*.safetensors"))
            if not files:
                raise FrankenError(f"{self.path}: no .safetensors weights there")
            self.files = files
            return {k: v for file in files for k, v in read_header(file).items()}
        try:
            weight_map = read_json(index)["weight_map"]
            names = sorted(set(weight_map.values()))
            outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
        except (FrankenError, KeyError, TypeError, AttributeError) as e:
            raise FrankenError(f"{index}: not a readable shard index") from e
        if outside:
            raise FrankenError(f"{index} names a shard outside its folder: {outside[0][:80]!r}")
        self.files = [self.path / name for name in names]
        for file in self.files:
            if not file.exists():
                raise FrankenError(
                    f"{file}: the shard is missing ({len(self.files)} shards are listed in the index)"
                )
        tensors = {k: v for file in self.files for k, v in read_header(file).items()}
        lost = sorted(set(weight_map) - set(tensors))
        if lost:
            raise FrankenError(f"{self.path}: the index lists {lost[0]} but no shard holds it")
        return {k: tensors[k] for k in weight_map}

    def delta(self, layer: int, name: str, device: torch.device) -> torch.Tensor | None:
        """What must be added to the tensor after it is read (float32), or None. A plain checkpoint adds
        nothing."""
        return None

    def describe(self) -> dict:
        """What the manifest records: where the weights are, their revision and a hash of the content on disk.

        Files from the hub's cache are named by their own sha256; for others, small files are hashed whole and
        large ones by size, header and 64 samples of 64 KiB, which the entry says.
        """
        with ThreadPoolExecutor(min(8, len(self.files))) as pool:  # hashing gives up the interpreter's lock
            files = dict(zip((f.name for f in self.files), pool.map(_hash_of, self.files), strict=True))
        return {
            "kind": "checkpoint",
            "path": shown_path(self.path),
            "revision": self.revision,
            "files": files,
        }


def shown_path(path: Path) -> str:
    """A path for the manifest: relative to this checkout or to the home folder where it lies in one of
    them."""
    path = path.absolute()
    for folder, sign in ((ROOT, ""), (Path.home(), "~/")):
        if path.is_relative_to(folder):
            return sign + str(path.relative_to(folder))
    return str(path)


def _hash_of(file: Path) -> dict:
    real = file.resolve()
    return {"sha256": real.name} if re.fullmatch(r"[0-9a-f]{64}", real.name) else content_hash(real)


def content_hash(path: Path, whole_below: int = 1 << 30) -> dict:
    """sha256 of a file; above `whole_below` bytes, of its size and 64 spread samples, keyed as
    'sampled_sha256'."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as f:
        if size < whole_below:
            digest = hashlib.file_digest(f, "sha256")
            return {"bytes": size, "sha256": digest.hexdigest()}
        digest.update(str(size).encode())
        for k in range(64):
            f.seek(k * (size - 65536) // 63)
            digest.update(f.read(65536))
    return {"bytes": size, "sampled_sha256": digest.hexdigest()}


# Fields of adapter_config.json that are computed here, and those without effect on what a trained adapter
# computes. A field that is in neither list must say that nothing is asked of it.
ADAPTER_FIELDS = frozenset(
    (
        *("r", "lora_alpha", "use_rslora", "init_lora_weights", "peft_type"),
        *(
            "task_type",
            "auto_mapping",
            "peft_version",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
        ),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
        *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("qalora_group_size", "runtime_config"),
    )
)
# Beginnings of training that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, ...)
# take something out of it.
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class Adapter:
    """A source of layers: a LoRA adapter (peft's format on disk) over another source.

    The layer is read from the underlying checkpoint and scale * B @ A is added in float32 before rounding
    once to the model's dtype (Hu et al., arXiv 2106.09685; rank-stabilized scaling, arXiv 2312.03732).

    Of an adapter over a wrapped model, what belongs to other parts than the text model (a vision tower's
    layers) is left out; `left_out` counts those tensors. `trained_on` is the base that the adapter names.

    Raises FrankenError for what is not plain LoRA on the decoder layers: DoRA, trained biases, embeddings or
    modules saved whole; an initialization that took something out of the base (PiSSA, OLoRA, ...); fields of
    the config that are not known; empty tensors, no tensors, or shapes that do not fit.
    """

    def __init__(self, name: str, path: str | Path, under: Checkpoint):
        self.name, self.path, self.under = name, Path(path), under
        self.layers, self.outer, self.files = (
            under.layers,
            under.outer,
            [self.path / "adapter_model.safetensors"],
        )
        # 1. the config: what is not plain LoRA is refused
        try:
            config = read_json(self.path / "adapter_config.json", nan=True)
        except FrankenError as e:
            raise FrankenError(f"{self.path}: no readable adapter_config.json") from e
        if not isinstance(config, dict):
            raise FrankenError(f"{self.path}: no readable adapter_config.json")
        if (
            config.get("peft_type") != "LORA"
            or config.get("use_dora")
            or config.get("bias", "none") != "none"
        ):
            raise FrankenError(
                f"{self.path}: only plain LoRA adapters (no DoRA, no trained bias) can be a source"
            )
        self._check_fields(config)
        self.trained_on = config.get("base_model_name_or_path")
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
            raise FrankenError(f"{self.path}: adapter_config.json has no usable r and lora_alpha")
        self.scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if not math.isfinite(self.scale):
            raise FrankenError(f"{self.path}: adapter_config.json makes the scale {self.scale}")
        # 2. the tensors A and B of every changed one
        self.low_rank: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        self.left_out = 0
        for key, ref in read_header(self.files[0]).items():
            if not math.prod(ref.shape):
                raise FrankenError(
                    f"{self.path}: {key} is empty, as training under DeepSpeed ZeRO-3 saves it where the"
                    " weights are not gathered first"
                )
            if self._of_another_part(key):
                self.left_out += 1
                continue
            match = LAYER_KEY.match(key)
            part = re.match(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight$", match["name"] if match else "")
            if not match or not part or int(match["index"]) >= len(self.layers):
                raise FrankenError(f"{self.path}: {key} is not LoRA on a decoder layer of this model")
            refuse_dtype(key, ref)
            where = (int(match["index"]), part["module"] + ".weight")
            self.low_rank.setdefault(where, {})[part["side"]] = read_tensor(ref)
        if not self.low_rank:
            raise FrankenError(f"{self.files[0]}: no LoRA weights for the text model's layers in it")
        # 3. whether they fit what they change
        for (layer, tensor), sides in self.low_rank.items():
            shape = self.layers[layer][tensor].shape if tensor in self.layers[layer] else None
            flat = set(sides) == {"A", "B"} and all(t.ndim == 2 for t in sides.values())
            if not flat or shape != (sides["B"].shape[0], sides["A"].shape[1]):
                raise FrankenError(
                    f"{self.path}: layer {layer} {tensor}: the adapter's shape does not fit {shape}"
                )
            if (sides["B"].shape[1], sides["A"].shape[0]) != (rank, rank):
                raise FrankenError(
                    f"{self.path}: layer {layer} {tensor}: the tensors have rank {sides['A'].shape[0]}, and"
                    f" adapter_config.json says r = {rank}"
                )

    def _check_fields(self, config: dict) -> None:
        """Raises FrankenError for a field of the config that would have to be computed and is not, or that is
        not known."""
        start = config.get("init_lora_weights", True)
        if start not in HARMLESS_STARTS:
            raise FrankenError(
                f"{self.path}: the adapter began as {start!r} (init_lora_weights), which takes its beginning"
                " out of the base model: such adapters are not supported; peft can convert one when it saves"
                " it (path_initial_model_for_weight_conversion)"
            )
        for field, value in config.items():
            if field in ADAPTER_FIELDS or value in (None, False, "none") or value == {} or value == []:
                continue
            raise FrankenError(
                f"{self.path}: adapters with {field} ({str(value)[:60]}) in adapter_config.json are not"
                " supported"
            )

    def _of_another_part(self, key: str) -> bool:
        """Whether a key belongs to another part of a wrapped model than its text model.

        Names of modules and of tensors on disk may be in another order ("model.language_model.",
        "language_model.model."), so it is the words of the path that are compared.
        """
        if not self.under.wrapped:
            return False
        match = LAYER_KEY.match(key)
        # without layers: the path of the module that has the adapted one
        path = match["prefix"] if match else re.sub(r"[^.]*\.lora_.*$", "", key)
        return not set(path.split(".")) <= {*self.under.prefix.split("."), "base_model", "model", ""}

    def delta(self, layer: int, name: str, device: torch.device) -> torch.Tensor | None:
        sides = self.low_rank.get((layer, name))
        if sides is None:
            return None
        return self.scale * (sides["B"].to(device, torch.float32) @ sides["A"].to(device, torch.float32))

    def describe(self) -> dict:
        entry = {
            "kind": "LoRA adapter",
            "path": shown_path(self.path),
            "over": self.under.name,
            "scale": self.scale,
            "trained_on": self.trained_on,
        }
        return entry | {"files": {f.name: content_hash(f) for f in self.files}}


Source = Checkpoint | Adapter


def parameters_of(source: Source) -> int:
    """How many numbers a source's layers hold, and what stands outside them."""
    parts = [*source.layers, *source.outer.values()]
    return sum(math.prod(ref.shape) for part in parts for ref in part.values())


class _Converted(NamedTuple):
    """A tensor that torch fills, in pieces of `step` numbers."""

    ref: TensorRef
    flat: torch.Tensor
    step: int
    mapped: int | None  # where its file begins in memory, if it is mapped


class _Slot(NamedTuple):
    """A pinned buffer, and the event that the last copy out of it records."""

    buffer: torch.Tensor
    array: np.ndarray
    address: int
    event: torch.cuda.Event
    handle: int

    @classmethod
    def made(cls, nbytes: int, stream: torch.cuda.Stream) -> _Slot:
        buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        event = torch.cuda.Event(blocking=True)  # waits without spinning
        event.record(stream)  # from now on it has a handle
        return cls(buffer, buffer.numpy(), buffer.data_ptr(), event, event.cuda_event)


class _Ring:
    """The pinned buffers of one GPU, in the order in which their copies were sent off, all in one stream.

    Whoever takes the first of `free` has the buffer that is done with soonest, and puts it back as the last.
    """

    def __init__(self, device: torch.device, count: int, nbytes: int):
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream(device)
            # A process that forks ends what its other threads alone held, and to end an event there aborts
            self.slots = [_Slot.made(nbytes, self.stream) for _ in range(count)]
        self.handle, self.free = self.stream.cuda_stream, deque(self.slots)


class _Staged(NamedTuple):
    """Bytes on their way to a GPU as they are."""

    ring: _Ring
    target: int  # where they go on the card
    nbytes: int
    source: int  # where they are in memory if their file is mapped, else in the file
    path: str | None  # of a file that is not mapped


Pieces = deque[tuple[_Converted, int]]  # of a tensor, and the number of it that they begin with
StagedPieces = deque[tuple[_Staged, int]]  # and the byte of it


class _Driver(NamedTuple):
    """Calls of CUDA's driver that return at once and keep the interpreter's lock; each gives 0 or the number
    of an error."""

    copy: Callable[[int, int, int, int], int]  # to, from, bytes, stream
    record: Callable[[int, int], int]  # event, stream
    is_done: Callable[[int], int]  # event; not 0: not yet


@functools.cache
def driver() -> _Driver | None:
    """None where there is no such library (AMD's cards)."""
    try:
        library = ctypes.PyDLL("libcuda.so.1")
    except OSError:
        return None
    copy, record, is_done = library.cuMemcpyHtoDAsync_v2, library.cuEventRecord, library.cuEventQuery
    copy.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    record.argtypes, is_done.argtypes = [ctypes.c_void_p] * 2, [ctypes.c_void_p]
    return _Driver(copy, record, is_done)


class Stream:
    """Reads tensors from disk into parameters where they run, many at a time.

    On a CPU the reads go straight into the parameters. On a GPU, files whose pages are registered (`hold`)
    are copied from where they lie in the page cache, at the rate of pinned memory. For all others `workers`
    threads share a ring of pinned buffers: some are being filled while others are on their way to the card.
    Buffers are filled by positioned reads, and from a file that is mapped by a copy of its mapped bytes,
    which spends no time in the kernel (14 threads: 36 -> 42 GB/s).

    The interpreter's lock is the limit: a thread that waits for it has to be woken, which costs a virtual
    machine more than what it waits for. So a piece needs it for a few microseconds (`_stage`), threads are no
    more than fill the buffers at the card's rate, and whoever waits for a buffer waits for the one that is
    done with first (benchmarks/README.md has what each brings).

    Attributes: bytes_read, counted over the stream's life; pages, what is held, or None.
    """

    CHUNK = 5 << 20  # bytes of one read and one copy
    WORKERS = 10
    ON_THE_WAY = 6  # buffers beside those that are being filled; 16 x 5 MiB bound the host memory at 0.1 GiB
    HOLD_ABOVE = 1 << 30  # bytes: to read less takes no time

    def __init__(self, workers: int | None = None):
        self.workers = workers or min(self.WORKERS, len(os.sched_getaffinity(0)))
        self.bytes_read = 0
        self.pages: Pages | None = None
        self.direct = True  # whether registered pages are read by the card; a benchmark does without
        self._local, self._lock = threading.local(), threading.Lock()
        self._rings: dict[torch.device, _Ring] = {}
        self._direct: dict[torch.device, torch.cuda.Stream] = {}
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="stream")

    @property
    def pinned_bytes(self) -> int:
        """How much host memory the buffers of one GPU take."""
        return (self.workers + self.ON_THE_WAY) * self.CHUNK

    def hold(self, refs: Iterable[TensorRef]) -> None:
        """Map the files of these tensors and register their pages with the GPU, in the background. Wherever
        that cannot be done, nothing is lost but time."""
        refs = [part for ref in refs for part in ref.parts or (ref,) if part.packed is None]
        if sum(ref.nbytes for ref in refs) < self.HOLD_ABOVE:
            return
        try:
            self.pages = Pages(dict.fromkeys(ref.path for ref in refs))
        except (OSError, ValueError):  # a file system that cannot be mapped
            return
        self.pages.register()

    @torch.no_grad()
    def read(self, jobs: Iterable[tuple[TensorRef, torch.Tensor]]) -> None:
        """Fill each tensor with what its TensorRef names, converting to the tensor's dtype; blocks until
        done.

        Raises FrankenError for a shape that differs, a short read or an I/O error; the tensors are then
        undefined.
        """
        # 1. what the card reads by itself, and the pieces of what is brought to it
        pieces: Pieces = deque()
        staged: StagedPieces = deque()
        direct: list[tuple[TensorRef, torch.Tensor]] = []
        filled: list[torch.Tensor] = []
        for ref, into in jobs:
            if tuple(into.shape) != ref.shape:
                raise FrankenError(
                    f"{ref.path}: a tensor of shape {list(ref.shape)} cannot fill {list(into.shape)}"
                )
            self.bytes_read += ref.nbytes
            flat, begun = into.detach().view(-1), 0
            filled.append(flat)
            for part in ref.parts or (ref,):
                own = flat[begun : begun + math.prod(part.shape)]
                begun += len(own)
                if self._is_registered(part, own):
                    direct.append((part, own))
                elif own.is_cuda and own.dtype == part.dtype and part.packed is None and driver() is not None:
                    staged.extend(self._cut_bytes(part, own))
                else:
                    pieces.extend(self._cut(part, own))
        # 2. what the default stream still does with these parameters comes first
        devices = {flat.device for flat in filled if flat.is_cuda}
        for device in devices:
            torch.cuda.synchronize(device)
        # 3. both at once
        try:
            for ref, flat in direct:
                self._copy_registered(ref, flat)
            with self._threads(bool(devices)) as pool:
                threads = min(self.workers, len(pieces) + len(staged))
                futures = [pool.submit(self._drain, pieces, staged) for _ in range(threads)]
                wait(futures)  # all of them, even after a failure
            for future in futures:
                future.result()
        finally:
            for device in devices:  # no late read or copy may land in what is loaded next
                torch.cuda.synchronize(device)

    def _threads(self, on_gpu: bool) -> contextlib.AbstractContextManager[ThreadPoolExecutor]:
        """Threads that stay, for a GPU; on a CPU new ones, which end: each that lives on keeps a
        team of torch's threads, and with more of those than processors all of them sleep early where they
        wait for each other (products of a decode step on two cores: 45 ms, so 80; runner/threads.py)."""
        if on_gpu:
            return contextlib.nullcontext(self._pool)
        return ThreadPoolExecutor(self.workers, thread_name_prefix="stream")

    def _cut(self, ref: TensorRef, flat: torch.Tensor) -> Iterable[tuple[_Converted, int]]:
        step, packed = self.CHUNK // ref.dtype.itemsize, ref.packed
        if packed is not None:
            step = max(step // packed.unit(), 1) * packed.unit()
        mapped = self._mapped(ref) if flat.is_cuda and packed is None else None
        return zip(repeat(_Converted(ref, flat, step, mapped)), range(0, flat.numel(), step))

    def _cut_bytes(self, ref: TensorRef, flat: torch.Tensor) -> Iterable[tuple[_Staged, int]]:
        mapped = self._mapped(ref)
        source, path = (ref.offset, ref.path) if mapped is None else (mapped + ref.offset, None)
        staged = _Staged(self._ring(flat.device), flat.data_ptr(), ref.nbytes, source, path)
        return zip(repeat(staged), range(0, ref.nbytes, self.CHUNK))

    def _mapped(self, ref: TensorRef) -> int | None:
        return None if self.pages is None else self.pages.address(ref.path, ref.offset + ref.nbytes)

    def _is_registered(self, ref: TensorRef, flat: torch.Tensor) -> bool:
        if not (flat.is_cuda and flat.dtype == ref.dtype and self.direct) or self.pages is None:
            return False
        return ref.packed is None and self.pages.registered(ref.path)

    def _copy_registered(self, ref: TensorRef, flat: torch.Tensor) -> None:
        """Copy a tensor from registered pages. Raises FrankenError if the file has become shorter."""
        assert self.pages is not None, "asked before"
        device = flat.device
        if device not in self._direct:
            self._direct[device] = torch.cuda.Stream(device)
        target = flat.view(torch.uint8)
        with torch.cuda.stream(self._direct[device]):
            for offset, nbytes in registered_pieces(ref.offset, ref.nbytes):
                source = self.pages.bytes_of(ref.path, offset, nbytes)
                if source is None:
                    raise FrankenError(f"{ref.path}: the file ends early, before byte {offset + nbytes}")
                begin = offset - ref.offset
                target[begin : begin + nbytes].copy_(source, non_blocking=True)

    @torch.inference_mode()  # a thread of its own does not inherit it, and weights may have been made in it
    def _drain(self, pieces: Pieces, staged: StagedPieces) -> None:
        """Bring pieces until none is left or one fails."""
        try:
            self._stage(staged)
            while pieces:
                try:
                    tensor, start = pieces.popleft()
                except IndexError:  # another thread took the last one
                    return
                self._bring(tensor, start)
        except BaseException:
            staged.clear()
            pieces.clear()
            raise

    def _stage(self, pieces: StagedPieces) -> None:
        """Bring pieces to their GPUs until none is left. Raises RuntimeError with the driver's number.

        Every call of torch gives the interpreter's lock up and waits for it again; the driver's own calls
        keep it. It is given up while a buffer is filled, and while one is waited for. To call a function of
        this module for every piece cost a quarter of the rate (12 threads, 16 cores: 40 -> 30 GB/s).
        """
        calls, step, memmove, entered = driver(), self.CHUNK, ctypes.memmove, None
        if calls is None:  # then none is staged
            return
        copy, record, is_done = calls
        while pieces:
            try:
                (ring, target, size, source, path), start = pieces.popleft()
            except IndexError:  # another thread took the last one
                return
            if ring is not entered:
                entered = self._enter(ring)
            nbytes = min(step, size - start)
            slot = ring.free.popleft()
            try:
                if is_done(slot.handle):
                    slot.event.synchronize()
                if path is None:
                    memmove(slot.address, source + start, nbytes)
                else:
                    read_exactly(self._descriptor(path), slot.array[:nbytes], source + start, path)
                error = copy(target + start, slot.address, nbytes, ring.handle)
                error = error or record(slot.handle, ring.handle)
            finally:
                ring.free.append(slot)
            if error:
                raise RuntimeError(f"copying to the GPU gave CUDA error {error}")

    def _bring(self, tensor: _Converted, start: int) -> None:
        """A piece that is converted, or goes to a CPU."""
        ref, flat, step, mapped = tensor
        into, place = flat[start : start + step], ref.offset + start * ref.dtype.itemsize
        if ref.packed is not None:
            into.copy_(ref.packed.values(start, start + len(into), into.device))
        elif into.is_cuda:
            ring, nbytes = self._enter(self._ring(into.device)), len(into) * ref.dtype.itemsize
            slot = ring.free.popleft()
            try:
                slot.event.synchronize()
                if mapped is None:
                    read_exactly(self._descriptor(ref.path), slot.array[:nbytes], place, ref.path)
                else:
                    ctypes.memmove(slot.address, mapped + place, nbytes)
                into.copy_(slot.buffer[:nbytes].view(ref.dtype), non_blocking=True)
                slot.event.record()
            finally:
                ring.free.append(slot)
        elif into.dtype == ref.dtype:
            read_exactly(self._descriptor(ref.path), as_bytes(into), place, ref.path)
        else:
            raw = torch.empty(len(into), dtype=ref.dtype)
            read_exactly(self._descriptor(ref.path), as_bytes(raw), place, ref.path)
            into.copy_(raw)

    def _descriptor(self, path: str) -> int:
        files = self._local.__dict__.setdefault("files", {})
        if path not in files:
            try:
                files[path] = open(path, "rb", buffering=0)  # noqa: SIM115 - lives as long as its thread
            except OSError as e:
                raise FrankenError(f"{path}: cannot read the weights: {e.strerror}") from e
        return files[path].fileno()

    def _ring(self, device: torch.device) -> _Ring:
        with self._lock:
            if device not in self._rings:
                self._rings[device] = _Ring(device, self.workers + self.ON_THE_WAY, self.CHUNK)
            return self._rings[device]

    def _enter(self, ring: _Ring) -> _Ring:
        """Make the ring's stream this thread's current one, and with it the GPU."""
        if self._local.__dict__.get("ring") is not ring:
            torch.cuda.set_stream(ring.stream)
            self._local.ring = ring
        return ring
