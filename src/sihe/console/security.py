"""What every answer carries and every request must pass: headers, the same-origin rule, the Host rule, the key.

Sihe usually listens on this machine alone, and a browser on this machine also visits strangers' pages. Two attacks
follow, and both are closed here: a foreign page that posts to us (cross-site request forgery), and a foreign name that
resolves to 127.0.0.1 (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sihe.core.errors import Forbidden, InvalidInput, SiheError
from sihe.serving.tenants.access import Access
from sihe.serving.tenants.http import PROBES, address_of

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
_OPEN_PATHS = ("/healthz", "/readyz", *PROBES, "/static/", "/login")


class SecurityHeaders:
    """Adds the headers to every response that does not set its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, and adds the headers to what comes back."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class Guard:
    """Lets a request in, or answers it with `refuse(request, error)`: the Host, origin and key rules.

    Rooms find who calls in `request.state.caller`, and need not ask again.
    """

    def __init__(
        self, app: ASGIApp, *, host: str, access: Access, refuse: Callable[[Request, SiheError], Response]
    ) -> None:
        self._app = app
        self._host = host
        self._access = access
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            self._check_origin(request)
            if not request.url.path.startswith(_OPEN_PATHS):
                caller = await self._access.identify_async(request.headers, address_of(request), sessions=True)
                self._access.require(caller, request.method, request.url.path)
                request.state.caller = caller
        except SiheError as error:
            await self._refuse(request, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_origin(self, request: Request) -> None:
        if is_foreign_host(request.headers, listening_on=self._host):
            named = request.headers.get("host", "")
            raise InvalidInput(f"this server answers on this machine only, not as {named!r}")
        if is_foreign_write(request):
            raise Forbidden("a page of another site may not change anything here")


def is_foreign_write(request: Request) -> bool:
    """Whether a page of another origin makes the browser send this request that changes something.

    Browsers state it in Sec-Fetch-Site, older ones in Origin; clients that are no browser send neither.
    """
    if request.method in _SAFE_METHODS:
        return False
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != request.headers.get("host")


def is_foreign_host(headers: Headers, *, listening_on: str) -> bool:
    """Whether the request names a host that cannot be this machine, although we listen on loopback only."""
    if not is_loopback(listening_on):
        return False
    named = urlsplit(f"//{headers.get('host', '')}").hostname or ""
    return not is_loopback(named)


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine's own address or name."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
