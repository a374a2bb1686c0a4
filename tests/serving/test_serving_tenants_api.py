"""Keys and rights over HTTP, and attacks on them: a real server, and the unmodified `openai` client."""

import contextlib
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from sihe.core.telemetry import configure_logs
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.tenants import Right, Tenant
from sihe.serving.tenants.brakes import FAILURES
from support.tenant_door import PROMPT, SHORT, Door, complete, opened_door


@pytest.fixture
def door(gateway: Gateway, tmp_path: Path) -> Iterator[Door]:
    with opened_door(gateway, tmp_path) as opened:
        yield opened


# ---- keys and rights -----------------------------------------------------------------------------------------------


def test_without_a_key_or_with_a_wrong_one(door: Door) -> None:
    for key in ("wrong", door.key()[:-1] + "~", "sihe_", "x" * 500):
        with pytest.raises(openai.AuthenticationError) as caught:
            complete(door.client(key))
        assert (caught.value.code, caught.value.status_code) == ("invalid_api_key", 401)
        assert key not in str(caught.value)
    assert door.http.get(f"{door.url}/v1/models").status_code == 401
    assert door.http.get(f"{door.url}/api/deployments").status_code == 401
    complete(door.client(SHORT))
    complete(door.client(door.key()))


def test_a_key_opens_what_its_rights_say(door: Door) -> None:
    infer, watch, deploy, admin = (door.key("acme", right) for right in Right)
    allowed = {
        "/v1/models": {infer, admin},
        "/api/deployments": {watch, deploy, admin},
        "/api/usage": {infer, watch, deploy, admin},
        "/api/keys": {admin},
        "/api/tenants": {admin},
    }
    for path, keys in allowed.items():
        for key in (infer, watch, deploy, admin):
            assert door.get(path, key).status_code == (200 if key in keys else 403), path
    body = {"name": "x", "target": "nothing@none"}
    for key, status in ((infer, 403), (watch, 403), (deploy, 404), (admin, 404)):
        answer = door.http.post(f"{door.url}/api/deployments", json=body, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == status
    with pytest.raises(openai.PermissionDeniedError) as caught:
        complete(door.client(watch))
    assert caught.value.code == "insufficient_permissions"


def test_a_key_asks_only_the_models_that_it_is_made_for(door: Door) -> None:
    own, other = door.client(door.key(models=["tiny"])), door.client(door.key(models=["code"]))
    complete(own)
    assert [model.id for model in own.models.list()] == ["tiny"]
    assert [model.id for model in other.models.list()] == []
    with pytest.raises(openai.NotFoundError):
        other.models.retrieve("tiny")
    said = []
    for model in ("tiny", "none"):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            other.completions.create(model=model, prompt=PROMPT)
        said.append(str(caught.value).replace(model, "…"))
    assert said[0] == said[1]  # whether it exists is not told


def test_keys_are_made_changed_and_rotated_over_http(door: Door) -> None:
    admin = {"authorization": f"Bearer {door.key('acme', Right.ADMIN)}"}

    def post(path: str, **body: object) -> httpx.Response:
        return door.http.post(f"{door.url}{path}", json=body, headers=admin)

    made = post("/api/keys", name="app", tenant="zeta", rights=["infer"], limits={"concurrency": 2})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    body = made.json()
    complete(door.client(body["key"]))
    listed = door.http.get(f"{door.url}/api/keys?tenant=zeta", headers=admin)
    assert [key["id"] for key in listed.json()] == [body["id"]]
    assert body["key"] not in listed.text
    assert "digest" not in listed.text
    new = post(f"/api/keys/{body['id']}/rotate", grace_s=60).json()
    complete(door.client(body["key"]))
    complete(door.client(new["key"]))
    assert post(f"/api/keys/{new['id']}", enabled=False, limits={"requests_per_min": 9}).json()["limits"] == {
        "requests_per_min": 9
    }
    with pytest.raises(openai.AuthenticationError):
        complete(door.client(new["key"]))
    assert post(f"/api/keys/{new['id']}").json()["disabled_at"]
    put = door.http.put(f"{door.url}/api/tenants/zeta", json={"priority": 3, "is_isolated": True}, headers=admin)
    assert put.json()["priority"] == 3
    assert door.store.tenant("zeta") == Tenant("zeta", priority=3, is_isolated=True)
    for path, bad, status in (
        ("/api/keys", {"name": "a b"}, 400),
        ("/api/keys", {"name": "k", "rights": ["everything"]}, 422),
        ("/api/keys", {"name": "k", "limits": {"speed": 1}}, 400),
        ("/api/keys", {"name": "k", "expires_at": "2030-01-01T00:00:00"}, 422),
        ("/api/keys/absent", {"enabled": True}, 404),
        ("/api/keys/absent/rotate", {"grace_s": -1}, 400),
    ):
        assert post(path, **bad).status_code == status, (path, bad)


def test_the_right_to_deploy_is_no_shell(door: Door, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    replicas = {"backend": {"kind": "openai", "command": f"touch {mark} {{port}}"}}
    body = {"name": "shell", "target": "tiny@1", "replicas": replicas}
    key = door.key("acme", Right.DEPLOY)
    answer = door.http.post(f"{door.url}/api/deployments", json=body, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 403
    assert "admin" in answer.text
    assert not mark.exists()


# ---- attacks -------------------------------------------------------------------------------------------------------


def test_who_guesses_too_often_must_wait_and_nobody_else_must(door: Door) -> None:
    good = door.key()
    for number in range(int(FAILURES.capacity)):
        with pytest.raises(openai.AuthenticationError):
            complete(door.client(f"guess-{number}"))
    for key in ("another", SHORT):  # the right one too: it could have been guessed
        with pytest.raises(openai.RateLimitError) as caught:
            complete(door.client(key))
        assert caught.value.response.headers["retry-after"] == "3"
    complete(door.client(good))
    door.clock.advance(3)
    complete(door.client(SHORT))
    assert door.http.get(f"{door.url}/v1/models").status_code == 401  # who shows no key guesses nothing


@pytest.mark.parametrize(
    "head",
    [
        b"Authorization: Bearer " + b"x" * 1_000_000,
        b"Authorization: Bearer " + b"x" * 5_000,
        b"Authorization: Bearer \xff\xfe\x00",
        b"Authorization: " + b"Bearer " * 500,
        b"Authorization: Bearer a\r\nAuthorization: Bearer b",
        b"Cookie: sihe_session=" + b"y" * 5_000,
        b"X: y\r\n" * 5_000 + b"X: y",
    ],
)
def test_strange_heads_harm_nobody(door: Door, head: bytes) -> None:
    address = urlsplit(door.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=30) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):  # it may hang up before everything was sent
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head + b"\r\n\r\n")
            while piece := connection.recv(65536):
                answer += piece
    assert not answer or answer.split(b" ")[1] in (b"400", b"401", b"431")
    complete(door.client(door.key()))


def test_no_key_reaches_a_log_or_a_metric(
    door: Door, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    configure_logs("debug", "json")
    good, wrong = door.key(requests_per_min=1), door.key()[:-2] + "~~"
    complete(door.client(good))
    for key in (good, wrong):
        with pytest.raises(openai.APIStatusError):
            complete(door.client(key))
    door.http.post(f"{door.url}/v1/completions", content=b"{", headers={"authorization": f"Bearer {good}"})
    door.access.close()
    said = "".join(capsys.readouterr()) + "".join(
        record.getMessage() for record in caplog.records if record.name.startswith(("sihe", "uvicorn", "redis"))
    )
    for secret in (good, wrong):
        assert secret not in said + door.metrics()
        assert secret.split("_", 2)[2] not in said + door.metrics()
