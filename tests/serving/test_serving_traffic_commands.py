"""`sihe deploy arms|canary|…`, as a user calls them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from sihe.core import terminal
from sihe.core.errors import InvalidInput, NotFound
from sihe.core.workspace import Workspace
from sihe.serving.commands import app
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.gateway.store import DeploymentStore
from sihe.serving.gateway.traffic.experiment import Experiment, Period, Split
from sihe.serving.gateway.traffic.experiment_store import ExperimentStore
from sihe.serving.gateway.traffic.outcome import Outcome
from sihe.serving.gateway.traffic.request_log import LogEntry, RequestLog
from sihe.serving.gateway.traffic.shadow import ShadowReport
from support.tiny_models import tiny_model


@pytest.fixture
def deployed(workspace: Workspace) -> Iterator[Workspace]:
    folder = tiny_model(workspace.path("model"))
    for _ in range(2):
        workspace.tracking.register_model("tiny", folder)
    workspace.tracking.set_alias("tiny", "live", 1)
    terminal.set_flags({"home": str(workspace.home)})
    call("create", "chat", "tiny@live")
    yield workspace
    terminal.set_flags({})


def call(*words: str) -> str:
    result = CliRunner().invoke(app, words, catch_exceptions=False, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.output


def test_from_an_arm_to_a_promoted_canary(deployed: Workspace) -> None:
    assert "b 20.0%" in call("arm", "chat", "b", "tiny@2", "--weight", "0.2")
    assert "stable" in call("arms", "chat")
    assert "stable 100.0%" in call("arm", "chat", "b")
    begun = json.loads(call("canary", "chat", "tiny@2", "--steps", "10,50", "--max-error-rate", "0.1", "--json"))
    assert [step["weight"] for step in begun["plan"]["steps"]] == [0.1, 0.5]
    assert "RUNNING; step 1 of 2, 10%" in " ".join(call("arms", "chat").split())
    assert "PAUSED" in call("pause", "chat")
    assert "RUNNING" in call("pause", "chat", "--resume")
    call("rollback", "chat")
    call("canary", "chat", "tiny@2")
    assert "tiny@2" in call("promote", "chat")
    assert deployed.tracking.resolve("tiny@live").version == 2
    shown = json.loads(call("arms", "chat", "--json"))
    assert (shown["rollouts"][0]["state"], shown["policy"]["arms"]) == ("PROMOTED", [])


def test_what_was_measured_is_shown_with_what_can_be_said_of_it(deployed: Workspace) -> None:
    split = Split({"stable": 0.5, "b": 0.5}, {"stable": 1, "b": 2})
    period = Experiment("chat", 1, split, datetime(2026, 1, 2, tzinfo=UTC))
    for number in range(600):
        arm = "b" if number % 2 else "stable"
        latency = (0.2 if arm == "b" else 0.1) * (1 + number % 7 / 10)
        cluster = period.begin(f"r{number}", arm, f"r{number}")
        period.record(arm, Outcome("finished", "stop", None, 5, 5, 0.05, latency), cluster, f"r{number}")
    store = ExperimentStore(deployed.records, deployed.clock)
    assert store.begin("chat", Period(1, split, period.started_at), newest=None)
    assert store.save(period, "srv_1.0", is_new=True)
    shown = " ".join(call("arms", "chat").split())
    assert "worse" in shown
    assert "300" in shown


def test_shadow_and_logs(deployed: Workspace) -> None:
    assert "copies of 30%" in call("shadow", "chat", "tiny@2", "--share", "0.3", "--always")
    assert "shadow tiny@2 gets copies of 30%" in call("arms", "chat")
    assert "no serving process has reported" in call("shadows", "chat")
    found = json.loads(call("shadows", "chat", "--json"))
    assert (found["shadow"]["share"], found["report"]) == (0.3, None)
    store = DeploymentStore(deployed.records, deployed.clock)
    report = ShadowReport(8, 5, 1, 0, 2, 4, 0.9375, 1.25, "tokens", 0.05, "tiny@2")
    store.report(store.reported("chat"), report, process="a")
    shown = " ".join(call("shadows", "chat").split())
    assert "shadow tiny@2 gets copies of 30%" in shown
    assert "8 5 4 1 0 2 0.9375 (tokens) 50 ms 1.25 x" in shown
    assert json.loads(call("shadows", "chat", "--json"))["report"]["mean_agreement"] == 0.9375
    store.report(store.reported("chat"), ShadowReport(1, 0, 0, 0, 1, 0, None, None, target="tiny@2"), process="a")
    assert "1 0 0 0 0 1 – – –" in " ".join(call("shadows", "chat").split())
    assert "no shadow" in call("shadow", "chat")
    with pytest.raises(NotFound, match="sihe deploy shadow chat"):
        call("shadows", "chat")
    assert "without their text; records are kept for 30 days" in call("log", "chat", "0.5").replace("\n", " ")
    assert "7 days" in call("log", "chat", "0.5", "--keep-days", "7")
    assert "7 days" in call("log", "chat", "0.5")
    assert json.loads(call("logs", "chat", "--json")) == []
    log = RequestLog(deployed.path("lake"))
    request = GenerationRequest(prompt="the", tenant="acme")
    outcome = Outcome("failed", None, "GenerationFailed: no", 1, 0, None, 0.25)
    for number in range(3):
        time = datetime(2026, 1, 2, 3, 4, number, tzinfo=UTC)
        log.offer(LogEntry(time, f"r{number}", "chat", "stable", "tiny@1", None, request, outcome, keeps_text=False))
    log.close()
    rows = json.loads(call("logs", "chat", "--limit", "2", "--json"))
    assert [row["request_id"] for row in rows] == ["r2", "r1"]
    assert "250 ms" in call("logs", "chat", "--arm", "stable")
    assert json.loads(call("logs", "chat", "--arm", "b", "--json")) == []


def test_mistakes_are_errors_of_the_house(deployed: Workspace) -> None:
    for words in (("arms", "absent"), ("canary", "chat", "tiny@9"), ("promote", "chat"), ("logs", "chat", "--arm")):
        if words[-1] == "--arm":
            assert CliRunner().invoke(app, words).exit_code == 2
            continue
        with pytest.raises(NotFound):
            call(*words)
    for words in (("canary", "chat", "tiny@2", "--steps", "a,b"), ("canary", "chat", "tiny@2", "--steps", "50,10")):
        with pytest.raises(InvalidInput):
            call(*words)
