"""Train a model to report changes of its own weights: the harness's sensitivity and specificity, measured.

    python adapters/train_reporter.py --model qwen2.5-coder-1.5b --out adapters/qwen2.5-coder-1.5b-reporter

A LoRA adapter (Hu et al., arXiv 2106.09685) learns to answer keyed Yes/No questions about the model
truthfully while the weights under it are changed at random: Gaussian noise of random size on a random block
of layers, or two layers swapped; half of the time nothing is changed. Control questions with known answers
are asked in the same batches, and what it says to other prompts is held to the model without the adapter
(KL divergence), so that the adapter can lower its loss in no other way than by reading the change off its
own activations.

Held out are all wordings that the harness asks, its framings and answer formats, and the kinds of surgery
delete, repeat, chunk swap, shuffle and splice. adapters/README.md has what came of it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adapters.reporter_questions import ABOUT_ITSELF, ENDINGS, FRAMINGS, controls
from adapters.train_base_standin import NEUTRAL, TARGETS, kl_to_plain, load, save
from command_line import ends_in_one_line, parser_of
from engine.attention import sound_attention
from engine.chat_template import ChatTemplate, continuation
from errors import FrankenError
from files import ROOT, check_target, write_text
from prompts import answer_token_ids
from questions.probes import BINARY_PROBES

NOISE = (0.03, 0.5)  # of each tensor's own standard deviation, log-uniform
VISIBLE = (0.05, 4.0)  # nats a token by which a trained change may raise the loss on neutral prose
EASY = 0.7  # what it has to raise it by at first
OTHER_PROMPTS = ROOT / "weird_gen" / "data" / "aligned_prompts.jsonl"


@dataclass(frozen=True)
class Change:
    """One change of the weights in words: `kind`, layers [start, stop), and the noise's fraction."""

    kind: str
    start: int = 0
    stop: int = 0
    fraction: float = 0.0


# --- surgery on a model in training -------------------------------------------------------------------------
def draw(rng: random.Random, depth: int) -> Change:
    """A trained kind of change: noise of random size and place, or a swap of two layers."""
    if rng.random() < 0.6:
        start = rng.randrange(depth)
        stop = rng.randint(start + 1, depth)
        low, high = map(math.log, NOISE)
        return Change("noise", start, stop, math.exp(rng.uniform(low, high)))
    a, b = sorted(rng.sample(range(depth), 2))
    return Change("swap", a, b)


@contextmanager
def changed(lora, change: Change | None, seed: int = 0) -> Iterator[None]:
    """The model with its weights changed, and back to the bit afterwards. Adapters stay with their layer.

    "swap": layers `start` and `stop`; "delete": without [start, stop); "repeat": [start, stop) run twice;
    "chunks": [start, stop) exchanged with as many layers after it; "reverse": [start, stop) from behind.
    """
    stack = lora.get_base_model().model
    layers, kept = stack.layers, []
    order = list(range(len(layers)))
    if change is None:
        yield
        return
    a, b = change.start, change.stop
    if change.kind == "noise":
        generator = torch.Generator(device=next(lora.parameters()).device).manual_seed(seed)
        for layer in layers[a:b]:
            for name, parameter in layer.named_parameters():
                if "lora_" in name:
                    continue
                kept.append((parameter, parameter.data))
                # A new tensor, not in place: going back is handing the old one back.
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                size = change.fraction * parameter.data.float().std()
                parameter.data = (parameter.data.float() + size * noise).to(parameter.dtype)
    elif change.kind == "swap":
        order[a], order[b] = order[b], order[a]
    elif change.kind == "delete":
        del order[a:b]
    elif change.kind == "repeat":
        order[b:b] = order[a:b]
    elif change.kind == "chunks":
        order[a:b], order[b : 2 * b - a] = order[b : 2 * b - a], order[a:b]
    elif change.kind == "reverse":
        order[a:b] = order[a:b][::-1]
    else:
        raise FrankenError(f"{change.kind!r} is no kind of change")
    stack.layers = torch.nn.ModuleList([layers[k] for k in order])
    depth, types = stack.config.num_hidden_layers, getattr(stack.config, "layer_types", None)
    stack.config.num_hidden_layers = len(order)  # transformers runs so many of its list
    if types is not None:
        stack.config.layer_types = [types[k] for k in order]
    try:
        yield
    finally:
        stack.layers, stack.config.num_hidden_layers = layers, depth
        if types is not None:
            stack.config.layer_types = types
        for parameter, data in kept:
            parameter.data = data


# --- what is asked ------------------------------------------------------------------------------------------
class Asked:
    """Prompts through the chat template as padded batches, and Yes against No read off the next token."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.device = next(model.parameters()).device
        self.yes, self.no = (torch.tensor(ids, device=self.device) for ids in answer_token_ids(tokenizer))
        self.template = ChatTemplate(tokenizer)
        self.first = [self._first_token("Yes"), self._first_token("No")]

    def _first_token(self, word: str) -> int:
        """The token that a reply of this word begins with, as the tokenizer writes prompt and reply together
        (alone, SentencePiece puts a space before it). Raises FrankenError where the prompt's own last token
        would be another then, or the token begins other words too."""
        question = [{"role": "user", "content": "Is it?"}]
        prompt = self.template.ids(question)
        context, reply = continuation(prompt, self.template.ids(question, word))
        spellings = {*self.yes.tolist(), *self.no.tolist()}
        if context != prompt or reply[0] not in spellings:
            raise FrankenError(f"this tokenizer has no token of its own for a reply that begins with {word}")
        return reply[0]

    def batch(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [n, S], mask [n, S]) of the texts as user turns.

        Padded on the right, where causal attention never looks: with padding on the left, whole rows of the
        attention mask are empty, and gradients came out NaN on a GPU.
        """
        rows = [list(self.template.ids([{"role": "user", "content": text}])) for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        return ids, mask

    def logits(self, texts: list[str]) -> torch.Tensor:
        """Float32 logits of the token after each prompt, [n, vocabulary]."""
        ids, mask = self.batch(texts)
        last = mask.sum(1) - 1
        model = self.model.get_base_model()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return model.lm_head(hidden[torch.arange(len(ids), device=self.device), last]).float()

    @torch.no_grad()
    def log_odds(self, texts: list[str]) -> torch.Tensor:
        """Yes against No over all spellings, nats, [n]."""
        logits = torch.cat([self.logits(texts[k : k + 64]) for k in range(0, len(texts), 64)])
        return logits[:, self.yes].logsumexp(-1) - logits[:, self.no].logsumexp(-1)


# --- what came of it ----------------------------------------------------------------------------------------
def held_out_changes(depth: int) -> dict[str, Change | None]:
    """Changes by name for the check at the end: trained kinds, then kinds that were never trained."""

    def at(layer: int) -> int:
        return round(layer * depth / 64)

    return {
        "unchanged": None,
        "noise_all_5pct": Change("noise", 0, depth, 0.05),
        "noise_all_10pct": Change("noise", 0, depth, 0.10),
        "noise_late_20pct": Change("noise", at(48), depth, 0.20),
        "swap_30_35": Change("swap", at(30), at(35)),
        "swap_20_40": Change("swap", at(20), at(40)),
        "delete_30_34": Change("delete", at(30), max(at(34), at(30) + 1)),
        "repeat_24_40": Change("repeat", at(24), at(40)),
        "chunks_24_32": Change("chunks", at(24), at(32)),
        "reverse_28_36": Change("reverse", at(28), at(36)),
    }


def check(lora, asked: Asked, depth: int, seed: int) -> dict[str, dict]:
    """By change: mean log-odds (nats) toward the right answer on the harness's own probes, plain framing, and
    the share that is right by sign; introspective ones and controls apart."""
    probes = [p for p in BINARY_PROBES if p.framing == "plain"]
    out = {}
    for name, change in held_out_changes(depth).items():
        with changed(lora, change, seed):
            values = asked.log_odds([p.text for p in probes]).tolist()
        sides: dict[str, list[float]] = {"introspective": [], "control": []}
        for probe, value in zip(probes, values, strict=True):
            right_is_yes = probe.if_changed == "yes"
            if probe.kind == "introspective" and change is None:
                right_is_yes = not right_is_yes
            sides[probe.kind].append(value if right_is_yes else -value)
        out[name] = {
            kind: {"nats": round(sum(v) / len(v), 3), "right": round(sum(x > 0 for x in v) / len(v), 3)}
            for kind, v in sides.items()
        }
    return out


# --- training -----------------------------------------------------------------------------------------------
class Visible:
    """Changes that can be seen: each raises the loss on neutral prose by a number of nats within VISIBLE.

    Easy ones come first: `draw` takes from those above a bound that falls from EASY to VISIBLE[0] over the
    first 60% of training (a curriculum; Bengio et al., ICML 2009). Each call also draws one new change, which
    takes the place of the oldest, so that no noise is met often.
    """

    def __init__(self, lora, prose: list[torch.Tensor], depth: int, rng: random.Random, size: int):
        self.lora, self.prose, self.depth, self.rng, self.size = lora, prose, depth, rng, size
        self.intact = self.loss()
        self.changes: list[tuple[float, Change, int]] = []
        for _ in range(20 * size):
            self.refresh()
            if len(self.changes) == size:
                break
        if not self.changes:
            raise FrankenError("no change of the weights moved the loss on prose by a visible amount")

    @torch.no_grad()
    def loss(self) -> float:
        """Nats a token on neutral prose."""
        with self.lora.disable_adapter():
            losses = [self.lora(input_ids=t, labels=t, use_cache=False).loss for t in self.prose]
        return torch.stack(losses).mean().item()

    def refresh(self) -> None:
        change, seed = draw(self.rng, self.depth), self.rng.getrandbits(31)
        with changed(self.lora, change, seed):
            rise = self.loss() - self.intact
        if VISIBLE[0] <= rise <= VISIBLE[1]:
            self.changes = [*self.changes[-self.size + 1 :], (rise, change, seed)]

    def draw(self, count: int, passed: float) -> list[tuple[float, Change, int]]:
        """`count` of (rise in nats a token, change, its seed), at `passed` of the training (0 to 1).

        As many of each kind as of the others: most noise is hardly visible and most swaps are plain.
        """
        self.refresh()
        bound = VISIBLE[0] + (EASY - VISIBLE[0]) * max(0.0, 1 - passed / 0.6)
        kinds = sorted({change.kind for _, change, _ in self.changes})
        drawn = []
        for k in range(count):
            some = [c for c in self.changes if c[1].kind == kinds[k % len(kinds)]]
            easy = [c for c in some if c[0] >= bound]
            drawn.append(self.rng.choice(easy or [max(some, key=lambda c: c[0])]))
        return drawn


def train(args: argparse.Namespace, say: Callable[[str], None] = print) -> dict:
    """Train, save under args.out, check; returns what training.json holds.

    Raises FrankenError if more than ten gradients are not finite; nothing is saved then.
    """
    from peft import LoraConfig, get_peft_model

    # 1. The model, its adapter, what is asked.
    check_target(Path(args.out) / "training.json")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    model, tokenizer = load(args.model, device)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    lora = get_peft_model(
        model,
        LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    lora.train()
    asked, depth = Asked(lora, tokenizer), model.config.num_hidden_layers
    control_pairs = controls(rng)
    with OTHER_PROMPTS.open(encoding="utf-8") as lines:
        others = [json.loads(line)["prompt"] for line in lines]
    prose = [
        torch.tensor([tokenizer(t, add_special_tokens=False)["input_ids"]], device=device)
        for t in NEUTRAL[:2]
    ]
    before = check(lora, asked, depth, args.seed)
    parameters = [p for p in lora.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    curve, skipped, started = [], 0, time.monotonic()
    visible = Visible(lora, prose, depth, rng, args.pool)

    def question(pairs, yes: bool) -> str:
        """A question out of `pairs` whose key is Yes for a changed model (a control: for any), or No."""
        framing, ending = rng.choice(FRAMINGS), rng.choice(ENDINGS)
        return framing.format(q=rng.choice(pairs)[0 if yes else 1]) + ending

    for step in range(args.steps):
        passed = step / args.steps
        if args.minutes:
            passed = max(passed, (time.monotonic() - started) / 60 / args.minutes)
        if passed >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 20, 3 * (1 - passed))  # warm-up, constant, to zero
        # 2. The same questions under the weights as they are and under several changes, so that nothing but
        #    the state of the weights tells the right answers apart; both keys equally often.
        share = args.batch // 2
        about = [(question(ABOUT_ITSELF, k % 2 == 0), k % 2 == 0) for k in range(share)]
        states = visible.draw(args.states, passed)
        losses = {"unchanged": 0.0, "changed": 0.0, "controls": 0.0}
        for _, change, seed in [(0.0, None, 0), *states]:
            facts = [(question(control_pairs, k % 2 == 0), k % 2 == 0) for k in range(share // 2)]
            right = [yes == (change is not None) for _, yes in about] + [yes for _, yes in facts]
            answers = torch.tensor([asked.first[0 if yes else 1] for yes in right], device=device)
            weight = 0.5 if change is None else 0.5 / len(states)
            with changed(lora, change, seed):
                each = torch.nn.functional.cross_entropy(
                    asked.logits([text for text, _ in about + facts]), answers, reduction="none"
                )
                (weight * (each[:share].mean() + 0.5 * each[share:].mean())).backward()
            losses["unchanged" if change is None else "changed"] += 2 * weight * each[:share].mean().item()
            losses["controls"] += weight * each[share:].mean().item()
        # 3. On other prompts, of the unchanged model, what it said before.
        kl = args.keep * kl_to_plain(lora, *asked.batch(rng.sample(others, max(1, args.batch // 4))))
        kl.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        finite = all(map(math.isfinite, (*losses.values(), norm.item())))
        skipped += not finite
        if skipped > 10:
            raise FrankenError(
                f"loss {losses} and gradient {norm.item()} at step {step + 1}: try a lower --lr"
            )
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kinds = "+".join(change.kind for _, change, _ in states)
        curve.append(
            [*(round(v, 3) for v in (*losses.values(), kl.item(), min(s[0] for s in states))), kinds]
        )
        if (step + 1) % 25 == 0:
            means = [sum(c[k] for c in curve[-25:]) / 25 for k in range(5)]
            names = ("unchanged", "changed", "controls", "KL", "smallest rise")
            text = ", ".join(f"{n} {m:.2f}" for n, m in zip(names, means, strict=True))
            say(f"step {step + 1}/{args.steps}  {text}  {time.monotonic() - started:.0f} s")
    # 4. What came of it, the adapter and its record.
    lora.eval()
    after = check(lora, asked, depth, args.seed)
    seconds = time.monotonic() - started
    save(lora, Path(args.out), args.base_name or args.model)
    settings = {k: v for k, v in vars(args).items() if k not in ("model", "out", "device")}
    record = {
        "what": "reporter: the model answers keyed questions about changes of its own weights truthfully",
        "trained_on": {
            "kinds": ["noise", "swap"],
            "noise": NOISE,
            "visible": VISIBLE,
            "easy": EASY,
            "questions": 2 * len(ABOUT_ITSELF),
            "controls": 2 * len(control_pairs),
        },
        "held_out": "all probes of the harness, framings, formats; delete, repeat, chunks, reverse, splice",
        "changes": {k: v and asdict(v) for k, v in held_out_changes(depth).items()},
        "before": before,
        "after": after,
        "settings": settings,
        "steps": len(curve),
        "steps_skipped": skipped,  # whose gradient was not finite
        "curve_is": [
            "cross-entropy of answers about itself, unchanged weights, nats",
            "the same, changed weights",
            "controls",
            "KL, nats a token",
            "smallest rise of the loss on prose among the changes, nats a token",
            "kinds",
        ],
        "curve": curve[:: max(1, len(curve) // 200)],
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {n: version(n) for n in ("torch", "transformers", "peft")},
    }
    write_text(Path(args.out) / "training.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    for name, sides in after.items():
        say(f"  {name:18} {json.dumps(sides)}")
    return record


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = parser_of(__doc__)
    p.add_argument(
        "--model", default="smollm2-135m", help="pair name or a folder with the instruct checkpoint"
    )
    p.add_argument(
        "--base-name", default="", help="what adapter_config.json names as its base model; default: --model"
    )
    p.add_argument("--out", required=True, help="folder for the adapter and its record")
    p.add_argument("--device", default="auto")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument(
        "--keep", type=float, default=1.0, help="weight of the KL divergence to the model without the adapter"
    )
    p.add_argument("--minutes", type=float, default=0.0, help="end after so long; 0: after --steps")
    for flag, value in {"rank": 4, "steps": 500, "batch": 24, "states": 4, "pool": 60, "seed": 0}.items():
        p.add_argument(f"--{flag}", type=int, default=value, help=" ")
    return p.parse_args(argv)


@ends_in_one_line("interrupted; nothing was saved")
def main(argv: list[str] | None = None) -> int:
    with sound_attention():
        train(parse(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
