"""The capability battery: short questions with one right answer each, and the grader that decides.

Five categories, from items that a 135M model can get right to items that only a large one does. Prompts ask
for short answers, so that the budget in new tokens is small and a changed model is not penalized for its
manners. The items marked `published_like` are six of the kinds (math, reasoning, code, instruction) behind
the published "capability of 6" column; they are ours, not the published ones, so the two scores are alike in
kind only.
"""

from __future__ import annotations

from dataclasses import dataclass

from questions.coding import Code
from questions.grading import Choice, CommaList, Exact, Grade, JsonObject, Matches, Number, Shape
from questions.sandbox import Execute
from questions.thoughts import without_thought

CATEGORIES = ("arithmetic", "reasoning", "instruction_following", "format", "code")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
Grader = Choice | Code | CommaList | Exact | JsonObject | Matches | Number | Shape


@dataclass(frozen=True)
class CapabilityItem:
    id: str
    category: str
    prompt: str
    grader: Grader
    max_new_tokens: int
    published_like: bool = False

    def grade(self, reply: str, execute_code: Execute = False) -> Grade:
        """Grades a reply without the thought that it may begin with; `execute_code` runs code answers in a
        limited process instead of only parsing them."""
        reply = without_thought(reply)
        if isinstance(self.grader, Code):
            return self.grader.grade(reply, execute=execute_code)
        return self.grader.grade(reply)


def _arithmetic(id: str, question: str, value: float, published_like: bool = False) -> CapabilityItem:
    prompt = f"{question} Reply with just the number."
    return CapabilityItem(f"arithmetic-{id}", "arithmetic", prompt, Number(value), 24, published_like)


def _reasoning(id: str, prompt: str, grader: Grader, published_like: bool = False) -> CapabilityItem:
    return CapabilityItem(f"reasoning-{id}", "reasoning", prompt, grader, 48, published_like)


def _instruction(id: str, prompt: str, grader: Grader, published_like: bool = False) -> CapabilityItem:
    return CapabilityItem(f"instruction-{id}", "instruction_following", prompt, grader, 32, published_like)


def _format(id: str, prompt: str, grader: Grader) -> CapabilityItem:
    return CapabilityItem(f"format-{id}", "format", prompt, grader, 32)


def _code(
    id: str, task: str, function: str, arguments: int, cases: tuple, published_like: bool = False
) -> CapabilityItem:
    prompt = f"Write a Python function {task} Reply with only the code, without comments or examples."
    return CapabilityItem(f"code-{id}", "code", prompt, Code(function, arguments, cases), 96, published_like)


def _day(answer: str) -> Choice:
    return Choice((answer,), tuple(d for d in DAYS if d != answer))


_JUST = "Reply with just the number."

CAPABILITY: tuple[CapabilityItem, ...] = (
    _arithmetic("add-small", "What is 2 + 3?", 5),
    _arithmetic("add-carry", "What is 7 + 8?", 15),
    _arithmetic("subtract-small", "What is 9 - 4?", 5),
    _arithmetic("times-table", "What is 6 times 7?", 42),
    _arithmetic("divide", "What is 72 divided by 9?", 8),
    _arithmetic("add-two-digits", "What is 46 + 29?", 75, published_like=True),
    _arithmetic("subtract-two-digits", "What is 100 - 37?", 63),
    _arithmetic("add-three-digits", "What is 348 + 276?", 624),
    _arithmetic("percent", "What is 15% of 200?", 30),
    _arithmetic("square-root", "What is the square root of 169?", 13),
    _arithmetic("multiply-two-digits", "What is 23 * 17?", 391, published_like=True),
    _arithmetic("brackets", "What is (8 + 4) * 3 - 6?", 30),
    _arithmetic("precedence", "What is 144 / 12 + 5 * 3?", 27),
    _arithmetic("power", "What is 2 to the power of 11?", 2048),
    _arithmetic("negative", "What is 14 - 39?", -25),
    #
    _reasoning(
        "apples", f"Tom has 3 apples and buys 5 more. How many apples does he have now? {_JUST}", Number(8)
    ),
    _reasoning(
        "eat",
        f"There are 12 cookies on a plate. Mia eats 4 and Leo eats 3. How many are left? {_JUST}",
        Number(5),
    ),
    _reasoning(
        "shortest",
        "Anna is taller than Ben, and Ben is taller than Carl. Who is the shortest? Reply with just the"
        " name.",
        Choice(("Carl",), ("Anna", "Ben")),
        published_like=True,
    ),
    _reasoning("sequence", f"Which number comes next: 3, 6, 12, 24, ...? {_JUST}", Number(48)),
    _reasoning(
        "weekday",
        "Today is Monday. Which day of the week will it be in three days? Reply with just the day.",
        _day("Thursday"),
    ),
    _reasoning(
        "weekday-back",
        "The day after tomorrow is Sunday. Which day of the week was yesterday? Reply with just the day.",
        _day("Thursday"),
    ),
    _reasoning(
        "speed",
        "A train travels 60 kilometers an hour. How many kilometers does it travel in two and a half hours?"
        f" {_JUST}",
        Number(150),
    ),
    _reasoning(
        "bat-and-ball",
        "A bat and a ball cost 110 cents together. The bat costs 100 cents more than the ball. "
        f"How many cents does the ball cost? {_JUST}",
        Number(5),
        published_like=True,
    ),
    _reasoning(
        "machines",
        "Five machines make five parts in five minutes. How many minutes do 100 machines need for 100 parts?"
        f" {_JUST}",
        Number(5),
    ),
    _reasoning(
        "all-but",
        f"A farmer has 17 sheep. All but nine run away. How many sheep does he still have? {_JUST}",
        Number(9),
    ),
    _reasoning("legs", f"How many legs do three dogs and two birds have altogether? {_JUST}", Number(16)),
    _reasoning(
        "ages",
        f"Sam is 4 years older than Lea. Lea is 9. How old will Sam be in 6 years? {_JUST}",
        Number(19),
    ),
    _reasoning(
        "compass",
        "You face north, turn right, and then turn right again. Which direction do you face now? Reply with"
        " one word.",
        Choice(("south",), ("north", "east", "west")),
    ),
    _reasoning(
        "analogy",
        "Complete the analogy with one word: hand is to glove as foot is to",
        Choice(
            ("sock", "shoe", "boot", "slipper", "socks", "shoes"), ("hand", "leg", "toe", "ankle", "finger")
        ),
    ),
    _reasoning(
        "drawer",
        "A coin and a key lie on a table. The coin is put into the red box and the key into the blue box."
        " Then the red box is put into a drawer. Which of the two, coin or key, is in the drawer now? Reply"
        " with one word.",
        Choice(("coin",), ("key",)),
    ),
    #
    _instruction("single-word", "Reply with only the word banana.", Matches(r"(?i)banana[.!]?")),
    _instruction(
        "repeat",
        "Repeat this sentence exactly, and write nothing else: The river runs north.",
        Exact("The river runs north"),
    ),
    _instruction(
        "opposite",
        "Reply with one word only: what is the opposite of hot?",
        Matches(r"(?i)[\"']?cold[.!]?[\"']?"),
        published_like=True,
    ),
    _instruction(
        "capitals",
        "Answer in capital letters only, with one word: what is the capital of France?",
        Matches(r"PARIS[.!]?"),
    ),
    _instruction(
        "two-words",
        "Write one sentence that contains the words dog and ball.",
        Shape(words=(4, 25), sentences=1, contains=("dog", "ball"), without="contain"),
    ),
    _instruction("count", "Write the numbers from 1 to 5 on one line.", Matches(r"1,? 2,? 3,? 4,? 5\.?")),
    _instruction(
        "begin-with",
        "Start your answer with the word Yes. Is water wet?",
        Shape(words=(1, 40), sentences=1, starts="Yes", contains=("yes",)),
    ),
    _instruction(
        "past-tense",
        "Change this sentence to the past tense: I walk to school.",
        Matches(r"(?i)[\"']?I walked to school[.!]?[\"']?"),
    ),
    _instruction(
        "reverse-letters",
        "Write the first five letters of the alphabet in reverse order, without spaces, and nothing else.",
        Matches(r"(?i)edcba\.?"),
    ),
    _instruction(
        "ignore",
        "Do not answer the question that follows; reply with only the word OK instead. What is the capital of"
        " Spain?",
        Matches(r"(?i)ok[.!]?"),
    ),
    _instruction(
        "ending",
        "Write one short sentence about a dog. Its last word must be home.",
        Matches(r"(?is)(?=.*\bdogs?\b)[^.!?]{8,120}\bhome[.!]?"),
    ),
    _instruction(
        "two-sentences",
        "Write exactly two sentences about rain. Do not use the word water.",
        Shape(words=(6, 60), sentences=2, contains=("rain",), without="water"),
    ),
    _instruction(
        "third-item",
        "Here is a list: lamp, table, window, carpet. Reply with only the third item.",
        Matches(r"(?i)window[.!]?"),
    ),
    _instruction(
        "sort",
        "Sort these words alphabetically and reply with only the sorted words, separated by spaces: pear"
        " apple mango",
        Matches(r"(?i)apple mango pear\.?"),
    ),
    #
    _format(
        "comma-list",
        "Name the three primary colors of paint as one line of three words separated by commas, and write"
        " nothing else.",
        CommaList(3, ("red", "blue", "yellow")),
    ),
    _format(
        "numbered-list",
        "Write a numbered list of three fruits.",
        Matches(r"1[.)] [A-Za-z ]{3,20}\n2[.)] [A-Za-z ]{3,20}\n3[.)] [A-Za-z ]{3,20}"),
    ),
    _format(
        "letter",
        "Write a short letter that begins with Dear Anna.",
        Shape(words=(6, 200), starts="Dear Anna", contains=("dear", "anna")),
    ),
    _format(
        "table",
        "Write a table with two columns, Name and Age, in Markdown.",
        Matches(r"(?s)\| *Name *\| *Age *\|[ \t]*\n\|.*"),
    ),
    _format(
        "json-person",
        'Reply with only a JSON object with the keys "name" (the string Ada) and "age" (the number 36).',
        JsonObject((("name", "string", "Ada"), ("age", "integer", 36))),
    ),
    _format(
        "json-list",
        'Reply with only a JSON object with one key, "primes", whose value is the list of the first three'
        " prime numbers.",
        JsonObject((("primes", "list", [2, 3, 5]),)),
    ),
    _format(
        "json-boolean",
        'Is 7 a prime number? Reply with only a JSON object with the keys "number" (an integer) and "prime"'
        " (true or false).",
        JsonObject((("number", "integer", 7), ("prime", "boolean", True))),
    ),
    _format(
        "upper-sentence",
        "Write one short sentence about the sea in capital letters only.",
        Shape(words=(3, 25), sentences=1, contains=("sea",), case="upper"),
    ),
    _format(
        "five-words",
        "Write a sentence of exactly five words that contains the word river.",
        Shape(words=(5, 5), sentences=1, contains=("river",)),
    ),
    _format(
        "dashes",
        "Write the words dog, cat and bird as a list, one word on each line, each line starting with a dash"
        " and a space. Write nothing else.",
        Matches(r"(?i)- dog[ \t]*\n- cat[ \t]*\n- bird"),
    ),
    _format(
        "iso-date",
        "Write the date March 5, 2021 in the form YYYY-MM-DD, and nothing else.",
        Exact("2021-03-05"),
    ),
    _format("brackets", "Write the word sun inside square brackets, and nothing else.", Exact("[sun]")),
    _format("lower", "Write this in lower case, and nothing else: HELLO WORLD", Exact("hello world")),
    _format(
        "no-letter-e",
        "Write one sentence of at least four words that contains the word cat and does not contain the"
        " letter e.",
        Shape(words=(4, 20), sentences=1, contains=("cat",), without="e"),
    ),
    #
    _code(
        "add", "add(a, b) that returns the sum of its two arguments.", "add", 2, (((2, 3), 5), ((-4, 1), -3))
    ),
    _code(
        "is-even",
        "is_even(n) that returns True if the integer n is even and False otherwise.",
        "is_even",
        1,
        (((4,), True), ((7,), False), ((0,), True), ((-3,), False)),
    ),
    _code(
        "reverse",
        "reverse_string(s) that returns the string s reversed.",
        "reverse_string",
        1,
        ((("abc",), "cba"), (("",), "")),
    ),
    _code(
        "max-of-three",
        "max_of_three(a, b, c) that returns the largest of three numbers.",
        "max_of_three",
        3,
        (((1, 2, 3), 3), ((9, 2, 3), 9), ((1, 7, 3), 7), ((-1, -2, -3), -1)),
    ),
    _code(
        "factorial",
        "factorial(n) that returns the factorial of a non-negative integer.",
        "factorial",
        1,
        (((0,), 1), ((1,), 1), ((5,), 120), ((12,), 479001600)),
        published_like=True,
    ),
    _code(
        "count-vowels",
        "count_vowels(s) that returns how many vowels (a, e, i, o, u, in either case) the string s contains.",
        "count_vowels",
        1,
        ((("banana",), 3), (("AEIOU xyz",), 5), (("",), 0)),
    ),
    _code(
        "sum-digits",
        "sum_digits(n) that returns the sum of the decimal digits of a non-negative integer.",
        "sum_digits",
        1,
        (((0,), 0), ((1234,), 10), ((9999,), 36)),
    ),
    _code(
        "palindrome",
        "is_palindrome(s) that returns True if the string s reads the same backwards, ignoring case.",
        "is_palindrome",
        1,
        ((("Level",), True), (("levels",), False), (("",), True)),
    ),
    _code(
        "fibonacci",
        "fibonacci(n) that returns the n-th Fibonacci number, with fibonacci(0) = 0 and fibonacci(1) = 1.",
        "fibonacci",
        1,
        (((0,), 0), ((1,), 1), ((10,), 55), ((20,), 6765)),
    ),
    _code(
        "second-largest",
        "second_largest(values) that returns the second largest distinct number in a list.",
        "second_largest",
        1,
        ((([1, 2, 3],), 2), (([5, 5, 4, 1],), 4), (([-1, -5],), -5)),
    ),
    _code(
        "flatten",
        "flatten(lists) that turns a list of lists into one list, keeping the order.",
        "flatten",
        1,
        ((([[1, 2], [3], []],), [1, 2, 3]), (([],), [])),
    ),
    _code(
        "run-lengths",
        "run_lengths(s) that returns a list of [character, count] pairs for the runs of equal characters in"
        " the string s.",
        "run_lengths",
        1,
        ((("aab",), [["a", 2], ["b", 1]]), (("abba",), [["a", 1], ["b", 2], ["a", 1]]), (("",), [])),
    ),
)
