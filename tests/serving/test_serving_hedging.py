"""When a late request is sent twice: never without knowing what late is, never over the budget."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from sihe.serving.gateway.replicas.hedging import Hedger


def test_late_is_later_than_95_of_100() -> None:
    hedger = Hedger(0.05)
    for wait in range(19):
        hedger.answered(float(wait))
    assert hedger.delay_s() is None, "too little is known"
    waits = [float(wait) for wait in range(200)]
    random.Random(0).shuffle(waits)
    for wait in waits:
        hedger.answered(wait)
    assert hedger.delay_s() == 190.0


def test_without_a_share_nothing_is_late() -> None:
    hedger = Hedger(0.0)
    for _ in range(100):
        hedger.arrived()
        hedger.answered(1.0)
    assert hedger.delay_s() is None
    assert not hedger.take()


@given(share=st.floats(0.001, 0.05), wants=st.lists(st.booleans(), max_size=500))
def test_the_budget_holds_whatever_is_wanted(share: float, wants: list[bool]) -> None:
    hedger, taken = Hedger(share), 0
    for want in wants:
        hedger.arrived()
        taken += want and hedger.take()
    assert taken <= len(wants) * share + 1e-6


def test_the_whole_budget_can_be_used() -> None:
    hedger, taken = Hedger(0.05), 0
    for _ in range(1000):
        hedger.arrived()
        taken += hedger.take()
    assert taken == 50
