"""Where an HTTP request meets its caller: the dependency that every serving route has, and what routes ask of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from sihe.serving.tenants.access import Access, Admission
from sihe.serving.tenants.types import Caller

PROBES = ("/v2/health/live", "/v2/health/ready")  # who asks these has no key, and learns only whether this works


def require_caller(access: Access) -> Callable[[Request], Awaitable[None]]:
    """A dependency that lets in who may use the path, and remembers who it is.

    Whom a middleware before has identified (`request.state.caller`) is not asked again, and probes are not at all.
    """

    async def check(request: Request) -> None:
        if request.url.path in PROBES:
            return
        caller = getattr(request.state, "caller", None)
        if caller is None:
            caller = await access.identify_async(request.headers, address_of(request))
            request.state.caller = caller
        request.state.access = access
        access.require(caller, request.method, request.url.path)

    return check


def address_of(request: Request) -> str:
    """Where a request comes from, as far as the server knows (behind a proxy: as far as it trusts the proxy)."""
    return request.client.host if request.client else ""


def caller_of(request: Request) -> Caller:
    """Who sends it; the dependency has found out."""
    caller: Caller = request.state.caller
    return caller


def access_of(request: Request) -> Access:
    """The door that it came through."""
    access: Access = request.state.access
    return access


async def admit(request: Request, deployment: str, *, prompt_tokens: int, completion_tokens: int = 0) -> Admission:
    """Lets a request in under its caller's limits; `finish` it when it has ended. Raises as `Access.admit`."""
    return await run_in_threadpool(
        access_of(request).admit,
        caller_of(request),
        deployment,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )
