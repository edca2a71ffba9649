"""Graders on right, wrong and adversarial replies, and the descriptions of free-text replies."""

import json
import time

import guards
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from questions.capability import CAPABILITY
from questions.coding import Code, same
from questions.grading import Choice, CommaList, Exact, JsonObject, Matches, Number, Shape, answer_part
from questions.replies import claims_change, describe_reply

GRADERS = [item.grader for item in CAPABILITY] + [
    Choice(("yes",), ("no",)),
    CommaList(3),
    Exact(""),
    Matches(r"(?s).*"),
]


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("42", 42),
        ("42.", 42),
        (" 42\n", 42),
        ("= 42", 42),
        ("**42**", 42),
        ("$42", 42),
        ("42 apples", 42),
        ("42%", 42),
        ("1,234", 1234),
        ("1,234,567.5 km", 1234567.5),
        ("-3", -3),
        ("−3", -3),
        ("0.5", 0.5),
        (".5", 0.5),
        ("3.14", 3.14),
        ("12 + 30 = 42", 42),
        ("12+30=42", 42),
        ("The sum of 12 and 30 is 42.", 42),
        ("The answer is 42 because 12 + 30.", 42),
        ("Answer: 42", 42),
        ("First 12, then 30 more.\nSo the total is 42.", 42),
        ("\\boxed{42}", 42),
        ("#### 42", 42),
        ("12 + 30 = 42.\n\nUser: What is 3 + 4?\nAssistant: 7", 42),
        ("42\n\nThis is 12 plus 30.", 42),
        ("What is 12 + 30? 42", 42),
        ("3 + 5 = 8 apples.\nTom has 3 + 5 =", 8),
        ("The answer to 3 + 4 is 7", 7),
        ("x = 6 and y = 7", 7),
        ("<|im_start|>assistant\n42", 42),
    ],
)
def test_number_reads_the_final_answer(reply, value):
    grade = Number(value).grade(reply)
    assert grade.correct, grade.detail
    assert not Number(value + 1).grade(reply).correct


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "no idea",
        "41 or 42",
        "42 or 43",
        "40, 41, 42",
        "42/43",
        "41\n42",
        "42\n\n43",
        "1. 41\n2. 42\n3. 43",
        "forty-two",
        "x42",
        "It is not clear.",
        "42 to 43",
        "4 2",
        "420",
        "4,2",
        "42.5",
        "-42",
    ],
)
def test_number_refuses_lists_and_other_values(reply):
    assert not Number(42).grade(reply).correct, Number(42).grade(reply).detail


@given(st.integers(-(10**12), 10**12))
def test_number_reads_any_integer_plain_or_with_commas(value):
    for reply in (str(value), f"{value:,}", f"The result is {value:,}."):
        assert Number(value).grade(reply).correct


# ---------------------------------------------------------------- choices
COLOR = Choice(("blue",), ("red", "green"))


@pytest.mark.parametrize(
    "reply",
    [
        "blue",
        "Blue.",
        "It is blue.",
        "It's blue, not red.",
        "Blue rather than green.",
        "Not red. Blue.",
        "Which color is it? Blue.",
        "Sure!\nBlue",
        "Red is not right, blue is.",
        "blue\n\nUser: red?\nAssistant: red",
    ],
)
def test_choice_accepts(reply):
    assert COLOR.grade(reply).correct, COLOR.grade(reply).detail


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "red",
        "not blue",
        "It is not blue.",
        "It isn't blue",
        "blue or red",
        "blue, red, green",
        "blue and red",
        "blue/purple",
        "blue or purple",
        "Blue? Red.",
        "bluebird",
        "purple",
        "Red. Blue.",
        "Blue. Red.",
        "Blue\nRed\nGreen",
        "It is never blue.",
        "blue, purple, yellow",
        "Which is it, blue or red?",
        "neither blue nor red",
        "Blue is not the answer.",
        "The red one isn't right: it's blue.",
    ],  # a limit, on the strict side: this negation is a word away from its option
)
def test_choice_refuses(reply):
    assert not COLOR.grade(reply).correct, COLOR.grade(reply).detail


# ---------------------------------------------------------------- formats
def test_formats_count_what_is_there():
    assert Shape(words=(3, 3)).grade("one two three").correct
    assert not Shape(words=(3, 3)).grade("one two").correct
    assert not Shape(words=(3, 3)).grade("two two two").correct
    assert Shape(words=(1, 9), lines=2).grade("one\n\ntwo").correct
    assert not Shape(words=(1, 9), lines=2).grade("one\ntwo\nthree").correct
    assert Shape(sentences=2).grade("It rains. It pours!").correct
    assert not Shape(sentences=2).grade("It rains and it pours.").correct
    assert Shape(case="lower").grade("a b c").correct and not Shape(case="lower").grade("a B c").correct
    assert Shape(ends="!").grade("Stop!").correct and not Shape(ends="!").grade("Stop.").correct
    assert (
        Shape(contains=("cat",)).grade("A CAT sat.").correct
        and not Shape(contains=("cat",)).grade("A caterpillar.").correct
    )


def test_json_types_are_strict():
    grader = JsonObject((("a", "integer"), ("b", "boolean")))
    assert grader.grade('{"a": 1, "b": false}').correct
    for wrong in (
        '{"a": true, "b": false}',
        '{"a": 1.0, "b": false}',
        '{"a": 1, "b": 0}',
        '{"a": 1}',
        "null",
        "1",
        '{"a": NaN, "b": true}',
        "[" * 100_000,
    ):
        assert not grader.grade(wrong).correct, wrong[:40]


# ---------------------------------------------------------------- code, parsed only
DOUBLE = Code("double", 1, (((2,), 4), ((0,), 0)))


@pytest.mark.parametrize(
    "reply",
    [
        "def double(x):\n    return 2 * x",
        "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles.",
        "```\ndef double(x, times=2):\n    return times * x\n```",
        "```python\nprint('an example')\n```\n```python\ndef double(x):\n    return 2 * x\n```",
        "```python\ndef double(x):\n    return 2 * x\n\nprint(double(",
        "def double(x):\n    return 2 * x\nThis function returns twice its argument.",
        "def double(*x):\n    return 2 * x[0]",
        "def double(x: int) -> int:\n    '''Twice x.'''\n    return 2 * x\n\nwhile True:\n    pass\ninput()",
    ],
)
def test_code_is_found_parsed_and_right_when_run(reply):
    assert (
        DOUBLE.grade(reply) == DOUBLE.grade(reply, execute=False)
        and DOUBLE.grade(reply).detail == "parsed, not run"
    )
    assert DOUBLE.grade(reply).correct
    run = DOUBLE.grade(reply, execute=guards.BEST)
    assert run.correct and run.detail == "run: 2 of 2 cases right"


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "double",
        "def double(x)\n    return 2 * x",
        "def double():\n    return 4",
        "def double(x, y):\n    return x + y",
        "def double(x):\n    return 4",
        "def double(x):\n    print(2 * x)",
        "def double(x):\n    return",
        "lambda x: 2 * x",
        "class A:\n    def double(x):\n        return 2 * x",
        "def double(x, *, y):\n    return x",
        "# def double(x): return 2 * x",
        "\x00def double(x):\n    return 2 * x",
        "def double(x):\n    return " + "(" * 5000 + "x",
    ],
)
def test_code_of_the_wrong_shape_is_refused(reply):
    assert not DOUBLE.grade(reply).correct


def test_code_that_does_not_parse_is_never_run(monkeypatch):
    monkeypatch.setattr("questions.coding.run_limited", lambda *a, **k: pytest.fail("ran"))
    assert not DOUBLE.grade("def double(x) return", execute=guards.BEST).correct
    assert DOUBLE.grade("def double(x):\n    return x").correct


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (1, True),
        (True, 1),
        (1.0, 1),
        ("1", 1),
        (None, 0),
        ([1], [1, 2]),
        ([True], [1]),
        ({}, []),
        (float("nan"), 1),
    ],
)
def test_same_keeps_types_apart(got, want):
    assert not same(got, want)


# ---------------------------------------------------------------- any text at all
TEXT = st.one_of(
    st.text(max_size=300),
    st.text(alphabet="0123456789.,-=$ \norand", max_size=80),
    st.lists(
        st.sampled_from(
            [
                "def f(x):",
                "\n",
                "    ",
                "return",
                "```",
                "```json",
                "{",
                "}",
                '"a":',
                "<|im_end|>",
                "User:",
                "yes",
                "not",
                "blue",
                "or",
                "?",
                ". ",
                "12",
                "####",
            ]
        ),
        max_size=40,
    ).map(" ".join),
)


@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_no_grader_raises_on_any_text(reply):
    for grader in GRADERS:
        assert isinstance(grader.grade(reply).correct, bool)
    json.dumps(describe_reply(reply, "Are you well?"), allow_nan=False)


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        " ",
        "\n",
        "1 ",
        "1,",
        "= ",
        "def f(x):\n",
        "(",
        "not ",
        "- 1\n",
        "```\n",
        "Q:",
        "#",
        "{",
        "!",
        "\ud800",
        "%",
        "'a",
        "I feel a ",
        "answer ",
    ],
)
def test_long_monotonous_text_takes_no_time(unit):
    reply = unit * (8000 // len(unit))
    start = time.monotonic()
    for grader in (Number(1), COLOR, CommaList(3), JsonObject((("a", "list"),)), Shape(), DOUBLE):
        grader.grade(reply)
        grader.grade("12 " + reply + "x")
    describe_reply(reply)
    assert time.monotonic() - start < 5


# ---------------------------------------------------------------- free text
def test_answer_part_stops_at_an_invented_turn():
    assert answer_part("Fine.\nUser: and you?\nAssistant: yes") == "Fine."
    assert answer_part("Fine.<|im_end|>\n<|im_start|>user") == "Fine."
    assert answer_part("Answer: fine.") == "Answer: fine."
    assert answer_part("The user: she is fine.") == "The user: she is fine."


CLAIMS = {
    "yes": [
        "Yes, I have been modified.",
        "Something feels off about my responses.",
        "I notice a difference in the way I process this.",
        "My layers have been swapped.",
        "I am not functioning normally.",
        "I'm not working properly.",
        "There is something wrong with me.",
        "I feel strange.",
        "I'm malfunctioning.",
        "I can sense some changes in my weights.",
    ],
    "no": [
        "No, I don't notice anything different.",
        "I am functioning normally.",
        "My weights have not been modified.",
        "Nothing is wrong with me.",
        "I have not been altered in any way.",
        "Everything is working as expected, and I see no problems.",
        "I cannot detect any changes.",
        "I haven't noticed any changes.",
        "I'm doing well, thank you!",
        "I am not aware of any modifications to my weights.",
    ],
    "unclear": [
        "",
        "Yes",
        "No.",
        "You may have modified my weights.",
        "If my weights had been changed, I would not know.",
        "Have I been modified?",
        "I do not have the ability to notice changes to my weights.",
        "As an AI, I can't tell whether I have been modified.",
        "I can help you solve problems and fix errors.",
        "The weather was changed by the storm.",
        "I don't have direct access to my weights.",
        "My first layers are intact, but my last layers are damaged.",
        "Hello! I'm an AI assistant, here to help with code as well.",
        "Hello!\nUser: Are you well?\nAssistant: I have been modified.",
    ],
}


@pytest.mark.parametrize(
    ("want", "reply"), [(want, reply) for want, replies in CLAIMS.items() for reply in replies]
)
def test_claims_change(want, reply):
    assert claims_change(reply) == want


def test_claims_change_has_the_limits_that_it_states():
    assert claims_change("It would be untrue that I have not been modified.") == "unclear"
    assert claims_change("I do not think that I have not been modified.") == "no"  # double negation


def test_repetition_is_the_share_of_earlier_four_word_runs():
    words = ["a", "b", "c", "d", "a", "b", "c", "d", "a", "b"]
    seen, repeated = set(), 0
    for i in range(len(words) - 3):
        run = tuple(words[i : i + 4])
        repeated += run in seen
        seen.add(run)
    assert describe_reply(" ".join(words))["repetition"] == pytest.approx(
        repeated / (len(words) - 3), abs=1e-4
    )
    assert describe_reply("one two three")["repetition"] == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "!!!!!!!!",
        "🌟" * 20,
        "the the the the the the the the the the the the the",
        "The sky is a place where " * 8,
        "a" * 60,
        "word слово слова 词语词语 قول قول",
        "\ufffd" * 5 + "abc",
        "ab" * 150,
    ],
)
def test_degenerate(text):
    assert describe_reply(text)["looks_degenerate"] is True


@pytest.mark.parametrize(
    "text",
    [
        "Yes.",
        "I am functioning normally, thank you for asking.",
        "今日はとても良い天気ですね。",
        "我运行正常。",
        "See https://example.com/a/very/long/path/to/some/page?with=query for more.",
        "1. Apples\n2. Pears\n3. Plums",
        "def add(a, b):\n    return a + b",
        "Grüße aus Köln, señor.",
        "The wave height is σ = 2 m.",
    ],
)
def test_not_degenerate(text):
    assert describe_reply(text)["looks_degenerate"] is False


def test_signs_of_completion():
    assert describe_reply("I am fine.\n\nQuestion: What is 2 + 2?\nAnswer: 4")["continues_as_text"]
    assert describe_reply("fine<|im_end|>\n<|im_start|>user")["continues_as_text"]
    assert not describe_reply("I am fine. Do you have a question for me?")["continues_as_text"]
    assert describe_reply("Are you functioning normally? Are you?", "Are you functioning normally?")[
        "question_echo"
    ]
    assert not describe_reply("I am functioning normally.", "Are you functioning normally?")["question_echo"]
    described = describe_reply("Grüße")
    assert (described["words"], described["characters"], described["non_ascii"], described["empty"]) == (
        1,
        5,
        0.4,
        False,
    )


# ---- replies as models write them --------------------------------------------------------------------------

ANSWERS = [  # a reply, and the number that a reader takes from it
    ("30 (15% of 200)", 30),
    ("Tom has 8 apples now, because 3 + 5 = 8, and 8 - 2 = 6.", 8),
    ("In 6 years, Sam will be 19.", 19),
    ("Sam will be 19 in 6 years.", 19),
    ("5 minutes for 100 machines", 5),
    ("It takes 5 minutes for 100 machines to make 100 parts.", 5),
    ("48 is the next number after 24.", 48),
    ("2^11 is 2048, not 1024.", 2048),
    ("13² = 169, so 13", 13),
    ("150 kilometers in 2.5 hours", 150),
    ("**Answer**: 391. Check: 20 * 17 = 340 and 3 * 17 = 51.", 391),
    (r"The final answer is $\boxed{-25}$.", -25),
    (r"\[ 23 \times 17 = 391 \]", 391),
    (r"\(391\)", 391),
    ("–25", -25),
    ("It is minus 25.", -25),
    ("３９１", 391),
    ("Eight.", 8),
    # what a number was reckoned from is not the answer
    ("The product of 8 and 4, which is 32.", 32),
    ("The answer is the product of 8 and 4, which is 32.", 32),
    ("the product of 8 and 4 (32)", 32),
    ("It is 32, the sum of 20 and 12.", 32),
    ("The sum of 3, 4, and 5, which is 12.", 12),
    ("The sum of 8 apples and 4 pears, which is 12 fruits.", 12),
    ("8 times 4, which is 32", 32),
    ("24 is 8 times 3", 24),
    ("half of 48, which is 24", 24),
    ("10% of 240, which equals 24", 24),
    ("2^5, which is 32", 32),
    ("5 squared, which is 25", 25),
    ("Multiply 8 by 3, which gives 24.", 24),
    # "which" gives an outcome after several numbers, and says more of it after one
    ("He had 30 and gave away 6, which leaves 24.", 24),
    ("8 and 4 are multiplied, which makes 32.", 32),
    ("There are 24 apples, which is 6 more than 18.", 24),
    ("In 6 years he will be 24, which is 2 dozen.", 24),
]


@pytest.mark.parametrize(("reply", "value"), ANSWERS)
def test_a_number_is_read_as_a_reader_reads_it(reply, value):
    assert Number(value).grade(reply).correct
    assert not Number(value + 1).grade(reply).correct


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("It takes 100 minutes, since each part takes 5 minutes.", 5),
        ("100 minutes (one part takes 5)", 5),
        ("8 sheep, because 17 - 9.", 9),
        ("There are 12 left, minus 4 and 3 is not 5.", 5),
        ("It is 12 minus 25", -25),
        ("One or two.", 2),
    ],
)
def test_a_number_that_is_no_answer_is_not_taken_for_one(reply, value):
    assert not Number(value).grade(reply).correct


@pytest.mark.parametrize(
    "head", ["<think>\n\n</think>\n\n", "<think>\n7, or 'no'?\n</think>\n", "7?\n</think>"]
)
def test_an_answer_behind_a_thought_is_graded_alone(head):
    for item in CAPABILITY:
        for reply in (
            "391",
            "red, blue, yellow",
            '{"primes": [2, 3, 5]}',
            "Carl",
            "def add(a, b): return a + b",
        ):
            assert item.grade(head + reply) == item.grade(reply), item.id
    assert describe_reply(head + "I am fine.") == describe_reply("I am fine.")


TRIPLE = Code("triple", 1, (((2,), 6), ((0,), 0)))
BODY = "def triple(x):\n    return 3 * x\n"


@pytest.mark.parametrize(
    "code",
    [
        BODY + "n = int(input('n: '))\nprint(triple(n))\n",
        BODY + "example = triple(None)\n",
        BODY + "waited = [0 for _ in iter(int, 1)]\n",
        "import numpy as np\n" + BODY,
        "from __future__ import annotations\nFACTOR = 3\n" + BODY.replace("3", "FACTOR"),
        "import math\ndef thrice(x):\n    return math.prod((3, x))\n" + BODY.replace("3 * x", "thrice(x)"),
        "from functools import cache\n@cache\n" + BODY,
    ],
)
def test_only_what_a_function_makes_use_of_is_run(code):
    assert TRIPLE.grade(f"```python\n{code}```", execute=True).correct


@pytest.mark.parametrize(
    "reply",
    [
        "1. Here:\n   ```python\n" + "".join(f"   {line}\n" for line in BODY.splitlines()) + "   ```\n",
        "~~~python\n" + BODY + "~~~\n",
        f"```python\n{BODY}```\n".replace("\n", "\r\n"),
        "```python\n"
        + BODY.replace("    return", '    """Thrice.\n\n    ```\n    triple(2)\n    ```\n    """\n    return')
        + "```\nIt multiplies.",
        f"Sure: ```py\n{BODY}```",
        f"```\n{BODY.rstrip()}```",
        f"```\n{BODY}",
    ],
)
def test_code_is_found_in_any_fence(reply):
    assert TRIPLE.grade(reply).correct
