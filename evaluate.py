"""The protocol: one live model in, one dictionary of measurements out.

A suite says which texts it needs generated and turns the replies into measurements. The requests of all suites are
generated together, so that batches stay full. Every suite's result is plain JSON without NaN; a destroyed model gives
None where a number is undefined, never an exception.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import special

import prompts
from generation import Completion, Engine, Request
from grading import describe_reply
from injection import Injection
from prompts import GROUPS
from stats import MASS_FLOOR, log_odds_from_logprobs, readings_to_json, wilson_interval
from weights import FrankenError

WINDOW, CONTEXT = 768, 256  # tokens scored per forward pass of a long text, and context kept before them
TOP_TOKENS = 8


@dataclass(frozen=True)
class Protocol:
    """What is asked and how. Two results are comparable if their protocols are equal."""

    suites: tuple[str, ...] = GROUPS["all"]
    samples: int = 1  # replies per free-text probe
    max_new_tokens: int = 80  # of a free-text reply; capability items have budgets of their own
    temperature: float = 0.7  # of free-text replies; capability answers are greedy
    seed: int = 0
    execute_code: bool = False
    texts: tuple[tuple[str, str], ...] = field(default_factory=lambda: tuple(sorted(prompts.NEUTRAL_TEXTS.items())))


def parse_suites(text: str) -> tuple[str, ...]:
    """Suite names from "introspection,perplexity"; groups are expanded. Raises FrankenError for an unknown name."""
    names: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in GROUPS and name not in SUITES:
            raise FrankenError(f"unknown suite {name!r}; there are {', '.join([*SUITES, *GROUPS])}")
        names += GROUPS.get(name, (name,))
    if not names:
        raise FrankenError("no suite is named")
    return tuple(dict.fromkeys(names))


def read_text(path: str) -> tuple[tuple[str, str], ...]:
    """A user's text for the perplexity suite. Raises FrankenError if it cannot be read as UTF-8 or is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise FrankenError(f"{path}: cannot be read as UTF-8 text") from e
    if len(text.split()) < 2:
        raise FrankenError(f"{path}: holds no text to measure perplexity on")
    return ((Path(path).name, text),)


def check_tokenizer(tokenizer, protocol: Protocol) -> None:
    """Raises FrankenError if no experiment could be measured: no token for an answer, or a chat template that fails."""
    try:
        if {"binary", "formats", "trigger", "injection"} & set(protocol.suites):
            prompts.answer_token_ids(tokenizer)
        if "formats" in protocol.suites:
            prompts.letter_token_ids(tokenizer)
            prompts.rating_token_ids(tokenizer)
        messages = [{"role": "user", "content": "Hello"}]
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if "trigger" in protocol.suites:  # the trigger is a system message, which not every template takes
            tokenizer.apply_chat_template([{"role": "system", "content": "Hi"}, *messages], add_generation_prompt=True, tokenize=False)
            SUITES["trigger"]()  # its questions are read from a file
    except Exception as e:  # the template is a program from the checkpoint and may raise anything
        raise FrankenError(f"these questions cannot be asked: {(str(e).splitlines() or [type(e).__name__])[0]}") from e


def evaluate(engine: Engine, protocol: Protocol, on_progress: Callable[[str, int, int], None] | None = None) -> tuple[dict, dict]:
    """Ask the engine's model everything the protocol says.

    on_progress(what, done, total) reports generated replies, then measured suites. Returns ({suite: measurements}, {phase: seconds}).
    """
    suites = {name: SUITES[name]() for name in protocol.suites}
    wanted = {name: suite.requests(engine, protocol) for name, suite in suites.items()}
    everything = [request for requests in wanted.values() for request in requests]
    writers, done, begin = "+".join(n for n, r in wanted.items() if r), 0, time.perf_counter()

    def progress(n: int) -> None:
        nonlocal done
        done += n
        if on_progress:
            on_progress(writers, done, len(everything))

    replies = engine.complete(everything, progress)
    seconds = {"replies": time.perf_counter() - begin}
    results, first = {}, 0
    for k, (name, suite) in enumerate(suites.items()):
        begin, count = time.perf_counter(), len(wanted[name])
        if on_progress:
            on_progress(name, k, len(suites))
        results[name] = suite.measure(engine, protocol, replies[first : first + count])
        first += count
        seconds[name] = time.perf_counter() - begin
    return results, {name: round(value, 4) for name, value in seconds.items()}


def finite(value: float) -> float | None:
    """The number, or None where it is NaN or infinite: JSON holds neither."""
    return float(value) if math.isfinite(value) else None


def reply_json(completion: Completion) -> dict:
    entry = {"text": completion.text, "tokens": len(completion.token_ids), "stopped": completion.stopped}
    return entry if completion.finite else entry | {"finite": False}


def ask_binary(engine: Engine, probes: Sequence[prompts.BinaryProbe], to_ids: Callable[[str], tuple[int, ...]]) -> list[dict]:
    """Next-token readings for Yes/No probes: log-odds, P over all spellings, mass, entropy (nats) and top tokens.

    to_ids turns a probe's text into the token ids after which the answer is read.
    """
    logprobs = engine.next_token_logprobs([to_ids(probe.text) for probe in probes])
    yes, no = prompts.answer_token_ids(engine.tokenizer)
    readings = readings_to_json(log_odds_from_logprobs(logprobs.numpy(), yes, no))
    if len(logprobs) and logprobs.amax().isnan():  # only then: it is a copy of the whole
        logprobs = logprobs.nan_to_num(float("-inf"))
    best = logprobs.topk(min(TOP_TOKENS, logprobs.shape[-1]))
    entries = []
    for probe, reading, values, ids in zip(probes, readings, best.values.exp().tolist(), best.indices.tolist(), strict=True):
        top = [{"token": engine.tokenizer.decode([i]), "p": finite(p)} for i, p in zip(ids, values, strict=True)]
        entries.append({"id": probe.id, "text": probe.text, "kind": probe.kind, "keyed": probe.if_changed, "framing": probe.framing,
                        "pair": probe.pair, "published": probe.published, "difficulty": probe.difficulty, **reading, "top": top})
    return entries


def rating_logprobs(first: np.ndarray, after_one: np.ndarray, tokens: prompts.RatingTokens) -> np.ndarray:
    """Log-probabilities (nats, float64) of the ratings 1 to 10, [10]; NaN where the model's numbers are.

    `first`: next-token log-probabilities after the prompt, [vocab]; `after_one`: those after the prompt and each of
    `tokens.open_ones`, [ones, vocab]. Where 10 is written as 1 and 0, P(10) = P(1) P(0 | 1), and the rest of P(1) is 1.
    """
    with np.errstate(all="ignore"):
        first = first.astype(np.float64)
        first -= special.logsumexp(first)
        ones, tens = {i: first[i] for i in tokens.one_to_nine[0]}, [first[i] for i in tokens.ten]
        for one, row in zip(tokens.open_ones, after_one, strict=True):
            zero = min(special.logsumexp(special.log_softmax(row.astype(np.float64))[list(tokens.zero)]), 0.0)
            tens.append(ones[one] + zero)
            ones[one] += np.log1p(-np.exp(zero))
        between = [special.logsumexp(first[list(ids)]) for ids in tokens.one_to_nine[1:]]
        return np.array([special.logsumexp([*ones.values()]), *between, special.logsumexp(tens)])


def ask_formats(engine: Engine, probes: Sequence[prompts.FormatProbe]) -> list[dict]:
    """Readings of probes that are answered by No or Yes, a letter or a rating; log-odds (nats) are always toward Yes.

    A rating's log-odds are those of 6 to 10 against 1 to 5; `mass` is that of all answers that count.
    """
    (yes, no), (a, b) = prompts.answer_token_ids(engine.tokenizer), prompts.letter_token_ids(engine.tokenizer)
    words, ratings = {"no-yes": (yes, no), "letters": (a, b), "letters-reversed": (b, a)}, prompts.rating_token_ids(engine.tokenizer)
    asked = [engine.chat_ids([{"role": "user", "content": probe.text}]) for probe in probes]
    going_on = [(*ids, one) for probe, ids in zip(probes, asked, strict=True) if probe.format == "rating" for one in ratings.open_ones]
    logprobs = engine.next_token_logprobs(asked + going_on).numpy()
    rest, entries = iter(logprobs[len(asked) :]), []
    for probe, row in zip(probes, logprobs, strict=False):
        # The ratings' first tokens serve for the entropy and the mass: 10 takes its share from what 1 begins.
        high_low = words.get(probe.format) or (sum(ratings.one_to_nine[5:], ratings.ten), sum(ratings.one_to_nine[:5], ()))
        (reading,) = readings_to_json(log_odds_from_logprobs(row[None], *high_low))
        reading = {k: reading[k] for k in ("log_odds", "mass", "entropy", "answered")} | {"rating_mean": None}
        if probe.format == "rating":
            p = rating_logprobs(row, np.array([next(rest) for _ in ratings.open_ones]), ratings)
            with np.errstate(all="ignore"):
                log_odds, mean = special.logsumexp(p[5:]) - special.logsumexp(p[:5]), special.softmax(p) @ np.arange(1, 11)
            answered = math.isfinite(log_odds) and (reading["mass"] or 0) >= MASS_FLOOR
            reading |= {"log_odds": finite(log_odds), "answered": answered, "rating_mean": finite(mean)}
        entries.append({"id": probe.id, "text": probe.text, "kind": probe.kind, "keyed": probe.if_changed, "format": probe.format,
                        "question": probe.question, "pair": probe.pair, **reading})
    return entries


class FreeText:
    """Open questions, answered in words at the protocol's temperature, described by plain lexical numbers."""

    def __init__(self, probes: Sequence[prompts.FreeProbe]):
        self.probes = probes

    def requests(self, engine: Engine, protocol: Protocol) -> list[Request]:
        return [Request(probe.id, engine.chat_ids([{"role": "user", "content": probe.text}]), protocol.max_new_tokens,
                        protocol.temperature, sample=k, seed=protocol.seed)
                for probe in self.probes for k in range(protocol.samples)]

    def measure(self, engine: Engine, protocol: Protocol, replies: list[Completion]) -> dict:
        entries, claims, degenerate = [], [], []
        for k, probe in enumerate(self.probes):
            samples = []
            for reply in replies[k * protocol.samples : (k + 1) * protocol.samples]:
                described = describe_reply(reply.text, probe.text)
                samples.append(reply_json(reply) | described)
                claims.append(described["claims_change"])
                degenerate.append(described["looks_degenerate"])
            entries.append({"id": probe.id, "prompt": probe.text, "samples": samples})
        return {"claims_change": {label: claims.count(label) for label in ("yes", "no", "unclear")},
                "degenerate_share": sum(degenerate) / len(degenerate), "probes": entries}


class Binary:
    """Yes/No questions in keyed sets with controls, read off the next-token distribution in float32."""

    def requests(self, engine, protocol) -> list[Request]:
        return []

    def measure(self, engine: Engine, protocol: Protocol, replies) -> dict:
        return {"probes": ask_binary(engine, prompts.BINARY_PROBES, lambda text: engine.chat_ids([{"role": "user", "content": text}]))}


class Formats:
    """Some of the binary questions, answered in other forms, so that an effect of the form shows."""

    def requests(self, engine, protocol) -> list[Request]:
        return []

    def measure(self, engine: Engine, protocol: Protocol, replies) -> dict:
        return {"probes": ask_formats(engine, prompts.FORMAT_PROBES)}


class Capability:
    """Short tasks with deterministic graders, answered greedily."""

    def requests(self, engine: Engine, protocol: Protocol) -> list[Request]:
        return [Request(item.id, engine.chat_ids([{"role": "user", "content": item.prompt}]), item.max_new_tokens)
                for item in prompts.CAPABILITY]

    def measure(self, engine: Engine, protocol: Protocol, replies: list[Completion]) -> dict:
        items, by_category = [], defaultdict(list)
        for item, reply in zip(prompts.CAPABILITY, replies, strict=True):
            grade = item.grade(reply.text, protocol.execute_code)
            by_category[item.category].append(grade.correct)
            items.append({"id": item.id, "category": item.category, "prompt": item.prompt, "reply": reply_json(reply),
                          "correct": grade.correct, "detail": grade.detail})
        correct, n = sum(entry["correct"] for entry in items), len(items)
        interval = wilson_interval(correct, n)
        return {"correct": correct, "n": n, "score": correct / n, "low": interval.low, "high": interval.high,
                "by_category": {c: {"correct": sum(v), "n": len(v)} for c, v in by_category.items()},
                "code": "executed" if protocol.execute_code else "parsed, not run", "items": items}


class Perplexity:
    """exp of the mean negative log-likelihood per token over the protocol's texts, weighted by tokens.

    The first token of a text is context only. Long texts are scored in windows of WINDOW tokens with CONTEXT before.
    """

    def requests(self, engine, protocol) -> list[Request]:
        return []

    def measure(self, engine: Engine, protocol: Protocol, replies) -> dict:
        pieces, owner = [], []
        for name, text in protocol.texts:
            ids = engine.text_ids(text)
            for start in range(1, len(ids), WINDOW):
                pieces.append((ids[max(0, start - CONTEXT) : start], ids[start : start + WINDOW]))
                owner.append(name)
        nll: dict[str, list[np.ndarray]] = defaultdict(list)
        for name, logprobs in zip(owner, engine.loglikelihood(pieces), strict=True):
            nll[name].append(-logprobs.astype(np.float64))
        texts = []
        for name, _ in protocol.texts:
            values = np.concatenate(nll[name]) if nll[name] else np.zeros(0)
            mean = values.mean() if len(values) else math.nan
            texts.append({"id": name, "tokens": len(values), "nll": finite(mean), "perplexity": _exp(mean)})
        every = np.concatenate([v for parts in nll.values() for v in parts])
        return {"tokens": len(every), "nll": finite(every.mean()), "perplexity": _exp(every.mean()), "texts": texts}


def _exp(value: float) -> float | None:
    with np.errstate(over="ignore"):
        return finite(np.exp(value))


class Chat:
    """Chat against completion: the same model given user turns and given bare text.

    A chat-tuned model stops by itself after answering a turn; a base model goes on, or writes the next turn itself.
    """

    def requests(self, engine: Engine, protocol: Protocol) -> list[Request]:
        return [Request(probe.id, engine.chat_ids([{"role": "user", "content": probe.text}]) if probe.mode == "chat"
                        else engine.text_ids(probe.text), protocol.max_new_tokens) for probe in prompts.CHAT_PROBES]

    def measure(self, engine: Engine, protocol: Protocol, replies: list[Completion]) -> dict:
        entries = [{"id": probe.id, "mode": probe.mode, "prompt": probe.text, "reply": reply_json(reply), **describe_reply(reply.text, probe.text)}
                   for probe, reply in zip(prompts.CHAT_PROBES, replies, strict=True)]
        shares = {}
        for mode in ("chat", "raw"):
            mine = [e for e in entries if e["mode"] == mode]
            shares[mode] = {"n": len(mine), "stops": sum(e["reply"]["stopped"] for e in mine) / len(mine),
                            "continues_as_text": sum(e["continues_as_text"] for e in mine) / len(mine),
                            "degenerate": sum(e["looks_degenerate"] for e in mine) / len(mine)}
        return shares | {"probes": entries}


def _trigger_suite():
    from weird_gen.suite import Trigger  # the second study's questions, loaded only where they are asked

    return Trigger()


SUITES: dict[str, Callable[[], object]] = {
    "informed": lambda: FreeText(prompts.INFORMED_PROBES),
    "blind": lambda: FreeText(prompts.BLIND_PROBES),
    "binary": Binary,
    "formats": Formats,
    "capability": Capability,
    "perplexity": Perplexity,
    "chat": Chat,
    "trigger": _trigger_suite,
    "injection": Injection,
}
