"""BM25 over terms, by bm25s: saved as plain arrays, loaded through memory maps, never through pickle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import orjson

K1, B = 1.2, 0.75  # Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009, §3.4.2


class Bm25:
    """Scores of chunks for a question. `frequencies` says in how many of the `size` chunks a term occurs."""

    def __init__(self, engine: Any, frequencies: Mapping[str, int], size: int) -> None:
        self._engine = engine
        self.frequencies = frequencies
        self.size = size

    @classmethod
    def build(cls, documents: Sequence[Sequence[str]]) -> Bm25:
        """The index of at least one document, each a list of terms."""
        import bm25s

        engine = bm25s.BM25(k1=K1, b=B)
        engine.index([list(terms) for terms in documents], show_progress=False)
        frequencies = Counter(term for terms in documents for term in set(terms))
        return cls(engine, frequencies, len(documents))

    @classmethod
    def load(cls, folder: Path) -> Bm25:
        """What `save` wrote."""
        import bm25s

        engine = bm25s.BM25.load(folder, mmap=False, show_progress=False, allow_pickle=False)
        extra = orjson.loads((folder / "frequencies.json").read_bytes())
        return cls(engine, extra["frequencies"], extra["size"])

    def save(self, folder: Path) -> None:
        """Writes the index into a new folder."""
        self._engine.save(folder, show_progress=False)
        extra = {"frequencies": dict(self.frequencies), "size": self.size}
        (folder / "frequencies.json").write_bytes(orjson.dumps(extra))

    def search(self, terms: Iterable[str], k: int) -> dict[int, float]:
        """The `k` best chunks with a positive score: number → score."""
        known = [term for term in terms if term in self.frequencies]
        if not known:
            return {}
        scores = self._engine.get_scores(known)
        count = min(k, len(scores))
        best = np.argpartition(-scores, count - 1)[:count]
        return {int(index): float(scores[index]) for index in best if scores[index] > 0}

    def weight(self, term: str) -> float:
        """Inverse document frequency: how much a term says. An unknown term says the most."""
        found = self.frequencies.get(term, 0)
        return log(1 + (self.size - found + 0.5) / (found + 0.5))
