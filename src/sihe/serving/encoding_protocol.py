"""The bodies of /v1/embeddings (OpenAI's) and /v1/rerank (Jina's and Cohere's), and their answers as bytes.

Fields that clients send and that change nothing here are accepted; fields that would change the answer and are not
supported are refused by name, as everywhere in the protocol.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from sihe.serving.engine.encoder.types import EmbeddingRequest, Encoded, RerankRequest
from sihe.serving.errors import UnsupportedParameter

# Parameters of other servers, with the values that mean "not used".
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "truncate_prompt_tokens": (None,),
    "truncate": (None, False, "NONE"),
    "normalize": (None, True),
    "normalized": (None, True),
    "embedding_type": (None, "float", "base64"),
    "late_chunking": (None, False),
    "task": (None,),
    "input_type": (None,),
    "rank_fields": (None, []),
}
_HINTS = {
    "truncate": "send texts that fit",
    "truncate_prompt_tokens": "send texts that fit",
    "task": "name one of the model's prompts as prompt_name",
    "input_type": "name one of the model's prompts as prompt_name",
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1)
    user: str | None = None

    def _refuse_unsupported(self) -> None:
        for name, neutral in _NEUTRAL.items():
            value = (self.model_extra or {}).get(name)
            if value not in neutral:
                raise UnsupportedParameter(name, value, hint=_HINTS.get(name, "leave it out"))


class EmbeddingsBody(_Body):
    """POST /v1/embeddings. `prompt_name` is sentence-transformers' name for one of the model's own prompts."""

    input: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    prompt_name: str | None = None

    def to_request(self, tenant: str) -> EmbeddingRequest:
        """The same for the encoder. Raises `InvalidRequest`, `UnsupportedParameter`."""
        self._refuse_unsupported()
        given: Any = self.input
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        inputs = tuple(item if isinstance(item, str) else tuple(item) for item in given)
        return EmbeddingRequest(inputs, self.dimensions, self.prompt_name, tenant)

    def answer(self, encoded: Encoded) -> bytes:
        """The body of the answer."""
        rows: Any = encoded.values
        if self.encoding_format == "base64":
            rows = [base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in encoded.values]
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        usage = {"prompt_tokens": encoded.num_tokens, "total_tokens": encoded.num_tokens}
        body = {"object": "list", "data": data, "model": self.model, "usage": usage}
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str


class RerankBody(_Body):
    """POST /v1/rerank. `max_tokens_per_doc` cuts each document; without it one that does not fit is refused."""

    query: str
    documents: list[str | _Document]
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool | None = None
    max_tokens_per_doc: int | None = None

    def to_request(self, tenant: str) -> RerankRequest:
        """The same for the encoder. Raises `InvalidRequest`, `UnsupportedParameter`."""
        self._refuse_unsupported()
        return RerankRequest(self.query, tuple(self._texts()), self.max_tokens_per_doc, tenant)

    def answer(self, id: str, encoded: Encoded) -> bytes:
        """The body of the answer: the best first, equal ones in the order in which they came."""
        scores = encoded.values[:, 0]
        best = np.argsort(-scores, kind="stable")[: self.top_n]
        texts = self._texts() if self.return_documents else []
        results = []
        for index in best.tolist():
            result: dict[str, Any] = {"index": index, "relevance_score": float(scores[index])}
            if texts:
                result["document"] = {"text": texts[index]}
            results.append(result)
        usage = {"prompt_tokens": encoded.num_tokens, "total_tokens": encoded.num_tokens}
        return orjson.dumps({"id": id, "model": self.model, "results": results, "usage": usage})

    def _texts(self) -> list[str]:
        return [item if isinstance(item, str) else item.text for item in self.documents]
