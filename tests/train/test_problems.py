"""Arithmetic and Sudokus: vocabulary, exact checks, unique solutions, splits, determinism."""

import ast
import itertools
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from train.problems import (
    CHARACTERS,
    EOS,
    MASK,
    PAD,
    SPLITS,
    Problem,
    Verdict,
    Vocabulary,
    arithmetic,
    sudoku,
)
from train.problems.sudoku_solver import count_solutions, parse_grid, solutions, write_grid
from train.problems.vocabulary import split_of

TASKS = {"arithmetic": (arithmetic, arithmetic.arithmetic), "sudoku": (sudoku, sudoku.sudoku)}
each_task = pytest.mark.parametrize("task", TASKS)
each_arithmetic_level = pytest.mark.parametrize("level", arithmetic.LEVELS)
each_sudoku_level = pytest.mark.parametrize("level", sudoku.LEVELS)


# Vocabulary


def test_texts_survive_encoding():
    vocabulary = Vocabulary()
    ids = vocabulary.encode(CHARACTERS)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(range(2, vocabulary.size))
    assert vocabulary.decode(ids) == CHARACTERS
    assert vocabulary.encode("").shape == (0,)
    assert vocabulary.decode(vocabulary.encode("")) == vocabulary.decode([]) == ""


def test_decoding_stops_at_the_end_and_shows_masks():
    vocabulary = Vocabulary()
    one, two = vocabulary.encode("12").tolist()
    assert (PAD, EOS, MASK) == (0, 0, 1)
    assert vocabulary.decode([one, MASK, two, EOS, two, EOS, 999, -1]) == "1_2"
    assert vocabulary.decode(np.array([EOS, one], np.uint8)) == ""


def test_problems_use_every_character_but_the_separators():
    problems = [make(level, 0) for module, make in TASKS.values() for level in module.LEVELS]
    used = set().union(*(problem.prompt + problem.solution for problem in problems))
    assert used == set(CHARACTERS) - {" ", "\n"}


@pytest.mark.parametrize("text", ["1+x=", "1_2", "\u0661", "1\0"])
def test_unknown_characters_are_named(text):
    with pytest.raises(ValueError, match="must consist of the characters '0123") as error:
        Vocabulary().encode(text)
    assert str(error.value).endswith(f"got {next(c for c in text if c not in CHARACTERS)!r}")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([2, Vocabulary.size], f"from 0 to {Vocabulary.size - 1}, got {Vocabulary.size}"),
        ([-1], "got -1"),
        ([[2]], r"integers of shape \(tokens,\), got int64 of shape \(1, 1\)"),
        (np.int32(2), r"got int32 of shape \(\)"),
        ([2.0], r"got float64 of shape \(1,\)"),
    ],
)
def test_wrong_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary().decode(ids)


# All problems


@each_task
def test_solutions_are_accepted(task):
    module, make = TASKS[task]
    for level, split, number in itertools.product(module.LEVELS, SPLITS, range(4)):
        problem = make(level, number, split=split)
        assert (problem.task, problem.level) == (task, level)
        assert module.verify(problem.prompt, problem.solution) == Verdict(True, True)


def test_problems_never_change():
    assert arithmetic.arithmetic(6, 0) == Problem(
        "arithmetic",
        6,
        "63*6-3*(57+(79-2*29))=",
        "63*6=378;2*29=58;79-58=21;57+21=78;3*78=234;378-234=144;144",
    )
    assert sudoku.sudoku(5, 0).prompt == (
        ".5.4.97...1.2...9.9.3.7....5....2...23.9..5.7..8..7..2.473....8.928.6.71......3.."
    )


@each_task
def test_problems_depend_on_arguments_only(task):
    make = TASKS[task][1]
    requests = [(level, number, seed) for level in (1, 3) for number in (0, 9) for seed in (0, 1)]
    requests = [(*request, split) for request in requests for split in ("train", "test")]
    problems = [make(*request) for request in requests]
    assert len(set(problems)) == len(problems)
    for request, problem in random.Random(0).sample(list(zip(requests, problems, strict=True)), 8):
        assert make(*request) == problem


@each_task
def test_other_processes_make_the_same_problems(task):
    code = f"from train.problems.{task} import *; print({task}(2, 5), {task}(2, 5, 1, 'test'))"
    make = TASKS[task][1]
    for hash_seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout == f"{make(2, 5)} {make(2, 5, 1, 'test')}\n"


@each_task
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "level must be one of 1, 2, 3, 4, 5.*, got 0"),
        ((7, 0), "got 7"),
        ((1, -1), "number must not be negative, got -1"),
        ((1, 0, -2), "seed must not be negative, got -2"),
        ((1, 0, 0, "tests"), "split must be one of train, validation, test, got 'tests'"),
    ],
)
def test_wrong_requests_are_refused(task, arguments, message):
    with pytest.raises(ValueError, match=message):
        TASKS[task][1](*arguments)


@each_task
def test_garbage_is_wrong(task):
    module, make = TASKS[task]
    generator = random.Random(7)
    prompt = make(3, 0).prompt
    alphabet = CHARACTERS + "_ab\0\u0663\u00b2\ud800\U0001f600"
    garbage = ["", "_" * 81, ";" * 4000, "9" * 10**6, "\u0661" * 81, "-", "0" * 81, "1;" * 10**6]
    garbage += ["".join(generator.choices(alphabet, k=generator.randrange(90))) for _ in range(500)]
    garbage += [make(3, 0).solution + "\n", make(3, 0).solution + "_"]
    for text in garbage:
        for verdict in (module.verify(prompt, text), module.verify(text, text)):
            assert not verdict.correct
            assert 0 < len(verdict.reason) < 400
        assert not module.verify(text, make(3, 0).solution).correct


# Arithmetic


def solve(expression):
    """The chain of an expression in post-order, by Python's own parser."""
    steps = []

    def value(node):
        if isinstance(node, ast.Constant):
            return node.value
        left, right = value(node.left), value(node.right)
        symbol, result = {
            ast.Add: ("+", left + right),
            ast.Sub: ("-", left - right),
            ast.Mult: ("*", left * right),
        }[type(node.op)]
        steps.append(f"{left}{symbol}{right}={result}")
        return result

    return steps, value(ast.parse(expression, mode="eval").body)


@each_arithmetic_level
def test_solutions_are_what_python_computes(level):
    for number in range(400):
        problem = arithmetic.arithmetic(level, number, seed=3)
        assert problem.prompt.endswith("=")
        steps, value = solve(problem.prompt[:-1])
        assert len(steps) == level
        assert problem.solution == ";".join([*steps, str(value)])
        assert all(-9999 <= int(step.split("=")[1]) <= 9999 for step in steps)
        assert len(problem.prompt) <= 5 * level + 1
        assert len(problem.solution) <= 18 * level + 5


def test_brackets_stand_only_where_they_must():
    for number in range(400):
        expression = arithmetic.arithmetic(6, number).prompt[:-1]
        assert ast.unparse(ast.parse(expression)).replace(" ", "") == expression


def test_operands_symbols_and_shapes_vary():
    prompts = [arithmetic.arithmetic(3, number).prompt for number in range(2000)]
    assert len(set(prompts)) > 1990
    numbers = {
        int(word)
        for text in prompts
        for word in text.translate(str.maketrans("+-*()=", " " * 6)).split()
    }
    assert numbers == set(range(1, 100))
    shapes = {
        "".join("n" if c.isdigit() else c for c in text).replace("nn", "n") for text in prompts
    }
    assert len(shapes) > 60
    for symbol in "+-*":
        assert 1500 < sum(text.count(symbol) for text in prompts) < 2500


def test_arithmetic_splits_are_disjoint():
    prompts = {
        split: {
            arithmetic.arithmetic(level, number, seed, split).prompt
            for level in (1, 2)
            for number in range(300)
            for seed in (0, 1)
        }
        for split in SPLITS
    }
    for first, second in itertools.combinations(SPLITS, 2):
        assert not prompts[first] & prompts[second]
    for split in SPLITS:
        assert {split_of(prompt) for prompt in prompts[split]} == {split}


def test_split_shares():
    splits = [split_of(f"{a}+{b}=") for a in range(1, 100) for b in range(1, 100)]
    shares = {split: splits.count(split) / len(splits) for split in SPLITS}
    assert shares == pytest.approx({"train": 0.9, "validation": 0.05, "test": 0.05}, abs=0.01)


@pytest.mark.parametrize(
    ("answer", "correct", "steps_correct", "reason"),
    [
        ("47-8=39;39*3=117;117+12=129;129", True, True, ""),
        ("47-8=39;39*3=117;117+12=129;128", False, True, "must be 129, got '128'"),
        ("47-8=39;39*3=117;117+12=129;0129", False, True, "got '0129'"),
        ("47-8=39;39*3=117;117+12=129;129 ", False, True, "got '129 '"),
        ("47-8=39;39*3=118;118+12=129;129", True, False, "step '39*3=118' is wrong"),
        ("47-8=39;39*3=117;129", True, False, "must have 3 steps, got 2"),
        ("129", True, False, "must have 3 steps, got 0"),
        ("39*3=117;47-8=39;117+12=129;129", True, False, "'39*3=117' is wrong or does not follow"),
        ("47-8=39;39*3=117;117+12=129;1+1=2;129", True, False, "'1+1=2' is wrong or does not"),
        ("47-8=39;47-8=39;39*3=117;117+12=129;129", True, False, "'47-8=39' is wrong or"),
        ("47-8=39;3*39=117;117+12=129;129", True, False, "'3*39=117' is wrong or"),
        ("47-8=39;39*3=117;117+12=129;129;", False, False, "'129' is wrong or does not follow"),
        ("4_-8=39;39*3=117;117+12=129;_29", False, False, "'4_-8=39' is wrong"),
    ],
)
def test_arithmetic_verdicts(answer, correct, steps_correct, reason):
    verdict = arithmetic.verify("(47-8)*3+12=", answer)
    assert (verdict.correct, verdict.steps_correct) == (correct, steps_correct)
    assert reason in verdict.reason
    assert bool(reason) == bool(verdict.reason)


def test_long_answers_are_not_looked_at():
    verdict = arithmetic.verify("1+2=", "1+2=3;" * 1000 + "3")
    assert verdict == Verdict(False, False, "the answer has more than 4096 characters")


def all_chains(tree):
    """All orders in which a tree of (left, symbol, right) can be reduced, as tuples of steps."""
    if isinstance(tree, int):
        return {()}
    chains = set()
    for equation, smaller in reductions(tree):
        chains |= {(equation, *rest) for rest in all_chains(smaller)}
    return chains


def reductions(tree):
    left, symbol, right = tree
    if isinstance(left, int) and isinstance(right, int):
        result = {"+": left + right, "-": left - right, "*": left * right}[symbol]
        yield f"{left}{symbol}{right}={result}", result
    if not isinstance(left, int):
        yield from ((text, (smaller, symbol, right)) for text, smaller in reductions(left))
    if not isinstance(right, int):
        yield from ((text, (left, symbol, smaller)) for text, smaller in reductions(right))


@pytest.mark.parametrize(
    ("prompt", "tree"),
    [
        ("(1+2)*4-(1+2)*5=", (((1, "+", 2), "*", 4), "-", ((1, "+", 2), "*", 5))),
        ("1*1*(1*1)+(1-1)=", (((1, "*", 1), "*", (1, "*", 1)), "+", (1, "-", 1))),
        ("3-8-(1-6)=", ((3, "-", 8), "-", (1, "-", 6))),
    ],
)
def test_every_order_that_works_is_accepted_and_no_other(prompt, tree):
    valid = all_chains(tree)
    assert len(valid) > 1
    for steps in set(itertools.permutations(next(iter(valid)))):
        verdict = arithmetic.verify(prompt, ";".join([*steps, "0"]))
        assert verdict.steps_correct == (steps in valid), steps


def test_one_changed_character_is_noticed():
    generator = random.Random(1)
    for number in range(300):
        problem = arithmetic.arithmetic(1 + number % 6, number)
        place = generator.randrange(len(problem.solution))
        for character in CHARACTERS.replace(problem.solution[place], "") + "_":
            answer = problem.solution[:place] + character + problem.solution[place + 1 :]
            verdict = arithmetic.verify(problem.prompt, answer)
            assert not (verdict.correct and verdict.steps_correct), answer
            assert verdict.correct == (answer.split(";")[-1] == problem.solution.split(";")[-1])


@pytest.mark.parametrize(
    "prompt",
    [
        *("", "=", "1+", "1+=", "+1=", "-1=", "1+2", "(1+2=", "1+2)=", "1)+(2=", "()=", "1(2)="),
        *("1/1=", "1**2=", "1==", "1+2=3", "1 +1=", "1+2=\n", "\u0661+1=", "a+1="),
        *("(" * 63 + "=", "1" * 64 + "="),
    ],
)
def test_prompts_that_are_none_are_refused(prompt):
    for answer in ("3", "1", "1+2=3;3", ""):
        verdict = arithmetic.verify(prompt, answer)
        assert (verdict.correct, verdict.steps_correct) == (False, False)
        assert "the prompt must" in verdict.reason


def test_prompts_of_other_shapes_are_checked():
    assert arithmetic.verify("((7))=", "7") == Verdict(True, True)
    assert arithmetic.verify("2*((3+4))=", "3+4=7;2*7=14;14") == Verdict(True, True)
    large = "9" * 30
    product = str(int(large) ** 2)
    answer = f"{large}*{large}={product};{product}"
    assert arithmetic.verify(f"{large}*{large}=", answer) == Verdict(True, True)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("term", ["(1+1)", "(1*1)"])
def test_many_equal_steps_do_not_hang(term):
    prompt = "*".join([term] * 10) + "="
    steps, value = solve(prompt[:-1])
    first = [step for step in steps if step == f"{term[1:-1]}={eval(term)}"]
    assert arithmetic.verify(prompt, ";".join([*steps, str(value)])) == Verdict(True, True)
    assert not arithmetic.verify(prompt, ";".join(first * 30)).steps_correct


# Sudoku


UNITS = [[(r, c) for c in range(9)] for r in range(9)]
UNITS += [[(r, c) for r in range(9)] for c in range(9)]
UNITS += [[(3 * a + i // 3, 3 * b + i % 3) for i in range(9)] for a in range(3) for b in range(3)]


def count_slowly(rows):
    """The number of solutions, by trying out digits in the cell with the fewest candidates."""
    for unit in UNITS:
        digits = [rows[r][c] for r, c in unit if rows[r][c] != "."]
        if len(set(digits)) != len(digits):
            return 0
    choices = {
        (r, c): set("123456789") - {rows[y][x] for unit in UNITS if (r, c) in unit for y, x in unit}
        for r in range(9)
        for c in range(9)
        if rows[r][c] == "."
    }
    if not choices:
        return 1
    (r, c), digits = min(choices.items(), key=lambda item: len(item[1]))
    total = 0
    for digit in digits:
        rows[r][c] = digit
        total += count_slowly(rows)
    rows[r][c] = "."
    return total


def rows_of(grid):
    return [list(grid[start : start + 9]) for start in range(0, 81, 9)]


def disguise(grid, generator):
    """The grid with permuted rows, columns and digits, perhaps transposed."""
    array = np.array(rows_of(grid))
    for _ in range(2):
        order = [
            3 * band + row for band in generator.permutation(3) for row in generator.permutation(3)
        ]
        array = array[order].T
    digits = generator.permutation(9) + 1
    array = digits[array.astype(int) - 1]
    return "".join(map(str, (array.T if generator.random() < 0.5 else array).flat))


@each_sudoku_level
def test_sudokus_have_one_solution(level):
    for number in range(60):
        problem = sudoku.sudoku(level, number, seed=5)
        assert len(problem.prompt) == len(problem.solution) == 81
        assert problem.prompt.count(".") == sudoku.LEVELS[level]
        assert count_solutions(problem.prompt) == 1
        assert [write_grid(planes) for planes in solutions(parse_grid(problem.prompt))] == [
            problem.solution
        ]
        rows = rows_of(problem.solution)
        assert all(sorted(rows[r][c] for r, c in unit) == list("123456789") for unit in UNITS)
    assert count_slowly(rows_of(problem.prompt)) == 1


def test_solver_counts_as_a_slow_one_does():
    generator = random.Random(2)
    counts = set()
    for number in range(24):
        cells = list(sudoku.sudoku(4, number).prompt)
        for cell in generator.sample([cell for cell in range(81) if cells[cell] != "."], 3):
            cells[cell] = "."
        if number % 4 == 0:
            cells[generator.randrange(81)] = generator.choice("123456789")
        grid = "".join(cells)
        counts.add(expected := count_slowly(rows_of(grid)))
        assert count_solutions(grid, limit=1000) == expected
        assert count_solutions(grid) == min(2, expected)
    assert {0, 1, 2} < counts


@pytest.mark.parametrize(
    ("grid", "expected"),
    [("." * 81, 2), ("11" + "." * 79, 0), ("12345678." + "." * 8 + "9" + "." * 63, 0)],
)
def test_extreme_grids_are_counted(grid, expected):
    assert count_solutions(grid) == expected


@pytest.mark.parametrize("grid", ["", "0" * 81, "1" * 82, "\u0661" * 81])
def test_what_is_no_grid_is_not_counted(grid):
    with pytest.raises(ValueError, match=r"must be 81 characters from 1 to 9 and '\.', got "):
        count_solutions(grid)


def test_search_gives_up_where_no_cells_can_be_emptied():
    generator = np.random.default_rng(0)
    grid = sudoku._random_grid(generator)
    assert sudoku._choose_empty(grid, 65, generator) is None  # 16 givens never suffice


def test_grids_and_empty_cells_vary():
    problems = [sudoku.sudoku(2, number) for number in range(600)]
    assert len({sudoku.family(problem.solution) for problem in problems}) > 590
    digits = np.array([list(problem.solution) for problem in problems])
    empty = np.array([list(problem.prompt) for problem in problems]) == "."
    for digit in "123456789":  # 5 standard deviations
        np.testing.assert_allclose((digits == digit).mean(0), 1 / 9, atol=0.065)
    np.testing.assert_allclose(empty.mean(0), 30 / 81, atol=0.1)


def test_disguises_stay_in_their_split():
    generator = np.random.default_rng(4)
    for number in range(40):
        solution = sudoku.sudoku(1, number).solution
        twins = {disguise(solution, generator) for _ in range(5)}
        assert solution not in twins
        assert {sudoku.family(twin) for twin in twins} == {sudoku.family(solution)}


def test_sudoku_splits_are_disjoint():
    families = {
        split: {sudoku.family(sudoku.sudoku(1, number, split=split).solution) for number in numbers}
        for split, numbers in zip(SPLITS, (range(200), range(25), range(25)), strict=True)
    }
    for split in SPLITS:
        assert {split_of(text) for text in families[split]} == {split}
    assert not families["train"] & (families["validation"] | families["test"])


def test_family_of_no_solution_is_refused():
    with pytest.raises(ValueError, match="must be a solved Sudoku: row 1 must hold 1 to 9"):
        sudoku.family("1" * 81)


def swap(text, *cells):
    characters = list(text)
    for first, second in cells:
        characters[first], characters[second] = characters[second], characters[first]
    return "".join(characters)


def test_sudoku_verdicts():
    problem = sudoku.sudoku(5, 1)
    prompt, solution = problem.prompt, problem.solution
    given = next(cell for cell in range(81) if prompt[cell] != ".")
    other = "1" if prompt[given] != "1" else "2"
    changed = solution[:given] + other + solution[given + 1 :]
    place = f"row {given // 9 + 1}, column {given % 9 + 1} must stay {prompt[given]}, got {other}"
    assert sudoku.verify(prompt, changed) == Verdict(False, False, place)
    for answer in (solution[:80], solution + "1", prompt, solution[:80] + "_"):
        assert "the answer must be 81 characters" in sudoku.verify(prompt, answer).reason
    for wrong in ("", prompt[1:], prompt.replace(".", "0"), prompt[:80] + "="):
        assert "the prompt must be 81 characters" in sudoku.verify(wrong, solution).reason
    # Rows alone, columns alone and boxes alone are not enough.
    empty = "." * 81
    assert "row 1 must" in sudoku.verify(empty, swap(solution, (0, 9))).reason
    assert "column 1 must" in sudoku.verify(empty, swap(solution, (0, 1))).reason
    rotated = "".join("123456789"[(column + row) % 9] for row in range(9) for column in range(9))
    assert sudoku.verify(empty, rotated).reason == "box 1 must hold 1 to 9 once each"


def test_any_solution_is_accepted():
    generator = np.random.default_rng(0)
    for number in range(20):
        assert sudoku.verify(
            "." * 81, disguise(sudoku.sudoku(1, number).solution, generator)
        ).correct
