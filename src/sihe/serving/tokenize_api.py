"""/tokenize and /detokenize, as vLLM has them: what a deployment's own tokenizer makes of a text or a conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from starlette.concurrency import run_in_threadpool

from sihe.core.errors import Forbidden, InvalidInput
from sihe.serving.bodies import read_body
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import InvalidRequest, UnsupportedParameter
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.protocol import parse
from sihe.serving.protocol_fields import Message, tools_of
from sihe.serving.tenants.http import caller_of

if TYPE_CHECKING:
    from sihe.serving.engine.engine import Engine

PATHS = ("/tokenize", "/detokenize")


class TokenizeBody(BaseModel):
    """POST /tokenize: a `prompt`, or `messages` that the chat template renders."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1)
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def answer(self, engine: Engine) -> dict[str, Any]:
        """Token ids, how many, and how many the model reads. Raises `InvalidInput`."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidInput("give exactly one of prompt and messages")
        if self.messages is not None:
            tokens = engine.tokenizer.encode_chat(self._conversation())
        else:
            tokens = engine.tokenizer.encode(self.prompt or "", special=self.add_special_tokens)
        found = {"count": len(tokens), "max_model_len": engine.context_tokens, "tokens": tokens}
        texts = [engine.tokenizer.token_text(token) for token in tokens] if self.return_token_strs else None
        return {**found, "token_strs": texts}

    def _conversation(self) -> GenerationRequest:
        if not self.add_generation_prompt:
            raise UnsupportedParameter("add_generation_prompt", False)
        tools, _, _ = tools_of(self.tools, None)
        return GenerationRequest(
            messages=tuple(message.to_chat() for message in self.messages or ()),
            tools=tools,
            template_options=self.chat_template_kwargs or {},
        )


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1)
    tokens: list[StrictInt]

    def answer(self, engine: Engine) -> dict[str, Any]:
        """The text of the tokens, special ones with it. Raises `InvalidRequest`."""
        for token in self.tokens:
            if not 0 <= token < engine.tokenizer.vocab_size:
                raise InvalidRequest("tokens", f"token ids go from 0 to {engine.tokenizer.vocab_size - 1}, got {token}")
        return {"prompt": engine.tokenizer.decode(self.tokens, special=True)}


def add_tokenizing(routes: APIRouter, gateway: Gateway) -> None:
    """Adds the two routes. The application installs the errors' form."""

    @routes.post("/tokenize", tags=["openai"])
    async def tokenize(request: Request) -> Response:
        """Text to token ids."""
        return await _answer(request, gateway, parse(TokenizeBody, await read_body(request)))

    @routes.post("/detokenize", tags=["openai"])
    async def detokenize(request: Request) -> Response:
        """Token ids to text."""
        return await _answer(request, gateway, parse(DetokenizeBody, await read_body(request)))


async def _answer(request: Request, gateway: Gateway, body: TokenizeBody | DetokenizeBody) -> Response:
    def work(served: object) -> dict[str, Any]:
        if not hasattr(served, "tokenizer"):
            raise UnsupportedParameter("model", body.model, hint="its tokenizer is not in this process")
        return body.answer(cast("Engine", served))

    def call() -> dict[str, Any]:
        if not caller_of(request).may_use(body.model):
            raise Forbidden(f"this key may not use {body.model!r}")
        return gateway.aside(body.model).whole(work)

    return Response(orjson.dumps(await run_in_threadpool(call)), media_type="application/json")
