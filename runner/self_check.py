"""Whether the harness computes what transformers computes, asked of every checkpoint before it is trusted.

The engine has its own loop over decoder layers, names tensors itself and permutes them for placebos. None of
that is right for a family because the family is on a list; it is right where it gives the numbers of
transformers' own forward pass. Two checks say so:

- `check_code`: a small random model of the checkpoint's own config (a layer of every kind, narrow, its
  sliding window and its original context a few tokens long) in float32: prompts on both sides of those
  limits, alone and in batches, replies that cross them, on the fast path too where there is one, and every
  placebo against the unmodified model.
- `check_weights`: the live model's first layers, as many as show every kind of layer, with its embedding,
  norm and head, against transformers' own loading of the same folder.

Both take seconds and are kept: what has passed once is not asked again while config, weights, code, library
versions, dtype and kind of device stay the same. A difference beyond tolerance raises FrankenError with the
number. Differences are in units of the reference's own spread: the root mean square of the difference over
that of the logits about their mean.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    PreTrainedModel,
)

from engine.generation import Engine
from engine.sampling import Request
from errors import FrankenError, first_line
from franken import LiveModel
from runner.cache import cache_dir
from runner.resuming import code_sha256
from surgery.recipes import Recipe, identity, permute_units
from surgery.weights import Checkpoint

# Sums in another order differ by 1e-6 to 1e-5 in float32; the smallest of the faults that this is for (YaRN's
# factor left out of one layer kind, sinks, a window one token off) by 1e-2.
TOLERANCE = 1e-3
# In 16 bits every layer rounds anew. Where that alone comes to more, transformers' own rounding decides.
SAME_CODE = 5e-3  # in 16 bits, where transformers' code runs on both sides: mostly 0
TOLERANCES = {torch.float32: TOLERANCE, torch.bfloat16: 0.1, torch.float16: 0.05}
# By how much the likeliest token may exceed the one chosen in 16 bits. The small model's logits are off by
# some 0.02 of their spread then, which exchanges close rivals; other logits put a token behind by 1 or more.
STEP, FAST, FAST_TOLERANCE = "steps on the fast path", "replies on the fast path", 0.3
WINDOW, CONTEXT = 8, 24  # tokens: of the small model's sliding window and original context
WIDEST = 128  # of the small model's MLP
VOCABULARY = 160
SMALL = "a small random model"  # what errors call it
TEMPORARY = re.compile(r"\S*/franken-[^\s/:]+(/[^\s:]+)?")  # where the small model's files lie
MOST_LAYERS = 8  # of the small model
MOST_EXPERTS = 16  # of one of its layers, unless more answer together
TOKENS, COMPARED = 12, 4  # of the prompt that the live model is asked, and at how many of its last positions
HELD_WHOLE = 1 << 30  # bytes of weights up to which all layers are compared
PLACEBOS = ("mlp", "heads", "both")
CODE = ("franken.py", "engine", "surgery", "runner/self_check.py", "runner/pairs.py")
_passed: dict[str, dict] = {}


# ---- what is kept ------------------------------------------------------------------------------------------


def code_hash() -> str:
    """The sources whose results are checked here, by their hash, and the libraries' versions."""
    return f"{code_sha256(CODE)} {torch.__version__} {transformers.__version__}"


def once(what: dict, check: Callable[[], dict]) -> dict:
    """What `check()` gives, from the cache where the same has passed before.

    what: everything that the outcome depends on beside the code, as JSON. A failed check raises and is not
    kept; a cache that cannot be read or written only costs the time.
    """
    text = json.dumps(what | {"code": code_hash()}, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    if key in _passed:
        return _passed[key]
    file = cache_dir() / "self-checks" / f"{what.get('check', 'check')}-{key}.json"
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        kept = None
    if not isinstance(kept, dict):
        kept = check()
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(kept) + "\n")
            part.replace(file)
    _passed[key] = kept
    return kept


# ---- the code, on a small random model ---------------------------------------------------------------------


def check_code(config, device: torch.device, dtype: torch.dtype = torch.float32) -> dict:
    """The largest difference of each part of the engine from transformers, and which placebos are none.

    Args:
        config: of the text model; it is not changed.
        device: where the model is to run; on a GPU the fast path is asked too.
        dtype: of the weights there, in which the fast path is asked.

    Returns {"differences": {part: number}, "placebos": {what: why it is refused, or None}}.
    Raises FrankenError where one is beyond TOLERANCE or where the engine cannot run such a model at all.
    """
    kind = device.type
    if kind == "cuda":
        kind = torch.cuda.get_device_name(device)
    what = {"check": "code", "config": config.to_dict(), "device": kind}
    if kind != "cpu":
        what["dtype"] = str(dtype)
    return once(what, lambda: _quietly(_check_code, config, device, dtype, kind != "cpu"))


def _check_code(config, device: torch.device, dtype: torch.dtype, with_fast_path: bool) -> dict:
    name = config.model_type
    with contextlib.ExitStack() as rooms, _refusing(f"the engine cannot run {name}"):
        # 1. the same small model twice: as transformers runs it, and as a checkpoint that is opened here
        try:
            config, reference = _small(config)
        except Exception:  # a family whose widths depend on one another otherwise
            config, reference = _small(config, narrow=False)
        folder = rooms.enter_context(tempfile.TemporaryDirectory(prefix="franken-"))
        cast(PreTrainedModel, reference).save_pretrained(folder)
        live = LiveModel({SMALL: Checkpoint(SMALL, folder)}, config, torch.float32, device)
        reference = reference.to(device)
        engine = Engine(live, _NO_TOKENIZER, fast=False)
        # 2. prompts and replies
        differences = {
            "prompts": _gap_of_prompts(engine, reference),
            "prompts in one batch": _gap_of_batches(engine, reference),
            "replies": _gap_of_replies(engine, reference),
        }
        if with_fast_path:
            same = LiveModel({SMALL: Checkpoint(SMALL, folder)}, copy.deepcopy(config), dtype, device)
            fast = Engine(same, _NO_TOKENIZER, fast=True)
            if fast.fast:
                rounded = copy.deepcopy(reference).to(dtype).float()
                differences[STEP] = _gap_of_steps(fast, rounded)
                differences[FAST] = _gap_of_replies(fast, rounded)
        # 3. placebos; the folder is still read, whenever one is taken back
        placebos = {what: _refusal(engine, what) for what in PLACEBOS}
    for part, gap in differences.items():
        most = TOLERANCE
        if part in (STEP, FAST):
            most = TOLERANCES[dtype] if part == STEP else max(TOLERANCES[dtype], FAST_TOLERANCE)
        if not gap <= most:
            raise FrankenError(
                f"the engine does not compute {name} as transformers does: on a small random model {part}"
                f" differ by {gap:.2g} of the logits' spread (tolerance {most:g}); this model is not run"
            )
    return {"differences": differences, "placebos": placebos}


def _small(config, narrow: bool = True) -> tuple[Any, nn.Module]:
    small = shrunk(config, narrow)
    return small, random_model(small).eval()


def _prompts() -> list[tuple[int, ...]]:
    """Within every limit, beyond the window, beyond the original context."""
    rng = torch.Generator().manual_seed(0)
    lengths = (WINDOW - 1, CONTEXT - 4, CONTEXT + WINDOW)
    return [tuple(torch.randint(2, VOCABULARY, (n,), generator=rng).tolist()) for n in lengths]


def _gap_of_prompts(engine: Engine, reference) -> float:
    return max(
        difference(engine.logits(engine.prefill([ids])[0]), logits_of(reference, ids)) for ids in _prompts()
    )


def _gap_of_batches(engine: Engine, reference) -> float:
    """Prompts of several lengths, and some that begin alike, in one call; the reference has each alone."""
    short, middle, long = _prompts()
    prompts = [
        short,
        middle,
        long,
        *((*long[:-2], 7, k) for k in range(5)),
        *((*middle, k) for k in range(8)),
    ]
    ours = engine.next_token_logprobs(prompts)
    wanted = [logits_of(reference, ids)[-1].log_softmax(-1).cpu() for ids in prompts]
    return max(difference(a, b) for a, b in zip(ours, wanted, strict=True))


def _gap_of_replies(engine: Engine, reference) -> float:
    """By how much the most likely next token of transformers exceeds the one that the engine wrote.

    Of several rows at once, each alone in the reference, at every token of the reply.
    """
    requests = [Request(str(k), ids, 8) for k, ids in enumerate(_prompts())]
    worst = 0.0
    for request, done in zip(requests, engine.complete(requests), strict=True):
        if len(done.token_ids) != request.max_new_tokens:
            return float("inf")
        for n, token in enumerate(done.token_ids):
            logits = logits_of(reference, (*request.prompt_ids, *done.token_ids[:n]))[-1]
            worst = max(worst, float((logits.max() - logits[token]) / logits.std()))
    return worst


def _gap_of_steps(engine: Engine, reference) -> float:
    """Logits of the second token of a reply by the fast path's decode step, of several rows at once."""
    from engine.accelerated import Accelerator  # imports torch.compile's machinery, which a CPU never needs

    requests = [Request(str(k), ids, 8) for k, ids in enumerate(_prompts())]
    written = [5 + k for k in range(len(requests))]
    with torch.inference_mode():
        states = Accelerator(engine).states_after(requests, written)
        ours = engine.logits(states)
    wanted = [
        logits_of(reference, (*r.prompt_ids, token))[-1] for r, token in zip(requests, written, strict=True)
    ]
    return max(difference(a, b) for a, b in zip(ours, wanted, strict=True))


def _refusal(engine: Engine, what: str) -> str | None:
    """Why the placebo is refused on models of this config; None where it leaves the function as it is."""
    live, ids = engine.live, _prompts()[-1]
    before = engine.logits(engine.prefill([ids])[0])
    try:
        live.apply(permute_units(live.original, 7, what))
        gap = difference(engine.logits(engine.prefill([ids])[0]), before)
    except FrankenError as e:
        return str(e)
    finally:
        live.apply(live.original)
    if gap <= TOLERANCE:
        return None
    return (
        f"permuting {what} changes the logits of a small {engine.config.model_type} by {gap:.2g} of their"
        " spread: it would be no placebo"
    )


def shrunk(config, narrow: bool = True):
    """The config of a small model in which everything that the layers' kinds depend on is there.

    A layer of every kind that the config's lists tell apart; the width and number of heads that give the same
    width of a head; a short window, and an original context shorter than the prompts. Lengths that a config
    does not state stay unstated.
    """
    small = copy.deepcopy(config)
    # 1. layers: the first two, and the first of every other kind
    n = small.num_hidden_layers
    lists = {k: v for k, v in small.to_dict().items() if isinstance(v, list) and len(v) == n}
    kinds = list(zip(*map(_hashable, lists.values()), strict=True)) if lists else []
    firsts = {kinds.index(kind) for kind in dict.fromkeys(kinds)}
    chosen = sorted({*range(min(2, n)), *firsts})[:MOST_LAYERS]
    small.num_hidden_layers = len(chosen)
    for key, values in lists.items():
        setattr(small, key, [values[i] for i in chosen])
    # 2. widths
    heads, groups = small.num_attention_heads, getattr(small, "num_key_value_heads", None)
    if narrow and heads > 4 and heads % 4 == 0 and small.hidden_size % heads == 0:
        per_head = small.hidden_size // heads
        small.num_attention_heads, small.hidden_size = 4, 4 * per_head
        if groups:
            few = 2 if 1 < groups < heads else min(groups, 4)
            small.num_key_value_heads = few
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        count, used = getattr(small, key, None), getattr(small, "num_experts_per_tok", None)
        if isinstance(count, int) and isinstance(used, int) and count > MOST_EXPERTS >= used:
            setattr(small, key, MOST_EXPERTS)
    for key in ("intermediate_size", "moe_intermediate_size", "intermediate_size_mlp"):
        width = getattr(small, key, None)
        if isinstance(width, int):
            setattr(small, key, min(width, WIDEST))
    small.vocab_size = VOCABULARY  # which the prompts are drawn from, however few a tiny model has
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        try:
            setattr(small, key, None)
        except (
            StrictDataclassFieldValidationError
        ):  # a family that must have one: none of the prompts' tokens
            setattr(small, key, 1)
    # 3. limits
    if isinstance(getattr(small, "sliding_window", None), int):
        small.sliding_window = WINDOW
    _shorten(small)
    return small


def _hashable(values: list) -> list[str]:
    return [repr(value) for value in values]


def _shorten(config) -> None:
    """Bring the original context, wherever stated, to CONTEXT tokens, and the whole one in proportion."""
    scalings = [s for s in (getattr(config, "rope_parameters", None),) if isinstance(s, dict)]
    scalings += [inner for s in scalings for inner in s.values() if isinstance(inner, dict)]
    stated = [
        s["original_max_position_embeddings"] for s in scalings if "original_max_position_embeddings" in s
    ]
    original = getattr(config, "original_max_position_embeddings", None)
    whole = getattr(config, "max_position_embeddings", None)
    length = original or (stated[0] if stated else None)
    if not isinstance(length, int | float) or not length:
        return
    for scaling in scalings:
        if "original_max_position_embeddings" in scaling:
            scaling["original_max_position_embeddings"] = CONTEXT
    if original:
        config.original_max_position_embeddings = CONTEXT
    if whole:
        config.max_position_embeddings = max(CONTEXT, round(CONTEXT * whole / length))


MOST_PARAMETERS = 1 << 29  # of a model that is made to be small: 2 GiB


def random_model(config, seed: int = 1) -> nn.Module:
    """A float32 model with every parameter random, so that no two of them can be taken for one another.

    Raises FrankenError, allocating nothing, where the config has a size that is not known here to be one, and
    so would make a large model.
    """
    config = copy.deepcopy(config)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MOST_PARAMETERS:
        raise FrankenError(f"a small model of this config would still hold {count:,} parameters")
    rng = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        for key, tensor in list(module.named_parameters(recurse=False)):
            values = torch.randn(tensor.shape, generator=rng)
            if tensor.ndim < 2:
                values = (1.0 if "norm" in name else 0.0) + 0.3 * values
            elif "embed" not in name:
                values *= 1.2 / tensor.shape[-1] ** 0.5
            setattr(module, key, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    return model


# ---- the weights -------------------------------------------------------------------------------------------


def check_weights(live: LiveModel, name: str, config, described: dict | None = None) -> dict:
    """The live model as the source `name` has it, against transformers' own loading of that folder.

    Args:
        live: holds the unmodified model, and does again afterwards.
        name: of a source that is a Checkpoint.
        config: of the text model as the live model runs it.
        described: what the source's `describe()` gave, if that is known.

    Returns {"layers": how many were compared, "difference": number or None}: none of a checkpoint that
    transformers does not dequantize. Raises FrankenError beyond tolerance.
    """
    source = live.sources[name]
    if getattr(source, "quantized", None) not in (None, "fp8"):
        # transformers computes with those in another way; tests hold the numbers against their library's
        return {"layers": 0, "difference": None}
    what = {
        "check": "weights",
        "config": config.to_dict(),
        "source": (described or source.describe()) | {"path": None},
        "dtype": str(live.dtype),
        "device": live.device.type,
    }
    return once(what, lambda: _quietly(_check_weights, live, name, config))


def _check_weights(live: LiveModel, name: str, config) -> dict:
    source = cast(Checkpoint, live.sources[name])
    depth = layers_to_compare(live)
    with _refusing(f"{source.path}: transformers cannot load it"):
        try:
            reference = load_reference(source.path, depth, config, live.dtype, live.device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            reference = load_reference(source.path, depth, config, live.dtype, torch.device("cpu"))
    ids = safe_ids(reference.config, config.vocab_size)
    engine = Engine(live, _NO_TOKENIZER, fast=False)
    with _refusing(f"{source.path}: it cannot be run"):
        wanted = logits_of(reference, ids, COMPARED)
        live.apply(Recipe(identity(depth, name).slots, name, name, name))
        try:
            with torch.inference_mode():
                by_engine = engine.logits(engine.prefill([ids])[0, -COMPARED:])
            with _as_transformers(live, depth):
                by_module = logits_of(live.model, ids, COMPARED)
        finally:
            live.apply(live.original)
    # 1. the same code on the same numbers: whatever differs here was loaded wrong, or the whole model does
    # something with the text model's output that the text model alone does not do
    exact, bound = live.dtype == torch.float32, TOLERANCES[live.dtype]
    gap, most = difference(by_module, wanted), TOLERANCE if exact else SAME_CODE
    if reference.device != live.device:
        most = bound
    # 2. other code, which rounds otherwise
    ours = difference(by_engine, wanted)
    if not ours <= bound and not exact:
        # a model with little in its layers but rounding (a random one) is judged by transformers' own
        ours, bound = _against_exact(reference, live.dtype, ids, by_engine)
    if gap <= most:
        gap, most = ours, bound
    if not gap <= most:
        raise FrankenError(
            f"{source.path}: the model as loaded here differs from transformers' own by {gap:.2g} of the"
            f" logits' spread (tolerance {most:g}, first {depth} layers); it is not run"
        )
    return {"layers": depth, "difference": ours}


@contextlib.contextmanager
def _as_transformers(live: LiveModel, depth: int) -> Iterator[None]:
    """The live model's module with its first layers alone and transformers' own attention."""
    parent, _, last = live.stack_name.rpartition(".")
    owner, stack = live.model.get_submodule(parent), live.model.get_submodule(live.stack_name)
    config, attention = live.config, live.config._attn_implementation
    layers, n = cast(nn.ModuleList, stack)[:depth], config.num_hidden_layers
    hooks = []
    if len({bank.device for bank in live.banks}) > 1:
        ends = (live.model.get_input_embeddings(), live.norm, live.model.get_output_embeddings())
        hooks = [m.register_forward_pre_hook(_bring_here, with_kwargs=True) for m in (*layers, *ends)]
    config.num_hidden_layers, config._attn_implementation = depth, "eager"
    setattr(owner, last, layers)
    try:
        yield
    finally:
        setattr(owner, last, stack)
        config.num_hidden_layers, config._attn_implementation = n, attention
        for hook in hooks:
            hook.remove()


def _bring_here(module: nn.Module, args, kwargs):
    """Inputs of a module, brought to where its weights are."""
    here = next(module.parameters()).device
    return tree_map_only(torch.Tensor, lambda t: t.to(here), (args, kwargs))


def _against_exact(reference, dtype: torch.dtype, ids, ours: torch.Tensor) -> tuple[float, float]:
    """The difference from the same model in float32, and three times that of transformers' own in `dtype`."""
    reference = reference.to("cpu", torch.float32)
    exact = logits_of(reference, ids, COMPARED)
    rounded = logits_of(reference.to(dtype), ids, COMPARED)
    return difference(ours, exact), 3 * difference(rounded, exact)


def layers_to_compare(live: LiveModel) -> int:
    """All layers of a small float32 model on a CPU, else the first that show every kind, two at least."""
    n = len(live.original)
    whole = live.device.type == "cpu" and live.dtype == torch.float32
    if whole and n * live.layer_bytes() <= HELD_WHOLE:
        return n
    looks = [(live.kinds[i], live.layer_types[i], tuple(live.sources[live.home].layers[i])) for i in range(n)]
    return max(min(2, n), 1 + max(looks.index(look) for look in looks))


def load_reference(path: Path, depth: int, config, dtype: torch.dtype, device: torch.device):
    """transformers' own model of a folder, its text stack cut to the first `depth` layers.

    What the live model does by its own config although another source says otherwise (rotary positions,
    windows) is done here, too.
    """
    whole = AutoConfig.from_pretrained(path, trust_remote_code=False)
    text = whole.get_text_config()
    n = text.num_hidden_layers
    for key in ("rope_parameters", "rms_norm_eps", "sliding_window", "max_position_embeddings"):
        if hasattr(text, key) and hasattr(config, key):
            setattr(text, key, copy.deepcopy(getattr(config, key)))
    text.num_hidden_layers = depth
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == n:
            setattr(text, key, value[:depth])
    mappings = (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )
    made = next((cast(Any, m)[type(whole)] for m in mappings if type(whole) in m), None)
    if made is None:
        raise FrankenError(f"no model class for {whole.model_type}")
    options: dict[str, Any] = {"device_map": {"": device}} if device.type == "cuda" else {}
    if getattr(whole, "quantization_config", None) is not None:
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    model = made.from_pretrained(
        path, config=whole, dtype=dtype, attn_implementation="eager", trust_remote_code=False, **options
    )
    return model.eval()


def safe_ids(config, vocabulary: int) -> tuple[int, ...]:
    """Random token ids, none of which stands for an image or another thing than text."""
    special: set[int] = set()
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if key.endswith(("token_id", "token_index")):
                special |= {v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, vocabulary, (TOKENS + 2 * len(special) + 8,), generator=rng).tolist()
    return tuple([i for i in drawn if i not in special][:TOKENS])


# ---- comparing ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def logits_of(model, ids: tuple[int, ...], last: int = 0) -> torch.Tensor:
    """Float32 logits [S or last, vocab] of one sequence by transformers' forward pass, without a cache."""
    given = torch.tensor([ids], device=next(model.parameters()).device)
    forward = type(model).forward  # the live model's own guards against a recipe that is not its config's
    few = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(forward).parameters else {}
    return forward(model, input_ids=given, use_cache=False, **few).logits[0, -last:].float()


def difference(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of found - wanted over that of `wanted` about its mean over the vocabulary; infinite
    where one of them is no number and the other is."""
    ours, wanted = ours.float().cpu(), wanted.float().cpu()
    spread = (wanted - wanted.mean(-1, keepdim=True)).square().mean().sqrt()
    gap = float((ours - wanted).square().mean().sqrt() / spread)
    return gap if gap == gap else float("inf")


_NO_TOKENIZER = cast(
    Any,
    SimpleNamespace(
        all_special_ids=[],
        eos_token_id=None,
        get_vocab=dict,
        decode=lambda *_, **__: "",
        added_tokens_decoder={},
    ),
)


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Any failure in the block is told in one line: code that meets a strange model fails in many ways."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        kind = "" if isinstance(e, FrankenError) else f"{type(e).__name__}: "
        raise FrankenError(f"{what} ({kind}{TEMPORARY.sub(SMALL, first_line(e))})") from e


def _quietly(check: Callable[..., dict], *args) -> dict:
    """The check without transformers' progress bars and warnings (layers left out on purpose, ...), and
    without using up random numbers of the caller's."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            return check(*args)
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what the check needed is there for the run
