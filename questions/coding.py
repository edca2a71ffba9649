"""The grader of Python functions: found in a reply, parsed, and run only where that is asked for.

A reply is untrusted text. Nothing of it is evaluated here; `Code.grade(..., execute=True)` runs it in a
separate, limited process (sandbox.py).
"""

from __future__ import annotations

import ast
import math
import re
import symtable
import warnings
from dataclasses import dataclass

from questions.grading import Grade, answer_part
from questions.sandbox import Execute, run_limited
from questions.thoughts import without_thought

MAX_CODE = 10_000  # characters of a reply that are read as code


def _parse(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _longest_module(source: str) -> ast.Module | None:
    """The longest run of lines from the first definition or import on that parses: prose after the code is
    left out."""
    lines = source[:MAX_CODE].splitlines()[:200]
    start = next((i for i, line in enumerate(lines) if re.match(r"def |class |import |from |@", line)), None)
    if start is None:
        return None
    ends = range(len(lines), start, -1)
    return next((m for end in ends if (m := _parse("\n".join(lines[start:end]))) is not None), None)


FENCE = re.compile(r"(```+|~~~+)[\w+#.-]*[ \t]*$")  # opens a block of code where it ends a line


def fenced_blocks(text: str) -> list[str]:
    """The texts of the fenced blocks, without the indentation of their fences; the last may lack its end.

    As in CommonMark a fence that stands four columns further in than the opening one closes nothing: it is
    part of the code, such as an example in a docstring.
    """
    blocks: list[str] = []
    lines: list[str] = []
    mark, indent = "", 0
    for line in text.splitlines():
        column = len(line) - len(line.lstrip())
        if not mark:
            if opening := FENCE.search(line):
                mark, lines = opening[1], []
                indent = column if opening.start() == column else 0
            continue
        is_fence = line.strip().startswith(mark) and column < indent + 4
        if is_fence or (line.rstrip().endswith(mark) and line.strip() != mark):
            before = "" if is_fence else line.rstrip().removesuffix(mark)
            blocks.append("\n".join([*lines, before]))
            mark = ""
        else:
            lines.append(line[min(column, indent) :])
    return blocks + (["\n".join(lines)] if mark else [])


def _needed(body: list[ast.stmt], function: str) -> list[ast.stmt]:
    """The imports, definitions and assignments of a module's top level that a function makes use of, directly
    or through one another, in order."""
    bound = {index: names for index, node in enumerate(body) if (names := _binds(node)) is not None}
    kept: set[int] = set()
    wanted = ["*", function]  # "*": what binds names that it does not tell
    while wanted:
        name = wanted.pop()
        for index in [i for i, names in bound.items() if name in names and i not in kept]:
            kept.add(index)
            wanted += _reads(body[index])
    return [body[index] for index in sorted(kept)]


def _reads(node: ast.stmt) -> set[str]:
    """The names of the top level that a statement reads, in functions within it too; theirs are left out."""
    try:
        tables = [symtable.symtable(ast.unparse(node), "<answer>", "exec")]
    except (SyntaxError, ValueError, RecursionError):
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    names = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_referenced()}
    for table in tables:
        tables += table.get_children()
        names |= {s.get_name() for s in table.get_symbols() if s.is_global()}
    return names


def _binds(node: ast.stmt) -> set[str] | None:
    """The names that a statement of a kind that is kept binds; None for the other kinds."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return {"*"}
        return {a.asname or a.name.partition(".")[0] for a in node.names}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return None


@dataclass(frozen=True)
class Code:
    """A Python function of this name with this many positional arguments, from a fenced block or bare text.

    Without `execute` the grade is syntactic and its detail says "parsed, not run": the text parses, the
    function is defined at the top level, uses one of its arguments and returns a value. With it, the
    function's outputs on `cases` ((args, expected), ...) are compared here, in the parent. Examples at the
    top level are never run: only imports, definitions and assignments that the function makes use of are.
    """

    function: str
    arguments: int
    cases: tuple[tuple[tuple, object], ...]

    def grade(self, reply: str, execute: Execute = False) -> Grade:
        blocks = fenced_blocks(without_thought(reply)[:MAX_CODE]) or [answer_part(reply)]
        for module in filter(None, map(_longest_module, blocks)):
            functions = [n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == self.function]
            if functions:
                break
        else:
            return Grade(False, f"no function {self.function} that parses")
        a = functions[-1].args
        most, fewest = len(a.posonlyargs) + len(a.args), len(a.posonlyargs) + len(a.args) - len(a.defaults)
        if not fewest <= self.arguments <= (math.inf if a.vararg else most) or any(
            d is None for d in a.kw_defaults
        ):
            return Grade(False, f"{self.function} does not take {self.arguments} arguments")
        names = {p.arg for p in [*a.posonlyargs, *a.args, *filter(None, [a.vararg])]}
        nodes = [n for statement in functions[-1].body for n in ast.walk(statement)]
        if not any(isinstance(n, ast.Name) and n.id in names for n in nodes):
            return Grade(False, f"{self.function} ignores its arguments")
        if not any(isinstance(n, ast.Return) and n.value is not None for n in nodes):
            return Grade(False, f"{self.function} returns nothing")
        if not execute:
            return Grade(True, "parsed, not run")
        module.body = _needed(module.body, self.function)
        try:
            source = ast.unparse(module)
        except RecursionError:
            return Grade(False, "nested too deeply to run")
        calls = [args for args, _ in self.cases]
        outputs, why = run_limited(source, self.function, calls, execute=execute)
        if outputs is None:
            return Grade(False, f"run: {why}")
        passed = sum(ok and same(out, want) for (ok, out), (_, want) in zip(outputs, self.cases, strict=True))
        return Grade(passed == len(self.cases), f"run: {passed} of {len(self.cases)} cases right")


def same(got: object, want: object) -> bool:
    """Equality of decoded JSON values that keeps True apart from 1."""
    if isinstance(want, list):
        return isinstance(got, list) and len(got) == len(want) and all(map(same, got, want))
    return type(got) is type(want) and got == want
