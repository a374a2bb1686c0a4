"""`sihe deploy …`, as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from sihe.core import terminal
from sihe.core.errors import ConfigError, NotFound
from sihe.core.workspace import Workspace
from sihe.serving.commands import app
from sihe.serving.engine.config import EngineConfig
from sihe.serving.gateway.replicas.config import RayBackend, ReplicaConfig, ScalingConfig
from sihe.serving.gateway.store import DeploymentStore
from support.tiny_models import tiny_model


@pytest.fixture
def deployed(workspace: Workspace) -> Iterator[Workspace]:
    folder = tiny_model(workspace.path("model"))
    for _ in range(2):
        workspace.tracking.register_model("tiny", folder)
    workspace.tracking.set_alias("tiny", "live", 1)
    terminal.set_flags({"home": str(workspace.home)})
    yield workspace
    terminal.set_flags({})


def call(*words: str) -> str:
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_create_list_alias_remove(deployed: Workspace) -> None:
    settings = ("--engine", "max_batch_size=4", "--engine", "reserve_cache=true")
    made = json.loads(call("create", "chat", "tiny@live", *settings, "--json"))
    assert (made["name"], made["target"], made["state"]) == ("chat", "tiny@live", "UNSERVED")
    stored = DeploymentStore(deployed.records, deployed.clock).get("chat").settings
    assert stored == EngineConfig(max_batch_size=4, reserve_cache=True)
    assert [item["name"] for item in json.loads(call("list", "--json"))] == ["chat"]
    assert "chat" in call("list")
    store = DeploymentStore(deployed.records, deployed.clock)
    for process, is_shown in (("srv_a", False), ("srv_b", True)):  # one is what everybody expects
        store.report(store.reported("chat"), process=process)
        assert ("processes" in call("list")) == is_shown
    call("alias", "tiny", "live", "2")
    assert deployed.tracking.resolve("tiny@live").version == 2
    call("remove", "chat")
    assert json.loads(call("list", "--json")) == []


def test_replicas_are_wanted_by_dotted_keys(deployed: Workspace) -> None:
    wanted = ("max_replicas=4", "scaling.target_ttft_s=0.5", "backend.kind=ray", "backend.cpus=2")
    call("create", "chat", "tiny@live", *(part for item in wanted for part in ("--replica", item)))
    found = DeploymentStore(deployed.records, deployed.clock).get("chat").replicas
    assert found == ReplicaConfig(1, 4, scaling=ScalingConfig(target_ttft_s=0.5), backend=RayBackend(cpus=2))
    with pytest.raises(ConfigError, match="max_replicas"):
        call("create", "chat", "tiny@live", "--replica", "max_replicas=0")
    twice = ["create", "chat", "tiny@live", "--replica", "backend=ray", "--replica", "backend.cpus=2"]
    assert CliRunner().invoke(app, twice).exit_code == 2
    call("remove", "chat")


def test_mistakes_are_errors_of_the_house(deployed: Workspace) -> None:
    with pytest.raises(NotFound):
        call("remove", "chat")
    with pytest.raises(NotFound):
        call("create", "chat", "tiny@nowhere")
    with pytest.raises(ConfigError, match="speed"):
        call("create", "chat", "tiny@live", "--engine", "speed=4")
    assert CliRunner().invoke(app, ["create", "chat", "tiny@live", "--engine", "fast"]).exit_code == 2
