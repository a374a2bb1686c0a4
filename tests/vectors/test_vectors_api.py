"""The routes and commands over a real database."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from sihe.core.errors import InvalidInput, NotFound, SiheError
from sihe.core.http import status_of
from sihe.core.terminal import set_flags
from sihe.vectors.api import router
from sihe.vectors.commands import app
from sihe.vectors.database import Database


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    application = FastAPI()
    with Database(tmp_path / "vectors") as database:
        application.include_router(router(database))

        @application.exception_handler(SiheError)
        def handle(request: Request, error: SiheError) -> JSONResponse:
            return JSONResponse({"error": str(error)}, status_of(error))

        yield TestClient(application)


def test_a_collection_over_http(client: TestClient) -> None:
    assert client.get("/api/collections").json() == {"collections": []}
    assert client.put("/api/collections/c", json={"dim": 2, "metric": "l2"}).status_code == 201
    assert client.put("/api/collections/c", json={"dim": 2}).status_code == 409
    body = {"ids": [1, "b"], "vectors": [[1, 0], [0, 1]], "payloads": [{"n": 1}, None]}
    assert client.post("/api/collections/c/points", json=body).json() == {"written": 2, "inserted": 2}
    found = client.post("/api/collections/c/search", json={"vector": [1, 0], "k": 1}).json()
    assert found == {"hits": [{"id": 1, "score": 0.0, "payload": {"n": 1}}]}
    condition = {"not": {"field": "n", "equals": 1}}
    found = client.post("/api/collections/c/search", json={"vector": [1, 0], "filter": condition}).json()
    assert [hit["id"] for hit in found["hits"]] == ["b"]
    points = client.post("/api/collections/c/points/get", json={"ids": ["b", 9]}).json()["points"]
    assert points == [{"id": "b", "payload": {}, "vector": [0.0, 1.0]}]
    page = client.post("/api/collections/c/scroll", json={"limit": 1}).json()
    assert page == {"points": [{"id": 1, "payload": {"n": 1}}], "next": 1}
    assert client.post("/api/collections/c/points/delete", json={"ids": [1]}).json() == {"deleted": 1}
    assert client.get("/api/collections/c").json()["count"] == 1
    assert client.delete("/api/collections/c").json() == {"dropped": True}
    assert client.get("/api/collections/c").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/collections/nothing/search", {"vector": [1, 0]}, 404),
        ("/api/collections/c/search", {"vector": [1]}, 400),
        ("/api/collections/c/search", {"vector": [1, 0], "k": 0}, 422),
        ("/api/collections/c/search", {"vector": [1, 0], "filter": {"field": "a"}}, 400),
        ("/api/collections/c/points", {"ids": [1], "vectors": []}, 400),
        ("/api/collections/c/points", {"ids": [True], "vectors": [[1, 0]]}, 422),
        ("/api/collections/c/points", {"ids": [1], "vectors": [[1, 0]], "other": 1}, 422),
        ("/api/collections/..%2fc/search", {"vector": [1, 0]}, 404),
    ],
)
def test_bad_requests_are_the_clients_fault(client: TestClient, path: str, body: object, status: int) -> None:
    client.put("/api/collections/c", json={"dim": 2})
    assert client.post(path, json=body).status_code == status


def test_commands(tmp_path: Path) -> None:
    set_flags({"home": str(tmp_path)})
    run = CliRunner().invoke
    try:
        assert json.loads(run(app, ["list", "--json"]).output) == []
        assert json.loads(run(app, ["create", "c", "--dim", "2", "--json"]).output)["metric"] == "cosine"
        with Database(tmp_path / "vectors") as database:
            database.collection("c").upsert(["a"], [[1, 1]], [{"标题": "四合"}])
        hits = json.loads(run(app, ["search", "c", "[1, 1]", "--json"]).output)
        assert hits[0]["id"] == "a"
        shown = json.loads(run(app, ["show", "c", "--json"]).output)
        assert shown["points"] == [{"id": "a", "payload": {"标题": "四合"}}]
        assert shown["collection"]["count"] == 1
        assert "四合" in run(app, ["show", "c"]).output
        assert "cosine" in run(app, ["list"]).output
        assert isinstance(run(app, ["search", "c", "[1,"]).exception, InvalidInput)
        assert isinstance(run(app, ["search", "c", "[1, 1]", "--filter", "[]"]).exception, InvalidInput)
        assert isinstance(run(app, ["show", "missing"]).exception, NotFound)
        assert run(app, ["drop", "c"]).output == "dropped c\n"
    finally:
        set_flags({})
