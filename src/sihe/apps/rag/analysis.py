"""Text to the terms that BM25 counts: stemmed English words, Chinese words and, where jieba knows none, bigrams."""

from __future__ import annotations

import re
import threading
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from sihe.apps.rag.stop_words import ASKING_WORDS, STOP_WORDS_EN, STOP_WORDS_ZH
from sihe.apps.rag.types import Language

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

VERSION = 1  # raise it when terms change: indexes are then built anew

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_RUN = re.compile(rf"[{_HAN}]+|[^\W_{_HAN}]+(?:['’][a-z]+)?(?:-[^\W_{_HAN}]+)*")
_HAN_CHARACTER = re.compile(f"[{_HAN}]")
_WORD = re.compile(rf"[^\W\d_{_HAN}]+")


def terms_of(text: str) -> list[str]:
    """The terms of a text in order. Pure; `O(len(text))`.

    A hyphenated word gives its parts and the whole without hyphens, so that *all-reduce* meets *AllReduce*.
    """
    terms: list[str] = []
    for found in _RUN.finditer(text):
        run = found.group()
        if _HAN_CHARACTER.match(run):
            terms += _chinese_terms(run)
            continue
        word = run.lower().replace("’", "'")
        if "-" in word:
            terms += filter(None, map(_english_term, word.split("-")))
            word = word.replace("-", "")
        term = _english_term(word)
        if term:
            terms.append(term)
    return terms


def question_terms(question: str) -> list[str]:
    """The terms of a question without the words of asking, unless nothing else is left."""
    asking = _asking_terms()
    terms = terms_of(question)
    return [term for term in terms if term not in asking] or terms


@cache
def _asking_terms() -> frozenset[str]:
    return frozenset(_stem()(word) if word.isascii() else word for word in ASKING_WORDS)


def language_of(text: str) -> Language:
    """The language that most of a text is in; a Chinese character counts as much as an English word."""
    han = len(_HAN_CHARACTER.findall(text))
    return "zh" if han > len(_WORD.findall(text)) else "en"


def size_of(text: str) -> int:
    """The length of a text in words; two Chinese characters count as about one."""
    return len(_HAN_CHARACTER.findall(text)) // 2 + len(_WORD.findall(text))


@lru_cache(maxsize=65536)
def _english_term(word: str) -> str:
    """The stem of a lower-case word; empty for a stop word."""
    word, _, clipped = word.partition("'")
    if word in STOP_WORDS_EN or clipped == "t":  # don't, isn't, couldn't
        return ""
    return _stem()(word)


@cache
def _stem() -> Callable[[str], str]:
    import Stemmer

    stemmer, lock = Stemmer.Stemmer("english"), threading.Lock()

    def stem(word: str) -> str:
        """The stem of the stem and so on: *autoscaling* gives `autosc` at once, *autoscale* only by `autoscal`."""
        with lock:  # one stemmer is not safe to share
            while (shorter := str(stemmer.stemWord(word))) != word:
                word = shorter
        return word

    return stem


def _chinese_terms(run: str) -> Iterable[str]:
    """Words, the shorter words within long ones, and bigrams over characters that belong to no word."""
    terms: list[str] = []
    single = ""
    for word in _segmenter().cut_for_search(run):
        if len(word) == 1 and word not in STOP_WORDS_ZH:
            single += word
            continue
        terms += _bigrams(single)
        single = ""
        if word not in STOP_WORDS_ZH:
            terms.append(word)
    return [*terms, *_bigrams(single)]


def _bigrams(characters: str) -> list[str]:
    if len(characters) < 2:
        return [characters] if characters else []
    return [characters[index : index + 2] for index in range(len(characters) - 1)]


@cache
def _segmenter() -> Any:
    """jieba with its dictionary, loaded silently and without its cache file.

    The cache lies in the shared temporary folder and is read with `marshal`, where any user of the machine could have
    put it; parsing the dictionary instead costs about a second.
    """
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba 0.42.1: invalid escapes in patterns, pkg_resources where it exists
        import jieba

    jieba.setLogLevel(logging.CRITICAL)
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter
