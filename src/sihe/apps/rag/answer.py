"""An answer made of sentences that stand in the documents, each cited and each citation checked.

Nothing is generated: the sentences that cover most of what the question asks are quoted, in the question's language
where there are such. When even the best passages leave most of the question uncovered, the answer says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sihe.apps.rag.analysis import language_of, question_terms, size_of, terms_of
from sihe.apps.rag.index import Index
from sihe.apps.rag.sentences import plain, sentences_of
from sihe.apps.rag.types import Answer, Citation, Document, Language, Passage, Span

MAX_SENTENCES = 4
MIN_COVERAGE = 0.5
"""Share of the question's weight (inverse document frequency) that its best passage must contain.

Measured by benchmarks/rag/retrieval_quality.py on SQuAD paragraphs: at 0.5, about nine of ten questions that the index
can answer are answered, and one of ten whose article was taken out of the index.
"""

_PASSAGES = 5  # sentences are taken from so many
_NEAR_BEST = 0.75  # … whose score is at least this share of the best one's
_LEAD = 1.15  # a sentence that begins a passage, or with what was asked for, tends to say what it is
_LEAD_CHARACTERS = 24
_SHORT = 14  # words: an answer below that takes the following sentence as well
_FAR = 0.6
_ENOUGH = 0.25  # a further sentence must hold so much of what the answer lacks
_NOTHING: Mapping[Language, str] = {
    "en": "The indexed documents do not answer this question.",
    "zh": "已索引的文档里没有这个问题的答案。",
}
_REFERS_BACK = re.compile(
    r"(?:They|It|This|That|These|Those|Its|Their|So|But|However|Hence|Therefore|Thus|Then|Such|Both)\b"
    r"|[它这此其而但]|因此|所以|于是|然而|反之|例如|两者"
)


@dataclass(frozen=True)
class _Sentence:
    """A candidate: where it stands and which of the question's terms it holds."""

    passage: int
    place: int  # its number within the passage
    document: str
    span: Span
    text: str
    terms: frozenset[str]
    score: float


def extract_answer(index: Index, question: str, passages: Sequence[Passage], retriever: str) -> Answer:
    """The answer to `question` out of `passages` (best first)."""
    language = language_of(question)
    asked = frozenset(question_terms(question))
    weight = index.bm25.weight
    passages = tuple(passages)
    if not passages or max(coverage(asked, passage, weight) for passage in passages[:_PASSAGES]) < MIN_COVERAGE:
        return nothing_found(language, passages, retriever)
    chosen = _choose(_candidates(index, asked, passages, weight), asked, weight)
    citations, dropped = verify(
        index.documents, [(number, item.document, *item.span, item.text) for number, item in enumerate(chosen, 1)]
    )
    if not citations:
        return nothing_found(language, passages, retriever, dropped)
    separator = "" if language == "zh" else " "
    text = separator.join(f"{_ended(plain(citation.quote), language)}[{citation.number}]" for citation in citations)
    return Answer(text, tuple(citations), passages, "extractive", language, retriever, dropped)


def nothing_found(language: Language, passages: tuple[Passage, ...], retriever: str, dropped: int = 0) -> Answer:
    """The answer that there is none; the passages nearest to the question stay with it."""
    return Answer(_NOTHING[language], (), passages, "none", language, retriever, dropped)


def coverage(asked: Iterable[str], passage: Passage, weight: Callable[[str], float]) -> float:
    """Share, by weight, of the terms asked for that a passage and the headings above it hold."""
    held = frozenset(terms_of("\n".join([*passage.headings, passage.text])))
    return _share(frozenset(asked), held, weight)


def verify(
    documents: Mapping[str, Document], claims: Iterable[tuple[int, str, int, int, str]]
) -> tuple[list[Citation], int]:
    """The claims (number, document, start, end, quote) whose quote stands exactly there, and how many do not."""
    verified: list[Citation] = []
    dropped = 0
    for number, name, start, end, quote in claims:
        document = documents.get(name)
        if document is None or not quote.strip() or document.text[start:end] != quote:
            dropped += 1
            continue
        verified.append(Citation(number, name, start, end, document.line_of(start), quote))
    return verified, dropped


def _candidates(
    index: Index, asked: frozenset[str], passages: Sequence[Passage], weight: Callable[[str], float]
) -> list[_Sentence]:
    """Every sentence of the best passages; a heading that holds a term counts half for the sentences below it."""
    best = max(passages[0].score, 1e-9)
    found: list[_Sentence] = []
    near = [passage for passage in passages[:_PASSAGES] if passage.score >= _NEAR_BEST * best]
    for number, passage in enumerate(near):
        text = index.documents[passage.document].text
        above = frozenset(terms_of("\n".join(passage.headings))) & asked
        place = 0
        for start, end in index.prose[passage.document, passage.start]:
            for span in sentences_of(text, start, end):
                quote = text[span[0] : span[1]]
                terms = frozenset(terms_of(quote)) & asked
                own = _share(asked, terms, weight)
                lent = _share(asked, above - terms, weight) / 2
                lead = _LEAD if place == 0 or terms & frozenset(terms_of(quote[:_LEAD_CHARACTERS])) else 1.0
                score = (own + lent) * lead * passage.score / best if own else 0.0
                found.append(_Sentence(number, place, passage.document, span, quote, terms, score))
                place += 1
    return found


def _choose(candidates: list[_Sentence], asked: frozenset[str], weight: Callable[[str], float]) -> list[_Sentence]:
    """The best sentence, what it refers back to, and sentences that add what is still missing; in reading order."""
    by_place = {(item.passage, item.place): item for item in candidates}
    ranked = sorted((item for item in candidates if item.score > 0), key=lambda item: -item.score)
    chosen: list[_Sentence] = []
    covered: frozenset[str] = frozenset()
    for item in ranked:
        if chosen and item.passage != ranked[0].passage and item.score < _FAR * ranked[0].score:
            continue  # from elsewhere only what is nearly as good
        adjacent = any(item.passage == other.passage and abs(item.place - other.place) == 1 for other in chosen)
        adds = _share(asked, item.terms - covered, weight) >= _ENOUGH
        if item in chosen or (chosen and not adds and not (adjacent and item.score >= 0.5 * ranked[0].score)):
            continue
        group = [*_referred_to(item, by_place), item]
        if len({*chosen, *group}) > MAX_SENTENCES:
            break
        chosen += [sentence for sentence in group if sentence not in chosen]
        covered = covered.union(*(sentence.terms for sentence in group))
    if chosen and sum(size_of(item.text) for item in chosen) < _SHORT:
        following = by_place.get((chosen[-1].passage, chosen[-1].place + 1))
        chosen += [following] if following else []
    return sorted(chosen, key=lambda item: (item.passage, item.place))


def _referred_to(item: _Sentence, by_place: Mapping[tuple[int, int], _Sentence]) -> list[_Sentence]:
    """Up to two sentences before one that begins with "this", "therefore" and the like."""
    before: list[_Sentence] = []
    while _REFERS_BACK.match(item.text) and len(before) < 2:
        former = by_place.get((item.passage, item.place - 1))
        if former is None:
            break
        before.insert(0, former)
        item = former
    return before


def _share(asked: frozenset[str], held: frozenset[str], weight: Callable[[str], float]) -> float:
    whole = sum(map(weight, asked))
    return sum(weight(term) for term in asked & held) / whole if whole else 0.0


def _ended(sentence: str, language: Language) -> str:
    """The sentence with a full stop when it has no end mark (an item of a list)."""
    if sentence.endswith((".", "!", "?", "。", "！", "？", "…", "”", "」")):
        return sentence
    return sentence.rstrip(":;,：；，") + ("。" if language == "zh" else ".")
