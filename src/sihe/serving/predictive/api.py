"""The Open Inference Protocol v2 over HTTP: /v2 with health, metadata and inference.

The event loop reads, waits and writes; large bodies are parsed on the thread pool, and models compute on their own
threads. A client that goes away leaves the queue.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive

from sihe.core.errors import InvalidInput, NotFound, SiheError, TransientError
from sihe.core.http import status_of
from sihe.core.telemetry import logger
from sihe.serving.errors import EngineClosed, EngineDead, NotReady
from sihe.serving.predictive.bodies import MAX_BODY_BYTES, compressed, decompressed, too_large
from sihe.serving.predictive.ports import ServedModel
from sihe.serving.predictive.predictor import Predictor
from sihe.serving.predictive.protocol import (
    EXTENSIONS,
    HEADER_LENGTH,
    TIMEOUT_HEADER,
    ParsedRequest,
    build_answer,
    parse_request,
)
from sihe.serving.predictive.types import InferenceResult, TensorSpec
from sihe.serving.tenants.usage import Tally
from sihe.version import __version__

if TYPE_CHECKING:
    from sihe.serving.tenants.access import Admission
    from sihe.serving.tenants.usage import Outcome

PREFIX = "/v2"
_CLIENT_GONE = 499  # nginx's status for it; nobody reads the answer
_INLINE_BYTES = 64 * 1024  # smaller bodies are parsed where they arrive: a hop to another thread costs more
_ATTEMPTS = 3  # replicas that a request is tried on when one closes under it
_log = logger("serving")
T = TypeVar("T")


Admit = Callable[[Request, str], Awaitable["Admission"]]


class Answering(Protocol):
    """The replicas of one deployment (the gateway's `Route`)."""

    def call(self, work: Callable[[Any], T]) -> T:
        """What `work` gives for what one of the replicas holds. Raises `NotReady`, and what `work` raises."""
        ...


class Models(Protocol):
    """What serves in this process (the `Gateway`)."""

    def served(self) -> tuple[ServedModel, ...]:
        """Every deployment, whatever kind of model it has."""
        ...

    def route(self, name: str) -> Answering:
        """The replicas of deployment `name`. Raises `NotFound`, `NotReady`."""
        ...


def router(models: Models, *, admit: Admit | None = None) -> APIRouter:
    """Every route of the protocol. Errors under `PREFIX` become `error_response`s on the application.

    `admit` lets each inference in under its caller's limits, or raises.
    """
    routes = APIRouter(prefix=PREFIX, tags=["open inference"])
    _add_health(routes, models)
    _add_metadata(routes, models)

    @routes.post("/models/{name}/infer")
    async def infer(request: Request, name: str) -> Response:
        """Runs a model on the rows of the request."""
        return await _admitted(request, models, admit, name, None)

    @routes.post("/models/{name}/versions/{version}/infer")
    async def infer_version(request: Request, name: str, version: str) -> Response:
        """The same, if that version serves."""
        return await _admitted(request, models, admit, name, version)

    return routes


def error_response(error: Exception) -> Response:
    """An error in the protocol's form."""
    if isinstance(error, HTTPException):  # an unknown path or method
        return JSONResponse({"error": str(error.detail)}, error.status_code, dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        return JSONResponse({"error": str(error.errors()[0]["msg"])}, 400)
    headers: dict[str, str] = {}
    if isinstance(error, TransientError):
        headers["Retry-After"] = str(max(1, math.ceil(getattr(error, "retry_after_s", 1.0))))
    headers |= getattr(error, "headers", {})
    status = status_of(error)
    if status >= 500:
        _log.warning("inference_refused", status=status, error=repr(error))
    message = str(error) if isinstance(error, SiheError) else "internal error: see the server's log"
    return JSONResponse({"error": message}, status, headers)


# ---- health and metadata -------------------------------------------------------------------------------------------


def _add_health(routes: APIRouter, models: Models) -> None:
    @routes.get("/health/live")
    async def live() -> dict[str, bool]:
        """Whether the server answers."""
        return {"live": True}

    @routes.get("/health/ready")
    async def ready() -> Response:
        """Whether every model that is deployed here is ready."""
        all_ready = all(model.version is not None for model in models.served())
        return JSONResponse({"ready": all_ready, "live": True}, 200 if all_ready else 503)

    @routes.get("/models/{name}/ready")
    async def model_ready(name: str) -> Response:
        """Whether a deployment serves."""
        return _readiness(models, name, None)

    @routes.get("/models/{name}/versions/{version}/ready")
    async def version_ready(name: str, version: str) -> Response:
        """Whether that version of a deployment serves."""
        return _readiness(models, name, version)


def _add_metadata(routes: APIRouter, models: Models) -> None:
    @routes.get("")
    @routes.get("/", include_in_schema=False)
    async def server() -> dict[str, Any]:
        """Name, version and extensions of the server."""
        return {"name": "sihe", "version": __version__, "extensions": list(EXTENSIONS)}

    @routes.get("/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """What a model takes and gives."""
        return _metadata(models, name, None)

    @routes.get("/models/{name}/versions/{version}")
    async def model_version(name: str, version: str) -> dict[str, Any]:
        """The same, if that version serves."""
        return _metadata(models, name, version)

    @routes.post("/repository/index")
    async def index() -> list[dict[str, str]]:
        """Every deployment with its version and state."""
        return [
            {
                "name": model.name,
                "version": "" if model.version is None else str(model.version),
                "state": "READY" if model.version is not None else "UNAVAILABLE",
                "reason": model.error or "",
            }
            for model in models.served()
        ]


def _readiness(models: Models, name: str, version: str | None) -> Response:
    found = next((model for model in models.served() if model.name == name), None)
    if found is None:
        raise NotFound("deployment", name, hint="POST /v2/repository/index lists them")
    is_ready = found.version is not None and version in (None, str(found.version))
    return JSONResponse({"name": name, "ready": is_ready}, 200 if is_ready else 503)


def _metadata(models: Models, name: str, version: str | None) -> dict[str, Any]:
    predictor = models.route(name).call(lambda served: _predictor(served, name, version))
    description = predictor.description
    return {
        "name": name,
        "versions": [predictor.version],
        "platform": description.platform,
        "inputs": [_tensor(spec) for spec in description.inputs],
        "outputs": [_tensor(spec) for spec in description.outputs],
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _predictor(served: Any, name: str, version: str | None) -> Predictor:
    if not isinstance(served, Predictor):
        raise InvalidInput(f"{name!r} is no predictive model: ask it under /v1")
    if version is not None and version != served.version:
        raise NotFound("version", f"{name}/{version}", hint=f"version {served.version} serves")
    return served


# ---- inference -----------------------------------------------------------------------------------------------------


async def _admitted(request: Request, models: Models, admit: Admit | None, name: str, version: str | None) -> Response:
    """One inference under its caller's limits: it counts as a request, and costs no tokens."""
    if admit is None:
        return await _infer(request, models, name, version)
    admission = await admit(request, name)
    tally = Tally(requests=1, failed=1)
    outcome: Outcome = "failed"
    try:
        response = await _infer(request, models, name, version)
        outcome = "aborted" if response.status_code == _CLIENT_GONE else "completed"
        tally = Tally(requests=1)
        response.headers.update(admission.headers)
        return response
    finally:
        admission.finish(tally, outcome)


async def _infer(request: Request, models: Models, name: str, version: str | None) -> Response:
    body = await _read_body(request)
    headers = request.headers
    encoding = headers.get("content-encoding", "")

    def start() -> tuple[Predictor, ParsedRequest, Future[InferenceResult]]:
        plain = decompressed(body, encoding)

        def work(served: Any) -> tuple[Predictor, ParsedRequest, Future[InferenceResult]]:
            predictor = _predictor(served, name, version)
            parsed = parse_request(
                plain,
                headers.get(HEADER_LENGTH),
                predictor.description,
                timeout_ms=headers.get(TIMEOUT_HEADER),
            )
            return predictor, parsed, predictor.submit(parsed.request)

        return models.route(name).call(work)

    heavy = len(body) > _INLINE_BYTES or bool(encoding)
    for attempt in range(_ATTEMPTS):
        predictor, parsed, future = await run_in_threadpool(start) if heavy else start()
        try:
            result = await _result(request.receive, future)
        except (EngineClosed, EngineDead) as error:  # nothing was changed by it: safe to try again
            if attempt == _ATTEMPTS - 1:
                raise NotReady(name, str(error)) from error
            continue
        if result is None:
            return Response(status_code=_CLIENT_GONE)
        write = _Write(predictor, parsed, result, name, headers.get("accept-encoding", ""))
        return await run_in_threadpool(write) if heavy else write()
    raise AssertionError("the loop returns or raises")


class _Write:
    """Builds the answer to one request when called."""

    def __init__(
        self, predictor: Predictor, parsed: ParsedRequest, result: InferenceResult, name: str, accept: str
    ) -> None:
        self._predictor = predictor
        self._parsed = parsed
        self._result = result
        self._name = name
        self._accept = accept

    def __call__(self) -> Response:
        predictor, result = self._predictor, self._result
        body, header_length = build_answer(
            self._parsed,
            result.outputs,
            predictor.description,
            model_name=self._name,
            model_version=predictor.version,
        )
        headers = {"x-sihe-model-version": predictor.name, "x-sihe-batch-rows": str(result.batch_rows)}
        headers["server-timing"] = f"queue;dur={result.queue_s * 1e3:.3f}, compute;dur={result.compute_s * 1e3:.3f}"
        if header_length is not None:
            headers[HEADER_LENGTH] = str(header_length)
        body, coding = compressed(body, self._accept)
        if coding is not None:
            headers["content-encoding"] = coding
        media = "application/json" if header_length is None else "application/octet-stream"
        return Response(body, media_type=media, headers=headers)


async def _result(receive: Receive, future: Future[InferenceResult]) -> InferenceResult | None:
    """The answer; None when the client has gone first, and then nothing is computed for it if there is still time."""
    answer = asyncio.wrap_future(future)
    gone = asyncio.create_task(_until_gone(receive))
    waiting: set[asyncio.Future[Any]] = {answer, gone}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return await answer if answer.done() else None
    finally:
        gone.cancel()
        answer.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _read_body(request: Request) -> bytes:
    """The body, of at most `MAX_BODY_BYTES`, whatever its headers say."""
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_BODY_BYTES:
            raise too_large(size)
        pieces.append(piece)
    return b"".join(pieces)
