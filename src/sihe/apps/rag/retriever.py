"""Questions to passages: BM25 and, when the index has vectors, meaning; fused, the question's language first."""

from __future__ import annotations

from sihe.apps.rag.analysis import language_of, question_terms
from sihe.apps.rag.fusion import fuse, scale
from sihe.apps.rag.index import Index
from sihe.apps.rag.ports import Embedder
from sihe.apps.rag.proximity import BOOST, pair_share
from sihe.apps.rag.types import Chunk, Language, Passage

CANDIDATES = 100  # taken from each ranking into the fusion
_RERANKED = 30
_NO_PROSE = 0.5  # tables, code and lists of sources help less than sentences do
_OTHER_LANGUAGE = 0.5  # a passage in another language than the question must be twice as good


def retrieve(index: Index, query: str, k: int, embedder: Embedder | None) -> list[Passage]:
    """The `k` best passages for `query`, best first; fewer, or none, when there are no more that share a term.

    Without an embedder that made the index's vectors and knows the question's language, BM25 alone decides; each
    passage's `retriever` says what did.
    """
    scores, retriever = score_chunks(index, query, embedder)
    language = language_of(query)
    weighed = {number: score * _preference(index.chunks[number], language) for number, score in scores.items()}
    best = sorted(weighed, key=lambda number: (-weighed[number], number))[:k]
    return [_passage(index, number, weighed[number], retriever) for number in best]


def _preference(chunk: Chunk, language: Language) -> float:
    return (1.0 if chunk.language == language else _OTHER_LANGUAGE) * (1.0 if chunk.prose else _NO_PROSE)


def score_chunks(index: Index, query: str, embedder: Embedder | None) -> tuple[dict[int, float], str]:
    """Chunk number → score from 0 to 1, and what found them."""
    lexical = _lexical(index, question_terms(query))
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
    return (fuse(lexical, dense) if lexical else scale(dense)), index.retriever


def _lexical(index: Index, asked: list[str]) -> dict[int, float]:
    """BM25, with the best candidates raised where the question's terms stand side by side."""
    scores = index.bm25.search(asked, CANDIDATES)
    for number in sorted(scores, key=lambda number: -scores[number])[:_RERANKED]:
        scores[number] *= 1 + BOOST * pair_share(asked, index.terms(number), index.bm25.weight)
    return scores


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
