"""Traffic over HTTP, with the unmodified OpenAI client: headers name the arm, feedback finds it, mistakes are named."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import openai
import pytest

from sihe.serving.gateway.gateway import Gateway


@pytest.fixture
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture
def http(server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url) as opened:
        yield opened


def until_ready(gateway: Gateway, number: int) -> None:
    """Waits until so many arms serve."""
    for _ in range(1000):
        gateway.notify()
        if sum(arm.version is not None for arm in gateway.status("tiny").arms) >= number:
            gateway.notify()  # what was seen just now is also measured from here on
            return
        threading.Event().wait(0.01)
    raise AssertionError("the arms did not come up")


def test_arms_feedback_and_findings(http: httpx.Client, client: openai.OpenAI, gateway: Gateway) -> None:
    shown = http.put("/api/deployments/tiny/arms/b", json={"target": "tiny@2", "weight": 0.5}).json()
    assert shown["weights"] == {"stable": 0.5, "b": 0.5}
    until_ready(gateway, 2)
    seen: dict[str, set[tuple[str, str]]] = {}
    for number in range(24):
        raw = client.completions.with_raw_response.create(
            model="tiny", prompt="the lazy dog", max_tokens=2, temperature=0, user=f"user-{number % 12}"
        )
        arm, version = raw.headers["x-sihe-arm"], raw.headers["x-sihe-model-version"]
        assert raw.parse().system_fingerprint == version
        seen.setdefault(f"user-{number % 12}", set()).add((arm, version))
        given = {"request_id": raw.headers["x-request-id"], "values": {"helpful": 1.0 if arm == "b" else 0.0}}
        assert http.post("/api/deployments/tiny/feedback", json=given).json() == {"arm": arm}
    assert all(len(found) == 1 for found in seen.values())  # the `user` field keeps a sender on its arm
    assert {next(iter(found)) for found in seen.values()} == {("stable", "tiny@1"), ("b", "tiny@2")}
    headers = {"x-sihe-session": "by header"}
    by_header = {
        client.completions.with_raw_response.create(
            model="tiny", prompt="the", max_tokens=1, extra_headers=headers, stream=True
        ).headers["x-sihe-arm"]
        for _ in range(6)
    }
    assert len(by_header) == 1
    report = http.get("/api/deployments/tiny/experiment").json()
    helpful = {
        arm["arm"]: metric["mean"]
        for arm in report["arms"]
        for metric in arm["metrics"]
        if metric["metric"] == "helpful"
    }
    assert helpful == {"stable": 0.0, "b": 1.0}
    assert http.delete("/api/deployments/tiny/arms/b").json()["weights"] == {"stable": 1.0}


def test_a_rollout_over_http(http: httpx.Client, gateway: Gateway) -> None:
    plan = {"steps": [{"weight": 0.2, "min_requests": 5}], "gates": {"max_error_rate": 0.1}}
    begun = http.post("/api/deployments/tiny/rollout", json={"target": "tiny@2", "plan": plan})
    assert (begun.status_code, begun.json()["state"]) == (201, "RUNNING")
    assert http.post("/api/deployments/tiny/rollout", json={"target": "tiny@2"}).status_code == 409
    assert http.post("/api/deployments/tiny/rollout/pause").json()["state"] == "PAUSED"
    assert http.post("/api/deployments/tiny/rollout/resume").json()["state"] == "RUNNING"
    assert http.post("/api/deployments/tiny/rollout/rollback").json()["state"] == "ROLLED_BACK"
    assert http.post("/api/deployments/tiny/rollout/promote").status_code == 404
    http.post("/api/deployments/tiny/rollout", json={"target": "tiny@2", "plan": plan})
    until_ready(gateway, 2)
    assert http.post("/api/deployments/tiny/rollout/promote").json()["state"] == "PROMOTED"
    assert http.get("/api/deployments/tiny").json()["version"] == 2
    states = [rollout["state"] for rollout in http.get("/api/deployments/tiny/rollouts").json()]
    assert states == ["PROMOTED", "ROLLED_BACK"]


def test_shadow_logs_and_stickiness_over_http(http: httpx.Client, gateway: Gateway) -> None:
    assert http.get("/api/deployments/tiny/shadow").status_code == 404
    body = {"target": "tiny@2", "share": 0.5, "only_idle": False}
    assert http.put("/api/deployments/tiny/shadow", json=body).json()["shadow"]["share"] == 0.5
    assert http.get("/api/deployments/tiny/shadow").json()["copies"] == 0
    assert http.put("/api/deployments/tiny/logs", json={"share": 1}).json()["log_share"] == 1
    asked = http.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": "the", "max_tokens": 2},
        headers={"x-request-id": "mine-1"},
    )
    assert asked.status_code == 200
    gateway._request_log.flush()  # type: ignore[union-attr]
    (row,) = [row for row in http.get("/api/logs/tiny?arm=stable").json() if row["request_id"] == "mine-1"]
    assert (row["prompt"], row["completion_tokens"], row["kind"]) == (None, 2, "completion")
    changed = http.put("/api/deployments/tiny/sticky", json={"sticky": "tenant", "salt": "autumn"}).json()
    assert (changed["sticky"], changed["salt"]) == ("tenant", "autumn")
    assert http.delete("/api/deployments/tiny/arms/shadow").json()["shadow"] is None
    http.put("/api/deployments/tiny/logs", json={"share": 0})
    http.put("/api/deployments/tiny/sticky", json={"sticky": "session", "salt": ""})


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PUT", "arms/b", {"target": "tiny@2", "weight": 2}, 400),
        ("PUT", "arms/b", {"target": "tiny@9", "weight": 0.1}, 404),
        ("PUT", "arms/b", {"target": "tiny@2"}, 422),
        ("PUT", "arms/stable", {"target": "tiny@2", "weight": 0.1}, 400),
        ("PUT", "arms/b", {"target": "tiny@2", "weight": 0.1, "settings": {"speed": 1}}, 400),
        ("PUT", "arms/b", {"target": "tiny@2", "weight": 0.1, "colour": 1}, 422),
        ("DELETE", "arms/b", None, 404),
        ("PUT", "shadow", {"target": "tiny@2", "share": 0}, 400),
        ("PUT", "logs", {"share": 3}, 400),
        ("PUT", "sticky", {"sticky": "colour"}, 422),
        ("POST", "rollout", {"target": "tiny@2", "plan": {"steps": [{"weight": 1}]}}, 400),
        ("POST", "rollout", {"target": "tiny@2", "plan": {"speed": 1}}, 400),
        ("POST", "rollout", {"target": "tiny@2", "arm": "../x"}, 400),
        ("POST", "rollout/dance", None, 422),
        ("POST", "rollout/promote", None, 404),
        ("POST", "feedback", {"request_id": "x", "values": {"helpful": 1}}, 404),
        ("POST", "feedback", {"request_id": "x", "values": {}}, 422),
        ("POST", "feedback", {"request_id": "x", "values": {"helpful": "very"}}, 422),
        ("POST", "feedback", {"request_id": "y" * 300, "values": {"helpful": 1}}, 422),
    ],
)
def test_mistakes_are_named_and_change_nothing(
    http: httpx.Client, gateway: Gateway, method: str, path: str, body: dict[str, object] | None, status: int
) -> None:
    before = gateway.traffic.policy("tiny")
    answer = http.request(method, f"/api/deployments/tiny/{path}", json=body)
    assert answer.status_code == status
    assert answer.json().keys() & {"error", "detail"}
    assert gateway.traffic.policy("tiny") == before
    assert http.request(method, f"/api/deployments/absent/{path}", json=body).status_code in (400, 404, 422)
