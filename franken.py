"""The live model: one model in memory that becomes whatever a recipe says.

**`LiveModel.apply(recipe)` changes the weights in place.** There is no undo: going back is `apply(identity)`,
and it is exact to the bit; `fingerprint()` proves it. Only what differs from the present state is moved:
permutations along their cycles through one spare layer, everything else read from disk a tensor at a time.

`engine.generation.Engine` runs what the recipe says. The transformers module `live.model` holds the weights
and runs them as the checkpoint's config says: at full depth, each layer once, as it is. Where a recipe says
more, calling or saving that module raises FrankenError.

`python franken.py export NAME DIR` writes a modified model as a checkpoint; `python franken.py --help` lists
all that can be done with one (runner/commands.py).
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, cast

if __name__ == "__main__":
    # The commands stand above this module, which they import by its own name; here, before torch, so that a
    # typo is told at once.
    sys.exit(importlib.import_module("runner.commands").main())

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from errors import FrankenError
from surgery.demands import add_delta, check_recipe, layer_jobs, outer_refs, tensor_refs
from surgery.hashing import tensor_hash
from surgery.mixing import edit_in_place, mix, mix_in_place
from surgery.permuting import permute_units_in_place
from surgery.recipes import *  # the operations are offered here too: `from franken import swap, perturb`
from surgery.streaming import Stream
from surgery.weights import OUTER_PARTS, Layer, Source, outer_part


@dataclass
class Surgery:
    """What one `apply` did. Bytes are of the destination tensors."""

    seconds: float = 0.0
    bytes_moved: int = 0  # copied between layers on the device
    bytes_streamed: int = 0  # read from disk or page cache
    bytes_computed: int = 0  # blended, perturbed or permuted
    positions: list[int] = field(default_factory=list)


@dataclass
class Bank:
    """Storage for one layer: the module that computes with it (None for a parked layer) and what it holds
    now."""

    tensors: Layer
    device: torch.device
    module: nn.Module | None
    held: Slot | None  # None: contents unknown, because a write into it did not finish
    kind: int | None = None  # whose plain attributes the module has now; see LiveModel.kinds


class LiveModel:
    """A causal language model whose layers can be rearranged, replaced and edited in place.

    Args:
        sources: layers by source name; the first one is what the model is at first.
        config: the transformers config of that first source.
        dtype: of the weights in memory.
        device: where the model runs, or a dict from module name to device (accelerate's format) to spread it.
        resident: names of sources kept whole on the device beside the model, so that splicing from them is a
            copy
            on the device. Needs the memory for them.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        config,
        dtype: torch.dtype,
        device: torch.device | dict[str, torch.device],
        resident: tuple[str, ...] = (),
    ):
        self.sources, self.config, self.dtype = dict(sources), config, dtype
        # sources that are not here yet: what brings each into `sources`, called when a recipe first wants it
        self.coming: dict[str, Callable[[], None]] = {}
        self.home = next(iter(sources))
        self.stream = Stream()
        with init_empty_weights(include_buffers=False):  # parameters take no memory until `_materialize`
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model.eval().requires_grad_(False)
        self.tied = bool(config.tie_word_embeddings)
        self.refused_placebos: dict[str, str] = {}  # Permute.what -> why it would change the function
        stack_name, stack = find_layers(self.model, config)
        places = device if isinstance(device, dict) else {"": device}
        self.stack_name = stack_name
        self.backbone = self.model.get_submodule(stack_name.rpartition(".")[0])
        self.banks: list[Bank] = []
        for i, module in enumerate(stack):
            # cache slots are handed to layers, so one compiled layer serves all positions
            _set_layer_index(module, 0)
            where = _place(places, f"{stack_name}.{i}")
            self.banks.append(Bank(_materialize(module, dtype, where), where, module, None))
        self.outer: dict[str, Layer] = {part: {} for part in OUTER_PARTS}
        self.norm: Any  # the final one
        self._materialize_outer(places, stack_name)
        self.attributes = [plain_attributes(module) for module in stack]
        # layers of equal kind have equal numbers
        self.kinds = [self.attributes.index(a) for a in self.attributes]
        for bank, kind in zip(self.banks, self.kinds, strict=True):
            bank.kind = kind
        self.layer_types = list(getattr(config, "layer_types", None) or ["full_attention"] * len(stack))
        if odd := set(self.layer_types) - {"full_attention", "sliding_attention"}:
            raise FrankenError(
                f"layers of kind {', '.join(sorted(odd))} are not supported, only full and sliding attention"
            )
        self.original = identity(len(stack), self.home)
        self.order = list(range(len(stack)))
        self.scales: tuple[float, ...] = (1.0,) * len(stack)  # of each running position's contribution
        self.parallel: tuple[tuple[int, int], ...] = ()  # blocks of running positions that run side by side
        self.outer_held: dict[str, str | Outer | None] = {part: None for part in OUTER_PARTS}
        self._spare: dict[tuple[torch.device, tuple], Layer] = {}
        self.recipe: Recipe | None = None
        self.first_surgery = self.last_surgery = self.apply(self.original)
        for name in resident:
            self.park(name)
        self._guard_model()

    def _materialize_outer(self, places: dict, stack_name: str) -> None:
        for name, module in self.model.named_modules():
            if name == stack_name or name.startswith(stack_name + "."):
                continue
            where = _place(places, name)
            for key, tensor in list(module.named_parameters(recurse=False)):
                full = f"{name}.{key}"
                part = outer_part(full)
                if part is None:
                    raise FrankenError(
                        f"the model has a parameter outside the layers that is not supported: {full}"
                    )
                if part == "norm":
                    self.norm = module
                if not (self.tied and part == "head" and key == "weight"):
                    setattr(
                        module,
                        key,
                        nn.Parameter(
                            torch.empty_like(tensor, dtype=self.dtype, device=where), requires_grad=False
                        ),
                    )
                    self.outer[part][key] = getattr(module, key).data
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = buffer.to(where)
        if self.tied:  # one tensor serves both ends, wherever the first of them lies
            self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight

    # ---- what it is made of --------------------------------------------------------------------------------

    @property
    def layers(self) -> list[Bank]:
        """The banks in running order; one bank stands at several positions when a layer is repeated."""
        return [self.banks[j] for j in self.order]

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.model.get_input_embeddings().weight.device

    def attention_kinds(self) -> list[str]:
        """For every running position, the attention kind ("full_attention", "sliding_attention", ...) of its
        layer."""
        kinds = []
        for bank in self.layers:
            assert bank.held is not None, "only after a surgery that did not finish are contents unknown"
            kinds.append(self.layer_types[bank.held.mix[0][0].layer])
        return kinds

    @property
    def source_names(self) -> set[str]:
        """Of the sources that recipes may name, those that still come in as well."""
        return {*self.sources, *self.coming}

    def hold_sources(self) -> None:
        """Let a GPU read the sources' files where they lie, as soon as their pages are registered.

        That goes on in the background, where it keeps first launches of kernels waiting: so at the end of all
        that is done before a run (0.2 to 0.5 s each in the checks of a 32B pair).
        """
        if self.device.type == "cuda":
            self.stream.hold(ref for source in self.sources.values() for ref in tensor_refs(source))

    def layer_bytes(self) -> int:
        return sum(t.nbytes for t in self.banks[0].tensors.values())

    @torch.no_grad()
    def fingerprint(self) -> str:
        """A hash of every weight that runs, in running order, and of embedding, norm and head.

        Equal fingerprints mean equal bits (up to a collision, about 2^-63 for any given difference). It is a
        function of the weights and of how they run (scales, positions side by side): parked layers, spare
        memory and history do not enter.
        """
        hashes, labels = [], []
        for p, bank in enumerate(self.layers):
            for name in sorted(bank.tensors):
                labels.append(f"{p}.{name}")
                hashes.append(tensor_hash(bank.tensors[name]))
        for part in OUTER_PARTS:
            for name, tensor in sorted(self.outer[part].items()):
                labels.append(f"{part}.{name}")
                hashes.append(tensor_hash(tensor))
        values = torch.stack([h.to(self.device) for h in hashes]).tolist()
        return digest_of(dict(zip(labels, values, strict=True)), self.scales, self.parallel)

    # ---- the module that transformers knows ----------------------------------------------------------------

    def beyond_module(self) -> str | None:
        """Why the transformers module `model` would not compute what the recipe says; None where it would."""
        if self.recipe is None:
            return "the last surgery did not finish"
        if len(self.recipe) != len(self.original):
            return f"{len(self.recipe)} positions run, and the module has {len(self.original)} layers"
        if any(scale != 1 for scale in self.scales):
            return "layers' contributions are scaled"
        if self.parallel:
            return "layers run side by side"
        kinds = [self._kind_of(p) for p in range(len(self.original))]
        if any(k is None or self.attributes[k] != self.attributes[p] for p, k in enumerate(kinds)):
            return "layers of different attention kinds have changed places, which the config does not say"
        return None

    def _guard_model(self) -> None:
        """Let transformers' own forward pass and saving refuse where they would silently be of another
        model."""

        def guarded(method, doing: str):
            @wraps(method)  # generate() reads forward's signature
            def refuse_or_do(*args, **kwargs):
                if reason := self.beyond_module():
                    raise FrankenError(f"{doing} through transformers would be another model's: {reason}")
                return method(*args, **kwargs)

            return refuse_or_do

        self.model.save_pretrained = guarded(self.model.save_pretrained, "saving this model")
        self.model.forward = guarded(self.model.forward, "running this model")

    # ---- becoming what a recipe says -----------------------------------------------------------------------

    @torch.no_grad()
    def apply(self, recipe: Recipe) -> Surgery:
        """Become the model that the recipe describes, **in place**, moving only what differs from the present
        state.

        Raises FrankenError for a recipe this model cannot hold (unknown source, layer number out of range,
        layers of different attention kinds mixed in one position, tied ends from two sources). Such a recipe
        changes nothing. If reading fails halfway the model is in no defined state, and the next `apply`
        repairs all that is unknown. A source that still comes in is waited for.
        """
        for name in recipe.sources & set(self.coming):
            self._arrive(name)
        self._check(recipe)
        begin, report = time.perf_counter(), Surgery()
        streamed_before = self.stream.bytes_read
        self.recipe = None
        held = [slot.weights for slot in recipe.slots]
        undone = self._undo_permutations(held, report)
        order = self._assign(held)
        want = {j: slot for j, slot in zip(order, held, strict=True) if self.banks[j].held != slot}
        report.positions = [p for p, j in enumerate(order) if j in want or j in undone]
        self._place_plain(want, report)
        for j, slot in want.items():
            if not slot.is_plain:
                self._mix_and_edit(self.banks[j], slot, report)
        for j in order:  # all, not only `want`: a failed apply leaves moved layers without
            bank, kind = self.banks[j], self._kind_of(j)
            # looking at every attribute of 64 layers took 2.5 ms of each apply
            if bank.kind != kind:
                assert bank.module is not None and kind is not None, "it runs, and its layer is known by now"
                _set_attributes(bank.module, self.attributes[kind])
                bank.kind = kind
        self._read_outer({part: getattr(recipe, part) for part in OUTER_PARTS})
        self.order, self.recipe = order, recipe
        self.scales, self.parallel = tuple(slot.scale for slot in recipe.slots), recipe.parallel
        for device in {bank.device for bank in self.banks if bank.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        report.bytes_streamed = self.stream.bytes_read - streamed_before
        report.seconds = time.perf_counter() - begin
        self.last_surgery = report
        return report

    def _arrive(self, name: str) -> None:
        """Wait for a source. Raises what its coming raises, now and each time that it is wanted again."""
        arrive = self.coming.pop(name)
        try:
            arrive()
        except BaseException:
            self.coming[name] = arrive
            self.sources.pop(name, None)
            raise

    def _kind_of(self, j: int) -> int | None:
        held = self.banks[j].held
        return None if held is None else self.kinds[held.mix[0][0].layer]

    def _check(self, recipe: Recipe) -> None:
        check_recipe(recipe, self.sources, self.kinds, self.tied, self.refused_placebos)

    def _undo_permutations(self, wanted: list[Slot], report: Surgery) -> set[int]:
        """Put units and heads back into their order, in place, in banks that so become what is wanted.

        A permutation only moves numbers, so its inverse is exact. Reading 32B weights again took half of a
        placebo's time. Returns which banks.
        """
        permuted = [(j, bank) for j, bank in enumerate(self.banks) if bank.held and bank.held.edits]
        if not permuted:  # to make the set below takes 0.5 ms, and a layer is read in 18
            return set()
        needed = set(wanted) | {plain(*_ref(slot)) for slot in wanted}
        banks = set()
        for j, bank in permuted:
            slot, edits = bank.held, []
            while slot and slot not in needed and slot.edits and isinstance(slot.edits[-1], Permute):
                edits.append(slot.edits[-1])
                slot = replace(slot, edits=slot.edits[:-1])
            if not edits or slot not in needed:
                continue
            bank.held = None  # until all of them are undone
            for edit in edits:
                permute_units_in_place(bank.tensors, edit, self.config, back=True)
            report.bytes_computed += sum(t.nbytes for t in bank.tensors.values())
            bank.held = slot
            banks.add(j)
        return banks

    def _assign(self, slots: list[Slot]) -> list[int]:
        """Which bank serves each position. At full depth bank p is position p, so that captured graphs stay
        valid."""
        n = len(self.original)
        if len(slots) == n:
            return list(range(n))
        running = [j for j, bank in enumerate(self.banks) if bank.module is not None]
        needed = dict.fromkeys(slots)
        serves: dict[Slot, int] = {}
        for j in running:
            held = self.banks[j].held
            if held is not None and held in needed:
                serves.setdefault(held, j)
        free = [j for j in running if j not in serves.values()]
        for slot in needed:
            if slot not in serves:
                serves[slot] = free.pop(0) if free else self._add_bank()
        return [serves[slot] for slot in slots]

    def _add_bank(self) -> int:
        """One more running layer, for recipes with more different layers than the model has."""
        like = self.banks[len(self.original) - 1]
        with init_empty_weights(include_buffers=False):
            make = cast(Callable[..., nn.Module], type(like.module))
            module = make(self.config, layer_idx=0).eval().requires_grad_(False)
        _set_layer_index(module, 0)
        self.banks.append(Bank(_materialize(module, self.dtype, like.device), like.device, module, None))
        return len(self.banks) - 1

    def park(self, source: str) -> None:
        """Keep a source's layers on the device, beside the running ones."""
        for i in range(len(self.original)):
            like = self.banks[i]
            tensors = {k: torch.empty_like(t) for k, t in like.tensors.items()}
            self.banks.append(Bank(tensors, like.device, None, None))
            self._read(len(self.banks) - 1, Ref(source, i))

    def _place_plain(self, want: dict[int, Slot], report: Surgery) -> None:
        """Bring the first layer of every wanted mixture to its bank: by copies on the device where it is
        there already.

        The copies form a graph in which every bank has one origin; a bank is overwritten only once nobody
        still has to read it, and what remains are cycles, each broken with the spare layer. Where a parked
        layer comes to run, its storage takes a layer that is displaced, so that both stay on the device.
        """
        # 1. which banks must change, and which bank has what they want
        target = {
            j: plain(*_ref(slot)) for j, slot in want.items() if self.banks[j].held != plain(*_ref(slot))
        }
        homes: dict[Slot | None, list[int]] = {}
        for j, bank in enumerate(self.banks):
            homes.setdefault(bank.held, []).append(j)
        origin = {j: homes[slot][-1] for j, slot in target.items() if homes.get(slot)}
        # 2. parked banks take what would be lost
        parked = [k for k, bank in enumerate(self.banks) if bank.module is None]
        after = Counter(want.get(j, bank.held) for j, bank in enumerate(self.banks) if parked)
        for j, bank in enumerate(self.banks if parked else ()):
            # about to be lost, unless a parked copy is not needed
            if bank.held and bank.held.is_plain and not after[bank.held]:
                k = next(
                    (k for k in parked if self.banks[k].held is None or after[self.banks[k].held] > 1), None
                )
                if k is None:
                    break
                after[self.banks[k].held] -= 1
                after[bank.held] += 1
                parked.remove(k)
                origin[k], target[k] = j, bank.held
        # 3. copies, cycles last; then the disk
        readers = Counter(origin.values())
        ready = [j for j in origin if not readers[j]]
        while origin:
            if not ready:  # only cycles are left: free one bank by moving its layer to the spare
                j = next(iter(origin))
                spare = self._spare_for(self.banks[j].device, j)
                self._copy(spare, self.banks[j].tensors, report)
                held = self.banks[j].held
                chain = [j]
                while origin[chain[-1]] != j:
                    chain.append(origin[chain[-1]])
                for dst in chain[:-1]:
                    self._move(dst, origin.pop(dst), target, report)
                last = chain[-1]
                origin.pop(last)
                self.banks[last].held = None
                self._copy(self.banks[last].tensors, spare, report)
                self.banks[last].held = held
                continue
            j = ready.pop()
            k = origin.pop(j)
            self._move(j, k, target, report)
            readers[k] -= 1
            if not readers[k] and k in origin:
                ready.append(k)
        self._read_layers({j: slot.mix[0][0] for j, slot in target.items() if self.banks[j].held != slot})

    def _move(self, dst: int, src: int, target: dict[int, Slot], report: Surgery) -> None:
        self.banks[dst].held = None
        self._copy(self.banks[dst].tensors, self.banks[src].tensors, report)
        self.banks[dst].held = target[dst]

    def _copy(self, into: Layer, from_: Layer, report: Surgery) -> None:
        for name, tensor in into.items():
            tensor.copy_(from_[name], non_blocking=True)
            report.bytes_moved += tensor.nbytes

    def _spare_for(self, device: torch.device, like: int) -> Layer:
        """Memory on a device for a layer that is built as the one in bank `like`."""
        tensors = self.banks[like].tensors
        key = device, tuple((k, t.shape) for k, t in tensors.items())
        if key not in self._spare:
            self._spare[key] = {k: torch.empty_like(t, device=device) for k, t in tensors.items()}
        return self._spare[key]

    def _read(self, j: int, ref: Ref) -> None:
        self._read_layers({j: ref})

    def _read_layers(self, wanted: dict[int, Ref]) -> None:
        """Stream layers from disk into banks, all in one go so that reads and copies overlap."""
        jobs = []
        for j, ref in wanted.items():
            self.banks[j].held = None
            jobs += self._jobs(ref, self.banks[j].tensors)
        self.stream.read(jobs)
        for j, ref in wanted.items():
            self._add_delta(ref, self.banks[j].tensors)
            self.banks[j].held = plain(ref.source, ref.layer)

    def _jobs(self, ref: Ref, into: Layer) -> list:
        return layer_jobs(self.sources[ref.source], ref, into)

    def _add_delta(self, ref: Ref, into: Layer) -> None:
        add_delta(self.sources[ref.source], ref, into)

    def _mix_and_edit(self, bank: Bank, slot: Slot, report: Surgery) -> None:
        """Turn the plain first layer of the mixture, already in the bank, into the mixture with its edits."""
        bank.held = None
        others = [self._fetch(ref, bank.device, own) for own, (ref, _) in enumerate(slot.mix[1:])]
        mix_in_place(bank.tensors, others, slot)
        edit_in_place(bank.tensors, slot, self.config)
        report.bytes_computed += sum(t.nbytes for t in bank.tensors.values())
        bank.held = slot

    def _fetch(self, ref: Ref, device: torch.device, spare: int) -> Layer:
        """A layer for reading: where it lies on this device, else in spare memory, streamed there."""
        for bank in self.banks:
            if bank.held == plain(ref.source, ref.layer) and bank.device == device:
                return bank.tensors
        into = (
            self._spare_for(device, ref.layer)
            if spare == 0
            else {k: torch.empty_like(t) for k, t in self._spare_for(device, ref.layer).items()}
        )
        self.stream.read(self._jobs(ref, into))
        self._add_delta(ref, into)
        return into

    def _read_outer(self, wanted: dict[str, str | Outer]) -> None:
        parts = [part for part in OUTER_PARTS if self.outer_held[part] != wanted[part]]
        jobs, mixed = [], []
        for part in parts:
            self.outer_held[part] = None
            for name, tensor in self.outer[part].items():
                refs = outer_refs(self.sources, wanted[part], part, name)
                into = [tensor, *(torch.empty_like(tensor) for _ in refs[1:])]
                jobs += zip(refs, into, strict=True)
                mixed += [(wanted[part], name, into)] if len(into) > 1 else []
        self.stream.read(jobs)
        for what, name, into in mixed:
            into[0].copy_(mix(into, [w for _, w in what.mix], what.mixing, name))
        self.outer_held |= {part: wanted[part] for part in parts}


def digest_of(
    hashes: dict[str, int], scales: Sequence[float] = (), parallel: Sequence[tuple[int, int]] = ()
) -> str:
    """LiveModel.fingerprint of `tensor_hash` by label: "p.name" in running order and by name, then those of
    embedding, norm and head as "part.name"."""
    lines = [f"{label} {value}" for label, value in hashes.items()]
    lines += [f"{p}.scale {scale!r}" for p, scale in enumerate(scales) if scale != 1]
    lines += [f"parallel {start} {stop}" for start, stop in parallel]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _ref(slot: Slot) -> tuple[str, int]:
    ref = slot.mix[0][0]
    return ref.source, ref.layer


def find_layers(model: nn.Module, config) -> tuple[str, nn.ModuleList]:
    """The decoder stack: the one ModuleList as long as the config says, outside any vision tower.

    Raises FrankenError if there is none or more than one.
    """
    n = config.num_hidden_layers
    stacks = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList)
        and len(m) == n
        and "vision" not in name
        and next(m[0].parameters(), None) is not None
    ]
    outermost = [(a, m) for a, m in stacks if not any(a.startswith(b + ".") for b, _ in stacks)]
    if len(outermost) != 1:
        raise FrankenError(
            f"{type(model).__name__}: expected one list of {n} decoder layers, found {len(outermost)}"
        )
    return outermost[0]


def _place(places: dict, name: str) -> torch.device:
    """The device of a module under accelerate's device map: its own entry or its closest ancestor's."""
    while name not in places and name:
        name = name.rpartition(".")[0]
    if name not in places:
        return torch.device(next(iter(places.values())))
    return torch.device(places[name])


def _materialize(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Layer:
    tensors = {}
    for prefix, sub in module.named_modules():
        for key, tensor in list(sub.named_parameters(recurse=False)):
            setattr(
                sub,
                key,
                nn.Parameter(torch.empty_like(tensor, dtype=dtype, device=device), requires_grad=False),
            )
            tensors[f"{prefix}.{key}" if prefix else key] = getattr(sub, key).data
        for key, buffer in sub.named_buffers(recurse=False):
            sub._buffers[key] = buffer = buffer.to(device)
            # what is saved belongs to the layer (xIELU's beta); the rest is computed from the config
            if key not in sub._non_persistent_buffers_set and buffer.is_floating_point():
                tensors[f"{prefix}.{key}" if prefix else key] = buffer
    return tensors


def _set_layer_index(module: nn.Module, index: int) -> None:
    for sub in module.modules():
        if hasattr(sub, "layer_idx"):
            cast(Any, sub).layer_idx = index  # nn.Module's type knows of tensors and modules alone


def plain_attributes(layer: nn.Module) -> dict[tuple[str, str], object]:
    """What a layer knows besides its weights: window sizes, attention type, whether it rotates, ...

    These belong to the layer and move with it; `layer_idx` belongs to the position and does not.
    """
    kept = {}
    for name, sub in layer.named_modules():
        for key, value in vars(sub).items():
            if (
                not key.startswith("_")
                and key not in ("layer_idx", "training", "config")
                and isinstance(value, int | float | str | type(None))
            ):
                kept[name, key] = value
    return kept


def _set_attributes(layer: nn.Module, attributes: dict[tuple[str, str], object]) -> None:
    for (name, key), value in attributes.items():
        sub = layer.get_submodule(name)
        if getattr(sub, key) != value:
            setattr(sub, key, value)
