"""`/models`: models with their versions and aliases, and the deployments that follow them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse

from sihe.console.context import Console
from sihe.console.stream import Event, event_stream, pause

_LOOK_EVERY_S = 1.0

Text = Annotated[str, Form()]


def router(console: Console) -> APIRouter:
    """The routes of the models page and its forms."""
    routes = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)
    tracking = console.workspace.tracking

    @routes.get("/models")
    def models(request: Request) -> HTMLResponse:
        aliases = tracking.models()
        found = {name: tracking.model_versions(name) for name in sorted(aliases)}
        references = [
            reference
            for name, versions in found.items()
            for reference in [f"{name}@{alias}" for alias in sorted(aliases[name])]
            + [version.key[6:] for version in versions]
        ]
        return console.views.page(
            request,
            "models.html",
            models={name: versions for name, versions in found.items() if versions},
            aliases=aliases,
            references=references,
            deployments=console.gateway.list(),
        )

    @routes.get("/models/stream")
    async def stream(request: Request) -> StreamingResponse:
        return event_stream(_follow(console, request))

    @routes.post("/models/{name}/alias")
    def move_alias(name: str, alias: Text, version: Annotated[int, Form()]) -> Response:
        console.gateway.move_alias(name, alias.strip(), version)
        return _back(f"#{name}")

    @routes.post("/models/deployments")
    def deploy(name: Text, reference: Text) -> Response:
        console.gateway.deploy(name.strip(), reference.strip())
        return _back("#deployments")

    @routes.post("/models/deployments/{name}/remove")
    def remove(name: str) -> Response:
        console.gateway.remove(name)
        return _back("#deployments")

    return routes


async def _follow(console: Console, request: Request) -> AsyncIterator[Event]:
    """The deployments' states whenever they change; what each shows is a fragment of the page."""
    shown = None
    while True:
        began = time.monotonic()
        found = await asyncio.to_thread(console.gateway.list)
        state = {
            f"deployment-{item.name}": console.views.render(request, "deployment_state.html", deployment=item)
            for item in found
        }
        if state != shown:
            yield Event("status", state)
            shown = state
        if await pause(console.stopping, max(_LOOK_EVERY_S, 10 * (time.monotonic() - began))):
            return


def _back(anchor: str) -> Response:
    return RedirectResponse(f"/models{anchor}", status_code=303)
