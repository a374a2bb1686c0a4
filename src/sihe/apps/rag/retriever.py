"""Questions to passages: BM25 and, when the index has vectors, meaning; fused, the question's language first."""

from __future__ import annotations

from sihe.apps.rag.analysis import language_of, question_terms
from sihe.apps.rag.fusion import fuse, scale
from sihe.apps.rag.index import Index
from sihe.apps.rag.ports import Embedder, Reranker
from sihe.apps.rag.proximity import BOOST, pair_share
from sihe.apps.rag.types import Chunk, Language, Passage
from sihe.core.errors import TransientError
from sihe.core.telemetry import logger

CANDIDATES = 100  # taken from each ranking into the fusion
_RERANKED = 30
_READ = 30  # passages that a reranker reads, at least
_NO_PROSE = 0.5  # tables, code and lists of sources help less than sentences do
_OTHER_LANGUAGE = 0.5  # a passage in another language than the question must be twice as good

_log = logger("rag")


def retrieve(
    index: Index, query: str, k: int, embedder: Embedder | None, reranker: Reranker | None = None
) -> list[Passage]:
    """The `k` best passages for `query`, best first; fewer, or none, when there are no more that share a term.

    Without an embedder that made the index's vectors and knows the question's language, BM25 alone decides; each
    passage's `retriever` says what did. A reranker puts the best of them in its own order; where it does not answer
    they stay as they are.
    """
    scores, retriever = score_chunks(index, query, embedder)
    language = language_of(query)
    weighed = {number: score * _preference(index.chunks[number], language) for number, score in scores.items()}
    best = sorted(weighed, key=lambda number: (-weighed[number], number))
    if reranker is not None and best:
        best, weighed, retriever = _reranked(index, query, best[: max(k, _READ)], weighed, retriever, reranker)
    best = best[:k]
    return [_passage(index, number, weighed[number], retriever) for number in best]


def _reranked(
    index: Index, query: str, best: list[int], weighed: dict[int, float], retriever: str, reranker: Reranker
) -> tuple[list[int], dict[int, float], str]:
    """The same passages in the reranker's order, with its scores; as they were when it does not answer."""
    texts = [_text(index, number) for number in best]
    try:
        scores = dict(zip(best, reranker.score(query, texts), strict=True))
    except TransientError as error:
        _log.warning("reranker_failed", reason=str(error))
        return best, weighed, retriever
    order = sorted(best, key=lambda number: -scores[number])
    return order, scores, f"{retriever}+{reranker.name}"


def _preference(chunk: Chunk, language: Language) -> float:
    return (1.0 if chunk.language == language else _OTHER_LANGUAGE) * (1.0 if chunk.prose else _NO_PROSE)


def score_chunks(index: Index, query: str, embedder: Embedder | None) -> tuple[dict[int, float], str]:
    """Chunk number → score from 0 to 1, and what found them."""
    lexical = _lexical(index, question_terms(query))
    dense = _dense(index, query, embedder)
    if dense is None:
        top = max(lexical.values(), default=1.0)
        return {number: score / top for number, score in lexical.items()}, "bm25"
    return (fuse(lexical, dense) if lexical else scale(dense)), index.retriever


def has_made(embedder: Embedder | None, index: Index) -> bool:
    """Whether the index's vectors are this embedder's; false when it cannot be asked now."""
    try:
        return embedder is not None and index.embedder == embedder.name
    except TransientError as error:
        _log.warning("embedder_failed", reason=str(error))
        return False


def _dense(index: Index, query: str, embedder: Embedder | None) -> dict[int, float] | None:
    """Nearness of meaning by chunk number; None where the index or the embedder cannot tell."""
    if embedder is None or index.dense is None or not has_made(embedder, index):
        return None
    if language_of(query) not in embedder.languages:
        return None
    try:
        vector = embedder.embed([query])[0]
    except TransientError as error:
        _log.warning("embedder_failed", reason=str(error))
        return None
    return {int(hit.id): hit.score for hit in index.dense.search(vector, CANDIDATES)}


def _lexical(index: Index, asked: list[str]) -> dict[int, float]:
    """BM25, with the best candidates raised where the question's terms stand side by side."""
    scores = index.bm25.search(asked, CANDIDATES)
    for number in sorted(scores, key=lambda number: -scores[number])[:_RERANKED]:
        scores[number] *= 1 + BOOST * pair_share(asked, index.terms(number), index.bm25.weight)
    return scores


def _text(index: Index, number: int) -> str:
    chunk = index.chunks[number]
    return index.documents[chunk.document].text[chunk.start : chunk.end]


def _passage(index: Index, number: int, score: float, retriever: str) -> Passage:
    chunk = index.chunks[number]
    document = index.documents[chunk.document]
    return Passage(
        document=chunk.document,
        start=chunk.start,
        end=chunk.end,
        line=document.line_of(chunk.start),
        text=_text(index, number),
        headings=chunk.headings,
        language=chunk.language,
        score=score,
        retriever=retriever,
    )
