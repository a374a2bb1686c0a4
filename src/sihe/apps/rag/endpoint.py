"""Models behind an address: any server that speaks OpenAI's protocol, or Jina's for reranking, a local one included."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sihe.apps.rag.ports import Message
from sihe.apps.rag.types import Language
from sihe.core.errors import ConfigError, Unauthorized, Unreachable

_TEXTS_A_REQUEST = 256
_VERSION = "x-sihe-model-version"


class ChatEndpoint:
    """An OpenAI-compatible `/chat/completions`, over httpx."""

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        self._post = _Poster(base_url, "/chat/completions", model, api_key, timeout_s)
        self._model = model

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model

    def complete(self, messages: Sequence[Message], *, max_tokens: int) -> str:
        """The assistant's next turn. Raises `Unreachable`, `Unauthorized` or `ConfigError` (the model is unknown)."""
        answer, _ = self._post(
            {
                "messages": [{"role": message.role, "content": message.content} for message in messages],
                "max_tokens": max_tokens,
                "temperature": 0,
            }
        )
        try:
            content = answer["choices"][0]["message"]["content"]
        except (LookupError, TypeError) as error:
            raise self._post.strange("chat completion", answer) from error
        return str(content or "")


class EmbeddingsEndpoint:
    """An `Embedder` behind an OpenAI-compatible `/embeddings`, over httpx.

    Its name is that of the version that answers, where the server tells it (ours does): vectors of two versions are not
    compared. When another version begins to answer, that one call raises `Unreachable`, and the name is the new one.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        languages: frozenset[Language] = frozenset({"en", "zh"}),
        api_key: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self._post = _Poster(base_url, "/embeddings", model, api_key, timeout_s)
        self._model = model
        self._lock = threading.Lock()
        self._known: tuple[str, int] | None = None
        self.languages = languages

    @property
    def name(self) -> str:
        """The version that answers. Asks once. Raises as `embed`."""
        return self._probed()[0]

    @property
    def dim(self) -> int:
        """Length of the vectors. Asks once. Raises as `embed`."""
        return self._probed()[1]

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """One row of length 1 for each text. Raises `Unreachable`, `Unauthorized`, `ConfigError`."""
        name, dim = self._probed()
        rows = np.empty((len(texts), dim), np.float32)
        for start in range(0, len(texts), _TEXTS_A_REQUEST):
            part = texts[start : start + _TEXTS_A_REQUEST]
            found, vectors = self._ask(part)
            if (found, vectors.shape[1]) != (name, dim):
                with self._lock:
                    self._known = found, vectors.shape[1]
                raise Unreachable(
                    self._post.url, f"{found} answers now in place of {name}: index again with its vectors"
                )
            rows[start : start + len(part)] = vectors
        return rows

    def _probed(self) -> tuple[str, int]:
        with self._lock:
            if self._known is None:
                name, rows = self._ask(["a"])
                self._known = name, rows.shape[1]
            return self._known

    def _ask(self, texts: Sequence[str]) -> tuple[str, npt.NDArray[np.float32]]:
        answer, headers = self._post({"input": list(texts), "encoding_format": "float"})
        try:
            items = sorted(answer["data"], key=lambda item: int(item["index"]))
            rows = np.array([item["embedding"] for item in items], np.float32)
        except (LookupError, TypeError, ValueError) as error:
            raise self._post.strange("embeddings", answer) from error
        if rows.ndim != 2 or len(rows) != len(texts):
            raise self._post.strange(f"{len(texts)} embeddings", answer)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return headers.get(_VERSION, self._model), rows


class RerankEndpoint:
    """A `Reranker` behind Jina's `/rerank`, over httpx. Of each text the first `max_tokens` are read."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        max_tokens: int = 256,
        api_key: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self._post = _Poster(base_url, "/rerank", model, api_key, timeout_s)
        self._model = model
        self._max_tokens = max_tokens

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model

    def score(self, query: str, texts: Sequence[str]) -> list[float]:
        """How well each text answers the query, 0 to 1. Raises `Unreachable`, `Unauthorized`, `ConfigError`."""
        body = {"query": query, "documents": list(texts), "max_tokens_per_doc": self._max_tokens}
        answer, _ = self._post(body)
        try:
            found = {int(item["index"]): float(item["relevance_score"]) for item in answer["results"]}
            return [found[index] for index in range(len(texts))]
        except (LookupError, TypeError, ValueError) as error:
            raise self._post.strange(f"{len(texts)} scores", answer) from error


class _Poster:
    """One path of a server, asked for one model."""

    def __init__(self, base_url: str, path: str, model: str, api_key: str | None, timeout_s: float) -> None:
        self.url = base_url.rstrip("/") + path
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s

    def __call__(self, body: Mapping[str, Any]) -> tuple[Any, Mapping[str, str]]:
        """The answer to a body, and its headers. Raises what a caller can do something about."""
        import httpx

        try:
            response = httpx.post(
                self.url, json={"model": self._model, **body}, headers=self._headers, timeout=self._timeout_s
            )
        except httpx.InvalidURL as error:
            raise ConfigError(f"setting 'llm.base_url': {error}, got {self.url!r}", key="llm.base_url") from error
        except httpx.HTTPError as error:
            raise Unreachable(self.url, str(error) or type(error).__name__) from error
        if response.status_code in (401, 403):
            raise Unauthorized(f"{self.url} refused the key: set llm.api_key to one that it knows")
        if response.status_code == 429 or response.status_code >= 500:
            raise Unreachable(self.url, f"HTTP {response.status_code}")
        if response.status_code >= 400:
            raise ConfigError(
                f"{self.url} refused the request for model {self._model!r}: HTTP {response.status_code} "
                f"{response.text[:200]!r}: check llm.base_url and llm.model",
                key="llm.model",
            )
        try:
            return response.json(), response.headers
        except ValueError as error:
            raise self.strange("answer", response.text) from error

    def strange(self, expected: str, answer: object) -> Unreachable:
        """That what came is not what was asked for."""
        return Unreachable(self.url, f"it gave no {expected} but {str(answer)[:80]!r}")
