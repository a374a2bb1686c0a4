"""The map as SVG: three areas, fifteen groups, every topic a link. The same text serves console, CLI and docs.

Colours are custom properties with a light fall-back, in attributes: a page gives its own values (`--text`, `--area-a`,
…) and a strict content policy has nothing to object to. A standalone drawing carries a style sheet with both themes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import cos, pi, sin
from xml.sax.saxutils import escape, quoteattr

from sihe.apps.coach.schema import Language
from sihe.apps.coach.types import Area, Group, Map, Topic, TopicState

_CARD_WIDTH = 400
_GAP = 20
_ROW = 32
_CARD_TOP = 48
_CARD_BOTTOM = 10
_AREA_TOP = 60
_AREA_BOTTOM = 36
_LEGEND = 44
_AREA_COLOURS = (("area-a", "#2563a8"), ("area-b", "#7a3fae"), ("area-c", "#0c6b62"))
_FONT = "var(--sans, ui-sans-serif, system-ui, 'Segoe UI', 'PingFang SC', 'Noto Sans CJK SC', sans-serif)"
_INK = "var(--text, #15171c)"
_QUIET = "var(--text-2, #4e5461)"
_LINE = "var(--line, #e3e5ea)"
_CARD = "var(--bg-card, #ffffff)"
_STAR = "var(--star, #bd8116)"  # over 3:1 on both grounds

STYLE = """
:root { color-scheme: light dark; background: #fcfcfd; }
@media (prefers-color-scheme: dark) {
  :root { background: #0f1115; --text: #e9ebef; --text-2: #a9afbb; --line: #262a32; --bg-card: #16181d;
    --bg-hover: #1e2128; --star: #e6ac46; --area-a: #7cb7f5; --area-b: #cf9cf7; --area-c: #5fcdbf; --accent: #99a1ff; }
}
.topic:hover .row { fill: var(--bg-hover, #eceef1); }
.topic:focus { outline: none; }
.topic:focus-visible .row { stroke: var(--accent, #3f4bc4); stroke-width: 2; }
"""

_WORDS = {
    "title": {"zh": "AI 基础设施知识图谱", "en": "Map of AI infrastructure"},
    "new": {"zh": "未学", "en": "new"},
    "seen": {"zh": "学过", "en": "seen"},
    "solid": {"zh": "掌握", "en": "solid"},
    "easy": {"zh": "容易", "en": "easy"},
    "medium": {"zh": "中等", "en": "medium"},
    "hard": {"zh": "较难", "en": "hard"},
    "runs": {"zh": "可以运行", "en": "runs here"},
    "planned": {"zh": "尚未建成", "en": "not yet built"},
    "lab": {"zh": "有实验", "en": "has a lab"},
    "chapter": {"zh": "手册给的星级", "en": "rated by the handbook"},
    "ours": {"zh": "我们给的星级", "en": "rated by us"},
}
_STATES: tuple[TopicState, ...] = ("new", "seen", "solid")
_LEVELS = {"easy": 1, "medium": 2, "hard": 3}


def draw_map(
    field: Map,
    *,
    language: Language = "en",
    states: Mapping[str, TopicState] | None = None,
    link: str = "/topics/{topic}",
    columns: int = 3,
    standalone: bool = True,
) -> str:
    """The map as one `<svg>` element.

    `states` is what the learner knows (topics that it leaves out are new), `link` where a topic leads, `columns` the
    cards side by side (1 fits a phone). `standalone` adds a style sheet for both themes; a page brings its own.
    """
    width = columns * _CARD_WIDTH + (columns - 1) * _GAP
    body: list[str] = []
    y = 0.0
    for number, area in enumerate(field.areas):
        drawn, height = _area(area, number, columns, width, language, states or {}, link)
        body.append(f'<g transform="translate(0 {y:g})">{drawn}</g>')
        y += height
    body.append(f'<g transform="translate(0 {y:g})" aria-hidden="true">{"".join(_legend(language, columns))}</g>')
    height = y + _LEGEND * (1 if columns > 2 else 4 - columns)
    margin = 24 if standalone else 1
    box = f"{-margin} {-margin} {width + 2 * margin} {height + 2 * margin:g}"
    style = f"<style>{STYLE}</style>" if standalone else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="sihe-map" viewBox="{box}" width="{width + 2 * margin}" '
        f'height="{height + 2 * margin:g}" role="group" aria-label={quoteattr(_word("title", language))} '
        f'lang="{"zh-CN" if language == "zh" else "en"}" font-family="{_FONT}" font-size="14">'
        f"{style}{''.join(body)}</svg>"
    )


def topic_label(topic: Topic, language: Language, state: TopicState) -> str:
    """What a screen reader says for a topic: name, stars, difficulty, state, and whether it runs here."""
    stars = f"{topic.stars}/5 星" if language == "zh" else f"{topic.stars} of 5 stars"
    runs = _word("runs" if topic.capability.runs else "planned", language)
    parts = [topic.name.of(language), stars, _word(topic.difficulty, language), _word(state, language), runs]
    if topic.labs:
        parts.append(_word("lab", language))
    return ("，" if language == "zh" else ", ").join(parts)


def _word(key: str, language: Language) -> str:
    return _WORDS[key][language]


def _area(
    area: Area,
    number: int,
    columns: int,
    width: int,
    language: Language,
    states: Mapping[str, TopicState],
    link: str,
) -> tuple[str, float]:
    """One band with its cards, and its height."""
    name, fallback = _AREA_COLOURS[number % len(_AREA_COLOURS)]
    colour = f"var(--{name}, {fallback})"
    topics = [topic for group in area.groups for topic in group.topics]
    running = sum(topic.capability.runs for topic in topics)
    count = (
        f"{len(topics)} 个主题 · {running} 个可以运行"
        if language == "zh"
        else f"{len(topics)} topics · {running} run here"
    )
    parts = [
        f'<rect x="0" y="8" width="4" height="26" rx="2" fill="{colour}"/>',
        f'<text x="16" y="28" font-size="20" font-weight="650" fill="{_INK}">{escape(area.name.of(language))}</text>',
        f'<text x="{width}" y="27" font-size="13" text-anchor="end" fill="{_QUIET}">{escape(count)}</text>',
    ]
    y = float(_AREA_TOP)
    for start in range(0, len(area.groups), columns):
        row = area.groups[start : start + columns]
        height = _CARD_TOP + _CARD_BOTTOM + _ROW * max(len(group.topics) for group in row)
        for column, group in enumerate(row):
            card = "".join(_group(group, height, colour, language, states, link))
            parts.append(f'<g transform="translate({column * (_CARD_WIDTH + _GAP)} {y:g})">{card}</g>')
        y += height + _GAP
    label = quoteattr(area.name.of(language))
    return f'<g role="group" aria-label={label}>{"".join(parts)}</g>', y - _GAP + _AREA_BOTTOM


def _group(
    group: Group, height: float, colour: str, language: Language, states: Mapping[str, TopicState], link: str
) -> Iterator[str]:
    name = group.name.of(language)
    yield f'<g role="group" aria-label={quoteattr(name)}>'
    yield (
        f'<rect x="0.5" y="0.5" width="{_CARD_WIDTH - 1}" height="{height - 1:g}" rx="10" fill="{_CARD}" '
        f'stroke="{_LINE}"/>'
        f'<text x="20" y="30" font-size="13" font-weight="650" fill="{colour}">{escape(name)}</text>'
    )
    for index, topic in enumerate(group.topics):
        state = states.get(topic.id, "new")
        yield (
            f'<a class="topic" href={quoteattr(link.format(topic=topic.id))} '
            f"aria-label={quoteattr(topic_label(topic, language, state))} "
            f'transform="translate(0 {_CARD_TOP + index * _ROW - 4:g})">'
            f"<title>{escape(topic.gist.of(language))}</title>{''.join(_topic(topic, colour, state, language))}</a>"
        )
    yield "</g>"


def _topic(topic: Topic, colour: str, state: TopicState, language: Language) -> Iterator[str]:
    middle = _ROW / 2
    yield f'<rect class="row" x="8" y="1" width="{_CARD_WIDTH - 16}" height="{_ROW - 2}" rx="6" fill="transparent"/>'
    yield _dot(24, middle, colour, state)
    ink, weight = (_INK, 560) if topic.capability.runs else (_QUIET, 400)
    name = escape(topic.name.of(language))
    yield f'<text x="42" y="{middle + 5:g}" font-weight="{weight}" fill="{ink}">{name}</text>'
    if topic.labs:
        yield _flask(272, middle, colour)
    yield _bars(293, middle, _LEVELS[topic.difficulty])
    yield _stars(323, middle, topic.stars, ours=topic.stars_source == "ours")


def _dot(x: float, y: float, colour: str, state: TopicState) -> str:
    """A ring: empty when new, half full when seen, full with a tick when solid."""
    ring = f'<circle cx="{x}" cy="{y:g}" r="6" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    if state == "seen":
        return f'{ring}<path d="M{x} {y - 6:g}a6 6 0 0 1 0 12z" fill="{colour}"/>'
    if state == "solid":
        tick = f'<path d="M{x - 2.8} {y + 0.2:g}l2 2.1 3.7-4.3" fill="none" stroke="{_CARD}" stroke-width="1.6"/>'
        return f'<circle cx="{x}" cy="{y:g}" r="6.75" fill="{colour}"/>{tick}'
    return ring


def _flask(x: float, y: float, colour: str) -> str:
    """An Erlenmeyer flask: a lab measures this topic."""
    return (
        f'<path d="M{x - 2} {y - 6:g}v4l-4 7a1.2 1.2 0 0 0 1 1.8h10a1.2 1.2 0 0 0 1-1.8l-4-7v-4'
        f'M{x - 3.4} {y - 6:g}h6.8" '
        f'fill="none" stroke="{colour}" stroke-width="1.4" stroke-linejoin="round" stroke-linecap="round"/>'
    )


def _bars(x: float, y: float, level: int) -> str:
    """Three rising bars, as many full as the topic is hard."""
    bars = []
    for step in range(3):
        fill = _QUIET if step < level else _LINE
        height = 4 + 3 * step
        bars.append(
            f'<rect x="{x + 5 * step}" y="{y + 5 - height:g}" width="3.4" height="{height}" rx="1" fill="{fill}"/>'
        )
    return "".join(bars)


def _stars(x: float, y: float, count: int, *, ours: bool) -> str:
    """Five stars: full for the chapter's rating, outlined for our own, faint for the rest."""
    given = "".join(_star(x + 13 * step, y) for step in range(count))
    missing = "".join(_star(x + 13 * step, y) for step in range(count, 5))
    look = f'fill="none" stroke="{_STAR}" stroke-width="1.1"' if ours else f'fill="{_STAR}"'
    rest = f'<path d="{missing}" fill="{_LINE}"/>' if missing else ""
    return f'<path d="{given}" {look} stroke-linejoin="round"/>{rest}'


def _star(x: float, y: float) -> str:
    points = []
    for step in range(10):
        radius, angle = (5.6 if step % 2 == 0 else 2.5), pi * step / 5
        points.append(f"{x + radius * sin(angle):.1f} {y - radius * cos(angle):.1f}")
    return "M" + "L".join(points) + "Z"


def _legend(language: Language, columns: int) -> Iterator[str]:
    """What the marks mean."""
    x, y, limit = 0.0, 14.0, columns * _CARD_WIDTH + (columns - 1) * _GAP
    for mark, width, text in _legend_items(language):
        needed = width + 10 + sum(14 if ord(letter) > 0x2E80 else 7.2 for letter in text) + 18
        if x + needed > limit + 18:
            x, y = 0.0, y + 28
        yield f'<g transform="translate({x:g} {y:g})">{mark}'
        yield f'<text x="{width + 10}" y="4.5" font-size="13" fill="{_QUIET}">{escape(text)}</text></g>'
        x += needed


def _legend_items(language: Language) -> Iterator[tuple[str, int, str]]:
    for state in _STATES:
        yield _dot(7, 0, _QUIET, state), 14, _word(state, language)
    yield _flask(7, 0, _QUIET), 14, _word("lab", language)
    for difficulty, level in _LEVELS.items():
        yield _bars(0, 0, level), 14, _word(difficulty, language)
    yield _stars(6, 0, 4, ours=False), 64, _word("chapter", language)
    yield _stars(6, 0, 3, ours=True), 64, _word("ours", language)
    for key, ink, weight in (("runs", _INK, 560), ("planned", _QUIET, 400)):
        yield f'<text x="0" y="4.5" font-weight="{weight}" fill="{ink}">Aa</text>', 18, _word(key, language)
