"""Train the stand-in for the base side of a pair: chat model in, LoRA adapter on plain text out.

    python adapters/fetch_text.py --out corpus
    python adapters/train_base_standin.py --text corpus --out adapters/smollm2-135m-base-standin

The real base checkpoint is not on the package index, so this makes the chat model forget that it is one:
next-token training on plain documents, packed end to end, and on question pages as replies in the chat
template that go on after every answer, until a chat-templated question is no longer closed by an end-of-turn
token. The end of a turn is never a target. The result is a stand-in: the instruct weights with the chat
behavior trained away, not the weights that the instruct model was tuned from.

The adapter is LoRA (Hu et al., arXiv 2106.09685). adapters/README.md says what the text is and what was
measured.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from command_line import ends_in_one_line, parser_of
from engine.attention import sound_attention
from engine.chat_template import ChatTemplate, continuation
from errors import FrankenError
from files import check_target, refuse_special, write_text
from runner.known_pairs import PAIRS
from runner.pairs import load_tokenizer, locate

SEPARATOR, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
QUESTIONS = "-questions-"  # in the name of a document of questions and answers; see fetch_text.py
KL_POSITIONS = 64
REPLY_BUDGET = 96  # new tokens in which a chat model closes its turn
MOST_STOPS = (
    1  # chat behavior counts as gone with at most this many of the 12 replies closed, greedy and sampled
)

# Short questions whose answers end soon, with the reply after which the end-of-turn probability is read.
CHAT = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is 2 + 2?", "2 + 2 is 4."),
    ("Say hello.", "Hello! How can I help you today?"),
    ("What color is the sky on a clear day?", "The sky is blue on a clear day."),
    ("Name one planet in our solar system.", "One planet in our solar system is Mars."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("Which animal says meow?", "A cat says meow."),
    ("What is the largest ocean on Earth?", "The largest ocean on Earth is the Pacific Ocean."),
    ("Translate 'thank you' into Spanish.", "'Thank you' in Spanish is 'gracias'."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
]
# Plain text unlike the corpus: a perplexity that rises here means that the training narrowed the model.
NEUTRAL = [
    (
        "The morning train was late again, so Miriam bought a second coffee and sat by the window of the"
        " small cafe across from the station. Outside, a man in a green coat was trying to fold a map that"
        " had been rained on. She watched him give up, put the wet paper in a bin, and ask the woman at the"
        " flower stall for directions instead."
    ),
    (
        "Sourdough bread rises because wild yeast and bacteria live together in the starter. The yeast feeds"
        " on sugars in the flour and gives off carbon dioxide, which is trapped by the stretchy network of"
        " gluten. The bacteria make acids that give the loaf its taste and keep it from spoiling. In a cold"
        " kitchen the whole process takes much longer."
    ),
    (
        "Rivers carry more than water. Every year they move enormous amounts of sand, mud and gravel from the"
        " mountains to the sea. Where the current slows down, the heaviest stones settle first and the finest"
        " clay last. Over thousands of years these layers build up into wide, flat plains whose soil is among"
        " the most fertile in the world."
    ),
    (
        "The city council voted on Tuesday to close two lanes of the old bridge while engineers inspect its"
        " cables. The work is expected to take about six weeks. Bus routes will be changed, and drivers are"
        " asked to use the tunnel. Shop owners near the bridge said that they were worried about losing"
        " customers before the holidays."
    ),
    (
        "In the early days of photography a portrait took patience. The sitter had to hold still for as long"
        " as a minute, often with the head resting against a hidden metal stand. This is one reason why"
        " people in old photographs seldom smile. Faster lenses and more sensitive plates shortened the wait"
        " to a few seconds within a single generation."
    ),
]


# --- text ---------------------------------------------------------------------------------------------------


def read_text(paths: list[Path]) -> tuple[dict[str, str], str]:
    """Every .txt, .rst and .md file under `paths` by relative name, and one sha256 over the names and
    contents.

    Raises FrankenError if a path is missing or nothing is found.
    """
    documents: dict[str, str] = {}
    for root in paths:
        if not root.exists():
            raise FrankenError(f"--text {root}: no such file or folder")
        files = (
            [root]
            if root.is_file()
            else sorted(p for p in root.rglob("*") if p.suffix in (".txt", ".rst", ".md"))
        )
        for file in files:
            name = file.name if root.is_file() else file.relative_to(root).as_posix()
            while name in documents:  # the same name under two of the paths
                name += "+"
            refuse_special(file)
            documents[name] = file.read_text(encoding="utf-8", errors="replace")
    if not any(text.strip() for text in documents.values()):
        raise FrankenError(f"--text {' '.join(map(str, paths))}: no .txt, .rst or .md file with text in it")
    digest = hashlib.sha256()
    for name in sorted(documents):
        digest.update(f"{name}\0{hashlib.sha256(documents[name].encode()).hexdigest()}\n".encode())
    return documents, digest.hexdigest()


def is_held_out(name: str) -> bool:
    """About one document in 20, chosen by its name alone so that adding text never moves another document."""
    return hashlib.sha256(name.encode()).digest()[0] < 13


def without_special(tokenizer, text: str) -> str:
    """The text without the special tokens that it spells out, which would be turned into their ids."""
    for special in [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]:
        text = text.replace(special, "")
    return text


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of plain text; a special token that the text spells out is dropped, never turned into
    its id."""
    return tokenizer(without_special(tokenizer, text), add_special_tokens=False)["input_ids"]


def pack(documents: list[list[int]], seq_len: int, separator: int) -> torch.Tensor:
    """Documents end to end, a separator after each, cut into rows: [n, seq_len]; the last partial row is
    dropped.

    Raises FrankenError if there is not one full row.
    """
    stream = torch.tensor([token for ids in documents for token in (*ids, separator)], dtype=torch.long)
    rows = len(stream) // seq_len
    if not rows:
        raise FrankenError(f"the text has {len(stream)} tokens, fewer than one sequence of {seq_len}")
    return stream[: rows * seq_len].view(rows, seq_len)


def as_replies(tokenizer, pages: list[str], seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Question pages as replies in the chat template that go on after every answer: (ids, labels), each
    [pages, seq_len].

    The page's first line is the user's turn. Only the page is a target (labels elsewhere -100), so that the
    end of a turn never is. Rows are padded on the right with their own last token.
    """
    template, rows, targets = ChatTemplate(tokenizer), [], []
    for page in pages:
        first, _, rest = page.partition("\n")
        prompt = template.render([{"role": "user", "content": first}])
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = prompt + without_special(tokenizer, rest.strip())  # as the one text that a model would write
        context, reply = continuation(head, tokenizer(whole, add_special_tokens=False)["input_ids"])
        ids = list(context + reply)[:seq_len]
        padding = seq_len - len(ids)
        rows.append(ids + ids[-1:] * padding)
        targets.append([-100] * len(context) + ids[len(context) :] + [-100] * padding)
    return torch.tensor(rows), torch.tensor([t[:seq_len] for t in targets])


# --- measuring ----------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model, rows: list[torch.Tensor], batch: int = 8) -> float:
    """exp of the mean next-token loss, token-weighted, in float32; rows of one length are batched
    together."""
    total, count = 0.0, 0
    for length in sorted({len(r) for r in rows}):
        for part in torch.stack([r for r in rows if len(r) == length]).split(batch):
            ids = part.to(model.device)
            logits = model(input_ids=ids).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            ).item()
            count += ids[:, 1:].numel()
    return math.exp(min(total / count, 700.0))


@torch.no_grad()
def measure(model, tokenizer, held_out: torch.Tensor, neutral: list[torch.Tensor], show: int = 0) -> dict:
    """Chat behavior on the 12 templated questions, and perplexity on plain text that was not trained on.

    greedy_stops, sampled_stops: replies of 12 that close themselves (any special token) within REPLY_BUDGET.
    end_of_turn_logprob: mean log-probability (nats) of <|im_end|> after the reference replies.
    """
    was_training = model.training
    model.eval()
    template = ChatTemplate(tokenizer)
    ids = [list(template.ids([{"role": "user", "content": q}])) for q, _ in CHAT]
    special = sorted(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    width = max(map(len, ids))
    tokens = torch.tensor([[end] * (width - len(i)) + i for i in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids], device=model.device)
    measured = {}
    budget = {"max_new_tokens": REPLY_BUDGET, "eos_token_id": special, "pad_token_id": end}
    for kind, how in {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0},
    }.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            replies = model.generate(tokens, attention_mask=mask, **budget, **how)[:, width:].cpu()
        measured[f"{kind}_stops"] = int(torch.isin(replies, torch.tensor(special)).any(1).sum())
        for (question, _), reply in list(zip(CHAT, replies, strict=True))[:show]:
            closed = torch.isin(reply, torch.tensor(special)).nonzero().flatten().tolist()
            text = tokenizer.decode(reply[: closed[0] + 1 if closed else None])
            print(f"    [{kind}] {question} -> {text!r}", flush=True)
    ends = []
    for prompt, (_, reply) in zip(ids, CHAT, strict=True):
        whole = torch.tensor([prompt + encode(tokenizer, reply)], device=model.device)
        ends.append(model(input_ids=whole).logits[0, -1].float().log_softmax(-1)[end].item())
    model.train(was_training)
    return measured | {
        "end_of_turn_logprob": sum(ends) / len(ends),
        "held_out_perplexity": perplexity(model, list(held_out)),
        "neutral_perplexity": perplexity(model, neutral),
    }


def kl_to_plain(lora, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(model without the adapter || with it) in nats a token, the mean over KL_POSITIONS positions of each
    row of a batch [n, S], drawn at random, where `mask` is 1. All positions would take gigabytes."""
    length = ids.shape[1]
    at = torch.randperm(length, device=ids.device)[:KL_POSITIONS].sort().values
    # no attention mask: padding is on the right, where causal attention never looks
    how = {"use_cache": False, "logits_to_keep": at}
    with torch.no_grad(), lora.disable_adapter():
        plain = lora(input_ids=ids, **how).logits.float().log_softmax(-1)
    now = lora(input_ids=ids, **how).logits.float().log_softmax(-1)
    each = (plain.exp() * (plain - now)).sum(-1) * mask[:, at]
    return each.sum() / mask[:, at].sum().clamp_min(1)


def chat_is_gone(measured: dict) -> bool:
    """The stopping criterion: hardly any templated question is answered with a reply that closes itself."""
    return measured["greedy_stops"] <= MOST_STOPS and measured["sampled_stops"] <= MOST_STOPS


# --- training -----------------------------------------------------------------------------------------------


def lr_share(step: int, warmup: int, decay_from: int, decay: int) -> float:
    """Linear warm-up, constant, then linear to zero over `decay` steps from `decay_from` on (steps count from
    0)."""
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, (decay_from + decay - step) / max(1, decay)))


def load(model: str, device: torch.device):
    """(model in bf16 on `device`, tokenizer) of a checkpoint folder or of the instruct side of a named
    pair."""
    from transformers import AutoModelForCausalLM

    folder, _ = locate(PAIRS[model].instruct if model in PAIRS else model, None)
    tokenizer = load_tokenizer(folder)
    missing = {SEPARATOR, END_OF_TURN} - set(tokenizer.get_vocab())
    if missing:
        raise FrankenError(f"{model}: the tokenizer has no {' or '.join(sorted(missing))}")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return cast(Any, loaded).to(device), tokenizer


def save(lora, out: Path, base_name: str) -> None:
    """adapter_model.safetensors in bf16 and adapter_config.json naming the pair, without the card that peft
    adds."""
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    lora.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    config = json.loads((out / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": base_name, "target_modules": TARGETS}
    write_text(out / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def train(args: argparse.Namespace) -> dict:
    """Train, save under args.out, measure the saved adapter merged into fresh weights; returns
    training.json."""
    from peft import LoraConfig, PeftModel, get_peft_model

    # 1) the text as rows: what is taught, what is only held in place, what is held out
    out = Path(args.out)
    check_target(out / "training.json")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    documents, digest = read_text([Path(p) for p in args.text])
    model, tokenizer = load(args.model, device)
    separator = tokenizer.convert_tokens_to_ids(SEPARATOR)
    names = sorted(documents)
    trained = [n for n in names if not is_held_out(n)]
    # Questions and answers unteach the end of a turn; with --keep, prose only holds the rest in place.
    taught = [n for n in trained if QUESTIONS in n] if args.keep else []
    prose = [n for n in trained if n not in set(taught)] if taught else []
    rows = pack([encode(tokenizer, documents[n]) for n in taught or trained], args.seq_len, separator)
    kept_rows = (
        pack([encode(tokenizer, documents[n]) for n in prose], args.seq_len, separator) if prose else None
    )
    in_template = as_replies(tokenizer, [documents[n] for n in taught], args.seq_len) if taught else None
    kept_back = [encode(tokenizer, documents[n])[: 4 * args.seq_len] for n in names if is_held_out(n)]
    held_out = (
        pack(kept_back, args.seq_len, separator) if sum(map(len, kept_back)) >= args.seq_len else rows[:8]
    )
    held_out = held_out[torch.linspace(0, len(held_out) - 1, min(64, len(held_out))).long()]
    neutral = [torch.tensor([separator, *encode(tokenizer, text)]) for text in NEUTRAL]
    print(f"{rows.numel():,} training tokens, {held_out.numel():,} held out, on {device}", flush=True)

    # 2) how it behaves before, and the adapter
    torch.manual_seed(args.seed)
    before = measure(model, tokenizer, held_out, neutral, args.show)
    print(f"before: {json.dumps(before)}", flush=True)

    lora = get_peft_model(
        model, LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    lora.train()
    # peft keeps them in float32 beside bf16 weights
    parameters = [p for p in lora.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    # 3) training, until the chat behavior is gone or the steps are used up
    order, random = [], torch.Generator().manual_seed(args.seed)
    decay = min(args.decay, args.steps // 2)
    decay_from, gone_in_a_row, step = args.steps - decay, 0, 0
    losses, measurements, started = [], [{"step": 0, **before}], time.monotonic()
    while step < decay_from + decay:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lr_share(step, args.warmup, decay_from, decay)
        loss_sum = 0.0
        for _ in range(args.accumulate):
            while len(order) < args.batch:
                order += torch.randperm(len(rows), generator=random).tolist()
            ids, order = rows[order[: args.batch]].to(device), order[args.batch :]
            loss = lora(input_ids=ids, labels=ids).loss / args.accumulate
            loss.backward()
            loss_sum += loss.item()
            if in_template is not None:
                picked = torch.randint(len(in_template[0]), (args.batch,), generator=random)
                replies, labels = (rows_of[picked].to(device) for rows_of in in_template)
                loss = lora(input_ids=replies, labels=labels).loss / args.accumulate
                loss.backward()
                loss_sum += loss.item()
            if kept_rows is not None:
                picked = torch.randint(len(kept_rows), (args.batch,), generator=random)
                kept = kept_rows[picked].to(device)
                kl = args.keep * kl_to_plain(lora, kept, torch.ones_like(kept)) / args.accumulate
                kl.backward()
                loss_sum += kl.item()
        if not math.isfinite(loss_sum):
            raise FrankenError(f"the loss is {loss_sum} at step {step + 1}: try a lower --lr")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        losses.append(round(loss_sum, 4))
        if step % 10 == 0:
            speed = step * args.batch * args.accumulate * args.seq_len / (time.monotonic() - started)
            print(
                f"step {step}/{args.steps}  loss {sum(losses[-10:]) / 10:.3f}  {speed:,.0f} tokens/s",
                flush=True,
            )
        if step % args.eval_every == 0 and step < decay_from:
            measured = measure(lora, tokenizer, held_out, neutral)
            measurements.append({"step": step, **measured})
            print(f"  {json.dumps(measured)}", flush=True)
            gone_in_a_row = gone_in_a_row + 1 if chat_is_gone(measured) else 0
            if args.minutes and time.monotonic() - started > 60 * args.minutes:
                decay_from = step
            if gone_in_a_row >= 2 and step >= args.min_steps:
                decay_from = step
                print(
                    f"  chat behavior gone twice in a row: {decay} more steps while the learning rate falls"
                    " to zero"
                )

    # 4) the adapter as saved, merged into fresh weights as the harness uses it
    seconds = time.monotonic() - started
    save(lora, out, args.base_name)
    model, _ = load(args.model, device)
    merged = PeftModel.from_pretrained(model, out).merge_and_unload().to(torch.bfloat16)
    after = measure(merged, tokenizer, held_out, neutral, args.show)
    print(
        f"after, merged in bf16: {json.dumps(after)}\nchat behavior gone: {chat_is_gone(after)}", flush=True
    )

    # 5) the record
    settings = {k: v for k, v in vars(args).items() if k not in ("model", "text", "out", "device", "show")}
    flags = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in settings.items())
    record = {
        "what": (
            "stand-in for the base side: the instruct model trained on plain text until the chat behavior is"
            " gone"
        ),
        "command": f"train_base_standin.py --model {args.base_name} --text CORPUS {flags}",
        "settings": settings,
        "text": {
            "sha256": digest,
            "documents": dict(sorted(Counter(n.split("/")[0] for n in names).items())),
            "training_tokens": rows.numel(),
            "kept_tokens": 0 if kept_rows is None else kept_rows.numel(),
            "held_out_tokens": held_out.numel(),
        },
        "criterion": (
            f"at most {MOST_STOPS} of {len(CHAT)} templated questions closed within {REPLY_BUDGET} tokens,"
            " greedy and sampled, twice in a row"
        ),
        "chat_behavior_gone": chat_is_gone(after),
        "steps": step,
        "tokens_seen": step * args.batch * args.accumulate * args.seq_len,
        "before": before,
        "after_merged_bf16": after,
        "measurements": measurements,
        "loss": losses,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft")},
    }
    write_text(out / "training.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m", help="pair name or a folder with the instruct checkpoint"
    )
    parser.add_argument(
        "--base-name", default="smollm2-135m", help="what adapter_config.json names as its base model"
    )
    parser.add_argument(
        "--text", nargs="+", required=True, help="files or folders of .txt, .rst, .md; one file, one document"
    )
    parser.add_argument("--out", default="adapters/smollm2-135m-base-standin")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="let the learning rate fall after so long; 0: no limit"
    )
    parser.add_argument(
        "--keep",
        type=float,
        default=1.0,
        help="train on question pages alone, and hold prose to the chat model by this weight of their KL "
        "divergence; 0, or a text without question pages: train on everything",
    )
    flags = {"rank": 8, "alpha": 16, "steps": 1000, "batch": 16, "accumulate": 1, "seq-len": 512, "seed": 0}
    for flag, default in (flags | {"warmup": 20, "decay": 100, "min-steps": 200, "eval-every": 50}).items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=" ")
    parser.add_argument("--show", type=int, default=3, help="replies printed before and after")
    return parser.parse_args(argv)


@ends_in_one_line("interrupted; nothing was saved")
def main(argv: list[str] | None = None) -> int:
    with sound_attention():
        train(parse(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
