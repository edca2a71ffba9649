"""Makers of tiny checkpoints on disk, and the slow obvious way to run them.

Every checkpoint here is a real directory (config, safetensors, tokenizer) of a randomly initialized model
small enough to run hundreds of times. `Tiny` is one pair of them; `rebuilt_logits` is the oracle: a fresh
transformers model with eager attention, filled from state dicts that were assembled by hand.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from engine.generation import Engine
from franken import LiveModel
from surgery.weights import Checkpoint

SPECIAL = ["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor"
    " %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB = 264  # a few more rows than the tokenizer has tokens, as in most real checkpoints
WINDOW = 5
ALTERNATING = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW, "tie_word_embeddings": False},
    "gemma": {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 12,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 12,
        "alternate": True,
    },
    "qwen2-alternating": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "tie_word_embeddings": False,
        "alternate": True,
    },
}
ALTERNATE = [name for name, f in FAMILIES.items() if f.get("alternate") or name == "gemma2"]


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level: every text is its bytes, one token each, after four special tokens."""
    alphabet = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=TEMPLATE if chat else None,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def make_config(family: str, layers: int = 6, **changes):
    fields = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )
    fields |= FAMILIES[family] | changes
    if fields.pop("alternate", False):
        fields["layer_types"] = [ALTERNATING[i % 2] for i in range(layers)]
    return AutoConfig.for_model(**fields)


def write_checkpoint(
    path: Path,
    family: str = "llama",
    seed: int = 0,
    dtype=torch.float32,
    shards: int = 1,
    chat: bool = True,
    layers: int = 6,
    **changes,
) -> Path:
    """A checkpoint directory with every tensor random (norms and biases too, so that mixing any of them up
    shows)."""
    config = make_config(family, layers, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed_tokens" in name:
                p.copy_(torch.randn(p.shape, generator=rng) * 0.5)
            elif p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=rng) * 1.5 / p.shape[1] ** 0.5)
            else:
                p.add_(torch.randn(p.shape, generator=rng) * 0.3)
    model.to(dtype).save_pretrained(path)
    tokenizer(chat).save_pretrained(path)
    if shards > 1:
        _split(Path(path), shards)
    return Path(path)


def _split(path: Path, shards: int) -> None:
    whole = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names, weight_map = sorted(whole), {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: whole[n] for n in names[k::shards]}, path / file)
        weight_map |= dict.fromkeys(names[k::shards], file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class Tiny:
    """A tiny pair on disk: `paths` by source name, `states` (their whole state dicts), `config` of the
    instruct side."""

    def __init__(self, folder: Path, family: str = "llama", names=("instruct", "base"), **kwargs):
        self.family = family
        self.paths = {
            n: write_checkpoint(folder / n, family, seed=100 + k, **kwargs) for k, n in enumerate(names)
        }
        self.states = {n: read_states(p) for n, p in self.paths.items()}
        self.config = AutoConfig.from_pretrained(self.paths[names[0]])
        self.n = self.config.num_hidden_layers

    def live(self, dtype=torch.float32, resident=(), **sources) -> LiveModel:
        made = {n: Checkpoint(n, p) for n, p in self.paths.items()} | sources
        return LiveModel(made, copy.deepcopy(self.config), dtype, torch.device("cpu"), tuple(resident))

    def engine(self, live: LiveModel | None = None, **kwargs) -> Engine:
        return Engine(live or self.live(), tokenizer(), **kwargs)

    def layer(self, source: str, index: int) -> dict[str, torch.Tensor]:
        return layer_state(self.states[source], index)

    def rebuilt(self, layers: list, outer: str = "instruct", types: list[str] | None = None):
        """A fresh transformers model of the given layers: (source, index) pairs or (state dict, index for its
        kind)."""
        state = {k: v for k, v in self.states[outer].items() if ".layers." not in k}
        kinds = getattr(self.config, "layer_types", None)
        kinds = kinds and [kinds[i] for _, i in layers]
        for position, (what, index) in enumerate(layers):
            tensors = self.layer(what, index) if isinstance(what, str) else what
            state |= {f"model.layers.{position}.{name}": tensor for name, tensor in tensors.items()}
        return build(self.config, state, types or kinds)


def build(config, state: dict[str, torch.Tensor], layer_types=None, dtype=torch.float32):
    """A transformers model with eager attention from a config and a whole state dict."""
    fields = config.to_dict()
    fields["num_hidden_layers"] = 1 + max(
        int(re.search(r"layers\.(\d+)\.", k)[1]) for k in state if ".layers." in k
    )
    if layer_types:
        fields["layer_types"] = layer_types
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**fields), dtype=dtype, attn_implementation="eager"
    ).eval()
    missing, unexpected = made.load_state_dict({k: v.to(dtype) for k, v in state.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    made.tie_weights()
    return made


def read_states(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def layer_state(state: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{index}."
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


@torch.no_grad()
def hf_logits(model, ids) -> torch.Tensor:
    """Logits [S, vocab] of one sequence by transformers' own forward pass, without a cache."""
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


@torch.no_grad()
def engine_logits(engine: Engine, ids) -> torch.Tensor:
    """Logits [S, vocab] of one sequence by the engine's prefill."""
    return engine.logits(engine.prefill([tuple(ids)])[0])


def hf_greedy(model, prompt, budget: int, stops=(1, 3)) -> tuple[list[int], bool]:
    """Greedy tokens by running the whole sequence again for every token; whether a stop token ended them."""
    ids = list(prompt)
    for _ in range(budget):
        token = int(hf_logits(model, ids)[-1].argmax())
        if token in stops:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


def random_prompt(seed: int, length: int) -> tuple[int, ...]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, 260, (length,), generator=rng).tolist())


def write_gguf(
    path: Path,
    architecture: str,
    tied: bool = True,
    also: dict | None = None,
    kind: str = "Q8_0",
    edit: Callable[[dict], object] = lambda metadata: None,
    **fields,
) -> Path:
    """A GGUF file of a tiny model with random weights and a tokenizer of single bytes.

    `also` has lengths of further tensors, or None for one to leave out; `kind` is what matrices are quantized
    to; `fields` are further metadata, with two underscores for a dot; `edit` may change all metadata, which
    are the library's GGUFValue by key.
    """
    import gguf
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    hidden, mlp, heads, kv, layers = 64, 96, 4, 2, 3
    size = 128 if architecture == "qwen3" else 16  # transformers takes no other from a Qwen3 file
    tokens = [*bytes_to_unicode().values(), "ab", "cd", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    shape = {
        "block_count": layers,
        "context_length": 512,
        "embedding_length": hidden,
        "feed_forward_length": mlp,
        "attention.head_count": heads,
        "attention.head_count_kv": kv,
    }
    if architecture != "qwen2":
        shape |= {"attention.key_length": size, "attention.value_length": size}
    for name, value in shape.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if architecture == "llama" else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3] * 3)
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(260)
    writer.add_bos_token_id(258)
    writer.add_pad_token_id(258)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"
    )
    for name, value in fields.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name.replace("__", "."), value)
    rng, also = np.random.default_rng(0), also or {}

    def tensor(name, *shape):
        if name in also and also[name] is None:
            return None
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            return writer.add_tensor(name, values)
        stored = gguf.GGMLQuantizationType[kind]
        return writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)

    tensor("token_embd.weight", len(tokens), hidden)
    tensor("output_norm.weight", hidden)
    if not tied:
        tensor("output.weight", len(tokens), hidden)
    for i in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            tensor(f"blk.{i}.{norm}.weight", hidden)
        for part, rows in (("q", heads * size), ("k", kv * size), ("v", kv * size)):
            tensor(f"blk.{i}.attn_{part}.weight", rows, hidden)
            if architecture == "qwen2":
                tensor(f"blk.{i}.attn_{part}.bias", rows)
            if architecture == "qwen3" and part != "v":
                tensor(f"blk.{i}.attn_{part}_norm.weight", size)
        tensor(f"blk.{i}.attn_output.weight", hidden, heads * size)
        tensor(f"blk.{i}.ffn_gate.weight", mlp, hidden)
        tensor(f"blk.{i}.ffn_up.weight", mlp, hidden)
        tensor(f"blk.{i}.ffn_down.weight", hidden, mlp)
    for name, length in also.items():
        if length:
            tensor(name, length)
    edit(writer.kv_data[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_adapter(model: Path, out: Path, base: str = "tiny", rank: int = 2) -> Path:
    """A LoRA adapter with random matrices on both sides, by peft."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = get_peft_model(
        loaded, LoraConfig(r=rank, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    lora.save_pretrained(out)
    state = load_file(out / "adapter_model.safetensors")
    save_file(
        {k: torch.randn(t.shape) * 0.3 for k, t in state.items()},
        out / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return out
