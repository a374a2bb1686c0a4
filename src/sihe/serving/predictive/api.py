"""The Open Inference Protocol v2 over HTTP: /v2 with health, metadata and inference.

The event loop reads, waits and writes; large bodies are parsed on the thread pool, and models compute on their own
threads. A client that goes away leaves the queue.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from sihe.core.errors import InvalidInput, NotFound, SiheError, TransientError
from sihe.core.http import status_of
from sihe.core.telemetry import logger
from sihe.serving.bodies import read_body, request_id
from sihe.serving.deadlines import Deadline, deadline_of
from sihe.serving.disconnect import CLIENT_GONE, in_time
from sihe.serving.errors import NotReady, StreamClosed
from sihe.serving.exchange import Answer, Question
from sihe.serving.predictive.bodies import MAX_BODY_BYTES, compressed, decompressed
from sihe.serving.predictive.exchange import Inference, Inferred
from sihe.serving.predictive.ports import ServedModel
from sihe.serving.predictive.predictor import Predictor
from sihe.serving.predictive.protocol import (
    EXTENSIONS,
    HEADER_LENGTH,
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
ARM_HEADER, SESSION_HEADER, REQUEST_HEADER = "x-sihe-arm", "x-sihe-session", "x-request-id"
_INLINE_BYTES = 64 * 1024  # smaller bodies are parsed where they arrive: a hop to another thread costs more
_VERSION = re.compile("[0-9]{1,18}")
_log = logger("serving")
T = TypeVar("T")


Admit = Callable[[Request, str], Awaitable["Admission"]]


class Turning(Protocol):
    """One request on its way through the arms and replicas of a deployment (the gateway's `Turn`)."""

    arm: str
    deadline: Deadline | None
    has_own_limit: bool
    question: Question | None

    @property
    def bound(self) -> Deadline | None:
        """By when the deployment answers, or refuses to."""
        ...

    @property
    def is_heard(self) -> bool:
        """Whether somebody wants to know the answer."""
        ...

    def start(self, work: Callable[[Any], T], *, block: bool = True) -> T:
        """What `work` gives for what a replica holds; without `block` it waits for none that is on its way."""
        ...

    def whole(self, work: Callable[[Any], T]) -> T:
        """`start` and `finished` in one, where what `work` gives is the answer."""
        ...

    def finished(self, answer: Answer | None = None) -> None:
        """The answer is there."""
        ...

    def failed(self, error: BaseException) -> bool:
        """It ended with an error; whether to start again."""
        ...

    def left(self) -> None:
        """The caller is gone, or it is over."""
        ...

    def shown(self, error: BaseException) -> BaseException:
        """What the caller sees of an error."""
        ...


class Models(Protocol):
    """What serves in this process (the `Gateway`)."""

    def served(self) -> tuple[ServedModel, ...]:
        """Every deployment, whatever kind of model it has."""
        ...

    def aside(self, name: str, *, version: int | None) -> Turning:
        """The way of a question about the model of deployment `name`, or about its `version`. Raises `NotFound`,
        `NotReady`."""
        ...

    def turn(self, name: str, *, request_id: str, session: str | None, tenant: str, version: int | None) -> Turning:
        """The way of a request to deployment `name`. Raises `NotFound`, `NotReady`."""
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

    # Both may wait for a replica that is on its way, which has no place on the event loop.
    @routes.get("/models/{name}")
    def model(name: str) -> dict[str, Any]:
        """What a model takes and gives."""
        return _metadata(models, name, None)

    @routes.get("/models/{name}/versions/{version}")
    def model_version(name: str, version: str) -> dict[str, Any]:
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
    turn = models.aside(name, version=_number(version))
    predictor = turn.whole(lambda served: _predictor(served, name, version))
    description = predictor.description
    return {
        "name": name,
        "versions": [predictor.version],
        "platform": description.platform,
        "inputs": [_tensor(spec) for spec in description.inputs],
        "outputs": [_tensor(spec) for spec in description.outputs],
    }


def _number(version: str | None) -> int | None:
    return int(version) if version is not None and _VERSION.fullmatch(version) else None


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
    deadline = deadline_of(request.headers)
    if admit is None:
        return await _infer(request, models, name, version, "", deadline)
    admission = await admit(request, name)
    tally = Tally(requests=1, failed=1)
    outcome: Outcome = "failed"
    try:
        response = await _infer(request, models, name, version, admission.caller.tenant.name, deadline)
        outcome = "aborted" if response.status_code == CLIENT_GONE else "completed"
        tally = Tally(requests=1)
        response.headers.update(admission.headers)
        return response
    finally:
        admission.finish(tally, outcome)


async def _infer(
    request: Request, models: Models, name: str, version: str | None, tenant: str, deadline: Deadline | None
) -> Response:
    body = await read_body(request, max_bytes=MAX_BODY_BYTES)
    headers = request.headers
    encoding = headers.get("content-encoding", "")
    heavy = len(body) > _INLINE_BYTES or bool(encoding)
    named = request_id(request)
    session = headers.get(SESSION_HEADER)
    turn = models.turn(name, request_id=named, session=session, tenant=tenant, version=_number(version))
    turn.deadline = deadline

    def begin(served: Any) -> _Begun:
        if turn.bound is not None:
            turn.bound.left_s(is_whole=True)
        predictor = _predictor(served, name, version)
        parsed = parse_request(
            decompressed(body, encoding),
            headers.get(HEADER_LENGTH),
            predictor.description,
            left_s=None if deadline is None else deadline.left_s(is_whole=True),
        )
        turn.has_own_limit = parsed.request.timeout_s is not None
        turn.question = Inference(parsed.request, predictor.description, tenant)
        return _Begun(predictor, parsed, predictor.submit(parsed.request))

    try:
        while True:
            begun = await _started(turn, begin, heavy=heavy)
            try:
                result = await in_time(request.receive, asyncio.wrap_future(begun.future), turn.bound)
                # What cannot be written was not answered: an arm is charged with it, and another one may do better.
                write = _Write(begun.predictor, begun.parsed, result, name, headers.get("accept-encoding", ""))
                response = await run_in_threadpool(write) if heavy else write()
            except StreamClosed:
                return Response(status_code=CLIENT_GONE)
            except Exception as error:
                if turn.failed(error):  # nothing was changed by it: safe to try again
                    continue
                if (shown := turn.shown(error)) is error:
                    raise
                raise shown from error
            turn.finished(Inferred.of(result, begun.predictor.description) if turn.is_heard else None)
            response.headers[ARM_HEADER], response.headers[REQUEST_HEADER] = turn.arm, named
            return response
    finally:
        turn.left()


async def _started(turn: Turning, begin: Callable[[Any], _Begun], *, heavy: bool) -> _Begun:
    """Begins on the loop where that is a matter of microseconds; on a thread what is large, or waits for a replica."""
    if not heavy:
        try:
            return turn.start(begin, block=False)
        except NotReady:
            pass
    return await run_in_threadpool(turn.start, begin)


@dataclass(frozen=True, slots=True)
class _Begun:
    predictor: Predictor
    parsed: ParsedRequest
    future: Future[InferenceResult]


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
