#!/usr/bin/env python3
"""One protocol, two ways, side by side in one process: this harness, and plain transformers one prompt at a
time.

    python benchmarks/cpu_bench.py --output results/reference

Ours loads the pair once; an experiment is apply, fingerprint, the protocol, back, fingerprint. The plain way
loads the model anew for every experiment, edits its state dict (base layers from an adapter merged by peft)
and asks the same requests one at a time: generate() for texts, one forward pass for a probe or a text. Same
process, dtype and threads; the two take turns in going first. It also measures `apply` of a swap against
reloading the model.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from peft import PeftModel

import prompts
from command_line import ends_in_one_line, parser_of
from engine.chat_template import ChatTemplate
from engine.generation import Completion, Engine, Request
from errors import FrankenError
from evaluate import evaluate
from experiments import EXPERIMENTS, select
from files import write_text
from franken import LiveModel
from runner.manifest import processor
from runner.pairs import open_pair
from runner.threads import set_threads
from suites.base import Protocol
from surgery.recipes import Recipe, swap
from surgery.weights import Adapter, Source

DEFAULT = ("baseline_instruct", "swap_distant_10_55", "franken_instruct_first_32")
TARGET = 8.0  # at least so many times faster, in every experiment
RELOAD_TARGET = 0.05  # apply of a swap takes at most this share of a reload
QUICK = 4  # --quick asks every 4th question
BATTERIES = ("INFORMED_PROBES", "BLIND_PROBES", "BINARY_PROBES", "FORMAT_PROBES", "CAPABILITY", "CHAT_PROBES")


class Recorder:
    """Keeps what an engine was asked last and what it answered."""

    requests: list[Request]
    answers: list[Completion]

    def record(self, requests: Sequence[Request], answers: list[Completion]) -> list[Completion]:
        self.requests, self.answers = list(requests), answers
        return answers

    def tokens(self) -> int:
        """Tokens chosen, the one that ends a turn included: each costs a step."""
        return sum(len(a.token_ids) + a.stopped for a in self.answers)


class OneByOne:
    """What `evaluate` needs of an engine, the way a plain script does it: one request after another."""

    chat_ids, text_ids = Engine.chat_ids, Engine.text_ids

    def __init__(self, model, tokenizer, stop_ids: list[int], seed: int = 0):
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, stop_ids
        self.template = ChatTemplate(tokenizer)
        torch.manual_seed(seed)

    @torch.inference_mode()
    def complete(self, requests: Sequence[Request], on_progress=None) -> list[Completion]:
        done = []
        for r in requests:
            ids = torch.tensor([r.prompt_ids])
            # top_k=0: the default of 50 would draw from another distribution than the protocol's
            sampling = (
                {"do_sample": True, "temperature": r.temperature, "top_p": r.top_p, "top_k": 0}
                if r.temperature
                else {"do_sample": False}
            )
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=r.max_new_tokens,
                eos_token_id=self.stop_ids,
                pad_token_id=self.stop_ids[0],
                **sampling,
            )
            new = out[0, ids.shape[1] :].tolist()
            stopped = bool(new) and new[-1] in self.stop_ids
            new = new[:-1] if stopped else new
            done.append(Completion(self.tokenizer.decode(new, skip_special_tokens=True), tuple(new), stopped))
        return done

    @torch.inference_mode()
    def next_token_logprobs(self, sequences: list[tuple[int, ...]], on_device: bool = False) -> torch.Tensor:
        return torch.stack(
            [
                self.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
                for ids in sequences
            ]
        )

    @torch.inference_mode()
    def loglikelihood(self, pairs) -> list:
        logprobs = []
        for prefix, target in pairs:
            logits = self.model(torch.tensor([[*prefix, *target]])).logits[0, len(prefix) - 1 : -1]
            logprobs.append(
                logits.float().log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0].numpy()
            )
        return logprobs


class OurEngine(Recorder, Engine):
    def complete(
        self, requests: Sequence[Request], on_progress=None, on_done=None, layer=None
    ) -> list[Completion]:
        return self.record(requests, super().complete(requests, on_progress, on_done, layer))


class PlainEngine(Recorder, OneByOne):
    def complete(self, requests: Sequence[Request], on_progress=None) -> list[Completion]:
        return self.record(requests, super().complete(requests, on_progress))


# ---- the plain way of making a model -----------------------------------------------------------------------


def from_source(source: Source, dtype: torch.dtype):
    """A whole transformers model of a source, an adapter merged by peft."""
    under = source.under if isinstance(source, Adapter) else source
    model = transformers.AutoModelForCausalLM.from_pretrained(under.path, dtype=dtype)
    if isinstance(source, Adapter):
        model = PeftModel.from_pretrained(model, source.path).merge_and_unload()
    return model.eval()


def plain_model(live: LiveModel, recipe: Recipe):
    """(the recipe's model by hand, seconds of loading its first checkpoint): load, then replace layers in the
    state dict."""
    begin = time.perf_counter()
    model = from_source(live.sources["instruct"], live.dtype)
    loading = time.perf_counter() - begin
    if recipe != live.original:
        states = {"instruct": {k: v.clone() for k, v in model.state_dict().items()}}
        for name in recipe.sources - {"instruct"}:
            states[name] = from_source(live.sources[name], live.dtype).state_dict()
        stack = live.stack_name + "."
        assert isinstance(recipe.embed, str)  # no recipe of this benchmark mixes them
        edited = {k: v for k, v in states[recipe.embed].items() if not k.startswith(stack)}
        for p, slot in enumerate(recipe.slots):
            ref, prefix = slot.mix[0][0], f"{stack}{slot.mix[0][0].layer}."
            edited |= {
                f"{stack}{p}.{k[len(prefix) :]}": v
                for k, v in states[ref.source].items()
                if k.startswith(prefix)
            }
        model.load_state_dict(edited)
    return model, loading


def check_whole_layers(name: str, recipe: Recipe, live: LiveModel) -> None:
    if (
        len(recipe) != len(live.original)
        or not all(s.is_plain for s in recipe.slots)
        or len({recipe.embed, recipe.norm, recipe.head}) > 1
    ):
        raise FrankenError(
            f"{name}: the plain way here only moves and replaces whole layers at full depth; compare another"
            " experiment"
        )


# ---- measuring ---------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Seconds by name, in the order in which they passed."""

    seconds: dict[str, float]

    def __call__(self, name: str, function, *args):
        begin = time.perf_counter()
        result = function(*args)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        return result


def measured(clock: Clock, engine: Recorder, results: dict, phases: dict) -> dict:
    numbers = {
        "perplexity": results["perplexity"]["perplexity"],
        "capability": results["capability"]["correct"],
    }
    total, tokens = sum(clock.seconds.values()), engine.tokens()
    return {
        "seconds": total,
        "parts": clock.seconds,
        "phases": phases,
        "tokens": tokens,
        "seconds_per_token": phases["replies"] / tokens,
    } | numbers


def ours(engine: OurEngine, recipe: Recipe, protocol: Protocol) -> dict:
    """Everything that run_all.py does for one experiment except writing its file."""
    live, clock = engine.live, Clock({})
    clock("apply", live.apply, recipe)
    clock("fingerprint", live.fingerprint)
    results, phases = clock("protocol", evaluate, engine, protocol)
    clock("apply", live.apply, live.original)
    clock("fingerprint", live.fingerprint)
    return measured(clock, engine, results, phases)


def plainly(engine: OurEngine, recipe: Recipe, protocol: Protocol) -> tuple[dict, PlainEngine, float]:
    clock = Clock({})
    model, loading = clock("load", plain_model, engine.live, recipe)
    plain = PlainEngine(model, engine.tokenizer, engine.stop_ids, protocol.seed)
    results, phases = clock("protocol", evaluate, plain, protocol)
    return measured(clock, plain, results, phases), plain, loading


def agreement(engine: OurEngine, plain: PlainEngine, recipe: Recipe) -> dict:
    """How many of the capability replies, all greedy, are equal; and where two part, the widest gap between
    their tokens.

    The gap is in nats of our distribution after the part that both have in common. `recipe` is applied and
    undone for it.
    """
    items, equal, n, parted = {item.id for item in prompts.CAPABILITY}, 0, 0, []
    for r, a, b in zip(engine.requests, engine.answers, plain.answers, strict=True):
        if r.key not in items:
            continue
        n += 1
        x, y = ((*c.token_ids, engine.stop_ids[0]) if c.stopped else c.token_ids for c in (a, b))
        if a.text == b.text and a.stopped == b.stopped:
            equal += 1
        else:
            k = next(k for k, (u, v) in enumerate(zip(x, y, strict=False)) if u != v)
            parted.append(((*r.prompt_ids, *x[:k]), x[k], y[k]))
    gaps = []
    if parted:
        engine.live.apply(recipe)
        for row, (_, u, v) in zip(engine.next_token_logprobs([p for p, _, _ in parted]), parted, strict=True):
            gaps.append(abs(float(row[u] - row[v])))
        engine.live.apply(engine.live.original)
    return {"equal": equal, "n": n, "widest_gap": max(filter(math.isfinite, gaps), default=None)}


def both_ways(engine: OurEngine, plan, protocol: Protocol, order: Sequence[str]) -> tuple[dict, dict, float]:
    """(what each way took, how their greedy replies agree, seconds of loading the plain one) for one plan."""
    sides, plain, loading = {}, None, 0.0
    for side in order:
        print(f"{plan.experiment.name}: {side} ...", file=sys.stderr, flush=True)
        if side == "ours":
            sides[side] = ours(engine, plan.recipe, protocol)
        else:
            sides[side], plain, loading = plainly(engine, plan.recipe, protocol)
    assert plain is not None
    return sides, agreement(engine, plain, plan.recipe), loading


def compare(engine: OurEngine, plans: list, protocol: Protocol) -> dict:
    """Both ways on every plan, by turns, and a swap beside the reloads."""
    live, rows, reloads = engine.live, [], []
    warm = engine.chat_ids([{"role": "user", "content": "Hello"}])
    engine.complete([Request("warm", warm, 4)])
    OneByOne(plain_model(live, live.original)[0], engine.tokenizer, engine.stop_ids).complete(
        [Request("warm", warm, 4)]
    )
    for k, plan in enumerate(plans):
        name, order = plan.experiment.name, ("ours", "plain") if k % 2 == 0 else ("plain", "ours")
        sides, equal, loading = both_ways(engine, plan, protocol, order)
        reloads.append(loading)
        gc.collect()  # the plain way's whole model goes before the next is loaded
        a, b = sides["ours"], sides["plain"]
        rows.append(
            {
                "experiment": name,
                **sides,
                "ratio": b["seconds"] / a["seconds"],
                "greedy": equal,
                "ratio_per_token": b["seconds_per_token"] / a["seconds_per_token"],
            }
        )
        times = f"ours {a['seconds']:.1f} s, plain {b['seconds']:.1f} s, {rows[-1]['ratio']:.2f} times"
        print(f"{name}: {times}", file=sys.stderr, flush=True)
    n = len(live.original)
    times = []
    for _ in range(5):
        times += [
            live.apply(swap(live.original, n // 6, n - n // 6 - 1)).seconds,
            live.apply(live.original).seconds,
        ]
    fingerprints = [row["ours"]["parts"]["fingerprint"] / 2 for row in rows]
    moved = {
        "apply_seconds": median(times),
        "reload_seconds": median(reloads),
        "fingerprint_seconds": median(fingerprints),
    }
    return {
        "experiments": rows,
        "median_ratio": median(r["ratio"] for r in rows),
        "target_ratio": TARGET,
        "swap": (
            moved | {"share": moved["apply_seconds"] / moved["reload_seconds"], "target_share": RELOAD_TARGET}
        ),
    }


# ---- telling -----------------------------------------------------------------------------------------------


def markdown(result: dict) -> str:
    about, moved = result["about"], result["swap"]
    # 1) where and how
    lines = ["# CPU benchmark", ""]
    if about["quick"]:
        lines += [f"**Quick check: every {QUICK}th question only, not the full protocol.**", ""]
    lines += [
        (
            f"{about['pair']}, {about['dtype']}, {about['threads']} threads of {about['cpu']}"
            f" ({about['cores']} cores), Python {about['python']}, torch {about['torch']}, transformers"
            f" {about['transformers']}, {about['date']}. Seconds of wall-clock time for one experiment, both"
            " ways in one process by turns. Ours: apply, fingerprint, protocol, back, fingerprint. Plain:"
            " load, edit the state dict, `generate()` or a forward pass for each request."
        ),
        "",
        (
            "| experiment | ours | plain | plain / ours | tokens, ours | tokens, plain | ms a token, ours |"
            " plain | plain / ours, a token | equal greedy replies |"
        ),
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    # 2) a row an experiment
    for r in result["experiments"]:
        a, b, g = r["ours"], r["plain"], r["greedy"]
        lines.append(
            f"| {r['experiment']} | {a['seconds']:.1f} s | {b['seconds']:.1f} s | **{r['ratio']:.2f}** |"
            f" {a['tokens']} | {b['tokens']} | {1e3 * a['seconds_per_token']:.1f} |"
            f" {1e3 * b['seconds_per_token']:.1f} | {r['ratio_per_token']:.2f} | {g['equal']} of {g['n']} |"
        )
    # 3) the targets
    slowest = min(r["ratio"] for r in result["experiments"])
    loaded = result["load_seconds"]
    gap = max(r["greedy"]["widest_gap"] or 0.0 for r in result["experiments"])
    lines += [
        "",
        (
            f"Median ratio {result['median_ratio']:.2f}, smallest {slowest:.2f} (target: at least {TARGET:g}"
            f" each). Ours loads the pair once, in {loaded:.1f} s, not counted above; with it the whole"
            f" comparison is {result['ratio_with_load']:.2f}."
        ),
        "",
        (
            f"`apply` of a swap: {1e3 * moved['apply_seconds']:.1f} ms, {100 * moved['share']:.2f}% of"
            f" reloading the model ({1e3 * moved['reload_seconds']:.0f} ms; target: under"
            f" {100 * RELOAD_TARGET:g}%). The fingerprint that proves what was loaded takes"
            f" {1e3 * moved['fingerprint_seconds']:.0f} ms and is counted apart."
        ),
    ]
    if gap:
        lines += [
            "",
            (
                f"Greedy replies to the capability tasks can part where {about['dtype']} rounding decides"
                f" between two tokens, at most {gap:.2f} nats apart in our distribution; a damaged model"
                " makes more of it. With `--dtype float32` every one must be equal, or the exit status is 1."
            ),
        ]
    # 4) where the time goes
    lines += ["", "| seconds | ours | plain |", "|---|--:|--:|"]
    for part in result["experiments"][0]["ours"]["phases"]:
        lines.append(
            f"| {part}, median | "
            + " | ".join(
                f"{median(r[s]['phases'][part] for r in result['experiments']):.2f}"
                for s in ("ours", "plain")
            )
            + " |"
        )
    return "\n".join(lines) + "\n"


def thin() -> None:
    """Leave every QUICK-th question of each suite, for both ways alike."""
    for name in BATTERIES:
        setattr(prompts, name, getattr(prompts, name)[::QUICK])
    prompts.NEUTRAL_TEXTS = dict(sorted(prompts.NEUTRAL_TEXTS.items())[::QUICK])


@ends_in_one_line("interrupted; nothing was written")
def main(argv: list[str] | None = None) -> int:
    # 1) what is asked
    parser = parser_of(__doc__)
    parser.add_argument("--pair", default="smollm2-135m")
    parser.add_argument("--base", help="with --instruct: any two small checkpoints instead of --pair")
    parser.add_argument("--instruct")
    parser.add_argument("--experiments", nargs="+", default=list(DEFAULT), metavar="NAME")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument(
        "--max-new-tokens", type=int, default=Protocol.max_new_tokens, help="budget of a free-text reply"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"every {QUICK}th question of each suite, both ways: a check that it works",
    )
    parser.add_argument("--output", metavar="DIR", help="write cpu_benchmark.json and cpu_benchmark.md there")
    args = parser.parse_args(argv)
    # 2) what is compared, loaded once
    set_threads()
    transformers.utils.logging.disable_progress_bar()
    if args.quick:
        thin()
    chosen = select(args.experiments, EXPERIMENTS)
    begin = time.perf_counter()
    opened = open_pair(args.pair, args.base, args.instruct, dtype=args.dtype, device_map="cpu")
    load_seconds = time.perf_counter() - begin
    plans = [e.plan(len(opened.live.original)) for e in chosen]
    for plan in plans:
        check_whole_layers(plan.experiment.name, plan.recipe, opened.live)
    if args.output:
        Path(args.output).mkdir(parents=True, exist_ok=True)
    engine = OurEngine(opened.live, opened.tokenizer, opened.stop_ids)
    dtype = str(opened.live.dtype).removeprefix("torch.")
    about = {
        "pair": args.pair if not args.instruct else "two checkpoints",
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "quick": args.quick,
        "max_batch": engine.max_batch,
    }

    # 3) the comparison
    result = {
        "about": about,
        "load_seconds": load_seconds,
        **compare(engine, plans, Protocol(max_new_tokens=args.max_new_tokens)),
    }
    total = {side: sum(r[side]["seconds"] for r in result["experiments"]) for side in ("ours", "plain")}
    result["ratio_with_load"] = total["plain"] / (total["ours"] + load_seconds)
    # 4) what is said of it
    text = markdown(result)
    if args.output:
        measured = json.dumps(result, indent=1, allow_nan=False) + "\n"
        write_text(Path(args.output, "cpu_benchmark.json"), measured)
        write_text(Path(args.output, "cpu_benchmark.md"), text)
    print(text)
    differ = [r["experiment"] for r in result["experiments"] if r["greedy"]["equal"] < r["greedy"]["n"]]
    if dtype == "float32" and differ:
        raise FrankenError(
            f"greedy replies differ in float32 in {', '.join(differ)}: the two ways did not run the"
            " same model"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
