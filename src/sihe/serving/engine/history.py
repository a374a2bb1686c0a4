"""Which tokens a text holds already, for the penalties on saying them again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenHistory:
    """The distinct tokens of a prompt and its answer, with how often each stands in the answer.

    `push` costs O(1); the arrays that a step reads hold one entry a distinct token and are never counted anew.
    `repetition` acts on prompt and answer (Keskar et al. 2019, arXiv:1909.05858, section 4.1), `presence` and
    `frequency` on the answer alone (OpenAI's definition).
    """

    def __init__(
        self, prompt: Sequence[int], *, repetition: float = 1.0, presence: float = 0.0, frequency: float = 0.0
    ) -> None:
        self.repetition = repetition
        self.presence = presence
        self.frequency = frequency
        known = list(dict.fromkeys(prompt)) if repetition != 1 else []
        self._place = {token: place for place, token in enumerate(known)}
        self._ids = np.zeros(max(64, 2 * len(known)), dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._ids[: len(known)] = known

    def push(self, token: int) -> None:
        """The answer goes on with `token`."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1

    def entries(self, drafted: Sequence[int] = ()) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Token ids and their counts in the answer, as if it went on with `drafted`; not to be written to."""
        ids, counts = self._ids[: len(self._place)], self._counts[: len(self._place)]
        if not drafted:
            return ids, counts
        new = [token for token in dict.fromkeys(drafted) if token not in self._place]
        ids = np.concatenate([ids, np.array(new, dtype=np.int64)])
        counts = np.concatenate([counts, np.zeros(len(new), dtype=np.float32)])
        place = {token: len(self._place) + at for at, token in enumerate(new)}
        for token in drafted:
            counts[self._place[token] if token in self._place else place[token]] += 1
        return ids, counts
