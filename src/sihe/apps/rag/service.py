"""The RAG over a workspace: indexes under `<home>/indexes`, an embedder and a generator when there are."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sihe.apps.rag.answer import extract_answer
from sihe.apps.rag.dense import find_embedder
from sihe.apps.rag.endpoint import ChatEndpoint
from sihe.apps.rag.errors import CorruptIndex, EmptyQuestion
from sihe.apps.rag.generator import generate_answer
from sihe.apps.rag.index import Index, current_version, describe, index_names, load_index
from sihe.apps.rag.indexing import Progress, build_index
from sihe.apps.rag.ports import Embedder, Generator, Reranker
from sihe.apps.rag.retriever import has_made, retrieve
from sihe.apps.rag.types import Answer, Document, IndexInfo, IndexReport, Passage
from sihe.core.errors import InvalidInput, NotFound, TooLarge, TransientError
from sihe.core.ids import check_name
from sihe.core.telemetry import logger
from sihe.core.workspace import Workspace

MAX_QUESTION = 4000
MAX_K = 100
_log = logger("rag")


class RagService:
    """Builds indexes, searches them and answers questions from them. May be shared by threads.

    `embedder` and `generator` replace what settings and installed packages would give; `use_embedder=False` keeps to
    BM25. A `reranker` puts the best passages in its order. A generator that does not answer is replaced by an
    extractive answer, whose `note` says so.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        embedder: Embedder | None = None,
        generator: Generator | None = None,
        reranker: Reranker | None = None,
        use_embedder: bool = True,
    ) -> None:
        self._folder = workspace.path("indexes")
        self._embedder = (embedder or find_embedder()) if use_embedder else None
        self._reranker = reranker
        self._generator = generator or _configured_generator(workspace)
        self._loaded: dict[str, Index] = {}
        self._lock = threading.Lock()

    def index(self, name: str, paths: Sequence[str | Path], *, on_progress: Progress | None = None) -> IndexReport:
        """Makes index `name` hold exactly the documents in `paths` (files or folders); unchanged files are not redone.

        Raises `NothingToIndex`, `NotFound`, `NoSpace`, `Busy`; the former version then stays in use.
        """
        report = build_index(self._folder, name, [Path(path) for path in paths], self._embedder, on_progress)
        _log.info("index_built", index=name, version=report.version, chunks=report.chunks)
        return report

    def indexes(self) -> list[IndexInfo]:
        """Every index, in alphabetical order."""
        return [describe(self._folder, name) for name in index_names(self._folder)]

    def search(self, name: str, query: str, k: int = 8) -> list[Passage]:
        """The `k` best passages of index `name`, best first. Raises `NotFound`, `EmptyQuestion`, `CorruptIndex`."""
        return retrieve(self._index(name), _checked_question(query), _checked_k(k), self._embedder, self._reranker)

    def ask(self, name: str, question: str, *, k: int = 8) -> Answer:
        """An answer to `question` from index `name`, with checked citations."""
        index = self._index(name)
        checked = _checked_question(question)
        passages = retrieve(index, checked, _checked_k(k), self._embedder, self._reranker)
        retriever = passages[0].retriever if passages else index.retriever
        note = self._note(index)
        if self._generator is not None:
            try:
                return _with_note(generate_answer(index, checked, passages, retriever, self._generator), note)
            except TransientError as error:
                _log.warning("generator_failed", reason=str(error))
                note = _join(note, f"this is an extract, because {self._generator.name} did not answer: {error}")
        return _with_note(extract_answer(index, checked, passages, retriever), note)

    def document(self, name: str, document: str) -> Document:
        """A document of index `name`, with the text that citations point into. Raises `NotFound`."""
        index = self._index(name)
        if document not in index.documents:
            raise NotFound("document", document, hint=f"it is not in the index {name!r}")
        return index.documents[document]

    def _index(self, name: str) -> Index:
        """The version in use, loaded once; a version that was replaced while it was being read is read again."""
        check_name("index", name)
        while True:
            version = current_version(self._folder, name)
            with self._lock:
                loaded = self._loaded.get(name)
            if loaded is not None and loaded.version == version:
                return loaded
            try:
                fresh = load_index(self._folder, name, version)
            except CorruptIndex:
                if current_version(self._folder, name) != version:
                    continue
                raise
            with self._lock:
                self._loaded[name] = fresh
            return fresh

    def _note(self, index: Index) -> str | None:
        """What should be said when the index has vectors that cannot be used here."""
        if index.embedder and not has_made(self._embedder, index):
            return f"the index holds vectors of {index.embedder}, which is not available here: BM25 alone searched"
        return None


def _configured_generator(workspace: Workspace) -> Generator | None:
    llm = workspace.settings.llm
    if llm.base_url is None or llm.model is None:
        return None
    return ChatEndpoint(llm.base_url, llm.model, api_key=llm.api_key, timeout_s=llm.timeout_s)


def _checked_question(question: str) -> str:
    if len(question) > MAX_QUESTION:
        raise TooLarge(
            f"a question has at most {MAX_QUESTION} characters, got {len(question)}",
            limit=MAX_QUESTION,
            actual=len(question),
            unit="characters",
        )
    if not any(character.isalnum() for character in question):
        raise EmptyQuestion(question)
    return question.strip()


def _checked_k(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_K:
        raise InvalidInput(f"k: expected a whole number from 1 to {MAX_K}, got {k!r}")
    return k


def _with_note(answer: Answer, note: str | None) -> Answer:
    return replace(answer, note=_join(answer.note, note)) if note else answer


def _join(first: str | None, second: str | None) -> str | None:
    return "; ".join(part for part in (first, second) if part) or None
