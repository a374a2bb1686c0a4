"""A server with keys, a clock and counters of its own, and the openai client in front of it."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from torch import Tensor

from sihe.core import settings
from sihe.core.clock import FakeClock
from sihe.core.workspace import Workspace
from sihe.serving.api import install_errors, router
from sihe.serving.engine.runner import Feed, ModelRunner
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.tenants import Access, Limits, Right, TenantStore
from support.http_server import serving

PROMPT = [5] * 10
SHORT = "short-key"


@dataclass(frozen=True)
class Door:
    """A server over the house's gateway with keys, a clock and counters of its own."""

    url: str
    access: Access
    store: TenantStore
    clock: FakeClock
    registry: CollectorRegistry
    http: httpx.Client
    sent: list[httpx.Request]  # what `http` has sent

    def key(self, tenant: str = "acme", *rights: Right, models: Sequence[str] | None = None, **limits: int) -> str:
        """A new key, known to the server at once."""
        _, secret = self.store.create_key(
            "k",
            tenant=tenant,
            rights=frozenset(rights or {Right.INFER}),
            deployments=None if models is None else frozenset(models),
            limits=Limits(**limits),
        )
        self.access.forget()
        return secret.text

    def client(self, key: str, max_retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=max_retries, http_client=self.http)

    def get(self, path: str, key: str) -> httpx.Response:
        return self.http.get(f"{self.url}{path}", headers={"authorization": f"Bearer {key}"})

    def metrics(self) -> str:
        return generate_latest(self.registry).decode()


@contextlib.contextmanager
def opened_door(gateway: Gateway, tmp_path: Path) -> Iterator[Door]:
    clock, registry = FakeClock(), CollectorRegistry()
    flags = {"home": str(tmp_path / "home"), "server.api_keys": SHORT}
    with Workspace(settings.load(flags, environ={}, directory=tmp_path), clock=clock) as workspace:
        access = Access(workspace, registry=registry)
        app = FastAPI()
        app.include_router(router(gateway, access))
        install_errors(app)
        sent: list[httpx.Request] = []
        with serving(app) as url, httpx.Client(event_hooks={"request": [sent.append]}, timeout=60) as http:
            yield Door(url, access, access.keys, clock, registry, http, sent)
        access.close()


def complete(client: openai.OpenAI, max_tokens: int = 4, **fields: object) -> dict[str, str]:
    """The headers of one good answer."""
    raw = client.completions.with_raw_response.create(
        model="tiny", prompt=PROMPT, max_tokens=max_tokens, temperature=0, **fields  # type: ignore[arg-type]
    )  # fmt: skip
    assert raw.parse().usage is not None
    return dict(raw.headers)


@contextlib.contextmanager
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The model computes nothing until `go`; `reached` is set when it is first asked to."""
    reached, go, forward = threading.Event(), threading.Event(), ModelRunner.forward

    def held_forward(self: ModelRunner, feeds: Sequence[Feed]) -> Tensor:
        reached.set()
        assert go.wait(30)
        return forward(self, feeds)

    monkeypatch.setattr(ModelRunner, "forward", held_forward)
    try:
        yield reached, go
    finally:
        go.set()
