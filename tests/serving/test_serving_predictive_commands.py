"""`sihe predictor …`, as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sihe.core import terminal
from sihe.core.errors import InvalidInput, NotFound
from sihe.core.workspace import Workspace
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.store import DeploymentStore
from sihe.serving.predictive.commands import app
from sihe.serving.predictive.config import PredictiveConfig
from sihe.serving.predictive.registration import save_onnx
from support.predictive_models import matmul_onnx


@pytest.fixture
def home(workspace: Workspace) -> Iterator[Workspace]:
    terminal.set_flags({"home": str(workspace.home)})
    yield workspace
    terminal.set_flags({})


def call(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_describe_and_register(home: Workspace, tmp_path: Path) -> None:
    file = matmul_onnx(tmp_path / "m.onnx", factor=2)
    save_onnx(file, tmp_path / "m", labels={"z": ["a", "b", "c", "d"]})
    assert "a, b, c, d" in call("describe", tmp_path / "m")
    assert json.loads(call("describe", file, "--json"))["inputs"][0]["shape"] == [-1, 4]
    assert json.loads(call("register", "scale", tmp_path / "m", "--alias", "live", "--json"))["version"] == 1
    assert call("register", "scale", file).strip() == "scale@2"
    assert home.tracking.resolve("scale@live").version == 1
    Gateway(home).deploy("scale", "scale@live", settings={"max_batch_size": 4})
    stored = DeploymentStore(home.records, home.clock).get("scale").settings
    assert stored == PredictiveConfig(max_batch_size=4)


def test_mistakes_are_errors_of_the_house(home: Workspace, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        call("register", "scale", tmp_path / "absent.onnx")
    (tmp_path / "m.txt").write_text("no model")
    with pytest.raises(InvalidInput, match="neither a model's folder"):
        call("describe", tmp_path / "m.txt")
    with pytest.raises(NotFound, match=r"model\.json"):
        call("register", "scale", tmp_path)
    assert home.tracking.model_versions("scale") == []
