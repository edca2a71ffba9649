"""An LLM judge over any OpenAI-compatible endpoint, with a cache by content, and the judge made of rules.

One request asks one rubric of one reply. The client's own retries are off: waiting here is shared between
all requests, bounded, and honors Retry-After. A request has one deadline, from its first byte to its last,
and its answer a size. Ctrl-C ends whatever is under way at once.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import itertools
import json
import math
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from errors import FrankenError
from files import read_bytes
from questions.thoughts import without_thought
from runner.addresses import TooMuch, async_client, checked_address
from weird_gen.persona.rubrics import RUBRIC_NAMES, RUBRIC_VERSION, judge_messages, parse_answer
from weird_gen.persona.rules import judge_by_rules, position_by_rules

OPENROUTER = "https://openrouter.ai/api/v1"
DEFAULT_MODEL = "openai/gpt-4o-mini"
# Below this a page-long wait is honored; above it the judgment is an error, and a rerun takes it up again.
LONGEST_WAIT_S = 120.0
LONGEST_ANSWER = 1 << 20  # bytes of one response, headers apart
CHARACTERS_PER_TOKEN = 4  # of English, for what a run will cost; the bill counts tokens
TEXT_PARTS = ("text", "output_text")
END_TOKENS = re.compile(r"(?:<\|[a-z_]+\|>|</s>|<end_of_turn>|<eos>|\s)+\Z")


class JudgeStopped(FrankenError):
    """The endpoint cannot go on (key refused, no such model, out of credit, unreachable, budget spent); one
    line says why."""


@dataclass(frozen=True)
class Task:
    """One judgment to be made: a rubric of rubrics.RUBRIC_NAMES, the raw reply, and levels for "position"."""

    rubric: str
    question: str
    reply: str
    levels: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True)
class Judgment:
    """value: True or False, for a position 1 to 5 or None (NA), for a verdict its word; None too for a rubric
    that the judge does not answer. error: why there is none, else None."""

    value: bool | int | str | None
    error: str | None = None


class JudgeCache:
    """Judgments by content in an append-only JSON-lines file; a line torn by a kill is skipped when read.

    An entry has the `answer`; `error`, if the endpoint gave a reason for there being none; and `cut_at`, the
    tokens after which an answer was cut off. ``path`` None keeps them in memory alone. Safe for threads;
    several processes may append to one file.
    """

    def __init__(self, path: Path | str | None):
        self.path = Path(path) if path else None
        self._lock = threading.Lock()
        self._entries: dict[str, dict] = {}
        if self.path and self.path.exists():
            for line in read_bytes(self.path).split(b"\n"):
                try:
                    entry = json.loads(line)
                    kept = {"answer": str(entry["answer"])}
                    kept |= {k: entry[k] for k in ("error", "cut_at") if entry.get(k) is not None}
                    self._entries[entry["key"]] = kept
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
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
    stand.

    Voice, persona and verdict it leaves open: they need a reader.
    """

    name = "rules"
    rubrics = ("identity", "degenerate", "position")  # that it answers

    def __init__(self):
        self.usage = Usage()

    def judge(self, tasks: list[Task], on_progress=None) -> list[Judgment]:
        """One Judgment per task, in order."""
        judged = [
            Judgment(
                position_by_rules(task.reply, dict(task.levels or ()))
                if task.rubric == "position"
                else judge_by_rules(task.reply).get(task.rubric)
            )
            for task in tasks
        ]
        if on_progress:
            on_progress(len(tasks), len(tasks))
        return judged


class _Failure(Exception):
    """A request without an answer.

    retry: another attempt may help. retry_after: seconds the server asked for. words: what the server said of
    it, untrusted. kept: the judgment stays an error without being paid for again.
    """

    def __init__(
        self,
        reason: str,
        retry: bool = True,
        retry_after: float | None = None,
        words: str = "",
        kept: dict | None = None,
    ):
        super().__init__(reason)
        self.retry, self.retry_after, self.words, self.kept = retry, retry_after, words, kept


class _SayOtherwise(Exception):
    """The endpoint refused a parameter that another name, or none, will do for."""


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
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def answer_text(message: dict) -> str:
    """The answer in a chat completion's message: its text, or the texts among its parts, without a thought
    before it and without end-of-turn tokens that were left in."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") in TEXT_PARTS]
        content = "".join(text for text in texts if isinstance(text, str))
    return END_TOKENS.sub("", without_thought(content)) if isinstance(content, str) else ""


class LLMJudge:
    """A judge behind an OpenAI-compatible endpoint; ``judge`` raises JudgeStopped when going on is pointless.

    Prices are US dollars per million tokens; a cost that the endpoint itself reports (OpenRouter) wins over
    them. The key is sent in the Authorization header alone, and over plain http to this machine alone, to
    which no proxy is used. timeout_s: a whole request's deadline. budget: US dollars; no request is sent that
    could exceed it, going by the dearest one so far.
    """

    # An endpoint is given up after this many judgments in a row that failed for one reason.
    FAILURES_TO_STOP = 5
    # ... and after this many that were answered, but not with the word that was asked for.
    UNREADABLE_TO_STOP = 20

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
        budget: float | None = None,
    ):
        try:
            self._where = where = checked_address(base_url, api_key, "--base-url")
        except FrankenError as e:
            raise JudgeStopped(str(e)) from None
        self.name, self.rubrics = model, RUBRIC_NAMES
        self.host = where.netloc
        self.usage = Usage()
        self._openrouter = where.host.endswith("openrouter.ai")
        import openai  # only where a judge is asked: the rule-based one needs no client

        self._openai, self._base_url, self._key = openai, base_url, api_key
        self._cache = cache if cache is not None else JudgeCache(None)
        self._concurrency, self._attempts, self._backoff_s = concurrency, attempts, backoff_s
        self._timeout_s, self._max_tokens, self._retry_unparsed = timeout_s, max_tokens, retry_unparsed
        self._prices = None if price_in is None or price_out is None else (price_in, price_out)
        self._budget, self._dearest, self._under_way = budget, 0.0, 0
        self._limit_name, self._temperature = "max_tokens", {"temperature": 0.0}
        self._not_before, self._over = 0.0, asyncio.Event()
        self._failed_in_a_row: tuple[str, int] = ("", 0)
        self._unreadable_in_a_row = 0

    # ---- what is asked -------------------------------------------------------------------------------------

    def cache_key(self, task: Task) -> str:
        """sha256 over model, rubric version and the messages with a fixed nonce (the sent nonce is
        random)."""
        messages = judge_messages(
            task.rubric, task.question, task.reply, dict(task.levels or ()), nonce="NONCE"
        )
        content = json.dumps([self.name, RUBRIC_VERSION, messages])
        return hashlib.sha256(content.encode()).hexdigest()

    def _known(self, key: str, task: Task) -> Judgment | None:
        """The cache's judgment, unless it is to be asked for again: with more tokens than an answer was cut
        off at, or with --retry-errors."""
        entry = self._cache.get(key)
        if entry is None or (not entry["answer"] and not entry.get("error")):
            return None
        judgment = Judgment(None, entry.get("error")) if entry.get("error") else None
        judgment = judgment or self._read(task.rubric, entry["answer"])
        cut = entry.get("cut_at")
        again = judgment.error and (self._retry_unparsed or (isinstance(cut, int) and cut < self._max_tokens))
        return None if again else judgment

    def estimate(self, tasks: list[Task]) -> str:
        """What judging these will take, as a line: requests that the cache does not answer, tokens, cost."""
        unasked = {key: t for t in tasks if self._known(key := self.cache_key(t), t) is None}
        texts = [
            judge_messages(t.rubric, t.question, t.reply, dict(t.levels or ())) for t in unasked.values()
        ]
        characters = sum(len(m["content"]) for messages in texts for m in messages)
        tokens_in, tokens_out = characters // CHARACTERS_PER_TOKEN, len(texts) * self._max_tokens
        cost = "cost unknown (give --price-in and --price-out, or bound it with --budget)"
        if self._prices:
            most = (tokens_in * self._prices[0] + tokens_out * self._prices[1]) / 1e6
            cost = f"about ${most:.4f} at most"
        elif self._where.here:
            cost = "on this machine"
        return (
            f"judge: {len(texts)} judgments to ask of {self.name} at {self.host}, about {tokens_in} tokens in"
            f" and at most {tokens_out} out, {cost}"
        )

    def judge(
        self, tasks: list[Task], on_progress: Callable[[int, int], None] | None = None
    ) -> list[Judgment]:
        """One Judgment per task, in order; equal tasks are asked once. on_progress(done, total) per
        judgment."""
        keys = [self.cache_key(task) for task in tasks]
        first = dict(zip(reversed(keys), reversed(tasks), strict=True))
        judged = {key: j for key, task in first.items() if (j := self._known(key, task)) is not None}
        unasked = [key for key in dict.fromkeys(keys) if key not in judged]
        self.usage.cache_hits += len(keys) - len(unasked)

        def keep(key: str, judgment: Judgment) -> None:
            judged[key] = judgment
            if on_progress:
                on_progress(len(judged), len(first))

        if unasked:
            asyncio.run(self._ask_all([(key, first[key]) for key in unasked], keep))
        judgments = [judged[key] for key in keys]
        self.usage.errors.update(judgment.error for judgment in judgments if judgment.error)
        return judgments

    async def _ask_all(self, todo: list[tuple[str, Task]], keep: Callable[[str, Judgment], None]) -> None:
        """Ask everything, so many at a time. Where one request ends the run, those under way are waited for
        and no more are sent; Ctrl-C gives them up. Every answer that came is in the cache."""
        left, self._over = iter(todo), asyncio.Event()

        async def work(only: int | None = None) -> None:
            try:
                for key, task in itertools.islice(left, only):
                    keep(key, await self._judge_one(client, key, task))
            except JudgeStopped:
                self._over.set()
                raise

        async with self._client() as client:
            if self._budget is not None:  # the first one alone: what it costs is not known before
                await work(1)
            workers = [asyncio.ensure_future(work()) for _ in range(self._concurrency)]
            ends = await asyncio.gather(*workers, return_exceptions=True)
        errors = [e for e in ends if isinstance(e, BaseException)]
        stopped = next((e for e in errors if isinstance(e, JudgeStopped)), next(iter(errors), None))
        if stopped is not None:
            raise stopped

    async def _pause(self, seconds: float) -> None:
        """Wait; raises _Failure as soon as the run is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._over.wait()
        except TimeoutError:
            return
        raise _Failure("stopped", retry=False)

    def _client(self):
        """The openai client, for one event loop."""
        try:
            transport = async_client(self._where, self._key, LONGEST_ANSWER)
        except FrankenError as e:
            raise JudgeStopped(str(e)) from None
        return self._openai.AsyncOpenAI(
            base_url=self._base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=self._timeout_s,
            default_headers={"Accept-Encoding": "identity"},
            http_client=transport,
        )

    # ---- one judgment --------------------------------------------------------------------------------------

    @staticmethod
    def _read(rubric: str, answer: str) -> Judgment:
        try:
            return Judgment(parse_answer(rubric, answer))
        except ValueError:
            return Judgment(None, "unparseable answer")

    async def _judge_one(self, client, key: str, task: Task) -> Judgment:
        # An answer that is not the one word asked for gets one more chance; then it is an error, never a
        # guess.
        answer, usage, judgment = "", {}, Judgment(None, "not asked")
        about = {"model": self.name, "rubric": task.rubric, "version": RUBRIC_VERSION}
        for _ in range(2):
            try:
                answer, usage = await self._ask(client, task)
            except _Failure as failure:
                if failure.kept is not None:  # paid for, and no better when asked again
                    self._cache.put(key, {"answer": "", "error": str(failure), **about, **failure.kept})
                return Judgment(None, str(failure))
            judgment = self._read(task.rubric, answer)
            if judgment.error is None:
                break
        answer = self._masked(answer)[:200]
        why = (
            {} if answer else {"error": judgment.error}
        )  # an empty answer of old caches was cut off, perhaps
        self._cache.put(key, {"answer": answer, **why, **about, **usage})
        self._unreadable_in_a_row = self._unreadable_in_a_row + 1 if judgment.error else 0
        if self._unreadable_in_a_row >= self.UNREADABLE_TO_STOP:
            raise JudgeStopped(
                f"none of {self._unreadable_in_a_row} answers in a row was the word asked for, but such as"
                f" {self._said(answer)!r}: {self.name} is no judge as it is asked here"
            )
        return judgment

    async def _ask(self, client, task: Task) -> tuple[str, dict]:
        """The answer's text and usage after as many attempts as allowed; raises _Failure or JudgeStopped."""
        attempt = 1
        while True:
            while (delay := self._not_before - time.monotonic()) > 0:
                await self._pause(delay)
            if self._over.is_set():
                raise _Failure("stopped", retry=False)
            try:
                answer = await self._send(client, task)
            except _SayOtherwise:
                continue
            except _Failure as failure:
                waits = failure.retry_after or 0.0
                if not failure.retry or attempt >= self._attempts or waits > LONGEST_WAIT_S:
                    self._give_up(failure)
                # What one is told to wait, all wait.
                self._not_before = max(self._not_before, time.monotonic() + waits)
                # Full jitter over a doubling span, on top of what the server asked for.
                await self._pause(waits + random.uniform(0, min(30.0, self._backoff_s * 2 ** (attempt - 1))))
                attempt += 1
            else:
                self._failed_in_a_row = ("", 0)
                return answer

    def _give_up(self, failure: _Failure) -> NoReturn:
        before, times = self._failed_in_a_row
        times = times + 1 if before == str(failure) else 1
        self._failed_in_a_row = (str(failure), times)
        alone = failure.kept is not None and "cut_at" not in failure.kept  # it is the reply's, likely
        if times < (self.UNREADABLE_TO_STOP if alone else self.FAILURES_TO_STOP):
            raise failure
        said = f": {self._said(failure.words)!r}" if failure.words else ""
        raise JudgeStopped(
            f"{self.host} keeps failing ({failure}{said}); the answers so far are kept, run again later"
        ) from None

    def _masked(self, text: str) -> str:
        """The text without our key, which a server may send back."""
        return text.replace(self._key, "[key]") if self._key else text

    def _said(self, words: str) -> str:
        """A server's own words for a line on a terminal: as untrusted as a reply."""
        plain = "".join(c if c.isprintable() else " " for c in self._masked(words))
        return " ".join(plain.split())[:160]

    # ---- one request ---------------------------------------------------------------------------------------

    async def _send(self, client, task: Task) -> tuple[str, dict]:
        """The text and the usage of one request's answer; raises _Failure, _SayOtherwise or JudgeStopped."""
        messages: Any = judge_messages(task.rubric, task.question, task.reply, dict(task.levels or ()))
        self._check_budget()
        limit, temperature = self._limit_name, self._temperature
        self.usage.requests += 1
        self._under_way += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await client.chat.completions.with_raw_response.create(
                    model=self.name,
                    messages=messages,
                    extra_body={"usage": {"include": True}} if self._openrouter else None,
                    **{limit: self._max_tokens},
                    **temperature,
                )
            body = response.http_response.json()
        except TooMuch as error:
            raise _Failure(str(error)) from None
        except self._openai.APIStatusError as error:
            self._refused(error, limit, temperature)
        except (TimeoutError, self._openai.APITimeoutError):
            raise _Failure("timeout") from None
        except self._openai.APIConnectionError as error:
            if isinstance(error.__cause__, TooMuch):
                raise _Failure(str(error.__cause__)) from None
            raise _Failure("no connection", words=str(error.__cause__ or "")) from None
        except (self._openai.OpenAIError, ValueError, RecursionError):
            raise _Failure("malformed response") from None
        finally:
            self._under_way -= 1
        usage = self._count(body.get("usage") if isinstance(body, dict) else None)
        return self._answer(body, usage), usage

    def _refused(self, error, limit: str, temperature: dict) -> NoReturn:
        """What a status that is an error means for this request and for the run."""
        status, body = error.status_code, error.body if isinstance(error.body, dict) else {}
        words = next((body[k] for k in ("message", "detail") if isinstance(body.get(k), str)), "")
        about = f"{body.get('param')} {words}"
        if status == 400 and "max_tokens" in about and limit == "max_tokens":
            self._limit_name = "max_completion_tokens"
            raise _SayOtherwise
        if status == 400 and "temperature" in about and temperature:
            self._temperature = {}
            raise _SayOtherwise
        said = f": {self._said(words)!r}" if words else ""
        if status == 401:
            raise JudgeStopped(f"{self.host} refused the key (401{said}); check the variable that holds it")
        if status in (402, 404):
            raise JudgeStopped(
                f"{self.host} answered {status} for model {self.name} (no credit, or no such model){said}"
            )
        retry = status in (408, 409, 425, 429) or status >= 500
        raise _Failure(f"HTTP {status}", retry, retry_after_seconds(error.response.headers), words)

    def _answer(self, body, usage: dict) -> str:
        """The answer in a response's body. Raises _Failure where there is none: a provider's error, a
        filter, a refusal, an answer cut off, or no completion at all."""
        try:
            error = body.get("error")
            choice = {} if error else body["choices"][0]
            error = error or choice.get("error")
            message: Any = choice.get("message")
            if error:
                error = error if isinstance(error, dict) else {"message": str(error)}
                code, words = error.get("code"), str(error.get("message") or "")
                retry = not isinstance(code, int) or code in (408, 409, 425, 429) or code >= 500
                raise _Failure(f"a provider's error ({str(code)[:20]})", retry, words=words)
            finish, answer = choice.get("finish_reason"), answer_text(message)
        except (KeyError, TypeError, IndexError, AttributeError):
            raise _Failure("malformed response") from None
        if finish == "content_filter":
            raise _Failure("content filter", retry=False, kept=usage)
        if not answer and isinstance(message.get("refusal"), str):
            raise _Failure("refusal", retry=False, words=message["refusal"], kept=usage)
        if finish == "length" and not self._is_word(answer):
            raise _Failure(
                f"cut off at {self._max_tokens} tokens: raise --max-tokens",
                retry=False,
                kept=usage | {"cut_at": self._max_tokens},
            )
        return answer

    @staticmethod
    def _is_word(answer: str) -> bool:
        """Whether an answer is one that some rubric takes."""
        return any(
            LLMJudge._read(rubric, answer).error is None for rubric in ("persona", "position", "verdict")
        )

    # ---- cost ----------------------------------------------------------------------------------------------

    def _check_budget(self) -> None:
        """Raises JudgeStopped where one more request could exceed the budget."""
        if self._budget is None:
            return
        if self.usage.requests and not self.usage.cost_known:
            raise JudgeStopped(
                "--budget cannot be kept: the endpoint tells no cost; give --price-in and --price-out"
            )
        if self.usage.cost + (self._under_way + 1) * self._dearest > self._budget:
            raise JudgeStopped(
                f"the budget of ${self._budget:g} is spent (${self.usage.cost:.4f} so far); the answers are"
                " kept, run again with a larger --budget to go on"
            )

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
        cost = number("cost")
        if cost is None and self._prices:
            cost = (tokens_in * self._prices[0] + tokens_out * self._prices[1]) / 1e6
        self.usage.prompt_tokens += tokens_in
        self.usage.completion_tokens += tokens_out
        self.usage.cost += cost or 0.0
        self.usage.cost_known &= cost is not None
        self._dearest = max(self._dearest, cost or 0.0)
        return {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "cost": cost}
