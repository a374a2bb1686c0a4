"""The Open Inference Protocol, spoken by the unmodified `tritonclient` to a real server over real models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import gevent
import httpx
import numpy as np
import orjson
import pytest
import torch
import tritonclient.http as triton
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from tritonclient.utils import InferenceServerException

from sihe.core.errors import NotFound, SiheError
from sihe.serving.deadlines import Deadline
from sihe.serving.errors import EngineClosed, NotReady
from sihe.serving.exchange import Answer, Question
from sihe.serving.predictive.api import error_response, router
from sihe.serving.predictive.config import PredictiveConfig
from sihe.serving.predictive.metrics import PredictiveMetrics, PredictorMetrics
from sihe.serving.predictive.predictor import Predictor
from sihe.serving.predictive.registration import save_onnx, save_sklearn, save_torch
from sihe.serving.predictive.types import Array, ModelDescription, TensorSpec
from support.http_server import serving
from support.predictive_models import Scale, classifier, features, matmul_onnx, text_onnx

T = TypeVar("T")


class Gate:
    """A backend that waits until it is opened, and fails on negative numbers."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.rows: list[int] = []

    def run(self, inputs: Mapping[str, Array], outputs: frozenset[str]) -> Mapping[str, Array]:
        array: Any = inputs["x"]
        self.rows.append(array.shape[0])
        self.entered.release()
        assert self.open.wait(30)
        if (array < 0).any():
            raise ArithmeticError("below zero")
        return {"y": array, "nan": np.full(array.shape, np.nan, np.float32)}

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Status:
    name: str
    version: int | None
    error: str | None = None


@dataclass
class Shelf:
    """What serves, by name: the least that the routes need."""

    held: dict[str, Any] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def served(self) -> tuple[Status, ...]:
        there = [Status(name, int(served.version)) for name, served in sorted(self.held.items())]
        return (*there, *(Status(name, None, why) for name, why in self.broken.items()))

    def route(self, name: str) -> Held:
        if name not in self.held and name not in self.broken:
            raise NotFound("deployment", name)
        return Held(self, name)

    def turn(self, name: str, **_: object) -> Straight:
        return Straight(self.route(name))

    def aside(self, name: str, **_: object) -> Straight:
        return Straight(self.route(name))


@dataclass
class Straight:
    """The way of a request where there are no arms and no other replicas."""

    held: Held
    arm: str = "stable"
    deadline: Deadline | None = None
    has_own_limit: bool = False
    question: Question | None = None
    is_heard: bool = False

    def start(self, work: Callable[[Any], T], *, block: bool = True) -> T:
        return self.held.call(work)

    def whole(self, work: Callable[[Any], T]) -> T:
        return self.start(work)

    def finished(self, answer: Answer | None = None) -> None:
        """It is the end."""

    def failed(self, error: BaseException) -> bool:
        return isinstance(error, EngineClosed)

    def left(self) -> None:
        """It is the end."""

    def shown(self, error: BaseException) -> BaseException:
        return error


@dataclass(frozen=True)
class Held:
    shelf: Shelf
    name: str

    def call(self, work: Callable[[Any], T]) -> T:
        if self.name in self.shelf.broken:
            raise NotReady(self.name, self.shelf.broken[self.name])
        return work(self.shelf.held[self.name])


@dataclass(frozen=True)
class House:
    """A server with its models and metrics."""

    url: str
    shelf: Shelf
    registry: CollectorRegistry

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"sihe_predictive_{name}", labels)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root = tmp_path_factory.mktemp("models")
    save_sklearn(classifier(), root / "iris", example=features(2))
    save_torch(Scale(), root / "scale", example={"x": torch.ones(2, 3), "y": torch.ones(2, 3)}, outputs=("z", "total"))
    save_onnx(matmul_onnx(root / "m.onnx", factor=3.0), root / "graph")
    save_onnx(text_onnx(root / "t.onnx"), root / "echo")
    linear = torch.nn.Linear(3, 2).to(torch.bfloat16)
    save_torch(linear, root / "half", example={"input": torch.ones(2, 3).to(torch.bfloat16)})
    registry = CollectorRegistry()
    metrics = PredictiveMetrics.on(registry)
    shelf = Shelf()
    for name in ("iris", "scale", "graph", "echo", "half"):
        shelf.held[name] = Predictor.load(root / name, name=f"{name}@3", observer=PredictorMetrics(metrics, name, 3))
    app = FastAPI()
    app.include_router(router(shelf))

    @app.exception_handler(SiheError)
    def failed(request: Request, error: SiheError) -> Any:
        return error_response(error)

    with serving(app) as url:
        yield House(url, shelf, registry)
    for predictor in shelf.held.values():
        predictor.close()


@pytest.fixture
def client(house: House) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(house.url.removeprefix("http://"), concurrency=8) as opened:
        yield opened


@pytest.fixture
def gate(house: House) -> Iterator[Gate]:
    """A model under the name `gate`, with room for four waiting requests."""
    backend = Gate()
    description = ModelDescription(
        "onnx_onnxv1",
        "m",
        (TensorSpec("x", "FP32", (-1, 1)),),
        (TensorSpec("y", "FP32", (-1, 1)), TensorSpec("nan", "FP32", (-1, 1))),
    )
    config = PredictiveConfig(max_waiting=4, max_delay_ms=0)
    example: dict[str, Any] = {"x": np.zeros((1, 1), np.float32)}
    metrics = PredictorMetrics(PredictiveMetrics.on(house.registry), "gate", 1)
    with Predictor(backend, description, config, name="gate@1", example=example, observer=metrics) as predictor:
        house.shelf.held["gate"] = predictor
        yield backend
        backend.open.set()
        del house.shelf.held["gate"]


def given(name: str, array: Any, *, datatype: str | None = None, binary: bool = True) -> Any:
    kind = datatype or (triton.InferInput and {"f": "FP32", "d": "FP64", "O": "BYTES"}[array.dtype.char])
    return triton.InferInput(name, list(array.shape), kind).set_data_from_numpy(array, binary_data=binary)


def floats(*rows: list[float]) -> Any:
    return np.array(rows, np.float32)


# ---- health and metadata -------------------------------------------------------------------------------------------


def test_health_and_readiness(client: triton.InferenceServerClient, house: House) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("iris")
    assert client.is_model_ready("iris", "3")
    assert not client.is_model_ready("iris", "4")
    assert not client.is_model_ready("absent")
    house.shelf.broken["late"] = "its model is loading"
    try:
        assert not client.is_server_ready()
        assert not client.is_model_ready("late")
        index = {model["name"]: model for model in client.get_model_repository_index()}
        assert index["late"] == {
            "name": "late",
            "version": "",
            "state": "UNAVAILABLE",
            "reason": "its model is loading",
        }
        assert index["iris"] == {"name": "iris", "version": "3", "state": "READY", "reason": ""}
    finally:
        house.shelf.broken.clear()


def test_metadata(client: triton.InferenceServerClient) -> None:
    assert client.get_server_metadata()["name"] == "sihe"
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert (
        client.get_model_metadata("iris", "3")
        == client.get_model_metadata("iris")
        == {
            "name": "iris",
            "versions": ["3"],
            "platform": "sklearn_skops",
            "inputs": [{"name": "input", "datatype": "FP64", "shape": [-1, 4]}],
            "outputs": [
                {"name": "label", "datatype": "INT64", "shape": [-1]},
                {"name": "probabilities", "datatype": "FP64", "shape": [-1, 3]},
            ],
        }
    )
    for name, version in (("absent", ""), ("iris", "9")):
        with pytest.raises(InferenceServerException, match=r"no (deployment|version)") as caught:
            client.get_model_metadata(name, version)
        assert caught.value.status() == "404"


def test_who_waits_for_a_models_metadata_holds_up_nobody(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, woken = threading.Event(), threading.Event()
    call = Held.call

    def waking(self: Held, work: Callable[[Any], T]) -> T:
        asked.set()
        assert woken.wait(30)
        return call(self, work)

    monkeypatch.setattr(Held, "call", waking)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(httpx.get, f"{house.url}/v2/models/iris", timeout=30)
        assert asked.wait(30)
        try:
            assert httpx.get(f"{house.url}/v2/health/live", timeout=10).json() == {"live": True}
        finally:
            woken.set()
        assert waiting.result(30).json()["name"] == "iris"


def test_models_of_other_kinds_are_told_where_they_answer(client: triton.InferenceServerClient, house: House) -> None:
    house.shelf.held["writer"] = SimpleNamespace(version="1")  # anything that is no predictor
    try:
        assert client.is_model_ready("writer")
        with pytest.raises(InferenceServerException, match="under /v1") as caught:
            client.infer("writer", [given("x", floats([1]))])
        assert caught.value.status() == "400"
    finally:
        del house.shelf.held["writer"]


# ---- inference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_a_classifier(client: triton.InferenceServerClient, binary_in: bool, binary_out: bool) -> None:
    rows = features(5, seed=7)
    result = client.infer(
        "iris",
        [given("input", rows, binary=binary_in)],
        request_id="r-1",
        outputs=[triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("probabilities", "label")],
    )
    estimator = classifier()
    assert result.as_numpy("label").tolist() == estimator.predict(rows).tolist()
    np.testing.assert_allclose(result.as_numpy("probabilities"), estimator.predict_proba(rows), rtol=1e-6)
    said = result.get_response()
    assert (said["id"], said["model_name"], said["model_version"]) == ("r-1", "iris", "3")
    assert [output["name"] for output in said["outputs"]] == ["probabilities", "label"]


def test_every_output_comes_when_none_is_named(client: triton.InferenceServerClient) -> None:
    x, y = floats([1, 2, 3], [4, 5, 6]), floats([1, 1, 1], [0, 0, 0])
    result = client.infer("scale", [given("x", x), given("y", y)], model_version="3")
    np.testing.assert_array_equal(result.as_numpy("z"), 2 * x + y)
    np.testing.assert_array_equal(result.as_numpy("total"), [6, 15])


@pytest.mark.parametrize("binary", [True, False])
def test_text(client: triton.InferenceServerClient, binary: bool) -> None:
    table = np.array([["ü".encode()], [b""], [b"three"]], dtype=object)
    asked = [triton.InferRequestedOutput("same", binary_data=binary)]
    result = client.infer("echo", [given("text", table, binary=binary)], outputs=asked)
    got = result.as_numpy("same")
    assert [item if isinstance(item, bytes) else item.encode() for item in got.ravel()] == table.ravel().tolist()
    assert got.shape == (3, 1)


def test_bf16(client: triton.InferenceServerClient, house: House) -> None:
    rows = floats([1, 2, 3], [0.5, 0.25, 0])
    result = client.infer("half", [given("input", rows, datatype="BF16")])
    assert result.get_output("output")["datatype"] == "BF16"
    module = house.shelf.held["half"]._backend._module
    with torch.no_grad():
        expected = module(input=torch.from_numpy(rows).to(torch.bfloat16)).float().numpy()
    np.testing.assert_array_equal(result.as_numpy("output"), expected)


def test_classification(client: triton.InferenceServerClient) -> None:
    rows = features(2, seed=7)
    asked = [triton.InferRequestedOutput("probabilities", class_count=2)]
    named = client.infer("iris", [given("input", rows)], outputs=asked).as_numpy("probabilities")
    expected = classifier().predict_proba(rows)
    for row, best in enumerate(named):
        value, index, label = best[0].decode().split(":")
        assert (int(index), label) == (int(expected[row].argmax()), str(expected[row].argmax()))
        assert float(value) == pytest.approx(expected[row].max())


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compression_both_ways(client: triton.InferenceServerClient, coding: str) -> None:
    rows = np.zeros((500, 4), np.float32)
    result = client.infer(
        "graph",
        [given("x", rows)],
        request_compression_algorithm=coding,
        response_compression_algorithm=coding,
    )
    assert result._buffer == rows.tobytes()


def test_large_tensors(client: triton.InferenceServerClient) -> None:
    rows = np.random.default_rng(0).normal(size=(100_000, 4)).astype(np.float32)
    np.testing.assert_array_equal(client.infer("graph", [given("x", rows)]).as_numpy("z"), rows * np.float32(3))


def test_async_requests_are_batched_and_answered_each(
    client: triton.InferenceServerClient, house: House, gate: Gate
) -> None:
    first = client.async_infer("gate", [given("x", floats([0]))])
    is_inside(gate)
    rest = [client.async_infer("gate", [given("x", floats([number]))]) for number in range(1, 5)]
    all_wait(house, 4)
    gate.open.set()
    got = [request.get_result().as_numpy("y").tolist() for request in (first, *rest)]
    assert got == [[[float(number)]] for number in range(5)]
    assert gate.rows == [1, 4]


def is_inside(gate: Gate) -> None:
    """Returns when the model computes; lets the client's greenlets send meanwhile."""
    while not gate.entered.acquire(blocking=False):
        gevent.sleep(0)


def all_wait(house: House, count: int) -> None:
    """Returns when so many requests are in the queue; lets the client's greenlets send meanwhile."""
    while len(house.shelf.held["gate"]._queue) < count:
        gevent.sleep(0)


# ---- errors --------------------------------------------------------------------------------------------------------


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
        assert old._changed.wait_for(lambda: old._abandon, timeout=30)
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
