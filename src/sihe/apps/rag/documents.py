"""Files to documents and documents to blocks. Every offset points into the text exactly as the file holds it.

What is no text is skipped with a reason; it never stops an index. Markdown is parsed by markdown-it-py; anything else
counts as paragraphs between blank lines.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sihe.apps.rag.analysis import language_of
from sihe.apps.rag.types import Block, Document, Skipped
from sihe.core.errors import NotFound

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

MARKDOWN = frozenset({".md", ".markdown"})
TEXT = MARKDOWN | {".txt", ".text", ".rst"}
MAX_BYTES = 16 << 20

_LINE = re.compile(r"\r\n?|\n")  # what markdown-it counts as a line break
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n.*?^---[ \t]*\r?\n", re.DOTALL | re.MULTILINE)
_LIST_MARKER = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]+(?:\[[ xX]\][ \t]+)?")
_ADDRESS = re.compile(r"https?://[^\s<>)\]]+")
_PARAGRAPH = re.compile(r"\S(?:.*?\S)??(?=[ \t]*(?:\r?\n[ \t]*\r?\n|\s*\Z))", re.DOTALL)


def read_documents(paths: Sequence[Path]) -> Iterator[Document | Skipped]:
    """The documents in files and folders, in a stable order; each file once.

    In a folder, files with a text suffix are read and hidden ones are passed over; a file that is named itself is
    always tried. Raises `NotFound` for a path that does not exist.
    """
    for path in paths:
        if not path.exists():
            raise NotFound("file or folder", str(path))
    seen: set[Path] = set()
    names: set[str] = set()
    for path, base, named in _files(paths):
        resolved = path.resolve()
        if resolved in seen:
            continue
        seen.add(resolved)
        name = path.relative_to(base).as_posix()
        if name in names:
            name = resolved.as_posix()
        found = _read(path, name, named)
        if isinstance(found, Document):
            names.add(name)
        yield found


def _files(paths: Sequence[Path]) -> Iterator[tuple[Path, Path, bool]]:
    """Each file with the folder that its name is relative to, and whether it was named itself."""
    for path in paths:
        path = path.absolute()
        if not path.is_dir():
            yield path, path.parent, True
            continue
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                if not name.startswith("."):
                    yield Path(folder, name), path.parent, False


def _read(path: Path, name: str, named: bool) -> Document | Skipped:
    if not path.is_file():
        return Skipped(str(path), "it is no regular file")
    if not named and path.suffix.lower() not in TEXT:
        return Skipped(str(path), f"{path.suffix or 'no suffix'} is none of {' '.join(sorted(TEXT))}")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            return Skipped(str(path), f"it has {size} bytes, more than {MAX_BYTES}")
        data = path.read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Skipped(str(path), f"it is no UTF-8 text (byte {error.start})")
    except OSError as error:
        return Skipped(str(path), f"it cannot be read ({error.strerror})")
    if "\0" in text:
        return Skipped(str(path), "it is binary (it contains zero bytes)")
    if not text.strip():
        return Skipped(str(path), "it is empty")
    title = next((block.text for block in blocks_of(name, text) if block.kind == "heading"), Path(name).stem)
    return Document(name, str(path), text, hashlib.sha256(data).hexdigest(), language_of(text), title)


def blocks_of(name: str, text: str) -> list[Block]:
    """The structure of a document, in order; which parser is used follows from the suffix of `name`."""
    if Path(name).suffix.lower() in MARKDOWN:
        return _markdown_blocks(text)
    return [Block("prose", found.start(), found.end()) for found in _PARAGRAPH.finditer(text)]


def _markdown_blocks(text: str) -> list[Block]:
    front = _FRONT_MATTER.match(text)
    offset = front.end() if front else 0
    body = text[offset:]
    starts = [0, *(found.end() for found in _LINE.finditer(body)), len(body)]
    blocks: list[Block] = []
    inside: list[str] = []  # the containers that are open
    tokens = _parser().parse(body)
    for index, token in enumerate(tokens):
        kind = token.type.removesuffix("_open").removesuffix("_close")
        if token.nesting == -1:
            inside.pop()
            continue
        if token.map is not None and not {"table", "blockquote"} & set(inside):
            first, last = token.map
            block = _block(kind, token, tokens, index, body, starts[first], starts[min(last, len(starts) - 1)])
            if block is not None:
                blocks.append(block)
        if token.nesting == 1:
            inside.append(kind)
    return [Block(b.kind, b.start + offset, b.end + offset, b.level, b.text) for b in blocks]


def _block(kind: str, token: Token, tokens: list[Token], index: int, body: str, start: int, end: int) -> Block | None:
    end = start + len(body[start:end].rstrip())
    if kind == "heading":
        children = tokens[index + 1].children or []
        return Block("heading", start, end, int(token.tag[1:]), "".join(child.content for child in children))
    if kind == "paragraph":
        marker = _LIST_MARKER.match(body, start, end) if token.level else None
        start = marker.end() if marker else start + _indent(body, start, end)
        return Block("reference" if _is_reference(body[start:end]) else "prose", start, end)
    if kind in ("fence", "code_block"):
        return Block("code", start, end)
    if kind == "table":
        return Block("table", start, end)
    if kind == "blockquote":
        return Block("quote", start, end)
    return Block("other", start, end) if kind == "html_block" else None


def _is_reference(text: str) -> bool:
    """Whether a paragraph is an entry of a bibliography or a list of links: little is left without its addresses."""
    addresses = sum(len(found.group()) for found in _ADDRESS.finditer(text))
    return addresses > 0.2 * len(text)


def _indent(body: str, start: int, end: int) -> int:
    return end - start - len(body[start:end].lstrip())


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").enable("table")
