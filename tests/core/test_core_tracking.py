"""Runs, models, aliases and lineage on both databases, and from several processes at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sihe.core import settings
from sihe.core.errors import InvalidInput, NotFound
from sihe.core.workspace import Workspace


def _weights(folder: Path, content: str = "w") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_text(content)
    return folder


def test_a_run_keeps_what_it_was_told(both: Workspace) -> None:
    tracking = both.tracking
    run_id = tracking.start_run("pretraining", "first", params={"model": {"layers": 2}, "lr": 0.1}, tags={"a": "b"})
    for step in range(3):
        tracking.log_metrics(run_id, {"loss": 3.0 - step, "lr": 0.1}, step=step)
    tracking.log_artifact(run_id, "report.html", b"<p>done</p>")
    tracking.end_run(run_id)
    run = tracking.run(run_id)
    assert (run.name, run.experiment, run.status) == ("first", "pretraining", "FINISHED")
    assert run.params == {"model.layers": "2", "lr": "0.1"}
    assert run.metrics == {"loss": 1.0, "lr": 0.1}
    assert run.tags["a"] == "b"
    assert [point.value for point in tracking.history(run_id, "loss")] == [3.0, 2.0, 1.0]
    assert tracking.artifacts(run_id) == ["report.html"]
    assert tracking.artifact(run_id, "report.html") == b"<p>done</p>"
    assert [found.id for found in tracking.runs("pretraining")] == [run_id]
    assert tracking.runs("another") == []


def test_a_step_repeated_after_a_recovery_counts_once(both: Workspace) -> None:
    run_id = both.tracking.start_run("pretraining", "r")
    for step, value in ((0, 5.0), (1, 4.0), (1, 4.0), (2, 3.0)):
        both.tracking.log_metrics(run_id, {"loss": value}, step=step)
    assert [point.step for point in both.tracking.history(run_id, "loss")] == [0, 1, 2]


def test_versions_aliases_and_lineage(both: Workspace, tmp_path: Path) -> None:
    tracking = both.tracking
    run_id = tracking.start_run("pretraining", "r")
    tracking.link(f"run:{run_id}", ["dataset:docs@1"])
    first = tracking.register_model("gpt", _weights(tmp_path / "1", "one"), run_id=run_id)
    second = tracking.register_model("gpt", _weights(tmp_path / "2", "two"), run_id=run_id)
    assert (first.version, second.version) == (1, 2)
    tracking.set_alias("gpt", "production", 1)
    assert tracking.resolve("gpt@production").version == 1
    tracking.set_alias("gpt", "production", 2)
    assert tracking.resolve("gpt@production").version == 2
    assert tracking.resolve("gpt").version == 2
    assert tracking.models() == {"gpt": {"production": 2}}
    assert (tracking.download(first) / "weights.bin").read_text() == "one"
    assert tracking.ancestors(second.key) == [("model:gpt@2", f"run:{run_id}"), (f"run:{run_id}", "dataset:docs@1")]
    tracking.link(f"run:{run_id}", ["dataset:docs@1"])  # the same edge again is no error
    assert len(tracking.ancestors(second.key)) == 2


@pytest.mark.parametrize("reference", ["none", "none@1", "none@production"])
def test_an_unknown_model_is_not_found(both: Workspace, reference: str) -> None:
    with pytest.raises(NotFound):
        both.tracking.resolve(reference)


def test_unknown_alias_version_and_run_are_not_found(both: Workspace, tmp_path: Path) -> None:
    both.tracking.register_model("gpt", _weights(tmp_path / "1"))
    for call in (
        lambda: both.tracking.resolve("gpt@9"),
        lambda: both.tracking.resolve("gpt@none"),
        lambda: both.tracking.set_alias("gpt", "production", 9),
        lambda: both.tracking.run("0" * 32),
        lambda: both.tracking.artifact("0" * 32, "x"),
    ):
        with pytest.raises(NotFound):
            call()


@pytest.mark.parametrize("name", ["../up", "", "a/b", "x" * 121, ".hidden"])
def test_names_that_cannot_be_paths_are_refused(workspace: Workspace, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput):
        workspace.tracking.register_model(name, _weights(tmp_path / "w"))


CLIENT = """
import sys, pathlib
from sihe.core import settings
from sihe.core.workspace import Workspace
home, url, folder = sys.argv[1:]
with Workspace(settings.load({"home": home, "records.url": url}, environ={})) as workspace:
    run = workspace.tracking.start_run("pretraining", "r")
    for step in range(20):
        workspace.tracking.log_metrics(run, {"loss": 1.0 / (step + 1)}, step=step)
    for _ in range(5):
        workspace.tracking.register_model("gpt", pathlib.Path(folder), run_id=run)
"""


def test_two_processes_at_once_from_an_empty_home(tmp_path: Path, database_url: str) -> None:
    home, folder = tmp_path / "home", _weights(tmp_path / "w")
    arguments = [sys.executable, "-c", CLIENT, str(home), database_url, str(folder)]
    clients = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, cwd=tmp_path) for _ in range(2)]
    for client in clients:
        _, errors = client.communicate(timeout=200)
        assert client.returncode == 0, errors
    flags = {"home": str(home), "records.url": database_url}
    with Workspace(settings.load(flags, environ={}, directory=tmp_path)) as opened:
        assert [version.version for version in opened.tracking.model_versions("gpt")] == list(range(10, 0, -1))
        runs = opened.tracking.runs("pretraining")
        assert [len(opened.tracking.history(run.id, "loss")) for run in runs] == [20, 20]
