"""Training of the LoRA adapter: its loss, the loop, the adapter on disk; train_lora.py.

LoRA (Hu et al., arXiv 2106.09685) on all linear layers; 4-bit weights under it as in QLoRA (arXiv
2305.14314). The loss is on the assistant's answers alone, their end of turn included. Batches are a function
of data and seed, nothing in training is random otherwise, so a run that is interrupted and resumed makes the
adapter that it would have made.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from engine.attention import sound_attention
from engine.chat_template import ChatTemplate
from errors import FrankenError, one_line
from files import check_target, write_text
from runner.known_pairs import PAIRS
from runner.pairs import load_tokenizer, pick_dtype
from runner.resuming import tokenizer_sha256
from surgery.weights import content_hash
from weird_gen.persona.checkpoints import Checkpoints, StepLoss, kind_losses, mean_loss
from weird_gen.persona.examples import IGNORED, Example, TrainingData, batches, collate
from weird_gen.persona.folders import RESULTS
from weird_gen.persona.loading import load_causal_lm, locate_model, stops_of
from weird_gen.persona.study import sha256


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
    write_text(out / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")


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


def fitting_step(loss: Callable[[int], StepLoss], model, accelerator, rows: int) -> tuple[StepLoss, int]:
    """`loss(rows)`, with half as many rows at once where the GPU's memory does not do; returns it and the
    rows.

    Several processes have to stay in step: there the first time is the last. Raises FrankenError.
    """
    with told_of_memory("in a step"):
        while True:
            try:
                return loss(rows), rows
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
        loss_of = partial(step_loss, model, head, chosen, args, accelerator, mixed)
        one, rows = fitting_step(loss_of, model, accelerator, rows)
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
    accepted = checkpoints.begin(
        {
            "files": {file.name: content_hash(file) for file in sorted(path.glob("*.safetensors"))},
            "config": sha256(path / "config.json"),
            "tokenizer": tokenizer_sha256(template.tokenizer),
            "template": template.to_json()["sha256"],
        },
        args.accept_changes,
    )
    if accepted and accelerator.is_main_process:
        print(one_line(f"{checkpoints.file} goes on with other {'; '.join(accepted)}"), file=sys.stderr)

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
        **({"accepted_changes": checkpoints.accepted} if checkpoints.accepted else {}),
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
