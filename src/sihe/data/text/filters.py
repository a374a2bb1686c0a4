"""Rules that a document must pass to be learned from; each verdict names the rule and the value that broke it.

Prose follows MassiveText: Rae et al. 2021, "Scaling Language Models" (Gopher), appendix A.1.1, whose numbers are used
unchanged for text of words. Chinese has no spaces between words, so there the rules that count words are replaced by
ones on characters (marked "ours"). Code follows Chen et al. 2021, "Evaluating Large Language Models Trained on Code",
section 3.1 (line lengths, generated files, share of letters and digits), with the 25 % of Allal et al. 2023,
"SantaCoder", section 3, where the former says only "small".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sihe.data.text.types import Document, Verdict

_GOPHER = "Rae et al. 2021, A.1.1"
_CODEX = "Chen et al. 2021, 3.1"
_SANTACODER = "Allal et al. 2023, 3"
_OURS = "ours"

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("•", "-", "*", "‣", "·", "+")
_GENERATED = re.compile(
    r"auto-?generated|automatically generated|generated automatically|file (?:is|was) generated|do not edit",
    re.IGNORECASE,
)
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_PLAIN_LETTER = re.compile(r"[^\W\d_]")
_FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)


class _Text:
    """A document's text with what the measures share. Fenced code inside prose is not judged as prose."""

    def __init__(self, document: Document) -> None:
        self.text = document.text if document.kind == "code" else _FENCE.sub("", document.text)

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def filled_lines(self) -> list[str]:
        return [stripped for line in self.lines if (stripped := line.strip())]

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def word_hashes(self) -> np.ndarray:
        return np.fromiter(map(hash, self.words), np.int64, len(self.words)).view(np.uint64)

    @cached_property
    def word_lengths(self) -> np.ndarray:
        return np.fromiter(map(len, self.words), np.int64, len(self.words))


@dataclass(frozen=True)
class Rule:
    """A measure of a text and the closed range in which it must lie."""

    name: str
    measure: Callable[[_Text], float]
    low: float
    high: float
    source: str


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean_word_length(text: _Text) -> float:
    return _share(float(text.word_lengths.sum()), len(text.words))


def _symbols_per_word(text: _Text) -> float:
    # A "#" that begins a line is a Markdown heading, which the source (web text) did not have.
    hashes = sum(line.lstrip("#").count("#") for line in text.filled_lines)
    return _share(hashes + text.text.count("…") + text.text.count("..."), len(text.words))


def _bullet_lines(text: _Text) -> float:
    return _share(sum(line.startswith(_BULLETS) for line in text.filled_lines), len(text.filled_lines))


def _ellipsis_lines(text: _Text) -> float:
    return _share(sum(line.endswith(("…", "...")) for line in text.filled_lines), len(text.filled_lines))


def _words_with_letters(text: _Text) -> float:
    # The bars of a Markdown table are no words.
    words = [word for word in text.words if word.strip("|-:")]
    return _share(sum(_PLAIN_LETTER.search(word) is not None for word in words), len(words))


def _stop_words(text: _Text) -> float:
    return len(_STOP_WORDS.intersection(word.lower() for word in text.words))


def _repeated(parts: Sequence[str]) -> float:
    return _share(len(parts) - len(set(parts)), len(parts))


def _repeated_characters(parts: Sequence[str]) -> float:
    counts = Counter(parts)
    return _share(sum(len(part) * (count - 1) for part, count in counts.items()), sum(map(len, parts)))


def _paragraphs(text: _Text) -> list[str]:
    return [stripped for part in text.text.split("\n\n") if (stripped := part.strip())]


def _ngrams(text: _Text, n: int) -> tuple[np.ndarray, np.ndarray]:
    """For each n-gram of words its hash and its length in characters."""
    count = len(text.words) - n + 1
    if count < 1:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    hashes = np.zeros(count, np.uint64)
    lengths = np.zeros(count, np.int64)
    for offset in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + text.word_hashes[offset : offset + count]
        lengths += text.word_lengths[offset : offset + count]
    return hashes, lengths


def _top_ngram(n: int) -> Callable[[_Text], float]:
    def measure(text: _Text) -> float:
        hashes, lengths = _ngrams(text, n)
        if not hashes.size:
            return 0.0
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        best = int(np.argmax(counts))
        if counts[best] < 2:  # "the most frequent" of n-grams that all occur once repeats nothing
            return 0.0
        return _share(float(counts[best] * lengths[first[best]]), float(text.word_lengths.sum()))

    return measure


def _duplicate_ngrams(n: int) -> Callable[[_Text], float]:
    def measure(text: _Text) -> float:
        """Share of characters inside n-grams that occurred before; overlapping ones count once."""
        hashes, _ = _ngrams(text, n)
        _, first = np.unique(hashes, return_index=True)
        is_repeat = np.ones(hashes.size, bool)
        is_repeat[first] = False
        steps = np.zeros(len(text.words) + 1, np.int64)
        starts = np.flatnonzero(is_repeat)
        np.add.at(steps, starts, 1)
        np.add.at(steps, starts + n, -1)
        covered = np.cumsum(steps[:-1]) > 0
        return _share(float(text.word_lengths[covered].sum()), float(text.word_lengths.sum()))

    return measure


_INFINITY = float("inf")
_REPETITION = (
    Rule("duplicate lines", lambda text: _repeated(text.filled_lines), 0, 0.30, _GOPHER),
    Rule("duplicate paragraphs", lambda text: _repeated(_paragraphs(text)), 0, 0.30, _GOPHER),
    Rule("characters in duplicate lines", lambda text: _repeated_characters(text.filled_lines), 0, 0.20, _GOPHER),
    Rule("characters in duplicate paragraphs", lambda text: _repeated_characters(_paragraphs(text)), 0, 0.20, _GOPHER),
)
_LAYOUT = (
    Rule("lines that begin with a bullet", _bullet_lines, 0, 0.90, _GOPHER),
    Rule("lines that end with an ellipsis", _ellipsis_lines, 0, 0.30, _GOPHER),
)
_WORDS = (
    Rule("words", lambda text: len(text.words), 50, 100_000, _GOPHER),
    Rule("mean word length", _mean_word_length, 3, 10, _GOPHER),
    Rule("symbols per word", _symbols_per_word, 0, 0.10, _GOPHER),
    *_LAYOUT,
    Rule("share of words with a letter", _words_with_letters, 0.80, 1, _GOPHER),
)
_TOP_NGRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
_DUPLICATE_NGRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
_NGRAMS = (
    *(Rule(f"characters in the top {n}-gram", _top_ngram(n), 0, high, _GOPHER) for n, high in _TOP_NGRAMS),
    *(
        Rule(f"characters in duplicate {n}-grams", _duplicate_ngrams(n), 0, high, _GOPHER)
        for n, high in _DUPLICATE_NGRAMS
    ),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "en": (*_WORDS, Rule("stop words", _stop_words, 2, _INFINITY, _GOPHER), *_REPETITION, *_NGRAMS),
    "other": (*_WORDS, *_REPETITION, *_NGRAMS),
    "zh": (
        Rule("Chinese characters", lambda text: len(_HAN.findall(text.text)), 50, 200_000, _OURS),
        *_LAYOUT,
        *_REPETITION,
    ),
    "code": (
        Rule("characters", lambda text: len(text.text), 100, _INFINITY, _OURS),
        Rule("longest line", lambda text: max(map(len, text.lines), default=0), 0, 1000, _CODEX),
        Rule("mean line length", lambda text: _share(len(text.text), len(text.lines)), 0, 100, _CODEX),
        Rule(
            "share of letters and digits",
            lambda text: _share(sum(map(str.isalnum, text.text)), len(text.text)),
            0.25,
            1,
            _SANTACODER,
        ),
        Rule(
            "mark of a generated file",
            lambda text: float(any(_GENERATED.search(line) for line in text.lines[:5])),
            0,
            0,
            _CODEX,
        ),
    ),
}


def rules_for(document: Document) -> tuple[Rule, ...]:
    """The rules by which a document is judged."""
    return RULES["code" if document.kind == "code" else document.language]


def judge(document: Document) -> Verdict:
    """Kept, or of low quality by the first rule that it breaks."""
    text = _Text(document)
    for rule in rules_for(document):
        value = rule.measure(text)
        if not rule.low <= value <= rule.high:
            return Verdict("low quality", rule.name, round(float(value), 4))
    return Verdict("kept")
