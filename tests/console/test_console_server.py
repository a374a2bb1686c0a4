"""The server's life: the port first, streams that end, and a process that goes when it is told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from sihe.console.server import listen, url_of
from sihe.core.errors import ConfigError, PortInUse
from support.debian import free_port, wait_until


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"port {port} on 127\.0\.0\.1 is in use: .* --port"):
            listen("127.0.0.1", port)
        done = sihe(tmp_path, "up", "--port", str(port))
        _, words = done.communicate(timeout=60)
        assert done.returncode == 1
        assert f"port {port}" in words
        assert "Traceback" not in words
        assert not (tmp_path / "home" / "sihe.db").exists()


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
        listen("192.0.2.1", 0)


def test_port_zero_is_a_free_one() -> None:
    with listen("127.0.0.1", 0) as bound:
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
        # Else asyncio leaves Nagle's algorithm on, and each answer's body waits 40 ms behind its head.
        assert bound.proto == socket.IPPROTO_TCP


def test_it_stops_with_open_streams_and_leaves_nothing_behind(tmp_path: Path) -> None:
    port = free_port()
    server = sihe(tmp_path, "up", "--port", str(port))
    try:
        wait_until(lambda: answers(port), "the server's start", timeout_s=90)
        with httpx.stream("GET", f"http://127.0.0.1:{port}/models/stream", timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("event: status")
            server.send_signal(signal.SIGINT)
            assert list(lines)  # it ends by itself
        said, words = server.communicate(timeout=60)
    finally:
        server.kill()
        server.communicate()
    assert f"http://127.0.0.1:{port}" in said
    assert "Traceback" not in words
    assert server.returncode in (0, 130)


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def sihe(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """`sihe` in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SIHE_")}
    return subprocess.Popen(
        [sys.executable, "-m", "sihe", "--home", str(tmp_path / "home"), *arguments],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
