"""The connection of this process to a Ray cluster, for as long as a job runs."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sihe.core.errors import ConfigError, Unreachable
from sihe.core.lazy import require

_KEY = "cluster.ray_address"
_CONNECT_S = 5.0


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connects to the cluster at `address` (`host:port`, or "auto" for the one of this machine) until the exit.

    A connection that this process has already is used and kept. Raises `MissingExtra`, `ConfigError` for an address
    of Ray's client protocol, `Unreachable`.
    """
    if address.startswith("ray://"):
        raise ConfigError(
            f"setting {_KEY!r}: {address!r} is an address of Ray's client protocol, whose ranks would outlive a "
            "supervisor that dies; run the command on a machine of the cluster, with host:port or auto",
            key=_KEY,
        )
    # Without this Ray warns, on machines without accelerators, of what a later version will do there.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = require("ray", extra="ray")
    if ray.is_initialized():
        yield
        return
    found = _found(address)
    with _signal_handlers_kept():
        try:
            ray.init(address=found, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise Unreachable(f"Ray cluster {found}", _first_line(error)) from error
        try:
            yield
        finally:
            ray.shutdown()


def _found(address: str) -> str:
    """The cluster as `host:port`, where somebody listens: where nobody does, Ray itself would try for minutes."""
    # Ray's own search: RAY_ADDRESS, then the file that `ray start` writes, then processes of this machine.
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found: str | None = canonicalize_bootstrap_address(address)
    except ConnectionError as error:
        raise Unreachable(f"Ray cluster {address!r}", _first_line(error)) from error
    except ValueError as error:
        raise ConfigError(f"setting {_KEY!r} must be host:port or auto, got {address!r}", key=_KEY) from error
    if found is None:
        raise ConfigError(f"setting {_KEY!r} must be host:port or auto, got {address!r}", key=_KEY)
    host, _, port = found.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            return found
    except OSError as error:
        raise Unreachable(f"Ray cluster {found}", error.strerror or str(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Undoes, at the exit, the handler that Ray installs for SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
