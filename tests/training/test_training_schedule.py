"""The learning rate over a run, by hand and by property."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.core.errors import ConfigError
from sihe.training.schedule import CosineSchedule, ScheduleConfig, ScheduleKind


def test_by_hand() -> None:
    schedule = CosineSchedule(peak_lr=1.0, warmup_steps=4, total_steps=9, min_ratio=0.2)
    middle = 0.2 + 0.8 / 2
    quarter, three = (0.2 + 0.8 * (1 + math.cos(math.pi * done)) / 2 for done in (0.25, 0.75))
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, quarter, middle, three, 0.2]
    assert [schedule.at(step) for step in range(9)] == pytest.approx(expected)


def test_a_line_by_hand() -> None:
    schedule = ScheduleConfig(1.0, 2, 7, 0.2, kind="linear")
    assert [schedule.at(step) for step in range(9)] == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_warm_up_stable_decay_by_hand() -> None:
    line = ScheduleConfig(1.0, 2, 9, 0.2, kind="wsd", decay_steps=4, decay="linear")
    assert [line.at(step) for step in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])
    root = ScheduleConfig(1.0, 2, 9, 0.0, kind="wsd", decay_steps=4)
    assert [root.at(step) for step in range(5, 9)] == pytest.approx([0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0])


def test_a_stable_phase_can_be_prolonged() -> None:
    short, long = (ScheduleConfig(1.0, 5, total, kind="wsd", decay_steps=10) for total in (50, 500))
    assert [short.at(step) for step in range(40)] == [long.at(step) for step in range(40)]


def test_the_inverse_square_root_is_vaswanis() -> None:
    """Equation 3 of arXiv 1706.03762, whose steps count from 1: d^-0.5 · min(s^-0.5, s · warmup^-1.5)."""
    warmup, width = 40, 512
    schedule = ScheduleConfig((width * warmup) ** -0.5, warmup, 100, kind="inverse_sqrt")
    for step in (0, 7, 39, 40, 41, 99, 1000):
        at = step + 1
        assert schedule.at(step) == pytest.approx(width**-0.5 * min(at**-0.5, at * warmup**-1.5))


def test_a_constant_stays() -> None:
    schedule = ScheduleConfig(2.0, 2, 5, kind="constant")
    assert [schedule.at(step) for step in (0, 1, 2, 4, 99)] == [1.0, 2.0, 2.0, 2.0, 2.0]


@given(
    kind=st.sampled_from(["cosine", "linear", "wsd"]),
    total=st.integers(1, 300),
    warmup=st.integers(0, 300),
    peak=st.floats(1e-6, 10.0),
    floor=st.floats(0.0, 1.0),
)
def test_it_rises_to_the_peak_then_falls_to_the_floor(
    kind: ScheduleKind, total: int, warmup: int, peak: float, floor: float
) -> None:
    warmup = min(warmup, total - 1 if kind == "wsd" else total)
    fall = (total - warmup + 1) // 2 if kind == "wsd" else 0
    schedule = ScheduleConfig(peak, warmup, total, floor, kind, fall)
    rates = [schedule.at(step) for step in range(total)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    assert all(rate > 0 for rate in rising)
    if falling:
        assert falling[-1] == pytest.approx(peak * floor)
        assert schedule.at(total + 1000) == falling[-1]
    if len(falling) > 1 and fall < len(falling):
        assert falling[0] == pytest.approx(peak)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"peak_lr": 0.0}, "peak_lr"),
        ({"peak_lr": math.inf}, "peak_lr"),
        ({"total_steps": 0}, "total_steps"),
        ({"warmup_steps": 11}, "warmup_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"min_ratio": 1.5}, "min_ratio"),
        ({"kind": "step"}, "kind"),
        ({"decay": "exp"}, "decay"),
        ({"decay_steps": 3}, "decay_steps"),
        ({"kind": "wsd"}, "decay_steps"),
        ({"kind": "wsd", "decay_steps": 9}, "decay_steps"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ScheduleConfig(**({"peak_lr": 1.0, "warmup_steps": 2, "total_steps": 10} | change))
    assert caught.value.key == key
