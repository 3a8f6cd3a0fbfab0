"""Problems as rows of tokens, and batches of them."""

import dataclasses

import numpy as np
import pytest

from train import problem_data
from train.problem_data import Layout, make_table, rows_of, verdict
from train.problems import EOS, Problem, Vocabulary
from train.rows import RowBatches
from train.run_folder import ConfigChangedError

TASKS = [("arithmetic", (1, 3), Layout(16, 60)), ("sudoku", (1,), Layout(81, 81))]


@pytest.mark.parametrize(("task", "levels", "layout"), TASKS)
def test_rows_hold_padded_prompts_and_solutions(task, levels, layout):
    table = make_table(task, levels, 6)
    assert table.layout == layout
    assert table.tokens.shape == (6, layout.prompt + layout.answer)
    assert [problem.level for problem in table.problems] == list(levels) * (6 // len(levels))
    for problem, row in zip(table.problems, table.tokens, strict=True):
        text = Vocabulary().decode(row)
        assert text == problem.prompt.ljust(layout.prompt) + problem.solution
        assert (row[len(text) :] == EOS).all()
        assert verdict(problem, row[layout.prompt :]).correct
        assert not verdict(problem, np.roll(row[layout.prompt :], 1)).correct
    np.testing.assert_array_equal(table.prompts, table.tokens[:, : layout.prompt])


def test_rows_can_be_whole_blocks():
    plain = make_table("arithmetic", (1,), 5)
    table = make_table("arithmetic", (1,), 5, block_length=8)
    assert (plain.tokens.shape[1], table.tokens.shape[1]) == (30, 32)
    assert table.layout == Layout(6, 26)
    np.testing.assert_array_equal(table.tokens[:, :30], plain.tokens)
    assert (table.tokens[:, 30:] == EOS).all()
    assert (table.rows().maskable[:, 6:]).all()
    assert Layout.of("arithmetic", (1,), 15) == plain.layout


def test_every_problem_fits_its_layout():
    for level in range(1, 7):
        table = make_table("arithmetic", (level,), 300)
        ends = (table.tokens[:, table.layout.prompt :] == EOS).sum(axis=1)
        assert ends.min() >= 1


@pytest.mark.parametrize(("task", "levels"), [("arithmetic", (2, 4)), ("sudoku", (1, 5))])
def test_other_processes_make_the_same_problems(task, levels):
    here = make_table(task, levels, 70, split="test", seed=3)
    there = make_table(task, levels, 70, split="test", seed=3, workers=2)
    assert here.problems == there.problems
    other = make_table(task, levels, 70, split="validation", seed=3)
    assert not {p.prompt for p in here.problems} & {p.prompt for p in other.problems}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A folder in which all problems are kept; call it to forget those in memory."""
    monkeypatch.setenv("JAXGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(problem_data, "_WORTH_A_FILE", 0.0)
    problem_data._table.cache_clear()
    yield tmp_path
    problem_data._table.cache_clear()


@pytest.mark.parametrize(("task", "levels", "layout"), TASKS)
def test_what_took_long_to_make_is_read_from_the_disk(cache, monkeypatch, task, levels, layout):
    options = {"split": "test", "seed": 3}
    made = make_table(task, levels, 7, **options)
    (path,) = cache.iterdir()
    problem_data._table.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(problem_data, "_make", None)  # nothing is made
        for block in (1, layout.answer + layout.prompt + 1):
            read = make_table(task, levels, 7, block_length=block, **options)
            assert read.problems == made.problems
        assert type(read.problems[0].level) is int
        for change in ({"seed": 4}, {"split": "train"}):
            with pytest.raises(TypeError):
                make_table(task, levels, 7, **options | change)
        with pytest.raises(TypeError):
            make_table(task, levels, 6, **options)
    content = path.read_bytes()
    for damage in (content[:-30], b"", content.replace(b"solution", b"solitude")):
        path.write_bytes(damage)
        problem_data._table.cache_clear()
        with pytest.warns(UserWarning, match="cannot be used and is built again"):
            assert make_table(task, levels, 7, **options).problems == made.problems
        assert path.read_bytes() == content


def test_problems_of_other_code_are_made_again(cache, monkeypatch):
    made = make_table("arithmetic", (1,), 3)
    (path,) = cache.iterdir()
    old = path.read_bytes()
    problem_data._table.cache_clear()
    monkeypatch.setattr(problem_data, "_code", lambda: "other")
    assert make_table("arithmetic", (1,), 3).problems == made.problems
    assert path.read_bytes() != old


def test_what_was_made_fast_leaves_no_file(cache, monkeypatch):
    monkeypatch.setattr(problem_data, "_WORTH_A_FILE", 60.0)
    make_table("arithmetic", (1,), 3)
    assert not list(cache.iterdir())


def test_every_epoch_has_every_problem_once_and_its_own_order():
    table = make_table("arithmetic", (3,), 10)
    stream = RowBatches(table.rows(), batch_size=4, seed=0)
    taken = [next(stream) for _ in range(10)]
    rows = np.concatenate([batch["tokens"] for batch in taken]).reshape(4, 10, -1)
    for epoch in rows:
        assert {row.tobytes() for row in epoch} == {row.tobytes() for row in table.tokens}
    assert (rows[0] != rows[1]).any()
    expected = np.arange(rows.shape[-1]) >= table.layout.prompt
    for batch in taken:
        assert (batch["maskable"] == expected).all()
        assert (batch["lengths"] == rows.shape[-1]).all()


def test_batches_are_a_function_of_seed_and_step():
    table = make_table("arithmetic", (3,), 10)
    stream = RowBatches(table.rows(), batch_size=4, seed=0)
    taken = [next(stream)["tokens"] for _ in range(6)]
    state = stream.get_state()
    assert state.pop("rows") == table.rows().digest()
    assert state == {"step": 6}
    stream.set_state(stream.get_state() | {"step": 2})
    for tokens in taken[2:]:
        np.testing.assert_array_equal(next(stream)["tokens"], tokens)
    assert (next(RowBatches(table.rows(), batch_size=4, seed=1))["tokens"] != taken[0]).any()


def test_a_position_is_one_in_these_rows():
    rows = make_table("arithmetic", (3,), 10).rows()
    state = RowBatches(rows, batch_size=4, seed=0).get_state()
    for name, array in rows.batch().items():
        other = array.copy()
        other.flat[-1] = not other.flat[-1]
        stream = RowBatches(dataclasses.replace(rows, **{name: other}), batch_size=4, seed=0)
        with pytest.raises(ConfigChangedError, match="learned from other rows than these"):
            stream.set_state(state)
    with pytest.raises(ConfigChangedError, match="learned from other rows than these"):
        RowBatches(rows[:9], batch_size=4, seed=0).set_state(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chess", (1,), 5), "task must be one of arithmetic, sudoku, got 'chess'"),
        (("arithmetic", (7,), 5), r"levels of arithmetic must be some of 1, .*, 6, got \(7,\)"),
        (("sudoku", (), 5), r"levels of sudoku must be some of 1, 2, 3, 4, 5, got \(\)"),
        (("sudoku", (1,), 0), "count must be positive, got 0"),
        (("arithmetic", (1, 2, 1), 5), r"levels must be different ones, got \(1, 2, 1\)"),
    ],
)
def test_refuses_tables(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_table(*arguments)


def test_refuses_batches_larger_than_the_table():
    table = make_table("arithmetic", (1,), 3)
    with pytest.raises(ValueError, match="batch_size=4 needs as many rows, got 3"):
        RowBatches(table.rows(), batch_size=4, seed=0)


def test_a_problem_longer_than_its_layout_is_not_cut():
    problem = Problem("arithmetic", 1, "1+1=", "2" * 9)
    with pytest.raises(ValueError, match="could not broadcast"):
        rows_of([problem], Layout(4, 8))
