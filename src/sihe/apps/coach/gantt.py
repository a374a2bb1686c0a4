"""A lab's timeline as SVG and as lines of text: one row for each rank, one bar for each piece of work.

Colours are the map's custom properties, in attributes (see `drawing`): a strict content policy objects to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from sihe.apps.coach.labs.types import Bar, Timeline
from sihe.apps.coach.schema import Language

_ROW, _BAR = 34, 26
_LEFT = 72
_LENGTH = 880
_AXIS = 26
_LEGEND = 28
_LEAST_FOR_MARK = 11  # width of a bar that has room for two digits
_COLOURS = (
    ("area-a", "#2563a8"),
    ("area-c", "#0c6b62"),
    ("area-b", "#7a3fae"),
    ("star", "#bd8116"),
)
_INK = "var(--text, #15171c)"
_QUIET = "var(--text-2, #4e5461)"
_LINE = "var(--line, #e3e5ea)"
_ON_BAR = "var(--bg-card, #ffffff)"


def draw_timeline(timeline: Timeline, *, language: Language = "en") -> str:
    """The timeline as one `<svg>` element; its name for screen readers is its title."""
    height = _LEGEND + _ROW * len(timeline.rows) + _AXIS
    scale = _LENGTH / (timeline.length or 1.0)
    body = [*_legend(timeline, language)]
    for index, name in enumerate(timeline.rows):
        middle = _LEGEND + index * _ROW + _ROW / 2
        body.append(
            f'<text x="0" y="{middle + 4:g}" font-size="12" fill="{_INK}">{escape(name.of(language))}</text>'
            f'<rect x="{_LEFT}" y="{middle - _BAR / 2:g}" width="{_LENGTH}" height="{_BAR}" fill="{_LINE}"/>'
        )
    for bar in timeline.bars:
        body.append(_bar(bar, timeline, scale, language))
    body.extend(_axis(timeline, scale, height, language))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="gantt" viewBox="0 0 {_LEFT + _LENGTH + 24} {height}" '
        f'width="100%" role="img" aria-label={quoteattr(timeline.title.of(language))}>{"".join(body)}</svg>'
    )


def write_timeline(timeline: Timeline, *, language: Language = "en", width: int = 96) -> list[str]:
    """The timeline as text, at most `width` columns: the mark of the work at each moment, `.` where a row waits."""
    columns = min(width, round(timeline.length)) if timeline.length >= width / 2 else width
    lines = []
    for row, name in enumerate(timeline.rows):
        bars = [bar for bar in timeline.bars if bar.row == row]
        middles = ((column + 0.5) * timeline.length / columns for column in range(columns))
        found = (next((bar for bar in bars if bar.start <= middle < bar.end), None) for middle in middles)
        shown = "".join("." if bar is None else (bar.mark[-1:] or bar.kind[0]) for bar in found)
        lines.append(f"{name.of(language)}  {shown}")
    return lines


def _colour(timeline: Timeline, kind: str) -> str:
    place = [item.key for item in timeline.kinds].index(kind)
    name, fallback = _COLOURS[place % len(_COLOURS)]
    return f"var(--{name}, {fallback})"


def _bar(bar: Bar, timeline: Timeline, scale: float, language: Language) -> str:
    x, y = _LEFT + bar.start * scale, _LEGEND + bar.row * _ROW + (_ROW - _BAR) / 2
    width = (bar.end - bar.start) * scale
    kind = next(item for item in timeline.kinds if item.key == bar.kind).label.of(language)
    said = f"{kind} {bar.mark}: {bar.start:.4g}–{bar.end:.4g} {timeline.unit.of(language)}"
    drawn = (
        f"<g><title>{escape(said)}</title>"
        f'<rect x="{x:.2f}" y="{y:g}" width="{max(width - 0.8, 0.4):.2f}" height="{_BAR}" rx="2" '
        f'fill="{_colour(timeline, bar.kind)}"/>'
    )
    if bar.mark and width >= _LEAST_FOR_MARK:
        drawn += (
            f'<text x="{x + width / 2:.2f}" y="{y + _BAR / 2 + 4:g}" font-size="11" text-anchor="middle" '
            f'fill="{_ON_BAR}">{escape(bar.mark)}</text>'
        )
    return f"{drawn}</g>"


def _legend(timeline: Timeline, language: Language) -> Iterator[str]:
    x = float(_LEFT)
    names = [(_colour(timeline, kind.key), kind.label.of(language)) for kind in timeline.kinds]
    for colour, name in [*names, (_LINE, "等待" if language == "zh" else "waiting")]:
        yield (
            f'<rect x="{x:g}" y="4" width="12" height="12" rx="2" fill="{colour}"/>'
            f'<text x="{x + 18:g}" y="14.5" font-size="12" fill="{_QUIET}">{escape(name)}</text>'
        )
        x += 18 + sum(13 if ord(letter) > 0x2E80 else 7 for letter in name) + 22


def _axis(timeline: Timeline, scale: float, height: int, language: Language) -> Iterator[str]:
    for part in range(5):
        at = timeline.length * part / 4
        unit = f" {timeline.unit.of(language)}" if part == 4 else ""
        yield (
            f'<text x="{_LEFT + at * scale:.2f}" y="{height - 8}" font-size="11" '
            f'text-anchor="{"start" if part == 0 else "end" if part == 4 else "middle"}" '
            f'fill="{_QUIET}">{at:.3g}{escape(unit)}</text>'
        )
