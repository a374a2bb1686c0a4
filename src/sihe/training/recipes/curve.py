"""A line chart as SVG: one line a seed, axes with round numbers, readable on light and dark grounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape, quoteattr

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 30
# Told apart by people who see no red or green (Okabe and Ito 2008, "Color universal design").
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

Points = Sequence[tuple[float, float]]


def draw_curves(lines: Mapping[str, Points], *, label: str, x_label: str = "step") -> str:
    """One `<svg>` element with each of `lines` (name → points), or an empty string without a finite point.

    `label` says in words what is shown, for readers who do not see it.
    """
    finite = {name: [(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)] for name, line in lines.items()}
    points = [point for line in finite.values() for point in line]
    if not points:
        return ""
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = _ticks(min(y for _, y in points), max(y for _, y in points))
    across, up = _Scale(x_ticks, _LEFT, _WIDTH - _RIGHT), _Scale(y_ticks, _HEIGHT - _BOTTOM, _TOP)
    body = [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}" stroke="currentColor" '
        f'stroke-opacity=".15"/><text x="{_LEFT - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>'
        for y in y_ticks
    ]
    body += [
        f'<text x="{across(x):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{x:.4g}</text>'
        for x in x_ticks
        if across(x) < _WIDTH - 80
    ]
    body.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 10}" text-anchor="end">{escape(x_label)}</text>')
    for number, (name, line) in enumerate(finite.items()):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)
        body.append(
            f'<polyline points="{path}" fill="none" stroke="{_COLOURS[number % len(_COLOURS)]}" stroke-width="2" '
            f'stroke-linejoin="round"><title>{escape(name)}</title></polyline>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label={quoteattr(label)} font-size="12" fill="currentColor">{"".join(body)}</svg>'
    )


def colour(number: int) -> str:
    """The colour of line `number`, for a legend."""
    return _COLOURS[number % len(_COLOURS)]


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose `low` and `high`."""
    span = high - low or max(abs(high), 1.0)
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if span / (unit * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


class _Scale:
    """From a value to a place between `start` and `end`."""

    def __init__(self, ticks: Sequence[float], start: float, end: float) -> None:
        self._low, self._start = ticks[0], start
        self._rate = (end - start) / (ticks[-1] - ticks[0])

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) * self._rate
