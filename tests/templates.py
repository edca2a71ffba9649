"""Chat templates and a tokenizer of kinds that other people's checkpoints have, in words of our own."""

from __future__ import annotations

import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

DATED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + tiny.TEMPLATE
# What published families do, in few words: a switch (Qwen3), a thought that the prompt opens (R1 distills)
SWITCHED = tiny.TEMPLATE.replace(
    "assistant\n' }}",
    "assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
# Qwen3 also writes an empty thought into the last turn of a finished conversation.
HYBRID = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + SWITCHED[tiny.TEMPLATE.index("{% if add_generation_prompt %}") :]
)
OPENED = tiny.TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}")
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no such role') }}{% endif %}"
    "{% endfor %}" + tiny.TEMPLATE
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{% endfor %}" + tiny.TEMPLATE
)
SILENT = tiny.TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


def sentencepiece(space_before: bool = True) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer that writes spaces as U+2581; with `space_before`, as Llama 2's, also before any
    text that it encodes."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    words = [f"▁{w}" for w in ("Bertrand", "Russell", "My", "name", "is", "Yes", "No", "", "▁")]
    words += ["Bertrand", "Russell", "is", "Yes", "No"]
    letters = [chr(c) for c in range(33, 127)] + ["\n", "é", "’"]
    pieces = [(w, -5.0 - k / 100) for k, w in enumerate(words)] + [(c, -8.0) for c in letters]
    core = Tokenizer(models.Unigram([(t, 0.0) for t in special] + pieces, unk_id=0))
    steps = [normalizers.Prepend("▁")] if space_before else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=tiny.TEMPLATE,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
