"""`/playground/{deployment}`: talk to a deployment through the same OpenAI API that any client uses."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from sihe.console.context import Console
from sihe.core.errors import NotFound


def router(console: Console) -> APIRouter:
    """The routes of the playground."""
    routes = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)

    @routes.get("/playground")
    def first(request: Request) -> Response:
        found = console.gateway.list()
        if found:
            return RedirectResponse(f"/playground/{found[0].name}?{request.url.query}".rstrip("?"), status_code=303)
        return console.views.page(request, "playground_empty.html", models=console.workspace.tracking.models())

    @routes.get("/playground/{name}")
    def playground(request: Request, name: str) -> HTMLResponse:
        found = console.gateway.list()
        deployment = next((item for item in found if item.name == name), None)
        if deployment is None:
            raise NotFound("deployment", name, hint="see them with  sihe deploy list")
        return console.views.page(
            request,
            "playground.html",
            deployment=deployment,
            deployments=found,
            base_url=str(request.base_url).rstrip("/"),
        )

    return routes
