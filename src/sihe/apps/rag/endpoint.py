"""The generator behind an address: any server that speaks OpenAI's chat completions, a local deployment included."""

from __future__ import annotations

from collections.abc import Sequence

from sihe.apps.rag.ports import Message
from sihe.core.errors import ConfigError, Unauthorized, Unreachable


class ChatEndpoint:
    """An OpenAI-compatible `/chat/completions`, over httpx."""

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model

    def complete(self, messages: Sequence[Message], *, max_tokens: int) -> str:
        """The assistant's next turn. Raises `Unreachable`, `Unauthorized` or `ConfigError` (the model is unknown)."""
        import httpx

        body = {
            "model": self._model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        try:
            response = httpx.post(self._url, json=body, headers=self._headers, timeout=self._timeout_s)
        except httpx.InvalidURL as error:
            raise ConfigError(f"setting 'llm.base_url': {error}, got {self._url!r}", key="llm.base_url") from error
        except httpx.HTTPError as error:
            raise Unreachable(self._url, str(error) or type(error).__name__) from error
        if response.status_code in (401, 403):
            raise Unauthorized(f"{self._url} refused the key: set llm.api_key to one that it knows")
        if response.status_code == 429 or response.status_code >= 500:
            raise Unreachable(self._url, f"HTTP {response.status_code}")
        if response.status_code >= 400:
            raise ConfigError(
                f"{self._url} refused the request for model {self._model!r}: HTTP {response.status_code} "
                f"{response.text[:200]!r}: check llm.base_url and llm.model",
                key="llm.model",
            )
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise Unreachable(self._url, f"it gave no chat completion but {response.text[:80]!r}") from error
        return str(content or "")
