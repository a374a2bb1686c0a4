"""What the lab on continuous batching replays, against oracles that know no scheduler."""

from __future__ import annotations

import heapq
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.apps.coach.labs import continuous_batch as lab
from sihe.apps.coach.labs.continuous_batch import Request, replay
from sihe.apps.coach.labs.registry import lab as description


def one(_tokens: int) -> float:
    return 1.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 8))
def test_answers_take_the_places_that_become_free_in_the_order_of_their_arrival(
    answers: list[int], places: int
) -> None:
    free = [0] * places  # when each place becomes free
    for answer in answers:
        heapq.heapreplace(free, free[0] + answer)
    found = replay([Request(1, answer) for answer in answers], places=places, budget=100, step_s=one)
    assert (found.steps, found.said, found.preemptions) == (max(free), sum(answers), 0)


@pytest.mark.parametrize(("prompt", "budget"), [(100, 32), (96, 32), (1, 32), (33, 16)])
def test_a_prompt_alone_is_read_in_as_many_steps_as_the_budget_goes_into_it(prompt: int, budget: int) -> None:
    found = replay([Request(prompt, 5)], places=2, budget=budget, step_s=one)
    assert found.first_s[0] == math.ceil(prompt / budget)
    assert found.steps == math.ceil(prompt / budget) + 4


def test_a_pause_is_the_longest_step_that_the_budget_allows() -> None:
    for budget in (256, 1024):
        longest, first = lab.pause(budget, 4096)
        assert longest == pytest.approx(budget * lab.TOKEN_S)
        # Beside 31 that decode, the prompt gets what they leave.
        assert first == pytest.approx(4096 / (budget - 31) * budget * lab.TOKEN_S, rel=0.1)
    assert lab.pause(64, 4096)[0] == pytest.approx(lab.READ_S), "below the free tokens a step takes the reading"


def test_static_places_are_those_of_the_longest_and_continuous_ones_are_nearly_all() -> None:
    static, continuous = lab.occupancy([200] * 64)
    assert (static, continuous) == (1, 1), "equal lengths waste nothing"
    static, continuous = lab.occupancy(lab.geometric(1024, 200))
    assert static == pytest.approx(1 / sum(1 / n for n in range(1, 33)), rel=0.05)
    assert continuous > 3.5 * static


def test_less_memory_costs_steps_and_no_answers() -> None:
    crowds = [lab.crowded(percent) for percent in lab.MEMORIES]
    assert len({found.said for found in crowds}) == 1
    assert crowds[0].preemptions == 0
    assert [found.steps for found in crowds] == sorted(found.steps for found in crowds)
    assert crowds[-1].preemptions > 0


def test_a_tenant_of_ones_own_is_not_behind_the_flood() -> None:
    alone, behind = lab.flooded(by_turns=True), lab.flooded(by_turns=False)
    assert alone < 3 * 512 * lab.TOKEN_S
    assert behind > 0.9 * (100 * 2000 * lab.TOKEN_S - 0.1)


def test_the_lab_gives_every_claim_and_what_it_says_of_them_is_so() -> None:
    values = lab.measure({"budget": 512, "prompt": 4096, "memory": 30}, limit_s=60).values
    assert set(values) == {claim.key for claim in description("batch.continuous").claims}
    assert values["pause-chunked"] < values["pause-whole"]
    assert values["first-chunked"] > values["first-whole"]
    assert values["more-steps"] > 0
