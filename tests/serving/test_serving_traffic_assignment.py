"""Who gets which arm: shares as wanted, the same key the same arm, and as few moves as possible."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sihe.serving.gateway.traffic import significance
from sihe.serving.gateway.traffic.assignment import draw, ranking

KEYS = [f"user-{number}" for number in range(4000)]


def arms_of(weights: dict[str, float], salt: str = "chat") -> list[str]:
    return [ranking(weights, key, salt=salt)[0] for key in KEYS]


def test_shares_are_the_weights() -> None:
    weights = {"stable": 0.7, "a": 0.2, "b": 0.1}
    found = arms_of(weights)
    counts = [found.count(arm) for arm in weights]
    assert significance.ratio_mismatch(counts, list(weights.values())).p_value > 0.001
    assert significance.ratio_mismatch(counts, [0.6, 0.2, 0.2]).p_value < 1e-6


def test_a_weight_that_grows_moves_only_who_must_move() -> None:
    before = arms_of({"stable": 0.9, "canary": 0.1})
    after = arms_of({"stable": 0.75, "canary": 0.25})
    moves = {(old, new) for old, new in zip(before, after, strict=True) if old != new}
    assert moves == {("stable", "canary")}
    moved = sum(old != new for old, new in zip(before, after, strict=True))
    assert abs(moved / len(KEYS) - 0.15) < 0.02


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 1), min_size=2), st.text(), st.text())
def test_an_arm_that_goes_hands_on_only_its_own_keys(weights: dict[str, float], key: str, salt: str) -> None:
    order = ranking(weights, key, salt=salt)
    assert sorted(order) == sorted(weights)
    for gone in weights:
        rest = {arm: weight for arm, weight in weights.items() if arm != gone}
        assert ranking(rest, key, salt=salt) == tuple(arm for arm in order if arm != gone)


def test_another_salt_deals_anew() -> None:
    weights = {"stable": 0.5, "b": 0.5}
    same = sum(one == other for one, other in zip(arms_of(weights), arms_of(weights, "other"), strict=True))
    assert abs(same / len(KEYS) - 0.5) < 0.05


def test_an_arm_without_weight_gets_nobody() -> None:
    assert set(arms_of({"stable": 1.0, "off": 0.0})) == {"stable"}


@given(st.text(), st.text(), st.text())
def test_a_draw_is_between_its_bounds_and_tells_its_parts_apart(key: str, salt: str, name: str) -> None:
    assert 0 < draw(key, salt=salt, name=name) < 1
    assert draw(key, salt=salt, name=name + "x") != draw("x" + key, salt=salt, name=name)
    assert 0 < draw("\ud800", salt=salt) < 1
