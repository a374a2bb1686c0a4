"""Documents to chunks: along headings first, then by size, never through a sentence. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from sihe.apps.rag.analysis import language_of, size_of
from sihe.apps.rag.documents import blocks_of
from sihe.apps.rag.sentences import sentences_of
from sihe.apps.rag.types import Block, Chunk, Document, Span

TARGET_WORDS = 220
MAX_WORDS = 330


def chunks_of(document: Document) -> list[Chunk]:
    """The chunks of a document, in order; together they hold all of its text but headings and white space."""
    chunks: list[Chunk] = []
    headings: list[Block] = []
    section: list[Block] = []
    for block in blocks_of(document.name, document.text):
        if block.kind != "heading":
            section.append(block)
            continue
        chunks += _section_chunks(document, headings, section)
        section = []
        headings = [*(heading for heading in headings if heading.level < block.level), block]
    return chunks + _section_chunks(document, headings, section)


def searchable(document: Document, chunk: Chunk) -> str:
    """What is indexed of a chunk: the title and the headings above it, then its text."""
    above = chunk.headings if chunk.headings[:1] == (document.title,) else (document.title, *chunk.headings)
    return "\n".join([*above, document.text[chunk.start : chunk.end]])


def _section_chunks(document: Document, headings: list[Block], section: list[Block]) -> list[Chunk]:
    path = tuple(heading.text for heading in headings)
    return [_chunk(document, path, blocks) for blocks in _pack(document.text, section)]


def _chunk(document: Document, path: tuple[str, ...], blocks: list[Block]) -> Chunk:
    start, end = blocks[0].start, blocks[-1].end
    prose = tuple((block.start, block.end) for block in blocks if block.kind == "prose")
    return Chunk(document.name, start, end, path, language_of(document.text[start:end]), prose)


def _pack(text: str, blocks: list[Block]) -> Iterator[list[Block]]:
    """Groups of neighbours of about `TARGET_WORDS`; a section that fits `MAX_WORDS` stays whole."""
    if not blocks:
        return
    if size_of(text[blocks[0].start : blocks[-1].end]) <= MAX_WORDS:
        yield blocks
        return
    group: list[Block] = []
    size = 0
    for block in (piece for whole in blocks for piece in _split(text, whole)):
        words = size_of(text[block.start : block.end])
        if group and size + words > TARGET_WORDS:
            yield group
            group, size = [], 0
        group.append(block)
        size += words
    yield group


def _split(text: str, block: Block) -> Iterator[Block]:
    """A block that is too long for one chunk as several: prose by sentences, anything else by lines."""
    if size_of(text[block.start : block.end]) <= MAX_WORDS:
        yield block
        return
    spans = sentences_of(text, block.start, block.end) if block.kind == "prose" else _lines(text, block)
    group: list[Span] = []
    size = 0
    for span in spans:
        words = size_of(text[span[0] : span[1]])
        if group and size + words > TARGET_WORDS:
            yield Block(block.kind, group[0][0], group[-1][1])
            group, size = [], 0
        group.append(span)
        size += words
    yield Block(block.kind, group[0][0], group[-1][1])


def _lines(text: str, block: Block) -> list[Span]:
    spans: list[Span] = []
    start = block.start
    for line in text[block.start : block.end].splitlines(keepends=True):
        spans.append((start, start + len(line.rstrip("\r\n"))))
        start += len(line)
    return spans
