"""Serving over HTTP: OpenAI's protocol under /v1, Open Inference under /v2, deployments and aliases under /api.

The event loop only parses, waits and writes: tokenising runs on the thread pool and generating on the engine's own
thread. A client that goes away aborts its generation; a client that reads slowly delays nobody.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sihe.core.errors import NotFound, SiheError
from sihe.core.http import status_of
from sihe.core.telemetry import logger
from sihe.serving.adapters_api import add_adapters
from sihe.serving.bodies import read_body, request_id
from sihe.serving.deployments_api import add_deployments
from sihe.serving.encoding_api import add_encoding
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.types import DeploymentStatus
from sihe.serving.generation_api import REQUEST_HEADER, add_generation
from sihe.serving.ports import ContentGuard
from sihe.serving.predictive import api as predictive
from sihe.serving.protocol import error_body
from sihe.serving.tenants.access import Access
from sihe.serving.tenants.api import router as tenants_api
from sihe.serving.tenants.http import admit, caller_of, require_caller
from sihe.serving.tokenize_api import PATHS as TOKENIZE_PATHS
from sihe.serving.tokenize_api import add_tokenizing

_log = logger("serving")
_Handler = Callable[[Request, Exception], Response | Awaitable[Response]]


def router(gateway: Gateway, access: Access | None = None, guard: ContentGuard | None = None) -> APIRouter:
    """Every route of serving. Install the errors' form with `install_errors` on the application.

    Who hands in the `access` closes it after the last request; one that is made here writes usage at exit. A `guard`
    judges what is asked and answered.
    """
    access = access or Access(gateway.workspace)
    routes = APIRouter(dependencies=[Depends(require_caller(access))])
    _add_models(routes, gateway)
    add_generation(routes, gateway, guard)
    add_encoding(routes, gateway, read_body)
    add_tokenizing(routes, gateway)
    add_deployments(routes, gateway)
    add_adapters(routes, gateway)
    routes.include_router(predictive.router(gateway, admit=partial(admit, prompt_tokens=0)))
    routes.include_router(tenants_api(access))
    return routes


def install_errors(app: FastAPI) -> None:
    """Answers errors under /v1 in OpenAI's form, and under /v2 in Open Inference's.

    Elsewhere the handlers that `app` had before go on, if it had any.
    """
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


# ---- errors --------------------------------------------------------------------------------------------------------


def _error_handler(otherwise: _Handler | None) -> _Handler:
    async def handle(request: Request, error: Exception) -> Response:
        if request.url.path.startswith(f"{predictive.PREFIX}/") or request.url.path == predictive.PREFIX:
            return predictive.error_response(error)
        if not request.url.path.startswith("/v1/") and request.url.path not in TOKENIZE_PATHS:
            if otherwise is None:
                return _plain_error(error)
            answer = otherwise(request, error)
            return await answer if isinstance(answer, Awaitable) else answer
        if isinstance(error, HTTPException):  # an unknown path or method
            body = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": None}
            named = {REQUEST_HEADER: request_id(request)}
            return JSONResponse({"error": body}, error.status_code, {**named, **(error.headers or {})})
        status, content, headers = error_body(error)
        headers[REQUEST_HEADER] = request_id(request)
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
