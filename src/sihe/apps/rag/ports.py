"""What the RAG needs from elsewhere and does not care who provides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from sihe.apps.rag.types import Language


class Embedder(Protocol):
    """Turns texts into vectors of length 1 whose dot product grows with likeness of meaning."""

    @property
    def name(self) -> str:
        """Identifies model and version: vectors of different names are never compared."""
        ...

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        ...

    @property
    def languages(self) -> frozenset[Language]:
        """What it was trained on: questions in other languages are searched without it."""
        ...

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """One row of length 1 for each text, [len(texts), dim]."""
        ...


class Reranker(Protocol):
    """Reads a question beside each passage and says how well it answers: slower and better than comparing vectors."""

    @property
    def name(self) -> str:
        """What a passage's `retriever` says has ranked it."""
        ...

    def score(self, query: str, texts: Sequence[str]) -> list[float]:
        """A number from 0 to 1 for each text. Raises `TransientError` when they cannot be had now."""
        ...


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class Generator(Protocol):
    """Writes an answer to a chat: a local deployment or any OpenAI-compatible endpoint."""

    @property
    def name(self) -> str:
        """What a reader is told has written the answer."""
        ...

    def complete(self, messages: Sequence[Message], *, max_tokens: int) -> str:
        """The assistant's next turn. Raises `TransientError` when it cannot be had now."""
        ...
