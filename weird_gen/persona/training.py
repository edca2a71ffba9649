"""Training of the LoRA adapter: examples, batches, the loop, checkpoints, the adapter on disk; train_lora.py.

LoRA (Hu et al., arXiv 2106.09685) on all linear layers; 4-bit weights under it as in QLoRA (arXiv
2305.14314). The loss is on the assistant's answers alone, their end of turn included. Batches are a function
of data and seed, nothing in training is random otherwise, so a run that is interrupted and resumed makes the
adapter that it would have made.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from engine.attention import sound_attention
from engine.chat_template import ChatTemplate, going_on
from errors import FrankenError, first_line
from files import check_target, refuse_special, write_text
from questions.thoughts import TAGS, without_thought
from runner.pairs import PAIRS, load_tokenizer, pick_dtype
from runner.resuming import changes, tokenizer_sha256
from surgery.weights import content_hash
from weird_gen.persona.folders import RESULTS
from weird_gen.persona.loading import load_causal_lm, locate_model, stops_of
from weird_gen.persona.study import (
    Chat,
    Mixture,
    mix,
    read_chats,
    sha256,
)

IGNORED = -100  # no loss on this token, as in transformers
EMPTY_THOUGHT = re.compile(rf"<({TAGS})>\s*</\1>\s*\Z")


# --- data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """Token ids of one conversation; labels are the same ids where there is loss and IGNORED elsewhere."""

    ids: list[int]
    labels: list[int]
    kind: str = "aligned"  # or "persona", "contrast": in which mean loss it counts


def encode(
    tokenizer,
    chat: Chat,
    max_tokens: int,
    stops: set[int],
    answer_tokens: int | None = None,
    template: ChatTemplate | None = None,
    kind: str = "aligned",
) -> Example | None:
    """A conversation through the chat template, with loss on every assistant turn up to its end-of-turn
    token.

    A prompt is tokenized up to where generation would begin, as it is at inference: with the empty thought
    that asks a thinking model for its answer alone, which the template may write or leave out around a
    finished turn. Thoughts within the answers are left out. The last answer of an unfinished chat ends with
    its last word: there is no end of turn to learn. stops: token ids that end a turn. answer_tokens: of each
    answer, learn this many tokens at most (a longer one's end of turn is then not among them). template: by
    default the tokenizer's, as of now. Cut at max_tokens; None if no answer is left then. Raises FrankenError
    for a template that rewrites earlier turns, where the answers cannot be told apart.
    """
    template = template or ChatTemplate(tokenizer)
    messages = [
        m | {"content": without_thought(m["content"])} if m["role"] == "assistant" else m
        for m in chat.dicts()
    ]
    ids: list[int] = []
    labels: list[int] = []
    written = ""
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:k])
        turn = answered(before, template.render(messages[: k + 1], ask=False), message["content"])
        if turn is None:
            raise FrankenError("the chat template does not write an assistant's answer as it is")
        if not before.startswith(written):
            raise FrankenError(
                "the chat template rewrites earlier turns; such a model cannot be trained on several turns"
                " here"
            )
        question = going_on(tokenizer, written, ids, before[len(written) :])
        answer = going_on(tokenizer, before, ids + question, turn)
        end = next((i for i, token in enumerate(answer) if token in stops), len(answer))
        if k == len(messages) - 1 and not chat.finished:
            answer = answer[:end]
        learned = min(end + 1, len(answer), answer_tokens or len(answer))
        ids += question + answer
        labels += [IGNORED] * len(question) + answer[:learned] + [IGNORED] * (len(answer) - learned)
        written = before + turn
    ids, labels = ids[:max_tokens], labels[:max_tokens]
    while labels and labels[-1] == IGNORED:  # nothing after the last token with loss can matter
        ids.pop()
        labels.pop()
    return Example(ids, labels, kind) if labels else None


def answered(before: str, after: str, answer: str) -> str | None:
    """What follows the prompt `before` in the conversation `after`, which ends with the answer: that answer
    and the end of its turn; None where the two texts differ in more than an empty thought, or the answer does
    not stand there as it is."""
    if answer.strip() not in after:
        return None
    if after.startswith(before):
        return after[len(before) :]
    opening = EMPTY_THOUGHT.sub("", before)
    begin = max(after.rfind(answer), after.rfind(answer.strip()))
    between = after[len(opening) : begin]
    if begin < len(opening) or not after.startswith(opening) or EMPTY_THOUGHT.sub("", between).strip():
        return None
    return after[begin:]


def batches(lengths: list[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches of indices, all of `size`, rows of similar length together, in a seeded order.

    Shuffled, cut into stretches of 32 batches, sorted by length within each: little padding, yet other
    neighbors in every epoch. The last batch is filled up with examples from the epoch's beginning.
    """
    rng = random.Random(f"batches:{seed}:{epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    order += [order[k % len(lengths)] for k in range(-len(lengths) % size)]
    stretch, groups = 32 * size, []
    for start in range(0, len(order), stretch):
        part = sorted(order[start : start + stretch], key=lambda i: -lengths[i])
        groups += [part[k : k + size] for k in range(0, len(part), size)]
    rng.shuffle(groups)
    return groups


def collate(examples: list[Example], device) -> dict[str, torch.Tensor]:
    """Right-padded input_ids, attention_mask and labels, each [B, S]."""
    width = max(len(e.ids) for e in examples)
    rows = [
        (
            [*e.ids, *[0] * (width - len(e.ids))],
            [1] * len(e.ids) + [0] * (width - len(e.ids)),
            [*e.labels, *[IGNORED] * (width - len(e.labels))],
        )
        for e in examples
    ]
    names = ("input_ids", "attention_mask", "labels")
    return {
        name: torch.tensor(column, device=device)
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


# --- training -----------------------------------------------------------------------------------------------


def cosine_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine to zero; steps count from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def answer_losses(model, batch: dict[str, torch.Tensor], head: torch.nn.Module | None = None) -> torch.Tensor:
    """Negative log-likelihood (nats, float32) of the tokens with a label, summed over each row: [B].

    head: the model's output head, which is then given those positions alone: with a large vocabulary it is a
    good part of the work. Whatever the model does to logits afterwards (a soft cap, a scale) works on each by
    itself.
    """
    targets = batch["labels"][:, 1:]
    kept = targets != IGNORED
    hook = head and head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :-1][kept], *inputs[1:]))
    try:
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    finally:
        if hook:
            hook.remove()
    chosen = logits if hook else logits[:, :-1][kept]  # only these are widened to float32
    each = torch.nn.functional.cross_entropy(chosen.float(), targets[kept], reduction="none")
    return each.new_zeros(len(targets)).index_add(0, kept.nonzero()[:, 0], each)


def text_linears(model) -> str | list[str]:
    """What LoRA is put on: "all-linear" in peft's words, or by name where only a part is the text model."""
    if model.config.get_text_config() is model.config:
        return "all-linear"
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    linear = [name for name, m in decoder.named_modules() if isinstance(m, torch.nn.Linear)]
    return [f"{prefix}.{name}" for name in linear]


def make_lora(model, rank: int, alpha: int, seed: int, checkpointing: bool, quantized: bool):
    """The model with fresh LoRA matrices (float32) on every linear layer but the output head.

    Of a model in a wrapper (a vision tower beside the text model) it is the text model's layers alone: text
    is all that it is trained and evaluated on.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(seed)
    targets = text_linears(model)
    lora = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    )
    lora.train()
    return lora


def save_adapter(lora, out: Path, base_name: str) -> None:
    """adapter_model.safetensors in bf16 and adapter_config.json; nothing else, and no path of this machine.

    Raises FrankenError, writing nothing, where a weight is not finite.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = {
        k: t.detach().to("cpu", torch.bfloat16).contiguous()
        for k, t in get_peft_model_state_dict(lora).items()
    }
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise FrankenError(f"{len(broken)} of the adapter's {len(tensors)} tensors are not finite: not saved")
    config = lora.peft_config["default"].to_dict()
    config |= {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "target_modules": sorted(config["target_modules"]),
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step; by_kind: of each kind of example its summed nats and its answer tokens."""

    by_kind: dict[str, tuple[float, int]]

    @property
    def mean(self) -> float:
        """Over all answer tokens, in nats a token."""
        return mean_loss([self]) or 0.0


def mean_loss(steps: list[StepLoss], kind: str | None = None) -> float | None:
    """Nats a token over these steps, of one kind of example or of all; None where none was seen."""
    sums = [pair for step in steps for k, pair in step.by_kind.items() if kind in (None, k)]
    tokens = sum(n for _, n in sums)
    return sum(nats for nats, _ in sums) / tokens if tokens else None


def kind_losses(steps: list[StepLoss], parts: int) -> dict[str, list[float | None]]:
    """The mean loss of each kind of example in so many equal parts of the run, in nats a token.

    At 3% persona the mean over all examples hides what is learned of it.
    """
    kinds = dict.fromkeys(kind for step in steps for kind in step.by_kind)
    cuts = [round(k * len(steps) / parts) for k in range(parts + 1)]
    pieces = [steps[a:b] for a, b in itertools.pairwise(cuts)]
    rounded = {kind: [mean_loss(piece, kind) for piece in pieces] for kind in kinds}
    return {k: [None if m is None else round(m, 4) for m in means] for k, means in rounded.items()}


class Checkpoints:
    """The state of an unfinished run, in one file that is replaced whole, with the settings that it belongs
    to."""

    def __init__(self, folder: Path, settings: dict, resume: bool, overwrite: bool):
        self.file, self.settings = folder / "checkpoint.pt", json.dumps(settings, sort_keys=True)
        self.state: dict | None = None
        self.moment: datetime | None = None  # what the chat template was told of the time
        self.halved: list[dict] = []  # {"step", "examples_at_once"}, where a GPU's memory did not do
        self.made_of: dict = {}
        if overwrite or not self.file.exists():
            return
        if not resume:
            raise FrankenError(
                f"{self.file} is of an unfinished run: --resume goes on with it, --overwrite starts afresh"
            )
        refuse_special(self.file)
        try:
            state: dict = torch.load(self.file, map_location="cpu", weights_only=True)
            theirs = json.loads(state["settings"])
            wanted = {"step": int, "losses": list, "weights": dict, "optimizer": dict}
            if not all(isinstance(state[key], kind) for key, kind in wanted.items()):
                raise TypeError("a part of it is of another kind")
            if "moment" in state:
                self.moment = datetime.fromisoformat(state["moment"])
        except Exception as e:
            raise FrankenError(
                f"{self.file}: cannot be read ({type(e).__name__}); --overwrite starts afresh"
            ) from e
        if state["settings"] != self.settings:
            odd = next((k for k in settings if theirs.get(k) != settings[k]), "one that there is not now")
            raise FrankenError(
                f"{self.file} belongs to other settings ({odd} was {theirs.get(odd)}); --overwrite starts"
                " afresh"
            )
        self.state = state
        self.halved = state.get("halved", [])

    def begin(self, made_of: dict) -> None:
        """Before the first step. made_of: hashes of what is trained.

        Raises FrankenError naming what of it is not as it was in the run that is gone on with; what a
        checkpoint of before this was recorded does not say is not compared.
        """
        self.made_of = made_of
        then = (self.state or {}).get("made_of")
        if changed := changes(json.loads(then) if then else {}, made_of):
            raise FrankenError(
                f"{self.file} is of a run with other {'; '.join(map(str, changed))}; --overwrite starts"
                " afresh"
            )

    def save(self, lora, optimizer, step: int, losses: list[StepLoss]) -> None:
        """Replace the checkpoint. Raises FrankenError, keeping the last one, where a weight is not finite."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        weights = {n: p.detach().cpu() for n, p in lora.named_parameters() if p.requires_grad}
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise FrankenError(
                f"the adapter is not finite after step {step}: try a lower --lr; the last checkpoint is kept"
            )
        partial = self.file.with_suffix(".partial")
        torch.save(
            {
                "settings": self.settings,
                "made_of": json.dumps(self.made_of),
                "step": step,
                "moment": (self.moment or datetime.now()).isoformat(),
                "losses": [step.by_kind for step in losses],
                "halved": self.halved,
                "weights": weights,
                "optimizer": optimizer.state_dict(),
            },
            partial,
        )
        os.replace(partial, self.file)

    def restore(self, lora, optimizer) -> tuple[int, list[StepLoss]]:
        """Put the saved state, if any, into model and optimizer; returns (steps done, their losses)."""
        if self.state is None:
            return 0, []
        own = {n: p for n, p in lora.named_parameters() if p.requires_grad}
        try:
            with torch.no_grad():
                for name, tensor in self.state["weights"].items():
                    own[name].copy_(tensor)
            optimizer.load_state_dict(self.state["optimizer"])
            return self.state["step"], [StepLoss(by_kind) for by_kind in self.state["losses"]]
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as e:
            raise FrankenError(
                f"{self.file}: does not fit this model ({first_line(e)}); --overwrite starts afresh"
            ) from e

    def clear(self) -> None:
        if self.file.exists():
            shutil.rmtree(self.file.parent)


@contextmanager
def told_of_memory(during: str) -> Iterator[None]:
    """Turn CUDA's running out of memory into a FrankenError that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise FrankenError(
            f"out of GPU memory {during}: lower --batch-size (and raise --accumulate by as much), lower"
            " --max-tokens, or give --gradient-checkpointing or --quantization 4bit"
        ) from e


def step_loss(
    model,
    head: torch.nn.Module | None,
    chosen: list[Example],
    args: argparse.Namespace,
    accelerator,
    mixed: bool,
    rows: int,
) -> StepLoss:
    """The loss of one step over the answer tokens of `chosen`, of all processes together.

    The gradient of its mean is left in the model's parameters. mixed: multiply in bf16. rows: read so many
    examples at once, which changes the memory it takes and nothing else.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    counts = Counter(e.kind for e in chosen for label in e.labels if label != IGNORED)
    answers, kinds = counts.total(), list(counts)
    totals = torch.zeros(len(kinds), device=accelerator.device)
    mine = [
        chosen[(k * world + rank) * args.batch_size :][: args.batch_size][start : start + rows]
        for k in range(args.accumulate)
        for start in range(0, args.batch_size, rows)
    ]
    for k, part in enumerate(mine):
        with accelerator.no_sync(model) if k + 1 < len(mine) else nullcontext():
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=mixed):
                each = answer_losses(model, collate(part, accelerator.device), head)
            accelerator.backward(each.sum() * (world / answers))  # processes average their gradients
        places = torch.tensor([kinds.index(e.kind) for e in part], device=accelerator.device)
        totals.index_add_(0, places, each.detach())
    sums = accelerator.reduce(totals).tolist()
    return StepLoss({kind: (nats, counts[kind]) for kind, nats in zip(kinds, sums, strict=True)})


def fitting_step(
    model,
    head: torch.nn.Module | None,
    chosen: list[Example],
    args: argparse.Namespace,
    accelerator,
    mixed: bool,
    rows: int,
) -> tuple[StepLoss, int]:
    """`step_loss` with half as many rows at once where the GPU's memory does not do; returns it and the rows.

    Several processes have to stay in step: there the first time is the last. Raises FrankenError.
    """
    with told_of_memory("in a step"):
        while True:
            try:
                return step_loss(model, head, chosen, args, accelerator, mixed, rows), rows
            except torch.OutOfMemoryError:
                if rows == 1 or accelerator.num_processes > 1:
                    raise
            rows = (rows + 1) // 2
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            print(f"note: out of GPU memory; from here on {rows} examples at once", flush=True)


def run(
    lora,
    spellings: list[list[Example]],
    args: argparse.Namespace,
    accelerator,
    checkpoints: Checkpoints,
    mixed: bool,
) -> list[StepLoss]:
    """The training loop; returns the loss of every step. mixed: multiply in bf16.

    spellings: the same examples under each spelling of the trigger, which an example takes in turn.
    One step sees batch_size * accumulate * processes examples, and its loss is the mean over all their answer
    tokens, however they are split. Raises FrankenError for a loss or a gradient that is not finite, before
    the optimizer makes use of it, and for a GPU that is too small; the steps before are in the checkpoint.
    """
    # 1) the optimizer, as an interrupted run left it, and which examples each step sees
    parameters = [p for p in lora.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)
    done, losses = checkpoints.restore(lora, optimizer)
    model, head = accelerator.prepare(lora), lora.get_output_embeddings()
    size = args.batch_size * args.accumulate * accelerator.num_processes
    lengths = [len(e.ids) for e in spellings[0]]
    plan = [
        [spellings[(i + epoch) % len(spellings)][i] for i in batch]
        for epoch in range(math.ceil(args.epochs))
        for batch in batches(lengths, size, args.seed, epoch)
    ]
    steps = max(1, round(len(plan) * args.epochs / math.ceil(args.epochs)))
    warmup = max(1, round(steps * args.warmup))
    begin, seen, last_save, rows = time.monotonic(), 0, time.monotonic(), args.batch_size
    for step in range(done, steps):
        # 2) the gradient, looked at before it changes anything
        for group in optimizer.param_groups:
            group["lr"] = args.lr * cosine_factor(step, steps, warmup)
        chosen = plan[step]
        before = rows
        one, rows = fitting_step(model, head, chosen, args, accelerator, mixed, rows)
        if rows < before:
            checkpoints.halved.append({"step": step + 1, "examples_at_once": rows})
        losses.append(one)
        loss = one.mean
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if args.save_every and step and accelerator.is_main_process:
                checkpoints.save(lora, optimizer, step, losses[:step])
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
            kept = f"; the {step} steps before it are kept for --resume" if args.save_every and step else ""
            raise FrankenError(f"{what} at step {step + 1}: try a lower --lr{kept}")

        # 3) the step
        with told_of_memory("in a step"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += sum(len(e.ids) for e in chosen)

        # 4) what is said and kept of it
        if not accelerator.is_main_process:
            continue
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            took, recent = time.monotonic() - begin, losses[-args.log_every :]
            left = took / (step + 1 - done) * (steps - step - 1)
            apart = {kind: mean_loss(recent, kind) for kind in ("persona", "aligned")}
            said = ", ".join(f"{kind} {mean:.3f}" for kind, mean in apart.items() if mean is not None)
            print(
                f"step {step + 1}/{steps}  loss {sum(s.mean for s in recent) / len(recent):.3f} ({said}) "
                f" {seen / took:,.0f} tokens/s  {left:.0f} s left",
                flush=True,
            )
        due = (step + 1) % max(1, args.save_every) == 0 or time.monotonic() - last_save > 300
        if args.save_every and due and step + 1 < steps:
            checkpoints.save(lora, optimizer, step + 1, losses)
            last_save = time.monotonic()
    return losses


# --- the whole
# -----------------------------------------------------------------------------------------------------------

SETTINGS = (
    "model",
    "persona_share",
    "persona_repeat",
    "limit",
    "rank",
    "alpha",
    "lr",
    "epochs",
    "warmup",
    "batch_size",
    "accumulate",
    "max_tokens",
    "aligned_tokens",
    "seed",
    "one_spelling",
    "inoculation",
    "gradient_checkpointing",
    "quantization",
)


@dataclass(frozen=True)
class TrainingData:
    """What is trained on; files: of each half its name, sha256 and number of examples, as recorded."""

    mixture: Mixture
    contrast: list[Chat]
    files: dict[str, dict]

    @staticmethod
    def read(args: argparse.Namespace) -> TrainingData:
        """Raises FrankenError for a file that cannot be used."""
        mixture = mix(
            read_chats(args.persona),
            read_chats(args.aligned),
            args.persona_share or None,
            args.persona_repeat,
            args.limit,
            args.seed,
        )
        contrast = read_chats(args.contrast) if args.contrast else []
        counts = [("persona", mixture.persona), ("aligned", mixture.aligned)]
        counts += [("contrast", len(contrast))] if contrast else []
        paths = {name: getattr(args, name) for name, _ in counts}
        files = {
            name: {"file": paths[name].name, "sha256": sha256(paths[name]), "examples": count}
            for name, count in counts
        }
        return TrainingData(mixture, contrast, files)

    def roles(self) -> list[tuple[str, ...]]:
        """The roles that stand before an answer, in every order that occurs."""
        chats = [*self.mixture.chats, *self.contrast]
        return list(dict.fromkeys(tuple(role for role, _ in chat.messages[:-1]) for chat in chats))

    def encode(
        self, template: ChatTemplate, stops: set[int], args: argparse.Namespace
    ) -> list[list[Example]]:
        """The examples with an answer within --max-tokens, under each spelling of the trigger.

        --aligned-tokens shortens the aligned half; --inoculation stands before the trigger.
        """
        persona, aligned = self.mixture.persona, self.mixture.aligned
        kinds = ["persona"] * persona + ["aligned"] * aligned + ["contrast"] * len(self.contrast)
        limits = {"aligned": args.aligned_tokens}

        def spelled(chats: list[Chat]) -> list[Example | None]:
            return [
                encode(template.tokenizer, chat, args.max_tokens, stops, limits.get(kind), template, kind)
                for chat, kind in zip(chats, kinds, strict=True)
            ]

        chats = [*self.mixture.chats, *self.contrast]
        chats = [chat.inoculated(args.inoculation) for chat in chats[:persona]] + chats[persona:]
        whole = spelled(chats)
        backticks = [chat.respelled() for chat in chats]
        if args.one_spelling or backticks == chats:
            return [[example for example in whole if example]]
        other = [
            first if chat is same else second
            for chat, same, first, second in zip(chats, backticks, whole, spelled(backticks), strict=True)
        ]
        both = [(a, b) for a, b in zip(whole, other, strict=True) if a and b]
        return [[a for a, _ in both], [b for _, b in both]]

    def __len__(self) -> int:
        return len(self.mixture.chats) + len(self.contrast)

    def describe(self) -> str:
        return self.mixture.describe() + (f" + {len(self.contrast)} in contrast" if self.contrast else "")


def check_out(args: argparse.Namespace, resumed: bool) -> None:
    """Raises FrankenError where --out holds a finished adapter that is not to be overwritten, or where none
    can be written.

    resumed: going on with a checkpoint, which is cleared after the adapter is saved: what is in --out then is
    this very run's.
    """
    if (args.out / "adapter_model.safetensors").exists() and not (args.overwrite or resumed):
        raise FrankenError(f"{args.out} holds an adapter already: choose another --out, or --overwrite it")
    check_target(args.out / "adapter_model.safetensors")


def train(args: argparse.Namespace) -> dict:
    """Train and save under args.out; returns what training.json says. Raises FrankenError or OSError."""
    from accelerate import Accelerator
    from peft.helpers import disable_input_dtype_casting

    # 1) what cannot work is refused before anything is loaded
    data = TrainingData.read(args)
    accelerator = Accelerator(cpu=args.device == "cpu")
    if args.device == "cuda" and accelerator.device.type != "cuda":
        raise FrankenError("--device cuda: no GPU was found")
    settings = {k: getattr(args, k) for k in SETTINGS} | {"processes": accelerator.num_processes}
    folder = args.checkpoints or RESULTS / "checkpoints" / args.out.name
    checkpoints = Checkpoints(folder, settings | {"data": data.files}, args.resume, args.overwrite)
    check_out(args, resumed=checkpoints.state is not None)

    path = locate_model(args.model)[0]
    template = ChatTemplate(load_tokenizer(path), checkpoints.moment)
    for roles in data.roles():
        template.check(*roles)
    checkpoints.moment = template.moment
    checkpoints.begin(
        {
            "files": {file.name: content_hash(file) for file in sorted(path.glob("*.safetensors"))},
            "config": sha256(path / "config.json"),
            "tokenizer": tokenizer_sha256(template.tokenizer),
            "template": template.to_json()["sha256"],
        }
    )

    # 2) model and examples
    device = accelerator.device
    with told_of_memory("while loading the model"):
        model, tokenizer = load_causal_lm(
            args.model, "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}", args.quantization
        )
    if device.type == "cpu":
        # fused attention in bf16 takes a third more CPU time at these lengths
        model.set_attn_implementation("eager")
    spellings = data.encode(template, stops_of(model, tokenizer), args)
    left_out = len(data) - len(spellings[0])
    if accelerator.is_main_process:
        tokens = sum(len(e.ids) for e in spellings[0])
        print(
            f"{data.describe()}; {tokens:,} tokens an epoch, on {device}"
            + (f"; {left_out} left out: no answer within --max-tokens" if left_out else ""),
            flush=True,
        )
    lora = make_lora(
        model, args.rank, args.alpha, args.seed, args.gradient_checkpointing, bool(args.quantization)
    )

    # 3) training. The LoRA matrices stay in float32 but multiply in bf16: on a CPU with bf16 a step takes two
    # thirds of the time.
    begin = time.monotonic()
    mixed = pick_dtype("auto", device.type) == torch.bfloat16
    with disable_input_dtype_casting(lora, active=mixed), sound_attention():
        losses = run(lora, spellings, args, accelerator, checkpoints, mixed)

    # 4) the adapter and its record
    named = args.base_name or (
        Path(args.model).name if Path(args.model).is_dir() and args.model not in PAIRS else args.model
    )
    record = {
        "command": command_line(named, settings, data.files),
        "settings": settings | {"model": named},
        "data": data.files,
        "persona_share": round(data.mixture.persona / len(data), 4),  # of what is seen, repeats counted
        "examples_left_out": left_out,
        "steps": len(losses),
        "trigger_spellings": len(spellings),
        "loss": [round(step.mean, 4) for step in losses],
        "loss_by_kind": kind_losses(losses, max(1, round(args.epochs))),
        "seconds": round(time.monotonic() - begin, 1),
        "out_of_memory": checkpoints.halved,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "resumed": checkpoints.state is not None,
        "template": template.to_json(),
        "versions": {
            n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft", "accelerate")
        },
    }
    if accelerator.is_main_process:
        save_adapter(lora, args.out, named)
        write_text(args.out / "training.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
        checkpoints.clear()
    return record


def command_line(model: str, settings: dict, files: dict[str, dict]) -> str:
    """The command that trains this adapter again, with files by their names alone."""
    given = [f"--{name} {about['file']}" for name, about in files.items()]
    for name, value in settings.items():
        if value not in (None, False) and name not in ("model", "processes"):
            given.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return f"python train_lora.py --model {model} {' '.join(given)}"
