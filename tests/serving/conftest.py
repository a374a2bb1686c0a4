"""Model versions that answer differently, a gateway over them, and a real server on a free port."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from sihe.core.workspace import Workspace
from sihe.serving.api import install_errors, router
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.gateway.gateway import Gateway
from support.http_server import serving
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


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def gateway(
    workspace: Workspace, model_folder: Path, other_folder: Path, registry: CollectorRegistry
) -> Iterator[Gateway]:
    """`tiny` follows tiny@live, which is version 1 of 2; it serves."""
    workspace.tracking.register_model("tiny", model_folder)
    workspace.tracking.register_model("tiny", other_folder)
    workspace.tracking.set_alias("tiny", "live", 1)
    with Gateway(workspace, poll_interval_s=0.05, registry=registry) as started:
        started.deploy("tiny", "tiny@live", settings=EngineConfig(max_batch_size=8, token_budget=32))
        started.wait_ready("tiny", timeout_s=30)
        yield started


@pytest.fixture
def server_url(gateway: Gateway) -> Iterator[str]:
    app = FastAPI()
    app.include_router(router(gateway))
    install_errors(app)
    with serving(app) as url:
        yield url
