"""Markdown as HTML that is safe to show: raw HTML stays text, scripts in links are refused, images are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from markupsafe import Markup

_OPEN, _CLOSE = "\ue000", "\ue001"  # private characters: no document means anything by them

if TYPE_CHECKING:
    from markdown_it import MarkdownIt


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return (
        MarkdownIt("commonmark", {"html": False, "linkify": False}).enable(["table", "strikethrough"]).disable("image")
    )


def render(text: str, *, top_level: int = 2, references: Mapping[str, str] | None = None) -> Markup:
    """`text` as HTML; its first-level headings become `<h{top_level}>`, deeper ones follow, so that a page has one h1.

    `references` gives the links behind citations such as `[zero-paper]`.
    """
    parser = _parser()
    definitions = "".join(f"\n[{key}]: {target}" for key, target in (references or {}).items())
    tokens = parser.parse(f"{text}\n{definitions}" if definitions else text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + top_level - 1)}"
        if token.type == "table_open":
            token.attrSet("class", "data")
        if token.type == "fence":
            token.attrSet("tabindex", "0")  # a long line scrolls, and the keyboard must reach it
        if token.type == "th_open":
            token.attrSet("scope", "col")
        token.attrs.pop("style", None)  # column alignment arrives as an inline style, which the page's policy forbids
    return Markup(parser.renderer.render(tokens, parser.options, {}))


def render_marked(text: str, start: int, end: int) -> Markup | None:
    """`text` as HTML with the characters from `start` to `end` in `<mark id="cited">`.

    None where no such HTML exists: the span crosses paragraphs, begins with a block's own sign, or cuts a link in two.
    """
    cited = text[start:end]
    if not cited.strip() or "\n" in cited or _OPEN in text or _CLOSE in text:
        return None
    html = str(render(f"{text[:start]}{_OPEN}{cited}{_CLOSE}{text[end:]}", top_level=2))
    if (
        html.count(_OPEN) != 1
        or html.count(_CLOSE) != 1
        or str(render(text)) != html.replace(_OPEN, "").replace(_CLOSE, "")
    ):
        return None
    inside = html[html.index(_OPEN) : html.index(_CLOSE)]
    depth = 0
    for closing in re.findall(r"<(/?)\w", inside):
        depth += -1 if closing else 1
        if depth < 0:
            return None
    if depth:
        return None
    return Markup(html.replace(_OPEN, '<mark id="cited" tabindex="-1">').replace(_CLOSE, "</mark>"))


def inline(text: str) -> Markup:
    """One line of Markdown, without the paragraph around it."""
    return Markup(_parser().renderInline(text))
