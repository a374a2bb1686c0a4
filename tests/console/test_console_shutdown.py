"""`sihe up` is told to stop in the middle of an answer: it is finished, or it ends in the protocol's own form."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from sihe.core import settings
from sihe.core.workspace import Workspace
from sihe.serving.engine.config import EngineConfig
from sihe.serving.gateway.gateway import Gateway
from support.debian import free_port, wait_until
from support.tiny_models import tiny_config, tiny_model

pytestmark = pytest.mark.slow
TOKENS = 3000  # some seconds of a tiny model


@contextmanager
def serving(tmp_path: Path, **flags: object) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`sihe up` with one deployment that serves; the process and its address."""
    home = tmp_path / "home"
    folder = tiny_model(tmp_path / "model", config=tiny_config(eos=False, max_positions=4096))
    with Workspace(settings.load({"home": str(home)}, environ={}, directory=tmp_path)) as workspace:
        workspace.tracking.register_model("tiny", folder)
        Gateway(workspace).deploy("tiny", "tiny@1", settings=EngineConfig(threads=1, kv_cache_bytes=20_000_000))
    port = free_port()
    sets = [part for key, value in flags.items() for part in ("--set", f"server.{key}={value}")]
    command = [sys.executable, "-m", "sihe", "--home", str(home), *sets, "up", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"

    def serves() -> bool:
        try:
            return bool(httpx.get(f"{url}/v1/models", timeout=5).json()["data"])
        except httpx.TransportError:
            return False

    try:
        wait_until(serves, "the deployment", timeout_s=120)
        yield process, url
    finally:
        process.kill()
        process.wait()


@contextmanager
def streaming(url: str) -> Iterator[Iterator[str]]:
    """A stream whose first token has come."""
    body = {"model": "tiny", "prompt": "fox", "max_tokens": TOKENS, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data:")
        yield lines


def test_what_has_begun_is_finished_and_nothing_new_begins(tmp_path: Path) -> None:
    with serving(tmp_path, drain_s=60) as (process, url), streaming(url) as lines:
        assert httpx.get(f"{url}/readyz", timeout=5).status_code == 200
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(url), "the port's end", timeout_s=30)
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert process.wait(30) in (0, -signal.SIGTERM)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_what_takes_too_long_ends_with_an_error_of_the_protocol(tmp_path: Path) -> None:
    with serving(tmp_path, drain_s=0.3) as (process, url), streaming(url) as lines:
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
        assert '"error"' in rest[-1]
        assert "was closed" in rest[-1]
        assert process.wait(30) in (0, -signal.SIGTERM)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_it_is_not_ready_while_it_lingers(tmp_path: Path) -> None:
    with serving(tmp_path, linger_s=5) as (process, url):
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/readyz", timeout=5).status_code == 503, "not ready", timeout_s=5)
        body = {"model": "tiny", "prompt": "fox", "max_tokens": 3}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 200
        assert process.wait(30) in (0, -signal.SIGTERM)


def refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/healthz", timeout=5)
    except httpx.ConnectError:
        return True
    return False
