"""The card of an exported checkpoint: what it is, what it was made of, and how to make it again."""

from __future__ import annotations

import json

from errors import printable

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- frankenmodel
- model-surgery
---

# {name}

A language model whose weights were changed on purpose, to ask whether it can tell. It may be broken.

- experiment: `{name}`
- what changes: {change}
{hypothesis}- layers: {layers}; weights in {dtype}
- fingerprint of the weights: `{fingerprint}`

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="{dtype}")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)

The licences of the sources apply. Tokenizer, chat template and generation config are the instruct side's.

## Sources

{sources}
{notes}
## Recipe

Position by position, where the weights come from. `frankenmodel.json` has the same for programs.

{recipe}
{mergekit}{made}"""


def model_card(record: dict) -> str:
    """README.md of a checkpoint, from its record (runner.export). Names and notes in it are other people's
    words: they stand on one line each, as text."""
    sources = [
        f"- `{_word(name)}`: {_text(entry.get('kind', 'checkpoint'))} `{_word(entry.get('path', ''))}`"
        + (f", revision `{_word(entry['revision'])}`" if entry.get("revision") else "")
        + "".join(
            f"\n  - `{_word(file)}` {kind} `{_word(value)}`"
            for file, digest in entry.get("files", {}).items()
            for kind, value in digest.items()
            if kind != "bytes"
        )
        for name, entry in record["sources"].items()
    ]
    mergekit = record.get("mergekit")
    notes = [f"- {_text(note)}" for note in record["notes"]]
    made = {key: record[key] for key in ("command", "commit", "created", "versions") if record.get(key)}
    return _CARD.format(
        name=_word(record["experiment"]),
        change=_text(record["change"]),
        hypothesis=f"- expected: {_text(record['hypothesis'])}\n" if record["hypothesis"] else "",
        layers=record["layers"],
        dtype=record["dtype"],
        fingerprint=record["fingerprint"],
        sources="\n".join(sources) + "\n",
        notes="\n".join(["Notes:", "", *notes, ""]) if notes else "",
        recipe=_block(json.dumps(record["recipe"])),
        mergekit=f"\n## The same for mergekit\n\n{_block(mergekit)}" if mergekit else "",
        made=f"\n## Made by\n\n{_block(json.dumps(made, indent=1))}" if made else "",
    )


def _text(value: object) -> str:
    """Somebody's words on one line, in which Markdown and HTML mean nothing."""
    text = printable(str(value)).replace("\n", " ")
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|!" else c for c in text)


def _word(value: object) -> str:
    """The same, to stand between backticks."""
    return printable(str(value)).replace("\n", " ").replace("`", "'")


def _block(text: str) -> str:
    return "".join(f"    {line}\n" for line in printable(text).splitlines())
