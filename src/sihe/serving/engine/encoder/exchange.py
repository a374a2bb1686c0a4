"""A request to an encoder as shadow and log see it (`serving.exchange`): asked again, compared, written down."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import orjson

from sihe.serving.engine.encoder.agreement import SAME_COSINE, cosines, same_order
from sihe.serving.engine.encoder.job import EncodeJob
from sihe.serving.engine.encoder.ports import Encoder
from sihe.serving.engine.encoder.types import Capability, EmbeddingRequest, Encoded, RerankRequest
from sihe.serving.errors import WrongCapability
from sihe.serving.exchange import MAX_CHARACTERS, MAX_NUMBERS, Agreement, Answer, Written, fitting, held_bytes


@dataclass(frozen=True, slots=True)
class Encoding:
    """Texts to encode, or documents to score."""

    request: EmbeddingRequest | RerankRequest

    @property
    def kind(self) -> Capability:
        """What it asks for."""
        return "rerank" if isinstance(self.request, RerankRequest) else "embeddings"

    @property
    def tenant(self) -> str:
        """Who asked."""
        return self.request.tenant

    @property
    def size(self) -> int:
        """Its characters, and its tokens."""
        if isinstance(self.request, RerankRequest):
            return len(self.request.query) + sum(len(document) for document in self.request.documents)
        return sum(len(item) for item in self.request.inputs)

    def begin(self, served: object) -> EncodingJob:
        """Asks another version. Raises `WrongCapability`, and what is wrong with the request for that one."""
        has = getattr(served, "capability", "generation")
        if has != self.kind:
            raise WrongCapability("the shadow", wanted=self.kind, has=has)
        return EncodingJob(cast("Encoder", served).submit(replace(self.request, tenant="")), self.kind)

    def written(self) -> Written:
        """The body's own fields; of many texts the first, with `count` for how many there were."""
        request = self.request
        if isinstance(request, RerankRequest):
            query = request.query[:MAX_CHARACTERS]
            documents = fitting(request.documents, MAX_CHARACTERS - len(query))
            kept: dict[str, Any] = {"query": query, "documents": documents}
            whole: dict[str, Any] = {"query": request.query, "documents": request.documents}
            count = len(request.documents)
        else:
            whole, count = {"input": request.inputs}, len(request.inputs)
            kept = {"input": _fitting(request.inputs)}
            documents = kept["input"]
        if len(documents) < count:
            kept["count"] = count
        text = json.dumps(whole, ensure_ascii=False)
        return Written(json.dumps(kept, ensure_ascii=False), len(text), (text.encode("utf-8", "surrogatepass"),))


@dataclass(frozen=True, slots=True)
class EncodingJob:
    """What an encoder is at."""

    job: EncodeJob
    kind: Capability

    def result(self) -> EncodingAnswer:
        """Blocks. Raises `StreamClosed` once closed, and the encoder's error."""
        return EncodingAnswer(self.job.result(), self.kind)

    def close(self) -> None:
        """What has not been computed will not be."""
        self.job.close()


@dataclass(frozen=True, slots=True)
class EncodingAnswer:
    """Vectors, or scores."""

    encoded: Encoded
    kind: Capability

    @property
    def prompt_tokens(self) -> int:
        """Tokens that were read."""
        return self.encoded.num_tokens

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        return held_bytes(self.encoded.values)

    def agreement(self, other: Answer) -> Agreement:
        """The mean cosine of vectors; of scores, the share of pairs of documents in the same order."""
        other_values = other.encoded.values if isinstance(other, EncodingAnswer) else np.empty((0, 0), np.float32)
        if self.kind == "rerank":
            has_scores = other_values.ndim == 2 and other_values.shape[1] == 1
            order = same_order(self.encoded.values[:, 0], other_values[:, 0]) if has_scores else 0.0
            return Agreement(order, order == 1.0, "order")
        found = cosines(self.encoded.values, other_values)
        if found is None:
            return Agreement(0.0, False, "cosine")
        return Agreement(float(found.mean()), bool((found >= SAME_COSINE).all()), "cosine")

    def written(self) -> Written:
        """The rows; of many the first, whole ones, and `shape` says what there was."""
        values = self.encoded.values
        rows = max(1, MAX_NUMBERS // max(1, values.shape[1]))
        if self.kind == "rerank":
            kept: dict[str, Any] = {"relevance_scores": values[:rows, 0].tolist(), "count": len(values)}
        else:
            kept = {"shape": list(values.shape), "embeddings": values[:rows].tolist()}
        whole = (f"{list(values.shape)}/".encode(), values.astype("<f4").tobytes())
        return Written(orjson.dumps(kept).decode(), len(whole[1]), whole)


def _fitting(inputs: tuple[str | tuple[int, ...], ...]) -> list[str | list[int]]:
    """The first inputs, of which the last may be cut."""
    kept: list[str | list[int]] = []
    characters, numbers = MAX_CHARACTERS, MAX_NUMBERS
    for item in inputs:
        if characters <= 0 or numbers <= 0:
            break
        if isinstance(item, str):
            kept.append(item[:characters])
            characters -= len(item)
        else:
            kept.append(list(item[:numbers]))
            numbers -= len(item)
    return kept
