"""A house with something in every room, its application, and a real server with a real browser for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sihe.apps.rag.service import RagService
from sihe.console.app import create_app
from sihe.console.server import listen, url_of
from sihe.core import settings
from sihe.core.telemetry import configure_logs
from sihe.core.workspace import Workspace
from support.debian import wait_until
from support.tiny_models import tiny_model

DOCUMENT = """# Memory of training

ZeRO stage 3 shards the weights. Every forward pass gathers them again, which costs communication.

## Cache

A KV cache grows with the length of the sequence and limits the batch size.
"""


@dataclass(frozen=True)
class House:
    """A filled workspace and the names of what is in it."""

    workspace: Workspace
    finished: str
    running: str


def fill(workspace: Workspace, scratch: Path) -> House:
    """Runs with curves, lineage and artifacts, two versions of a tiny model, a deployment, an index."""
    tracking = workspace.tracking
    finished = tracking.start_run("pretraining", "tiny", params={"model": {"layers": 2}}, tags={"dataset": "d"})
    steps = {
        step: {"loss": 4 / (step + 1), "lr": 1e-3, "grad_norm": 1.5, "tokens_per_s": 900.0 + step} for step in range(40)
    }
    tracking.log_steps(finished, steps)
    tracking.log_metrics(finished, {"held_out_loss": 1.25})
    tracking.link(f"run:{finished}", ["dataset:stdlib@1"])
    tracking.link("dataset:stdlib@1", ["table:documents@3"])
    tracking.log_artifact(finished, "report.html", b"<h1>Report</h1><script>document.title = 'owned'</script>")
    folder = workspace.path("runs", finished)
    folder.mkdir(parents=True)
    attempts = [{"event": "ready", "attempt": n, "step": n * 20, "next_sample": n * 160} for n in range(2)]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in attempts), encoding="utf-8")
    for seed in (1, 2):
        model = scratch / f"model-{seed}"
        model.mkdir()
        tracking.register_model("tiny", tiny_model(model, seed=seed), run_id=finished, tags={"parameters": "40000"})
    tracking.set_alias("tiny", "production", 1)
    tracking.end_run(finished)
    running = tracking.start_run("labs", "a lab")
    tracking.log_metrics(running, {"loss": 2.0}, step=0)
    docs = scratch / "docs"
    docs.mkdir()
    (docs / "memory.md").write_text(DOCUMENT, encoding="utf-8")
    RagService(workspace, use_embedder=False).index("handbook", [docs])
    return House(workspace, finished, running)


def open_workspace(home: Path, **flags: object) -> Workspace:
    """A workspace with nothing from this machine's environment."""
    return Workspace(settings.load({"home": str(home), **flags}, environ={}, directory=home.parent))


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The filled house, one for all tests: they look at it, and put back what they change."""
    scratch = tmp_path_factory.mktemp("house")
    with open_workspace(scratch / "home") as workspace:
        yield fill(workspace, scratch)


@pytest.fixture(scope="session", autouse=True)
def plain_logs() -> None:
    """Logs as lines: the default draws every local variable of a traceback."""
    configure_logs("error", "json")


@pytest.fixture(scope="session")
def app(house: House) -> FastAPI:
    """Its application, not started."""
    return create_app(house.workspace)


@pytest.fixture(scope="session")
def client(app: FastAPI) -> Iterator[TestClient]:
    """A client of the started application; the deployment is ready."""
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as started:
        if not started.get("/api/deployments").json():
            started.post("/api/deployments", json={"name": "chat", "target": "tiny@production"}).raise_for_status()
        app.state.console.gateway.wait_ready("chat", timeout_s=60)
        yield started


@pytest.fixture(scope="session")
def address(house: House) -> Iterator[str]:
    """The address of a real server over the same house, for a browser."""
    served = create_app(house.workspace)
    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(served, log_config=None, access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the server's start")
    yield url_of(bound)
    served.state.console.stopping.set()
    server.should_exit = True
    thread.join(30)
    bound.close()


PAGES = (
    "map", "runs", "run", "run-live", "models", "deployment", "playground", "search", "answer", "document", "coach",
    "question", "topic", "labs", "lab", "lab-result", "access", "about", "login", "nothing",
)  # fmt: skip


@pytest.fixture(scope="session")
def paths(house: House, client: TestClient) -> dict[str, str]:
    """The address of every page. The deployment is ready, and a lab has been run through its page."""
    at = DOCUMENT.index("Every forward")
    form = {"parameter.ranks": "2", "parameter.largest-mib": "0.05", "parameter.repeats": "2"}
    asked = client.app.state.console.coach.lab("allreduce.ring").asks  # type: ignore[attr-defined]
    form |= {f"claim.{claim.key}": "2.5" for claim in asked}
    begun = client.post("/labs/allreduce.ring", data=form, follow_redirects=False)
    job = begun.headers["location"].partition("job=")[2]
    client.get(f"/labs/allreduce.ring/stream?job={job}")  # ends with the lab
    shown = client.get(begun.headers["location"], follow_redirects=False)
    assert shown.status_code == 303, shown.text
    return {
        "map": "/",
        "runs": "/runs",
        "run": f"/runs/{house.finished}",
        "run-live": f"/runs/{house.running}",
        "models": "/models",
        "deployment": "/models/deployments/chat",
        "playground": "/playground/chat",
        "search": "/search",
        "answer": "/search?q=Why+does+ZeRO+stage+3+cost+communication",
        "document": f"/search/handbook/document?name=docs%2Fmemory.md&start={at}&end={at + 13}",
        "coach": "/coach",
        "question": "/coach/zero",
        "topic": "/topics/zero",
        "labs": "/labs",
        "lab": "/labs/kv.cache",
        "lab-result": shown.headers["location"],
        "access": "/access",
        "about": "/about",
        "login": "/login",
        "nothing": "/nowhere",
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `page` runs for every page, one that takes `language` in both."""
    if "page" in metafunc.fixturenames:
        metafunc.parametrize("page", PAGES)
    if "language" in metafunc.fixturenames:
        metafunc.parametrize("language", ("en", "zh"))
