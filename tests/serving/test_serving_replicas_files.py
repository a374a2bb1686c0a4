"""Where a node of a cluster keeps models that come to it."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from sihe.core.errors import ConfigError
from sihe.core.storage import ObjectStore
from sihe.serving.gateway.replicas.ray import actor
from sihe.serving.gateway.replicas.ray.actor import ModelFiles


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("LOGNAME", "somebody")
    return tmp_path / "sihe-models-somebody"


def test_only_their_owner_writes_there(folder: Path) -> None:
    assert actor._own_folder() == folder
    folder.chmod(0o777)
    assert stat.S_IMODE(actor._own_folder().stat().st_mode) == 0o700


def test_what_somebody_else_has_made_is_not_used(
    folder: Path, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ObjectStore(str(tmp_path / "store")).put_tree("m", model_folder)
    files = ModelFiles(str(tmp_path / "store"), "m")
    assert (files.fetch() / "config.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 4711)
        with pytest.raises(ConfigError, match="somebody else"):
            files.fetch()
    folder.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="somebody else"):
        files.fetch()
