"""What the pages change: aliases, deployments, keys; and who may not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from sihe.console.app import create_app

HTML = {"accept": "text/html"}


def test_an_alias_moves_and_the_deployment_follows(client: TestClient) -> None:
    gateway = client.app.state.console.gateway  # type: ignore[attr-defined]
    try:
        answer = client.post("/models/tiny/alias", data={"alias": "production", "version": "2"}, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/models#tiny")
        assert gateway.wait_ready("chat", timeout_s=60).version == 2
        assert "production → 2" in client.get("/models", headers=HTML).text
    finally:
        client.post("/models/tiny/alias", data={"alias": "production", "version": "1"})
        assert gateway.wait_ready("chat", timeout_s=60).version == 1


def test_an_alias_to_nowhere_changes_nothing(client: TestClient) -> None:
    answer = client.post("/models/tiny/alias", data={"alias": "production", "version": "99"}, headers=HTML)
    assert answer.status_code == 404
    assert "production → 1" in client.get("/models", headers=HTML).text
    assert client.post("/models/tiny/alias", data={"alias": "a/b", "version": "1"}, headers=HTML).status_code == 400
    assert client.post("/models/tiny/alias", data={"alias": "x", "version": "one"}, headers=HTML).status_code == 422


def test_a_deployment_comes_and_goes(client: TestClient) -> None:
    client.post("/models/deployments", data={"name": "second", "reference": "tiny@2"})
    assert client.get("/playground/second", headers=HTML).status_code == 200
    assert (
        client.post("/models/deployments", data={"name": "../x", "reference": "tiny"}, headers=HTML).status_code == 400
    )
    client.post("/models/deployments/second/remove")
    assert client.get("/playground/second", headers=HTML).status_code == 404
    assert client.post("/models/deployments/second/remove", headers=HTML).status_code == 404


@pytest.mark.parametrize(
    "path", ["/models/deployments/chat/remove", "/models/tiny/alias", "/v1/completions", "/api/deployments"]
)
def test_other_sites_change_nothing(client: TestClient, path: str) -> None:
    answer = client.post(path, headers={"sec-fetch-site": "cross-site", "origin": "http://evil.example"})
    assert answer.status_code == 403
    assert client.get("/playground/chat", headers=HTML).status_code == 200


def test_a_strangers_name_gets_nothing(client: TestClient) -> None:
    answer = client.get("/runs", headers={"host": "rebound.example"})
    assert answer.status_code == 400
    assert "rebound.example" in answer.json()["error"]["message"]
    assert answer.headers["content-security-policy"]


def test_an_artifact_is_shown_without_rights(client: TestClient, paths: dict[str, str]) -> None:
    answer = client.get(paths["run"] + "/artifacts/report.html")
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert client.get(paths["run"] + "/artifacts/..%2f..%2fx").status_code in (400, 404)


def events(client: TestClient, path: str) -> list[tuple[str, object]]:
    text = client.get(path).text
    pairs = [block.split("\n", 1) for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


def test_the_stream_of_a_finished_run_says_everything_and_ends(client: TestClient, paths: dict[str, str]) -> None:
    (curves, first), (status, fragments), (end, _) = events(client, paths["run"] + "/stream")
    assert (curves, status, end) == ("curves", "status", "end")
    assert isinstance(first, dict)
    assert isinstance(fragments, dict)
    assert first["whole"] is True
    assert first["restarts"] == [20]
    assert first["series"]["loss"] == [list(range(40)), [4 / (step + 1) for step in range(40)]]
    assert set(fragments) == {"run-status", "run-tiles"}
    assert client.get("/runs/none/stream").status_code == 404


def test_keys(tmp_path: Path) -> None:
    from sihe.core import settings
    from sihe.core.workspace import Workspace

    flags = {"home": str(tmp_path / "home"), "server.api_keys": "right,other"}
    with Workspace(settings.load(flags, environ={}, directory=tmp_path)) as workspace:
        client = TestClient(create_app(workspace), base_url="http://127.0.0.1")
        assert client.get("/healthz").status_code == 200
        assert client.get("/static/app.css").status_code == 200
        answer = client.get("/runs?limit=5", headers=HTML, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2Fruns%3Flimit%3D5")
        assert client.get("/api/deployments").status_code == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/api/deployments", headers={"authorization": "Bearer right"}).status_code == 200
        wrong = client.post("/login", data={"key": "wrong"}, headers=HTML)
        assert wrong.status_code == 401
        assert not client.cookies
        entered = client.post("/login", data={"key": "other", "next": "//evil.example"}, follow_redirects=False)
        assert (entered.status_code, entered.headers["location"]) == (303, "/")
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert "other" not in cookie
        assert client.get("/runs", headers=HTML).status_code == 200
        assert client.get("/v1/models").status_code == 200
        client.post("/logout")
        assert client.get("/api/deployments").status_code == 401


def test_a_key_made_on_a_page_is_shown_once(tmp_path: Path) -> None:
    from sihe.core import settings
    from sihe.core.workspace import Workspace

    with Workspace(settings.load({"home": str(tmp_path / "home")}, environ={}, directory=tmp_path)) as workspace:
        app = create_app(workspace)
        client = TestClient(app, base_url="http://127.0.0.1")
        form = {"name": "me", "tenant": "acme", "rights": "admin"}
        made = client.post("/access/keys", data=form, headers=HTML)
        assert (made.status_code, made.headers["cache-control"]) == (200, "no-store")
        (key,) = set(re.findall(r"sihe_[a-z0-9]{12}_[A-Za-z0-9_-]{43}", made.text))
        assert client.get("/access").status_code == 401
        client.headers["authorization"] = f"Bearer {key}"
        page = client.get("/access", headers=HTML).text
        assert "acme" in page
        assert key not in page
        assert client.post("/access/keys", data={**form, "name": "a b"}, headers=HTML).status_code == 400
        id = key.split("_")[1]
        client.post(f"/access/keys/{id}/disable")
        assert client.get("/access").status_code == 401
        app.state.console.access.close()


def test_keys_of_the_records_open_what_their_rights_say(tmp_path: Path) -> None:
    from sihe.core import settings
    from sihe.core.workspace import Workspace
    from sihe.serving.tenants import Right, TenantStore

    with Workspace(settings.load({"home": str(tmp_path / "home")}, environ={}, directory=tmp_path)) as workspace:
        app = create_app(workspace)
        client = TestClient(app, base_url="http://127.0.0.1")
        assert client.get("/about", headers=HTML).status_code == 200  # nobody has made a key yet
        store = TenantStore(workspace.records, workspace.clock)
        admin, key = store.create_key("me", rights=frozenset({Right.ADMIN}))
        _, other = store.create_key("app", rights=frozenset({Right.INFER}))
        app.state.console.access.forget()
        answer = client.get("/about", headers=HTML, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2Fabout")
        infer = {"authorization": f"Bearer {other.text}"}
        assert client.get("/v1/models", headers=infer).status_code == 200
        for path in ("/about", "/metrics", "/api/deployments", "/api/indexes", "/api/keys", "/nowhere"):
            assert client.get(path, headers=infer).status_code == 403, path
        refused = client.post("/login", data={"key": other.text}, headers=HTML)
        assert refused.status_code == 403
        assert not client.cookies
        entered = client.post("/login", data={"key": key.text}, follow_redirects=False)
        assert entered.status_code == 303
        assert key.text not in entered.headers["set-cookie"]
        assert client.get("/about", headers=HTML).status_code == 200
        store.set_enabled(admin.id, enabled=False)
        app.state.console.access.forget()
        assert client.get("/about", headers=HTML, follow_redirects=False).status_code == 303
        app.state.console.access.close()
