"""Finding documents that repeat another: exactly, and nearly.

Near duplicates are found by MinHash with banded LSH (Broder 1997; Leskovec, Rajaraman & Ullman, "Mining of Massive
Datasets", chapter 3) and then *measured*: a document is dropped only when the Jaccard similarity of its shingles with a
document that stays is at least the threshold, counted exactly. So chance can only let a duplicate pass, never drop a
document, and every dropped one has a named twin among those kept. Documents are taken in the order given, the first of
a cluster stays, and the outcome is the same on every machine.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from rensa import RMinHash

from sihe.core.errors import InvalidInput
from sihe.data.text.types import Verdict

SHINGLE_WORDS = 5
# A pair of similarity s meets in a band with probability 1 - (1 - s^5)^24: 99.99 % at 0.8, 6 % at 0.3.
_BANDS, _ROWS = 24, 5
_SEED = 0x51E
_BATCH_SHINGLES = 4_000_000
_SPACE = re.compile(r"\s+")

_WORD, _SINGLE = 1, 2  # classes of characters: part of a word; a word by itself (Han, kana)


def exact_key(text: str) -> str:
    """SHA-256 of the text without regard to case, to white space, and to the ways Unicode writes one character."""
    normal = _SPACE.sub(" ", unicodedata.normalize("NFKC", text).lower()).strip()
    return hashlib.sha256(normal.encode()).hexdigest()


def exact_duplicates(texts: Iterable[str]) -> dict[int, int]:
    """Index of each text that repeats an earlier one → index of that one."""
    first: dict[str, int] = {}
    found = {}
    for index, text in enumerate(texts):
        earlier = first.setdefault(exact_key(text), index)
        if earlier != index:
            found[index] = earlier
    return found


@dataclass
class NearDuplicates:
    """An index that takes texts one batch after another and tells which repeat a text taken before.

    Keeps the shingles of every text that stays, 8 bytes each, and 24 band keys a text.
    """

    threshold: float = 0.8
    _shingles: list[np.ndarray] = field(default_factory=list)
    _buckets: defaultdict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    _kept: list[int] = field(default_factory=list)
    _taken: int = 0

    def __post_init__(self) -> None:
        if not 0.5 <= self.threshold <= 1:
            raise InvalidInput(f"a threshold lies in [0.5, 1] (below, the bands miss pairs), got {self.threshold!r}")

    def add(self, texts: Sequence[str]) -> list[tuple[int, float] | None]:
        """For each text None if it stays, else (number of its twin, similarity); texts are numbered from 0 as taken."""
        sets = [shingles(text) for text in texts]
        return [self._place(own, keys) for own, keys in zip(sets, _band_keys(sets), strict=True)]

    def _place(self, own: np.ndarray, keys: Sequence[tuple[int, int]]) -> tuple[int, float] | None:
        number = self._taken
        self._taken += 1
        candidates = sorted({place for key in keys for place in self._buckets.get(key, ())})
        for place in candidates:
            similarity = jaccard(own, self._shingles[place], at_least=self.threshold)
            if similarity >= self.threshold:
                return self._kept[place], similarity
        for key in keys:
            self._buckets[key].append(len(self._shingles))
        self._shingles.append(own)
        self._kept.append(number)
        return None


def near_verdicts(paths: Sequence[str], found: Sequence[tuple[int, float] | None]) -> list[Verdict]:
    """The verdicts for documents with these paths."""
    return [
        Verdict("kept") if twin is None else Verdict("near duplicate", "jaccard", round(twin[1], 4), paths[twin[0]])
        for twin in found
    ]


def jaccard(a: np.ndarray, b: np.ndarray, *, at_least: float = 0.0) -> float:
    """Similarity of two sorted arrays of distinct shingles; 0.0 at once when their sizes rule out `at_least`."""
    small, large = sorted((a.size, b.size))
    if not large or small < at_least * large:
        return 0.0
    common = np.intersect1d(a, b, assume_unique=True).size
    return float(common / (small + large - common))


def shingles(text: str) -> np.ndarray:
    """The distinct hashes (uint64, sorted) of every run of five words, in numpy throughout.

    Words are runs of letters, digits and `_`; each Han or kana character is a word of its own. A text of fewer than
    five words is one shingle. The hash of a word is a polynomial in its characters modulo 2^64, taken from prefix sums.
    """
    points = np.frombuffer(unicodedata.normalize("NFKC", text).lower().encode("utf-32-le", "replace"), np.uint32)
    kinds = _classes()[np.minimum(points, 0xFFFF)]
    kinds = np.where((points >= 0x20000) & (points < 0x40000), np.uint8(_SINGLE), kinds)
    before = np.concatenate([np.zeros(1, np.uint8), kinds[:-1]])
    after = np.concatenate([kinds[1:], np.zeros(1, np.uint8)])
    starts = np.flatnonzero((kinds == _SINGLE) | ((kinds == _WORD) & (before != _WORD)))
    stops = np.flatnonzero((kinds == _SINGLE) | ((kinds == _WORD) & (after != _WORD))) + 1
    if not starts.size:
        return np.empty(0, np.uint64)
    words = _mix(_run_hashes(points, starts, stops))
    width = min(SHINGLE_WORDS, words.size)
    count = words.size - width + 1
    runs = np.zeros(count, np.uint64)
    for offset in range(width):
        runs = runs * _BASE + words[offset : offset + count]
    return np.unique(_mix(runs))


_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))  # the base is odd, so it divides modulo 2^64


def _run_hashes(points: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """sum of point[i] * base^(i - start) for each run, from differences of one prefix sum."""
    powers = np.cumprod(np.full(points.size, _BASE), dtype=np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mix(points.astype(np.uint64)) * powers, dtype=np.uint64)])
    inverses = np.cumprod(np.full(points.size, _INVERSE), dtype=np.uint64)
    found: np.ndarray = (sums[stops] - sums[starts]) * inverses[starts]
    return found


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: equal inputs stay equal, alike ones part."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_class_table: list[np.ndarray] = []


def _classes() -> np.ndarray:
    """For each character of the basic plane whether it is part of a word, a word by itself, or neither."""
    if not _class_table:
        table = np.fromiter((chr(point).isalnum() for point in range(1 << 16)), np.uint8, 1 << 16) * np.uint8(_WORD)
        table[ord("_")] = _WORD
        for first, last in ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)):
            table[first : last + 1][table[first : last + 1] == _WORD] = _SINGLE
        _class_table.append(table)
    return _class_table[0]


def _band_keys(sets: Sequence[np.ndarray]) -> list[list[tuple[int, int]]]:
    """For each set of shingles its band keys; a set without shingles has none and so equals nothing."""
    keys: list[list[tuple[int, int]]] = []
    for batch in _batches(sets):
        offsets = np.cumsum([0, *(own.size for own in batch)]).tolist()
        flat = np.concatenate(batch) if batch else np.empty(0, np.uint64)
        digests = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, num_perm=_BANDS * _ROWS, seed=_SEED)
        matrix = np.array(digests.to_rows(), dtype=np.uint64).reshape(len(batch), _BANDS, _ROWS)
        folded = np.zeros(matrix.shape[:2], np.uint64)
        for row in range(_ROWS):
            folded = _mix(folded * _BASE + matrix[:, :, row])
        keys += [
            list(enumerate(values)) if own.size else [] for own, values in zip(batch, folded.tolist(), strict=True)
        ]
    return keys


def _batches(sets: Sequence[np.ndarray]) -> Iterable[Sequence[np.ndarray]]:
    start, size = 0, 0
    for index, own in enumerate(sets):
        size += own.size
        if size >= _BATCH_SHINGLES or index == len(sets) - 1:
            yield sets[start : index + 1]
            start, size = index + 1, 0
