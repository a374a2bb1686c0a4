"""The Open Inference Protocol, spoken by the unmodified `tritonclient` to a real server over real models."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from support.open_inference import (
    Gate,
    Held,
    House,
    all_wait,
    floats,
    given,
    is_inside,
)
from support.predictive_models import classifier, features

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

    def waking(self: Held, work: Callable[[Any], Any]) -> Any:
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
