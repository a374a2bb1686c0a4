"""Predictive deployments through the gateway: registered, deployed, swapped under load, kept apart from engines."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from tritonclient.utils import InferenceServerException

from sihe.core import settings
from sihe.core.errors import ConfigError, CorruptData
from sihe.core.workspace import Workspace
from sihe.serving.api import install_errors, router
from sihe.serving.engine.config import EngineConfig
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.store import DeploymentStore
from sihe.serving.gateway.types import DeploymentState
from sihe.serving.predictive.config import PredictiveConfig
from sihe.serving.predictive.registration import register, save_onnx
from sihe.serving.tenants import Access, TenantStore
from sihe.serving.tenants.http import PROBES
from support.http_server import serving
from support.predictive_models import matmul_onnx
from support.tiny_models import tiny_config, tiny_model

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


@dataclass(frozen=True)
class House:
    """A gateway that serves `scale@live`: version 1 multiplies by 1, version 2 by 2."""

    gateway: Gateway
    url: str
    registry: CollectorRegistry


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("home")
    registry = CollectorRegistry()
    with Workspace(settings.load({"home": str(home)}, environ={}, directory=home)) as workspace:
        for factor in (1, 2):
            save_onnx(matmul_onnx(home / f"{factor}.onnx", factor=factor), home / f"scale-{factor}")
            assert register(workspace.tracking, "scale", home / f"scale-{factor}").tags["sihe.kind"] == "predictive"
        workspace.tracking.set_alias("scale", "live", 1)
        workspace.tracking.register_model("tiny", tiny_model(home / "tiny", config=tiny_config()))
        with Gateway(workspace, poll_interval_s=0.05, registry=registry) as gateway:
            gateway.deploy("scale", "scale@live", settings={"max_delay_ms": 0.5, "threads": 1})
            app = FastAPI()
            app.include_router(router(gateway))
            install_errors(app)
            with serving(app) as url:
                yield House(gateway, url, registry)


@pytest.fixture
def gateway(house: House) -> Gateway:
    house.gateway.move_alias("scale", "live", 1)
    house.gateway.deploy("scale", "scale@live", settings={"max_delay_ms": 0.5, "threads": 1})
    house.gateway.wait_ready("scale", timeout_s=60)
    return house.gateway


def infer(url: str, name: str = "scale", version: str = "") -> tuple[str, Any]:
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        given = triton.InferInput("x", [2, 4], "FP32").set_data_from_numpy(ROWS)
        result = client.infer(name, [given], model_version=version)
        return result.get_response()["model_version"], result.as_numpy("z")


def test_a_deployment_answers_and_its_settings_are_kept(house: House, gateway: Gateway) -> None:
    version, z = infer(house.url)
    assert version == "1"
    np.testing.assert_array_equal(z, ROWS)
    stored = DeploymentStore(gateway.workspace.records, gateway.workspace.clock).get("scale").settings
    assert stored == PredictiveConfig(max_delay_ms=0.5, threads=1)
    labels = {"deployment": "scale", "outcome": "ok"}
    assert (house.registry.get_sample_value("sihe_predictive_requests_total", labels) or 0) >= 1


def test_swaps_under_load_lose_nothing(house: House, gateway: Gateway) -> None:
    done = threading.Event()
    answers: list[tuple[str, float]] = []
    failures: list[Exception] = []

    def ask() -> None:
        body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}]}
        with httpx.Client() as client:
            while not done.is_set():
                try:
                    response = client.post(f"{house.url}/v2/models/scale/infer", json=body, timeout=30)
                    response.raise_for_status()
                    said = response.json()
                    answers.append((said["model_version"], said["outputs"][0]["data"][0]))
                except Exception as error:
                    failures.append(error)

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    for move in range(10):
        version = 2 - move % 2
        gateway.move_alias("scale", "live", version)
        assert gateway.wait_ready("scale", timeout_s=60).version == version
    done.set()
    for caller in callers:
        caller.join()
    assert failures == []
    assert {version for version, _ in answers} == {"1", "2"}
    assert all(value == float(version) for version, value in answers), "the version that is named computed it"


def test_versions_and_readiness(house: House, gateway: Gateway) -> None:
    assert infer(house.url, version="1")[0] == "1"
    with pytest.raises(InferenceServerException, match="version 1 serves") as caught:
        infer(house.url, version="2")
    assert caught.value.status() == "404"
    with triton.InferenceServerClient(house.url.removeprefix("http://")) as client:
        assert client.is_server_ready()
        assert client.is_model_ready("scale", "1")
        assert client.get_model_metadata("scale")["versions"] == ["1"]
        with pytest.raises(InferenceServerException, match="deployed are: scale") as caught:
            client.get_model_metadata("absent")
        assert caught.value.status() == "404"


def test_keys_guard_everything_but_probes(gateway: Gateway, tmp_path: Path) -> None:
    body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}]}
    home = settings.load({"home": str(tmp_path)}, environ={}, directory=tmp_path)
    with Workspace(home) as keys, contextlib.closing(Access(keys)) as access:
        store = TenantStore(keys.records, keys.clock)
        _, mine = store.create_key("mine", deployments=frozenset({"scale"}))
        _, other = store.create_key("other", deployments=frozenset({"writer"}))
        app = FastAPI()
        app.include_router(router(gateway, access))
        install_errors(app)
        with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
            for path in PROBES:
                assert client.get(path).status_code == 200
            for key, status in (("", 401), ("wrong", 401), (other.text, 403), (mine.text, 200)):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                answer = client.post("/v2/models/scale/infer", json=body, headers=headers)
                assert answer.status_code == status, answer.text
                assert status == 200 or list(answer.json()) == ["error"]


def test_unknown_paths_are_in_the_protocols_form(house: House) -> None:
    for path in ("/v2/nothing", "/v2/models/scale/infer"):
        response = httpx.get(house.url + path)
        assert response.status_code in (404, 405)
        assert list(response.json()) == ["error"]
    assert httpx.get(f"{house.url}/v2").json()["name"] == "sihe"


def test_a_version_that_cannot_answer_its_example_changes_nothing(
    house: House, gateway: Gateway, tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    save_onnx(matmul_onnx(tmp_path / "bad.onnx"), folder)
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CorruptData):
        register(gateway.workspace.tracking, "scale", folder)
    broken = gateway.workspace.tracking.register_model("scale", folder, tags={"sihe.kind": "predictive"})
    gateway.move_alias("scale", "live", broken.version)
    with pytest.raises(CorruptData):
        gateway.wait_ready("scale", timeout_s=60)
    assert infer(house.url)[0] == "1"
    with triton.InferenceServerClient(house.url.removeprefix("http://")) as client:
        reasons = {model["name"]: model["reason"] for model in client.get_model_repository_index()}
    assert "model.onnx" in reasons["scale"]


def test_settings_of_another_kind_are_refused(house: House, gateway: Gateway) -> None:
    with pytest.raises(ConfigError, match="predictive"):
        gateway.deploy("other", "scale@1", settings=EngineConfig())
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        gateway.deploy("other", "scale@1", settings={"kv_cache_bytes": 1})
    with pytest.raises(ConfigError, match="max_delay_ms"):
        gateway.deploy("other", "tiny", settings={"max_delay_ms": 1})


def test_an_alias_that_leads_to_another_kind_changes_nothing(house: House, gateway: Gateway, tmp_path: Path) -> None:
    other = gateway.workspace.tracking.register_model("scale", tiny_model(tmp_path / "tiny", config=tiny_config()))
    gateway.move_alias("scale", "live", other.version)
    with pytest.raises(ConfigError, match="deploy it again"):
        gateway.wait_ready("scale", timeout_s=60)
    assert infer(house.url)[0] == "1"


def test_a_deployment_through_the_api(house: House, gateway: Gateway) -> None:
    body = {"name": "second", "target": "scale@2", "settings": {"max_batch_size": 4, "wait": "always"}}
    made = httpx.post(f"{house.url}/api/deployments", json=body, timeout=30)
    assert made.status_code == 201
    assert gateway.wait_ready("second", timeout_s=60).state is DeploymentState.READY
    np.testing.assert_array_equal(infer(house.url, "second")[1], ROWS * 2)
    gateway.remove("second")
    with pytest.raises(InferenceServerException, match="no deployment"):
        infer(house.url, "second")
