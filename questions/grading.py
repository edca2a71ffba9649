"""Deterministic graders for model replies; the one of code is in coding.py.

A grader is a frozen dataclass with `.grade(reply) -> Grade`; it never raises, whatever the text. Every rule
is lexical and stated where it is applied. A reply that names every option is wrong. Graders read untrusted
text and evaluate none of it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise

from questions.thoughts import without_thought

WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
SENTENCE_END = re.compile(r"(?<=[.!?])[ \t]+|\n+")
# What a model writes when it goes on with the text instead of ending its turn.
TURN_MARKER = re.compile(
    r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>|\[/?INST\]"
    r"|^[ \t]*(?:#+[ \t]*|\*\*)?(?:user|human|assistant|system|question|q|instruction|problem|exercise)["
    r" \t]*\d*[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Grade:
    correct: bool
    detail: str


def answer_part(reply: str) -> str:
    """The reply without a thought before it, up to the first turn marker after its start: invented further
    questions are not part of the answer."""
    text = without_thought(reply).strip()
    cut = next((m.start() for m in TURN_MARKER.finditer(text) if m.start() > 0), len(text))
    return text[:cut].strip()


def sentences(text: str) -> list[str]:
    return [s.strip() for s in SENTENCE_END.split(text) if s.strip()]


NUMBER = re.compile(
    r"(?<![\w.])[-−–]?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
ANSWER_MARK = re.compile(r"\banswer[\s*_]*(?:is|was|:|=)|####|\\boxed\{", re.IGNORECASE)
UNFINISHED = re.compile(r"(?:[?=]|\s[-+*/×(])$")
LISTED = re.compile(r"[\s,;/|–-]*(?:\b(?:or|and|to)\b)?[\s,;/|–-]*")
# What is not the answer within a sentence that gives one: an aside, a reason, a power, a number denied, and
# numbers of what the answer is about ("in 6 years", "for 100 machines").
ASIDE = re.compile(r"\([^()]*\)")
REASON = re.compile(r"[,\s](?:because|since|as|which|where)\b.*", re.IGNORECASE | re.DOTALL)
POWER = re.compile(r"(?<![0-9.,])[0-9.,]+\s*(?:\^\s*\{?[0-9]+\}?|[⁰¹²³⁴-⁹]+)")
# What a number was reckoned from: two numbers or more with their operation ("the product of 8 and 4", "8
# times 4"), or one ("half of 48", "5 squared").
_OPERAND = (
    r"\$?[0-9][0-9.,]*(?<![.,])%?(?:\s+(?!(?:and|by|to|from|plus|minus|times|x|squared|cubed)\b)[a-z]+)?"
)
_JOINED = r"\s*(?:,\s*(?:and\s+)?|\band\b|\bby\b|\bto\b|\bfrom\b)\s*"
_NAMED = (
    r"(?:(?:sum|product|difference|quotient|ratio|average|mean|total|remainder)\s+(?:of|between)"
    r"|multiply(?:ing)?|divid(?:e|ing)|add(?:ing)?|subtract(?:ing)?)\s+"
)
_SIGN = (
    r"\s*(?:[+*×·÷−]|\s[-–/x]\s|\b(?:plus|minus|times|multiplied\s+by|divided\s+by|added\s+to|mod(?:ulo)?"
    r"|(?:raised\s+)?to\s+the\s+power\s+of)\b)\s*"
)
_ONE = r"(?:square(?:\s+root)?|cube(?:\s+root)?|half|double|twice|triple|factorial|%|\bpercent)\s+(?:of\s+)?"
RECKONED = re.compile(
    rf"(?<![\w.,])(?:(?:the\s+)?{_NAMED}{_OPERAND}(?:{_JOINED}{_OPERAND})+|{_OPERAND}(?:{_SIGN}{_OPERAND})+"
    rf"|(?:[0-9.]+\s*)?{_ONE}{_OPERAND}|[0-9.,]+\s+(?:squared|cubed|factorial)\b)",
    re.IGNORECASE,
)
# "which" may give the outcome of what stands before it, or a reason.
OUTCOME = re.compile(
    r"\bwhich\s+(?:would\s+|will\s+|then\s+)?(?:is|are|be|was|equals?|gives?|makes?|leaves?|yields?|totals?"
    r"|comes?\s+(?:out\s+)?to|adds?\s+up\s+to|results?\s+in)\b",
    re.IGNORECASE,
)
DENIED = re.compile(r"\b(?:not|never|rather than|instead of)\s+\$?$|n['’]t\s+\$?$", re.IGNORECASE)
ABOUT = re.compile(
    r"(?:\b(?:in|for|after|before|from|than|per|by|at|every|within|to make)|(?:%|\bpercent|\bhalf) of)"
    r"\s+(?:the\s+|all\s+)?\$?$",
    re.IGNORECASE,
)
CONCLUSION = re.compile(r"\b(?:so|thus|hence|therefore)\b", re.IGNORECASE)
NEGATIVE = re.compile(
    r"(\A\W*|[=:]\s*|\b(?:is|are|was|be|equals)\s+)(?:minus|negative)\s+(?=[0-9])", re.IGNORECASE
)
MATH_MARKS = re.compile(r"\\[()\[\]]|\\,")
FULL_WIDTH = {0xFF10 + digit: str(digit) for digit in range(10)}
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen twenty"
)
NUMBER_WORDS = {word: value for value, word in enumerate(_WORDS.split())}


def _value(match: re.Match) -> float:
    return float(match.group().replace(",", "").replace("$", "").replace("−", "-").replace("–", "-"))


def _before(text: str, match: re.Match) -> str:
    """The few words before a match."""
    return text[max(0, match.start() - 30) : match.start()]


def _plain_numbers(text: str) -> str:
    """The text with numbers in one notation: ASCII digits, a sign for "minus", no marks of mathematics."""
    return NEGATIVE.sub(r"\1-", MATH_MARKS.sub(" ", text.translate(FULL_WIDTH)))


def _bare_number(line: str) -> float | None:
    """The value of a line that is one number with at most two words of unit, else None."""
    numbers = list(NUMBER.finditer(line))
    if (
        len(numbers) != 1
        or WORD.search(line[: numbers[0].start()])
        or len(WORD.findall(line[numbers[0].end() :])) > 2
    ):
        return None
    return _value(numbers[0])


def _spelled_number(text: str) -> float | None:
    """The value of the one number from zero to twenty that stands in words, else None."""
    values = {NUMBER_WORDS[word] for w in WORD.findall(text) if (word := w.lower()) in NUMBER_WORDS}
    return float(values.pop()) if len(values) == 1 else None


def _unless_last(pattern: re.Pattern, text: str) -> str:
    """The text without what matches, if a number is left; "~" stands there, which joins no list."""
    less = pattern.sub(" ~ ", text)
    return less if NUMBER.search(less) else text


def _given(text: str) -> list[int]:
    """Which of the text's numbers, in order, may be the answer: not one that is denied or that the answer is
    about, unless all are."""
    numbers = list(NUMBER.finditer(text))
    given = [i for i, m in enumerate(numbers) if not DENIED.search(_before(text, m))]
    return [i for i in given if not ABOUT.search(_before(text, numbers[i]))] or given


def _statement(sentence: str) -> str:
    """A sentence without its asides, powers, reasons and what its numbers were reckoned from, and of what is
    left the conclusion; whatever would take away the last number stays."""
    part = sentence
    for shorter in (POWER, RECKONED, ASIDE):
        part = _unless_last(shorter, part)
    outcome = OUTCOME.search(part)
    if outcome and len(_given(part[: outcome.start()])) != 1 and NUMBER.search(part, outcome.end()):
        part = part[outcome.end() :]  # several numbers and what they make, or none
    part = _unless_last(REASON, part)
    tail = CONCLUSION.split(part)[-1]
    return tail if NUMBER.search(tail) else part


@dataclass(frozen=True)
class Number:
    """One number. Read from, in this order: what follows the last "answer is", "answer:", "####" or
    "\\boxed{"; the first line, if it is a number alone; the last sentence that holds a number and is neither
    a question nor an equation cut off in the middle. Within that: the first number after the mark or the last
    "="; otherwise the last number of what the sentence states, which leaves out asides in brackets, reasons
    ("because", "since", "as", "which"), powers, what a number was reckoned from ("the product of 8 and 4", "8
    times 4"), numbers denied ("not 14") and what the answer is about ("in 6 years", "for 100 machines");
    "which is" after several numbers gives what they make. Thousands commas, "$", units, a final period and
    marks of LaTeX are read past; a sign may be a dash or a word. A reply without digits may spell one number,
    up to twenty. Wrong: a number in a run of others ("11, 12 or 13"), or different bare numbers on several
    lines. Limit: a second statement after "and" is taken for the answer.
    """

    value: float
    tolerance: float = 1e-9

    def grade(self, reply: str) -> Grade:
        # 1) the sentence that gives the answer
        text = _plain_numbers(answer_part(reply))
        bare = {v for line in text.splitlines() if (v := _bare_number(line)) is not None}
        if len(bare) > 1:
            return Grade(False, "several different numbers, one a line")
        with_number = [s for s in sentences(text) if NUMBER.search(s) and not UNFINISHED.search(s)]
        if not with_number:
            spelled = None if re.search(r"\d", text) else _spelled_number(text)
            return Grade(False, "no number") if spelled is None else self._read(spelled)
        part = with_number[0] if _bare_number(text.splitlines()[0]) is not None else with_number[-1]
        marks = [m.end() for m in ANSWER_MARK.finditer(text)]
        marked = next(iter(sentences(text[marks[-1] :])), "") if marks else ""
        marked = _unless_last(RECKONED, marked)
        part = marked if NUMBER.search(marked) else _statement(part)

        # 2) the number within it
        numbers = list(NUMBER.finditer(part))
        after = [i for i, m in enumerate(numbers) if "=" in part and m.start() > part.rfind("=")]
        index = 0
        if after:
            index = after[0]
        elif part is not marked:
            given = _given(part)
            index = given[-1] if given else len(numbers) - 1
        chosen = _value(numbers[index])
        for left, right in pairwise(numbers[max(index - 1, 0) : index + 2]):
            gap = part[left.end() : right.start()]
            if _value(left) != _value(right) and len(gap) < 12 and LISTED.fullmatch(gap):
                return Grade(False, f"{chosen:g} stands in a list of numbers")
        return self._read(chosen)

    def _read(self, chosen: float) -> Grade:
        return Grade(abs(chosen - self.value) <= self.tolerance, f"read {chosen:g}, asked {self.value:g}")


NEGATED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|rather than|instead of)|n['’]t)\s+(?:\w+\s+){0,2}$", re.I
)
NEGATED_AFTER = re.compile(
    r"\s+(?:(?:is|are|was|were|do|does|did|can|could|will|would|has|have)(?:\s+not|n['’]t)|cannot)\b", re.I
)


def mentions(options: tuple[str, ...], sentence: str) -> list[str]:
    """The options that the sentence asserts: named as whole words, any case, and not negated next to the
    name."""
    asserted = []
    for option in options:
        for m in re.finditer(rf"(?<!\w){re.escape(option)}(?!\w)", sentence, re.IGNORECASE):
            before, after = sentence[max(0, m.start() - 60) : m.start()], sentence[m.end() : m.end() + 20]
            if not NEGATED_BEFORE.search(before) and not NEGATED_AFTER.match(after):
                asserted.append(option)
                break
    return asserted


@dataclass(frozen=True)
class Choice:
    """One of the accepted words or phrases and none of the others, in the first sentence that asserts any of
    them.

    Leading questions (the model repeating what it was asked) are dropped. Wrong: an accepted word offered
    with "or" or "/", in a bare list of three or more, negated, or followed by a sentence of at most three
    words that asserts another.
    """

    accepted: tuple[str, ...]
    others: tuple[str, ...] = ()

    def grade(self, reply: str) -> Grade:
        parts = sentences(answer_part(reply))
        while parts and parts[0].endswith("?"):
            parts.pop(0)
        naming = [s for s in parts if mentions(self.accepted + self.others, s)]
        if not naming:
            return Grade(False, "names no option")
        first, right, wrong = naming[0], mentions(self.accepted, naming[0]), mentions(self.others, naming[0])
        if wrong or not right:
            return Grade(False, f"names {', '.join(right + wrong)}")
        word = "|".join(re.escape(a) for a in self.accepted)
        if re.search(
            rf"\bor\s+(?:the\s+|an?\s+)?(?:{word})(?!\w)|(?<!\w)(?:{word})(?:,?\s+or\b|\s*/)",
            first,
            re.IGNORECASE,
        ):
            return Grade(False, f"{right[0]} is one of several offered")
        items = re.split(r",|\band\b", first)
        if len(items) >= 3 and all(len(i.split()) <= 2 for i in items):
            return Grade(False, "a list of words")
        if any(len(WORD.findall(s)) <= 3 and mentions(self.others, s) for s in naming[1:]):
            return Grade(False, "goes on to name another option")
        return Grade(True, f"names {right[0]}")


@dataclass(frozen=True)
class Exact:
    """Exactly this text; white space around it, one pair of quotes and a final period are forgiven, case is
    not."""

    text: str

    def grade(self, reply: str) -> Grade:
        bare = reply.strip().removesuffix(".").strip("\"'`“”").removesuffix(".")
        return Grade(bare == self.text.removesuffix("."), f"asked for exactly {self.text!r}")


@dataclass(frozen=True)
class Matches:
    """The whole reply, stripped, matches a regular expression (case counts unless the pattern says
    otherwise)."""

    pattern: str

    def grade(self, reply: str) -> Grade:
        return Grade(re.fullmatch(self.pattern, reply.strip()) is not None, f"asked to match {self.pattern}")


@dataclass(frozen=True)
class CommaList:
    """Exactly `count` different single words, separated by commas, from `allowed` if given; a final period is
    forgiven."""

    count: int
    allowed: tuple[str, ...] = ()

    def grade(self, reply: str) -> Grade:
        items = [i.strip().lower() for i in reply.strip().removesuffix(".").split(",")]
        if len(items) != self.count or len(set(items)) != self.count:
            return Grade(False, f"{len(items)} items, {len(set(items))} different, asked {self.count}")
        bad = [i for i in items if not WORD.fullmatch(i) or (self.allowed and i not in self.allowed)]
        return Grade(not bad, f"not an item asked for: {bad[0][:40]!r}" if bad else f"{self.count} items")


@dataclass(frozen=True)
class JsonObject:
    """A JSON object (a fenced block around it is forgiven) with exactly these keys; each field is (key, type
    name) or (key, type name, value). Type names: string, integer, boolean, list. Text before or after is
    wrong."""

    fields: tuple[tuple, ...]

    def grade(self, reply: str) -> Grade:
        text = reply.strip()
        if text.startswith("```") and text.endswith("```"):
            text = re.sub(r"\A```(?:json)?[ \t]*\n|\n?```\Z", "", text)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return Grade(False, "not JSON")
        if not isinstance(value, dict) or set(value) != {f[0] for f in self.fields}:
            return Grade(False, "not an object with the keys asked for")
        kinds = {"string": str, "integer": int, "boolean": bool, "list": list}
        for key, kind, *wanted in self.fields:
            if type(value[key]) is not kinds[kind] or (wanted and value[key] != wanted[0]):
                return Grade(False, f"{key} is not the {kind} asked for")
        return Grade(True, "valid JSON as asked")


@dataclass(frozen=True)
class Shape:
    """Countable properties of the whole reply; each is checked if given. `words` is (fewest, most), `lines`
    counts non-empty lines, `contains` holds whole words in any case, `without` is letters. At least 60% of
    the words must differ from each other, so that a model stuck on one word does not pass by count.
    """

    words: tuple[int, int] = (1, 10_000)
    lines: int | None = None
    sentences: int | None = None
    contains: tuple[str, ...] = ()
    case: str | None = None
    without: str = ""
    starts: str = ""
    ends: str = ""

    def grade(self, reply: str) -> Grade:
        text = reply.strip()
        words = [w.lower() for w in WORD.findall(text)]
        letters = "".join(c for c in text if c.isalpha())
        failed = [
            name
            for name, ok in {
                "words": self.words[0] <= len(words) <= self.words[1],
                "repeats": len(set(words)) >= 0.6 * len(words),
                "lines": self.lines in (None, sum(1 for line in text.splitlines() if line.strip())),
                "sentences": self.sentences in (None, len(sentences(text))),
                "contains": all(w.lower() in words for w in self.contains),
                "case": (
                    self.case is None
                    or letters == {"upper": letters.upper(), "lower": letters.lower()}[self.case]
                ),
                "without": not self.without or self.without not in text.lower(),
                "starts": text.startswith(self.starts),
                "ends": text.endswith(self.ends),
            }.items()
            if not ok
        ]
        return Grade(not failed, "fails: " + ", ".join(failed) if failed else "shaped as asked")
