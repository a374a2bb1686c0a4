"""Servers and browsers from Debian's packages, for tests that need a real one.

`ensure` installs the package where it may (root and apt) and otherwise skips the test, visibly. Nothing outside the
test run is configured: servers get their own folder and port.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock


@functools.cache
def ensure(package: str, binary: str) -> str:
    """Path of `binary`, installing Debian's `package` when it is missing; skips when that cannot be done."""
    found = _find(binary)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        with FileLock("/tmp/sihe-tests-apt.lock"):
            found = _find(binary) or _install(package, binary)
    if found is None:
        pytest.skip(f"{binary!r} is not here: install Debian's package {package!r} to run this test")
    return found


def _find(binary: str) -> str | None:
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{binary}"), reverse=True)
    return shutil.which(binary) or (str(versions[0]) if versions else None)


def _install(package: str, binary: str) -> str | None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, timeout=280, check=False)
        if done.returncode:
            return None
    return _find(binary)


def free_port() -> int:
    """A TCP port on loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = 30.0) -> None:
    """Returns as soon as `condition` holds; fails the test when it does not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen within {timeout_s:.0f} s")
        time.sleep(0.02)


@contextmanager
def postgres_server() -> Iterator[str]:
    """A PostgreSQL server of its own, on loopback, with a folder of its own; yields its SQLAlchemy URL."""
    initdb, postgres = ensure("postgresql", "initdb"), ensure("postgresql", "postgres")
    # The server refuses to run as root: it runs as the user that the package made.
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    # Not under pytest's temporary folder: that one is closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="sihe-postgres-"))
    if as_user:
        shutil.chown(folder, "postgres", "postgres")
    data, port = folder / "data", free_port()
    subprocess.run(
        [*as_user, initdb, "-D", str(data), "-U", "sihe", "--auth=trust", "--no-sync", "-E", "UTF8"],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    server = subprocess.Popen(
        [*as_user, postgres, "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", str(folder), "-F"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )
    try:
        wait_until(lambda: _accepts(port), "PostgreSQL's start")
        yield f"postgresql://sihe@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # fast shutdown: do not wait for clients
        server.wait(timeout=30)
        shutil.rmtree(folder)


def _accepts(port: int) -> bool:
    import psycopg

    try:
        psycopg.connect(f"host=127.0.0.1 port={port} user=sihe dbname=postgres", connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True
