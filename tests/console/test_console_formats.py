"""Figures and times as people read them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from sihe.console.formats import ago, duration, number, size


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (7, "7"),
        (2.07719, "2.077"),
        (0.42961, "0.4296"),
        (9.5, "9.5"),
        (2.99999, "3"),
        (1250.4, "1\u202f250"),
        (0.1, "0.1"),
        (12345.678, "12\u202f346"),
        (8370, "8\u202f370"),
        (3e-5, "3.00e−5"),
        (-2.5, "−2.5"),
        (float("nan"), "NaN"),
        (float("inf"), "∞"),
        (10**18, "1.00e18"),
        ("text", "text"),
    ],
)
def test_number(value: float | str | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "en", "zh"),
    [
        (0.262, "262 ms", "262 毫秒"),
        (9.94, "9.9s", "9.9 秒"),
        (39, "39s", "39 秒"),
        (60, "1 min", "1 分钟"),
        (119.6, "2 min", "2 分钟"),
        (125, "2 min 5s", "2 分钟 5 秒"),
        (7260, "2 h 1 min", "2 小时 1 分钟"),
        (90000, "1 d 1 h", "1 天 1 小时"),
    ],
)
def test_duration(seconds: float, en: str, zh: str) -> None:
    assert duration(seconds, "en") == en
    assert duration(timedelta(seconds=seconds), "zh") == zh


def test_ago_never_runs_ahead() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    assert ago(now + timedelta(seconds=30), now, "en") == "just now"
    assert ago(now - timedelta(seconds=59), now, "en") == "59s ago"
    assert ago(now - timedelta(minutes=59, seconds=59), now, "zh") == "59 分钟前"
    assert ago(now - timedelta(days=3), now, "en") == "3 d ago"


def test_size() -> None:
    assert size(999) == "999 B"
    assert size(1500) == "1.5 kB"
    assert size(27_600_000) == "27.6 MB"
