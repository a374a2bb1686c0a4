"""`/access`: what tenants used, their limits and keys. A new key is on the page that makes it, and on no other."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from sihe.console.context import Console
from sihe.serving.tenants.secret import Secret
from sihe.serving.tenants.types import DEFAULT_TENANT, Right, parse_rights

_SHOWN_DAYS = 30

Text = Annotated[str, Form()]


def router(console: Console) -> APIRouter:
    """The routes of the page and its forms."""
    routes = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)
    access, clock = console.access, console.workspace.clock

    def shown(request: Request, made: Secret | None = None) -> HTMLResponse:
        store, now = access.keys, clock.now()
        keys = store.keys()
        access.flush()
        since = now.date() - timedelta(days=_SHOWN_DAYS - 1)
        return console.views.page(
            request,
            "access.html",
            made=made,
            days=_SHOWN_DAYS,
            usage=access.usage.read(since=since, by=("tenant", "deployment")),
            tenants=store.tenants(),
            keys=[(key, _state(key.disabled_at is not None, key.opens_at(now))) for key in keys],
            is_open=access.is_open(),
            rights=list(Right),
        )

    @routes.get("/access")
    def page(request: Request) -> HTMLResponse:
        return shown(request)

    @routes.post("/access/keys")
    def create(
        request: Request, name: Text, rights: Annotated[list[str], Form()], tenant: Text = DEFAULT_TENANT
    ) -> HTMLResponse:
        # Answered with the page itself: an address that leads to a key must not exist.
        _, made = access.keys.create_key(name.strip(), tenant=tenant.strip(), rights=parse_rights(rights))
        access.forget()
        return shown(request, made)

    @routes.post("/access/keys/{id}/{change}")
    def change(id: str, change: str) -> Response:
        access.keys.set_enabled(id, enabled=change == "enable")
        access.forget()
        return RedirectResponse("/access#keys", status_code=303)

    return routes


def _state(is_disabled: bool, opens: bool) -> str:
    return "disabled" if is_disabled else "good" if opens else "expired"
