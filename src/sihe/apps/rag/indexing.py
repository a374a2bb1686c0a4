"""Building an index: what did not change is taken from the former version, and the new one appears whole."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sihe.apps.rag.analysis import terms_of
from sihe.apps.rag.chunks import chunks_of, searchable
from sihe.apps.rag.documents import read_documents
from sihe.apps.rag.errors import CorruptIndex, NothingToIndex
from sihe.apps.rag.index import (
    Index,
    current_version,
    is_current_form,
    load_index,
    load_terms,
    set_current,
    write_index,
)
from sihe.apps.rag.ports import Embedder
from sihe.apps.rag.types import Chunk, Document, IndexReport, Skipped
from sihe.core.errors import NotFound
from sihe.core.files import exclusive, new_directory
from sihe.core.ids import check_name

Progress = Callable[[int, int], None]
"""Called with how many documents are done, and of how many."""

_VERSION = re.compile(r"v\d{8}")


@dataclass
class _Contents:
    """What goes into a version; `vectors` keep None where a chunk is not embedded yet."""

    documents: list[Document] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    terms: list[list[str]] = field(default_factory=list)
    vectors: list[npt.NDArray[np.float32] | None] = field(default_factory=list)


def build_index(
    folder: Path, name: str, paths: Sequence[Path], embedder: Embedder | None, on_progress: Progress | None = None
) -> IndexReport:
    """Makes index `name` hold exactly the documents in `paths`. When nothing changed, its version stays.

    Raises `NothingToIndex`, `NotFound` for a missing path, `NoSpace`, `Busy` while another process builds the same
    index. Whatever is raised, and whenever the process dies, the former version stays in use.
    """
    check_name("index", name)
    with exclusive(folder / name / ".building"):
        former, rebuilt = _load_former(folder, name)
        found = list(read_documents(paths))
        documents = [item for item in found if isinstance(item, Document)]
        skipped = tuple(item for item in found if isinstance(item, Skipped))
        if not documents:
            raise NothingToIndex(skipped)
        before = former.documents if former else {}
        unchanged = {item.name for item in documents if _same(before.get(item.name), item)}
        report = IndexReport(
            name=name,
            version=former.version if former else "",
            documents=len(documents),
            chunks=len(former.chunks) if former else 0,
            added=sum(item.name not in before for item in documents),
            changed=sum(item.name in before and item.name not in unchanged for item in documents),
            unchanged=len(unchanged),
            removed=len(before.keys() - {item.name for item in documents}),
            skipped=skipped,
            retriever=f"bm25+{embedder.name}" if embedder else "bm25",
            rebuilt=rebuilt,
        )
        if former and report.retriever == former.retriever and not (report.added or report.changed or report.removed):
            return report
        contents = _collect(folder, former, documents, unchanged, embedder, on_progress)
        if not contents.chunks:
            raise NothingToIndex([*skipped, *(Skipped(item.path, "it holds only headings") for item in documents)])
        version = _publish(folder, name, contents, embedder)
        return replace(report, version=version, chunks=len(contents.chunks))


def _load_former(folder: Path, name: str) -> tuple[Index | None, bool]:
    """The version in use, if it can serve; and whether there is one that cannot."""
    try:
        index = load_index(folder, name, current_version(folder, name))
    except NotFound:
        return None, False
    except CorruptIndex:
        return None, True
    return (index, False) if is_current_form(folder, index) else (None, True)


def _collect(
    folder: Path,
    former: Index | None,
    documents: Sequence[Document],
    unchanged: set[str],
    embedder: Embedder | None,
    on_progress: Progress | None,
) -> _Contents:
    contents = _Contents()
    reusable = _reusable(folder, former, unchanged, embedder) if former else {}
    for done, document in enumerate(documents, 1):
        contents.documents.append(document)
        for chunk, terms, vector in reusable.get(document.name) or _fresh(document):
            contents.chunks.append(chunk)
            contents.terms.append(terms)
            contents.vectors.append(vector)
        if on_progress:
            on_progress(done, len(documents))
    if embedder:
        missing = [index for index, vector in enumerate(contents.vectors) if vector is None]
        by_name = {document.name: document for document in documents}
        texts = [searchable(by_name[contents.chunks[index].document], contents.chunks[index]) for index in missing]
        for index, vector in zip(missing, embedder.embed(texts) if texts else [], strict=True):
            contents.vectors[index] = vector
    return contents


def _fresh(document: Document) -> list[tuple[Chunk, list[str], None]]:
    return [(chunk, terms_of(searchable(document, chunk)), None) for chunk in chunks_of(document)]


def _reusable(
    folder: Path, former: Index, unchanged: set[str], embedder: Embedder | None
) -> dict[str, list[tuple[Chunk, list[str], npt.NDArray[np.float32] | None]]]:
    """Chunks, terms and vectors of the documents that did not change."""
    vectors: dict[int | str, npt.NDArray[np.float32]] = {}
    if embedder and former.dense is not None and former.embedder == embedder.name:
        vectors = {point.id: point.vector for point in former.dense.get(range(len(former.chunks)))}
    kept: dict[str, list[tuple[Chunk, list[str], npt.NDArray[np.float32] | None]]] = {}
    for number, (chunk, terms) in enumerate(zip(former.chunks, load_terms(folder, former), strict=True)):
        if chunk.document in unchanged:
            kept.setdefault(chunk.document, []).append((chunk, terms, vectors.get(number)))
    return kept


def _publish(folder: Path, name: str, contents: _Contents, embedder: Embedder | None) -> str:
    """Writes the next version and points to it. The one before stays for readers that are loading it; older ones go."""
    versions = sorted(path.name for path in (folder / name).iterdir() if _VERSION.fullmatch(path.name))
    version = f"v{int(versions[-1][1:]) + 1 if versions else 1:08d}"
    vectors = np.stack([vector for vector in contents.vectors if vector is not None]) if embedder else None
    with new_directory(folder / name / version) as staging:
        write_index(
            staging,
            contents.documents,
            contents.chunks,
            contents.terms,
            vectors,
            embedder.name if embedder else None,
        )
    try:
        former = current_version(folder, name)
    except NotFound:
        former = ""
    set_current(folder, name, version)
    for path in (folder / name).iterdir():
        if path.name.lstrip(".").startswith("v0") and not path.name.lstrip(".").startswith(
            (version, former or version)
        ):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return version


def _same(before: Document | None, now: Document) -> bool:
    return before is not None and (before.sha256, before.path) == (now.sha256, now.path)
