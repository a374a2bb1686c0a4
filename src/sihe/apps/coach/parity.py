"""Compares a text in Chinese with the same text in English by their form and their figures.

It cannot tell whether two sentences mean the same. It can tell that a table lost a row, that a formula differs, that a
number was changed on one side only: the ways in which two languages drift apart when one of them is edited.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from markdown_it import MarkdownIt
from markdown_it.token import Token

_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")
_CITATION = re.compile(r"\[([a-z0-9]+(?:-[a-z0-9]+)*)\](?!\()")
_ADDRESS = re.compile(r"https?://[^\s)>\]，。；）]+")
_COMMENT = re.compile(r"\s*(#|//|--).*$")
_FULL_WIDTH = str.maketrans("０１２３４５６７８９．％", "0123456789.%")
_DOLLARS = re.compile(r"\$[^$\s][^$]*\$")
_LIST_SLACK = 0.2


@dataclass
class Section:
    """What stands under one level-2 heading (or before the first: then the title is empty)."""

    title: str
    subheadings: list[str] = field(default_factory=list)
    list_items: int = 0
    tables: list[tuple[int, int]] = field(default_factory=list)
    fences: list[tuple[str, str]] = field(default_factory=list)
    numbers: set[str] = field(default_factory=set)
    citations: set[str] = field(default_factory=set)
    addresses: set[str] = field(default_factory=set)
    dollars: list[str] = field(default_factory=list)
    words: int = 0


@dataclass
class Shape:
    """A text taken apart: its level-1 headings and its sections."""

    titles: list[str]
    sections: list[Section]

    @property
    def citations(self) -> set[str]:
        """Every `[key]` in the text."""
        return set().union(*(section.citations for section in self.sections))


def shape_of(markdown: str) -> Shape:
    """The form and the figures of a Markdown text."""
    titles: list[str] = []
    sections = [Section("")]
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    for index, token in enumerate(tokens):
        if index and tokens[index - 1].type == "heading_open":
            continue  # the words of a heading are no text under it
        if token.type == "heading_open":
            title = tokens[index + 1].content.strip()
            if token.tag == "h1":
                titles.append(title)
            elif token.tag == "h2":
                sections.append(Section(title))
            else:
                sections[-1].subheadings.append(title)
        else:
            _add(sections[-1], token)
    if sections[0] == Section(""):
        del sections[0]
    return Shape(titles, sections)


def differences(zh: Shape, en: Shape) -> Iterator[str]:
    """What differs between the two, one line each; nothing when they agree."""
    if len(zh.titles) != len(en.titles):
        yield f"level-1 headings: {len(zh.titles)} in zh, {len(en.titles)} in en"
    if len(zh.sections) != len(en.sections):
        yield f"level-2 sections: {len(zh.sections)} in zh, {len(en.sections)} in en"
        return
    for left, right in zip(zh.sections, en.sections, strict=True):
        for difference in _section_differences(left, right):
            yield f"“{right.title or left.title or 'before the first heading'}”: {difference}"


def _section_differences(zh: Section, en: Section) -> Iterator[str]:
    if len(zh.subheadings) != len(en.subheadings):
        yield f"{len(zh.subheadings)} level-3 headings in zh, {len(en.subheadings)} in en"
    if abs(zh.list_items - en.list_items) > _LIST_SLACK * max(zh.list_items, en.list_items):
        yield f"{zh.list_items} list items in zh, {en.list_items} in en"
    if zh.tables != en.tables:
        yield f"tables (rows, columns) are {zh.tables} in zh, {en.tables} in en"
    yield from _fence_differences(zh.fences, en.fences)
    for kind, left, right in (
        ("numbers", zh.numbers, en.numbers),
        ("citations", zh.citations, en.citations),
        ("addresses", zh.addresses, en.addresses),
    ):
        if left - right:
            yield f"{kind} only in zh: {', '.join(sorted(left - right))}"
        if right - left:
            yield f"{kind} only in en: {', '.join(sorted(right - left))}"
    for language, section in (("zh", zh), ("en", en)):
        if not (section.words or section.fences or section.tables):
            yield f"nothing under the heading in {language}"
        for text in section.dollars:
            yield f"{text!r} in {language}: write formulas as `code` or in a formula block, not between dollars"


def _fence_differences(zh: list[tuple[str, str]], en: list[tuple[str, str]]) -> Iterator[str]:
    if [tag for tag, _ in zh] != [tag for tag, _ in en]:
        yield f"fenced blocks are {[tag for tag, _ in zh]} in zh, {[tag for tag, _ in en]} in en"
        return
    for number, ((tag, left), (_, right)) in enumerate(zip(zh, en, strict=True), start=1):
        if tag == "formula":
            same = left == right
        elif tag in ("", "text"):
            same = _numbers_in(left) == _numbers_in(right)
        else:
            same = _without_comments(left) == _without_comments(right)
        if not same:
            yield f"fenced block {number} ({tag or 'no tag'}) differs between zh and en"


def _add(section: Section, token: Token) -> None:
    if token.type == "fence":
        tag = token.info.strip().split()[0] if token.info.strip() else ""
        section.fences.append((tag, token.content.strip()))
    elif token.type == "list_item_open":
        section.list_items += 1
    elif token.type == "table_open":
        section.tables.append((0, 0))
    elif token.type == "tr_open":
        section.tables[-1] = (section.tables[-1][0] + 1, 0)
    elif token.type in ("th_open", "td_open"):
        section.tables[-1] = (section.tables[-1][0], section.tables[-1][1] + 1)
    elif token.type == "inline":
        _add_words(section, token)


def _add_words(section: Section, inline: Token) -> None:
    prose = "".join(
        child.content if child.type == "text" else "\n"
        for child in inline.children or []
        if child.type in ("text", "softbreak", "hardbreak")
    )
    addresses = _ADDRESS.findall(inline.content)
    section.addresses.update(address.rstrip(".,;") for address in addresses)
    section.numbers |= _numbers_in(_ADDRESS.sub(" ", inline.content))
    section.citations.update(_CITATION.findall(prose))
    section.dollars += _DOLLARS.findall(prose)
    section.words += len(inline.content)


def _numbers_in(text: str) -> set[str]:
    """Numbers of two digits or more, and decimals, in one spelling. Smaller ones may be words."""
    found = (match.replace(",", "") for match in _NUMBER.findall(text.translate(_FULL_WIDTH)))
    return {number for number in found if len(number) > 1}


def _without_comments(code: str) -> list[str]:
    lines = (_COMMENT.sub("", line).rstrip() for line in code.splitlines())
    return [line for line in lines if line]
