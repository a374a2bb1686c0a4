"""The values of the RAG. Offsets count characters (Python's `str` indices) in the text of a document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Language = Literal["en", "zh"]
Span: TypeAlias = tuple[int, int]
"""Start and end, such that `text[start:end]` is meant."""

BlockKind = Literal["heading", "prose", "table", "code", "quote", "reference", "other"]
Mode = Literal["extractive", "generated", "none"]


@dataclass(frozen=True, slots=True)
class Document:
    """One file. `name` is its path below the indexed folder, unique in an index; `path` is where it was read."""

    name: str
    path: str
    text: str
    sha256: str
    language: Language
    title: str

    def line_of(self, offset: int) -> int:
        """The line, from 1 on, that holds the character at `offset`."""
        return self.text.count("\n", 0, offset) + 1


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was not indexed, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of a document's structure; `text` and `level` are those of a heading."""

    kind: BlockKind
    start: int
    end: int
    level: int = 0
    text: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is retrieved: a span of a document under a path of headings. `prose` are the parts that hold sentences."""

    document: str
    start: int
    end: int
    headings: tuple[str, ...]
    language: Language
    prose: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk that was found. `score` is between 0 and 1 and comparable within one result only.

    `retriever` says what found it: `bm25` alone, or `bm25+<model>`.
    """

    document: str
    start: int
    end: int
    line: int
    text: str
    headings: tuple[str, ...]
    language: Language
    score: float
    retriever: str


@dataclass(frozen=True, slots=True)
class Citation:
    """Where a statement comes from: the text of `document` from `start` to `end` equals `quote`, which was checked.

    `number` is the one in brackets in the answer, `line` the line of the file on which the quote begins.
    """

    number: int
    document: str
    start: int
    end: int
    line: int
    quote: str


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and its evidence.

    `mode` says how it was made (`none`: nothing relevant was found, and the text says so). `dropped_citations` counts
    those that could not be verified, and `note` says in words what a reader should know about how it came about.
    """

    text: str
    citations: tuple[Citation, ...]
    passages: tuple[Passage, ...]
    mode: Mode
    language: Language
    retriever: str
    dropped_citations: int = 0
    note: str | None = None


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What building an index did. `version` is the one that searches use from now on."""

    name: str
    version: str
    documents: int
    chunks: int
    added: int
    changed: int
    unchanged: int
    removed: int
    skipped: tuple[Skipped, ...]
    retriever: str
    rebuilt: bool = False


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """One index as a listing shows it."""

    name: str
    version: str
    documents: int
    chunks: int
    retriever: str
