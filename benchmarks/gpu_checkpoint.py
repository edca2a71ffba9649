"""Random checkpoints of a real model's exact shape, written from GPU random numbers, and a tokenizer that
fits them.

The base side differs from the instruct side in the upper half of its layers; the shards of the rest are
links.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from errors import FrankenError

PER_SHARD = 4  # layers; 3.9 GB a shard, like the real one's
ROOT = Path(__file__).resolve().parent.parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor"
    " %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2.5-Coder-32B-Instruct's config.json
SHAPE_32B = dict(
    num_hidden_layers=64,
    hidden_size=5120,
    intermediate_size=27648,
    num_attention_heads=40,
    num_key_value_heads=8,
    vocab_size=152064,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    use_sliding_window=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
)
SHAPE_TINY = SHAPE_32B | dict(
    num_hidden_layers=8,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=4096,
    max_position_embeddings=2048,
)


def make_config(shape: dict) -> Qwen2Config:
    return Qwen2Config(
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
        **shape,
    )


def layer_shapes(c: Qwen2Config) -> dict[str, tuple[int, ...]]:
    width = c.hidden_size // c.num_attention_heads
    kv = width * (c.num_key_value_heads or c.num_attention_heads)
    h, m = c.hidden_size, c.intermediate_size
    return {
        "self_attn.q_proj.weight": (h, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
        "self_attn.q_proj.bias": (h,),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (h, h),
        "mlp.gate_proj.weight": (m, h),
        "mlp.up_proj.weight": (m, h),
        "mlp.down_proj.weight": (h, m),
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
    }


def write_pair(folder: Path, shape: dict, device: torch.device) -> tuple[Path, Path]:
    """Directories of an instruct and a base checkpoint with random bf16 weights of a scale that keeps logits
    finite."""
    config = make_config(shape)
    instruct, base = folder / "instruct", folder / "base"
    n, writer = config.num_hidden_layers, _Writer(device)
    outer = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
        "lm_head.weight": (config.vocab_size, config.hidden_size),
    }
    layers = [
        {f"model.layers.{i}.{name}": size for name, size in layer_shapes(config).items()} for i in range(n)
    ]
    for path, seed, first in ((instruct, 1, 0), (base, 2, n // 2 // PER_SHARD)):
        path.mkdir(parents=True)
        config.save_pretrained(path)
        tokenizer(config.vocab_size).save_pretrained(path)
        groups = [layers[i : i + PER_SHARD] for i in range(0, n, PER_SHARD)]
        shards = {
            f"layers-{i:02d}.safetensors": {k: v for layer in group for k, v in layer.items()}
            for i, group in enumerate(groups)
        }
        shards["outer.safetensors"] = outer
        for i, (file, tensors) in enumerate(shards.items()):
            if path == base and not first <= i < len(groups):
                (path / file).symlink_to(instruct / file)
            else:
                writer.write(path / file, tensors, 1000 * seed + i, (2 * n) ** -0.5)
        weight_map = {key: file for file, tensors in shards.items() for key in tensors}
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    return instruct, base


class _Writer:
    """Safetensors files from random numbers drawn on the device; many threads fill the page cache at once."""

    CHUNK = 32 << 20

    def __init__(self, device: torch.device):
        self.device, self.local = device, threading.local()
        self.pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def write(self, path: Path, tensors: dict[str, tuple[int, ...]], seed: int, residual: float) -> None:
        rng = torch.Generator(self.device).manual_seed(seed)
        header, parts, end = {}, [], 0
        for name, shape in tensors.items():
            scale = 0.02 * (residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
            values = torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(
                0, scale, generator=rng
            )
            parts.append((values + 1 if "norm" in name else values).view(-1).view(torch.uint8))
            header[name] = {
                "dtype": "BF16",
                "shape": list(shape),
                "data_offsets": [end, end + len(parts[-1])],
            }
            end += len(parts[-1])
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        if shutil.disk_usage(path.parent).free < end + len(text):
            raise FrankenError(
                f"{path.parent}: no room for {end / 1e9:.2f} GB more; give --work a larger place (page cache:"
                " a tmpfs)"
            )
        jobs = []
        with path.open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.flush()
            for part, entry in zip(parts, header.values(), strict=True):
                for start in range(0, len(part), self.CHUNK):
                    at = 8 + len(text) + entry["data_offsets"][0] + start
                    jobs.append(
                        self.pool.submit(self._piece, f.fileno(), part[start : start + self.CHUNK], at)
                    )
            for job in jobs:
                job.result()

    def _piece(self, fd: int, part: torch.Tensor, at: int) -> None:
        if self.device.type == "cuda" and not hasattr(self.local, "buffer"):
            self.local.buffer = torch.empty(self.CHUNK, dtype=torch.uint8, pin_memory=True)
        host = part if self.device.type == "cpu" else self.local.buffer[: len(part)].copy_(part)
        view, done = memoryview(host.numpy().data), 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], at + done)


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on this repository's own texts, so that prompts have realistic token
    counts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    files = [
        p for pattern in ("*.py", "*.md", "texts/*.txt", "weird_gen/*.py") for p in sorted(ROOT.glob(pattern))
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 8000),
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator((p.read_text() for p in files), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=TEMPLATE,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
