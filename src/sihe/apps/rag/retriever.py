"""Questions to passages: BM25 and, when the index has vectors, meaning; fused, the question's language first."""

from __future__ import annotations

from sihe.apps.rag.analysis import language_of, terms_of
from sihe.apps.rag.fusion import fuse, scale
from sihe.apps.rag.index import Index
from sihe.apps.rag.ports import Embedder
from sihe.apps.rag.types import Passage

CANDIDATES = 100  # taken from each ranking into the fusion
_OTHER_LANGUAGE = 0.5  # a passage in another language than the question must be twice as good


def retrieve(index: Index, query: str, k: int, embedder: Embedder | None) -> list[Passage]:
    """The `k` best passages for `query`, best first; fewer, or none, when there are no more that share a term.

    Without an embedder that made the index's vectors and knows the question's language, BM25 alone decides; each
    passage's `retriever` says what did.
    """
    scores, retriever = score_chunks(index, query, embedder)
    language = language_of(query)
    weighed = {
        number: score * (1.0 if index.chunks[number].language == language else _OTHER_LANGUAGE)
        for number, score in scores.items()
    }
    best = sorted(weighed, key=lambda number: (-weighed[number], number))[:k]
    return [_passage(index, number, weighed[number], retriever) for number in best]


def score_chunks(index: Index, query: str, embedder: Embedder | None) -> tuple[dict[int, float], str]:
    """Chunk number → score from 0 to 1, and what found them."""
    lexical = index.bm25.search(terms_of(query), CANDIDATES)
    if (
        embedder is None
        or index.dense is None
        or index.embedder != embedder.name
        or language_of(query) not in embedder.languages
    ):
        top = max(lexical.values(), default=1.0)
        return {number: score / top for number, score in lexical.items()}, "bm25"
    hits = index.dense.search(embedder.embed([query])[0], CANDIDATES)
    dense = {int(hit.id): hit.score for hit in hits}
    if not lexical:
        return scale(dense), index.retriever
    return fuse(lexical, dense), index.retriever


def _passage(index: Index, number: int, score: float, retriever: str) -> Passage:
    chunk = index.chunks[number]
    document = index.documents[chunk.document]
    return Passage(
        document=chunk.document,
        start=chunk.start,
        end=chunk.end,
        line=document.line_of(chunk.start),
        text=document.text[chunk.start : chunk.end],
        headings=chunk.headings,
        language=chunk.language,
        score=score,
        retriever=retriever,
    )
