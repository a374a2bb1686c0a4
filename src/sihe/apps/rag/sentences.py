"""Text to sentences, as spans; English and Chinese, mixed as they come. Pure."""

from __future__ import annotations

import re

from sihe.apps.rag.types import Span

_END = re.compile(
    r"[。！？][”’」』）)\"']*"  # Chinese: nothing need follow
    r"|[.!?][\"'”’)\]]*(?=\s+[\"'“‘(\[*`]*[A-Z0-9\u4e00-\u9fff])"
)
_ABBREVIATION = re.compile(
    r"\b(?:[eE]\.g|[iI]\.e|et al|cf|vs|[Ff]igs?|[Ee]qs?|[Nn]os?|[Ss]ec|[Cc]h|[Vv]ol|pp|approx|"
    r"Mrs?|Ms|Dr|Prof|St|Jr|Sr|Inc|Ltd|Dept)\Z"
    r"|(?:\A\W*|[A-Z][\w.]*\s)[A-Z]\Z"  # an initial, but not the N that ends "grows with N."
)
_MARKUP = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|<(https?://[^>]*)>|(\*\*|__|(?<!\w)[*_](?=\S)|(?<=\S)[*_](?!\w)|`)")


def sentences_of(text: str, start: int = 0, end: int | None = None) -> list[Span]:
    """Spans of the sentences of `text[start:end]`, without the space around them."""
    end = len(text) if end is None else end
    spans: list[Span] = []
    first = start
    for found in _END.finditer(text, start, end):
        if found.group()[0] == "." and _ABBREVIATION.search(text, max(first, found.start() - 12), found.start()):
            continue
        spans.append((first, found.end()))
        first = found.end()
    spans.append((first, end))
    return [trimmed for span in spans if (trimmed := trim(text, span)) is not None]


def trim(text: str, span: Span) -> Span | None:
    """The span without white space at its ends; None when nothing is left."""
    piece = text[span[0] : span[1]]
    start = span[0] + len(piece) - len(piece.lstrip())
    end = start + len(piece.strip())
    return (start, end) if end > start else None


def plain(quote: str) -> str:
    """A quote as it reads in running text: on one line, without Markdown's marks."""
    text = _MARKUP.sub(lambda found: found.group(1) or found.group(2) or "", quote)
    text = re.sub(r"(?<=[\u3000-\u9fff\uff00-\uffef])\s*\n\s*(?=[\u3000-\u9fff\uff00-\uffef])", "", text)
    return re.sub(r"\s+", " ", text).strip()
