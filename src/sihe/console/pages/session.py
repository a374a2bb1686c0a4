"""`/login`: a browser shows a key once and keeps a cookie that proves it. Only where keys are asked for."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from sihe.console.context import Console
from sihe.core.errors import Forbidden, SiheError
from sihe.core.http import status_of
from sihe.serving.tenants.access import SESSION_COOKIE
from sihe.serving.tenants.http import address_of

_MONTH_S = 30 * 24 * 3600


def router(console: Console) -> APIRouter:
    """The routes of the session."""
    routes = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)

    @routes.get("/login")
    def form(request: Request, next: str = "/") -> HTMLResponse:
        return console.views.page(request, "login.html", next=_own(next), wrong=False)

    @routes.post("/login")
    def login(request: Request, key: Annotated[str, Form()], next: Annotated[str, Form()] = "/") -> Response:
        try:
            session = console.access.open_session(key, address_of(request))
        except SiheError as error:
            return console.views.page(
                request,
                "login.html",
                status=status_of(error),
                next=_own(next),
                wrong=True,
                has_no_right=isinstance(error, Forbidden),
            )
        response = RedirectResponse(_own(next), status_code=303)
        response.set_cookie(
            SESSION_COOKIE,
            session,
            max_age=_MONTH_S,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    @routes.post("/logout")
    def logout() -> Response:
        response = RedirectResponse("/login", status_code=303)
        response.delete_cookie(SESSION_COOKIE)
        return response

    return routes


def _own(target: str) -> str:
    """`target` when it is a path of ours, else the home page: no redirect leads elsewhere."""
    return target if target.startswith("/") and not target.startswith(("//", "/\\")) else "/"
