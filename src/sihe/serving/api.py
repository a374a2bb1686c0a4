"""Serving over HTTP: OpenAI's protocol under /v1, deployments and aliases under /api.

The event loop only parses, waits and writes: tokenising runs on the thread pool and generating on the engine's own
thread. A client that goes away aborts its generation; a client that reads slowly delays nobody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from sihe.core.errors import NotFound, SiheError, TooLarge
from sihe.core.http import status_of
from sihe.core.ids import new_id
from sihe.core.telemetry import logger
from sihe.serving.chunks import DONE, Answer, Kind, error_chunk
from sihe.serving.encoding_api import add_encoding
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationEvent
from sihe.serving.errors import StreamClosed
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.types import DeploymentStatus
from sihe.serving.protocol import ChatRequest, CompletionRequest, error_body, parse
from sihe.serving.tenants.access import Access
from sihe.serving.tenants.api import router as tenants_api
from sihe.serving.tenants.http import access_of, caller_of, require_caller
from sihe.serving.tenants.metering import start

MAX_BODY_BYTES = 16 * 2**20
VERSION_HEADER = "x-sihe-model-version"
_CLIENT_GONE = 499  # nginx's status for it; nobody reads the answer
_log = logger("serving")
_Handler = Callable[[Request, Exception], Response | Awaitable[Response]]


def router(gateway: Gateway, access: Access | None = None) -> APIRouter:
    """Every route of serving. Install the errors' form with `install_errors` on the application.

    Who hands in the `access` closes it after the last request; one that is made here writes usage at exit.
    """
    access = access or Access(gateway.workspace)
    routes = APIRouter(dependencies=[Depends(require_caller(access))])
    _add_models(routes, gateway)
    _add_generation(routes, gateway)
    add_encoding(routes, gateway, _read_body)
    _add_deployments(routes, gateway)
    routes.include_router(tenants_api(access))
    return routes


def install_errors(app: FastAPI) -> None:
    """Answers errors under /v1 in OpenAI's form. Elsewhere the handlers that `app` had before go on, if it had any."""
    for kind in (SiheError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _error_handler(app.exception_handlers.get(kind)))


# ---- /v1 -----------------------------------------------------------------------------------------------------------


def _add_models(routes: APIRouter, gateway: Gateway) -> None:
    @routes.get("/v1/models", tags=["openai"])
    def list_models(request: Request) -> dict[str, Any]:
        """The deployments that serve now, of those that the caller may use."""
        caller = caller_of(request)
        served = [status for status in gateway.served() if status.version is not None and caller.may_use(status.name)]
        return {"object": "list", "data": [_model(status, gateway) for status in served]}

    @routes.get("/v1/models/{name}", tags=["openai"])
    def get_model(name: str, request: Request) -> dict[str, Any]:
        """One deployment."""
        caller = caller_of(request)
        for status in gateway.served():
            if status.name == name and status.version is not None and caller.may_use(name):
                return _model(status, gateway)
        raise NotFound("deployment", name, hint="GET /v1/models lists what serves")


def _model(status: DeploymentStatus, gateway: Gateway) -> dict[str, Any]:
    version = f"{status.target.partition('@')[0]}@{status.version}"
    created = int(status.updated_at.timestamp())
    return {
        "id": status.name,
        "object": "model",
        "created": created,
        "owned_by": "sihe",
        "version": version,
        "capability": gateway.route(status.name).capability,
    }


def _add_generation(routes: APIRouter, gateway: Gateway) -> None:
    @routes.post("/v1/completions", tags=["openai"], openapi_extra=_body_schema(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Completes a prompt."""
        body = parse(CompletionRequest, await _read_body(request))
        return await _generate(request, gateway, body, "text_completion")

    @routes.post("/v1/chat/completions", tags=["openai"], openapi_extra=_body_schema(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Answers a conversation."""
        body = parse(ChatRequest, await _read_body(request))
        return await _generate(request, gateway, body, "chat.completion")


async def _generate(request: Request, gateway: Gateway, body: CompletionRequest | ChatRequest, kind: Kind) -> Response:
    admission, (stream,) = await run_in_threadpool(
        start,
        access_of(request),
        caller_of(request),
        body.model,
        [body.to_generation()],
        lambda wanted: [gateway.generate(body.model, wanted)],
    )
    watch = asyncio.create_task(_close_when_gone(request.receive, stream))
    prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
    answer = Answer(kind, new_id(prefix), int(time.time()), body.model, stream.served_by)
    headers = {VERSION_HEADER: stream.served_by, **admission.headers}
    began = False
    try:
        if body.stream:
            # An error before the first token still gets its own status.
            first = await stream.next_event_async()
            if first is None:
                raise StreamClosed("the client is gone")
            began = True
            chunks = _chunks(stream, first, answer, include_usage=body.include_usage)
            return _EventStream(chunks, stream, watch, headers)
        return Response(answer.whole(await stream.result_async()), media_type="application/json", headers=headers)
    except StreamClosed:
        return Response(status_code=_CLIENT_GONE)
    finally:
        if not began:
            watch.cancel()
            stream.close()


async def _chunks(
    stream: GenerationStream, first: GenerationEvent, answer: Answer, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """The server-sent events of one answer."""
    yield answer.first() + answer.event(first)
    usage, finished = first.usage, first.finish_reason is not None
    try:
        async for event in stream:
            if data := answer.event(event):
                yield data
            usage, finished = event.usage, event.finish_reason is not None
    except Exception as error:  # noqa: BLE001 - the status has been sent: the error becomes an event
        _log.warning("stream_failed", error=repr(error))
        yield error_chunk(error_body(error)[1])
        return
    if finished:
        yield (answer.usage(usage) if include_usage else b"") + DONE


async def _close_when_gone(receive: Receive, stream: GenerationStream) -> None:
    """Aborts the generation when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        continue
    stream.close()


class _EventStream(Response):
    """Sends chunks as they come, each in one write; ends the generation however the sending ends."""

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        stream: GenerationStream,
        watch: asyncio.Task[None],
        headers: dict[str, str],
    ) -> None:
        self._chunks = chunks
        self._stream = stream
        self._watch = watch
        self.status_code = 200
        self.background = None
        self.init_headers({**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the stream to its end, the client's disconnect, or an error of the connection."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._watch.cancel()
            self._stream.close()


async def _read_body(request: Request) -> bytes:
    """The body, of at most `MAX_BODY_BYTES`, whatever its headers say."""
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_BODY_BYTES:
            raise TooLarge(
                f"a body has at most {MAX_BODY_BYTES} bytes: send less", limit=MAX_BODY_BYTES, actual=size, unit="bytes"
            )
        pieces.append(piece)
    return b"".join(pieces)


def _body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """What the API's schema says of a body that is read by hand."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


# ---- /api ----------------------------------------------------------------------------------------------------------


class DeployBody(BaseModel):
    """POST /api/deployments."""

    model_config = ConfigDict(extra="forbid")

    name: str
    target: str = Field(description="model@alias, model@3, or model for its newest version")
    settings: dict[str, Any] = Field(default_factory=dict, description="engine settings that differ from the defaults")


class AliasBody(BaseModel):
    """POST /api/models/{name}/aliases/{alias}."""

    model_config = ConfigDict(extra="forbid")

    version: int = Field(ge=1)


def _add_deployments(routes: APIRouter, gateway: Gateway) -> None:
    @routes.get("/api/deployments", tags=["deployments"])
    def list_deployments() -> list[DeploymentStatus]:
        """Every deployment with its state, version and error."""
        return gateway.list()

    @routes.get("/api/deployments/{name}", tags=["deployments"])
    def get_deployment(name: str) -> DeploymentStatus:
        """One deployment."""
        return gateway.status(name)

    @routes.post("/api/deployments", status_code=201, tags=["deployments"])
    def create_deployment(body: DeployBody) -> DeploymentStatus:
        """Deploys, or changes what a deployment follows."""
        return gateway.deploy(body.name, body.target, settings=EngineConfig.from_mapping(body.settings))

    @routes.delete("/api/deployments/{name}", status_code=204, tags=["deployments"])
    def remove_deployment(name: str) -> None:
        """Drains and frees a deployment."""
        gateway.remove(name)

    @routes.post("/api/models/{name}/aliases/{alias}", tags=["deployments"])
    def move_alias(name: str, alias: str, body: AliasBody) -> dict[str, Any]:
        """Points an alias at a version; deployments that follow it swap."""
        version = gateway.move_alias(name, alias, body.version)
        return {"model": version.name, "alias": alias, "version": version.version}


# ---- errors --------------------------------------------------------------------------------------------------------


def _error_handler(otherwise: _Handler | None) -> _Handler:
    async def handle(request: Request, error: Exception) -> Response:
        if not request.url.path.startswith("/v1/"):
            if otherwise is None:
                return _plain_error(error)
            answer = otherwise(request, error)
            return await answer if isinstance(answer, Awaitable) else answer
        if isinstance(error, HTTPException):  # an unknown path or method
            body = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": None}
            return JSONResponse({"error": body}, error.status_code, dict(error.headers or {}))
        status, content, headers = error_body(error)
        if status >= 500:
            _log.warning("request_failed", path=request.url.path, status=status, error=repr(error))
        return JSONResponse(content, status, headers)

    return handle


def _plain_error(error: Exception) -> Response:
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        status, message, headers = 422, f"{where}: {first['msg']}", {}
    else:
        status, message, headers = status_of(error), str(error), {}
    return JSONResponse({"error": {"message": message, "type": type(error).__name__}}, status, headers)
