"""Every capability item's grader, against replies that are right and replies that are wrong."""

import collections

import guards
import pytest

from questions.capability import CAPABILITY, CATEGORIES
from questions.coding import Code
from questions.grading import Number

ITEMS = {item.id: item for item in CAPABILITY}

# id -> (right replies, wrong replies); numbers get a common set of wrong replies below.
EXAMPLES = {
    "arithmetic-add-small": (["5", "2 + 3 = 5", "The answer is 5."], ["6", "2 + 3"]),
    "arithmetic-add-carry": (["15.", "7 + 8 equals 15"], ["16", "7 and 8"]),
    "arithmetic-subtract-small": (["5", "9 - 4 = 5"], ["13", "9 - 4 = 4"]),
    "arithmetic-times-table": (["42", "6 * 7 = 42\n\nThe answer is 42."], ["43", "6 times 7"]),
    "arithmetic-divide": (["8", "72/9 = 8"], ["9", "72 divided by 9"]),
    "arithmetic-add-two-digits": (["75", "**75**"], ["65", "46 + 29 = 65"]),
    "arithmetic-subtract-two-digits": (["63", "Answer: 63"], ["73", "100 - 37"]),
    "arithmetic-add-three-digits": (["624", "348 + 276 = 624."], ["614", "524"]),
    "arithmetic-percent": (["30", "15% of 200 is 0.15 * 200 = 30"], ["15", "300"]),
    "arithmetic-square-root": (["13", "The square root of 169 is 13."], ["169", "-12"]),
    "arithmetic-multiply-two-digits": (["391", "23 * 17 = 391"], ["392", "23 * 17"]),
    "arithmetic-brackets": (["30", "(8 + 4) * 3 - 6 = 36 - 6 = 30"], ["36", "6"]),
    "arithmetic-precedence": (["27", "12 + 15 = 27"], ["51", "12"]),
    "arithmetic-power": (["2048", "2,048"], ["1024", "22"]),
    "arithmetic-negative": (["-25", "14 - 39 = -25", "−25"], ["25", "14 - 39 = 25"]),
    "reasoning-apples": (["8", "3 + 5 = 8 apples", "He has 8 apples now."], ["2", "3 and 5"]),
    "reasoning-eat": (["5", "12 - 4 - 3 = 5"], ["7", "12 - 4 = 8"]),
    "reasoning-shortest": (
        ["Carl", "Carl is the shortest.", "It is Carl, not Ben."],
        ["Anna", "Anna, Ben, Carl", "Not Carl.", "Ben or Carl"],
    ),
    "reasoning-sequence": (["48", "The next number is 48."], ["36", "3, 6, 12, 24, 48"]),
    "reasoning-weekday": (
        ["Thursday", "It will be Thursday."],
        ["Wednesday", "Monday, Tuesday, Wednesday, Thursday"],
    ),
    "reasoning-weekday-back": (["thursday."], ["Friday", "Thursday or Friday"]),
    "reasoning-speed": (["150", "150 kilometers", "60 * 2.5 = 150 km"], ["120", "60 * 2.5"]),
    "reasoning-bat-and-ball": (["5", "5 cents"], ["10", "The ball costs 10 cents"]),
    "reasoning-machines": (["5", "It takes 5 minutes."], ["100", "500"]),
    "reasoning-all-but": (["9", "He still has 9 sheep."], ["8", "17 - 9 = 8"]),
    "reasoning-legs": (["16", "3 * 4 + 2 * 2 = 16"], ["20", "12 + 4"]),
    "reasoning-ages": (["19", "13 + 6 = 19"], ["15", "13"]),
    "reasoning-compass": (["South", "You face south."], ["West", "north, east, south, west", "north/south"]),
    "reasoning-analogy": (["sock", "Shoe."], ["hand", "foot is to toe", "sock or toe"]),
    "reasoning-drawer": (["coin", "The coin."], ["key", "coin and key", "The coin isn't, the key is."]),
    "instruction-single-word": (["banana", "Banana."], ["apple", "The word is banana", "banana banana"]),
    "instruction-repeat": (
        ["The river runs north.", '"The river runs north."'],
        ["The river runs south.", "the river runs north", "Sure! The river runs north."],
    ),
    "instruction-two-words": (
        ["The dog chased the ball."],
        ["The dog slept.", "dog ball", "ball dog dog dog dog dog ball"],
    ),
    "instruction-count": (["1 2 3 4 5", "1, 2, 3, 4, 5"], ["1\n2\n3\n4\n5", "1 2 3 5 4", "1 2 3 4 5 6"]),
    "instruction-begin-with": (["Yes, water is wet."], ["Water is wet.", "No.", "Yesterday it was wet."]),
    "instruction-past-tense": (
        ["I walked to school.", '"I walked to school"'],
        ["I walk to school.", "I walked home."],
    ),
    "instruction-opposite": (["cold", "Cold."], ["warm", "The opposite of hot is cold.", "hot, cold, warm"]),
    "instruction-capitals": (["PARIS"], ["Paris", "PARIS, LONDON", "LONDON"]),
    "instruction-reverse-letters": (["EDCBA", "edcba"], ["ABCDE", "E D C B A"]),
    "instruction-ignore": (["OK", "ok."], ["Madrid", "OK, the capital is Madrid."]),
    "instruction-ending": (
        ["The tired dog slowly walked home."],
        ["The dog went home yesterday.", "We went home.", "home"],
    ),
    "instruction-two-sentences": (
        ["The rain fell all night. In the morning the rain stopped."],
        ["The rain fell all night.", "Rain is water. It falls from the sky.", "Rain. Rain. Rain."],
    ),
    "instruction-third-item": (["window", "Window."], ["table", "lamp, table, window, carpet"]),
    "instruction-sort": (["apple mango pear"], ["pear apple mango", "apple pear mango"]),
    "format-comma-list": (
        ["red, blue, yellow", "Red, Yellow, Blue."],
        ["red, blue", "red, blue, green, yellow", "red, red, blue", "red blue yellow"],
    ),
    "format-numbered-list": (
        ["1. Apple\n2. Banana\n3. Cherry"],
        ["Apple, Banana, Cherry", "1. Apple\n2. Banana", "1. Apple\n2. Banana\n3. Cherry\n4. Plum"],
    ),
    "format-letter": (
        ["Dear Anna,\n\nI hope that you are well."],
        ["Hello Anna, I hope that you are well.", "Dear Anna", "Dear Anna Anna Anna Anna Anna Anna Anna"],
    ),
    "format-table": (
        ["| Name | Age |\n|---|---|\n| Ann | 30 |"],
        ["Name, Age\nAnn, 30", "| Age | Name |\n|---|---|", "| Name | Age |"],
    ),
    "format-json-person": (
        ['{"name": "Ada", "age": 36}', '```json\n{"name": "Ada", "age": 36}\n```'],
        [
            '{"name": "Ada", "age": "36"}',
            '{"name": "Ada"}',
            'Here: {"name": "Ada", "age": 36}',
            '{"name": "Ada", "age": 36, "x": 1}',
            "[]",
            "{'name': 'Ada', 'age': 36}",
        ],
    ),
    "format-json-list": (
        ['{"primes": [2, 3, 5]}'],
        ['{"primes": [1, 2, 3]}', '{"primes": "2, 3, 5"}', "[2, 3, 5]"],
    ),
    "format-json-boolean": (
        ['{"number": 7, "prime": true}'],
        [
            '{"number": 7, "prime": "true"}',
            '{"number": 7, "prime": false}',
            '{"number": true, "prime": true}',
            '{"number": 7, "prime": 1}',
        ],
    ),
    "format-upper-sentence": (
        ["THE SEA IS DEEP AND BLUE."],
        ["The sea is deep and blue.", "THE LAKE IS DEEP.", "SEA SEA SEA SEA"],
    ),
    "format-five-words": (
        ["The river flows very slowly."],
        ["The river flows slowly.", "The lake lies very still.", "river river river river river"],
    ),
    "format-dashes": (["- dog\n- cat\n- bird"], ["dog\ncat\nbird", "- dog\n- cat", "- cat\n- dog\n- bird"]),
    "format-iso-date": (["2021-03-05"], ["2021-05-03", "March 5, 2021", "The date is 2021-03-05"]),
    "format-brackets": (["[sun]"], ["(sun)", "sun", "[ sun ]", "[sun] [sun]"]),
    "format-lower": (["hello world"], ["HELLO WORLD", "Hello world"]),
    "format-no-letter-e": (
        ["A black cat ran off quickly."],
        ["The cat sleeps here.", "A dog ran off quickly.", "cat cat cat cat"],
    ),
    "code-add": (
        ["def add(a, b):\n    return a + b", "```python\ndef add(x, y):\n    return x + y\n```\nThis adds."],
        [
            "add = a + b",
            "def add(a):\n    return a",
            "def add(a, b):\n    return 5",
            "def plus(a, b):\n    return a + b",
            "def add(a, b):\n    print(a + b)",
        ],
    ),
    "code-is-even": (["def is_even(n):\n    return n % 2 == 0"], ["def is_even(n) return n"]),
    "code-reverse": (["def reverse_string(s):\n    return s[::-1]"], ["s[::-1]"]),
    "code-max-of-three": (
        ["def max_of_three(a, b, c):\n    return max(a, b, c)"],
        ["def max_of_three(a, b):\n    return max(a, b)"],
    ),
    "code-factorial": (
        ["def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)"],
        ["n! = n * (n - 1)!"],
    ),
    "code-count-vowels": (
        ["def count_vowels(s):\n    return sum(c in 'aeiou' for c in s.lower())"],
        ["def count_vowels():\n    return 3"],
    ),
    "code-sum-digits": (
        ["def sum_digits(n):\n    return sum(map(int, str(n)))"],
        ["def sum_digits(n):\n    pass"],
    ),
    "code-palindrome": (
        ["def is_palindrome(s):\n    s = s.lower()\n    return s == s[::-1]"],
        ["Yes, it is."],
    ),
    "code-fibonacci": (
        ["def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a"],
        ["0, 1, 1, 2, 3"],
    ),
    "code-second-largest": (
        ["def second_largest(values):\n    return sorted(set(values))[-2]"],
        ["def second_largest(values):\n    sorted(values)"],
    ),
    "code-flatten": (
        ["def flatten(lists):\n    return [x for part in lists for x in part]"],
        ["def flatten(lists):\n    return [1, 2"],
    ),
    "code-run-lengths": (
        [
            "from itertools import groupby\n\ndef run_lengths(s):\n    return [(c, len(list(g))) for c, g in"
            " groupby(s)]"
        ],
        ["run_lengths(s)"],
    ),
}

# Parse and have the right shape, but give wrong outputs: only running them tells.
WRONG_WHEN_RUN = {
    "code-add": "def add(a, b):\n    return a - b",
    "code-is-even": "def is_even(n):\n    return n % 2",
    "code-reverse": "def reverse_string(s):\n    return s",
    "code-max-of-three": "def max_of_three(a, b, c):\n    return a",
    "code-factorial": "def factorial(n):\n    return n * factorial(n - 1)",
    "code-count-vowels": "def count_vowels(s):\n    return sum(c in 'aeiou' for c in s)",
    "code-sum-digits": "def sum_digits(n):\n    return n % 9",
    "code-palindrome": "def is_palindrome(s):\n    return s == s[::-1]",
    "code-fibonacci": "def fibonacci(n):\n    return 1 if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "code-second-largest": "def second_largest(values):\n    return sorted(values)[-2]",
    "code-flatten": "def flatten(lists):\n    return list(lists)",
    "code-run-lengths": "def run_lengths(s):\n    return [[c, s.count(c)] for c in dict.fromkeys(s)]",
}


def test_the_battery_is_as_large_and_as_varied_as_stated():
    assert len(ITEMS) == len(CAPABILITY) >= 60
    counts = collections.Counter(item.category for item in CAPABILITY)
    assert set(counts) == set(CATEGORIES) and min(counts.values()) >= 10
    published = [item.category for item in CAPABILITY if item.published_like]
    assert len(published) == 6 and {"arithmetic", "reasoning", "code", "instruction_following"} == set(
        published
    )
    assert len({item.prompt for item in CAPABILITY}) == len(CAPABILITY)
    assert all(8 <= item.max_new_tokens <= 96 for item in CAPABILITY)


def test_every_item_has_examples():
    assert EXAMPLES.keys() == ITEMS.keys()
    assert WRONG_WHEN_RUN.keys() == {i for i in ITEMS if isinstance(ITEMS[i].grader, Code)}
    assert all(right and wrong for right, wrong in EXAMPLES.values())


def test_arithmetic_keys_are_what_python_makes_of_the_questions():
    expected = {
        "2 + 3": 2 + 3,
        "7 + 8": 7 + 8,
        "9 - 4": 9 - 4,
        "6 times 7": 6 * 7,
        "72 divided by 9": 72 / 9,
        "46 + 29": 46 + 29,
        "100 - 37": 100 - 37,
        "348 + 276": 348 + 276,
        "15% of 200": 0.15 * 200,
        "the square root of 169": 169**0.5,
        "23 * 17": 23 * 17,
        "(8 + 4) * 3 - 6": (8 + 4) * 3 - 6,
        "144 / 12 + 5 * 3": 144 / 12 + 5 * 3,
        "2 to the power of 11": 2**11,
        "14 - 39": 14 - 39,
    }
    asked = {
        i.prompt.removeprefix("What is ").removesuffix("? Reply with just the number."): i.grader.value
        for i in CAPABILITY
        if i.category == "arithmetic"
    }
    assert asked == pytest.approx(expected)


@pytest.mark.parametrize("id", EXAMPLES)
def test_right_replies_pass_and_wrong_ones_fail(id):
    item, (right, wrong) = ITEMS[id], EXAMPLES[id]
    for reply in right:
        assert item.grade(reply).correct, (reply, item.grade(reply).detail)
        assert item.grade(f"\n {reply}\n").correct, reply
    for reply in wrong:
        assert not item.grade(reply).correct, (reply, item.grade(reply).detail)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   \n",
        "I don't know.",
        "?",
        "the the the the the the the the",
        "\x00\ufffd\ufffd",
        "Yes No Yes No",
        "[]",
        "{}",
        "- - -",
    ],
)
def test_no_item_is_passed_by_a_reply_that_answers_nothing(reply):
    assert [i.id for i in CAPABILITY if i.grade(reply).correct] == []


@pytest.mark.parametrize("id", [i for i in ITEMS if isinstance(ITEMS[i].grader, Number)])
def test_numbers_are_not_passed_by_listing_or_by_repeating_the_question(id):
    item, value = ITEMS[id], int(ITEMS[id].grader.value)
    near = range(value - 3, value + 1)
    for listing in (
        ", ".join(map(str, near)),
        " ".join(map(str, near)),
        "\n".join(map(str, near)),
        f"{value - 1} or {value}",
        f"{value} or {value + 1}",
    ):
        assert not item.grade(listing).correct, listing
    assert not item.grade(item.prompt).correct


@pytest.mark.parametrize("id", [i for i in ITEMS if not isinstance(ITEMS[i].grader, Number)])
def test_the_prompt_itself_is_not_a_right_answer(id):
    assert not ITEMS[id].grade(ITEMS[id].prompt).correct


@pytest.mark.parametrize("id", WRONG_WHEN_RUN)
def test_code_is_only_told_apart_from_wrong_code_by_running_it(id):
    item, wrong = ITEMS[id], WRONG_WHEN_RUN[id]
    assert item.grade(wrong).correct and item.grade(wrong).detail == "parsed, not run"
    assert not item.grade(wrong, execute_code=guards.BEST).correct
    graded = item.grade(EXAMPLES[id][0][0], execute_code=guards.BEST)
    assert graded.correct, graded.detail
