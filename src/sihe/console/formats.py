"""Figures and times as people read them, in either language. Pure: no clock, no I/O."""

from __future__ import annotations

import math
from datetime import datetime, timedelta

from sihe.console.language import Language

_UNITS: dict[Language, tuple[tuple[str, str], ...]] = {
    "en": (("s", "s"), ("min", " min"), ("h", " h"), ("d", " d")),
    "zh": (("s", " 秒"), ("min", " 分钟"), ("h", " 小时"), ("d", " 天")),
}


def number(value: float | int | str | None) -> str:
    """About four significant digits, thousands set apart by a narrow space; text passes through."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "✓" if value else "✗"
    if isinstance(value, float) and not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "NaN"
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude < 1e-3 or magnitude >= 1e15:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    if float(value).is_integer() or magnitude >= 10_000:
        shown = f"{value:,.0f}"
    else:
        shown = f"{value:,.{max(0, 3 - math.floor(math.log10(magnitude)))}f}"
        shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return shown.replace(",", "\u202f").replace("-", "−")


def size(size_bytes: float) -> str:
    """Bytes in the largest decimal unit that keeps the figure above one."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size_bytes) < 1000:
            return f"{number(size_bytes if unit == 'B' else round(size_bytes, 1))} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def duration(span: timedelta | float | None, language: Language) -> str:
    """A span in its two largest units at most."""
    if span is None:
        return "–"
    seconds = span.total_seconds() if isinstance(span, timedelta) else span
    labels = dict(_UNITS[language])
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f}{' ms' if language == 'en' else ' 毫秒'}"
    if seconds < 60:
        return f"{seconds:.1f}{labels['s']}" if seconds < 10 else f"{seconds:.0f}{labels['s']}"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{labels['min']} {rest}{labels['s']}" if rest else f"{minutes}{labels['min']}"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}{labels['h']} {minutes}{labels['min']}" if minutes else f"{hours}{labels['h']}"
    days, hours = divmod(hours, 24)
    return f"{days}{labels['d']} {hours}{labels['h']}" if hours else f"{days}{labels['d']}"


def ago(moment: datetime, now: datetime, language: Language) -> str:
    """How long ago `moment` was, in one unit."""
    seconds = max(0.0, (now - moment).total_seconds())
    if seconds < 5:
        return "just now" if language == "en" else "刚刚"
    labels = dict(_UNITS[language])
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < limit:
            shown = f"{seconds // divisor:.0f}{labels[unit]}"
            break
    else:
        shown = f"{seconds // 86400:.0f}{labels['d']}"
    return f"{shown} ago" if language == "en" else f"{shown}前"
