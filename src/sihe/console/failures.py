"""Errors as answers: a page for browsers, JSON for programs, under /v1 and /v2 in the form of their protocols.

Bugs keep their secrets.
"""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sihe.console.views import Views
from sihe.core.errors import Busy, SiheError
from sihe.core.http import status_of
from sihe.core.telemetry import logger

_log = logger("console")
_TITLED = (400, 401, 403, 404, 409, 413, 422, 429, 503, 507)


def install_failures(app: FastAPI, views: Views) -> None:
    """Registers the handlers on `app`."""

    async def on_sihe_error(request: Request, error: Exception) -> Response:
        status = status_of(error)
        if status == 500:
            raise error  # a bug: `Bugs` answers and logs it
        headers = {"Retry-After": f"{error.retry_after_s:.0f}"} if isinstance(error, Busy) else {}
        return failure(views, request, status, str(error), kind=type(error).__name__, headers=headers)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = "" if error.status_code == 404 and error.detail == "Not Found" else str(error.detail)
        return failure(
            views, request, error.status_code, detail, kind="HTTPException", headers=dict(error.headers or {})
        )

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
        return failure(views, request, 422, f"{where}: {first['msg']}", kind="InvalidInput")

    app.add_exception_handler(SiheError, on_sihe_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)


class Bugs:
    """Answers what no handler knows. (Starlette's own place for it lies outside every other middleware, so that its
    answers would lack their headers.)
    """

    def __init__(self, app: ASGIApp, *, views: Views) -> None:
        self._app = app
        self._views = views

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on; an exception that nobody caught becomes an answer and a log line."""
        began = False

        async def watched(message: Message) -> None:
            nonlocal began
            began = began or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if scope["type"] != "http" or began:
                raise
            request = Request(scope, receive)
            _log.error("request_failed", path=request.url.path, method=request.method, exc_info=error)
            await failure(self._views, request, 500, "", kind="InternalError")(scope, receive, send)


def failure(
    views: Views, request: Request, status: int, message: str, *, kind: str, headers: dict[str, str] | None = None
) -> Response:
    """An error in the form that the client of this path reads."""
    if request.url.path.startswith("/v1/"):
        code = "invalid_api_key" if status == 401 else None  # as OpenAI's clients expect it
        body = {"error": {"message": message or "not found", "type": kind, "param": None, "code": code}}
        return JSONResponse(body, status_code=status, headers=headers)
    if request.url.path.startswith("/v2"):
        return JSONResponse({"error": message or "not found"}, status_code=status, headers=headers)
    if "text/html" in request.headers.get("accept", "") or "hx-request" in request.headers:
        title = f"failure.{status}" if status in _TITLED else "failure.other" if status < 500 else "failure.500"
        template = "failure_part.html" if "hx-request" in request.headers else "failure.html"
        page = views.page(request, template, status=status, title_key=title, message=message, code=status)
        page.headers.update(headers or {})
        return page
    return JSONResponse({"error": {"message": message, "type": kind}}, status_code=status, headers=headers)
