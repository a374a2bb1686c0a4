"""What the questions on latency and elasticity tell a reader to run gives the figures that they quote."""

from __future__ import annotations

import itertools
import math
import random
import re
from ast import literal_eval
from dataclasses import replace

import pytest

from sihe.apps.coach.map import CONTENT
from sihe.serving.gateway.replicas.autoscaler import Observation, decide, initial
from sihe.serving.gateway.replicas.config import ReplicaConfig

_FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def text_of(question: str) -> str:
    return (CONTENT / "questions" / question / "en.md").read_text(encoding="utf-8")


def printed_by(question: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    (code,) = _FENCE.findall(text_of(question))
    exec(compile(code, question, "exec"), {})
    return capsys.readouterr().out.splitlines()


def cells(row: str) -> list[float | None]:
    """The first number of each cell; None where a cell has none."""
    found = (_NUMBER.search(cell) for cell in row.strip("| ").split(" | "))
    return [float(match.group().replace(",", "")) if match else None for match in found]


def rows_after(question: str, header: str) -> list[str]:
    """The lines of the table whose first line begins with `header`."""
    lines = text_of(question).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(header)) + 2
    return list(itertools.takewhile(lambda line: line.startswith("|"), lines[start:]))


def test_a_few_long_prompts_make_the_tail_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = printed_by("serving-latency", capsys)
    equal, mixed = literal_eval(line.replace("] [", "], ["))
    quoted = [cells(row)[1:] for row in rows_after("serving-latency", "| load 0.7")]
    assert [equal, mixed] == quoted[:2]


def test_the_autoscaler_fares_as_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed_by("elasticity", capsys)
    quoted = [cells(row) for row in rows_after("elasticity", "| cold start |")]
    assert len(lines) == len(quoted) == 5
    for line, row in zip(lines, quoted, strict=True):
        load_s, target, bound, result = line.split(maxsplit=3)
        most, longest_s, refused, hours = literal_eval(result)
        ran = (float(load_s), float(target), None if math.isinf(float(bound)) else float(bound), float(most))
        assert ran == tuple(row[:4])
        assert [round(longest_s), round(100 * refused, 1), round(hours, 1)] == row[4:]


def test_noise_turns_a_plain_rule_as_often_as_the_text_says_and_the_policy_never() -> None:
    least, most = re.search(r"changed its direction (\d+) to (\d+) times", text_of("elasticity")).groups()  # type: ignore[union-attr]
    plain = [turns(an_hour_of_steady_load(seed, by_policy=False)) for seed in (1, 2, 3)]
    assert (min(plain), max(plain)) == (int(least), int(most))
    assert [turns(an_hour_of_steady_load(seed, by_policy=True)) for seed in (1, 2, 3)] == [0, 0, 0]


def an_hour_of_steady_load(seed: int, *, by_policy: bool) -> list[int]:
    """How many replicas there are, second by second, at 10 requests/s of 8 s each; they come at once."""
    target, answer_s, rate = 24.0, 8.0, 10.0
    config, draw, numbers = ReplicaConfig(max_replicas=64), random.Random(seed), []
    state, ready, in_hand = replace(initial(config), wanted=4), 4, rate * answer_s
    for now in range(3600):
        in_hand += sum(draw.random() < rate / 100 for _ in range(100))
        in_hand -= min(in_hand, target * ready) / answer_s
        seen = Observation(float(now), ready, 0, math.ceil(in_hand), 0.0, None, float(now))
        state = decide(config, target, state, seen)
        ready = state.wanted if by_policy else math.ceil(in_hand / target)
        numbers.append(ready)
    return numbers


def turns(numbers: list[int]) -> int:
    """How often a number changed its direction."""
    moves = [later - earlier for earlier, later in itertools.pairwise(numbers) if later != earlier]
    return sum((earlier > 0) != (later > 0) for earlier, later in itertools.pairwise(moves))
