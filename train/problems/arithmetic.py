"""Arithmetic in several steps, with every step written out: a chain of thought that can be checked.

    prompt    (47-8)*3+12=
    solution  47-8=39;39*3=117;117+12=129;129

**Prompts** are random trees of `level` operations, 1 to 6, on whole numbers from 1 to 99. A product
has a factor from 2 to 9 that stands in the prompt, so each step is one that a person does in their
head. Brackets stand where precedence (`*` before `+` and `-`, then left to right) would build
another tree, and nowhere else: prompts and trees correspond one to one. All intermediate values are
from -9999 to 9999.

**Solutions** do, again and again, the leftmost operation of which both operands are numbers by then
(the tree in post-order). The last field is the answer. A negative number is written with its sign
and without brackets: "3-8=-5;7--5=12;12".

A prompt has at most 5 level + 1 characters, a solution at most 18 level + 5. Its prompt decides the
split of a problem. At level 1 there are about 21 000 prompts, so long runs see them all, many times
over.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from train.problems.vocabulary import Problem, Verdict, check_request, split_of

LEVELS = range(1, 7)
"""The levels: numbers of operations."""

_LARGEST_OPERAND = 99
_LARGEST_FACTOR = 9
_LARGEST_VALUE = 9999
_LONGEST_PROMPT, _LONGEST_ANSWER = 64, 4096  # characters that `verify` looks at

_EXPRESSION = re.compile(r"[0-9+\-*()]+=")
_TOKEN = re.compile(r"[0-9]+|[-+*()]")
_PRECEDENCE = {"(": 0, ")": 1, "+": 2, "-": 2, "*": 3}
_NUMBER = 4  # precedence of what never needs brackets

type _Value = tuple[int, int | None]
"""A number, and the index of the operation that gives it; None if the prompt does."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Operation:
    """One step: its equation, its result, and the operations that must come before it."""

    equation: str
    result: int
    needs: frozenset[int]


def arithmetic(level: int, number: int, seed: int = 0, split: str = "train") -> Problem:
    """Makes one problem, a function of its arguments and of nothing else.

    Args:
        level: One of `LEVELS`.
        number: Which problem, from 0. Different numbers may give the same one.
        seed: Not negative; another seed gives other problems of the same split.
        split: One of `SPLITS`.

    Returns:
        The problem.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_request(level, LEVELS, number, seed, split)
    generator = np.random.default_rng((seed, level, number))
    while True:
        prompt = _grow(level, iter(generator.random(4 * level).tolist()))[0] + "="
        if split_of(prompt) == split:
            operations, value = _parse(prompt)
            if all(abs(operation.result) <= _LARGEST_VALUE for operation in operations):
                fields = [operation.equation for operation in operations]
                return Problem("arithmetic", level, prompt, ";".join([*fields, str(value)]))


def verify(prompt: str, answer: str) -> Verdict:
    """Checks an answer exactly; the longest garbage takes milliseconds and raises nothing.

    Numbers must be written as solutions write them: without spaces, "+" or leading zeros.

    Args:
        prompt: A prompt, not necessarily one that `arithmetic` makes, of up to 64 characters.
        answer: A chain and a final field, up to where the model ended it.

    Returns:
        `correct` if the final field is the value of the prompt. `steps_correct` if the fields
        before it do all operations of the prompt and no others, with the right results, in any
        order in which operands are known when they are used. Neither depends on the other.
    """
    try:
        operations, value = _parse(prompt)
    except ValueError as error:
        return Verdict(False, False, str(error))
    if len(answer) > _LONGEST_ANSWER:
        return Verdict(False, False, f"the answer has more than {_LONGEST_ANSWER} characters")
    *steps, final = answer.split(";")
    reason = _find_wrong_step(operations, steps)
    steps_correct, correct = not reason, final == str(value)
    if steps_correct and not correct:
        reason = f"the final field must be {value}, got {final[:20]!r}"
    return Verdict(correct, steps_correct, reason)


def _find_wrong_step(operations: Sequence[_Operation], steps: Sequence[str]) -> str:
    """What is wrong with the chain first; empty if nothing is."""
    # Two operations may have one equation, and then a step may be either: keep every possibility.
    possible = {frozenset[int]()}
    for step in steps:
        possible = {
            done | {index}
            for done in possible
            for index, operation in enumerate(operations)
            if operation.equation == step and index not in done and operation.needs <= done
        }
        if not possible:
            return f"the step {step[:40]!r} is wrong or does not follow"
    if len(steps) < len(operations):
        return f"the chain must have {len(operations)} steps, got {len(steps)}"
    return ""


def _grow(operations: int, shares: Iterator[float]) -> tuple[str, int]:
    """A random expression and the precedence of its last operation; takes numbers in [0, 1)."""
    if operations == 0:
        return str(1 + int(next(shares) * _LARGEST_OPERAND)), _NUMBER
    symbol, share = "+-*"[int(next(shares) * 3)], next(shares)
    if symbol == "*":
        factor = str(2 + int(next(shares) * (_LARGEST_FACTOR - 1)))
        terms = [_grow(operations - 1, shares), (factor, _NUMBER)]
        if share < 0.5:
            terms.reverse()
    else:
        on_the_left = int(share * operations)
        terms = [_grow(on_the_left, shares), _grow(operations - 1 - on_the_left, shares)]
    (left, before), (right, after) = terms
    precedence = _PRECEDENCE[symbol]
    left = f"({left})" if before < precedence else left
    right = f"({right})" if after <= precedence else right
    return f"{left}{symbol}{right}", precedence


def _parse(prompt: str) -> tuple[list[_Operation], int]:
    """The operations of a prompt in canonical order, and its value; ValueError if it has none.

    Dijkstra's shunting yard: an operation is done as soon as what follows it binds no tighter.
    """
    if len(prompt) > _LONGEST_PROMPT or not _EXPRESSION.fullmatch(prompt):
        raise ValueError(f"the prompt must be an expression and '=', got {prompt[:40]!r}")
    values: list[_Value] = []
    symbols = ["("]  # closed by the bracket that is added to the end
    operations: list[_Operation] = []
    wants_value = True
    for token in [*_TOKEN.findall(prompt), ")"]:
        is_number = token.isdigit()
        if wants_value != (is_number or token == "(") or not symbols:
            raise ValueError(f"the prompt must be well formed, got {prompt!r}")
        if is_number:
            values.append((int(token), None))
            wants_value = False
        elif token == "(":
            symbols.append(token)
        else:
            while _PRECEDENCE[symbols[-1]] >= _PRECEDENCE[token]:
                right, left = values.pop(), values.pop()
                operations.append(_operate(left, symbols.pop(), right))
                values.append((operations[-1].result, len(operations) - 1))
            if token == ")":
                symbols.pop()
            else:
                symbols.append(token)
                wants_value = True
    if symbols:
        raise ValueError(f"the prompt must close all its brackets, got {prompt!r}")
    return operations, values[0][0]


def _operate(left: _Value, symbol: str, right: _Value) -> _Operation:
    """Does one operation."""
    (a, source_a), (b, source_b) = left, right
    result = a + b if symbol == "+" else a - b if symbol == "-" else a * b
    needs = frozenset(source for source in (source_a, source_b) if source is not None)
    return _Operation(f"{a}{symbol}{b}={result}", result, needs)
