"""Adapters of a deployment over HTTP: the openai client names one behind a colon."""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
import torch
from prometheus_client import CollectorRegistry

from sihe.core.errors import AlreadyExists, ConfigError, CorruptData, InvalidInput, NotFound, SiheError
from sihe.core.workspace import Workspace
from sihe.models.checkpoint import load_model
from sihe.models.lora import apply_lora
from sihe.models.lora_config import LoraConfig
from sihe.models.lora_files import save_adapter
from sihe.serving.engine.adapters import EngineAdapters
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.gateway.gateway import Gateway
from support.tiny_models import tiny_config, tiny_model

SETTINGS = EngineConfig(max_batch_size=4, token_budget=32, max_adapters=1)


@pytest.fixture(scope="module")
def adapter_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = copy.deepcopy(load_model(model_folder))
    lora = apply_lora(model, LoraConfig(rank=4), "poet")
    torch.manual_seed(5)
    with torch.no_grad():
        for _, a, b in lora.matrices("poet"):
            a.normal_()
            b.normal_()
    save_adapter(lora, "poet", folder)
    return folder


@pytest.fixture
def url(gateway: Gateway, server_url: str) -> Iterator[str]:
    gateway.deploy("many", "tiny@live", settings=SETTINGS)
    gateway.wait_ready("many", timeout_s=60)
    yield server_url
    gateway.remove("many")


def test_an_adapter_is_loaded_named_and_unloaded_while_the_model_serves(url: str, adapter_folder: Path) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        check(client, url, adapter_folder)


def check(client: openai.OpenAI, url: str, adapter_folder: Path) -> None:
    def said(model: str) -> str:
        answer = client.completions.create(model=model, prompt="one two", max_tokens=12, temperature=0)
        assert answer.model == model
        return answer.choices[0].text

    plain = said("many")
    with pytest.raises(openai.NotFoundError) as unknown:
        said("many:poet")
    assert unknown.value.code == "model_not_found"
    place = f"{url}/api/deployments/many/adapters"
    loaded = httpx.post(place, json={"name": "poet", "folder": str(adapter_folder)})
    assert loaded.status_code == 201
    assert loaded.json() == {"deployment": "many", "adapters": ["poet"]}
    changed = said("many:poet")
    assert changed != plain
    assert said("many") == plain
    again = httpx.post(place, json={"name": "poet", "folder": str(adapter_folder)})
    assert again.status_code == 409
    full = httpx.post(place, json={"name": "other", "folder": str(adapter_folder)})
    assert full.status_code == 429
    assert httpx.get(place).json()["adapters"] == ["poet"]
    assert httpx.delete(f"{place}/poet").status_code == 204
    with pytest.raises(openai.NotFoundError):
        said("many:poet")
    missing = httpx.post(place, json={"name": "poet", "folder": "/nowhere"})
    assert missing.status_code == 404
    assert httpx.get(place).json()["adapters"] == []


# ---- what is remembered ----------------------------------------------------------------------------------------------

POET = GenerationRequest(prompt=(5, 6, 7), max_tokens=12, temperature=0, adapter="poet")


def copied(adapter_folder: Path, tmp_path: Path) -> Path:
    """A copy that the test may delete."""
    return shutil.copytree(adapter_folder, tmp_path / "mine")


def said(gateway: Gateway) -> tuple[str, tuple[int, ...]]:
    stream = gateway.generate("many", POET)
    return stream.served_by, stream.result(30).token_ids


def test_an_adapter_is_there_after_a_swap_and_after_a_restart(
    gateway: Gateway, url: str, adapter_folder: Path, tmp_path: Path
) -> None:
    folder = copied(adapter_folder, tmp_path)
    (folder / "secret.txt").write_text("of no business here")
    gateway.adapters.load("many", "poet", folder)
    shutil.rmtree(folder)
    first = said(gateway)
    assert first[0] == "tiny@1"
    gateway.move_alias("tiny", "live", 2)
    gateway.wait_ready("many", timeout_s=60)
    second = said(gateway)
    assert (second[0], second[1] != first[1]) == ("tiny@2", True)
    gateway.move_alias("tiny", "live", 1)
    with Workspace(gateway.workspace.settings) as opened, Gateway(opened, registry=CollectorRegistry()) as again:
        again.wait_ready("many", timeout_s=60)
        assert said(again) == first, "as a process that was started anew"
        assert again.adapters.names("many") == ["poet"]
    kept = gateway.workspace.objects.list("adapters/many")
    assert sorted(name.rpartition("/")[2] for name in kept) == ["adapter_config.json", "adapter_model.safetensors"]
    gateway.wait_ready("many", timeout_s=60)
    gateway.adapters.unload("many", "poet")
    assert gateway.workspace.objects.list("adapters/many") == []
    with pytest.raises(NotFound):
        gateway.adapters.unload("many", "poet")


def test_another_process_that_serves_follows(gateway: Gateway, url: str, adapter_folder: Path) -> None:
    with Workspace(gateway.workspace.settings) as opened:
        other = Gateway(opened, poll_interval_s=60, registry=CollectorRegistry())
        with other:
            other.wait_ready("many", timeout_s=60)
            gateway.adapters.load("many", "poet", adapter_folder)
            until_named(other, ["poet"])
            gateway.adapters.unload("many", "poet")
            until_named(other, [])


def until_named(gateway: Gateway, names: list[str]) -> None:
    for _ in range(1000):
        gateway.notify()
        if gateway.adapters.names("many") == names:
            return
        threading.Event().wait(0.01)
    raise AssertionError(gateway.adapters.names("many"))


def test_an_arm_has_the_adapters_too(gateway: Gateway, url: str, adapter_folder: Path) -> None:
    gateway.adapters.load("many", "poet", adapter_folder)
    gateway.traffic.set_arm("many", "b", "tiny@2", 0.5)
    gateway._live["many"].routes["b"].wait_settled(60)
    gateway.notify()
    assert {said(gateway)[0] for _ in range(40)} == {"tiny@1", "tiny@2"}
    gateway.traffic.remove_arm("many", "b")


def test_a_version_that_cannot_take_the_adapters_is_refused(
    gateway: Gateway, url: str, adapter_folder: Path, tmp_path: Path
) -> None:
    wider = tiny_model(tmp_path / "wider", config=replace(tiny_config(eos=False), num_heads=8))
    number = gateway.workspace.tracking.register_model("tiny", wider).version
    gateway.adapters.load("many", "poet", adapter_folder)
    before = said(gateway)
    gateway.deploy("many", f"tiny@{number}", settings=SETTINGS)
    with pytest.raises(SiheError, match="shape"):
        gateway.wait_ready("many", timeout_s=60)
    assert said(gateway) == before, "the one that serves was never touched"
    gateway.adapters.unload("many", "poet")
    gateway.wait_ready("many", timeout_s=60)
    assert gateway.status("many").version == number, "without the adapter it is tried again"


def test_nothing_is_kept_of_what_was_refused(gateway: Gateway, url: str, adapter_folder: Path, tmp_path: Path) -> None:
    folder = copied(adapter_folder, tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(CorruptData):
        gateway.adapters.load("many", "poet", folder)
    assert gateway.workspace.objects.list("adapters/many") == []
    assert gateway._store.get("many").adapters == ()
    gateway.adapters.load("many", "poet", adapter_folder)
    with pytest.raises(ConfigError, match="poet"):
        gateway.deploy("many", "tiny@live", settings=EngineConfig(max_batch_size=4, token_budget=32))
    gateway.deploy("many", "tiny@live", settings=SETTINGS)
    assert gateway.adapters.names("many") == ["poet"]


def test_what_the_settings_name_is_theirs(gateway: Gateway, adapter_folder: Path) -> None:
    settings = EngineConfig(max_batch_size=4, token_budget=32, max_adapters=2, adapters=(f"poet={adapter_folder}",))
    gateway.deploy("many", "tiny@live", settings=settings)
    gateway.wait_ready("many", timeout_s=60)
    with pytest.raises(AlreadyExists):
        gateway.adapters.load("many", "poet", adapter_folder)
    with pytest.raises(InvalidInput, match="settings"):
        gateway.adapters.unload("many", "poet")
    gateway.adapters.load("many", "other", adapter_folder)
    gateway.remove("many")
    assert gateway.workspace.objects.list("adapters/many") == []


def test_a_slow_load_holds_up_its_own_deployment_alone(
    url: str, gateway: Gateway, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    load = EngineAdapters.load

    def slow(self: EngineAdapters, name: str, folder: Path) -> None:
        if name == "slow":
            begun.set()
            assert go.wait(30)
        load(self, name, folder)

    gateway.deploy("more", "tiny@live", settings=SETTINGS)
    gateway.wait_ready("more", timeout_s=60)
    monkeypatch.setattr(EngineAdapters, "load", slow)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(gateway.adapters.load, "many", "slow", adapter_folder)
        assert begun.wait(30)
        gateway.adapters.load("more", "poet", adapter_folder)
        second = threads.submit(gateway.adapters.load, "many", "slow", adapter_folder)
        go.set()
        first.result(30)
        with pytest.raises(AlreadyExists):
            second.result(30)
    assert (gateway.adapters.names("many"), gateway.adapters.names("more")) == (["slow"], ["poet"])
    assert len(gateway.adapters._changing) == 0
