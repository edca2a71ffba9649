"""A GGUF file (llama.cpp's format) to a checkpoint that every source is read from: config, tokenizer,
safetensors.

The conversion is done once and kept in the cache. It gives what `from_pretrained(gguf_file=...)` of
transformers gives in bfloat16, bit for bit, without holding the model in memory: one tensor after the other
is dequantized by the `gguf` library and written out. Of the tokenizer transformers makes what its
architecture's own usually is; `own_tokenizer` makes it the file's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from errors import FrankenError, first_line
from runner.cache import cache_dir, cannot_keep, is_kept, keep, workspace, write_safetensors
from runner.gguf_header import check_header

# Architectures whose conversion is tested against transformers' own; anything else is refused.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Counted up where more is refused, or tokens become others: what was converted before is not taken then.
CHECKS = 3
BLOCK = 1 << 22  # values dequantized at once: bounds the memory beside the tensor itself
CONTROL, USER_DEFINED = 3, 4  # token types in GGUF: special tokens, and others that are never split
# Tokens that end a reply beside the one in the metadata, if the vocabulary has them as special tokens, as
# llama.cpp has it. The metadata names one alone: Qwen2.5's <|im_end|>, not its <|endoftext|>.
END_OF_REPLY = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|end|>",
    "</s>",
)


# Numbers of a model, each with more than any has. transformers takes others' heads to be as many as its
# defaults say, which the tensors' shapes then contradict.
COUNTS = {
    "context_length": 1 << 31,
    "block_count": 10_000,
    "embedding_length": 1 << 24,
    "feed_forward_length": 1 << 24,
    "attention.head_count": 1 << 16,
    "attention.head_count_kv": 1 << 16,
    "attention.key_length": 1 << 16,
    "attention.value_length": 1 << 16,
    "rope.dimension_count": 1 << 16,
    "vocab_size": 1 << 31,
}
OPTIONAL = {
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "vocab_size",
}
READ = {"attention.layer_norm_rms_epsilon", "rope.freq_base"}
# Settings that transformers does not read, with the values that change nothing.
NEUTRAL = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.finetuned": (True, False),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "pooling_type": (0,),
}
# Tokens with an office in transformers: what the metadata call them
OFFICES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
ARRAY, STRING = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
INTEGERS = (gguf.GGUFValueType.INT32, gguf.GGUFValueType.UINT32)
LISTS = {
    "tokens": (STRING,),
    "token_type": INTEGERS,
    "scores": (gguf.GGUFValueType.FLOAT32,),
    "merges": (STRING,),
}
# By architecture and kind of tokenizer: how text is split before it is made into tokens, as far as it is
# known that transformers, which goes by the architecture alone, does the same; `own_tokenizer` adds what
# "smollm" has beyond "gpt-2": every digit by itself. Llama 3's split is not among them. Files of byte pairs
# that do not say it are refused; to SentencePiece's no split belongs.
SPLITS = {
    ("llama", "llama"): (None, "default"),
    ("llama", "gpt2"): ("gpt-2", "smollm"),
    ("qwen2", "gpt2"): ("qwen2", "deepseek-r1-qwen"),
    ("qwen3", "gpt2"): ("qwen2",),
}


class Reader(gguf.GGUFReader):
    """The library's reader over a plain array: slicing a memmap takes three quarters of its time."""

    @property
    def data(self) -> np.ndarray:  # type: ignore[override]
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = mapped.view(np.ndarray)

    def value(self, key: str, default=None) -> Any:
        """What the metadata say under `key`; {arch} stands for the architecture's name."""
        field = self.fields.get(key.replace("{arch}", self.architecture) if "{arch}" in key else key)
        return default if field is None else field.contents()

    @property
    def architecture(self) -> str:
        return str(self.value("general.architecture", "unknown"))


def open_gguf(path: Path) -> Reader:
    """The file's metadata and the places of its tensors.

    Raises FrankenError for a file that is no complete GGUF, and for one whose conversion is not known to be
    right: another architecture, a part of a split model, scaled rotary positions, a setting that transformers
    does not read, a vocabulary in disorder, a quantization that the library cannot undo.
    """
    try:
        check_header(path)
        reader = Reader(path)
    except Exception as e:  # a file cut short fails in many ways
        raise FrankenError(f"{path}: not a complete GGUF file ({first_line(e)})") from e
    try:
        check_metadata(reader)
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise FrankenError(f"{path}: {first_line(e)}") from e
    for kind, tensor in {t.tensor_type: t for t in reader.tensors}.items():
        try:
            gguf.dequantize(tensor.data[:1], kind)
        except Exception as e:
            raise FrankenError(f"{path}: {tensor.name} is {kind.name}, which cannot be dequantized") from e
    return reader


def check_metadata(reader: Reader) -> None:
    """Raises ValueError, with what is wrong, for metadata that are incomplete, contradict the file's tensors,
    or ask for what transformers leaves out of the model that it makes of them."""
    # 1. what the file is
    architecture = reader.value("general.architecture", "unknown")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"GGUF files of architecture {architecture} cannot be read, only {', '.join(ARCHITECTURES)}"
        )
    if (kind := reader.value("general.type", "model")) != "model":
        raise ValueError(f"a GGUF file of type {kind}, which is no whole model")
    if reader.value("split.count", 0) not in (0, 1):
        raise ValueError("one part of a split model; join the parts with llama-gguf-split first")
    # 2. the model's own numbers
    for name, largest in COUNTS.items():
        value = reader.value(f"{architecture}.{name}")
        if value is None and name in OPTIONAL:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= largest:
            raise ValueError(f"{architecture}.{name} is {value!r:.40}, which no model has")
    for name in ("attention.layer_norm_rms_epsilon", "rope.freq_base"):
        value = reader.value(f"{architecture}.{name}", 10000.0 if name == "rope.freq_base" else None)
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise ValueError(f"{architecture}.{name} is {value!r:.40}, which no model has")
    blocks = {t.name.split(".")[1] for t in reader.tensors if t.name.startswith("blk.")}
    if blocks != set(map(str, range(layers := reader.value("{arch}.block_count")))):
        raise ValueError(f"it says that it has {layers} layers, and has tensors of {len(blocks)}")
    # 3. what transformers does not take from the metadata, and takes for something else
    own = [key for key in reader.fields if key.startswith(architecture + ".")]
    for name in (key.removeprefix(architecture + ".") for key in own):
        value = reader.value(f"{architecture}.{name}")
        if name in COUNTS or name in READ or value in NEUTRAL.get(name, ()):
            continue
        what = "scaled rotary positions" if name.startswith("rope.scal") else f"{architecture}.{name}"
        raise ValueError(f"a GGUF file with {what} cannot be carried over ({name} is {value!r:.40})")
    heads = reader.value("{arch}.attention.head_count")
    size = reader.value("{arch}.attention.key_length", reader.value("{arch}.embedding_length") // heads)
    if (rotated := reader.value("{arch}.rope.dimension_count", size)) != size:
        raise ValueError(f"rotary positions in {rotated} of {size} dimensions cannot be carried over")
    # 4. the vocabulary
    check_vocabulary(reader)


def check_vocabulary(reader: Reader) -> None:
    """Raises ValueError for a vocabulary whose lists contradict each other, or whose text transformers splits
    in another way than the model was trained with."""
    lengths = {}
    for name, kind in LISTS.items():
        field = reader.fields.get(f"tokenizer.ggml.{name}")
        if field is None and name in ("scores", "merges"):
            continue
        if field is None or field.types[:1] != [ARRAY] or field.types[-1] not in kind:
            raise ValueError(f"tokenizer.ggml.{name} is not there, or not a list of what it should be")
        lengths[name] = len(field.data)
    tokens = lengths["tokens"]
    for name in ("token_type", "scores"):
        if lengths.get(name, tokens) != tokens:
            raise ValueError(f"{tokens} tokens and {lengths[name]} in tokenizer.ggml.{name}")
    rows = {t.name: int(t.shape[-1]) for t in reader.tensors}.get("token_embd.weight", tokens)
    if tokens > rows:
        raise ValueError(f"{tokens} tokens, and embeddings of {rows}")
    for name in [n for n in reader.fields if re.fullmatch(r"tokenizer\.ggml\.\w+_token_id", n)]:
        value = reader.value(name)
        if not isinstance(value, int) or not 0 <= value < tokens:
            raise ValueError(f"{name} is {value!r:.40}, and there are {tokens} tokens")
    kind, split = reader.value("tokenizer.ggml.model"), reader.value("tokenizer.ggml.pre")
    if (reader.architecture, kind) not in SPLITS or split not in SPLITS[reader.architecture, kind]:
        raise ValueError(f"text split as by {kind!r:.40} and {split!r:.40} cannot be carried over")


def place_tensors(reader: Reader, skeleton, tied: bool, path: Path) -> dict[str, gguf.ReaderTensor]:
    """The file's tensors by their names in the checkpoint.

    Raises FrankenError where file and model do not hold the same tensors in the same shapes.
    """
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    with _read_once(reader):
        names = get_gguf_hf_weights_map(skeleton, _processor(reader, skeleton))
    shapes = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
    if tied:
        shapes.pop("lm_head.weight")
    placed = {}
    for tensor in reader.tensors:
        name, shape = names.get(tensor.name), tuple(tensor.shape.tolist()[::-1])
        if name not in shapes:
            raise FrankenError(f"{path}: {tensor.name} has no place in a {reader.architecture} model")
        if shape != shapes[name]:
            raise FrankenError(f"{path}: {tensor.name} is {shape}, expected {shapes[name]}")
        placed[name] = tensor
    if missing := sorted(set(shapes) - set(placed)):
        raise FrankenError(f"{path}: there is no {missing[0]} in it")
    return placed


def _processor(reader: Reader, skeleton):
    """What transformers does with dequantized tensors of this architecture: llama's rows of q and k."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(reader.architecture, TensorProcessor)(config=skeleton.config.to_dict())


def dequantized(tensor: gguf.ReaderTensor, processor) -> torch.Tensor:
    """The tensor in bfloat16: dequantized in float32 by blocks of rows, laid out as transformers has it."""
    shape = tuple(tensor.shape.tolist()[::-1])
    values = np.empty(shape, np.float32)
    rows = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        values[start : start + rows] = gguf.dequantize(tensor.data[start : start + rows], tensor.tensor_type)
    laid_out = processor.process(weights=values, name=tensor.name).weights
    return torch.from_numpy(np.ascontiguousarray(laid_out)).to(torch.bfloat16)


def vocabulary(reader: Reader) -> list[tuple[str, int]]:
    """(text, token type) of every token, by its id."""
    tokens = reader.fields["tokenizer.ggml.tokens"]
    types = reader.fields["tokenizer.ggml.token_type"]
    return [
        (bytes(tokens.parts[at]).decode("utf-8", "replace"), int(types.parts[kind][0]))
        for at, kind in zip(tokens.data, types.data, strict=True)
    ]


def end_of_reply(reader: Reader) -> list[int]:
    """Ids of the tokens that end a reply: the metadata's own first, then what else is special by its name."""
    special = {text: k for k, (text, kind) in enumerate(vocabulary(reader)) if kind == CONTROL}
    own = reader.value("tokenizer.ggml.eos_token_id")
    also = [special[text] for text in END_OF_REPLY if text in special]
    return list(dict.fromkeys([*([] if own is None else [int(own)]), *also]))


def own_tokenizer(reader: Reader, folder: Path) -> None:
    """Make the tokenizer that transformers saved to `folder` the file's own, in place.

    transformers gives a Qwen file the three special tokens of Qwen2, whether it has them or not, and splits
    the file's others (DeepSeek's <｜User｜>, Qwen3's <think>); it takes a Llama file's first token for the
    last one, and leaves SmolLM2's digits together. Raises ValueError where tokens are still others.
    """
    # 1. what is never split, and how the rest is
    tokens, core = vocabulary(reader), json.loads((folder / "tokenizer.json").read_text("utf-8"))
    whole = {k: token for k, token in enumerate(tokens) if token[1] in (CONTROL, USER_DEFINED)}
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    core["added_tokens"] = [
        {"id": k, "content": text, **plain, "special": kind == CONTROL} for k, (text, kind) in whole.items()
    ]
    if reader.value("tokenizer.ggml.pre") == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        core["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, core["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(core, ensure_ascii=False), "utf-8")
    # 2. tokens with an office, and a class that takes the tokenizer as it stands
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config["tokenizer_class"] = "TokenizersBackend"
    config = {key: value for key, value in config.items() if value is not None}
    for name, key in OFFICES.items():
        at = reader.value(f"tokenizer.ggml.{key}_token_id")
        config[f"{name}_token"] = None if at is None else tokens[at][0]  # without it a class has its own
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), "utf-8")
    # 3. whether it is
    made = AutoTokenizer.from_pretrained(folder)
    if len(made) > len(tokens):
        raise ValueError(f"{len(tokens)} tokens, and {len(made)} in the tokenizer that transformers makes")
    for k, (text, _) in whole.items():
        if (ids := made(text, add_special_tokens=False)["input_ids"]) != [k]:
            raise ValueError(f"its token {text!r:.40} has the number {k}, and is read as {ids!r:.40}")


@contextlib.contextmanager
def _read_once(reader: Reader) -> Iterator[None]:
    """Hand transformers this reader, where it would parse the vocabulary again each of four times, and one
    map of names, which it would make anew for each of hundreds of modules (half of SmolLM2's conversion)."""
    plain, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lambda path: reader
    gguf.get_tensor_name_map = functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = plain, names


def convert(path: Path, out: Path, title: str, all_stop_ids: bool = True, own_tokens: bool = True) -> None:
    """Write the folder `out`: what `from_pretrained(gguf_file=path)` gives, as a plain bfloat16 checkpoint.

    Args:
        path: the GGUF file.
        out: a folder that is not there yet.
        title: the model's name in its config, and in what is said on stderr once nothing is refused.
        all_stop_ids: the generation config names all tokens that end a reply, not the metadata's one alone.
        own_tokens: the tokenizer is made the file's, see `own_tokenizer`; else it stays as transformers makes
            it, as the Qwen pairs' does, which differs from the file's in special tokens alone.
    Raises FrankenError for a file that cannot be carried over, OSError if `out` cannot be written.
    """
    # 1. metadata: refuse before anything is written
    reader = open_gguf(path)
    # away from what lies in its folder, such as a config, and where what is left of a kill is swept
    with tempfile.TemporaryDirectory(dir=out.parent) as alone:
        (Path(alone) / "model.gguf").symlink_to(path.resolve())
        with _read_once(reader):
            try:
                config = AutoConfig.from_pretrained(alone, gguf_file="model.gguf")
                tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
            except Exception as e:
                raise FrankenError(f"{path}: transformers cannot read its metadata: {first_line(e)}") from e
        saved = Path(alone) / "tokenizer"
        tokenizer.save_pretrained(saved)
        tokenizer_files = [file.name for file in saved.iterdir()]
        if own_tokens:
            config.save_pretrained(saved)  # by which transformers chooses the tokenizer's class
            try:
                own_tokenizer(reader, saved)
            except Exception as e:
                raise FrankenError(f"{path}: its tokenizer cannot be carried over: {first_line(e)}") from e
        contents = {name: (saved / name).read_bytes() for name in tokenizer_files}
    config._name_or_path = title
    config.__dict__.pop("quantization_config", None)
    if config.model_type != reader.architecture:  # as for a llama file whose name is "mistral"
        raise FrankenError(f"{path}: transformers reads it as {config.model_type}, not {reader.architecture}")
    try:
        with init_empty_weights():
            skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as e:  # sizes that do not go together
        raise FrankenError(f"{path}: no model can be made of its metadata: {first_line(e)}") from e
    placed = place_tensors(reader, skeleton, bool(config.tie_word_embeddings), path)
    # 2. weights
    print(f"Converting {title} to safetensors (once)...", file=sys.stderr)
    out.mkdir()
    processor = _processor(reader, skeleton)
    write_safetensors(
        out / "model.safetensors",
        {name: (torch.bfloat16, tuple(t.shape.tolist()[::-1])) for name, t in placed.items()},
        lambda name: dequantized(placed[name], processor),
    )
    # 3. what stands beside them
    skeleton.config.architectures = [type(skeleton).__name__]
    skeleton.config.save_pretrained(out)
    generation = skeleton.generation_config
    if all_stop_ids:
        generation.eos_token_id = end_of_reply(reader)
    generation.save_pretrained(out)
    for name, content in contents.items():
        (out / name).write_bytes(content)


def from_gguf(
    path: Path,
    sha256: str,
    folder: str | None = None,
    title: str | None = None,
    all_stop_ids: bool = True,
    own_tokens: bool = True,
) -> Path:
    """The converted checkpoint of a GGUF file, from the cache or made now.

    Args:
        path: the file; sha256: of its content, under which it is kept unless `folder` names a place, as for
            the files of pairs.
        title: the model's name in its config; None: the file's.
        all_stop_ids, own_tokens: as of `convert`.
    Raises FrankenError for what `open_gguf` refuses, and if the cache cannot be written.
    """
    final = cache_dir() / (folder or f"gguf-{CHECKS}-{sha256[:32]}")
    if is_kept(final):
        return final
    try:
        with workspace(final.parent) as work:
            name = path.stem if title is None else title
            convert(path, work / "converted", name, all_stop_ids, own_tokens)
            keep(work / "converted", final)
    except OSError as e:
        raise cannot_keep(final.parent, e) from e
    return final
