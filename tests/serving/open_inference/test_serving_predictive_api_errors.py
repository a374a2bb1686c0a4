"""What goes wrong on the way of the Open Inference Protocol, and that it hurts nobody else."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import orjson
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from sihe.serving.predictive.predictor import Predictor
from support.open_inference import (
    Gate,
    House,
    all_wait,
    floats,
    given,
    is_inside,
)
from support.predictive_models import features


def test_errors_are_in_the_protocols_form(client: triton.InferenceServerClient) -> None:
    rows = features(2)
    for name, inputs, status, said in (
        ("absent", [given("input", rows)], "404", "no deployment"),
        ("iris", [given("inputs", rows)], "400", "inputs of this model are input"),
        ("iris", [given("input", rows[:, :3])], "400", "has shape"),
        ("iris", [given("input", rows.astype(np.float32))], "400", "is FP64, got 'FP32'"),
        ("scale", [given("x", floats([1, 2, 3]))], "400", "also needs input y"),
        ("echo", [given("text", np.array([[b"\xff"]], dtype=object))], "400", "UTF-8"),
    ):
        with pytest.raises(InferenceServerException, match=said) as caught:
            client.infer(name, inputs)
        assert caught.value.status() == status


def test_the_models_own_error_hurts_nobody_else(client: triton.InferenceServerClient, house: House, gate: Gate) -> None:
    first = client.async_infer("gate", [given("x", floats([0]))])
    is_inside(gate)
    bad, good = (client.async_infer("gate", [given("x", floats([number]))]) for number in (-1, 5))
    all_wait(house, 2)
    gate.open.set()
    assert first.get_result().as_numpy("y").tolist() == [[0]]
    assert good.get_result().as_numpy("y").tolist() == [[5]]
    with pytest.raises(InferenceServerException, match="below zero") as caught:
        bad.get_result()
    assert caught.value.status() == "500"


def test_deadlines_full_queues_and_their_headers(house: House, gate: Gate) -> None:
    def ask(timeout_ms: str | None = None) -> httpx.Response:
        body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}], "outputs": [{"name": "y"}]}
        headers = {} if timeout_ms is None else {"x-sihe-timeout-ms": timeout_ms}
        return httpx.post(f"{house.url}/v2/models/gate/infer", json=body, headers=headers, timeout=30)

    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(ask)
        assert gate.entered.acquire(timeout=30)
        late = ask("50")  # answered while the model is busy
        assert (late.status_code, list(late.json())) == (504, ["error"])
        assert "deadline" in late.json()["error"]
        waiting = [pool.submit(ask) for _ in range(4)]
        predictor = house.shelf.held["gate"]
        while len(predictor._queue) < 4:
            assert not any(future.done() for future in waiting)
        refused = ask()
        assert (refused.status_code, list(refused.json())) == (429, ["error"])
        assert int(refused.headers["retry-after"]) >= 1
        gate.open.set()
        for future in (first, *waiting):
            assert future.result().json()["outputs"][0]["data"] == [1.0]
    assert gate.rows == [1, 4]
    assert (house.sample("requests_total", deployment="gate", outcome="expired") or 0) >= 1
    assert (house.sample("requests_total", deployment="gate", outcome="refused") or 0) >= 1


def test_a_client_that_goes_away_leaves_the_queue(house: House, gate: Gate) -> None:
    body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}], "outputs": [{"name": "y"}]}
    predictor = house.shelf.held["gate"]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{house.url}/v2/models/gate/infer", json=body, timeout=30)
        assert gate.entered.acquire(timeout=30)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{house.url}/v2/models/gate/infer", json=body, timeout=0.2)
        with predictor._changed:
            assert predictor._changed.wait_for(lambda: len(predictor._queue) == 0, timeout=30)
        gate.open.set()
        assert first.result().status_code == 200
    assert gate.rows == [1]


def test_what_json_cannot_carry_is_refused_and_binary_carries_it(
    client: triton.InferenceServerClient, gate: Gate
) -> None:
    gate.open.set()
    asked = [triton.InferRequestedOutput("nan", binary_data=False)]
    with pytest.raises(InferenceServerException, match="binary"):
        client.infer("gate", [given("x", floats([1]))], outputs=asked)
    result = client.infer("gate", [given("x", floats([1]))], outputs=[triton.InferRequestedOutput("nan")])
    assert np.isnan(result.as_numpy("nan")).all()


def test_a_replica_that_closes_under_a_request_is_replaced_by_the_next(
    client: triton.InferenceServerClient, house: House, gate: Gate
) -> None:
    request = client.async_infer("gate", [given("x", floats([0]))])
    is_inside(gate)
    waiting = client.async_infer("gate", [given("x", floats([2]))], outputs=[triton.InferRequestedOutput("y")])
    old = house.shelf.held["gate"]
    all_wait(house, 1)
    backend = Gate()
    backend.open.set()
    house.shelf.held["gate"] = Predictor(backend, old.description, old.config, name="gate@2", example={})
    closer = threading.Thread(target=old.close, kwargs={"drain": False})
    closer.start()
    with old._changed:
        assert old._changed.wait_for(lambda: old._life.is_abandoned, timeout=30)
    gate.open.set()
    closer.join()
    assert request.get_result().get_response()["model_version"] == "1"
    assert waiting.get_result().get_response()["model_version"] == "2"
    house.shelf.held["gate"].close()
    with pytest.raises(InferenceServerException) as caught:
        client.infer("gate", [given("x", floats([1]))])
    assert caught.value.status() == "503"
    assert "closing" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"", {}, 400),
        (b"\x00\xff", {}, 400),
        (b"{}", {"Inference-Header-Content-Length": "99"}, 400),
        (b"{}", {"Content-Encoding": "br"}, 400),
        (b"{}", {"Content-Encoding": "gzip"}, 400),
        (bytes(64 * 2**20 + 1), {}, 413),
    ],
)
def test_hostile_bodies_get_an_error_and_the_server_goes_on(
    house: House, body: bytes, headers: dict[str, str], status: int
) -> None:
    response = httpx.post(f"{house.url}/v2/models/graph/infer", content=body, headers=headers, timeout=30)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    fine = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    again = httpx.post(f"{house.url}/v2/models/graph/infer", content=orjson.dumps(fine))
    assert again.json()["outputs"][0]["data"] == [3.0, 6.0, 9.0, 12.0]
    assert again.headers["x-sihe-batch-rows"] == "1"
    assert again.headers["server-timing"].startswith("queue;dur=")


def test_what_prometheus_sees(client: triton.InferenceServerClient, house: House) -> None:
    before = house.sample("rows_total", deployment="graph") or 0.0
    client.infer("graph", [given("x", floats([1, 2, 3, 4], [5, 6, 7, 8]))])
    assert house.sample("rows_total", deployment="graph") == before + 2
    assert (house.sample("requests_total", deployment="graph", outcome="ok") or 0) >= 1
    assert house.sample("waiting", deployment="graph", version="3") == 0
    assert house.sample("waiting", deployment="gate", version="1") is None, "that version is gone"
    for name in ("batch_rows", "queue_seconds", "compute_seconds"):
        assert (house.sample(f"{name}_count", deployment="graph") or 0) >= 1
