"""A curve the size of a word."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 120, 28


def draw_sparkline(values: Sequence[float], label: str) -> Markup:
    """`values` from left to right; `label` says the same in words. Empty for fewer than two finite values."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return Markup("")
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    points = " ".join(
        f"{index * _WIDTH / (len(finite) - 1):.1f},{2 + (_HEIGHT - 4) * (high - value) / span:.1f}"
        for index, value in enumerate(finite)
    )
    return Markup(
        f'<svg class="spark" viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}"><polygon class="under" points="0,{_HEIGHT} {points} {_WIDTH},{_HEIGHT}"/>'
        f'<polyline class="line" points="{points}"/></svg>'
    )
