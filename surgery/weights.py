"""Sources of weights on disk: checkpoints, and LoRA adapters on top of one.

A `Checkpoint` reads no weight. It knows, for every tensor, its file, offset, dtype and shape, and
surgery/streaming.py reads any list of them to where they run.
"""

from __future__ import annotations

import hashlib
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from errors import FrankenError
from files import ROOT, read_json
from surgery.experts import fused
from surgery.quantized import method, unpacked
from surgery.tensors import TensorRef, read_header, read_tensor, refuse_dtype

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
