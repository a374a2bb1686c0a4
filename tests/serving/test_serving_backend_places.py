"""Where a deployment's server may be: the operator's list, over every way in, and no redirect out of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from sihe.core import settings
from sihe.core.errors import ConfigError, SiheError, Unreachable
from sihe.core.tracking import ModelVersion
from sihe.core.workspace import Workspace
from sihe.serving.api import install_errors, router
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.ports import NoObserver
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.replicas.config import OpenAiBackend, ReplicaConfig
from sihe.serving.gateway.replicas.openai.engine import OpenAiEngine
from sihe.serving.gateway.replicas.openai.host import load
from sihe.serving.gateway.replicas.openai.places import BackendPlaces
from sihe.serving.tenants import Access, Right
from support.http_server import serving

VERSION = ModelVersion("tiny", 1, "", None, datetime(2026, 1, 1, tzinfo=UTC), (), {})
LISTED = ("gpu-1", "*.gpu.example", "10.0.0.0/8", "192.168.1.7:8000", "[::1]:8000", "fd00::/8", "Localhost:8000")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sihe.serving.gateway.replicas.openai.host._ANSWER_S", 0.2)


@pytest.mark.parametrize(
    "url",
    [
        "http://gpu-1/v1",
        "https://GPU-1:9999/v1",
        "http://a.b.gpu.example:1/v1",
        "http://10.255.0.1/v1",
        "http://192.168.1.7:8000/v1",
        "http://[::1]:8000/v1",
        "http://[FD00::1:2]/v1",
        "http://localhost:8000/v1",
        "http://user:secret@gpu-1/v1",
    ],
)
def test_what_is_listed_may_be_used(url: str) -> None:
    BackendPlaces(LISTED).check(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://gpu-2/v1",
        "http://gpu-1.evil.example/v1",
        "http://gpu.example/v1",
        "http://evilgpu.example/v1",
        "http://gpu-1./v1",
        "http://gpu-1@169.254.169.254/v1",
        "http://169.254.169.254/latest",
        "http://11.0.0.1/v1",
        "http://192.168.1.7/v1",
        "http://192.168.1.7:8001/v1",
        "https://localhost/v1",
        "http://[::1]/v1",
        "http://[::ffff:10.0.0.1]/v1",
        "http://012.0.0.1/v1",
        "http://167772161/v1",
        "http://0xa.0.0.1/v1",
        "http://10.1/v1",
        "http://[fe80::1]/v1",
        "http://gpu\u20111/v1",
    ],
)
def test_what_is_not_listed_is_refused_also_where_it_looks_like_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"backend\.url") as caught:
        BackendPlaces(LISTED).check(url)
    assert caught.value.key == "backend.url"


@pytest.mark.parametrize("url", ["http:///v1", "http://[::1/v1", "http://a:99999/v1", "http://"])
def test_what_is_no_url_is_said_to_be_none_also_without_a_list(url: str) -> None:
    with pytest.raises(ConfigError, match=r"backend\.url must be a URL"):
        BackendPlaces(()).check(url)


def test_without_a_list_any_place_will_do() -> None:
    BackendPlaces(()).check("http://169.254.169.254/v1")
    assert BackendPlaces(()).is_open


@pytest.mark.parametrize(
    "entry", ["", "http://gpu-1", "a b", "gpu-1:0", "gpu-1:70000", "10.0.0.0/33", "*", "a.*", "*.*"]
)
def test_an_entry_that_is_none_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BackendPlaces(("gpu-1", entry))
    assert caught.value.key == "serving.backend_hosts"


# ---- redirects ------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """A server that sends everybody to another one, and what the other one was asked."""
    asked: list[str] = []

    class Target(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            """It is quiet."""

    class Redirect(Target):
        def do_GET(self) -> None:
            self.send_response(307)
            self.send_header("location", f"http://127.0.0.1:{target.server_port}{self.path}")
            self.send_header("content-length", "0")
            self.end_headers()

    target, redirect = (ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (Target, Redirect))
    threads = [threading.Thread(target=server.serve_forever) for server in (target, redirect)]
    for thread in threads:
        thread.start()
    yield f"http://127.0.0.1:{redirect.server_port}/v1", asked
    for server in (target, redirect):
        server.shutdown()
        server.server_close()
    for thread in threads:
        thread.join()


def test_no_redirect_is_followed(elsewhere: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = elsewhere
    backend = OpenAiBackend(url=url, model="m")
    found = settings.load({"home": str(tmp_path)}, environ={}, directory=tmp_path)
    with Workspace(found) as workspace, pytest.raises(Unreachable, match="307"):
        load(workspace, VERSION, EngineConfig(), backend, NoObserver())
    engine = OpenAiEngine(url, "m", "tiny@1", NoObserver())
    try:
        with pytest.raises(SiheError):
            engine.submit(GenerationRequest(prompt="a", max_tokens=1)).result(30)
    finally:
        engine.close(drain=False)
    assert asked == []


# ---- every way in ---------------------------------------------------------------------------------------------------


def opened(gateway: Gateway, tmp_path: Path, hosts: str | None) -> Workspace:
    """The house's own records, under settings that list `hosts`."""
    flags = {"home": str(gateway.workspace.home), "serving.backend_hosts": hosts}
    return Workspace(settings.load(flags, environ={}, directory=tmp_path))


def behind(url: str) -> ReplicaConfig:
    return ReplicaConfig(backend=OpenAiBackend(url=url, model="m"))


def test_the_list_holds_for_whoever_deploys_and_for_what_was_deployed_before(gateway: Gateway, tmp_path: Path) -> None:
    with opened(gateway, tmp_path, "gpu-1, 10.0.0.0/8") as workspace:
        editor = Gateway(workspace)
        with pytest.raises(ConfigError, match=r"127\.0\.0\.1 port 9, and serving\.backend_hosts"):
            editor.deploy("far", "tiny@1", replicas=behind("http://127.0.0.1:9/v1"))
        backend = OpenAiBackend(url="http://127.0.0.1:9/v1", model="m")
        with pytest.raises(ConfigError, match=r"serving\.backend_hosts"):
            load(workspace, VERSION, EngineConfig(), backend, NoObserver())


@pytest.mark.parametrize(
    ("hosts", "url", "deployer", "administrator"),
    [
        (None, "http://127.0.0.1:9/v1", 403, 201),
        ("127.0.0.1:9", "http://127.0.0.1:9/v1", 201, 201),
        ("127.0.0.1:9", "http://127.0.0.1:10/v1", 400, 400),
    ],
)
def test_a_key_that_deploys_reaches_what_is_listed(
    gateway: Gateway, tmp_path: Path, hosts: str | None, url: str, deployer: int, administrator: int
) -> None:
    replicas = json.loads(json.dumps(behind(url).to_mapping()))
    with opened(gateway, tmp_path, hosts) as workspace:
        access = Access(workspace, registry=CollectorRegistry())
        keys = [
            access.keys.create_key(right, tenant="acme", rights=frozenset({right}))
            for right in (Right.DEPLOY, Right.ADMIN)
        ]
        app = FastAPI()
        app.include_router(router(Gateway(workspace), access))
        install_errors(app)
        with serving(app) as server:
            for (_, secret), status in zip(keys, (deployer, administrator), strict=True):
                answer = httpx.post(
                    f"{server}/api/deployments",
                    json={"name": "far", "target": "tiny@1", "replicas": replicas},
                    headers={"authorization": f"Bearer {secret.text}"},
                    timeout=30,
                )
                assert answer.status_code == status, answer.text
        access.close()
