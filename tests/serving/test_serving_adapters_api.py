"""Adapters of a deployment over HTTP: the openai client names one behind a colon."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch

from sihe.models.checkpoint import load_model
from sihe.models.lora import apply_lora
from sihe.models.lora_config import LoraConfig
from sihe.models.lora_files import save_adapter
from sihe.serving.engine.config import EngineConfig
from sihe.serving.gateway.gateway import Gateway


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
    gateway.deploy("many", "tiny@live", settings=EngineConfig(max_batch_size=4, token_budget=32, max_adapters=1))
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
