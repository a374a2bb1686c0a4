"""The FastAPI application: every room's routes and the console's pages, behind one set of rules.

It composes and decides nothing: what a deployment, an answer or a lab is, its room knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlencode

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from sihe.apps.coach.api import router as coach_api
from sihe.apps.coach.service import CoachService
from sihe.apps.rag.api import router as rag_api
from sihe.apps.rag.service import RagService
from sihe.console.context import Console
from sihe.console.failures import Bugs, failure, install_failures
from sihe.console.pages import (
    about,
    access,
    coach,
    deployments,
    labs,
    models,
    playground,
    runs,
    search,
    session,
    topics,
)
from sihe.console.security import Guard, SecurityHeaders
from sihe.console.traffic import Traffic, metrics_text
from sihe.console.views import STATIC, Views, static_url
from sihe.core.errors import SiheError, Unauthorized
from sihe.core.workspace import Workspace
from sihe.serving.api import install_errors
from sihe.serving.api import router as serving_api
from sihe.serving.gateway import Gateway
from sihe.serving.protocol import error_body
from sihe.serving.tenants import Access
from sihe.vectors import Database
from sihe.vectors.api import router as vectors_api
from sihe.version import __version__

_PAGES = (topics, runs, models, deployments, playground, search, coach, labs, access, about, session)


def create_app(workspace: Workspace) -> FastAPI:
    """The whole house as one ASGI application; its lifespan starts and stops the gateway."""
    settings = workspace.settings
    views = Views(workspace.clock, settings.locale)
    console = Console(
        workspace, views, Gateway(workspace), Access(workspace), RagService(workspace), CoachService(workspace)
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        try:
            await asyncio.to_thread(console.gateway.start)
        except Exception as error:
            console.failure = error
            raise
        try:
            yield
        finally:
            console.stopping.set()
            await asyncio.to_thread(console.gateway.close)
            await asyncio.to_thread(console.access.close)  # after the last request: what it used is written

    # FastAPI's own documentation pages load scripts from a CDN: the schema stays, those pages go.
    app = FastAPI(title="Sihe", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.console = console
    install_failures(app, views)
    install_errors(app)
    for routes in (
        serving_api(console.gateway, console.access),
        rag_api(console.rag),
        coach_api(console.coach),
        vectors_api(Database(workspace.path("vectors"))),
    ):
        app.include_router(routes)
    for page in _PAGES:
        app.include_router(page.router(console))
    app.mount("/static", _Static(directory=STATIC), name="static")

    @app.get("/healthz", include_in_schema=False)
    def healthz() -> JSONResponse:
        return JSONResponse({"status": "ok", "version": __version__})

    @app.get("/readyz", include_in_schema=False)
    def readyz() -> JSONResponse:
        """Whether requests should be sent here: no longer once the server has been told to stop."""
        is_ready = console.gateway.is_serving and not console.stopping.is_set()
        return JSONResponse({"status": "ready" if is_ready else "stopping"}, 200 if is_ready else 503)

    @app.get("/favicon.ico", include_in_schema=False)
    def favicon() -> Response:
        return RedirectResponse(static_url("favicon.svg"))

    @app.get("/metrics", include_in_schema=False)
    def metrics() -> Response:
        return metrics_text()

    # The last one added is the outermost: headers on every answer, whoever gave it.
    app.add_middleware(Bugs, views=views)
    app.add_middleware(Guard, host=settings.server.host, access=console.access, refuse=_refusal(views))
    app.add_middleware(Traffic)
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=6)
    app.add_middleware(SecurityHeaders)
    return app


def _refusal(views: Views) -> Callable[[Request, SiheError], Response]:
    def refuse(request: Request, error: SiheError) -> Response:
        is_page = request.method == "GET" and "text/html" in request.headers.get("accept", "")
        if isinstance(error, Unauthorized) and is_page:
            return RedirectResponse(f"/login?{urlencode({'next': _target(request)})}", status_code=303)
        status, body, headers = error_body(error)
        if request.url.path.startswith("/v1/"):
            return JSONResponse(body, status, headers)
        return failure(views, request, status, str(error), kind=type(error).__name__, headers=headers)

    return refuse


def _target(request: Request) -> str:
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


class _Static(StaticFiles):
    """Static files; an address that names its content's digest may be kept for good."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        versioned = b"v=" in scope.get("query_string", b"")
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if versioned else "no-cache"
        return response
