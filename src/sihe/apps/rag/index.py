"""An index on disk: one folder a version, published whole, and a pointer to the version in use.

<home>/indexes/<name>/current              the version in use, replaced atomically
<home>/indexes/<name>/v00000003/
    index.json                             form, retriever, SHA-256 of each file below
    documents.jsonl  chunks.jsonl          text and spans: citations hold even when the files change later
    terms.jsonl                            the terms of each chunk, so that unchanged files are not read again
    bm25/                                  arrays of bm25s
    dense/                                 a vector collection; only when there was an embedder
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from sihe.apps.rag import analysis
from sihe.apps.rag.bm25 import Bm25
from sihe.apps.rag.chunks import searchable
from sihe.apps.rag.errors import CorruptIndex
from sihe.apps.rag.types import Chunk, Document, IndexInfo, Span
from sihe.core.errors import CorruptData, NotFound
from sihe.core.files import sha256_of, write_file
from sihe.vectors.collection import Collection
from sihe.vectors.database import Database

FORMAT = 1
_POINTER = "current"
_COLLECTION = "chunks"


@dataclass(frozen=True)
class Index:
    """A loaded version. `dense` holds one vector a chunk under the chunk's number, made by `embedder`."""

    name: str
    version: str
    documents: Mapping[str, Document]
    chunks: Sequence[Chunk]
    bm25: Bm25
    embedder: str | None
    dense: Collection | None
    _terms: dict[int, list[str]] = field(default_factory=dict)

    @property
    def retriever(self) -> str:
        """What finds passages in this index."""
        return f"bm25+{self.embedder}" if self.embedder else "bm25"

    @cached_property
    def prose(self) -> dict[tuple[str, int], tuple[Span, ...]]:
        """The parts that hold sentences, of the chunk that begins at a place in a document."""
        return {(chunk.document, chunk.start): chunk.prose for chunk in self.chunks}

    def terms(self, number: int) -> list[str]:
        """The terms of a chunk, kept once computed."""
        if number not in self._terms:
            chunk = self.chunks[number]
            self._terms[number] = analysis.terms_of(searchable(self.documents[chunk.document], chunk))
        return self._terms[number]


def current_version(folder: Path, name: str) -> str:
    """The version of index `name` in use. Raises `NotFound`."""
    try:
        return (folder / name / _POINTER).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound("index", name, hint=f"build it with  sihe index build {name} PATHS…") from error


def set_current(folder: Path, name: str, version: str) -> None:
    """Points index `name` at a version that was published."""
    write_file(folder / name / _POINTER, version.encode())


def index_names(folder: Path) -> list[str]:
    """The indexes below `folder`, in alphabetical order."""
    return sorted(entry.parent.name for entry in folder.glob(f"[!.]*/{_POINTER}")) if folder.is_dir() else []


def describe(folder: Path, name: str) -> IndexInfo:
    """What a listing shows of an index. Raises `NotFound` or `CorruptIndex`."""
    version = current_version(folder, name)
    form = _read_form(folder, name, version)
    return IndexInfo(name, version, form["documents"], form["chunks"], form["retriever"])


def write_index(
    staging: Path,
    documents: Iterable[Document],
    chunks: Sequence[Chunk],
    terms: Sequence[Sequence[str]],
    vectors: npt.NDArray[np.float32] | None,
    embedder: str | None,
) -> None:
    """Writes every file of a version into the empty folder `staging`."""
    documents = list(documents)
    _write_lines(staging / "documents.jsonl", map(asdict, documents))
    _write_lines(staging / "chunks.jsonl", map(asdict, chunks))
    _write_lines(staging / "terms.jsonl", terms)
    bm25 = Bm25.build(terms)
    (staging / "bm25").mkdir()
    bm25.save(staging / "bm25")
    if vectors is not None:
        with Database(staging / "dense") as database:
            collection = database.create(_COLLECTION, vectors.shape[1], "cosine")
            collection.upsert(range(len(vectors)), vectors)
            collection.compact()
    files = sorted(path for path in staging.rglob("*") if path.is_file() and path.suffix != ".lock")
    form = {
        "format": FORMAT,
        "analysis": analysis.VERSION,
        "documents": len(documents),
        "chunks": len(chunks),
        "embedder": embedder,
        "retriever": f"bm25+{embedder}" if embedder else "bm25",
        "files": {path.relative_to(staging).as_posix(): sha256_of(path) for path in files},
    }
    (staging / "index.json").write_text(json.dumps(form, indent=1), encoding="utf-8")


def load_index(folder: Path, name: str, version: str) -> Index:
    """A version, with every checksum computed. Raises `CorruptIndex`."""
    form = _read_form(folder, name, version)
    path = folder / name / version
    for file, expected in form["files"].items():
        if not (path / file).is_file() or sha256_of(path / file) != expected:
            raise CorruptIndex(name, path / file, "its checksum is wrong")
    try:
        documents = [Document(**line) for line in _read_lines(path / "documents.jsonl")]
        chunks = [_chunk(line) for line in _read_lines(path / "chunks.jsonl")]
        bm25 = Bm25.load(path / "bm25")
        dense = Database(path / "dense", verify=False).collection(_COLLECTION) if form["embedder"] else None
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CorruptIndex(name, path, str(error)) from error
    return Index(
        name, version, {document.name: document for document in documents}, chunks, bm25, form["embedder"], dense
    )


def load_terms(folder: Path, index: Index) -> list[list[str]]:
    """The terms of each chunk of a loaded version."""
    return list(_read_lines(folder / index.name / index.version / "terms.jsonl"))


def is_current_form(folder: Path, index: Index) -> bool:
    """Whether chunks and terms of a version are what this program would make."""
    form = _read_form(folder, index.name, index.version)
    return bool(form["analysis"] == analysis.VERSION)


def _read_form(folder: Path, name: str, version: str) -> dict[str, Any]:
    path = folder / name / version / "index.json"
    try:
        form: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if form["format"] != FORMAT or not {"files", "chunks", "documents", "retriever", "embedder"} <= set(form):
            raise ValueError("it was written by another version of Sihe")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CorruptData):
            raise
        raise CorruptIndex(name, path, str(error)) from error
    return form


def _write_lines(path: Path, values: Iterable[Any]) -> None:
    with path.open("wb") as file:
        for value in values:
            file.write(orjson.dumps(value) + b"\n")


def _read_lines(path: Path) -> Iterable[Any]:
    with path.open("rb") as file:
        for line in file:
            yield orjson.loads(line)


def _chunk(line: dict[str, Any]) -> Chunk:
    prose = tuple((start, end) for start, end in line.pop("prose"))
    return Chunk(**{**line, "headings": tuple(line["headings"]), "prose": prose})
