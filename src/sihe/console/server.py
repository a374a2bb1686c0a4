"""Runs the application: the port is taken before anything starts, and streams end when the server stops."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import math
import os
import socket
import time
from collections.abc import Callable

import uvicorn

from sihe.core.errors import ConfigError, PortInUse
from sihe.core.workspace import Workspace

_BACKLOG = 2048
_TICK_S = 0.1
_M_ARENA_MAX = -8  # of glibc's malloc.h
_LAST_WORDS_S = 5  # for streams whose time is over to say so, on top of it


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to `host:port` (0 takes a free one). Raises `PortInUse` and `ConfigError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"server.host {host!r} is no address of this machine: {error}", key="server.host") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections to fade
    try:
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(host, port) from error
        if error.errno in (errno.EADDRNOTAVAIL, errno.EACCES):
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", key="server.host") from error
        raise
    return bound


def url_of(bound: socket.socket) -> str:
    """The address that a browser opens."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(workspace: Workspace, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serves the workspace on its settings' host and port until it is interrupted.

    `on_ready` gets the address once requests are answered. Raises `PortInUse` before anything else has happened.
    """
    server_settings = workspace.settings.server
    bound = listen(server_settings.host, server_settings.port)
    _share_heaps()
    from sihe.console.app import create_app  # it takes a second or two to load, and a taken port is said before

    try:
        app = create_app(workspace)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(server_settings.drain_s) + _LAST_WORDS_S,
        )
        console = app.state.console
        server = _Server(
            config,
            stopping=console.stopping.set,
            drain=lambda: console.gateway.close(timeout_s=server_settings.drain_s),
            linger_s=server_settings.linger_s,
            ready=lambda: on_ready and on_ready(url_of(bound)),
        )
        server.run(sockets=[bound])
        if console.failure is not None:  # uvicorn only logs it
            raise console.failure
    finally:
        bound.close()


def _share_heaps() -> None:
    """Two of glibc's heaps for all threads, unless the environment says otherwise.

    It would make up to eight a processor, one after another as models are swapped by new threads, and each keeps the
    pages of one load: 25 MB over 130 swaps of a small model, with two heaps 1 MB over 250.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's: other C libraries have no such heaps
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, 2)


class _Server(uvicorn.Server):
    """uvicorn, with a word before it begins, and an end in order.

    Told to stop (SIGTERM, SIGINT), it says that it is not ready, lets pages' event streams end, goes on accepting for
    `linger_s`, and then closes its port while `drain` lets running requests finish, ending in the protocol's own form
    those that take too long. A second signal ends it at once.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        stopping: Callable[[], None],
        drain: Callable[[], None],
        linger_s: float,
        ready: Callable[[], object],
    ) -> None:
        super().__init__(config)
        self._stopping = stopping
        self._drain = drain
        self._linger_s = linger_s
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping()
        until_s = time.monotonic() + self._linger_s
        while time.monotonic() < until_s and not self.force_exit:
            await asyncio.sleep(min(_TICK_S, self._linger_s))
        draining = asyncio.create_task(asyncio.to_thread(self._drain))
        await super().shutdown(sockets)
        if not self.force_exit:
            await draining
