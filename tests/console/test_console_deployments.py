"""The page of a deployment: its forms steer the gateway, its stream brings parts and curves, mistakes come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import get_args

import pytest
from fastapi.testclient import TestClient
from markupsafe import escape
from sqlalchemy import Table

from sihe.console.language import translate
from sihe.console.pages.deployments import MEASURES, curves_of
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.exchange import Measure
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.store import DeploymentStore
from sihe.serving.gateway.traffic.pulse import ArmLoad, Pulse
from sihe.serving.gateway.traffic.types import Sender
from sihe.serving.gateway.types import DeploymentStatus
from sihe.serving.tables import deployments, rollouts
from support.debian import wait_until

PAGE = "/models/deployments/chat"


@pytest.fixture
def gateway(client: TestClient) -> Iterator[Gateway]:
    gateway: Gateway = client.app.state.console.gateway  # type: ignore[attr-defined]
    yield gateway
    if "chat" in gateway.rollouts.active():
        gateway.rollouts.roll_back("chat")
    for arm in gateway.traffic.policy("chat").arms:
        gateway.traffic.remove_arm("chat", arm.name)
    gateway.traffic.set_shadow("chat", None)
    gateway.traffic.set_logs("chat", 0)


def own(gateway: Gateway) -> DeploymentStatus:
    """What this process serves: the server of the tests with a browser may serve the same house."""
    return next(status for status in gateway.served() if status.name == "chat")


def post(client: TestClient, path: str, **form: str) -> int:
    answer = client.post(f"{PAGE}/{path}", data=form, follow_redirects=False)
    if answer.status_code == 303:
        assert answer.headers["location"].startswith(f"{PAGE}#")
    return answer.status_code


def test_the_page_shows_what_is(client: TestClient, gateway: Gateway, language: str) -> None:
    assert post(client, "arms", arm="b", target="tiny@2", share="40") == 303
    assert post(client, "rollout", target="tiny@2", steps="5, 25", min_requests="9", min_s="1", max_error="2") == 303
    assert post(client, "shadow", target="tiny@2", share="10") == 303
    wait_until(lambda: len([arm for arm in own(gateway).arms if arm.version]) == 4, "the arms")
    for number in range(6):
        gateway.generate("chat", GenerationRequest(prompt="the", max_tokens=2), Sender(f"r{number}")).result(30)
    page = client.get(PAGE, headers={"accept-language": language}).text
    for text in ("canary", "tiny@2", "shadow", "40.0", "rollout/promote", "rollout/pause"):
        assert text in page


def test_the_page_says_how_many_processes_serve(client: TestClient, gateway: Gateway, language: str) -> None:
    store = DeploymentStore(gateway.workspace.records, gateway.workspace.clock)
    others = gateway.status("chat").processes
    said = translate(language, "deployment.processes", count=others + 1)  # type: ignore[arg-type]
    assert said not in client.get(PAGE, headers={"accept-language": language}).text
    store.report(gateway.status("chat"), process="srv_other")
    assert said in client.get(PAGE, headers={"accept-language": language}).text
    store.withdraw("srv_other")


def test_the_page_shows_what_copies_have_shown(client: TestClient, gateway: Gateway, language: str) -> None:
    gateway.traffic.set_shadow("chat", f"tiny@{own(gateway).version}", only_idle=False)
    wait_until(lambda: any(arm.name == "shadow" and arm.version for arm in own(gateway).arms), "the shadow")
    gateway.generate("chat", GenerationRequest(prompt="the", max_tokens=2, temperature=0)).result(30)

    def compared() -> bool:
        report = gateway.traffic.shadow("chat")
        return report is not None and report.compared == 1

    wait_until(compared, "the comparison")
    page = client.get(PAGE, headers={"accept-language": language}).text
    assert translate(language, "traffic.agreement_tokens", share=100, mean="1.0000") in page  # type: ignore[arg-type]


@pytest.mark.parametrize("measure", get_args(Measure))
def test_every_measure_of_agreement_has_its_words(measure: str) -> None:
    for language in ("en", "zh"):
        said = translate(language, f"traffic.agreement_{measure}", share=87, mean="0.8700")  # type: ignore[arg-type]
        assert "87" in said


def test_the_forms_steer(client: TestClient, gateway: Gateway) -> None:
    form = {"target": "tiny@2", "steps": "5，25", "min_requests": "9", "min_s": "1", "max_error": "2"}
    assert post(client, "rollout", **form) == 303
    rollout = gateway.rollouts.active()["chat"]
    assert [step.weight for step in rollout.plan.steps] == [0.05, 0.25]
    assert rollout.plan.gates.max_error_rate == 0.02
    for action, state in (("pause", "PAUSED"), ("resume", "RUNNING"), ("rollback", "ROLLED_BACK")):
        assert post(client, f"rollout/{action}") == 303
        assert gateway.rollouts.history("chat")[0].state.value == state
    assert post(client, "arms", arm="b", target="tiny@2", share="40") == 303
    assert gateway.traffic.policy("chat").weights["b"] == 0.4
    assert post(client, "arms/b/remove") == 303
    assert post(client, "logs", share="50", text="true") == 303
    assert (gateway.traffic.policy("chat").logs.share, gateway.traffic.policy("chat").logs.text) == (0.5, True)
    assert post(client, "logs", share="50", keep_days="7") == 303
    assert post(client, "logs", share="0") == 303
    assert gateway.traffic.policy("chat").logs.keep_days == 7
    assert not gateway.traffic.policy("chat").logs.text


@pytest.mark.parametrize(
    ("path", "form", "status"),
    [
        ("rollout", {"target": "tiny@2", "steps": "a", "min_requests": "9", "min_s": "1", "max_error": "2"}, 400),
        ("rollout", {"target": "tiny@9", "steps": "5", "min_requests": "9", "min_s": "1", "max_error": "2"}, 404),
        ("rollout/promote", {}, 404),
        ("arms", {"arm": "../b", "target": "tiny@2", "share": "40"}, 400),
        ("arms", {"arm": "b", "target": "tiny@2", "share": "400"}, 400),
        ("arms/absent/remove", {}, 404),
    ],
)
def test_mistakes_come_back(client: TestClient, gateway: Gateway, path: str, form: dict[str, str], status: int) -> None:
    assert post(client, path, **form) == status
    assert gateway.traffic.policy("chat").arms == ()


def test_an_unknown_deployment_is_not_found(client: TestClient) -> None:
    for path in ("", "/stream"):
        assert client.get(f"/models/deployments/absent{path}").status_code == 404


@pytest.fixture
def newer(client: TestClient, gateway: Gateway) -> Iterator[Callable[[Table, dict[str, object]], str]]:
    """Writes what no version of the house understands into the records of a deployment with a rollout; its page."""
    gateway.deploy("newer", "tiny@2")
    gateway.rollouts.start("newer", "tiny@1")

    def write(table: Table, values: dict[str, object]) -> str:
        is_it = (table.c.name if table is deployments else table.c.deployment) == "newer"
        with gateway.workspace.records.transaction() as connection:
            connection.execute(table.update().where(is_it).values(**values))
        gateway.notify()
        return "/models/deployments/newer"

    yield write
    if any(status.name == "newer" for status in gateway.list()):
        gateway.remove("newer")


def test_a_deployment_that_cannot_be_read_says_why_and_what_can_be_done(
    client: TestClient, gateway: Gateway, newer: Callable[[Table, dict[str, object]], str], language: str
) -> None:
    page = newer(deployments, {"settings": {"speed": 3}})
    shown = client.get(page, headers={"accept-language": language})
    assert shown.status_code == 200
    assert translate(language, "unreadable.title") in shown.text
    assert shown.text.count("unknown engine setting") == 1
    for action in (f"{page}/rollout/rollback", f"{page}/remove", "/models/deployments"):
        assert f'action="{action}"' in shown.text
    assert client.post(f"{page}/rollout/rollback", follow_redirects=False).status_code == 303
    assert f"{page}/rollout/rollback" not in client.get(page).text
    client.post("/models/deployments", data={"name": "newer", "reference": "tiny@2"})
    shown = client.get(page, headers={"accept-language": language})
    assert translate(language, "traffic.live") in shown.text
    wait_until(lambda: gateway.status("newer").error is None, "a status without an error in any process")


@pytest.mark.parametrize(
    ("table", "values"),
    [
        (rollouts, {"plan": {"speed": 3}}),
        (deployments, {"traffic": {"logs": {"speed": 3}}}),
        (deployments, {"replicas": {"speed": 3}}),
    ],
)
def test_whatever_cannot_be_read_of_a_deployment_can_be_removed(
    client: TestClient,
    gateway: Gateway,
    newer: Callable[[Table, dict[str, object]], str],
    table: Table,
    values: dict[str, object],
) -> None:
    page = newer(table, values)
    shown = client.get(page, headers={"accept-language": "en"})
    error = gateway.status("newer").error
    assert error
    said = error.partition(" (in ")[0]  # how many processes have it may have changed since
    assert (shown.status_code, str(escape(said)) in shown.text) == (200, True)
    assert translate("en", "unreadable.title") in shown.text
    if table is rollouts:  # else the parts that change are this process's own, and can be shown
        assert client.get(f"{page}/stream").text.startswith("event: end")
    assert client.post(f"{page}/remove", follow_redirects=False).status_code == 303
    assert client.get(page).status_code == 404


def test_curves_have_a_series_for_each_arm(gateway: Gateway) -> None:
    pulse = Pulse(0.0)
    pulse.tick(1.0, {"stable": ArmLoad(1, 0.25)})
    pulse.tick(2.0, {"shadow": ArmLoad(0, 0.0), "stable": ArmLoad(2, 0.5)})
    curves = curves_of(pulse.samples())
    assert curves["arms"] == ["stable", "shadow"]
    assert curves["seconds"] == [-1.0, 0.0]
    assert set(curves["series"]) == set(MEASURES)
    assert curves["series"]["in_hand"] == {"stable": [1, 2], "shadow": [None, 0]}
    assert curves["series"]["ttft_s"]["stable"] == [None, None]
    json.dumps(curves, allow_nan=False)
    assert curves_of([]) == {"arms": [], "seconds": [], "series": {measure: {} for measure in MEASURES}}


def test_the_stream_brings_parts_once_and_curves(address: str) -> None:
    import httpx

    events: list[str] = []
    wait_until(lambda: httpx.get(f"{address}/api/deployments/chat").json()["state"] == "READY", "the deployment")
    with httpx.stream("GET", f"{address}{PAGE}/stream", timeout=30) as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                events.append(line.removeprefix("event: "))
            if events.count("samples") == 2:
                break
    assert events[0] == "status"
    assert set(events) == {"status", "samples"}
