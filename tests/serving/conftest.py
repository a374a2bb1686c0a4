"""Model versions that answer differently, a gateway over them, and a real server on a free port."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from sihe.core import settings
from sihe.core.records import Records
from sihe.core.workspace import Workspace
from sihe.serving.api import install_errors, router
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.encoder.engine import EncoderEngine
from sihe.serving.engine.engine import Engine
from sihe.serving.gateway.gateway import Gateway
from support.debian import postgres_server
from support.encoding import SETTINGS
from support.http_server import serving
from support.tiny_encoders import tiny_embedder, tiny_reranker
from support.tiny_models import tiny_config, tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without an end-of-sequence token, so that lengths are exact."""
    return tiny_model(tmp_path_factory.mktemp("models") / "plain", config=tiny_config(eos=False))


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with other weights."""
    return tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1, config=tiny_config(eos=False))


@pytest.fixture
def engine(model_folder: Path) -> Iterator[Engine]:
    with Engine.load(model_folder, EngineConfig(max_batch_size=8, token_budget=32)) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def embedder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def embedder(embedder_folder: Path) -> Iterator[EncoderEngine]:
    with EncoderEngine.load(embedder_folder, SETTINGS) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EncoderEngine]:
    with EncoderEngine.load(tiny_reranker(tmp_path_factory.mktemp("reranker")), SETTINGS) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Records]:
    """A database without tables on each backend."""
    if request.param == "sqlite":
        opened = Records(f"sqlite:///{tmp_path / 'records.db'}")
    else:
        opened = Records(request.getfixturevalue("postgres_url"))
        with opened.engine.begin() as connection:
            connection.exec_driver_sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    yield opened
    opened.close()


@pytest.fixture
def records(empty: Records) -> Records:
    """The same with all tables."""
    empty.migrate()
    return empty


@dataclass(frozen=True)
class House:
    """A gateway that serves, with what it stands on."""

    workspace: Workspace
    gateway: Gateway
    registry: CollectorRegistry
    url: str


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, other_folder: Path) -> Iterator[House]:
    """A server for a whole file of tests: opening the model registry costs two seconds."""
    home = tmp_path_factory.mktemp("home")
    registry = CollectorRegistry()
    with Workspace(settings.load({"home": str(home)}, environ={}, directory=home)) as workspace:
        workspace.tracking.register_model("tiny", model_folder)
        workspace.tracking.register_model("tiny", other_folder)
        workspace.tracking.set_alias("tiny", "live", 1)
        with Gateway(workspace, poll_interval_s=0.05, registry=registry) as gateway:
            app = FastAPI()
            app.include_router(router(gateway))
            install_errors(app)
            with serving(app) as url:
                yield House(workspace, gateway, registry, url)


@pytest.fixture
def gateway(house: House) -> Iterator[Gateway]:
    """`tiny` follows tiny@live, which is version 1 of 2, and serves; nothing else is deployed."""
    house.gateway.move_alias("tiny", "live", 1)
    house.gateway.deploy("tiny", "tiny@live", settings=EngineConfig(max_batch_size=8, token_budget=32))
    house.gateway.wait_ready("tiny", timeout_s=30)
    yield house.gateway
    for status in house.gateway.list():
        if status.name != "tiny":
            house.gateway.remove(status.name)


@pytest.fixture
def registry(house: House) -> CollectorRegistry:
    return house.registry


@pytest.fixture
def server_url(house: House, gateway: Gateway) -> str:
    """The address of the server over `gateway`."""
    return house.url
