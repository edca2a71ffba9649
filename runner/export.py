"""A modified model as a Hugging Face checkpoint: every tensor of a recipe computed, written and forgotten.

No model is loaded. A layer that is taken as it is passes through memory a tensor at a time, one that is
blended, perturbed or permuted a layer at a time, so that memory is bounded by the largest tensor and a few
layers, whatever the depth. The config is written last, into a folder that takes its name only when it is
whole: what an interruption or a full disk leaves cannot be loaded.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, GenerationConfig

from errors import FrankenError, first_line, many, printable
from franken import digest_of, find_layers, plain_attributes
from runner.cache import workspace, write_safetensors
from runner.exportable import RECORD, SHARD_BYTES, Chosen, check_folder, refuse_inexpressible
from runner.model_card import model_card
from runner.pairs import GIB, Located, load_tokenizer, stop_ids
from runner.results import write_json
from runner.self_check import check_code
from surgery.demands import add_delta, check_recipe, layer_jobs, outer_refs
from surgery.hashing import tensor_hash
from surgery.mixing import edit_in_place, mix, mix_in_place
from surgery.recipes import Outer, Permute, Recipe, Ref, Slot
from surgery.streaming import Stream
from surgery.tensors import TensorRef
from surgery.weights import OUTER_PARTS, Adapter, Layer, Source, outer_part

# What a checkpoint has for its tokenizer. Other files beside the weights may say anything and stay behind.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    dtype: torch.dtype
    bytes: int
    files: int
    fingerprint: str  # LiveModel.fingerprint of the same recipe in the same dtype


@dataclass
class _Written:
    """One tensor of the new checkpoint, and where it comes from."""

    label: str  # in the fingerprint
    dtype: torch.dtype
    shape: tuple[int, ...]
    refs: list[TensorRef]  # read as it is, or mixed as Outer says; none: part of a layer that is computed
    position: int | None = None  # None: outside the layers
    key: str = ""  # within the layer

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Exporter:
    """Writes recipes of a located pair as checkpoints.

    Args:
        located: the sources, by runner.pairs.open_sources.
        dtype: of what is written. None: what a run on this device would hold in memory (`run_dtype`), or the
            instruct side's own where every tensor is copied, which are the same numbers.
        device: where layers are computed. Noise is drawn there: a GPU's is another than a CPU's.
    Raises FrankenError for a model whose placebos are none, as a run does.
    """

    def __init__(
        self, located: Located, dtype: torch.dtype | None, run_dtype: torch.dtype, device: torch.device
    ):
        self.located, self.dtype, self.run_dtype, self.device = located, dtype, run_dtype, device
        self.stream = Stream()
        with init_empty_weights(include_buffers=True):
            skeleton = AutoModelForCausalLM.from_config(located.config)
        self.attributes = [plain_attributes(m) for m in find_layers(skeleton, located.config)[1]]
        self.kinds = [self.attributes.index(a) for a in self.attributes]

    # ---- what is written -----------------------------------------------------------------------------------

    def check(self, recipe: Recipe) -> None:
        """Raises FrankenError for a recipe that the live model would refuse as well."""
        refused: dict[str, str] = {}
        if any(isinstance(edit, Permute) for slot in recipe.slots for edit in slot.edits):
            found = check_code(copy.deepcopy(self.located.config), self.device, self.run_dtype)
            refused = {what: why for what, why in found["placebos"].items() if why}
        tied = bool(self.located.config.tie_word_embeddings)
        check_recipe(recipe, self.located.sources, self.kinds, tied, refused)

    def config_for(self, recipe: Recipe, dtype: torch.dtype) -> Any:
        """The config of a model of the recipe's layers; lists with an entry a layer follow them.

        Raises FrankenError where a layer would not be at its new position what it was at its own.
        """
        before, first = self.located.config, [slot.mix[0][0].layer for slot in recipe.slots]
        fields = before.to_dict()
        for name, value in fields.items():
            if isinstance(value, list) and len(value) == before.num_hidden_layers and "layer" in name:
                fields[name] = [value[i] for i in first]
        fields |= {"num_hidden_layers": len(recipe), "dtype": str(dtype).removeprefix("torch.")}
        for name in (
            "_name_or_path",
            "torch_dtype",
            "auto_map",
            "transformers_version",
            "quantization_config",
        ):
            fields.pop(name, None)
        try:
            config = type(before).from_dict(fields)
            config.tie_word_embeddings = bool(before.tie_word_embeddings)
            with init_empty_weights(include_buffers=True):
                skeleton = AutoModelForCausalLM.from_config(config)
        except Exception as e:  # a family whose config ties other numbers to the depth
            raise FrankenError(
                f"transformers makes no {before.model_type} of these {len(recipe)} layers: {first_line(e)}"
            ) from e
        config.architectures = [type(skeleton).__name__]
        self.stack_name, stack = find_layers(skeleton, config)
        for p, (module, i) in enumerate(zip(stack, first, strict=True)):
            there, here = plain_attributes(module), self.attributes[i]
            if there != here:
                where, what = next(key for key in {**here, **there} if here.get(key) != there.get(key))
                raise FrankenError(
                    f"position {p} holds layer {i}, whose {what} ({where or 'the layer'}) is"
                    f" {here.get((where, what))}, and a {before.model_type} has {there.get((where, what))}"
                    " there, whatever its config says"
                )
        self.names = [name for name, _ in skeleton.named_parameters(remove_duplicate=False)]
        self.saved = set(skeleton.state_dict())
        return config

    def _is_copied(self, slot: Slot) -> bool:
        """Whether a position's tensors are those of a file, to the bit."""
        return slot.is_plain and not isinstance(self._source(slot.mix[0][0]), Adapter)

    def _source(self, ref: Ref) -> Source:
        return self.located.sources[ref.source]

    def pick_dtype(self, recipe: Recipe) -> torch.dtype:
        """The dtype that was asked for, or the one that loses nothing."""
        if self.dtype is not None:
            return self.dtype
        outer = {part: getattr(recipe, part) for part in OUTER_PARTS}
        if not all(self._is_copied(slot) for slot in recipe.slots) or any(
            isinstance(mixed, Outer) for mixed in outer.values()
        ):
            return self.run_dtype
        read = [self.located.sources[source].outer[part] for part, source in outer.items()]
        read += [self._source(slot.mix[0][0]).layers[slot.mix[0][0].layer] for slot in recipe.slots]
        stored = {ref.dtype for tensors in read for ref in tensors.values()}
        return stored.pop() if len(stored) == 1 else self.run_dtype

    def tensors(self, recipe: Recipe, dtype: torch.dtype) -> dict[str, _Written]:
        """Every tensor by its name, in the order in which they are written; `config_for` comes first.

        Raises FrankenError if they are not those of the model.
        """
        written: dict[str, _Written] = {}
        tied = bool(self.located.config.tie_word_embeddings)
        outer = {part: {} for part in OUTER_PARTS}
        for name in self.names:
            part = outer_part(name)
            if part and not name.startswith(self.stack_name + "."):
                outer[part][name.rpartition(".")[2]] = name

        def add_outer(part: str) -> None:
            for key, name in sorted(outer[part].items()):
                if tied and (part, key) == ("head", "weight"):
                    continue
                refs = outer_refs(self.located.sources, getattr(recipe, part), part, key)
                written[name] = _Written(f"{part}.{key}", dtype, refs[0].shape, refs, None, key)

        add_outer("embed")
        for p, slot in enumerate(recipe.slots):
            first = slot.mix[0][0]
            for key, ref in sorted(self._source(first).layers[first.layer].items()):
                kept = [ref] if self._is_copied(slot) else []
                name = f"{self.stack_name}.{p}.{key}"
                written[name] = _Written(f"{p}.{key}", dtype, ref.shape, kept, p, key)
        add_outer("norm")
        add_outer("head")
        expected = {n for n in self.saved if not (tied and outer_part(n) == "head" and n.endswith("weight"))}
        if odd := sorted(expected ^ set(written)):
            raise FrankenError(f"{odd[0]} is only on one side: in the weights, or in what transformers makes")
        return written

    # ---- computing -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _computed(self, slot: Slot, dtype: torch.dtype) -> Layer:
        """One position's tensors, as LiveModel has them after `apply`."""
        layers = []
        for ref, _ in slot.mix:
            have = self._source(ref).layers[ref.layer]
            into = {name: torch.empty(r.shape, dtype=dtype, device=self.device) for name, r in have.items()}
            self.stream.read(layer_jobs(self._source(ref), ref, into))
            add_delta(self._source(ref), ref, into)
            layers.append(into)
        mix_in_place(layers[0], layers[1:], slot)
        edit_in_place(layers[0], slot, self.located.config)
        return layers[0]

    # ---- writing -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(
        self,
        what: Chosen,
        folder: Path,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        provenance: dict | None = None,
    ) -> Exported:
        """Write the checkpoint, whole or not at all.

        Args:
            provenance: what the record and the card say besides (versions, commit, command), and under
                "mergekit" the recipe as mergekit's YAML, where it has one.
        Raises FrankenError if it cannot be expressed, there is no room or the disk refuses.
        """
        # 1. everything that can be refused
        recipe = what.recipe
        refuse_inexpressible(what.name, recipe, what.suites, what.control)
        check_folder(folder, overwrite)
        for source in self.located.sources.values():
            if source.path.resolve().is_relative_to(folder.resolve()):
                raise FrankenError(f"{folder} holds {source.name}, which is read; export to another folder")
        self.check(recipe)
        dtype = self.pick_dtype(recipe)
        config = self.config_for(recipe, dtype)
        tensors = self.tensors(recipe, dtype)
        total = sum(t.nbytes for t in tensors.values())
        path = self.located.path
        load_tokenizer(path)  # its checks: a template that ends, files that are files
        stops = stop_ids(path)
        folder = folder.absolute()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder.parent).free
        except OSError as e:
            raise FrankenError(f"cannot write {folder}: {e.strerror}") from e
        if free < total + (64 << 20):
            raise FrankenError(
                f"the checkpoint takes {total / GIB:.1f} GiB, and {folder.parent} has {free / GIB:.1f} GiB"
                " free"
            )
        # 2. the weights, in a folder that nobody looks into
        try:
            with workspace(folder.parent) as work:
                out = work / "checkpoint"
                out.mkdir()
                hashes, files = self._write_weights(recipe, tensors, dtype, out, shard_bytes)
                order = sorted(tensors, key=lambda name: tensors[name].position is None)  # layers first
                fingerprint = digest_of({tensors[name].label: hashes[name] for name in order})
                # 3. what stands beside them; the config last, without which nothing loads
                self._write_beside(out, stops)
                record = {
                    "experiment": what.name,
                    "change": what.change,
                    "hypothesis": what.hypothesis,
                    "recipe": recipe.to_json(),
                    "sources": {n: self.located.sources[n].describe() for n in sorted(recipe.sources)},
                    "notes": self.located.notes,
                    "layers": len(recipe),
                    "dtype": str(dtype).removeprefix("torch."),
                    "fingerprint": fingerprint,
                    **(provenance or {}),
                }
                record["sources"] |= self.located.before_merging
                write_json(out / RECORD, record)
                if "mergekit" in record:
                    (out / "mergekit_config.yml").write_text(record["mergekit"])
                (out / "README.md").write_text(model_card(record), errors="backslashreplace")
                config.save_pretrained(out)
                _put(out, folder, work)
        except OSError as e:
            raise FrankenError(f"cannot write {folder}: {e.strerror or first_line(e)}") from e
        return Exported(folder, dtype, total, files, fingerprint)

    def _write_weights(
        self, recipe: Recipe, tensors: dict[str, _Written], dtype: torch.dtype, out: Path, shard_bytes: int
    ) -> tuple[dict[str, int], int]:
        """({name: hash}, files) of all tensors, in files of at most `shard_bytes`."""
        shards: list[list[str]] = []
        held = 0
        for name, tensor in tensors.items():
            if not shards or held + tensor.nbytes > shard_bytes:
                shards.append([])
                held = 0
            shards[-1].append(name)
            held += tensor.nbytes
        hashes: dict[str, int] = {}
        kept: tuple[int, Layer] | None = None  # the computed layer whose tensors are being written

        def make(name: str) -> torch.Tensor:
            nonlocal kept
            tensor = tensors[name]
            if tensor.refs:
                read = [torch.empty(tensor.shape, dtype=dtype) for _ in tensor.refs]
                self.stream.read(zip(tensor.refs, read, strict=True))
                made = read[0]
                if len(read) > 1:
                    how = getattr(recipe, tensor.label.partition(".")[0])
                    made.copy_(mix(read, [w for _, w in how.mix], how.mixing, tensor.key))
            else:
                assert tensor.position is not None
                if kept is None or kept[0] != tensor.position:
                    kept = None  # before the next one is made
                    kept = tensor.position, self._computed(recipe.slots[tensor.position], dtype)
                made = kept[1][tensor.key].cpu()
            hashes[name] = int(tensor_hash(made))
            return made

        for k, names in enumerate(shards):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
            print(printable(f"{file}: {many(len(names), 'tensor')}"), file=sys.stderr)
            write_safetensors(out / file, {n: (tensors[n].dtype, tensors[n].shape) for n in names}, make)
            kept = None
        if len(shards) > 1:
            where = {
                n: f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
                for k, s in enumerate(shards)
                for n in s
            }
            metadata = {
                "total_size": sum(t.nbytes for t in tensors.values()),
                "total_parameters": sum(math.prod(t.shape) for t in tensors.values()),
            }
            index = json.dumps({"metadata": metadata, "weight_map": where}, indent=2) + "\n"
            (out / "model.safetensors.index.json").write_text(index)
        return hashes, len(shards)

    def _write_beside(self, out: Path, stops: list[int]) -> None:
        """Tokenizer, chat template and generation config, as the instruct side has them."""
        path = self.located.path
        for name in TOKENIZER_FILES:
            if (path / name).is_file():
                shutil.copyfile(path / name, out / name)
        for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
            (out / "additional_chat_templates").mkdir(exist_ok=True)
            shutil.copyfile(file, out / "additional_chat_templates" / file.name)
        if (path / "generation_config.json").is_file():
            shutil.copyfile(path / "generation_config.json", out / "generation_config.json")
        else:
            GenerationConfig(eos_token_id=stops).save_pretrained(out)


def _put(out: Path, folder: Path, work: Path) -> None:
    """Give finished work its name; what was there goes, and comes back if that fails."""
    old = work / "old"
    replaced = folder.exists() and any(folder.iterdir())
    if replaced:
        folder.rename(old)
    try:
        out.rename(folder)
    except OSError:
        if replaced:
            old.rename(folder)
        raise
