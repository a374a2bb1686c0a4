"""The learning rate over a run, by hand and by property."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.core.errors import ConfigError
from sihe.training.schedule import CosineSchedule


def test_by_hand() -> None:
    schedule = CosineSchedule(peak_lr=1.0, warmup_steps=4, total_steps=9, min_ratio=0.2)
    middle = 0.2 + 0.8 / 2
    quarter, three = (0.2 + 0.8 * (1 + math.cos(math.pi * done)) / 2 for done in (0.25, 0.75))
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, quarter, middle, three, 0.2]
    assert [schedule.at(step) for step in range(9)] == pytest.approx(expected)


@given(
    total=st.integers(1, 300),
    warmup=st.integers(0, 300),
    peak=st.floats(1e-6, 10.0),
    floor=st.floats(0.0, 1.0),
)
def test_it_rises_to_the_peak_then_falls_to_the_floor(total: int, warmup: int, peak: float, floor: float) -> None:
    warmup = min(warmup, total)
    schedule = CosineSchedule(peak, warmup, total, floor)
    rates = [schedule.at(step) for step in range(total)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    assert all(rate > 0 for rate in rising)
    if falling:
        assert falling[-1] == pytest.approx(peak * floor)
        assert schedule.at(total + 1000) == falling[-1]
    if len(falling) > 1:
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
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CosineSchedule(**({"peak_lr": 1.0, "warmup_steps": 2, "total_steps": 10} | change))
    assert caught.value.key == key
