"""The generated task: answers are right, splits are apart, draws follow seed and step."""

from __future__ import annotations

from itertools import product

from sihe.training.ranks import Ranks
from sihe.training.recipes.arithmetic import END, Arithmetic, Problem, arithmetic_chat
from sihe.training.recipes.config import TaskConfig
from sihe.training.recipes.lesson import Lesson
from sihe.training.recipes.types import Completion

TASK = TaskConfig(largest=12, held_out=20)


def test_the_rules_of_the_task() -> None:
    problem = Problem(3, 12, "-")
    assert (problem.question, problem.short, problem.long) == ("3-12", "-9", "3-12=-9")
    assert [problem.is_right(answer) for answer in ("-9", "3-12=-9", "9", "12-3=-9", "-9-9", "")] == [True, True] + [
        False
    ] * 4
    assert [problem.preference(answer) for answer in ("-9", "3-12=-9", "-8")] == [1.0, 0.5, 0.0]


def test_held_out_problems_are_never_trained_on() -> None:
    task = Arithmetic(TASK, seed=3)
    assert len(task.held_out) == 20
    assert len(task.train) == 13 * 13 - 20
    assert not {*task.held_out} & {*task.train}
    assert Arithmetic(TASK, seed=4).held_out != task.held_out
    assert {problem for step in range(50) for problem in task.draw(step, 40)} <= {*task.train}


def test_a_draw_follows_seed_and_step() -> None:
    task, again = Arithmetic(TASK, seed=3), Arithmetic(TASK, seed=3)
    assert task.draw(5, 9) == again.draw(5, 9) != task.draw(6, 9)
    assert task.pairs(5, task.draw(5, 9)) == again.pairs(5, again.draw(5, 9))


def test_of_a_pair_the_first_is_liked_better() -> None:
    task = Arithmetic(TASK, seed=0)
    problems = task.draw(0, 300)
    pairs = task.pairs(0, problems)
    kinds: set[tuple[float, float]] = set()
    styles_when_wrong: set[tuple[bool, bool]] = set()
    for problem, (better, worse) in zip(problems, pairs, strict=True):
        assert problem.preference(better) > problem.preference(worse)
        kinds.add((problem.preference(better), problem.preference(worse)))
        styles_when_wrong |= {("=" in better, "=" in worse)} if problem.preference(worse) == 0 else set()
    assert kinds == {(1.0, 0.5), (1.0, 0.0), (0.5, 0.0)}
    assert styles_when_wrong == set(product([True, False], repeat=2))  # style alone does not tell right from wrong
    assert all(problem.is_right(answer) for problem, answer in zip(problems, task.answers(0, problems), strict=True))


def test_ranks_share_a_batch_without_gap_or_overlap() -> None:
    task = Arithmetic(TASK, seed=0)
    whole = task.draw(2, 10)
    shares = [Lesson(arithmetic_chat(), task, Ranks(rank, 3), context=24, seed=0).problems(2, 10) for rank in range(3)]
    assert sorted(map(str, whole)) == sorted(str(problem) for share in shares for problem in share)
    assert shares[1][0] == whole[1]


def test_an_answer_that_was_cut_off_is_not_right() -> None:
    lesson = Lesson(arithmetic_chat(), Arithmetic(TASK, seed=0), Ranks(), context=24, seed=0)
    five = 4 + 5
    assert lesson.text(Completion((five, END), (0.0, 0.0), 0)) == "5"
    assert not Problem(2, 3).is_right(lesson.text(Completion((five,), (0.0,), 0)))
