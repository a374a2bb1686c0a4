"""What goes into an encoder and what comes out. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sihe.serving.errors import InvalidRequest

Capability = Literal["embeddings", "rerank"]
Floats = NDArray[np.float32]

MAX_INPUTS = 2048  # OpenAI's limit of texts in one request (platform.openai.com/docs/api-reference/embeddings)


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts, or token ids taken as they are, to turn into vectors; checked when made.

    `dimensions` keeps so many of a vector's first numbers and brings it back to length 1 (Kusupati et al. 2022,
    Matryoshka representation learning, arXiv 2205.13147): good vectors where the model was trained for it. `prompt`
    names one of the model's own prompts, such as `query`, to stand before each text. Requests of one `tenant` take
    turns with those of others.
    """

    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    prompt: str | None = None
    tenant: str = ""

    def __post_init__(self) -> None:
        _check_count("input", len(self.inputs))
        for index, item in enumerate(self.inputs):
            if len(item) == 0:
                raise invalid("input", index, "is empty: give at least one token")
        if self.dimensions is not None and self.dimensions < 1:
            raise invalid("dimensions", None, f"is at least 1, got {self.dimensions!r}")


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """A query and documents to score against it; checked when made.

    Of each document at most `max_document_tokens` are read, if that is given; without it one that does not fit into the
    model beside the query is refused.
    """

    query: str
    documents: tuple[str, ...]
    max_document_tokens: int | None = None
    tenant: str = ""

    def __post_init__(self) -> None:
        _check_count("documents", len(self.documents))
        if not self.query:
            raise invalid("query", None, "is empty: write something")
        for index, document in enumerate(self.documents):
            if not document:
                raise invalid("documents", index, "is empty: leave it out")
        if self.max_document_tokens is not None and self.max_document_tokens < 1:
            raise invalid("max_tokens_per_doc", None, f"is at least 1, got {self.max_document_tokens!r}")


def _check_count(name: str, count: int) -> None:
    if not 1 <= count <= MAX_INPUTS:
        raise invalid(name, None, f"has 1 to {MAX_INPUTS} items, got {count}")


def invalid(parameter: str, index: int | None, message: str) -> InvalidRequest:
    """That a field of a request, or one item of it, cannot be encoded."""
    return InvalidRequest(parameter, f"{parameter if index is None else f'{parameter}[{index}]'} {message}")


@dataclass(frozen=True, slots=True)
class Document:
    """One text as the model reads it. `types` are its segments, None where all of it is the first one."""

    tokens: list[int]
    types: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """The answer: a row for each input, in its order, [inputs, width]; a reranker's rows have one number in 0..1."""

    values: Floats = field(repr=False)
    num_tokens: int
    served_by: str
