"""Markdown from documents that somebody else wrote."""

from __future__ import annotations

import pytest

from sihe.console.prose import inline, render, render_marked


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1))",
        "![a](https://evil.example/pixel.png)",
        "```\n</code><script>alert(1)</script>\n```",
        "[x]: javascript:alert(1)\n\n[x]",
    ],
)
def test_nothing_that_runs_or_calls_home_comes_through(text: str) -> None:
    html = render(text)
    assert "<script" not in html
    assert "<img" not in html
    assert 'href="javascript' not in html
    assert "<img" not in inline(text)


def test_headings_go_below_the_pages_own() -> None:
    assert "<h2>a</h2>" in render("# a")
    assert "<h3>a</h3>" in render("### a", top_level=1)
    assert "<h6>a</h6>" in render("###### a", top_level=3)


def test_tables_carry_no_inline_style_and_code_can_be_scrolled() -> None:
    html = render("| a | b |\n|:--|--:|\n| 1 | 2 |\n\n```\ncode\n```")
    assert "style=" not in html
    assert 'scope="col"' in html
    assert 'tabindex="0"' in html


def test_citations_become_links_to_their_source() -> None:
    html = render("As measured [zero-paper], not [other].", references={"zero-paper": "#source-zero-paper"})
    assert '<a href="#source-zero-paper">zero-paper</a>' in html
    assert "[other]" in html


DOCUMENT = "# Title\n\nOne *two* three. Four `five` six.\n\n- [a link](/x) seven\n"


@pytest.mark.parametrize("words", ["One *two* three.", "Four `five` six.", "seven", "[a link](/x) seven"])
def test_a_citation_is_marked_in_the_rendered_text(words: str) -> None:
    start = DOCUMENT.index(words)
    html = render_marked(DOCUMENT, start, start + len(words))
    assert html is not None
    assert html.count("<mark") == html.count("</mark>") == 1
    assert "Title</h2>" in html


@pytest.mark.parametrize("words", ["# Title", "two* three", "six.\n\n- ", "", "a link](/x) sev", "- [a"])
def test_what_cannot_be_marked_is_left_to_the_plain_text(words: str) -> None:
    start = DOCUMENT.index(words)
    assert render_marked(DOCUMENT, start, start + len(words)) is None
