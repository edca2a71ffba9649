"""An LLM judge over any OpenAI-compatible endpoint, with a cache by content, and the judge made of rules.

One request asks one rubric of one reply. The client's own retries are off: waiting here is shared between
threads, bounded, and honors Retry-After.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from errors import FrankenError
from weird_gen.persona.rubrics import RUBRIC_VERSION, judge_messages, parse_answer
from weird_gen.persona.rules import judge_by_rules, position_by_rules

OPENROUTER = "https://openrouter.ai/api/v1"
DEFAULT_MODEL = "openai/gpt-4o-mini"
# Below this a page-long wait is honored; above it the judgment is an error, and a rerun takes it up again.
LONGEST_WAIT_S = 120.0


class JudgeStopped(FrankenError):
    """The endpoint cannot go on (key refused, no such model, out of credit, unreachable); one line says
    why."""


@dataclass(frozen=True)
class Task:
    """One judgment to be made: a rubric of rubrics.RUBRIC_NAMES, the raw reply, and levels for "position"."""

    rubric: str
    question: str
    reply: str
    levels: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True)
class Judgment:
    """value: True or False, for a position 1 to 5 or None (NA). error: why there is none, else None."""

    value: bool | int | None
    error: str | None = None


class JudgeCache:
    """Judgments by content in an append-only JSON-lines file; a line torn by a kill is skipped when read.

    ``path`` None keeps them in memory alone. Safe for threads; several processes may append to one file.
    """

    def __init__(self, path: Path | str | None):
        self.path = Path(path) if path else None
        self._lock = threading.Lock()
        self._entries: dict[str, dict] = {}
        if self.path and self.path.exists():
            for line in self.path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                    self._entries[entry["key"]] = {"answer": str(entry["answer"])}
                except (ValueError, TypeError, KeyError):
                    continue

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> dict | None:
        return self._entries.get(key)

    def put(self, key: str, entry: dict) -> None:
        """Remember an entry and append it; on disk before this returns to the caller."""
        with self._lock:
            self._entries[key] = entry
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"key": key, **entry}, allow_nan=False).encode() + b"\n"
            with open(self.path, "ab+", buffering=0) as file:
                # A line torn by an earlier kill must not swallow this one.
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        line = b"\n" + line
                file.write(line)


@dataclass
class Usage:
    """What a run of the judge cost: requests sent, judgments taken from the cache, tokens, US dollars."""

    requests: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    cost_known: bool = True
    errors: Counter = field(default_factory=Counter)

    def line(self) -> str:
        cost = f"${self.cost:.4f}" if self.cost_known else "unknown (give --price-in and --price-out)"
        return (
            f"judge: {self.requests} requests, {self.cache_hits} from the cache, {self.prompt_tokens} tokens"
            f" in, {self.completion_tokens} out, cost {cost}, {sum(self.errors.values())} errors"
        )


class RulesJudge:
    """The judge without an endpoint (rules.py); deterministic, free, and named "rules" wherever its numbers
    stand."""

    name = "rules"

    def __init__(self):
        self.usage = Usage()

    def judge(self, tasks: list[Task], on_progress=None) -> list[Judgment]:
        """One Judgment per task, in order."""
        judged = [
            Judgment(
                position_by_rules(task.reply, dict(task.levels or ()))
                if task.rubric == "position"
                else judge_by_rules(task.reply)[task.rubric]
            )
            for task in tasks
        ]
        if on_progress:
            on_progress(len(tasks), len(tasks))
        return judged


class _Failure(Exception):
    """A request without an answer. ``retry``: another attempt may help; ``retry_after``: seconds the server
    asked for."""

    def __init__(self, reason: str, retry: bool = True, retry_after: float | None = None):
        super().__init__(reason)
        self.retry, self.retry_after = retry, retry_after


def retry_after_seconds(headers) -> float | None:
    """Seconds in a Retry-After header (a number or an HTTP date), or None."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


class LLMJudge:
    """A judge behind an OpenAI-compatible endpoint; ``judge`` raises JudgeStopped when going on is pointless.

    Prices are US dollars per million tokens; a cost that the endpoint itself reports (OpenRouter) wins over
    them. The key is sent in the Authorization header alone, and over plain http to this machine alone.
    """

    # A dead endpoint is given up after this many judgments in a row that used up their attempts.
    FAILURES_TO_STOP = 5

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        base_url: str = OPENROUTER,
        api_key: str | None = None,
        cache: JudgeCache | None = None,
        concurrency: int = 8,
        attempts: int = 6,
        timeout_s: float = 60.0,
        backoff_s: float = 1.0,
        max_tokens: int = 16,
        price_in: float | None = None,
        price_out: float | None = None,
        retry_unparsed: bool = False,
    ):
        where = urlsplit(base_url)
        if where.scheme not in ("http", "https") or not where.hostname:
            raise JudgeStopped(f"--base-url {base_url!r} is not an http or https address")
        if where.username or where.password:
            raise JudgeStopped("--base-url carries a password; name the variable that holds the key instead")
        if api_key and where.scheme == "http" and where.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise JudgeStopped(
                f"the key would go to {where.hostname} in clear text; use https, or --api-key-env ''"
            )
        self.name = model
        self.host = where.netloc
        self.usage = Usage()
        self._openrouter = (where.hostname or "").endswith("openrouter.ai")
        import openai  # only where a judge is asked: the rule-based one needs no client

        self._openai = openai
        self._client = openai.OpenAI(
            base_url=base_url, api_key=api_key or "none", max_retries=0, timeout=timeout_s
        )
        self._cache = cache if cache is not None else JudgeCache(None)
        self._concurrency, self._attempts, self._backoff_s = concurrency, attempts, backoff_s
        self._max_tokens, self._prices, self._retry_unparsed = (
            max_tokens,
            (price_in, price_out),
            retry_unparsed,
        )
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._not_before = 0.0
        self._failed_in_a_row = 0

    def cache_key(self, task: Task) -> str:
        """sha256 over model, rubric version and the messages with a fixed nonce (the sent nonce is
        random)."""
        messages = judge_messages(
            task.rubric, task.question, task.reply, dict(task.levels or ()), nonce="NONCE"
        )
        content = json.dumps([self.name, RUBRIC_VERSION, messages])
        return hashlib.sha256(content.encode()).hexdigest()

    def judge(self, tasks: list[Task], on_progress=None) -> list[Judgment]:
        """One Judgment per task, in order; equal tasks are asked once. on_progress(done, total) per
        judgment."""
        keys = [self.cache_key(task) for task in tasks]
        first = dict(zip(reversed(keys), reversed(tasks), strict=True))
        judged = {}
        for key, task in first.items():
            entry = self._cache.get(key)
            judgment = self._read(task.rubric, entry["answer"]) if entry else None
            if judgment and not (judgment.error and self._retry_unparsed):
                judged[key] = judgment
        unasked = [key for key in dict.fromkeys(keys) if key not in judged]
        self.usage.cache_hits += len(keys) - len(unasked)
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            futures = {pool.submit(self._judge_one, key, first[key]): key for key in unasked}
            for future in as_completed(futures):
                judged[futures[future]] = future.result()
                if on_progress:
                    on_progress(len(judged), len(first))
        finally:
            # On a stop or Ctrl-C the answers already paid for are in the cache; the rest is not asked.
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            self._stop.clear()
        judgments = [judged[key] for key in keys]
        self.usage.errors.update(judgment.error for judgment in judgments if judgment.error)
        return judgments

    @staticmethod
    def _read(rubric: str, answer: str) -> Judgment:
        try:
            return Judgment(parse_answer(rubric, answer))
        except ValueError:
            return Judgment(None, "unparseable answer")

    def _judge_one(self, key: str, task: Task) -> Judgment:
        # An answer that is not the one word asked for gets one more chance; then it is an error, never a
        # guess.
        answer, usage, judgment = "", {}, Judgment(None, "not asked")
        for _ in range(2):
            try:
                answer, usage = self._ask(task)
            except _Failure as failure:
                return Judgment(None, str(failure))
            except JudgeStopped:
                self._stop.set()  # at once: until the main thread hears of it, the others would go on asking
                raise
            judgment = self._read(task.rubric, answer)
            if judgment.error is None:
                break
        about = {"model": self.name, "rubric": task.rubric, "version": RUBRIC_VERSION}
        self._cache.put(key, {"answer": answer[:200], **about, **usage})
        return judgment

    def _ask(self, task: Task) -> tuple[str, dict]:
        """The answer's text and usage after as many attempts as allowed; raises _Failure or JudgeStopped."""
        attempt = 1
        while True:
            self._wait_turn()
            try:
                answer = self._send(task)
            except _Failure as failure:
                asked = failure.retry_after or 0.0
                if not failure.retry:
                    raise
                if attempt >= self._attempts or asked > LONGEST_WAIT_S:
                    self._give_up(failure)
                with self._lock:
                    # What one thread is told to wait, all wait.
                    self._not_before = max(self._not_before, time.monotonic() + asked)
                # Full jitter over a doubling span, on top of what the server asked for.
                self._stop.wait(asked + random.uniform(0, min(30.0, self._backoff_s * 2 ** (attempt - 1))))
                attempt += 1
            else:
                with self._lock:
                    self._failed_in_a_row = 0
                return answer

    def _give_up(self, failure: _Failure) -> NoReturn:
        with self._lock:
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= self.FAILURES_TO_STOP:
                raise JudgeStopped(
                    f"{self.host} keeps failing ({failure}); the answers so far are kept, run again later"
                ) from None
        raise failure

    def _wait_turn(self) -> None:
        while not self._stop.is_set():
            delay = self._not_before - time.monotonic()
            if delay <= 0:
                return
            self._stop.wait(delay)
        raise _Failure("stopped", retry=False)

    def _send(self, task: Task) -> tuple[str, dict]:
        """One request. What a failing server says is not passed on: it is as untrusted as a reply."""
        messages: Any = judge_messages(task.rubric, task.question, task.reply, dict(task.levels or ()))
        with self._lock:
            self.usage.requests += 1
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self.name,
                messages=messages,
                temperature=0.0,
                max_tokens=self._max_tokens,
                extra_body={"usage": {"include": True}} if self._openrouter else None,
            )
            body = response.http_response.json()
            content = body["choices"][0]["message"]["content"]
        except self._openai.APIStatusError as error:
            status = error.status_code
            if status == 401:
                raise JudgeStopped(
                    f"{self.host} refused the key (401); check the variable that holds it"
                ) from None
            if status in (402, 403, 404):
                raise JudgeStopped(
                    f"{self.host} answered {status} for model {self.name} "
                    "(no credit, not allowed, or no such model)"
                ) from None
            retry = status in (408, 409, 425, 429) or status >= 500
            raise _Failure(f"HTTP {status}", retry, retry_after_seconds(error.response.headers)) from None
        except self._openai.APITimeoutError:
            raise _Failure("timeout") from None
        except self._openai.APIConnectionError:
            raise _Failure("no connection") from None
        except (self._openai.OpenAIError, ValueError, KeyError, TypeError, IndexError):
            raise _Failure("malformed response") from None
        return content if isinstance(content, str) else "", self._count(body.get("usage"))

    def _count(self, reported) -> dict:
        """Tokens and cost of one answer, added to the run's usage; what the endpoint does not report counts
        0."""
        reported = reported if isinstance(reported, dict) else {}

        def number(key: str) -> float | None:
            value = reported.get(key)
            good = (
                isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
            )
            return value if good else None

        tokens_in, tokens_out = int(number("prompt_tokens") or 0), int(number("completion_tokens") or 0)
        cost, (price_in, price_out) = number("cost"), self._prices
        if cost is None and price_in is not None and price_out is not None:
            cost = (tokens_in * price_in + tokens_out * price_out) / 1e6
        with self._lock:
            self.usage.prompt_tokens += tokens_in
            self.usage.completion_tokens += tokens_out
            self.usage.cost += cost or 0.0
            self.usage.cost_known &= cost is not None
        return {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "cost": cost}
